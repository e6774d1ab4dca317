"""Lab models that are made on first use: the same every time, whole or not at all, trained, woven, and kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weft
from weft import nets
from weft.error import ConflictError, NumericError, OptionError, ResourceError
from weft.lab import made, models
from weft.lab.distance import windows
from weft.lab.made import ctr, digits, dlm, moe, recipe, seq2seq
from weft.lab.made.recipe import Recipe, make
from weft.lab.metrics import Scores
from weft.store import lock, verify

STEPS = {
    "ref-vit": 12,
    "ref-moe": 1,
    "ref-seq2seq": 12,
    "ref-clip": 12,
    "ref-dlm": 1,
    "ref-diffusion": 12,
    "ref-ctr": 12,
}
"""Enough to be better than before, in seconds."""
KIND = {
    "ref-vit": "ViTForImageClassification",
    "ref-moe": "MixtralForCausalLM",
    "ref-seq2seq": "T5ForConditionalGeneration",
    "ref-clip": "CLIPModel",
    "ref-dlm": "EuroBertForMaskedLM",
    "ref-diffusion": "FlowTransformer",
    "ref-ctr": "CrossNetwork",
}
DIGITS = ("ref-vit", "ref-clip", "ref-diffusion")
"""Those that are made of scikit-learn's digits."""
UPCYCLED = ("ref-moe", "ref-dlm")
"""Those that start trained."""


