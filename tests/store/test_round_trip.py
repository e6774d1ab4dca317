"""Save and load: every value comes back bit for bit, and plain models are ordinary checkpoints."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from laws.cases import rounds
from torch import nn

from weft.engine import get, names
from weft.engine.run import Step, apply
from weft.error import ChangedError, ConflictError, PathError
from weft.expr import Dense, Sum
from weft.model import expressions, fingerprint, site, unweave, weave
from weft.stats import Stats, collect
from weft.store import import_, load, nbytes, save, stored, verify
from weft.store.audit import header
from weft.store.save import narrow

CHAINS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    **{
        n: ((n, rounds(get(n))),) for n in names() if get(n).kind == "rewrite" and "matrix" in get(n).sites
    },  # others: test_vectors
    "asymmetric": (("rtn", {"bits": 3, "group": 8, "symmetric": False}),),
    "2:4": (("magnitude", {"pattern": "2:4"}),),
    "2:4 + gptq": (("wanda", {"pattern": "2:4"}), ("gptq", {"bits": 3})),
    "turned + rounded": (
        ("online_hadamard", {}),
        ("gptq", {}),
        ("act_quant", {"grid": "fp8_e4m3"}),
        ("lora", {"rank": 2}),
    ),
    "masked + nf4": (("sparsegpt", {}), ("nf4", {"group": 16})),
    "sum": (
        ("rtn", {"bits": 3}),
        ("eora", {"rank": 3}),
        ("lora", {"rank": 2, "name": "a"}),
        ("lora", {"rank": 2, "name": "b"}),
    ),
}


@pytest.fixture(scope="module")
def evidence(tiny: Any, batches: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stats]:
    """Evidence of the tiny models, collected once a family."""
    made: dict[str, Stats] = {}

    def of(family: str) -> Stats:
        if family not in made:
            made[family] = collect(weave(tiny(family)), batches(), tmp_path_factory.mktemp(family))
        return made[family]

    return of


def chain(*steps: tuple[str, dict[str, Any]]) -> list[Step]:
    """Steps with checked options."""
    return [Step.of(m, **o) for m, o in steps]


def stir(model: nn.Module) -> None:
    """Give trainable tensors values that are not zero."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=rng) * 0.1)


@pytest.mark.parametrize("kind", CHAINS)
def test_every_methods_result_comes_back(
    kind: str, family: str, tiny: Any, batches: Any, run: Any, evidence: Any, tmp_path: Path
) -> None:
    """Saved and loaded: the same bytes, the same expressions, the same output, and a folder that is whole.

    What is loaded is frozen, and torch may sum in another order where a factor trains, so the first model is frozen too.
    """
    model, batch = weave(tiny(family)), batches(1)[0]
    at = "all-linear" if any(get(m).taps for m, _ in CHAINS[kind]) else "*"
    apply(model, chain(*CHAINS[kind]), at=at, stats=evidence(family))
    stir(model)
    model.requires_grad_(False)
    save(model, tmp_path / "out")
    back = load(tmp_path / "out")
    assert {n: e.describe() for n, e in expressions(back).items()} == {
        n: e.describe() for n, e in expressions(model).items()
    }
    assert fingerprint(back) == fingerprint(model) and torch.equal(run(back, batch), run(model, batch))
    assert verify(tmp_path / "out") == [] and nbytes(back) == nbytes(model)


def test_the_chains_make_what_their_names_say(tiny: Any, evidence: Any) -> None:
    """The round trips see quantized, masked, N:M and summed expressions."""
    seen: dict[str, str] = {}
    for kind, steps in CHAINS.items():
        model = weave(tiny())
        apply(model, chain(*steps), at="q_proj", stats=evidence("llama"))
        seen[kind] = next(e for n, e in expressions(model).items() if "q_proj" in n).describe()
    assert seen["2:4 + gptq"].startswith("2:4(int3") and seen["masked + nf4"].startswith("50% zero(nf4")
    assert "asymmetric" in seen["asymmetric"] and seen["sum"].count("adapter:") == 2 and "compensation" in seen["eora"]


