"""Laws of every method that changes coordinates: the output stays, or (a selection) the model is smaller."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from model.test_axes import logits, same, varied
from model.zoo import batch
from torch import nn

from weft.engine import get, names, transports
from weft.engine.run import Step, apply
from weft.error import ConflictError, OptionError
from weft.model import axes, expressions, fingerprint, fork
from weft.stats import Stats, collect
from weft.store import load, save

from .cases import options, rounds

TRANSPORTS = [name for name in names() if get(name).kind == "transport"]
MODELS = ("llama", "gpt2", "qwen3-moe")
REFUSED = {("heads", "gpt2")}
"""No axis of the model admits the method: its configuration derives a head's width from the number of heads."""
Of = Callable[[str], Stats]


@cache
def model(name: str) -> nn.Module:
    """A woven model in float64; never changed."""
    return varied(name, quiet=("transformer.ln_f",))


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Of:
    """Evidence of a model, collected once."""
    folder, held = tmp_path_factory.mktemp("stats"), dict[str, Stats]()

    def of(name: str) -> Stats:
        if name not in held:
            held[name] = collect(model(name), [batch("llama")], folder)
        return held[name]

    return of


def step(method: str, **given: Any) -> Step:
    """The method with options that leave it something to do on models of two heads, in a few of its rounds."""
    few = {"keep": 0.5} if "keep" in get(method).options.model_fields else {}
    return Step.of(method, **(few | rounds(get(method)) | given))


def moved(method: str, name: str, stats: Any, **given: Any) -> tuple[nn.Module, int]:
    """A fork after the method, and how many axes it changed."""
    made = fork(model(name))
    changes, _ = transports.run(made, step(method, **given), stats=stats, seed=0)
    return made, len(changes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", TRANSPORTS)
def test_the_output_stays(method: str, name: str, evidence: Of) -> None:
    """Every axis that admits it is changed, the same way again; the model that it was forked from is not."""
    was = fingerprint(model(name))
    if (method, name) in REFUSED:
        with pytest.raises(OptionError, match="no axis fits"):
            moved(method, name, evidence(name))
        return
    made, count = moved(method, name, evidence(name))
    assert count and fingerprint(moved(method, name, evidence(name))[0]) == fingerprint(made) != was
    assert fingerprint(model(name)) == was
    if get(method).moves == "select":
        assert sum(e.nbytes() for e in expressions(made).values()) < sum(
            e.nbytes() for e in expressions(model(name)).values()
        )
        assert logits(made, name).shape == logits(model(name), name).shape
    else:
        same(logits(made, name), logits(model(name), name))


def options_work_or_are_refused(method: str, evidence: Of) -> None:
    """Both ends of every option run and somewhere matter; what is outside or unknown is refused."""

    @cache
    def made(name: str, **given: Any) -> str:
        return fingerprint(moved(method, name, evidence(name), **given)[0])

    def matters(name: str, option: str, good: list[Any]) -> bool:
        return bool({made(name, **{option: v}) for v in good} - {made(name)})

    for option, good, bad in options(get(method)):
        assert any(matters(name, option, good) for name in MODELS if (method, name) not in REFUSED), option
        for value in bad:
            with pytest.raises(OptionError, match=option):
                get(method).bind({option: value})


def evidence_is_asked_for(method: str, evidence: Of) -> None:
    """Without it, a method that needs it says so and the model is as it was."""
    made = fork(model("llama"))
    was = fingerprint(made)
    if get(method).needs:
        with pytest.raises(OptionError, match=r"evidence|calibration"):
            transports.run(made, step(method))
        assert fingerprint(made) == was
    else:
        assert moved(method, "llama", None)[1]


def globs_choose_axes(method: str, evidence: Of) -> None:
    """One axis of them, or (a selection) the reason why not; a glob that fits none is refused."""
    made = fork(model("llama"))
    name = next(a.name for a in axes(made).values() if a.kind in get(method).on)
    if get(method).moves == "select":
        with pytest.raises(ConflictError, match="one width"):
            transports.run(made, step(method), at=name, stats=evidence("llama"))
    else:
        changes, _ = transports.run(made, step(method), at=name, stats=evidence("llama"))
        assert [c.name for c in changes] == [name]
    with pytest.raises(OptionError, match="no axis fits"):
        transports.run(made, step(method), at="nowhere", stats=evidence("llama"))


def compressed_models_go_along_or_refuse(method: str, evidence: Of) -> None:
    """After rounding and an adapter: the output stays, or (a selection of columns) it says to select first."""
    made = fork(model("llama"))
    apply(made, [Step.of("rtn", group=8), Step.of("lora", rank=2)], at="all-linear")
    before, was = logits(made, "llama"), fingerprint(made)
    if get(method).moves == "select":
        with pytest.raises(ConflictError, match="compressed"):
            transports.run(made, step(method), stats=evidence("llama"))
        assert fingerprint(made) == was
    else:
        transports.run(made, step(method), stats=evidence("llama"))
        same(logits(made, "llama"), before)


def it_comes_back_from_disk(method: str, evidence: Of) -> None:
    """Saved as an ordinary checkpoint of the same class, loaded to the same output."""
    made, _ = moved(method, "llama", evidence("llama"))
    with TemporaryDirectory() as place:
        save(made, Path(place) / "out")
        back = load(Path(place) / "out", dtype=torch.float64)
        assert type(back) is type(made)
        same(logits(back, "llama"), logits(made, "llama"))


LAWS = [
    options_work_or_are_refused,
    evidence_is_asked_for,
    globs_choose_axes,
    compressed_models_go_along_or_refuse,
    it_comes_back_from_disk,
]


@pytest.mark.parametrize("method", TRANSPORTS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_transport(law: Callable[[str, Of], None], method: str, evidence: Of) -> None:
    """Each law, for each transport."""
    law(method, evidence)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_heads_stay_by_what_they_bring(name: str, evidence: Of) -> None:
    """Those stay whose part of the attention's output has the largest mean square on the very tokens of the evidence."""
    whole, seen = model(name), dict[str, torch.Tensor]()
    layers = {n: m for n, m in whole.named_modules() if n.endswith("o_proj")}
    hooks = [m.register_forward_pre_hook(lambda _, x, n=n: seen.update({n: x[0]})) for n, m in layers.items()]
    with torch.no_grad():
        whole(**batch("llama"))
    for hook in hooks:
        hook.remove()
    made, _ = moved("heads", name, evidence(name))
    for n, layer in layers.items():
        w, heads = layer.weight.detach(), whole.config.num_key_value_heads
        x, parts = seen[n].flatten(0, -2), w.chunk(heads, 1)
        brought = torch.stack([(x_h @ w_h.T).square().sum() for x_h, w_h in zip(x.chunk(heads, 1), parts, strict=True)])
        kept = brought.topk(heads // 2)[1].sort()[0].tolist()
        assert torch.equal(made.get_submodule(n).weight.detach(), torch.cat([parts[h] for h in kept], 1))


def test_recipes_take_them(tmp_path: Path) -> None:
    """Coordinates change, then weights are rounded."""
    from weft.engine.recipe import read

    (tmp_path / "r.yaml").write_text("weft: 1\nsteps:\n  - rotate: {}\n    at: residual\n  - rtn: {bits: 4}\n")
    assert [s.method for s, _ in read(tmp_path / "r.yaml").steps] == ["rotate", "rtn"]
