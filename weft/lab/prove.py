"""Try the claims of methods on the lab models and keep what came out, whatever it is, in a folder of proofs."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from weft.engine import Method, get
from weft.engine import names as method_names
from weft.engine.run import code_version
from weft.error import OptionError, WeftError, raise_all
from weft.lab import known
from weft.lab.claims import SEEDS, Claim, Lab
from weft.lab.realism import Specimen, card
from weft.lab.specimens import of, specimens
from weft.lab.subjects import installed
from weft.lab.trial import Subject
from weft.model import fingerprint
from weft.progress import Progress, Silent
from weft.store.cache import Cache, default, key
from weft.store.files import read_json, write_json

PROOFS = Path("proofs")
REALISM = "realism.json"
KNOWN_ANSWERS = "known.json"
_OTHERS = (REALISM, KNOWN_ANSWERS, "untried.json")
"""Files beside the proofs."""


def prove(
    names: Sequence[str],
    *,
    folder: str | Path = PROOFS,
    seeds: int = SEEDS,
    jobs: int = 1,
    cache: Cache | None = None,
    progress: Progress | None = None,
    models: Sequence[str] | None = None,
    subjects: Sequence[Subject] | None = None,
    search: bool = False,
) -> dict[str, Claim]:
    """Try these methods' claims, or single ones (`lora.dora`); write `folder`/NAME.json for each, and the lab models' realism cards.

    A lab model on which a known answer of the method's verb came out the other way (`folder`/known.json) is left out, and the file
    says so. Files depend on the code and the lab models alone, but for the date and the seconds. A killed run resumes from the cache.
    Learning rates are those that the files in `folder` say were found for the same chains of methods on the same data; with `search` all
    are looked for again. `jobs` processes share the claims. `models`: for a first look, some of the lab's; nothing is written then.
    `subjects`: models of one's own instead, in this process.
    Errors: OptionError for methods without a claim, fewer than three seeds, and unknown models; ConflictError if no model is left.
    """
    claimed, folder = _claimed(names), Path(folder)
    rates = {} if search else _rates(folder)
    lab = Lab(installed(models) if subjects is None else subjects, cache=cache, seeds=seeds, rates=rates)
    if models is None:
        realism([of(trials[0]) for trials in lab.trials.values()], folder=folder, cache=cache)
    held = read_json(folder / KNOWN_ANSWERS) if (folder / KNOWN_ANSWERS).exists() else {}

    def tried(name: str) -> Claim:
        return claimed[name].proofs[name].tried(lab.without(known.failed(held, claimed[name].verb), name))

    apart = (
        None
        if subjects is not None
        else partial(_proved, held=held, models=models, seeds=seeds, cache=cache, rates=rates)
    )
    made: dict[str, Claim] = {}
    took = {n: read_json(path)["seconds"] for n in claimed if (path := folder / f"{n}.json").exists()}
    for name, claim in _each("prove", _longest_first(claimed, took), tried, apart, jobs, progress):
        made[name] = claim
        if models is None:
            m = claimed[name]
            write_json(folder / f"{name}.json", _file(m, name, claim, known.failed(held, m.verb)))
    return {name: made[name] for name in claimed}


def _rates(folder: Path) -> dict[str, float]:
    """The learning rates that proofs in a folder say, by what they depend on."""
    proofs = [read_json(p) for p in sorted(folder.glob("*.json")) if p.name not in _OTHERS]
    proofs += read_json(path).values() if (path := folder / KNOWN_ANSWERS).exists() else ()
    return {name: rate for proof in proofs for m in proof["models"] for name, rate in m.get("rates", {}).items()}


def _proved(
    name: str,
    held: dict[str, Any],
    models: Sequence[str] | None,
    seeds: int,
    cache: Cache | None,
    rates: Mapping[str, float],
) -> Claim:
    """A claim, tried in a process of its own."""
    gc.collect()  # training collects garbage every time: what is here by now need not be looked through again
    gc.freeze()
    m = get(name.partition(".")[0])
    lab = Lab(installed(models), cache=cache, seeds=seeds, rates=rates)
    return m.proofs[name].tried(lab.without(known.failed(held, m.verb), name))


def _answered(name: str, seeds: int, cache: Cache | None, rates: Mapping[str, float]) -> Claim:
    """A known answer, tried in a process of its own."""
    return known.KNOWN[name].tried(Lab(installed(), cache=cache, seeds=seeds, rates=rates))


def _longest_first(names: Iterable[str], took: Mapping[str, float]) -> list[str]:
    """By the seconds that they took, so that processes end together, those of which nothing is known first.

    One claim of every method comes before all others: what claims of a method share is then made by the time that these ask for it.
    """
    order = sorted(names, key=lambda n: -took.get(n, float("inf")))
    lead = {n.partition(".")[0]: n for n in reversed(order)}
    return sorted(order, key=lambda n: lead[n.partition(".")[0]] != n)


def _each(
    label: str,
    names: Sequence[str],
    here: Callable[[str], Claim],
    apart: Callable[[str], Claim] | None,
    jobs: int,
    progress: Progress | None,
) -> Iterator[tuple[str, Claim]]:
    """Every claim as it is tried: in this process, one after another, or in several that share the cores.

    One that cannot be tried stops no other; its WeftError comes at the end, with those of all such.
    """
    problems: list[WeftError] = []
    with (progress or Silent()).bar(label, len(names)) as step:
        for name, try_it in _tried(names, here, apart, jobs):
            try:
                yield name, try_it()
            except WeftError as e:
                problems.append(e)
            step(1)
    raise_all(problems)


def _tried(
    names: Sequence[str], here: Callable[[str], Claim], apart: Callable[[str], Claim] | None, jobs: int
) -> Iterator[tuple[str, Callable[[], Claim]]]:
    """Every claim, as soon as its result can be had."""
    if apart is None or min(jobs, len(names)) < 2:
        yield from ((name, partial(here, name)) for name in names)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, fresh, torch.set_num_threads, (threads,)) as pool:
        work = {pool.submit(apart, name): name for name in names}
        try:
            yield from ((work[done], done.result) for done in as_completed(work))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _file(m: Method, name: str, claim: Claim, left_out: dict[str, list[str]]) -> dict[str, Any]:
    """What a file of proof says."""
    of = m.proofs[name]
    head = {"method": m.name, "claim": of.claim, "paper": of.paper, "date": today()}
    head |= {"fingerprint": m.fingerprint(), "tried": of.fingerprint}
    return head | claim.as_json() | ({"left_out": left_out} if left_out else {})


def answer(
    *,
    folder: str | Path = PROOFS,
    seeds: int = SEEDS,
    jobs: int = 1,
    cache: Cache | None = None,
    progress: Progress | None = None,
    subjects: Sequence[Subject] | None = None,
    search: bool = False,
) -> dict[str, Claim]:
    """Try every known answer on every lab model; write `folder`/known.json. `search`: as in `prove`.

    Errors: OptionError for fewer than three seeds.
    """
    rates = {} if search else _rates(Path(folder))
    lab = Lab(subjects, cache=cache, seeds=seeds, rates=rates)
    apart = None if subjects is not None else partial(_answered, seeds=seeds, cache=cache, rates=rates)
    path = Path(folder) / KNOWN_ANSWERS
    took = {n: c["seconds"] for n, c in read_json(path).items()} if path.exists() else {}
    names = _longest_first(known.KNOWN, took)
    found = dict(_each("known answers", names, lambda n: known.KNOWN[n].tried(lab), apart, jobs, progress))
    made = {name: found[name] for name in known.KNOWN}
    about = {n: {"verb": known.KNOWN[n].verb, "claim": known.KNOWN[n].text, "date": today()} for n in made}
    write_json(path, {n: about[n] | c.as_json() for n, c in made.items()})
    return made


def realism(
    given: Iterable[Specimen] | None = None,
    *,
    folder: str | Path | None = PROOFS,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """The realism cards of these lab models, written to `folder`/realism.json beside those of others; if not given of all.

    Models that have to be made first take minutes each. Without a folder nothing is written.
    """
    held, made = cache or Cache(default()), dict[str, dict[str, Any]]()
    code = [code_version("lab", "lab/made", "learn"), *(get(n).fingerprint() for n in ("rtn", "gptq"))]
    for s in specimens(progress=progress) if given is None else given:
        name = key("realism", fingerprint(s.model), s.name, code)
        made[s.name] = held.json("realism", name, lambda s=s: card(s))
    if folder is not None:
        path = Path(folder) / REALISM
        write_json(path, dict(sorted({**(read_json(path) if path.exists() else {}), **made}.items())))
    return made


def today() -> str:
    """The date, as proofs hold it."""
    return date.today().isoformat()


def stale(folder: str | Path = PROOFS) -> dict[str, str]:
    """Claims without a proof that holds today, and why: none, or a file changed, the method's or one's that took part.

    Errors: OptionError for methods without a claim; FormatError for a proof that is not JSON.
    """
    found = {name: _changed(m, name, Path(folder) / f"{name}.json") for name, m in _claimed(method_names()).items()}
    return {name: why for name, why in found.items() if why}


def _changed(m: Method, name: str, path: Path) -> str:
    if not path.exists():
        return "no proof"
    held, known_ = read_json(path), set(method_names())
    if held.get("tried") != m.proofs[name].fingerprint:
        return "another claim"
    now = {n: get(n).fingerprint() if n in known_ else "" for n in {**held["methods"], m.name: ""}}
    changed = [n for n, f in {**held["methods"], m.name: held["fingerprint"]}.items() if now[n] != f]
    return f"changed: {', '.join(sorted(changed))}" if changed else ""


def _claimed(names: Sequence[str]) -> dict[str, Method]:
    """The method of every claim that is asked for: all of a method's, or one by its name."""
    asked = {name: get(name.partition(".")[0]) for name in names}
    bare = [name for name, m in asked.items() if not m.proofs or ("." in name and name not in m.proofs)]
    if bare:
        raise OptionError(
            "every method has a claim that can be tried",
            where=", ".join(bare),
            got="no such claim",
            want="a function (lab) -> Claim under @NAME.claim",
            fix="add one to the method's file",
        )
    return {name: m for word, m in asked.items() for name in ([word] if "." in word else m.proofs)}
