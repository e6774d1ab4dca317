"""Laws of every method of kind probe, on a tiny model that was tuned; and what each one's number is, by a float64 oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import build_tiny
from torch import nn

import weft
from weft.engine import get, names
from weft.error import ConflictError, OptionError
from weft.expr import Dense
from weft.model import expressions, fingerprint, fork, set_expressions, weave
from weft.store import load, save

PROBES = [name for name in names() if get(name).kind == "probe"]


def tuned() -> nn.Module:
    """A model whose linear weights were changed by an adapter of rank 2."""
    model = weave(build_tiny("llama"))
    weft.apply(model, "lora", rank=2)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=rng))
    return model


def the_model_stays(name: str) -> None:
    """Bit for bit, trainable tensors included."""
    model = tuned()
    mark, live = fingerprint(model), [n for n, p in model.named_parameters() if p.requires_grad]
    weft.probe(model, name)
    assert fingerprint(model) == mark and [n for n, p in model.named_parameters() if p.requires_grad] == live


def it_says_the_same_again(name: str) -> None:
    """Whatever the global seed; the same numbers of every site, finite, and JSON."""
    torch.manual_seed(1)
    one = weft.probe(tuned(), name)
    torch.manual_seed(2)
    assert weft.probe(tuned(), name) == one
    assert json.loads(json.dumps(one.as_json())) == {
        "says": one.says,
        "sites": {n: dict(at) for n, at in one.sites.items()},
    }
    kinds = {tuple(at) for at in one.sites.values()}
    assert one.says and len(kinds) == 1 and np.isfinite([list(at.values()) for at in one.sites.values()]).all()


def every_site_is_its_own(name: str) -> None:
    """One site alone has the numbers that it has among others; a glob that fits none is refused."""
    model = tuned()
    one = next(iter(weft.probe(model, name).sites))
    assert weft.probe(model, name, at=one).sites == {one: weft.probe(model, name).sites[one]}
    with pytest.raises(OptionError, match="matches no site"):
        weft.probe(model, name, at="nowhere")


def options_are_checked(name: str) -> None:
    """Unknown ones, and numbers outside their range; and a rewrite is no probe."""
    with pytest.raises(OptionError, match="unheard_of"):
        weft.probe(tuned(), name, unheard_of=1)
    for option, field in get(name).options.model_json_schema()["properties"].items():
        if "minimum" in field or "exclusiveMinimum" in field:
            with pytest.raises(OptionError, match=option):
                weft.probe(tuned(), name, **{option: -1})
    with pytest.raises(OptionError, match="probes nothing"):
        weft.probe(tuned(), "rtn")


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
