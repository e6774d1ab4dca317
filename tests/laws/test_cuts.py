"""Laws of every method that takes blocks out: what is left is the model without them; and which blocks each chooses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tiny import build_tiny, make_batches, output
from torch import Tensor, nn

import weft
from weft.engine import cuts, get, names
from weft.engine.recipe import read
from weft.engine.run import Step, apply, group_of, run
from weft.error import ConflictError, NumericError, OptionError, WeftError
from weft.model import expressions, fingerprint, fork, stack_of, unweave, weave
from weft.stats import influence, without
from weft.store import load, save
from weft.store.cache import Cache

from .cases import options

CUTS = [name for name in names() if get(name).kind == "cut"]
MODELS = ("llama", "llama-tied", "bert", "bert-mlm")
LAYERS = 4
BATCHES = make_batches()


@cache
def model(name: str = "llama") -> nn.Module:
    """A woven model of four blocks in float64; never changed."""
    return weave(build_tiny(name, layers=LAYERS, dtype=torch.float64))


def less(method: str, name: str = "llama", **given: Any) -> tuple[Any, list[int]]:
    """A fork after the method, and the blocks that it took out."""
    made = fork(model(name))
    path = stack_of(made)[0]
    changes, _ = cuts.run(made, Step.of(method, **given), BATCHES)
    return made, [int(c.name.removeprefix(f"{path}.")) for c in changes]


def of_the_others(name: str, gone: Sequence[int]) -> nn.Module:
    """A new plain model with fewer blocks and the weights of those that stay."""
    whole, kept = unweave(fork(model(name))), [i for i in range(LAYERS) if i not in gone]
    stack = "model.layers" if "llama" in name else "bert.encoder.layer" if name == "bert-mlm" else "encoder.layer"
    made = build_tiny(name, layers=len(kept), dtype=torch.float64)
    held = whole.state_dict()
    for key in made.state_dict():
        i, _, rest = key.removeprefix(f"{stack}.").partition(".")
        old = f"{stack}.{kept[int(i)]}.{rest}" if key.startswith(f"{stack}.") else key
        made.state_dict()[key].copy_(held[old])
    return made


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", CUTS)
def test_the_others_are_left(method: str, name: str) -> None:
    """To the bit the plain model of the other blocks, the same ones again; the model that it was forked from stays."""
    was = fingerprint(model(name))
    made, gone = less(method, name)
    assert gone and made.config.num_hidden_layers == LAYERS - len(gone)
    for batch in BATCHES:
        assert torch.equal(output(made, batch), output(of_the_others(name, gone), batch))
        assert torch.equal(output(made, batch), without(model(name), batch, gone))
    assert fingerprint(less(method, name)[0]) == fingerprint(made) != was == fingerprint(model(name))


def options_work_or_are_refused(method: str) -> None:
    """Every option matters somewhere in its range; what is outside or unknown is refused."""
    for option, good, bad in options(get(method)):
        assert any(len({fingerprint(less(method, n, **{option: v})[0]) for v in good}) > 1 for n in MODELS), option
        for value in bad:
            with pytest.raises(OptionError, match=option):
                get(method).bind({option: value})
    with pytest.raises(OptionError, match="unheard_of"):
        get(method).bind({"unheard_of": 1})


def evidence_is_asked_for(method: str) -> None:
    """Without batches it says so; a method of another kind takes nothing out; the model is as it was."""
    made = fork(model())
    for step, batches in ((Step.of(method), []), (Step.of("rtn"), BATCHES)):
        with pytest.raises(OptionError, match=r"calibration data|no blocks out"):
            cuts.run(made, step, batches)
    with pytest.raises(OptionError, match="goes to no sites"):
        weft.apply(made, method, at="q_proj")
    with pytest.raises(OptionError, match="does not rewrite"):
        run(group_of(made, ["lm_head.weight"], None), [Step.of(method)])
    assert fingerprint(made) == fingerprint(model())


def what_was_measured_is_kept(method: str) -> None:
    """The second time nothing runs but the check; other texts are measured anew."""
    with TemporaryDirectory() as place:
        held = Cache(Path(place))
        for batches in (BATCHES, BATCHES, BATCHES[:2]):
            cuts.run(fork(model()), Step.of(method), batches, cache=held)
        assert (held.hits, held.misses) == (1, 2)


def compressed_models_go_along(method: str) -> None:
    """After rounding and an adapter, and before: what is left is this model without those blocks, and comes back from disk."""
    made = fork(model())
    apply(made, [Step.of("rtn", group=8), Step.of("lora", rank=2)], at="all-linear")
    whole, path = fork(made), stack_of(made)[0]
    changes, _ = cuts.run(made, Step.of(method), BATCHES)
    gone = [int(c.name.removeprefix(f"{path}.")) for c in changes]
    assert torch.equal(output(made, BATCHES[0]), without(whole, BATCHES[0], gone))
    apply(made, [Step.of("magnitude")], at="*.mlp.*")
    with TemporaryDirectory() as place:
        save(made, Path(place) / "out")
        back = load(Path(place) / "out", dtype=torch.float64)
        assert fingerprint(back) == fingerprint(made) and len(expressions(back)) == len(expressions(made))


def branches_are_refused(method: str) -> None:
    """By name; nothing changes."""
    made = fork(model())
    weft.apply(made, "prompt", length=2)
    was = fingerprint(made)
    with pytest.raises(ConflictError, match="knows no branches"):
        cuts.run(made, Step.of(method), BATCHES)
    assert fingerprint(made) == was


def recipes_take_it(method: str) -> None:
    """As a step among others."""
    with TemporaryDirectory() as place:
        recipe = Path(place) / "r.yaml"
        recipe.write_text(f"weft: 1\nsteps:\n  - {method}: {{}}\n  - rtn: {{bits: 4}}\n")
        assert [s.method for s, _ in read(recipe).steps] == [method, "rtn"]


LAWS: list[Callable[[str], None]] = [
    options_work_or_are_refused,
    evidence_is_asked_for,
    what_was_measured_is_kept,
    compressed_models_go_along,
    branches_are_refused,
    recipes_take_it,
]


@pytest.mark.parametrize("method", CUTS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_cut(law: Callable[[str], None], method: str) -> None:
    """Each law, for each cut."""
    law(method)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_influence_is_that_of_an_oracle(name: str) -> None:
    """Token by token in float64, each text alone and without its padding."""
    whole, total, count = model(name), torch.zeros(LAYERS).double(), 0
    seen: list[Tensor] = []
    stack = stack_of(whole)[1]
    hooks = [
        b.register_forward_hook(lambda _, x, y: seen.extend([x[0], y[0] if isinstance(y, tuple) else y])) for b in stack
    ]
    for ids, mask in ((i, m) for b in BATCHES for i, m in zip(b["input_ids"], b["attention_mask"], strict=True)):
        seen.clear()
        output(whole, {"input_ids": ids[mask.bool()][None]})
        for i in range(LAYERS):
            for x, y in zip(seen[2 * i][0], seen[2 * i + 1][0], strict=True):
                total[i] += float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))
        count += int(mask.sum())
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(influence(whole, BATCHES), 1 - total / count, rtol=0, atol=1e-9)


def quieted(block: int) -> Any:
    """A plain model with a block that does next to nothing."""
    plain: Any = build_tiny("llama", layers=LAYERS, dtype=torch.float64)
    with torch.no_grad():
        for part in (plain.model.layers[block].self_attn.o_proj, plain.model.layers[block].mlp.down_proj):
            part.weight.mul_(1e-4)
    return plain


@pytest.mark.parametrize("quiet", range(LAYERS))
def test_depth_drops_the_block_that_does_least(quiet: int) -> None:
    """Wherever it is; the model is then nearly what it was, and its changes say what was measured."""
    made = weave(quieted(quiet))
    before, said = output(made, BATCHES[0]), influence(made, BATCHES)
    changes, notes = cuts.run(made, Step.of("depth"), BATCHES)
    assert [c.name for c in changes] == [f"model.layers.{quiet}"] and not notes
    assert changes[0].before.startswith(f"block of influence {said[quiet]:.4f}, ") and said[quiet] < 1e-6
    assert float((output(made, BATCHES[0]) - before).abs().max()) < 1e-2 * float(before.abs().max())


@pytest.mark.parametrize(("share", "gone"), [(0.0, 0), (0.1, 0), (0.2, 1), (0.5, 2), (0.99, 3)])
def test_depth_rounds_to_whole_blocks_and_says_where_that_is_none_or_all(share: float, gone: int) -> None:
    made = fork(model())
    changes, notes = cuts.run(made, Step.of("depth", share=share, by="last"), BATCHES)
    assert [c.name for c in changes] == [f"model.layers.{i}" for i in range(LAYERS - gone, LAYERS)]
    assert len(notes) == (share in (0.1, 0.99)) and all(w == "model.layers" for w, _ in notes)


def test_blocks_that_know_their_place_are_refused() -> None:
    """They compute by their number, which only running them shows; nothing has changed then."""
    made: Any = weave(quieted(0))
    kind, was = type(made.model.layers[0]), fingerprint(made)
    plain = kind.forward

    def placed(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return plain(self, hidden_states, *args, **kwargs) * (1 + self.self_attn.layer_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", placed)
        with pytest.raises(ConflictError, match="something else in its new place"):
            cuts.run(made, Step.of("depth"), BATCHES)
    assert fingerprint(made) == was and made.config.num_hidden_layers == LAYERS


def test_influence_refuses_what_it_cannot_see() -> None:
    """A hidden state that is not finite, by its block; blocks that are given none."""
    made: Any = fork(model())
    made.model.layers[2].input_layernorm.weight = nn.Parameter(torch.full((32,), float("nan")).double())
    with pytest.raises(NumericError, match=r"model\.layers\.2"):
        influence(made, BATCHES)
    other: Any = fork(model())
    other.model.layers[1].forward = lambda hidden_states, **_: {"hidden": hidden_states}
    with pytest.raises(WeftError, match=r"model\.layers\.1"):
        influence(other, BATCHES)
