"""Laws of every method of kind probe, on a tiny model that was tuned; and what each one's number is, by a float64 oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCAB, build_tiny
from torch import nn

import weft
from weft.engine import Findings, get, names
from weft.error import ConflictError, OptionError
from weft.expr import Dense
from weft.model import expressions, fingerprint, fork, set_expressions, weave
from weft.store import load, save

PROBES = [name for name in names() if get(name).kind == "probe"]


def tuned(size: float = 1.0) -> nn.Module:
    """A model whose linear weights were changed by an adapter of rank 2, with factors of this size."""
    model = weave(build_tiny("llama"))
    weft.apply(model, "lora", rank=2)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(size * torch.randn(p.shape, generator=rng))
    return model


def data(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Random rows of tokens, the second one padded."""
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))
    return [
        {"input_ids": ids},
        {"input_ids": ids.flip(0), "attention_mask": torch.tensor([[1] * 12, [1] * 9 + [0] * 3])},
    ]


def look(model: nn.Module, name: str, **options: Any) -> Findings:
    """The probe, with data where it reads some."""
    given: dict[str, Any] = {"data": data(model)} if "data" in get(name).needs else {}
    return weft.probe(model, name, **given, **options)


def the_model_stays(name: str) -> None:
    """Bit for bit, trainable tensors included."""
    model = tuned()
    mark, live = fingerprint(model), [n for n, p in model.named_parameters() if p.requires_grad]
    look(model, name)
    assert fingerprint(model) == mark and [n for n, p in model.named_parameters() if p.requires_grad] == live


def it_says_the_same_again(name: str) -> None:
    """Whatever the global seed; the same numbers of every site, finite, and JSON."""
    torch.manual_seed(1)
    one = look(tuned(), name)
    torch.manual_seed(2)
    assert look(tuned(), name) == one
    assert json.loads(json.dumps(one.as_json())) == {
        "says": one.says,
        "sites": {n: dict(at) for n, at in one.sites.items()},
    }
    kinds = {tuple(at) for at in one.sites.values()}
    assert one.says and len(kinds) == 1 and np.isfinite([list(at.values()) for at in one.sites.values()]).all()


def every_site_is_its_own(name: str) -> None:
    """One site alone has the numbers that it has among others; a glob that fits none is refused."""
    model = tuned()
    whole = look(model, name).sites
    one = next(iter(whole))
    assert look(model, name, at=one).sites == {one: whole[one]}
    with pytest.raises(OptionError, match="matches no site"):
        look(model, name, at="nowhere")


def options_are_checked(name: str) -> None:
    """Unknown ones, and numbers outside their range; and a rewrite is no probe."""
    with pytest.raises(OptionError, match="unheard_of"):
        look(tuned(), name, unheard_of=1)
    for option, field in get(name).options.model_json_schema()["properties"].items():
        if "minimum" in field or "exclusiveMinimum" in field:
            with pytest.raises(OptionError, match=option):
                look(tuned(), name, **{option: -1})
    with pytest.raises(OptionError, match="probes nothing"):
        weft.probe(tuned(), "rtn")
    if "data" not in get(name).needs:
        with pytest.raises(OptionError, match="reads no data"):
            weft.probe(tuned(), name, data=data(tuned()))


LAWS = [the_model_stays, it_says_the_same_again, every_site_is_its_own, options_are_checked]


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_probe(law: Callable[[str], None], name: str) -> None:
    """Each law, for each probe."""
    law(name)


