"""Laws of every method of kind rewrite, on synthetic sites with log-normal feature scales."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import safetensors.torch
import torch

from weft.engine import Group, Site, get
from weft.error import ConflictError, NumericError, OptionError
from weft.expr import Expr, spec, tensors, terms_of
from weft.linalg.sparse import evened

from .cases import (
    REWRITES,
    ROUNDS,
    STARTS,
    after,
    base,
    better,
    features,
    group,
    marks,
    options,
    output_error,
    reached,
    rounds,
    snapshot,
)  # fmt: skip


def small(name: str) -> dict[str, int]:
    """Options that leave a method something to do on sites of 32 columns."""
    return {"rank": 4} if "rank" in get(name).options.model_fields else {}


def brief(name: str) -> dict[str, int]:
    """The same, and a few of a method's rounds instead of all, for laws that hold of many rounds if they hold of a few."""
    return small(name) | rounds(get(name))


def sound(g: Group, made: Group) -> None:
    """One finite expression of the right shape a site, in which the site's adapters still stand as they were.

    Behind a new turn of the input they are turned with it: their value on the input is what it was.
    """
    assert len(made.sites) == len(g.sites)
    for s, new in zip(g, made, strict=True):
        assert new.now.shape == s.now.shape == tuple(s.source().shape) == tuple(new.source().shape)
        assert bool(torch.isfinite(new.now.dense()).all())
        before, now = ({r: t for r, t in terms_of(x).items() if r.startswith("adapter:")} for x in (s.now, new.now))
        assert before.keys() <= now.keys()
        for role, term in before.items():
            if turns(new) == turns(s):
                assert snapshot(now[role]) == snapshot(term)
            else:
                assert trained(now[role]) == trained(term)
                torch.testing.assert_close(plainly(new, now[role]), plainly(s, term), rtol=1e-5, atol=1e-6)


def turns(site: Site) -> int:
    """How often a site's input is turned."""
    return len(site.tap.turns()) if site.tap is not None else 0


def plainly(site: Site, term: Expr) -> torch.Tensor:
    """A term's value before the turns of its input."""
    value = term.dense().detach()
    return value if site.tap is None else site.tap.back(value)


def trained(term: Expr) -> list[str]:
    """The fields of the tensors that training changes, wherever in the tree: what cannot take a turn gets it beside it."""
    return sorted(n.rpartition(".")[2] for n, p in term.named_parameters() if p.requires_grad)


def every_start_is_sound(name: str) -> None:
    """Finite, of the right shape and with its adapters, from every node family; lone rows and lone columns too."""
    for start in STARTS:
        g = group(start)
        sound(g, reached(g, (name, small(name))))
    for rows, n in (((1,), 32), ((3,), 1), ((2, 5), 7)):
        g = group(rows=rows, n=n)
        sound(g, reached(g, (name, small(name))))


def input_is_not_changed(name: str) -> None:
    """No bit of the sites, their pretrained values or their evidence changes; a site of one row included."""
    for start in STARTS:
        for rows in ((24, 17), (1,)):
            g = group(start, rows)
            seen = [*(s.now for s in g), *(t for s in g for t in (s.evidence[0].gram, s.evidence[0].weight))]
            before = [snapshot(t) if isinstance(t, Expr) else t.clone() for t in seen]
            after(g, (name, brief(name)))
            for t, was in zip(seen, before, strict=True):
                assert snapshot(t) == was if isinstance(t, Expr) else torch.equal(t, was)


def only_the_site_decides(name: str) -> None:
    """Bit for bit the same again, under another global seed, and with the sites in another order."""
    for start in ("dense", "2:4-quantized", "sum"):
        g = group(start)
        torch.manual_seed(1)
        first = reached(g, (name, brief(name)))
        torch.manual_seed(2)
        again = reached(group(start), (name, brief(name)))
        backwards = reached(replace(g, sites=g.sites[::-1], cache={}), (name, brief(name)))
        assert marks(first) == marks(again) == marks(backwards)[::-1]


def poor_evidence_is_survived(name: str) -> None:
    """No tokens, one token, fewer tokens than features, dead features: all give finite weights."""
    x = features(32, "poor")
    for seen in (0 * x, x[:1], x[:8], x * (torch.arange(32) % 3 > 0), x * (torch.arange(32) == 5)):
        g = group(gram=seen.T @ seen / len(x))
        sound(g, reached(g, (name, small(name))))


def no_evidence_is_declared(name: str) -> None:
    """A method that needs inputs and gets none says what it did instead."""
    g = group(gram=torch.zeros(32, 32))
    after(g, (name, brief(name)))
    assert g.notes or not get(name).needs & {"gram", "most"}


