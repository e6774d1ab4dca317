"""Laws of every method of kind objective: on numbers, and through `weft.train`; and what each one's loss is, by an oracle in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tiny import build_tiny, make_batches, output, tokenizer
from torch import Tensor, nn

import weft
from weft.engine import get, names, objectives, optimizers, schedules
from weft.error import ConflictError, FormatError, OptionError, ShapeError
from weft.learn.aim import Compared
from weft.learn.data import Example, Pair, Response, Text
from weft.learn.train import train
from weft.learn.trainer import trainable
from weft.model import expressions, fingerprint, fork, pretrained, weave
from weft.stats import Objective

from .test_schedules import Until

OBJECTIVES = [name for name in names() if get(name).kind == "objective"]
DATA: list[Example] = [
    Response(f"a {a} {b} cat sat", f"on the {b} mat .", reference=f"the {b} cat sat")
    for a in ("red", "blue", "old")
    for b in ("old", "red", "blue")
]
"""Prompts of several lengths and their references, which are shorter."""
PAIRS: list[Example] = [Pair(f"the {a} cat", f"a {a} dog sat on a mat") for a in ("red", "blue", "old", "")]


def seen(kind: str, out: Tensor, ref: Tensor, labels: Tensor | None = None) -> Compared:
    """A batch with these outputs; the labels' loss is zero unless given."""
    return Compared(out, ref, lambda: torch.zeros(len(out)) if labels is None else labels, Objective(kind))  # type: ignore[arg-type]


def numbers(kind: str, salt: int, rows: int = 7) -> Tensor:
    """Random logits, or normalised embeddings."""
    made = 3 * torch.randn(rows, 11, generator=torch.Generator().manual_seed(salt))
    return made if kind == "classes" else torch.nn.functional.normalize(made, dim=-1)


def loss(name: str) -> Callable[[Compared], Tensor]:
    """The method with its default options."""
    return objectives.named(name).loss


def each_unit_has_its_own(name: str) -> None:
    """A finite number of at least zero for each unit, which does not depend on the others."""
    for kind in ("classes", "embedding"):
        out, ref, hard = numbers(kind, 0), numbers(kind, 1), torch.rand(7)
        whole = loss(name)(seen(kind, out, ref, hard))
        assert whole.shape == (7,) and bool(torch.isfinite(whole).all()) and bool((whole >= 0).all())
        parts = [loss(name)(seen(kind, out[s], ref[s], hard[s])) for s in (slice(0, 3), slice(3, 7))]
        assert torch.allclose(torch.cat(parts), whole, rtol=1e-5)
        assert loss(name)(seen(kind, out[:0], ref[:0], hard[:0])).shape == (0,)


def it_is_least_where_outputs_are_the_reference(name: str) -> None:
    """Zero there but for the labels' part, with no slope, and more elsewhere; only outputs have a gradient."""
    for kind in ("classes", "embedding"):
        out, ref = numbers(kind, 0).requires_grad_(), numbers(kind, 1)
        same = ref.clone().requires_grad_()
        at = loss(name)(seen(kind, same, ref))
        assert float(at.detach().abs().max()) < 1e-6
        if kind == "classes":  # normalised vectors move on a sphere
            (slope,) = torch.autograd.grad(at.sum(), same)
            assert float(slope.abs().max()) < 1e-6
        away = loss(name)(seen(kind, out, ref))
        assert bool((away > 1e-3).all())
        (slope,) = torch.autograd.grad(away.sum(), out)
        assert bool((slope.abs().sum(1) > 1e-4).all())


