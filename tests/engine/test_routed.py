"""A mixture of experts as an adapter: it trains and is saved beside any base, and what needs one value is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.engine.merge import merge
from weft.engine.run import Step, apply
from weft.error import ConflictError
from weft.expr import Dense, LowRank, Quantized, Routed, Sum, terms_of, total
from weft.learn.data import Text
from weft.learn.train import train
from weft.learn.trainer import trainable
from weft.model import expressions, fingerprint, fork, set_expressions, unweave, weave
from weft.store import load, nbytes, save, stored
from weft.store.audit import header

AT = "q_proj"


def mixture(m: int, n: int, count: int = 3, top: int = 2) -> Routed:
    """Trainable low-rank experts behind a trainable router."""
    rng = torch.Generator().manual_seed(m + n)

    def leaf(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=rng) * 0.2)

    return Routed(leaf(count, n), [LowRank(leaf(m, 2), leaf(2, n)) for _ in range(count)], top)


def mixed(model: nn.Module, at: str = AT) -> nn.Module:
    """The model with a mixture on every site whose name holds `at`."""
    held = {n: e for n, e in expressions(model).items() if at in n}
    set_expressions(model, {n: total({**terms_of(e), "adapter:mix": mixture(*e.shape)}) for n, e in held.items()})
    return model


@pytest.fixture
def woven(tiny: Any) -> nn.Module:
    """A tiny model with mixtures."""
    return mixed(weave(tiny()))


@pytest.mark.parametrize("method", ["rtn", "magnitude", "nf4", "lora"])
def test_the_base_is_rewritten_and_the_mixture_stays(method: str, woven: Any, batches: Any, run: Any) -> None:
    """A method that works on the base does not see the term beside it."""
    before = {n: terms_of(e)["adapter:mix"] for n, e in expressions(woven).items() if AT in n}
    apply(woven, [Step.of(method)])
    assert before and all(terms_of(expressions(woven)[n])["adapter:mix"] is e for n, e in before.items())
    assert torch.isfinite(run(woven, batches(1)[0])).all()


def test_evidence_and_methods_that_need_it(woven: Any, batches: Any, tmp_path: Path) -> None:
    """A model with a mixture gives evidence; the error of a site without a value is not told."""
    from weft.stats import collect

    changes, _ = apply(woven, [Step.of("gptq", bits=4, group=8)], stats=collect(woven, batches(), tmp_path))
    assert all((c.error is None) == (AT in c.name) for c in changes)
    assert all(isinstance(terms_of(e)["base"], Quantized) for e in expressions(woven).values())


@pytest.mark.parametrize("base", [None, "rtn", "magnitude"])
def test_it_comes_back(base: str | None, woven: Any, batches: Any, run: Any, tmp_path: Path) -> None:
    """Saved and loaded bit for bit, as many bytes as are counted; forks and copies run alike."""
    apply(woven, [Step.of(base)] if base else [])
    save(woven, tmp_path / "out")
    back, batch = load(tmp_path / "out"), batches(1)[0]
    assert fingerprint(back) == fingerprint(woven) and torch.equal(run(back, batch), run(woven, batch))
    held = header(tmp_path / "out" / "weft.safetensors").tensors
    assert set(held) == set(stored(woven)) and sum(e.stop - e.start for e in held.values()) == nbytes(woven)
    assert torch.equal(run(fork(woven), batch), run(woven, batch))
    assert "2 of 3 routed(LowRank(2))" in next(r.expression for r in weft.show(woven) if AT in r.name)


def test_router_and_experts_learn(woven: Any, batches: Any) -> None:
    """Plain descent changes every trainable tensor and lowers the loss; a fork does not learn with it."""
    twin, batch = fork(woven), batches(1)[0]
    mark, before = fingerprint(twin), {n: p.detach().clone() for n, p in woven.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in woven.parameters() if p.requires_grad], lr=0.5)
    losses: list[float] = []
    for _ in range(8):
        loss = woven(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    now = dict(woven.named_parameters())
    assert losses[-1] < losses[0] and all(not torch.equal(now[n], t) for n, t in before.items())
    assert any("router" in n for n in before) and fingerprint(twin) == mark


def test_the_trainer_trains_it(tiny: Any, words: Any, tmp_path: Path) -> None:
    """Through weft.train; a later run takes its tensors up from the checkpoint."""
    data = [Text("the cat sat on the mat ."), Text("the old dog sat .")]
    models = [mixed(weave(tiny())) for _ in range(2)]
    before = {n: t.detach().clone() for n, t in trainable(models[0]).items()}
    for model in models:
        train(model, data, tokenizer=words, steps=4, batch=2, length=16, lr=0.01, out=tmp_path, save_every=2)
    ends = [trainable(m) for m in models]
    assert any("router" in n for n in before) and not any(torch.equal(ends[0][n], t) for n, t in before.items())
    assert all(torch.equal(ends[1][n], t) for n, t in ends[0].items())


REFUSED: dict[str, Callable[[Any, Path], Any]] = {
    "merge to dense": lambda m, out: merge(m, to="dense"),
    "merge to the grid": lambda m, out: merge(m, to="grid"),
    "unweave": lambda m, out: unweave(m),
    "export to an ordinary checkpoint": lambda m, out: weft.export(m, out, to="hf"),
    "export to compressed-tensors": lambda m, out: weft.export(m, out, to="compressed-tensors"),
    "save dense": lambda m, out: save(m, out, dense=True),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_needs_a_value_is_refused(how: str, woven: Any, batches: Any, run: Any, tmp_path: Path) -> None:
    """Naming every site and the term; nothing has changed and nothing is written."""
    apply(woven, [Step.of("rtn")])
    mark, before = fingerprint(woven), run(woven, batches(1)[0])
    with pytest.raises(ConflictError) as caught:
        REFUSED[how](woven, tmp_path / "out")
    told = str(caught.value)
    assert all(n in told for n in expressions(woven) if AT in n) and "adapter:mix is 2 of 3 routed" in told
    assert fingerprint(woven) == mark and torch.equal(run(woven, batches(1)[0]), before)
    assert not list(tmp_path.iterdir())


def test_peft_cannot_hold_it(woven: Any, tmp_path: Path) -> None:
    """It is no LoRA."""
    with pytest.raises(ConflictError, match="adapter:mix is 2 of 3 routed"):
        weft.export(woven, tmp_path / "out", to="peft")
    assert not list(tmp_path.iterdir())


def test_the_first_weights_are_still_there(woven: Any, tiny: Any) -> None:
    """unweave(original=True) needs no value of today."""
    plain, want = unweave(woven, original=True), tiny().state_dict()
    assert all(torch.equal(t, want[k]) for k, t in plain.state_dict().items())


@pytest.mark.parametrize("method", ["rtn", "nf4", "magnitude"])
def test_a_routed_base_is_not_quantized(method: str, tiny: Any, batches: Any, run: Any) -> None:
    """It is refused by the site's name; an adapter beside it is none of its business."""
    model = weave(tiny())
    name = next(n for n in expressions(model) if AT in n)
    set_expressions(model, {name: mixture(*expressions(model)[name].shape)})
    with pytest.raises(ConflictError) as caught:
        apply(model, [Step.of(method)], at=name)
    assert caught.value.where == name and "base is 2 of 3 routed" in str(caught.value.got)
    apply(model, [Step.of("lora", rank=2)], at=name)
    assert isinstance(expressions(model)[name], Sum) and torch.isfinite(run(model, batches(1)[0])).all()


def test_layers_that_need_a_value_refuse_it(tiny: Any, batches: Any, run: Any) -> None:
    """An embedding is not looked up in it, and a convolution does not run it."""
    with pytest.raises(ConflictError, match="depends on the input"):
        run(mixed(weave(tiny()), "embed"), batches(1)[0])
    conv = mixed(weave(nn.Sequential(nn.Conv2d(2, 4, 3))), "0")
    with pytest.raises(ConflictError, match="depends on the input"):
        conv(torch.randn(1, 2, 5, 5))


def test_a_lora_is_attached_beside_it(tiny: Any, tmp_path: Path) -> None:
    """Its check for overflow looks at the terms that have values."""
    tiny().save_pretrained(tmp_path / "base")
    source = load(tmp_path / "base")
    apply(source, [Step.of("lora", rank=2)], at=AT)
    weft.export(source, tmp_path / "lora", to="peft")
    model = mixed(load(tmp_path / "base"))
    sites = weft.attach(model, tmp_path / "lora")
    assert sites and all(
        list(terms_of(expressions(model)[n])) == ["base", "adapter:mix", "adapter:default"] for n in sites
    )
    assert all(isinstance(terms_of(e)["base"], Dense) for e in expressions(model).values())
