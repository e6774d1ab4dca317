"""Fuzz everything that reads a stranger's bytes: headers, indexes, manifests, recipes, adapter settings.

    python scripts/fuzz.py [--minutes 10] [--engine hypothesis|atheris|both]

Each reader must end with a result or a WeftError. Anything else, a call of more than five seconds, or memory that grows is a
finding: it is printed with its input, and the exit code is 1. Hypothesis mutates sound inputs, as bytes and as trees; atheris,
where it is installed, is guided by coverage.
"""

from __future__ import annotations

import argparse
import functools
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SLOW, GROWTH = 5.0, 256 << 20
Target = Callable[[bytes], object]


@functools.cache
def ground() -> Path:
    """A folder to write inputs into: a tiny weft folder `model` with its manifest, and a shard."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import weft
    from weft.store.tensors import write_tensors

    root = Path(tempfile.mkdtemp(prefix="weft-fuzz-"))
    size: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = weft.weave(LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2)))
    weft.apply(model, "rtn", group=8, at="*.mlp.*")
    weft.apply(model, "lora", rank=2, at="*.q_proj.*")
    weft.save(model, root / "model")
    (root / "index").mkdir()
    write_tensors(root / "index" / "model-00001-of-00001.safetensors", {"a": torch.ones(4), "b": torch.ones(2, 2)})
    return root


def header(raw: bytes) -> object:
    """A safetensors file of these bytes."""
    from weft.store.audit import header as read

    path = ground() / "x.safetensors"
    path.write_bytes(raw)
    return read(path)


def index(raw: bytes) -> object:
    """A folder with this index and one sound shard."""
    from weft.store.checkpoint import checkpoint

    (ground() / "index" / "model.safetensors.index.json").write_bytes(raw)
    return checkpoint(ground() / "index", "model").read()


def manifest(raw: bytes) -> object:
    """A weft folder with this manifest: its list of files, and every expression with the folder's own tensors."""
    from weft.error import raise_all
    from weft.store.swap import read_manifest, verify
    from weft.store.tensors import read_tensors
    from weft.store.trees import expressions_of

    folder = ground() / "model"
    (folder / "weft.json").write_bytes(raw)
    said = read_manifest(folder)
    verify(folder)
    exprs, _, problems = expressions_of(said.get("sites"), read_tensors(folder / "weft.safetensors"), "model")
    raise_all(problems)
    return [e.dense() for e in exprs.values()]


def recipe(raw: bytes) -> object:
    """A recipe."""
    from weft.engine.recipe import parse
    from weft.store.yaml import parse_yaml

    return parse(parse_yaml(raw, "recipe.yaml"), "recipe.yaml")


def adapter(raw: bytes) -> object:
    """A PEFT adapter's settings."""
    from weft.store.adapter import settings
    from weft.store.files import parse_json

    table = parse_json(raw, "adapter_config.json")
    return settings(table) if isinstance(table, dict) else None


TARGETS: dict[str, Target] = {
    "header": header,
    "index": index,
    "manifest": manifest,
    "recipe": recipe,
    "adapter": adapter,
}


@functools.cache
def seeds(name: str) -> list[bytes]:
    """Sound inputs."""
    one = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    table = json.dumps({"__metadata__": {"format": "pt"}, "a": one, "b": {**one, "data_offsets": [16, 32]}}).encode()
    lora = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "rank_pattern": {"a.b": 4}}
    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    held: dict[str, Callable[[], list[bytes]]] = {
        "header": lambda: [struct.pack("<Q", len(table)) + table + b"\0" * 32],
        "index": lambda: [
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys("ab", "model-00001-of-00001.safetensors")}).encode()
        ],
        "manifest": lambda: [(ground() / "model" / "weft.json").read_bytes()],
        "recipe": lambda: [p.read_bytes() for p in recipes],
        "adapter": lambda: [json.dumps(lora).encode()],
    }
    return held[name]()


def attempt(target: Target, raw: bytes) -> float:
    """Processor seconds that a reader took. Errors: whatever is no WeftError."""
    from weft.error import WeftError

    begun = time.process_time()
    try:
        target(raw)
    except WeftError as e:
        str(e)
    took = time.process_time() - begun
    if took > SLOW:
        raise RuntimeError(f"{took:.1f} seconds")
    return took


