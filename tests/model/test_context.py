"""Virtual tokens near a text: what they begin as, how far they go, and where the text comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weft
from weft.engine import branches as engine
from weft.engine.run import Step
from weft.model import Context, branches, unbranch, weave

from . import zoo


def ids(rows: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    """Tokens."""
    return torch.randint(3, zoo.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def made(length: int = 5, radius: float = 0.5, batches: Any = ()) -> tuple[Any, Any, list[Any]]:
    """A model with a context, the branch and what was declared."""
    model = weave(zoo.build("llama").double())
    _, notes = engine.run(model, Step.of("cpt", length=length, radius=radius), batches=batches)
    return model, branches(model)[0], notes


@torch.no_grad()
def logits(model: Any, x: Tensor) -> Tensor:
    """What the model gives."""
    return model(x).logits


def test_it_begins_as_the_text() -> None:
    """As yet untrained the model gives what it gives behind the first tokens of the data, which padding is none of."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    model, b, notes = made(length=8, batches=[{"input_ids": ids(), "attention_mask": mask}, {"input_ids": ids(seed=2)}])
    read = torch.cat([ids()[0, 2:], ids()[1, :3]])
    got = logits(model, ids(seed=3))
    unbranch(model)
    want = logits(model, torch.cat([read.expand(2, -1), ids(seed=3)], 1))[:, 8:]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert notes == [] and not b.start.requires_grad and b.shift.requires_grad


def test_it_stays_within_the_ball() -> None:
    """A long step is cut to the radius along its way, a short one is taken whole; row by row."""
    _, b, _ = made(length=3, radius=0.25, batches=[{"input_ids": ids()}])
    mean = b.start.norm(dim=1).mean()
    assert b.radius == pytest.approx(0.25 * float(mean), rel=1e-6)
    way = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    way = way / way.norm(dim=1, keepdim=True)
    b.shift.data = way * torch.tensor([[0.5], [1.0], [40.0]]) * b.radius
    gone = b.tokens() - b.start
    torch.testing.assert_close(gone, way * torch.tensor([[0.5], [1.0], [1.0]]) * b.radius, rtol=1e-5, atol=1e-6)


def test_training_cannot_leave_it() -> None:
    """Gradients are finite from the very first step, and huge steps end on the ball."""
    model, b, _ = made(batches=[{"input_ids": ids()}])
    for _ in range(3):
        model(ids()).logits.square().mean().backward()
        assert bool(b.shift.grad.isfinite().all()) and bool(b.shift.grad.any())
        b.shift.data -= 1e4 * b.shift.grad / b.shift.grad.norm()
        b.shift.grad = None
    far = (b.tokens() - b.start).norm(dim=1)
    torch.testing.assert_close(far, torch.full_like(far, b.radius), rtol=1e-4, atol=0)


def test_too_little_text_is_declared() -> None:
    """What the data lacks is drawn, and said; the text comes first."""
    _, b, notes = made(length=20, batches=[{"input_ids": ids()}])
    _, whole, none = made(length=14, batches=[{"input_ids": ids()}])
    assert torch.equal(b.start[:14], whole.start) and "6 of 20 tokens are drawn" in notes[0][1] and not none
    assert "20 of 20" in made(length=20)[2][0][1]


def test_apply_reads_the_data(tmp_path: Path) -> None:
    """The first tokens of the file, by the model's own tokenizer; generation goes on from its cache."""
    from transformers import AutoTokenizer

    folder = Path(weft.__file__).parent / "lab" / "assets" / "ref-lm"
    text, said = tmp_path / "text.jsonl", "def add(a, b):\n    return a + b\n"
    text.write_text("".join(json.dumps({"text": f"{said}# {i}"}) + "\n" for i in range(40)))
    model = weft.load(folder)
    changes = weft.apply(model, "cpt", length=8, data=str(text), tokens=256)
    words = AutoTokenizer.from_pretrained(folder)
    first = torch.tensor(words(said, add_special_tokens=False)["input_ids"][:8])
    (b,) = branches(model)
    assert isinstance(b, Context) and not changes.fallbacks
    with torch.no_grad():
        torch.testing.assert_close(b.start, model.model.embed_tokens(first).float())
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(first[None], **how), model.generate(first[None], use_cache=False, **how))