def broken_evidence_is_refused(name: str) -> None:
    """Not a number in what a method needs stops with the site's name; no evidence at all does too."""
    needed = {f for n in get(name).needs for f in {"gram": ("gram", "weight"), "most": ("most",)}[n]}
    for bad in (float("nan"), float("inf")):
        for field in ("gram", "weight", "most"):
            g = group()
            held = getattr(g.sites[1].evidence[0], field).clone()
            held.view(-1)[0] = bad
            broken = replace(g.sites[1], evidence=(replace(g.sites[1].evidence[0], **{field: held}),))
            g = replace(g, sites=(broken,))
            if field in needed:
                with pytest.raises(NumericError, match=rf"site1\.{field}"):
                    after(g, (name, brief(name)))
            else:
                sound(g, reached(g, (name, brief(name))))
    if needed:
        with pytest.raises(OptionError, match="site0"):
            after(Group((replace(group().sites[0], evidence=()),)), (name, brief(name)))


def options_work_or_are_refused(name: str) -> None:
    """Both ends and the middle of every option run and somewhere matter; what is outside or unknown is refused.

    A number of rounds is tried on few rows, as the most of them are many.
    """
    for option, good, bad in options(get(name)):
        rows = (5,) if option in ROUNDS else (24, 1, 17)
        plain = marks(reached(group(rows=rows), (name, rounds(get(name)))))
        made = []
        for value in good:
            g = group(rows=rows)
            made.append(reached(g, (name, rounds(get(name)) | {option: value})))
            sound(g, made[-1])
        assert any(marks(m) != plain for m in made), option
        for value in bad:
            with pytest.raises(OptionError, match=option):
                get(name).bind({option: value})
    with pytest.raises(OptionError, match="unheard_of"):
        get(name).bind({"unheard_of": 1})


def more_of_a_better_option_is_no_worse(name: str) -> None:
    """Each step of a `better` option in its good direction never raises the output error by more than 1 %."""
    for option, way in better(get(name)):
        steps = {
            "sparsity": [0.9, 0.7, 0.5, 0.3, 0.0],
            "bits": [2, 3, 4, 5, 6, 7, 8],
            "rank": [1, 2, 4, 8, 16, 32],
            "keep": [0.01, 0.2, 0.4, 0.6, 0.8, 1.0],
            "swaps": [1, 2, 4, 8, 16, 32],
        }[option]
        assert way == ("down" if option == "sparsity" else "up")
        start = "quantized" if option == "rank" else "dense"
        errors = []
        for value in steps:
            g = group(start, (24, 17), salt="better")
            errors.append(output_error(g, after(g, (name, {option: value}))))
        assert all(more <= less * 1.01 for less, more in itertools.pairwise(errors)), errors
        assert errors[-1] < errors[0]


def zeros_stay(name: str) -> None:
    """What a zero pattern or 2:4 left out stays zero in the base; the promise stays unless it is pruned anew.

    A pattern with uneven rows is filled up first, so that every row keeps as many entries.
    """
    if "zeros" in get(name).drops or not set(get(name).sites) - {"vector", "bias", "norm"}:
        return  # vectors have no pattern
    for start in ("masked", "2:4", "2:4-quantized", "delta", "blocks"):
        g = group(start)
        for s, e in zip(g, after(g, (name, brief(name))), strict=True):
            kept = not bool(base(e).dense()[~evened(s.now).mask()].any())
            assert kept, f"{name} fills zeros of a pattern ({start}): keep them (mask()), or declare drops=('zeros',)"
            if get(name).verb in ("quantize", "factor", "adapt"):
                assert base(e).promises().nm == s.now.promises().nm and base(e).promises().zeros


def bytes_are_counted(name: str) -> None:
    """nbytes of a result is what safetensors stores behind its header."""
    for start in ("dense", "2:4-quantized", "sum"):
        for e in after(group(start), (name, brief(name))):
            data = safetensors.torch.save({k: t.detach().contiguous() for k, t in tensors(e).items()})
            assert e.nbytes() == len(data) - 8 - int.from_bytes(data[:8], "little")


