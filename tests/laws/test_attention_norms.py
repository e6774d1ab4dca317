"""What `lora_norms` tells, by a float64 oracle on plain tensors, on several families."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import build_tiny
from torch import nn

import weft
from weft.error import ConflictError, OptionError
from weft.model import expressions, weave

from .test_probes import data, tuned


def slope(a: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The gradient by scores, of one head."""
    return a * g - a * (a * g).sum(-1, keepdims=True)


def lost(q: np.ndarray, k: np.ndarray, heads: int, rank: int, of: tuple[np.ndarray, np.ndarray]) -> float:
    """What the gradient loses where attention has `rank` directions."""
    d, made = q.shape[1] // heads, []
    share = heads // (k.shape[1] // d)
    for h in range(heads):
        mine, theirs = q[:, h * d : (h + 1) * d], k[:, h // share * d : (h // share + 1) * d]
        scores = np.exp(mine @ theirs.T / math.sqrt(d))
        a = scores / scores.sum(1, keepdims=True)
        u, s, v = np.linalg.svd(a)
        low, g = (u[:, :rank] * s[:rank]) @ v[:rank], of[0][h] @ of[1][h].T
        made.append(np.linalg.norm(slope(low, g) - slope(a, g)) / np.linalg.norm(slope(a, g)))
    return float(np.mean(made))


@pytest.mark.parametrize(("rank", "scale"), [(1, 1.0), (4, 0.5), (12, 2.0)])
def test_numbers_are_those_of_an_oracle(rank: int, scale: float) -> None:
    """Sizes over all batches, the error as a mean; whole attention loses nothing, and adapters count apart from the rest."""
    model = tuned(0.3)
    found = weft.probe(model, "lora_norms", data=data(model), rank=rank, scale=scale).sites
    assert len(found) == 4
    rng = torch.Generator().manual_seed(0)
    of = tuple(t.double().numpy() for t in torch.randn(2, 4, 12, 8, generator=rng))
    errors: dict[int, list[float]] = {0: [], 1: []}
    sizes: dict[str, list[float]] = {}
    for batch in data(model):
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states
        for i in range(2):
            block = model.get_submodule(f"model.layers.{i}")
            with torch.no_grad():
                x = block.input_layernorm(states[i])[0].double().numpy()  # type: ignore[operator]
            made = []
            for n in ("q", "k"):
                name = f"model.layers.{i}.self_attn.{n}_proj.weight"
                terms = expressions(model)[name].named()  # type: ignore[operator]
                w, added = (terms[r].dense().detach().double().numpy() for r in ("base", "adapter:default"))
                made.append(scale * x @ (w + added).T)
                now = [np.abs(x).max(), scale * np.abs(x @ w.T).max(), scale * np.abs(x @ added.T).max()]
                sizes[name] = [max(a, b) for a, b in zip(sizes.get(name, [0.0] * 3), now, strict=True)]
            errors[i].append(lost(made[0], made[1], 4, rank, of))  # type: ignore[arg-type]
    for name, at in found.items():
        assert [at[k] for k in ("input", "weight", "adapter")] == pytest.approx(sizes[name], rel=1e-4)
        assert at["threshold"] == pytest.approx(math.sqrt(math.log(12)))
        want = float(np.mean(errors[int(name.split(".")[2])]))
        assert at["error"] == pytest.approx(want, rel=1e-3, abs=1e-4)
        assert rank < 12 or at["error"] < 1e-4


def test_larger_queries_and_keys_lose_more() -> None:
    """Of four directions; and without an adapter nothing is its own."""
    model: nn.Module = weave(build_tiny())
    errors = []
    for scale in (0.5, 1.0, 2.0, 4.0):
        found = weft.probe(model, "lora_norms", data=data(model), rank=4, scale=scale).sites
        assert all(at["adapter"] == 0 for at in found.values())
        errors.append(np.mean([at["error"] for at in found.values()]))
    assert errors == sorted(errors) and errors[0] < 0.3 * errors[-1]


def test_other_families_and_what_has_no_queries() -> None:
    """An encoder; a weight that is neither query nor key, and a family that no table describes, are refused."""
    model = weave(build_tiny("bert"))
    assert len(weft.probe(model, "lora_norms", data=data(model)).sites) == 4
    with pytest.raises(OptionError, match="nothing to measure"):
        weft.probe(model, "lora_norms", data=data(model), at="*intermediate*")
    model.config.model_type = "unheard of"
    with pytest.raises(ConflictError, match="nothing is known of this family"):
        weft.probe(model, "lora_norms", data=data(model))
