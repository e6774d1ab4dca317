"""What a tuned model has beside its base, as a folder: what its two kinds share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.error import ChangedError, ConflictError, FormatError, WeftError, raise_all
from weft.store.files import must_be_text
from weft.store.load import find, names_a_base
from weft.store.save import FORMAT, travelling
from weft.store.swap import MANIFEST, digest, inside, read_manifest

KIND = "delta"
COPY = "copy the delta again"


@dataclass(frozen=True)
class Delta:
    """A delta's folder, its manifest read."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def lossless(self) -> bool:
        """Whether it holds differences to the bit, of which no terms can be made."""
        return "tensors" in self.manifest

    @property
    def base(self) -> Mapping[str, str]:
        """Where the base was, and its seal."""
        return self.manifest["base"]

    def must_be_of(self, known: Mapping[str, str]) -> None:
        """Refuse another base than this one, of which `path` and `seal` are known. Errors: ChangedError."""
        if known.get("seal") != self.base["seal"]:
            nothing = "a model whose pretrained weights are in no file"
            got = f"{known.get('seal', 'no seal')} ({known['path']})" if known else nothing
            want = f"{self.base['seal']} ({Path(self.base['path']).name})"
            what, fix = "the delta was made for another base", "take its own base, or what was made of that"
            raise ChangedError(what, where=str(self.folder), got=got, want=want, fix=fix)


def opened(where: str | Path) -> Delta:
    """A delta from a folder or a hub id. Errors: PathError; FormatError for what is none, or of a newer weft."""
    folder = find(where)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() and inside(folder, folder / MANIFEST) else {}
    base, kind = manifest.get("base"), manifest.get("kind", f"no {MANIFEST}")
    if kind != KIND or manifest.get("format") != FORMAT or not names_a_base(base) or "seal" not in (base or ()):
        got = kind if kind != KIND else f"format {manifest.get('format')}, base {base}"
        want, fix = f"a delta of format {FORMAT}", "weft diff BASE TUNED --out DELTA makes one"
        raise FormatError("this is no delta", where=str(folder), got=got, want=want, fix=fix)
    return Delta(folder, manifest)


def is_delta(where: str | Path) -> bool:
    """Whether a folder says that it is a delta."""
    must_be_text(Path(where))
    return (Path(where) / MANIFEST).is_file() and read_manifest(Path(where)).get("kind") == KIND


def must_lie_apart(out: Path, *read: Path) -> None:
    """Refuse to write where what is read lies: a delta is worth nothing without its base. Errors: ConflictError."""
    place = out.resolve()
    for path in (p.resolve() for p in read):
        if place.is_relative_to(path) or path.is_relative_to(place):
            what, want = "the output and what it is made from lie in one another", "a folder of its own"
            raise ConflictError(what, where=str(place), got=str(path), want=want, fix="choose another folder")


def beside(delta: Delta) -> dict[str, Path]:
    """The files of a delta that go into the model's folder. Errors: ChangedError for what its manifest knows otherwise; FormatError."""
    found = _files(delta.folder, delta.lossless)
    problems: list[WeftError] = []
    for name, path in found.items():
        want = delta.manifest["files"].get(name, {}).get("blake2b", "a file that its manifest lists")
        if not inside(delta.folder, path):
            what, fix = "a file of the delta lies elsewhere", "do not use this delta"
            problems.append(FormatError(what, where=name, got="a link out of the folder", want="a file", fix=fix))
        elif (now := digest(path)["blake2b"]) != want:
            problems.append(ChangedError("a file is not what was written", where=name, got=now, want=want, fix=COPY))
    raise_all(problems)
    return found


def differing(old: Path, new: Path, *, config: bool) -> dict[str, Path]:
    """The files besides weights in which a tuned model's folder differs from its base's; the configuration too, if it is asked for."""
    was = _files(old, config)
    return {n: p for n, p in _files(new, config).items() if n not in was or was[n].read_bytes() != p.read_bytes()}


def _files(folder: Path, config: bool) -> dict[str, Path]:
    path = folder / "config.json"
    return {**travelling(folder), **({path.name: path} if config and path.is_file() else {})}


def card(manifest: Mapping[str, Any]) -> str:
    """The card of a delta's folder."""
    name = Path(manifest["base"]["path"]).name
    what = "to the bit" if "tensors" in manifest else f"in {manifest['bytes']:,} bytes"
    lines = ["---", "library_name: weft", "tags: [weft, delta]", "---", "", f"# A delta of {manifest['class']}", ""]
    lines += [f"What a tuned model has beside `{name}`, {what}. Made with weft.", "", "```"]
    return "\n".join([*lines, "weft patch BASE FOLDER --out OUT", "```", ""])