@pytest.mark.parametrize("name", ["ref-lm", "minilm"])
def test_a_real_model_comes_back(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The shipped Llama and a real BERT."""
    source = request.getfixturevalue(name.replace("-", "_"))
    model = load(source)
    apply(
        model,
        chain(("rtn", {"bits": 4}), ("svd_residual", {"rank": 2})),
        at="layers.1.*" if name == "ref-lm" else "layer.1.*",
    )
    save(model, tmp_path / "out")
    assert fingerprint(load(tmp_path / "out")) == fingerprint(model)
    assert {p.name for p in source.glob("tokenizer*")} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_tied_stays_tied(tiny: Any, tmp_path: Path) -> None:
    """After save and load the head is still the embedding's expression, stored once."""
    model = weave(tiny("llama-tied"))
    apply(model, chain(("rtn", {})))
    save(model, tmp_path / "out")
    back = load(tmp_path / "out")
    assert back.lm_head.expr is back.model.embed_tokens.expr
    assert not any(k.startswith("lm_head") for p in (tmp_path / "out").glob("*.safetensors") for k in header(p).tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", [1 << 30, 9000])
def test_a_plain_model_is_an_ordinary_checkpoint(
    dtype: torch.dtype, shard: int, family: str, tiny: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """AutoModel loads it exactly, in the dtype it had, sharded or not, by its own choice of dtype too."""
    monkeypatch.setattr(sys.modules["weft.store.save"], "SHARD", shard)
    model = tiny(family, dtype=dtype)
    want = {k: v.clone() for k, v in model.state_dict().items()}
    save(weave(model), tmp_path / "out")
    auto = {"llama": transformers.AutoModelForCausalLM, "bert": transformers.AutoModel}.get(
        family.split("-tied")[0], transformers.AutoModelForMaskedLM
    )
    for given in ({"dtype": dtype}, {"dtype": "auto"}, {}):
        held = auto.from_pretrained(tmp_path / "out", **given).state_dict()
        assert held.keys() == want.keys() and all(
            held[k].dtype == v.dtype and torch.equal(held[k], v) for k, v in want.items()
        ), given


def test_the_reference_model_saves_as_it_came(ref_lm: Path, tmp_path: Path) -> None:
    """Loaded and saved without a change, the tensors are those of the source file."""
    from safetensors.torch import load_file

    save(load(ref_lm), tmp_path / "out")
    a, b = load_file(ref_lm / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_values_after_unweave_save_as_the_rewritten_ones(tiny: Any, tmp_path: Path) -> None:
    """A rewritten model, unwoven and woven again, is plain and holds today's values."""
    model = weave(tiny())
    apply(model, chain(("rtn", {})))
    want = {n: e.dense() for n, e in expressions(model).items()}
    save(weave(unweave(model)), tmp_path / "out")
    back = expressions(load(tmp_path / "out"))
    assert all(isinstance(e, Dense) and torch.equal(e.w, want[n]) for n, e in back.items())


def test_transformers_refuses_a_weft_folder(family: str, tiny: Any, tmp_path: Path) -> None:
    """Rather than misread it; also where a checkpoint of its own kind lies beside."""
    model = tiny(family)
    model.save_pretrained(tmp_path / "plain")
    apply(weave(model), chain(("rtn", {})))
    save(model, tmp_path / "out")
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModel.from_pretrained(tmp_path / "out")
    with pytest.raises((OSError, ValueError)):
        type(model).from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("shard", [1 << 30, 5000])
@pytest.mark.parametrize("method", [None, "rtn", "lora"])
def test_nbytes_is_what_the_files_hold(
    shard: int, method: str | None, family: str, tiny: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """`nbytes` is the tensor bytes of all files together, and the manifest says so."""
    monkeypatch.setattr(sys.modules["weft.store.save"], "SHARD", shard)
    model = weave(tiny(family))
    apply(model, [Step.of(method)] if method else [])
    save(model, tmp_path / "out")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) is (shard == 5000)
    assert sum(e.stop - e.start for p in files for e in header(p).tensors.values()) == nbytes(model)
    assert json.loads((tmp_path / "out" / "weft.json").read_text())["bytes"] == nbytes(model)


@pytest.mark.parametrize(("chain_", "shard"), [((), 9000), (("rtn",), 1500)])
def test_shards_load(
    chain_: tuple[str, ...],
    shard: int,
    family: str,
    tiny: Any,
    batches: Any,
    run: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """A sharded folder loads as one, none of its shards is larger than asked unless one tensor is."""
    monkeypatch.setattr(sys.modules["weft.store.save"], "SHARD", shard)
    model, batch = weave(tiny(family)), batches(1)[0]
    apply(model, [Step.of(m) for m in chain_])
    save(model, tmp_path / "out")
    sizes = [[e.stop - e.start for e in header(p).tensors.values()] for p in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 2 and all(sum(s) <= shard or len(s) == 1 for s in sizes)
    assert torch.equal(run(load(tmp_path / "out"), batch), run(model, batch)) and verify(tmp_path / "out") == []


def test_saving_over_an_older_save(tiny: Any, tmp_path: Path) -> None:
    """Not without `replace`; never over a folder that weft did not write; a loaded model may replace its own source."""
    model = weave(tiny())
    save(model, tmp_path / "out")
    with pytest.raises(ConflictError):
        save(model, tmp_path / "out")
    back = load(tmp_path / "out")
    apply(back, chain(("rtn", {})))
    save(back, tmp_path / "out", replace=True)
    assert fingerprint(load(tmp_path / "out")) == fingerprint(back)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConflictError):
        save(model, tmp_path / "mine", replace=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("renamed", [False, True], ids=["own names", "prefixed names"])
def test_original_is_read_from_the_base(renamed: bool, tiny: Any, tmp_path: Path) -> None:
    """A saved model knows its pretrained values, whatever prefix the base's checkpoint gives its names."""
    from safetensors.torch import load_file, save_file

    tiny("bert").save_pretrained(tmp_path / "base")
    want = load_file(tmp_path / "base" / "model.safetensors")
    if renamed:
        save_file({f"bert.{k}": t for k, t in want.items()}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    model = load(tmp_path / "base")
    apply(model, chain(("rtn", {"bits": 2})))
    save(model, tmp_path / "out")
    back = load(tmp_path / "out")
    assert all(torch.equal(site(back, n).original, want[n]) for n in expressions(back))


def test_a_changed_base_is_noticed(tiny: Any, tmp_path: Path) -> None:
    """`.original` refuses a base that is not the one it was, or is gone."""
    from safetensors.torch import load_file, save_file

    tiny().save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    apply(model, chain(("rtn", {})))
    save(model, tmp_path / "out")
    back = load(tmp_path / "out")
    file = tmp_path / "base" / "model.safetensors"
    held = {k: t.clone() for k, t in load_file(file).items()}
    held["model.norm.weight"][0] += 1
    save_file(held, file, {"format": "pt"})
    with pytest.raises(ChangedError):
        _ = site(back, "lm_head.weight").original
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(PathError):
        _ = site(back, "lm_head.weight").original


def test_a_model_without_a_base_says_so(tiny: Any, tmp_path: Path) -> None:
    """Built in memory, its pretrained values are in no file."""
    model = weave(tiny())
    apply(model, chain(("rtn", {})))
    save(model, tmp_path / "out")
    with pytest.raises(PathError):
        _ = site(load(tmp_path / "out"), "lm_head.weight").original


def test_originals_read_the_base_once(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Reading every site's pretrained value reads the base's files once to check them, not once a site."""
    module = sys.modules["weft.store.load"]
    tiny().save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    apply(model, chain(("rtn", {})))
    save(model, tmp_path / "out")
    back, calls, plain = load(tmp_path / "out"), [], module.seal
    monkeypatch.setattr(module, "seal", lambda *a: calls.append(a) or plain(*a))
    assert all(bool(torch.isfinite(site(back, n).original).all()) for n in expressions(back))
    assert len(calls) == 1


def test_older_folders_are_read(tiny: Any, tmp_path: Path) -> None:
    """Manifests without sums, whose base is known by the hash of its files' hashes."""
    tiny().save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    apply(model, chain(("rtn", {})))
    save(model, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "weft.json").read_text())
    inner = hashlib.blake2b((tmp_path / "base" / "model.safetensors").read_bytes(), digest_size=16).hexdigest()
    manifest["base"] = {
        "path": manifest["base"]["path"],
        "hash": hashlib.blake2b(inner.encode(), digest_size=16).hexdigest(),
    }
    for entry in manifest["files"].values():
        entry.pop("tensors", None)
    (tmp_path / "out" / "weft.json").write_text(json.dumps(manifest))
    back = load(tmp_path / "out")
    assert fingerprint(back) == fingerprint(model) and verify(tmp_path / "out") == []
    assert torch.equal(site(back, "lm_head.weight").original, tiny().lm_head.weight)
    with (tmp_path / "base" / "model.safetensors").open("r+b") as f:
        f.seek(-1, 2)
        f.write(b"\1")
    with pytest.raises(ChangedError):
        _ = site(load(tmp_path / "out"), "lm_head.weight").original


@pytest.mark.parametrize(
    ("value", "small"), [(1.5, True), (0.1, False), (2.0**-130, True), (float("inf"), True), (1e30, False)]
)
def test_narrow_loses_nothing(value: float, small: bool) -> None:
    """bfloat16 only where every value survives."""
    t = torch.tensor([1.0, value])
    assert torch.equal(narrow(t).float(), t) and (narrow(t).dtype == torch.bfloat16) is small


def test_stored_names_are_unique_and_complete(family: str, tiny: Any, tmp_path: Path) -> None:
    """What a budget counts is exactly what the files name."""
    model = weave(tiny(family))
    apply(model, chain(("rtn", {}), ("lora", {"rank": 2})))
    save(model, tmp_path / "out")
    assert set(header(tmp_path / "out" / "weft.safetensors").tensors) == set(stored(model))
    assert all(isinstance(e, Sum) for e in expressions(model).values())


def test_compute_dtype_is_asked_for(tiny: Any, batches: Any, run: Any, tmp_path: Path) -> None:
    """`dtype` is what is computed in, whatever the file holds; the default is float32."""
    tiny(dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    for dtype in (torch.float32, torch.bfloat16):
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype).eval()
        found = run(load(tmp_path / "plain", dtype=dtype), batches(1)[0])
        assert found.dtype == dtype and torch.equal(found, run(plain, batches(1)[0]))
    assert run(load(tmp_path / "plain"), batches(1)[0]).dtype == torch.float32


def test_hub_cache_layout(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A model in the hub's cache loads by its id, offline."""
    folder = hub(
        "org/plain", tmp_path / "hub", lambda p: tiny().save_pretrained(p), links=False, monkeypatch=monkeypatch
    )
    assert fingerprint(load("org/plain")) == fingerprint(load(folder)) == fingerprint(weave(tiny()))


@pytest.mark.parametrize("shard", ["1GB", "9KB"])
def test_hub_cache_with_links(shard: str, tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The hub's cache links each file to a blob outside the snapshot; one file or many shards, it loads."""
    hub(
        "org/linked",
        tmp_path / "hub",
        lambda p: tiny().save_pretrained(p, max_shard_size=shard),
        links=True,
        monkeypatch=monkeypatch,
    )
    assert fingerprint(load("org/linked")) == fingerprint(weave(tiny()))


def test_a_pickle_in_the_hub_cache(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Imported by its id, through the cache's links."""

    def write(p: Path) -> None:
        tiny().save_pretrained(p)
        (p / "model.safetensors").unlink()
        torch.save(dict(tiny().state_dict()), p / "pytorch_model.bin")

    hub("org/old", tmp_path / "hub", write, links=True, monkeypatch=monkeypatch)
    assert import_("org/old", tmp_path / "out") == []
    assert fingerprint(load(tmp_path / "out")) == fingerprint(weave(tiny()))


def test_a_weft_folder_in_the_hub_cache(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A compressed model in the hub's cache loads and verifies there too."""
    model = weave(tiny())
    apply(model, chain(("rtn", {})))
    folder = hub("org/small", tmp_path / "hub", lambda p: save(model, p), links=True, monkeypatch=monkeypatch)
    assert fingerprint(load("org/small")) == fingerprint(model) and verify(folder) == []


@pytest.mark.parametrize("name", ["org/absent", "no-slash", "./org/absent", "/org", "a/b/c"])
def test_an_unknown_model_is_a_path_error(name: str) -> None:
    """Neither a folder nor a fetched id."""
    with pytest.raises(PathError):
        load(name)


def hub(name: str, root: Path, write: Callable[[Path], Any], *, links: bool, monkeypatch: Any) -> Path:
    """A model as huggingface_hub keeps it: refs/main names a snapshot, whose files may be links to blobs."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place, commit = root / f"models--{name.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    snapshot = place / "snapshots" / commit
    write(snapshot)
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    if links:
        (place / "blobs").mkdir()
        for path in [p for p in snapshot.rglob("*") if p.is_file()]:
            blob = place / "blobs" / f"blob-{path.name}"
            path.rename(blob)
            path.symlink_to(Path("../../blobs") / blob.name)
    return snapshot
