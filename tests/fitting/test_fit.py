"""weft fit end to end on a tiny model: budgets hold, comparisons are fair, a killed run ends with the same bytes."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import random
import signal
import sys
from collections import Counter
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weft.error import ConflictError, OptionError
from weft.expr import tensors
from weft.fitting.data import resolve
from weft.fitting.fit import fit, plan
from weft.fitting.settings import ADAPTER_SHARE, ARMS, Settings
from weft.fitting.work import Work
from weft.model import expressions
from weft.progress import Silent
from weft.report.schema import Report
from weft.store import load, nbytes
from weft.store.cache import Cache


@pytest.fixture(scope="module")
def fitted(lm: Path, examples: Path, small: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """One run with data, two budgets and two seeds."""
    home = tmp_path_factory.mktemp("fit")
    made = fit(
        lm,
        home / "out",
        budget=["40%", "20%"],
        data=str(examples),
        settings=small,
        cache=home / "cache",
        command="weft fit x",
    )
    return made, home


def test_equal_records_are_one(tmp_path: Path) -> None:
    """The same text on two lines is not both learnt and tested on."""
    lines = [f"the cat {i} sat on the mat" for i in range(30)] * 3
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    found = resolve(str(tmp_path / "d.jsonl"), embeds=False, seed=0)
    parts = [{e.text for e in part} for part in (found.train, found.select, found.test)]
    assert (
        sum(map(len, parts))
        == len(set.union(*parts))
        == 30
        == sum(len(p) for p in (found.train, found.select, found.test))
    )


def test_every_arm_fits_its_budget(fitted: tuple[Report, Path]) -> None:
    """No row takes more bytes than the budget, adapters included, and all adapters are the same size."""
    for b in fitted[0].budgets:
        assert {(r.arm, r.stage) for r in b.rows} == {(a, s) for a in ARMS for s in ("compress", "compress + tune")}
        assert all(r.bytes <= b.limit_bytes for r in b.rows)
        sizes = {r.adapter_bytes for r in b.rows if r.stage == "compress + tune"}
        assert len(sizes) == 1 and 0 < sizes.pop() <= ADAPTER_SHARE * b.limit_bytes


def test_bytes_are_those_on_disk(fitted: tuple[Report, Path]) -> None:
    """The saved model loads, holds no more bytes than its budget and than any seed's, and its bytes are its tensors' bytes."""
    for b in fitted[0].budgets:
        model = load(Path(b.out or ""))
        on_disk = sum(t.numel() * t.element_size() for e in expressions(model).values() for t in tensors(e).values())
        assert nbytes(model) <= b.limit_bytes and on_disk < nbytes(model)
        assert nbytes(model) <= max(r.bytes for r in b.rows if r.arm == "fit")
        assert nbytes(model) == json.loads((Path(b.out or "") / "weft.json").read_text())["bytes"]


def test_fit_is_never_behind_on_the_data_it_picks_by(
    fitted: tuple[Report, Path], lm: Path, examples: Path, small: Settings
) -> None:
    """Of all that is built, fit is the one of least distance on the choosing data."""
    report, home = fitted
    work = Work(str(lm), str(examples), small, Cache(home / "cache"), Silent())
    for b in report.budgets:
        arms = work.arms(work.run(0), b.limit_bytes)
        assert arms["fit"].measured == min(a.measured for a in arms.values())


def test_comparison_is_paired(fitted: tuple[Report, Path]) -> None:
    """A difference to fit is the difference of the scores."""
    for b in fitted[0].budgets:
        for stage in ("compress", "compress + tune"):
            rows = {r.arm: r for r in b.rows if r.stage == stage}
            for arm in ARMS[1:]:
                gap = rows[arm].versus_fit
                assert gap is not None
                assert np.isclose(gap.mean, rows[arm].score.mean - rows["fit"].score.mean, atol=1e-9)
                assert gap.low <= gap.mean <= gap.high


def test_second_run_takes_everything_from_the_cache(
    fitted: tuple[Report, Path], lm: Path, examples: Path, small: Settings
) -> None:
    """The same call again finds every result, and says the same."""
    report, home = fitted
    again = fit(
        lm, budget=["40%", "20%"], data=str(examples), settings=small, cache=home / "cache", command="weft fit x"
    )
    assert all(s.cache == "hit" for s in again.steps if s.name in ("candidates", "tune", "score"))
    strip = {"steps": [], "next": [], "fallbacks": []}
    mine, theirs = (
        r.model_copy(update=strip | {"budgets": [b.model_copy(update={"out": None}) for b in r.budgets]})
        for r in (report, again)
    )
    assert mine == theirs


def test_report_lies_beside_the_models(fitted: tuple[Report, Path]) -> None:
    """report.json is the report; report.html is there."""
    report, home = fitted
    assert Report.model_validate_json((home / "out" / "report.json").read_text()) == report
    assert "<html" in (home / "out" / "report.html").read_text()


def test_without_data_nothing_is_tuned(lm: Path, small: Settings, tmp_path: Path) -> None:
    """Own texts calibrate, the distance to the original is the score, and one budget's folder holds model and report."""
    made = fit(lm, tmp_path / "out", budget="30%", settings=small, cache=tmp_path / "cache")
    assert {r.stage for r in made.budgets[0].rows} == {"compress"} and made.metric.name == "KL to the original"
    assert made.original.score == pytest.approx(0, abs=1e-6)
    assert (tmp_path / "out" / "report.html").exists() and nbytes(load(tmp_path / "out")) <= made.budgets[0].limit_bytes


