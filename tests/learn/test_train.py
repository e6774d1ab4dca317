"""Training: the loss falls, the frozen stays frozen, and a resumed run is the straight run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.engine import optimizers
from weft.engine.run import Step, apply
from weft.error import FormatError, OptionError, WeftError
from weft.learn.data import IGNORE, Chat, Pair, Response, Text
from weft.learn.objective import contrast, likelihood
from weft.learn.train import train
from weft.learn.trainer import TRAINABLE, restore, trainable
from weft.model import expressions, plain_tensors, weave
from weft.store.tensors import read_tensors, write_tensors

THINGS = ("cat", "dog", "bird")
TEXTS = [Text(f"the {a} sat on the {b} mat .") for a in THINGS for b in ("old", "red", "blue")]
PAIRS = [Pair(f"question {a} {c} ?", f"the {c} {a} sat .") for a in THINGS for c in ("old", "red", "blue")]
RESPONSES = [Response(f"the {a} ?", "yes ." if a == "cat" else "no .") for a in THINGS]


def adapted(tiny: Any, family: str = "llama", chain: tuple[str, ...] = (), **changed: Any) -> nn.Module:
    """A tiny model with adapters on its blocks, over a base that was rewritten by `chain`."""
    model = weave(tiny(family, **changed))
    apply(model, [Step.of(m) for m in chain])
    apply(model, [Step.of("lora", rank=4)], at="all-linear")
    return model


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that does not train."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: t.detach().clone() for n, t in held.items() if not t.requires_grad}


def result(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that trains."""
    return {n: t.detach().clone() for n, t in trainable(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Until:
    """A progress bar that stops the run after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @contextlib.contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        done = 0

        def step(n: int, note: str = "") -> None:
            nonlocal done
            done += n
            if done == self.steps:
                raise KeyboardInterrupt

        yield step


@pytest.mark.parametrize(
    ("data", "chain"), [(TEXTS, ()), (TEXTS, ("rtn",)), (TEXTS, ("magnitude", "nf4")), (RESPONSES, ())]
)
def test_the_loss_falls_and_the_base_stays(data: list[Any], chain: tuple[str, ...], tiny: Any, words: Any) -> None:
    """The adapters learn; every frozen tensor keeps every bit."""
    model = adapted(tiny, "llama-tied", chain)
    before, started = frozen(model), result(model)
    history = train(model, data, tokenizer=words, steps=15, batch=3, length=32, lr=2e-2)
    losses = [loss for _, loss in history.losses]
    assert [i for i, _ in history.losses] == list(range(1, 16)) and sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert same(frozen(model), before) and not same(result(model), started)
    assert not model.training and history.seconds > 0


def test_the_first_loss_is_the_models(tiny: Any, words: Any) -> None:
    """An adapter starts at zero, so the first loss is the plain model's mean negative log likelihood of its targets."""
    history = train(adapted(tiny), RESPONSES, tokenizer=words, steps=1, batch=3, length=32)
    nats, count, plain = 0.0, 0, tiny()
    for r in RESPONSES:
        prompt = words(r.prompt, add_special_tokens=False)["input_ids"]
        whole = prompt + words(r.response, add_special_tokens=False)["input_ids"] + [0]
        with torch.no_grad():
            p = plain(torch.tensor([whole])).logits[0].log_softmax(-1)
        nats -= sum(float(p[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
        count += len(whole) - len(prompt)
    assert history.losses[0][1] == pytest.approx(nats / count, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_resumed_run_is_the_straight_run(kind: str, tiny: Any, words: Any, tmp_path: Path) -> None:
    """Stopped between two checkpoints and called again, training ends at the same bits (dropout included)."""
    data, options = (
        (PAIRS if kind == "bert" else TEXTS),
        {"tokenizer": words, "steps": 7, "batch": 2, "length": 32, "save_every": 2},
    )
    straight, stopped = adapted(tiny, kind), adapted(tiny, kind)
    train(straight, data, out=tmp_path / "a", **options)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, data, out=tmp_path / "b", progress=Until(5), **options)
    assert not same(result(stopped), result(straight))
    again = adapted(tiny, kind)
    train(again, data, out=tmp_path / "b", **options)
    assert same(result(again), result(straight))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_resumed_run_by_losses_alone_is_the_straight_run(kind: str, tiny: Any, words: Any, tmp_path: Path) -> None:
    """With micro-batches and dropout, to the bit; and no tensor ever has a gradient."""
    data, options = (
        (PAIRS if kind == "bert" else TEXTS),
        {"tokenizer": words, "steps": 7, "batch": 4, "micro_batch": 2, "length": 32, "save_every": 2},
    )
    models = [adapted(tiny, kind) for _ in range(3)]
    for model in models:
        for p in trainable(model).values():
            p.register_hook(lambda grad: pytest.fail("a gradient was made"))
    moves: dict[str, Any] = {"optimizer": optimizers.named("mezo")}
    before = result(models[0])
    train(models[0], data, out=tmp_path / "a", **options, **moves)
    with pytest.raises(KeyboardInterrupt):
        train(models[1], data, out=tmp_path / "b", progress=Until(5), **options, **moves)
    train(models[2], data, out=tmp_path / "b", **options, **moves)
    assert same(result(models[2]), result(models[0])) and not same(before, result(models[0]))


def test_by_losses_alone_micro_batches_change_nothing(tiny: Any, words: Any) -> None:
    """The same losses and tensors, but for rounding."""
    one, many = adapted(tiny), adapted(tiny)
    options: dict[str, Any] = {"tokenizer": words, "steps": 4, "batch": 4, "optimizer": optimizers.named("mezo")}
    whole = train(one, TEXTS, **options)
    parts = train(many, TEXTS, micro_batch=1, **options)
    assert [x for _, x in parts.losses] == pytest.approx([x for _, x in whole.losses], rel=1e-5)
    for n, t in result(one).items():
        assert torch.allclose(result(many)[n], t, rtol=0, atol=1e-4)


def test_the_checkpoint_folder_changes_nothing(tiny: Any, words: Any, tmp_path: Path) -> None:
    """With or without checkpoints, and on a second run, the same seed gives the same bits; another seed others."""
    made = []
    for out, seed in ((None, 0), (tmp_path / "a", 0), (None, 0), (None, 1)):
        model = adapted(tiny)
        train(model, TEXTS, tokenizer=words, steps=4, batch=2, out=out, save_every=2, seed=seed)
        made.append(result(model))
    assert same(made[0], made[1]) and same(made[0], made[2]) and not same(made[0], made[3])


@pytest.mark.parametrize("held", [(), (TRAINABLE,), (TRAINABLE, "optimizer.pt")])
def test_a_run_killed_while_it_saved_a_checkpoint_resumes(
    held: tuple[str, ...], tiny: Any, words: Any, tmp_path: Path
) -> None:
    """Half a checkpoint is none: the run goes on from the one before it."""
    options: dict[str, Any] = {"tokenizer": words, "steps": 6, "batch": 2, "save_every": 2}
    straight, stopped, again = adapted(tiny), adapted(tiny), adapted(tiny)
    train(straight, TEXTS, **options)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, TEXTS, out=tmp_path, progress=Until(5), **options)
    half = tmp_path / "checkpoint-4"
    for path in half.iterdir():
        if path.name not in held:
            path.unlink()
    train(again, TEXTS, out=tmp_path, **options)
    assert same(result(again), result(straight))


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"data": TEXTS[:-1]}, "data"), ({"lr": 1e-3}, "lr"), ({"optimizer": optimizers.named("muon")}, "optimizer")],
)
def test_a_run_does_not_go_on_from_another_one(
    changed: dict[str, Any], named: str, tiny: Any, words: Any, tmp_path: Path
) -> None:
    """Other data or options in a folder that has checkpoints; a longer run with other checkpoints is the same one."""
    given = {"data": TEXTS, "tokenizer": words, "steps": 2, "batch": 2, "out": tmp_path, "save_every": 2}
    train(adapted(tiny), **given)
    with pytest.raises(WeftError, match=f"(?s)another run is kept there.*got +other {named}"):
        train(adapted(tiny), **{**given, "steps": 4, **changed})
    assert len(train(adapted(tiny), **{**given, "steps": 4, "save_every": 1, "micro_batch": 1}).losses) == 4


