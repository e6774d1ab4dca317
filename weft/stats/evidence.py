"""Evidence: what calibration data says of every weight, collected in one walk and kept for later runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.error import FormatError
from weft.memory import release
from weft.model import Evidence, expression, fingerprint, finite, places
from weft.model.branch import refuse_branches
from weft.progress import Progress, Silent
from weft.stats.gradients import gradients, trim
from weft.stats.inputs import may_read
from weft.stats.objective import objective
from weft.stats.sums import InputSums, OutputSums
from weft.stats.walker import Batch, Edges, Walker, forward
from weft.store.files import read_json, write_json
from weft.store.tensors import read_tensors, write_tensors

VERSION = 4
GRADIENT_TOKENS = 8192
"""The backward pass sees at most about this many tokens: second moments a row need fewer than Grams."""
_SUMS = ("gram", "mean", "mean_abs", "most")


class Stats:
    """Evidence by site, on disk: each block's Grams are read (mapped) when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_json(folder / "index.json")
        self.groups: list[tuple[str, ...]] = [tuple(g) for g in index["groups"]]
        """Sites that read the same input, in the order of the model's computation; embeddings alone."""
        self.files: dict[str, str] = index["files"]
        self.tokens: int = index["tokens"]
        self.units: int = index["units"]
        self.counts: dict[str, int] = index["counts"]
        """Tokens that were read, by the first site that reads them: of an expert, those that it was given."""

    def evidence(self, names: Sequence[str]) -> dict[str, tuple[Evidence, ...]]:
        """Evidence of these sites; those that share an input share the tensors."""
        made: dict[str, tuple[Evidence, ...]] = {}
        edges: dict[str, dict[str, Tensor]] = {}
        for name in names:
            held = read_tensors(self.folder / self.files[name])
            uses: list[Evidence] = []
            if f"{name}:edge" in self.files:
                edge = self.files[f"{name}:edge"]
                sums = edges.setdefault(edge, {k: held[f"{edge}:{k}"] for k in _SUMS})
                of_x = {k: sums[k] for k in ("mean", "mean_abs", "most")}
                uses.append(Evidence(sums["gram"], held[f"{name}:weight"], self.counts[edge], **of_x))
            if f"{name}:rows.gram" in held:
                uses.append(Evidence(held[f"{name}:rows.gram"], held[f"{name}:rows.weight"], self.tokens))
            made[name] = tuple(uses)
        return made


def key(model: nn.Module, batches: Sequence[Batch], seed: int, gradient: bool) -> str:
    """Content address of the evidence: the model's values, the inputs, the seed."""
    word = hashlib.blake2b(
        f"{VERSION} {seed} {gradient} {fingerprint(model)} {_computes(model)}".encode(), digest_size=16
    )
    for batch in batches:
        for name, t in sorted(batch.items()):
            word.update(f"{name}{list(t.shape)}".encode() + t.contiguous().numpy().tobytes())
    return word.hexdigest()


def _computes(model: nn.Module) -> str:
    """What a configuration computes with its weights."""
    config = getattr(model, "config", None)
    table = (
        {
            k: v
            for k, v in (config.to_dict() if hasattr(config, "to_dict") else config).items()
            if k not in {"_name_or_path", "transformers_version", "architectures", "dtype"}
        }
        if config is not None
        else {}
    )
    return json.dumps(table, sort_keys=True, default=str)