def beats_its_baseline(name: str) -> None:
    """Less output error than the declared baseline, same start, same options; also with all flags of its own off.

    An option that only one of them has, such as a zero point that the other always has, is given to that one.
    """
    claim = get(name).beats
    if claim is None:
        return
    own, shared = (set(get(n).options.model_fields) for n in (name, claim.baseline))
    assert claim.options.keys() <= own | shared
    flags = [o for o, good, _ in options(get(name)) if good == [True, False] and o not in shared]
    mine = {k: v for k, v in claim.options.items() if k in own}
    for salt in range(3):
        g = group(rows=(48, 32), n=96, salt=("beats", salt))
        if claim.start:
            g = g.put(after(g, (claim.start, claim.start_options)))
        theirs = after(g, (claim.baseline, {k: v for k, v in claim.options.items() if k in shared}))
        for off in ({}, dict.fromkeys(flags, False)):
            assert output_error(g, after(g, (name, mine | off))) < output_error(g, theirs)


def slices_make_the_whole(name: str) -> None:
    """A rowwise method gives the same on slices of rows, trainable adapters included; another is not sliced."""
    for start in ("dense", "masked", "2:4-quantized", "sum", "delta", "blocks", "nvfp4"):
        whole = after(group(start, (24,)), (name, brief(name)))
        sliced = group(start, (24,))
        with (
            mock.patch.multiple("weft.expr.base", CHUNK=5 * 32),
            mock.patch.multiple("weft.linalg.columns", ROWS=3 * 32),
        ):
            assert len(list(sliced.site.slices())) == 5
            made = after(sliced, (name, brief(name)))
        if start == "blocks":  # a slice of blocks is a sparse matrix
            torch.testing.assert_close(made[0].dense(), whole[0].dense())
            continue
        assert spec(made[0]) == spec(whole[0])
        for key, t in tensors(whole[0]).items():
            other = tensors(made[0])[key]
            assert t.requires_grad == other.requires_grad
            torch.testing.assert_close(other, t, rtol=1e-5, atol=1e-6)


LAWS: list[Callable[[str], None]] = [
    every_start_is_sound,
    input_is_not_changed,
    only_the_site_decides,
    poor_evidence_is_survived,
    no_evidence_is_declared,
    broken_evidence_is_refused,
    options_work_or_are_refused,
    more_of_a_better_option_is_no_worse,
    zeros_stay,
    bytes_are_counted,
    beats_its_baseline,
    slices_make_the_whole,
]


@pytest.mark.parametrize("name", REWRITES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_rewrite(law: Callable[[str], None], name: str) -> None:
    """Each law, for each rewrite."""
    law(name)


APART = {"act_quant_static", "online_hadamard"}
"""A scale measured before a turn says nothing of what is read behind it: these two are refused in one chain."""


@functools.cache
def begun(first: str) -> tuple[Group, Group]:
    """Sites with an adapter, before and after the first method of a pair."""
    g = group("sum", (24, 1))
    return g, reached(g, (first, brief(first)))


@pytest.mark.parametrize("first", REWRITES)
@pytest.mark.parametrize("second", REWRITES)
def test_pairs(first: str, second: str) -> None:
    """Every rewrite runs after every other, from a weight with an adapter, and loses neither adapters nor shape."""
    g, once = begun(first)
    one, two = (
        (first, brief(first)),
        (second, brief(second) | ({"name": "second"} if "name" in get(second).options.model_fields else {})),
    )
    if {first, second} == APART:
        with pytest.raises((ConflictError, OptionError), match="turn"):
            reached(g, one, two)
        return
    made = reached(once, two)
    sound(once, made)
    assert marks(made) == marks(reached(g, one, two))


def test_two_adapters_of_one_name_are_refused() -> None:
    """The second would silently replace the first."""
    g = group("sum", (24, 1))
    with pytest.raises(ConflictError, match="adapter of that name"):
        after(g, "lora", "lora")


ADAPTS = [name for name in REWRITES if get(name).verb == "adapt"]


@pytest.mark.parametrize("tag", ["", "down"])
@pytest.mark.parametrize("name", ADAPTS)
def test_an_adapter_changes_nothing_at_first(name: str, tag: str) -> None:
    """Bit for bit the value of what it is put on; what it made is trainable, and of the rest what was."""
    for start in STARTS:
        g = group(start)
        g = replace(g, sites=tuple(replace(s, tags=frozenset({tag})) for s in g))
        for s, e in zip(g, after(g, name), strict=True):
            assert torch.equal(e.dense(), s.now.dense().float())
            held = {id(p): p for p in s.now.parameters()}
            live = {id(p): p for p in e.parameters() if p.requires_grad}
            assert live.keys() & held.keys() == {i for i, p in held.items() if p.requires_grad}
            fresh = [p for i, p in live.items() if i not in held]
            assert fresh and all(p.dtype == torch.float32 for p in fresh)