@pytest.mark.parametrize("epsilon", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_intruders_are_those_of_an_oracle(k: int, epsilon: float) -> None:
    """Counted one by one in float64 by numpy; more of them at a larger threshold, and never more than k."""
    model = tuned()
    found = weft.probe(model, "intruder_dimensions", k=k, epsilon=epsilon).sites
    for name, at in found.items():
        site = weft.model.site(model, name)
        now, was = (t.detach().double().numpy() for t in (site.now.dense(), site.original))
        (u, s, _), (v, z, _) = (np.linalg.svd(w, full_matrices=False) for w in (now, was))
        assert s[-1] > 1e-4 * s[0] and z[-1] > 1e-4 * z[0]
        most = [max(abs(float(u[:, i] @ v[:, j])) for j in range(v.shape[1])) for i in range(min(k, u.shape[1]))]
        assert at["intruders"] == sum(m < epsilon for m in most)
        assert at["least"] == pytest.approx(min(most), abs=1e-4)
        assert at["change"] == pytest.approx(np.linalg.norm(now - was) / np.linalg.norm(was), rel=1e-4)


def planted(w: torch.Tensor, size: float) -> torch.Tensor:
    """The weight and a large term of rank one, in a direction that is spread evenly over its left singular vectors."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return w + size * s[0] * torch.outer(u.sum(1) / u.shape[1] ** 0.5, vh[0])


def test_a_planted_direction_is_found_and_nothing_else() -> None:
    """One where a strange direction leads, none where a weight was only scaled or turned on its inputs' side."""
    model = weave(build_tiny("llama"))
    name = "model.layers.0.mlp.up_proj.weight"
    w = expressions(model)[name].dense().detach()
    turn = torch.linalg.qr(torch.randn(w.shape[1], w.shape[1], generator=torch.Generator().manual_seed(0)))[0]
    for value, want in ((planted(w, 50.0), 1), (3 * w, 0), (w @ turn, 0), (0 * w, 0)):
        other = fork(model)
        set_expressions(other, {name: Dense(value.contiguous())})
        found = weft.probe(other, "intruder_dimensions")
        assert found.sites[name]["intruders"] == want == sum(at["intruders"] for at in found.sites.values())
        assert found.says.startswith(f"{want} intruder dimensions among the top 10 of 14 weights, in {want} of them")


def test_the_base_of_an_ordinary_checkpoint_can_be_given(tmp_path: Path) -> None:
    """A merged model does not know its pretrained values: refused, and right with the base; another base is refused."""
    save(weave(build_tiny("llama")), tmp_path / "base")
    save(weave(build_tiny("llama", hidden_size=16)), tmp_path / "other")
    model: Any = tuned()
    want = weft.probe(model, "intruder_dimensions")
    weft.merge(model, to="dense")
    save(model, tmp_path / "tuned")
    back = load(tmp_path / "tuned")
    with pytest.raises(OptionError, match="nothing was tuned"):
        weft.probe(back, "intruder_dimensions")
    found = weft.probe(back, "intruder_dimensions", base=str(tmp_path / "base"))
    assert {n: at["intruders"] for n, at in found.sites.items()} == {n: at["intruders"] for n, at in want.sites.items()}
    with pytest.raises(ConflictError, match="another model"):
        weft.probe(back, "intruder_dimensions", base=str(tmp_path / "other"))


def uphill(points: int, radius: float) -> dict[str, list[float]]:
    """The sharpness of every linear weight of `tuned(0.3)` along its way, by plain float64 tensors alone."""
    model, plain = tuned(0.3), build_tiny("llama").double()
    names = weft.model.match(model, "all-linear")
    ends = {
        n: [t.detach().double() for t in (weft.model.site(model, n).original, expressions(model)[n].dense())]
        for n in names
    }
    made: dict[str, list[float]] = {n: [] for n in names}

    def loss() -> torch.Tensor:
        kept = [
            (plain(**b).logits[:, :-1].log_softmax(-1), b["input_ids"][:, 1:], b.get("attention_mask"))
            for b in data(model)
        ]
        nats = [
            -x.gather(-1, ids[..., None])[..., 0][slice(None) if m is None else m[:, 1:].bool()] for x, ids, m in kept
        ]
        return torch.cat([x.flatten() for x in nats]).mean()

    def put(name: str, value: torch.Tensor) -> None:
        plain.get_parameter(name).data = value

    for i in range(points):
        here = {n: was + (now - was) * i / (points - 1) for n, (was, now) in ends.items()}
        for n, value in here.items():
            put(n, value)
        plain.zero_grad()
        (start := loss()).backward()
        for n, value in here.items():
            g = plain.get_parameter(n).grad
            assert g is not None
            put(n, value + radius * value.norm() * g / g.norm())
            made[n].append(float(loss().detach() - start.detach()))
            put(n, value)
    return made


@pytest.mark.parametrize(("points", "radius"), [(2, 0.05), (3, 0.2)])
def test_sharpness_is_that_of_an_oracle(points: int, radius: float) -> None:
    """At every point of every weight; the largest is named, and a straggler is one that is sharpest between the ends."""
    model, want = tuned(0.3), uphill(points, radius)
    found = weft.probe(model, "path_sharpness", data=data(model), points=points, radius=radius)
    for name, at in found.sites.items():
        assert [at[f"at {i / (points - 1):g}"] for i in range(points)] == pytest.approx(want[name], rel=1e-3, abs=1e-5)
        assert at["most"] == max(at[f"at {i / (points - 1):g}"] for i in range(points)) == at[f"at {at['where']:g}"]
    first = max(want, key=lambda n: max(want[n]))
    late = sum(max(x[1:-1], default=-1.0) > max(x[0], x[-1]) for x in want.values())
    assert f"; {late} of 14 weights are stragglers; the sharpest is {first}, at" in found.says


def test_sharpness_needs_a_tuned_model_that_writes(tmp_path: Path) -> None:
    """Or its base, with which an ordinary checkpoint tells the same; another model, an encoder, and branches are refused."""
    save(weave(build_tiny("llama")), tmp_path / "base")
    save(weave(build_tiny("llama", hidden_size=16)), tmp_path / "other")
    model, seen = tuned(), data(tuned())
    want = weft.probe(model, "path_sharpness", data=seen, points=2)
    weft.merge(model, to="dense")
    save(model, tmp_path / "tuned")
    back = load(tmp_path / "tuned")
    with pytest.raises(OptionError, match="nothing was tuned"):
        weft.probe(back, "path_sharpness", data=seen)
    found = weft.probe(back, "path_sharpness", data=seen, points=2, base=str(tmp_path / "base"))
    for name, at in found.sites.items():
        assert dict(at) == pytest.approx(dict(want.sites[name]), rel=1e-3, abs=1e-5)
    with pytest.raises(ConflictError, match="another model"):
        weft.probe(back, "path_sharpness", data=seen, base=str(tmp_path / "other"))
    with pytest.raises(ConflictError, match="predicts no text"):
        weft.probe(weave(build_tiny("bert")), "path_sharpness", data=seen)
    weft.apply(back, "prompt")
    with pytest.raises(ConflictError, match="branch"):
        weft.probe(back, "path_sharpness", data=seen)