def ready(*base: tuple[str, dict[str, Any]], family: str = "llama") -> nn.Module:
    """A tiny model with adapters."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    model = weave(build_tiny(family, **still))
    for method, options in base:
        weft.apply(model, method, **options)
    weft.apply(model, "lora", rank=4)
    return model


ROUNDED = ("rtn", {"bits": 3, "group": 16})


def learnt(model: nn.Module, name: str | None, data: list[Example] | None = None, **options: Any) -> list[float]:
    """The losses of six steps."""
    aim = objectives.named(name) if name is not None else None
    if "teacher" in options and aim is not None:
        aim = replace(aim, teacher=options.pop("teacher"))
    given: dict[str, Any] = {"steps": 6, "batch": 4, "lr": 1e-2, "schedule": "constant", "objective": aim, **options}
    return [loss for _, loss in train(model, data or DATA, tokenizer=tokenizer(), **given).losses]


def it_trains(name: str) -> None:
    """Adapters alone move; the loss falls, otherwise than without it; a second run is the first one; the reference stays as it was."""
    model, again, plain = (ready(ROUNDED) for _ in range(3))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    teacher = weave(build_tiny(seed=1))
    mark = fingerprint(teacher)
    losses = learnt(model, name)
    assert losses == learnt(again, name) != learnt(plain, None) and sum(losses[-2:]) < 0.9 * sum(losses[:2])
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trainable(model)) and fingerprint(model) == fingerprint(again)
    assert learnt(ready(ROUNDED), name, teacher=teacher.train()) != losses
    assert (
        fingerprint(teacher) == mark and teacher.training and not any(p.grad is not None for p in teacher.parameters())
    )


def parts_of_a_batch_are_alike(name: str) -> None:
    """Micro-batches, whose examples have other numbers of targets, give the same run but for rounding; so does checkpointing."""
    whole = learnt(ready(ROUNDED), name)
    for how in ({"micro_batch": 1}, {"micro_batch": 2}, {"checkpointing": True}):
        assert learnt(ready(ROUNDED), name, **how) == pytest.approx(whole, rel=1e-3)
    pairs = learnt(ready(ROUNDED, family="bert"), "distill", PAIRS)
    assert learnt(ready(ROUNDED, family="bert"), "distill", PAIRS, micro_batch=2) == pytest.approx(pairs, rel=1e-3)


def it_goes_on_from_a_checkpoint(name: str) -> None:
    """Stopped and called again, a run ends at the same bits; with held-out data at its best step."""
    for stop, more in (
        (2, {}),
        (4, {"optimizer": optimizers.named("lora_plus")}),
        (3, {"held_out": HELD, "eval_every": 1}),
    ):
        whole, stopped, again = (ready(ROUNDED) for _ in range(3))
        learnt(whole, name, save_every=1, **more)
        with TemporaryDirectory() as folder:
            kept: dict[str, Any] = {"out": Path(folder), "save_every": 1, **more}
            with pytest.raises(KeyboardInterrupt):
                learnt(stopped, name, progress=Until(stop), **kept)
            learnt(again, name, **kept)
        assert fingerprint(whole) == fingerprint(again)


HELD = [Response("a bird flew over", "the old tree .", reference="the bird flew over")]


def it_goes_with_schedules_and_losses_alone(name: str) -> None:
    """Sparse terms that move, and an optimizer that takes losses."""
    model = weave(build_tiny())
    weft.apply(model, "sparse", rank=2)
    learnt(model, name, during=schedules.named("spiel", every=4, over=1))
    assert len(learnt(ready(ROUNDED), name, optimizer=optimizers.named("mezo"), lr=1e-4)) == 6


def it_refuses(name: str) -> None:
    """Bad options, another kind, a teacher with other outputs, a teacher without an objective; and nothing has changed then."""
    for option, field in get(name).options.model_json_schema()["properties"].items():
        if "minimum" in field or "exclusiveMinimum" in field:
            with pytest.raises(OptionError, match=option):
                objectives.named(name, **{option: -1})
    with pytest.raises(OptionError, match="unheard_of"):
        objectives.named(name, unheard_of=1)
    with pytest.raises(OptionError, match="nothing to lower"):
        objectives.named("rtn")
    model = ready(ROUNDED)
    mark = fingerprint(model)
    for teacher, error in ((build_tiny("bert"), ConflictError), (build_tiny(vocab_size=100), ShapeError)):
        with pytest.raises(error, match="a teacher gives"):
            learnt(model, name, teacher=weave(teacher))
    with pytest.raises(OptionError, match="nothing is learnt from a teacher"):
        weft.train(model, DATA, teacher=weave(build_tiny()))
    assert fingerprint(model) == mark
    if "reference" in get(name).needs:
        plain: list[Example] = [Text("the cat sat on the mat .")]
        with pytest.raises(FormatError, match="no example has a reference"):
            learnt(model, name, plain)
        with pytest.raises(OptionError, match="cannot be packed"):
            learnt(model, name, pack=True)


LAWS = (
    each_unit_has_its_own, it_is_least_where_outputs_are_the_reference, it_trains, parts_of_a_batch_are_alike,
    it_goes_on_from_a_checkpoint, it_goes_with_schedules_and_losses_alone, it_refuses,
)  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("law", LAWS, ids=lambda f: f.__name__)
def test_objective(law: Callable[[str], None], name: str) -> None:
    """Every law of every objective."""
    law(name)


def by_hand(
    model: nn.Module, original: nn.Module, pairs: list[tuple[str, str, str]], temperature: float
) -> list[float]:
    """The mean over targets of T² KL(original at the reference || model at the prompt), and of -log p, in float64, text by text."""
    words, apart, hard = tokenizer(), list[Tensor](), list[Tensor]()
    for prompt, reference, answer in pairs:
        ids = [words(t, add_special_tokens=False)["input_ids"] for t in (prompt, reference, answer)]
        target = [*ids[2], 0]
        rows = []
        for m, front in ((model, ids[0]), (original, ids[1])):
            out = output(m, {"input_ids": torch.tensor([front + target])})[0].double()
            rows.append(out[len(front) - 1 : -1])
        q, p = (torch.log_softmax(r / temperature, -1) for r in rows)
        apart.append(temperature**2 * (p.exp() * (p - q)).sum(-1))
        hard.append(-torch.log_softmax(rows[0], -1)[torch.arange(len(target)), torch.tensor(target)])
    return [float(torch.cat(t).mean()) for t in (apart, hard)]


def test_losses_are_their_formulas() -> None:
    """Of the first step, where a compressed model has adapters of zeros: against the pretrained weights, which are the plain model's."""
    plain = build_tiny().eval()
    rows = [(e.prompt, e.reference, e.response) for e in DATA if isinstance(e, Response)]
    rounded = weave(build_tiny())
    weft.apply(rounded, *ROUNDED[:1], **ROUNDED[1])
    for name, options, want in (
        ("distill", {}, lambda soft, hard: soft),
        ("distill", {"temperature": 2.0, "labels": 0.25}, lambda soft, hard: 0.75 * soft + 0.25 * hard),
        ("align", {"share": 0.3}, lambda soft, hard: 0.3 * soft + 0.7 * hard),
        ("align", {"share": 1.0}, lambda soft, hard: soft),
    ):
        read = rows if name == "align" else [(p, p, a) for p, _, a in rows]
        found = by_hand(rounded, plain, read, options.get("temperature", 1.0))
        aim = objectives.named(name, **options)
        first, *_ = learnt(ready(ROUNDED), None, objective=aim, batch=len(DATA), steps=1)
        assert first == pytest.approx(want(*found), rel=1e-4), name
        assert found[0] > 0.01