@pytest.mark.parametrize("search", ["uniform", "higgs"])
def test_another_search_makes_the_choice(lm: Path, small: Settings, tmp_path: Path, search: str) -> None:
    """Within the budget; the mixed arm is built from what that method chose, and not from the knapsack's choice."""
    quick = dataclasses.replace(small, seeds=1, search=search, bits=(2, 4), groups=(32,))
    work = Work(str(lm), None, quick, Cache(tmp_path / "cache"), Silent())
    run, limit = work.run(0), int(0.3 * work.bytes)
    built = work.mixed(run, limit)
    choice, other = run.search.mixed(limit, search), run.search.mixed(limit, "knapsack")
    assert run.search.nbytes(choice) <= limit and choice != other
    assert built.chains == {s: run.table.chains[c] for s, c in zip(run.table.sites, choice, strict=True)}


def test_smallest_within_a_loss(lm: Path, examples: Path, small: Settings, tmp_path: Path) -> None:
    """--max-loss gives a model within the loss on the choosing data, smaller than the original."""
    from dataclasses import replace

    quick = replace(small, seeds=1, tune_steps=1)
    made = fit(lm, tmp_path / "out", max_loss="2%", data=str(examples), settings=quick, cache=tmp_path / "cache")
    assert made.budgets[0].limit_bytes < made.original.bytes
    work = Work(str(lm), str(examples), quick, Cache(tmp_path / "cache"), Silent())
    run = work.run(0)
    build = work.mixed(run, made.budgets[0].limit_bytes)
    before, after = (
        work.score(run, m, n, "select")
        for m, n in ((work.plain, work.print), (work.model(run, build.chains), work.about(run, build.chains)))
    )
    assert np.average(after[0], weights=after[1]) <= 1.02 * np.average(before[0], weights=before[1])


def test_refusals(lm: Path, small: Settings, tmp_path: Path) -> None:
    """No budget, two wishes, and a budget that nothing fits are refused; the last names what would fit."""
    with pytest.raises(OptionError):
        fit(lm, settings=small, cache=tmp_path)
    with pytest.raises(OptionError):
        fit(lm, budget="20%", max_loss="1%", settings=small, cache=tmp_path)
    with pytest.raises(ConflictError):
        fit(lm, budget="2%", settings=small, cache=tmp_path)
    for name in ("rtn", "nothing"):
        with pytest.raises(OptionError, match="search"):
            fit(lm, budget="20%", settings=dataclasses.replace(small, search=name), cache=tmp_path)


def test_plan_computes_nothing(lm: Path, small: Settings, tmp_path: Path) -> None:
    """The plan names sizes, candidates and budgets, and leaves the cache empty."""
    lines = plan(lm, budget=["20%"], data="python", settings=small, cache=tmp_path / "cache")
    assert any("budget 20%" in line for line in lines) and not (tmp_path / "cache").exists()


