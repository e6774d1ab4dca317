"""A tensor that several weights hold: stored once, counted once, one in memory, and trained by all of them."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.engine.run import Step, apply
from weft.error import WeftError
from weft.expr import Dense, Diagonal, Expr, LowRank, Product, Quantized, identity, tensors, terms_of, total
from weft.expr import fork as fork_one
from weft.model import expressions, fingerprint, fork, set_expressions, weave
from weft.store import load, nbytes, save, stored, verify
from weft.store.audit import header

ROLE = "adapter:shared"


def pool(m: int, n: int, *, train: bool = False, packed: bool = False) -> tuple[Expr, Expr]:
    """Up [m 4] and down [4 n], which all sites of a shape refer to."""
    rng = torch.Generator().manual_seed(m * n)
    up, down = (nn.Parameter(torch.randn(*s, generator=rng), requires_grad=train) for s in ((m, 4), (4, n)))
    if not packed:
        return Dense(up), Dense(down)
    codes = torch.randint(0, 16, (4, n), generator=rng).to(torch.uint8)
    return Dense(up), Quantized.encode(codes, down.detach().abs().amax(1, keepdim=True), None, grid="int4", group=0)


def vera(model: nn.Module, **how: bool) -> nn.Module:
    """Diagonals of its own for every site, between two matrices that all of a shape hold."""
    held, pools = (
        {n: e for n, e in expressions(model).items() if "_proj" in n},
        dict[tuple[int, int], tuple[Expr, Expr]](),
    )
    for name, e in held.items():
        up, down = pools.setdefault(e.shape, pool(*e.shape, **how))
        own = [nn.Parameter(torch.full((size,), 0.1)) for size in (e.shape[0], 4)]
        set_expressions(
            model, {name: total({**terms_of(e), ROLE: Product(Diagonal(own[0]), up, Diagonal(own[1]), down)})}
        )
    return model


def basis(model: nn.Module, *, train: bool = False) -> nn.Module:
    """Low-rank terms that share their right factor over the layers: part of a node is shared, part is its own."""
    right: dict[int, nn.Parameter] = {}
    for name, e in expressions(model).items():
        if "_proj" in name:
            rng = torch.Generator().manual_seed(len(name) + e.shape[1])
            a = right.setdefault(
                e.shape[1], nn.Parameter(torch.randn(3, e.shape[1], generator=rng), requires_grad=train)
            )
            term = LowRank(torch.randn(e.shape[0], 3, generator=rng), a)
            set_expressions(model, {name: total({**terms_of(e), ROLE: term})})
    return model


KINDS = {
    "frozen": lambda m: vera(m),
    "trainable": lambda m: vera(m, train=True),
    "packed": lambda m: vera(m, packed=True),
    "half of a node": lambda m: basis(m),
    "half of a node, trainable": lambda m: basis(m, train=True),
}


def storages(model: nn.Module) -> list[set[str]]:
    """Names of tensors over one storage, where there are several."""
    found: dict[object, set[str]] = {}
    for name, e in expressions(model).items():
        for path, t in tensors(e).items():
            found.setdefault(identity(t), set()).add(f"{name}:{path}")
    return sorted((s for s in found.values() if len(s) > 1), key=min)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tiny: Any) -> nn.Module:
    """A tiny model whose quantized weights have terms that share tensors."""
    made = weave(tiny())
    apply(made, [Step.of("rtn")])
    return KINDS[request.param](made)


def test_it_is_stored_and_counted_once(model: nn.Module, tmp_path: Path) -> None:
    """Every tensor once in the files; nbytes is exact; a site's own count has all that it needs."""
    save(model, tmp_path / "out")
    held = header(tmp_path / "out" / "weft.safetensors").tensors
    one_each = {identity(t): t for e in expressions(model).values() for t in tensors(e).values()}
    assert set(held) == set(stored(model)) and sum(e.stop - e.start for e in held.values()) == nbytes(model)
    assert sum(":" in n for n in held) == len(one_each)
    assert json.loads((tmp_path / "out" / "weft.json").read_text())["bytes"] == nbytes(model)
    alone = sum(e.nbytes() for e in expressions(model).values())
    assert alone > sum(t.numel() * t.element_size() for t in one_each.values())
    assert all(
        e.nbytes() == sum(t.numel() * t.element_size() for t in tensors(e).values())
        for e in expressions(model).values()
    )