def collect(
    model: nn.Module,
    batches: Sequence[Batch],
    folder: Path,
    *,
    gradient: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Stats:
    """Evidence of every woven site from these batches, in `folder` under its content address; read back if it is there.

    Sums over tokens, padding left out; the Gram in float32 a batch, merged in float64. With `gradient`, one backward pass
    weighs rows by their output gradients' second moments. Peak memory: one block's Grams, all hidden states.
    Errors: NumericError with site, batch and sample if a value is not finite; FormatError for no batch at all, a sequence
    without a token, and tokens of another vocabulary; ConflictError for branches.
    """
    refuse_branches(model, "evidence")
    _tokens(model, batches)
    place = folder / key(model, batches, seed, gradient)
    if (place / "index.json").exists():
        return Stats(place)
    goal, bars = objective(model), progress or Silent()
    outputs: dict[str, OutputSums] = {}
    units = sum(map(_units, batches))
    if gradient:
        enough = max(1, -(-GRADIENT_TOKENS * len(batches) // max(1, units)))
        some = batches[:: max(1, len(batches) // enough)][:enough]
        with bars.bar("gradients", len(some)) as step:
            outputs, units = gradients(model, some, goal, seed=seed, progress=step)
    _Writer(model, place, outputs, units).walk(batches, bars)
    return Stats(place)


def _units(batch: Batch) -> int:
    """Tokens that are no padding; where nothing is read in tokens, samples."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel() if "input_ids" in batch else len(next(iter(batch.values())))


def _tokens(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Refuse batches that hold nothing, or what the model does not know, before any work. Errors: FormatError."""
    if not batches:
        got, want, fix = "no batch", "at least one", "give more data"
        raise FormatError("there is nothing to calibrate on", where="batches", got=got, want=want, fix=fix)
    for i, batch in enumerate(batches):
        may_read(model, batch)
        if "input_ids" not in batch:
            continue
        kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().any(1)
        if not bool(kept.all()):
            where, got, fix = f"batch {i}, sample {int(kept.int().argmin())}", "padding alone", "leave out empty texts"
            raise FormatError("a sequence has no token", where=where, got=got, want="at least one token", fix=fix)


class _Writer:
    """Walks the model and writes one file a stage, then the index."""

    def __init__(self, model: nn.Module, place: Path, outputs: Mapping[str, OutputSums], units: int) -> None:
        self.model, self.place, self.outputs, self.units = model, place, outputs, units
        self.groups: list[tuple[str, ...]] = []
        self.files: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.tokens = 0

    def walk(self, batches: Sequence[Batch], progress: Progress) -> None:
        self.seen = {} if self.outputs else _counts(self.model, batches)
        self._lookups(batches)
        walker = Walker(self.model, batches)
        with progress.bar("evidence", len(walker.blocks) + 1) as step:
            for i in range(len(walker.blocks)):
                edges = Edges()
                walker.step(i, edges)
                self._write(f"block-{i:04d}.safetensors", edges)
                release()
                step(1)
            edges = Edges()
            for _ in walker.finish(edges):
                pass
            self._write("output.safetensors", edges)
            step(1)
        self._unused()
        known = {"tokens": self.tokens, "units": self.units, "counts": self.counts}
        index = {"groups": self.groups, "files": self.files, **known}
        write_json(self.place / "index.json", index)

    def _weight(self, name: str) -> Tensor:
        """Mean over units of the squared output gradient of each row, over the module that is a Linear; ones without gradients."""
        rows = places(self.model)[name]
        squares = [self.outputs[p].squares for p in rows.modules if p in self.outputs]
        found = next((s for s in squares if s is not None), None)
        size = expression(self.model, rows).shape[0]
        if self.outputs:
            return (found / self.units).float() if found is not None else torch.zeros(size)
        return torch.ones(size)

    def _write(self, file: str, edges: Edges) -> None:
        out: dict[str, Tensor] = {}
        for edge, sums in edges.sums.items():
            self.tokens = max(self.tokens, sums.tokens)
            self.counts[edge] = sums.tokens
            out |= {f"{edge}:{k}": t for k, t in _means(edge, sums).items()}
        for name, edge in edges.of.items():
            out[f"{name}:weight"] = finite(self._weight(name), f"{name}.output gradient")
            self.files[f"{name}:edge"] = edge
            if name in self.files:
                out |= read_tensors(self.place / self.files[name])
            self.files[name] = file
        self.groups = [g for g in self.groups if not set(g) & set(edges.of)] + edges.groups()
        write_tensors(self.place / file, out)

    def _lookups(self, batches: Sequence[Batch]) -> None:
        """Embeddings: how often each row is looked up, and the Gram of the gradient at its output (identity without gradients)."""
        for name, place in places(self.model).items():
            if place.kind != "embedding":
                continue
            sums = next(
                (self.outputs[p] for p in place.modules if p in self.outputs and self.outputs[p].counts is not None),
                None,
            )
            rows, width = expression(self.model, place).shape
            counts = sums.counts if sums is not None and sums.counts is not None else torch.zeros(rows).double()
            if sums is None and not self.outputs:
                counts = sum((self.seen[p] for p in place.modules if p in self.seen), torch.zeros(rows).double())
            gram = sums.gram if sums is not None and sums.gram is not None else torch.eye(width).double()
            seen = counts.sum().clamp(min=1)
            weight = (counts / seen).float()
            per_unit = (gram / self.units).float() if self.outputs else gram.float()
            file = f"lookup-{len(self.groups):04d}.safetensors"
            self.files[name] = file
            self.groups.append((name,))
            out = {f"{name}:rows.gram": finite(per_unit, f"{name}.output gradient"), f"{name}:rows.weight": weight}
            write_tensors(self.place / file, out)

    def _unused(self) -> None:
        """Sites that no data reached: zero evidence, so that nothing is claimed of them."""
        for i, name in enumerate(n for n in places(self.model) if n not in self.files):
            m, n = expression(self.model, places(self.model)[name]).shape
            file = f"unused-{i:04d}.safetensors"
            self.files |= {name: file, f"{name}:edge": name}
            self.counts[name] = 0
            self.groups.append((name,))
            zero = torch.zeros(n)
            out = {
                f"{name}:gram": torch.zeros(n, n),
                f"{name}:mean": zero,
                f"{name}:mean_abs": zero.clone(),
                f"{name}:most": zero.clone(),
                f"{name}:weight": torch.zeros(m),
            }
            write_tensors(self.place / file, out)


def _counts(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """How often each row of each embedding is looked up, one sequence at a time, its padding left out."""
    made: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def see(module: nn.Embedding, args: tuple[Tensor, ...]) -> None:
            seen = torch.bincount(args[0].flatten(), minlength=module.num_embeddings).cpu().double()
            made[path] = made.get(path, 0) + seen

        return see

    hooks = [m.register_forward_pre_hook(hook(p)) for p, m in model.named_modules() if isinstance(m, nn.Embedding)]
    with torch.no_grad():
        for b in batches:
            for i in range(len(next(iter(b.values())))):
                forward(model, trim({k: v[i : i + 1] for k, v in b.items()}))
    for h in hooks:
        h.remove()
    return made


def _means(edge: str, sums: InputSums) -> dict[str, Tensor]:
    count = max(1, sums.tokens)
    made = {
        "gram": sums.gram / count,
        "mean": sums.total / count,
        "mean_abs": sums.total_abs / count,
        "most": sums.most,
    }
    return {k: finite(t, f"{edge}.{k}").float() for k, t in made.items()}