PLACES = ("evidence", "candidates", "built", "measured", "scores", "tuning", "tuned", "out")
"""Where a fit writes: folders of the cache, and the model's."""
CHANGES = {"open": 0, "os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.remove": 0, "os.rmdir": 0, "shutil.rmtree": 0}
"""What Python tells of changes on disk, and which argument is the path."""
BRIEF = Settings(
    seeds=1, tokens=256, select_tokens=128, test_tokens=256, length=32, bits=(2, 4), groups=(32,), tries=1, tune_steps=12,
    tune_batch=2, lr=1e-2,
)  # fmt: skip
Moment = tuple[str, int]
"""A place, and how many changes of it there are by then."""


@pytest.mark.parametrize("seed", [0, 2])
def test_killed_anywhere_ends_with_the_same_bytes(
    lm: Path, examples: Path, tmp_path: Path, fresh: ForkServerContext, seed: int
) -> None:
    """SIGKILL as a random file of every place is about to change, started again until it ends: a straight run's model files.

    Between two such moments there is nothing on disk that a later start could find otherwise.
    """
    rng = random.Random(seed)
    straight, killed = tmp_path / "a", tmp_path / "b"
    assert _started(fresh, lm, examples, straight) == 0
    seen = _seen(straight)
    moments = [rng.choice([i for i, at in enumerate(seen) if at == place]) for place in PLACES]
    for i in sorted(moments):
        assert _started(fresh, lm, examples, killed, (seen[i], seen[: i + 1].count(seen[i]))) == -signal.SIGKILL
    assert _started(fresh, lm, examples, killed) == 0
    assert _digests(straight / "out") == _digests(killed / "out")


def _started(fresh: ForkServerContext, lm: Path, examples: Path, home: Path, moment: Moment = ("", 0)) -> int | None:
    """A fit's exit code."""
    process = fresh.Process(target=_fit, args=(lm, examples, home, moment))
    process.start()
    process.join(300)
    return process.exitcode


def _fit(lm: Path, examples: Path, home: Path, moment: Moment) -> None:
    """Fit into `home`, which keeps a list of what places changed; killed where a place is about to change that often."""
    gc.freeze()
    torch.set_num_threads(1)
    home.mkdir(exist_ok=True)
    seen = Counter(_seen(home))
    log = os.open(home / "seen", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        place = _place(home, args[CHANGES[event]])
        if place in PLACES:
            os.write(log, f"{place}\n".encode())
            seen[place] += 1
            if place == moment[0] and seen[place] >= moment[1]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    fit(lm, home / "out", budget="25%", data=str(examples), settings=BRIEF, cache=home / "cache", replace=True)


def _seen(home: Path) -> list[str]:
    return (home / "seen").read_text().split() if (home / "seen").exists() else []


def _place(home: Path, path: Any) -> str:
    """The folder of the cache that a path is in, or `out` for the model's and what is made beside it."""
    try:
        first, *rest = Path(os.fsdecode(path)).relative_to(home).parts
    except (TypeError, ValueError):
        return ""
    return "out" if first != "cache" else rest[0] if rest else ""


def _digests(out: Path) -> dict[str, str]:
    """The model's own files: tensors, configuration and expressions."""
    found: dict[str, Any] = {
        p.name: hashlib.blake2b(p.read_bytes()).hexdigest()
        for p in out.glob("*")
        if p.suffix == ".safetensors" or p.name == "config.json"
    }
    manifest = json.loads((out / "weft.json").read_text())
    return {**found, "sites": json.dumps(manifest["sites"]), "bytes": manifest["bytes"]}


def test_reload_is_what_was_scored(fitted: tuple[Report, Path]) -> None:
    """The saved model's logits are finite and repeatable after loading twice."""
    out = Path(fitted[0].budgets[0].out or "")
    ids = {"input_ids": torch.arange(2, 34)[None]}
    with torch.no_grad():
        a, b = (load(out)(**ids).logits for _ in range(2))
    assert torch.isfinite(a).all() and torch.equal(a, b)