@pytest.fixture(scope="module", params=made.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Every made model in turn."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _short() -> Any:
    """One held-out document, scored once, and a quarter of the tokens of batches do here, and a short log of clicks."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (moe, dlm):
            patch.setattr(module, "DOCUMENTS", 1)
            patch.setattr(module, "windows", lambda *a, tokens, **how: windows(*a, tokens=tokens // 4, **how))
        patch.setattr(dlm, "DRAWS", 1)
        patch.setattr(ctr, "LOG", 20_000)
        yield


@pytest.fixture(scope="module")
def short(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, dict[str, Any]]:
    """A recipe, the folder that a few steps of it gave, and what it says of that."""
    if name in DIGITS:
        pytest.importorskip("sklearn", reason="scikit-learn is not installed (it is in the lab extra)")
    known, out = made.get(name), tmp_path_factory.mktemp("made") / name
    return known, out, make(known, out, steps=STEPS[name])


def mean(scores: Scores) -> float:
    """The score."""
    return float(np.average(scores[0], weights=scores[1]))


def test_every_file_of_the_folder_is_listed() -> None:
    """A recipe is a file with RECIPE in it, and its name is known to `weft.load`."""
    files = Path(made.__file__).parent.glob("*.py")
    assert {f"ref-{f.stem}" for f in files if "\nRECIPE = " in f.read_text("utf8")} == set(made.NAMES) == set(STEPS)
    assert set(made.NAMES) <= set(models.names())
    assert all(made.get(n).name == n and made.get(n).steps >= 100 for n in made.NAMES)
    with pytest.raises(OptionError, match="unknown lab model"):
        made.get("ref-lm")


def test_a_few_steps_help(short: tuple[Recipe, Path, dict[str, Any]]) -> None:
    """The score is better than before training (but of those that start trained), and made.json and the card say what it is."""
    known, out, about = short
    now = mean(known.score(weft.load(out)))
    assert now == pytest.approx(about["score"][known.metric], rel=1e-3)
    torch.manual_seed(0)
    assert known.name in UPCYCLED or now < mean(known.score(known.model().eval()))
    assert json.loads((out / "made.json").read_text()) == about
    assert f"| {known.metric} | {about['score'][known.metric]} |" in (out / "README.md").read_text()


def test_the_same_steps_give_the_same_bytes(short: tuple[Recipe, Path, dict[str, Any]], tmp_path: Path) -> None:
    """Whatever torch's generator and threads were before, which stay as they are."""
    known, out, _ = short
    torch.manual_seed(99)
    state = torch.get_rng_state()
    make(known, tmp_path / "again", steps=STEPS[known.name])
    assert torch.equal(torch.get_rng_state(), state)
    same = {f.name for f in out.iterdir()} - {"made.json", "README.md", "weft.json"}
    assert "model.safetensors" in same
    for file in same:
        assert (tmp_path / "again" / file).read_bytes() == (out / file).read_bytes(), file


def test_the_folder_is_an_ordinary_checkpoint(short: tuple[Recipe, Path, dict[str, Any]]) -> None:
    """Its own class reads it whole, and what weft loads computes the same."""
    import transformers

    known, out, _ = short
    cls = getattr(nets, KIND[known.name], None) or getattr(transformers, KIND[known.name])
    plain, said = cls.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not verify(out)
    values, weights = known.score(plain.eval())
    mine, same = known.score(weft.load(out))
    np.testing.assert_allclose(mine, values, rtol=1e-3, atol=1e-4)
    assert np.array_equal(weights, same) and len(values) == len(weights) and np.isfinite(values).all()


def test_eight_bits_score_nearly_the_same(short: tuple[Recipe, Path, dict[str, Any]]) -> None:
    """rtn at 8 bits on every matrix nearly halves its bytes, and changes the score by less than 3 %."""
    known, out, about = short
    model = weft.load(out)
    before = sum(row.bytes for row in weft.show(model))
    assert weft.apply(model, "rtn", at="*", bits=8, group=0)
    assert sum(row.bytes for row in weft.show(model)) < 0.6 * before
    assert mean(known.score(model)) == pytest.approx(about["score"][known.metric], rel=0.03)


def test_batches_are_inputs(short: tuple[Recipe, Path, dict[str, Any]]) -> None:
    """The model runs on them; another seed gives others."""
    known, out, _ = short
    model, a, b = weft.load(out), known.batches(), known.batches(seed=1)
    with torch.no_grad():
        model(**a[0])
    key = next(iter(a[0]))
    assert all(x.keys() == a[0].keys() for x in a) and not torch.equal(a[0][key], b[0][key])


class Fake(Recipe):
    """One linear layer in a Hugging Face model's clothes: trains in no time."""

    name, about, steps, rate, metric, limit = "ref-fake", "Nothing.", 3, 1e-2, "bits", 2.0
    calls = 0
    act: Callable[[], None] | None = None

    def model(self) -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        return ViTForImageClassification(ViTConfig(image_size=4, patch_size=2, num_channels=1, num_labels=2, **small))

    def loss(self, model: Any, rng: torch.Generator) -> Tensor:
        self.calls += 1
        if self.act is not None:
            self.act()
        return model(pixel_values=torch.randn(2, 1, 4, 4, generator=rng)).logits.square().mean()

    def batches(self, seed: int = 0) -> list[dict[str, Tensor]]:
        return []

    def score(self, model: nn.Module) -> Scores:
        return np.ones(2), np.ones(2)


def test_made_once_then_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """`resolve` makes the model where it is not, trains nothing the second time, and makes a damaged one again."""
    fake = Fake()
    monkeypatch.setattr(made, "NAMES", ("ref-fake",))
    monkeypatch.setattr(made, "get", {"ref-fake": fake}.__getitem__)
    out = Path(models.resolve("ref-fake"))
    assert fake.calls == 3 and out.parent.parent == Path(os.environ["WEFT_CACHE"]) and not verify(out)
    assert models.resolve("ref-fake") == str(out) and fake.calls == 3
    weights = out / "model.safetensors"
    held = weights.read_bytes()
    weights.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    assert models.resolve("ref-fake") == str(out) and fake.calls == 6 and not verify(out)
    (out / "mine.txt").write_text("not weft's")
    with pytest.raises(ConflictError, match="not weft's to delete"):
        models.resolve("ref-fake")
    assert (out / "mine.txt").exists()


def test_a_class_of_weft_is_code_that_makes_the_model() -> None:
    """A recipe names it, so that another one is another folder."""
    fake, places = Fake(), set[Path]()
    for fake.net in (None, nets.CrossNetwork, nets.FlowTransformer):
        places.add(recipe.folder(fake))
    assert len(places) == 3
    for name in made.NAMES:
        assert (made.get(name).net is None) == (KIND[name] not in nets.__all__)
        assert getattr(made.get(name).net, "__name__", KIND[name]) == KIND[name]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_a_stopped_run_leaves_nothing(stop: type[BaseException], tmp_path: Path) -> None:
    """Nothing is at its place while it is trained, nor afterwards where that was stopped."""
    fake, out = Fake(), tmp_path / "models" / "fake"

    def act() -> None:
        assert not out.exists()
        if fake.calls == 2:
            raise stop

    fake.act = act
    with pytest.raises(stop):
        make(fake, out)
    assert fake.calls == 2 and not list(tmp_path.rglob("*"))


def test_training_that_breaks_down_is_refused(tmp_path: Path) -> None:
    """A loss that is not finite is an error with its step; no step at all is one too."""
    fake = Fake()
    fake.loss = lambda model, rng: torch.tensor(torch.nan)  # type: ignore[method-assign]
    with pytest.raises(NumericError, match="at step 0"):
        make(fake, tmp_path / "fake")
    with pytest.raises(OptionError, match="out of range"):
        make(fake, tmp_path / "fake", steps=0)
    assert not list(tmp_path.iterdir())


def test_a_model_that_has_not_learnt_is_refused(tmp_path: Path) -> None:
    """After all steps the score has to be less than the recipe's limit, and a number; fewer steps are a look, which is kept."""
    fake = Fake()
    for fake.limit in (1.0, 0.5):
        with pytest.raises(NumericError, match="has not learnt"):
            make(fake, tmp_path / "fake")
    fake.limit = 1.0 + 1e-9
    make(fake, tmp_path / "whole")
    fake.limit = 0.5
    make(fake, tmp_path / "look", steps=2)
    fake.score = lambda model: (np.full(2, np.nan), np.ones(2))  # type: ignore[method-assign]
    with pytest.raises(NumericError, match="has not learnt"):
        make(fake, tmp_path / "fake")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["look", "whole"]


def test_a_second_process_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process holds the place nothing is trained; what it made is then used."""
    fake, other = Fake(), Fake()
    out = recipe.folder(fake)
    mark = out.with_name(out.name + ".aside")
    out.rename(mark)
    pid = os.getppid()
    parent = {"folder": out.name, "host": lock.socket.gethostname(), "pid": pid, "since": lock._since(pid)}
    with lock.claimed(out):
        place = next(out.parent.glob(".weft-lock-*"))
    place.write_text(json.dumps(parent))
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            mark.rename(out)
            place.unlink()

    monkeypatch.setattr(lock.time, "sleep", sleep)
    assert recipe.folder(other) == out
    assert len(waits) == 3 and other.calls == 0
    place.write_text(json.dumps(parent))
    with pytest.raises(ConflictError, match="another process"), lock.turn(out, patience=-1):
        pass
    place.unlink()


def test_digits_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the error says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ResourceError, match="not installed"):
        digits.digits.__wrapped__()


def test_digits_are_split_and_moved() -> None:
    """No held-out image is trained on; moving keeps the ink that stays inside, and one of nine moves is none."""
    pytest.importorskip("sklearn")
    held = digits.digits()
    rows = {t.numpy().tobytes() for t in held.train.images}
    assert len(held.test.labels) == digits.HELD_OUT and len(held.train.labels) == 1797 - digits.HELD_OUT
    assert not any(t.numpy().tobytes() in rows for t in held.test.images)
    image = torch.full((900, 1, 8, 8), -1.0)
    image[:, :, 3, 4] = 1.0
    made_ = digits.moved(image, torch.Generator().manual_seed(0))
    at = made_.flatten(1).argmax(1)
    assert (made_.sum((1, 2, 3)) == -62).all()
    assert set(at.tolist()) == {8 * (3 + d) + 4 + r for d in (-1, 0, 1) for r in (-1, 0, 1)}


def test_rows_of_letters_are_held_out_whole() -> None:
    """No held-out row is ever drawn for training; answers are what the task says."""
    rng = torch.Generator().manual_seed(5)
    drawn = [seq2seq._example(rng, held_out=False) for _ in range(3000)]
    kept = {q.split(" ", 1)[1] for q, _ in seq2seq.RECIPE._test}
    assert not kept & {q.split(" ", 1)[1] for q, _ in drawn}
    for question, answer in drawn[:200]:
        task, *row = question.split()
        assert answer.split() == (row[::-1] if task == "reverse" else sorted(row))


def test_routers_start_where_they_are_told() -> None:
    """At the mean input a new router's logits are the offsets in some order."""
    torch.manual_seed(0)
    mean_ = torch.randn(64)
    assert sorted((moe._router(mean_) @ mean_).tolist()) == pytest.approx(sorted(moe.OFFSETS), abs=1e-4)