def hypothesis_run(name: str, seconds: float, seed: int = 0) -> dict[str, float]:
    """Mutate sound inputs until the time is over. Returns calls, the slowest, and the growth of memory in MB."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    texts = st.text(max_size=20) | st.sampled_from(
        ["..", "/", "\0", "a" * 600, "NaN", "&a *a", "!!python/x", "<<", "1e999"]
    )
    scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts
    trees = st.recursive(
        scalars, lambda s: st.lists(s, max_size=4) | st.dictionaries(texts, s, max_size=4), max_leaves=12
    )
    tokens = st.sampled_from(
        [b"[" * 3000, b"{", b"}", b'"', b":", b"- ", b"\n", b"\t", b"\xff", b"1e999", b"-1", b"9" * 5000]
    )
    pieces = st.binary(max_size=12) | tokens
    target, sound = TARGETS[name], seeds(name)
    ground()
    for raw in sound:
        target(raw)
    best, count, slowest, start = resident(), 0, 0.0, 0

    @settings(max_examples=200, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: Any) -> None:
        nonlocal count, slowest
        raw = data.draw(st.sampled_from(sound))
        body = raw.find(b"{")
        if data.draw(st.booleans()) and name != "recipe":
            tree = _replaced(json.loads(raw[body : raw.rfind(b"}") + 1]), data, trees)
            made = json.dumps(tree).encode()
            raw = struct.pack("<Q", len(made)) + made + b"\0" * 32 if name == "header" else made
        else:
            for _ in range(data.draw(st.integers(0, 4))):
                at, end = sorted(data.draw(st.tuples(*[st.integers(0, len(raw))] * 2)))
                raw = raw[:at] + data.draw(pieces) + raw[min(end, at + data.draw(st.integers(0, 40))) :]
        count += 1
        slowest = max(slowest, attempt(target, raw))

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        seeded(seed + start)(run)()
        start += 1
        if start == 3:
            best = resident()
    grown = resident() - best
    if grown > GROWTH:
        raise RuntimeError(f"{name}: memory grew by {grown >> 20} MB in {count} calls")
    return {"calls": count, "slowest": slowest, "MB": grown / 2**20}


def _replaced(tree: Any, data: Any, trees: Any) -> Any:
    """The tree with one node changed, taken out or given another name."""
    from hypothesis import strategies as st

    if not isinstance(tree, dict | list) or not tree or data.draw(st.integers(0, 3)) == 0:
        return data.draw(trees)
    if isinstance(tree, list):
        at = data.draw(st.integers(0, len(tree) - 1))
        return [*tree[:at], _replaced(tree[at], data, trees), *tree[at + 1 :]]
    key = data.draw(st.sampled_from(sorted(tree)))
    match data.draw(st.integers(0, 5)):
        case 0:
            return {k: v for k, v in tree.items() if k != key}
        case 1:
            return {**tree, data.draw(st.text(max_size=30)): tree[key]}
        case _:
            return {**tree, key: _replaced(tree[key], data, trees)}


def resident() -> int:
    """Bytes of resident memory."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def atheris_run(name: str, seconds: float) -> int:
    """Coverage-guided fuzzing of one reader in this process; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["weft.store", "weft.engine.recipe", "yaml", "json"]):
        import weft.engine.recipe
        import weft.store
        import weft.store.yaml  # noqa: F401

    ground()
    corpus = Path(tempfile.mkdtemp(prefix="weft-corpus-"))
    for i, raw in enumerate(seeds(name)):
        (corpus / str(i)).write_bytes(raw)
    limits = [
        f"-artifact_prefix={corpus}/",
        f"-max_total_time={int(seconds)}",
        f"-timeout={int(SLOW)}",
        "-rss_limit_mb=2048",
        "-max_len=20000",
    ]
    atheris.Setup(
        [sys.argv[0], *limits, "-print_final_stats=1", str(corpus)], lambda raw: attempt(TARGETS[name], raw) and None
    )
    atheris.Fuzz()
    return 0


def main() -> int:
    """Every reader in turn, by each engine."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--engine", choices=["hypothesis", "atheris", "both"], default="both")
    options.add_argument("--only", choices=list(TARGETS))
    given = options.parse_args()
    try:
        import atheris  # noqa: F401

        engines = ["hypothesis", "atheris"] if given.engine == "both" else [given.engine]
    except ImportError:
        print("atheris is not installed: hypothesis alone")
        engines = ["hypothesis"]
    names = [given.only] if given.only else list(TARGETS)
    share = 60 * given.minutes / len(names) / len(engines)
    if given.only and given.engine == "atheris":
        return atheris_run(given.only, share)
    failed = 0
    for name in names:
        if "hypothesis" in engines:
            found = hypothesis_run(name, share)
            print(
                f"{name:10} hypothesis {found['calls']:8.0f} calls, slowest {found['slowest']:.2f} s, {found['MB']:+.0f} MB"
            )
        if "atheris" in engines:
            again = [sys.executable, __file__, "--engine", "atheris", "--only", name, "--minutes", str(share / 60)]
            done = subprocess.run(again, capture_output=True, text=True)
            stats = [
                line for line in done.stderr.splitlines() if "number_of_executed_units" in line or "peak_rss" in line
            ]
            print(f"{name:10} atheris    {'; '.join(s.removeprefix('stat::') for s in stats)}")
            if done.returncode:
                print(done.stderr[-4000:])
                failed = 1
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