def test_a_checkpoint_of_another_model_is_refused(tiny: Any, words: Any, tmp_path: Path) -> None:
    """Other ranks or sites: FormatError, and nothing is put in place."""
    train(adapted(tiny), TEXTS, tokenizer=words, steps=2, batch=2, out=tmp_path, save_every=2)
    other = weave(tiny())
    apply(other, [Step.of("lora", rank=2)], at="q_proj")
    before = result(other)
    with pytest.raises(FormatError):
        restore(other, tmp_path / "checkpoint-2")
    assert same(result(other), before)


def test_a_checkpoint_holds_the_trainable_tensors_only(tiny: Any, words: Any, tmp_path: Path) -> None:
    """By name, and as they are."""
    model = adapted(tiny)
    train(model, TEXTS, tokenizer=words, steps=2, batch=2, out=tmp_path, save_every=2)
    assert same(read_tensors(tmp_path / "checkpoint-2" / TRAINABLE), result(model))
    write_tensors(tmp_path / "zero" / TRAINABLE, {n: torch.zeros_like(t) for n, t in result(model).items()})
    restore(model, tmp_path / "zero")
    assert not any(bool(t.any()) for t in result(model).values())


def test_nothing_trainable_is_refused(tiny: Any, words: Any) -> None:
    """A frozen model does not train."""
    with pytest.raises(OptionError):
        train(weave(tiny()), TEXTS, tokenizer=words, steps=1)