def test_it_comes_back_shared(model: nn.Module, batches: Any, run: Any, tmp_path: Path) -> None:
    """Bit for bit, one storage again, as one parameter; saved a second time it is the same folder."""
    save(model, tmp_path / "out")
    back = load(tmp_path / "out")
    assert fingerprint(back) == fingerprint(model) and verify(tmp_path / "out") == []
    assert torch.equal(run(back, batches(1)[0]), run(model, batches(1)[0]))
    assert storages(back) == storages(model) and storages(model)
    for names in storages(back):
        held = {id(at(back, n)) for n in names}
        assert len(held) == 1
    save(back, tmp_path / "again")
    first, second = (json.loads((tmp_path / f / "weft.json").read_text()) for f in ("out", "again"))
    assert first["shared"] == second["shared"] and first["bytes"] == second["bytes"] == nbytes(back)


def at(model: nn.Module, name: str) -> Tensor:
    """A tensor by its name in the file."""
    site, _, path = name.partition(":")
    return tensors(expressions(model)[site])[path]


@pytest.mark.parametrize("how", [copy.deepcopy, fork], ids=["deepcopy", "fork"])
def test_copies_share_among_themselves(how: Any, model: nn.Module) -> None:
    """A copy's tensors are shared as the source's are, and training the copy leaves the source."""
    mark, other = fingerprint(model), how(model)
    assert storages(other) == storages(model) and fingerprint(other) == mark
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.add_(1)
    assert fingerprint(model) == mark and storages(other) == storages(model)
    other.to(torch.float64)
    assert fingerprint(model) == mark and storages(other) == storages(model)


def test_a_loaded_model_moves_as_one(tiny: Any, tmp_path: Path) -> None:
    """Nodes that are alike in all are one node, so that packed bytes too stay one wherever the model goes."""
    model = weave(tiny())
    save(vera(model, packed=True), tmp_path / "out")
    back = load(tmp_path / "out")
    before = storages(back)
    back._apply(lambda t: t if getattr(t, "seen", False) else seen(t.clone()))
    assert before and storages(back) == before


def seen(t: Tensor) -> Tensor:
    """Marked as one that has moved."""
    t.seen = True  # pyright: ignore
    return t


def test_a_fork_of_one_tree_keeps_what_it_holds_twice() -> None:
    """Trainable and used twice: one copy, used twice."""
    a = nn.Parameter(torch.randn(3, 5))
    e = total({"base": LowRank(torch.randn(4, 3), a), "adapter:x": LowRank(torch.randn(4, 3), a)})
    made = tensors(fork_one(e))
    assert made["terms.base.a"] is made["terms.adapter:x.a"] is not a
    assert e.nbytes() == fork_one(e).nbytes() == 4 * (2 * 12 + 15)


@pytest.mark.parametrize("kind", ["trainable", "half of a node, trainable"])
def test_the_gradient_is_the_sum_over_users(kind: str, tiny: Any, batches: Any) -> None:
    """As that of copies, one a site, added up."""
    batch, shared, apart = batches(1)[0], KINDS[kind](weave(tiny())), KINDS[kind](weave(tiny()))
    for name, e in expressions(apart).items():
        copied = copy.deepcopy(e)
        set_expressions(apart, {name: copied})
    for model in (shared, apart):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    checked = 0
    for names in storages(shared):
        if (grad := at(shared, min(names)).grad) is not None:
            total_ = torch.stack([at(apart, n).grad for n in names]).sum(0)
            torch.testing.assert_close(grad, total_, rtol=1e-4, atol=1e-7)
            checked += 1
    assert checked > 1 and not storages(apart)


@pytest.mark.parametrize("chain", [("rtn",), ("magnitude",), ("lora",)])
def test_a_rewrite_changes_its_own_site_only(chain: tuple[str, ...], model: nn.Module) -> None:
    """Others keep their values to the last bit, and go on sharing."""
    name = next(n for n in expressions(model) if "q_proj" in n)
    before = {n: e.dense().detach().clone() for n, e in expressions(model).items()}
    apply(model, [Step.of(m) for m in chain], at=name)
    set_expressions(model, {name: Dense(torch.zeros(expressions(model)[name].shape))})
    assert all(torch.equal(e.dense(), before[n]) for n, e in expressions(model).items() if n != name)
    assert storages(model)