def test_an_untouched_model_is_its_own_reference() -> None:
    """Distillation of what has only adapters of zeros costs nothing, of texts and of embeddings; prompts as branches do cost."""
    assert learnt(ready(), "distill")[0] == 0
    assert learnt(ready(family="bert"), "distill", PAIRS)[0] < 1e-6
    model = weave(build_tiny())
    weft.apply(model, "prompt", length=3)
    losses = learnt(model, "distill")
    assert losses[0] > 0.01 > 0 and min(losses) < losses[0]


def test_the_pretrained_model_shares_what_still_stands() -> None:
    """No memory for weights that are as they were; compressed weights, trained ones, turned inputs and branches are as at first."""
    model = weave(build_tiny())
    held = expressions(model)
    batch = make_batches(1)[0]
    want = output(build_tiny(), batch)
    again = pretrained(model)
    assert all(e.w.data_ptr() == held[n].w.data_ptr() for n, e in expressions(again).items())
    for method, options in (
        ("rtn", {"bits": 2}), ("full", {}), ("layernorm", {}), ("lora", {}), ("prompt", {}), ("online_hadamard", {}), ("act_quant", {}),
    ):  # fmt: skip
        changed = fork(model)
        weft.apply(changed, method, **options)
        with torch.no_grad():
            for p in changed.parameters():
                if p.requires_grad:
                    p.add_(0.1)
        mark, other = fingerprint(changed), pretrained(changed)
        assert torch.equal(output(other, batch), want) and not trainable(other), method
        assert fingerprint(changed) == mark and other is not changed


def test_a_teacher_is_learnt() -> None:
    """Full fine-tuning towards another model's outputs comes near to them, nearer than the labels do; a dense teacher, or one by name."""
    teacher = weave(build_tiny(seed=3))
    batch = make_batches(1)[0]
    data: list[Example] = [
        Text(" ".join(row)) for row in (("the cat sat on the old mat .",) * 2, ("a dog ran under a tree .",))
    ]
    before, gaps = copy.deepcopy(teacher), []
    for aim in (replace(objectives.named("distill"), teacher=teacher), None):
        model = weave(build_tiny())
        weft.apply(model, "full")
        learnt(model, None, data, objective=aim, steps=40, lr=5e-3)
        one, two = (torch.log_softmax(output(m, batch), -1) for m in (model, teacher))
        gaps.append(float((two.exp() * (two - one)).sum(-1).mean()))
    assert gaps[0] < gaps[1] and fingerprint(before) == fingerprint(teacher)