@pytest.mark.parametrize("data", [[], [Text("")], [Response("the cat", "")]])
def test_no_data_is_refused(data: list[Any], tiny: Any, words: Any) -> None:
    """A FormatError, before anything is written."""
    with pytest.raises(FormatError):
        train(adapted(tiny), data, tokenizer=words, steps=1)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("data", [[*PAIRS[:2], TEXTS[0]], [TEXTS[0], PAIRS[0]]])
def test_mixed_data_is_refused(data: list[Any], kind: str, tiny: Any, words: Any) -> None:
    """No example is left out in silence."""
    with pytest.raises(WeftError):
        train(adapted(tiny, kind), data, tokenizer=words, steps=1, batch=2)


def test_pairs_train_an_embedding_model(tiny: Any, words: Any) -> None:
    """A BERT's adapters learn to tell pairs apart; its base stays."""
    model = adapted(tiny, "bert", ("rtn",), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    before = frozen(model)
    history = train(model, PAIRS, tokenizer=words, steps=15, batch=9, lr=1e-2)
    losses = [loss for _, loss in history.losses]
    assert losses[-1] < 0.7 * losses[0] and same(frozen(model), before)


def test_pairs_are_cut_to_the_length(tiny: Any, words: Any) -> None:
    """`length` holds for pairs too: texts longer than the model's positions train."""
    data = [Pair("the cat " * 40, "a dog " * 40), Pair("the bird " * 40, "a hill " * 40)]
    history = train(
        adapted(tiny, "bert", max_position_embeddings=24), data, tokenizer=words, steps=1, batch=2, length=24
    )
    assert len(history.losses) == 1


def test_chats_train(tiny: Any, words: Any) -> None:
    """Through the tokenizer's template."""
    import copy

    chatty = copy.deepcopy(words)
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    data = [Chat((("user", f"the {a} ?"), ("assistant", "yes ."))) for a in THINGS]
    history = train(adapted(tiny), data, tokenizer=chatty, steps=8, batch=3, lr=2e-2)
    assert history.losses[-1][1] < history.losses[0][1]


def test_checkpointing_blocks_changes_no_bit(tiny: Any, words: Any) -> None:
    """Recomputation saves memory only."""
    a, b = adapted(tiny), adapted(tiny)
    train(a, TEXTS, tokenizer=words, steps=3, batch=2)
    train(b, TEXTS, tokenizer=words, steps=3, batch=2, checkpointing=True)
    assert same(result(a), result(b))


def test_tokens_are_counted(tiny: Any, words: Any) -> None:
    """About steps x batch x length of an example."""
    history = train(adapted(tiny), TEXTS[:4], tokenizer=words, steps=3, batch=2)
    assert history.tokens == 3 * 2 * 9


def test_likelihood_is_over_targets_only() -> None:
    """The mean, or the sum over the whole step's count; positions are shifted by one."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=rng)
    labels = torch.tensor([[1, 2, IGNORE, 4, 5], [IGNORE, IGNORE, 3, 2, IGNORE]])
    at = [(b, t) for b in range(2) for t in range(1, 5) if labels[b, t] != IGNORE]
    want = -sum(logits[b, t - 1].log_softmax(-1)[labels[b, t]] for b, t in at)
    assert torch.allclose(likelihood(logits, labels, None), want / len(at)) and torch.allclose(
        likelihood(logits, labels, 20), want / 20
    )


def test_contrast_is_lowest_where_pairs_agree() -> None:
    """log(batch) where all are alike, near zero where each query is nearest to its own."""
    eye = torch.eye(4)
    assert float(contrast(eye, eye)) < 1e-6 < float(contrast(eye, eye.roll(1, 0)))
    assert float(contrast(eye[:1].repeat(4, 1), eye[:1].repeat(4, 1))) == pytest.approx(torch.tensor(4.0).log().item())


def test_every_trainable_tensor_is_in_an_expression(tiny: Any) -> None:
    """What trains after lora is the adapters, and they are saved with the model."""
    model = adapted(tiny, "llama-tied")
    inside = {id(p) for e in expressions(model).values() for p in e.parameters()}
    assert trainable(model) and all(id(p) in inside for p in trainable(model).values())
    assert not any(t.requires_grad for t in plain_tensors(model).values())
