"""A reader predicts each chunk, then learns it, in a fork that nothing else sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import weft
from weft.engine.run import Step, apply
from weft.error import ConflictError, NumericError, OptionError
from weft.learn.reader import Reader
from weft.learn.settings import Reading
from weft.model import fingerprint, fork, weave

TEXT = torch.randint(3, 90, (20,), generator=torch.Generator().manual_seed(0)).repeat(4)


def reader(tiny: Any, *, base: str | None = None, method: str = "lora", **how: Any) -> tuple[Any, Reader]:
    model = weave(tiny("llama"))
    if base:
        apply(model, [Step.of(base)])
    options = {"chunk": 20, "window": 20, "lr": 1e-2, "epochs": 3} | how
    return model, weft.reader(model, method, start=1, **options)


@pytest.mark.parametrize("base", [None, "nf4"])
@pytest.mark.parametrize("method", ["lora", "ia3", "prefix"])
def test_what_is_read_again_is_predicted_better_and_the_model_stays(tiny: Any, base: str | None, method: str) -> None:
    lr = 1e-2 if method == "lora" else 1e-1
    (_, still), (model, r) = (reader(tiny, base=base, method=method, window=1, lr=lr, epochs=e) for e in (0, 3))
    before = fingerprint(model)
    nats, without = r.read(TEXT), still.read(TEXT)
    assert nats.shape == TEXT.shape and torch.allclose(nats[:20], without[:20], atol=1e-6)
    assert float(nats[-20:].mean()) < 0.9 * float(without[-20:].mean())
    assert fingerprint(model) == before and fingerprint(r.model) != before


def test_without_steps_it_is_the_plain_model_through_the_window(tiny: Any) -> None:
    model, r = reader(tiny, epochs=0, window=13)
    whole, got = torch.cat([torch.tensor([1]), TEXT]), r.read(TEXT)
    want: list[Tensor] = []
    for start in range(0, 80, 20):
        ids = whole[max(0, start + 1 - 13) : start + 21]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        want.append(F.cross_entropy(logits[-21:-1], ids[-20:], reduction="none"))
    assert torch.allclose(got, torch.cat(want), atol=1e-5)


def test_the_steps_are_those_of_adamw_on_the_chunk(tiny: Any) -> None:
    model, r = reader(tiny, epochs=2)
    twin = fork(model).requires_grad_(False)
    apply(twin, [Step.of("lora")], at="all-linear", seed=0)
    free = [p for p in twin.parameters() if p.requires_grad]
    moves = torch.optim.AdamW(free, lr=1e-2, weight_decay=0.0)
    ids = torch.cat([torch.tensor([1]), TEXT[:20]])[None]
    r.read(TEXT[:20])
    for _ in range(2):
        moves.zero_grad()
        F.cross_entropy(twin(input_ids=ids).logits[0, :-1], ids[0, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(free, 1.0)
        moves.step()
    mine = [p for p in r.model.parameters() if p.requires_grad]
    assert len(mine) == len(free) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, free, strict=True))


def test_reading_in_parts_of_whole_chunks_is_reading_at_once(tiny: Any) -> None:
    (_, a), (_, b) = reader(tiny), reader(tiny)
    assert torch.equal(a.read(TEXT), torch.cat([b.read(TEXT[:40]), b.read(TEXT[40:])]))
    assert fingerprint(a.model) == fingerprint(b.model)


def test_what_it_writes_is_learnt_and_repeats_for_a_seed(tiny: Any) -> None:
    (_, a), (_, b), (_, c) = reader(tiny), reader(tiny), reader(tiny, seed=1)
    state = torch.get_rng_state()
    how = {"do_sample": True, "eos_token_id": -1, "pad_token_id": 0}
    one, two, other = a.write(50, **how), b.write(50, **how), c.write(50, **how)
    assert len(one) == 50 and torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(a.seen, one[-20:])
    fresh = reader(tiny)[1]
    assert fingerprint(a.model) == fingerprint(b.model) != fingerprint(fresh.model)
    assert len(fresh.write(0)) == 0


def test_it_refuses_what_it_cannot_read_with(tiny: Any) -> None:
    model = weave(tiny("llama"))
    with pytest.raises(OptionError, match="nothing is trainable"):
        Reader(fork(model).requires_grad_(False), Reading(), start=1)
    with pytest.raises(ConflictError, match="predicts no text"):
        weft.reader(weave(tiny("bert")), start=1)
    with pytest.raises(OptionError, match="chunk"):
        weft.reader(model, start=1, chunk=0)
    with pytest.raises(OptionError, match="rank"):
        weft.reader(model, start=1, rank=0)
    r = weft.reader(model, start=1)
    for bad in (torch.zeros(3), torch.zeros(1, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(OptionError, match="no tokens"):
            r.read(bad)
    with torch.no_grad():
        next(p for p in r.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(NumericError, match="not finite"):
        r.read(TEXT)