def test_training_goes_through_the_trainer(tiny: Any, words: Any, tmp_path: Path) -> None:
    """One entry in the checkpoint and in the optimizer; a later run takes it up."""
    from weft.learn.data import Text
    from weft.learn.train import train
    from weft.learn.trainer import TRAINABLE, trainable

    ends: list[dict[str, Tensor]] = []
    for _ in range(2):
        model = vera(weave(tiny()), train=True)
        train(model, [Text("the cat sat .")], tokenizer=words, steps=2, batch=1, length=8, out=tmp_path, save_every=2)
        ends.append({n: t.detach().clone() for n, t in trainable(model).items()})
    (found,) = tmp_path.glob("checkpoint-*")
    assert set(header(found / TRAINABLE).tensors) == set(ends[0])
    assert all(torch.equal(ends[1][n], t) for n, t in ends[0].items())


def test_an_ordinary_checkpoint_has_it_written_out(tiny: Any, tmp_path: Path) -> None:
    """Where every weight is plain there is nothing to share, for readers that know no sharing."""
    model = weave(tiny())
    w = torch.randn(expressions(model)["model.layers.0.self_attn.q_proj.weight"].shape)
    names = [n for n in expressions(model) if "q_proj" in n]
    set_expressions(model, {n: Dense(w) for n in names})
    save(model, tmp_path / "out")
    manifest, held = (
        json.loads((tmp_path / "out" / "weft.json").read_text()),
        header(tmp_path / "out" / "model.safetensors").tensors,
    )
    assert "shared" not in manifest and set(names) <= set(held) and len(names) > 1
    assert sum(math.prod(e.shape) * e.dtype.itemsize for e in held.values()) == nbytes(model)
    assert all(torch.equal(expressions(load(tmp_path / "out"))[n].dense(), w) for n in names)


def test_the_reader_in_the_document_reads_it(model: nn.Module, tmp_path: Path) -> None:
    """The reader in docs/files.md has the values under all names."""
    save(model, tmp_path / "out")
    text = (Path(__file__).parents[2] / "docs" / "files.md").read_text("utf8")
    space: dict[str, Any] = {}
    exec(compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "files.md", "exec"), space)
    found = space["read"](tmp_path / "out")
    for name, e in expressions(model).items():
        torch.testing.assert_close(torch.tensor(found[name]).float(), e.dense().detach().float(), rtol=1e-5, atol=1e-5)


LISTS: dict[str, Any] = {
    "no table": lambda s: list(s),
    "of nothing": lambda s: dict.fromkeys(s, "model.layers.0.self_attn.q_proj.weight:absent"),
    "of a name that is stored": lambda s: {**s, next(iter(s.values())): next(iter(s.values()))},
    "of a plain tensor": lambda s: dict.fromkeys(s, "model.norm.weight"),
    "of no name": lambda s: {k: [v] for k, v in s.items()},
    "in a ring": lambda s: {k: k for k in s},
    "left out": lambda s: {},
    "of a site too many": lambda s: {
        **s,
        "model.layers.0.self_attn.q_proj.weight:terms.base.more": next(iter(s.values())),
    },
    "of no site": lambda s: {**s, "elsewhere.weight:w": next(iter(s.values()))},
    "of other kinds": lambda s: dict.fromkeys(s, "model.layers.0.self_attn.q_proj.weight:terms.base.data"),
}


@pytest.mark.parametrize("wrong", LISTS)
def test_a_damaged_list_is_refused(wrong: str, tiny: Any, tmp_path: Path) -> None:
    """Every wrong list of shared tensors is refused, by the name that is wrong."""
    model = weave(tiny())
    apply(model, [Step.of("rtn")])
    save(vera(model), tmp_path / "out")
    path = tmp_path / "out" / "weft.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "shared": LISTS[wrong](manifest["shared"])}))
    with pytest.raises(WeftError, match=r"shared|missing|unexpected|does not fit"):
        load(tmp_path / "out")
