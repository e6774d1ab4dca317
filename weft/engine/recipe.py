"""Recipes: a file that lists rewrites, safe to take from a stranger.

    weft: 1
    steps:
      - sparsegpt: {sparsity: 0.5}
        at: "*.mlp.*"
      - gptq: {bits: 4, group: 64}

The file is YAML, or JSON if its name ends in `.json`. `weft` is the version of this format. Steps run in order; each names
one method that rewrites weights, changes the coordinates of axes, adds a branch or takes blocks out, with its options, and may say
`at` which: a glob, a list of globs, or (of sites) `all-linear`. Names are looked up among weft's methods: nothing in a recipe is
imported, evaluated or taken for a regular expression.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.engine.registry import get
from weft.engine.run import Step, chain_key
from weft.error import FormatError, OptionError, WeftError, raise_all
from weft.store.yaml import read_yaml

VERSION = 1
KINDS = ("rewrite", "transport", "branch", "cut")
"""The kinds of method that change a model in one step."""
MAX_ITEMS = 100
"""Steps of a recipe, and globs of a step."""
MAX_GLOB, MAX_STARS = 512, 32

At = tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """Rewrites in order, each with the globs of its sites; None: the sites that the method goes to by default."""

    steps: tuple[tuple[Step, At | None], ...]

    def fingerprint(self) -> str:
        """Hash of the steps, their sites, all their options and their methods' files, 32 hex digits."""
        held = [[chain_key((step,)), at] for step, at in self.steps]
        return hashlib.blake2b(json.dumps(held).encode(), digest_size=16).hexdigest()


def read(path: Path) -> Recipe:
    """The recipe in a file. Errors: PathError; FormatError, OptionError with every problem found."""
    return parse(read_yaml(path), path.name)


def parse(value: Any, where: str) -> Recipe:
    """The recipe that a parsed file stands for. Errors: FormatError, OptionError with every problem found."""
    if not isinstance(value, dict):
        raise FormatError(
            "a recipe is no table",
            where=where,
            got=_shown(value),
            want="weft and steps",
            fix=f"begin with weft: {VERSION}",
        )
    problems: list[WeftError] = []
    if unknown := sorted(set(value) - {"weft", "steps"}):
        fix = "remove them, or take a newer weft"
        problems.append(FormatError("a recipe has unknown keys", where=where, got=unknown, want="weft, steps", fix=fix))
    version = value.get("weft")
    if type(version) is not int or version != VERSION:
        got = _shown(version)
        want, fix = f"weft: {VERSION}", "write the version that the recipe is for; a newer one needs a newer weft"
        problems.append(FormatError("unknown version of recipes", where=where, got=got, want=want, fix=fix))
    items = value.get("steps")
    if not isinstance(items, list) or not 0 < len(items) <= MAX_ITEMS:
        got, want = _shown(items), f"a list of 1 to {MAX_ITEMS} steps"
        fix = "write it like steps: [{rtn: {bits: 4}}]"
        problems.append(FormatError("a recipe has no list of steps", where=where, got=got, want=want, fix=fix))
        items = []
    steps = [_step(item, f"{where}, step {i}", problems) for i, item in enumerate(items, 1)]
    raise_all(problems)
    return Recipe(tuple(s for s in steps if s is not None))


def _step(item: Any, where: str, problems: list[WeftError]) -> tuple[Step, At | None] | None:
    """One step, or None and its problems."""
    names = [k for k in item if k != "at"] if isinstance(item, dict) else []
    if len(names) != 1 or not names[0]:
        got, want = _shown(item), "one METHOD: {OPTION: VALUE}, and at: GLOB where it is not for all"
        fix = "write it like - rtn: {bits: 4}"
        problems.append(FormatError("a step is not one method", where=where, got=got, want=want, fix=fix))
        return None
    at = _globs(item["at"], f"{where}: at", problems) if "at" in item else None
    step = _bound(names[0], item[names[0]], where, problems)
    return None if step is None else (step, at)


def _bound(name: str, options: Any, where: str, problems: list[WeftError]) -> Step | None:
    """The method with all its options, as the method itself checks them."""
    try:
        method = get(name)
        if method.kind not in KINDS:
            want, fix = "a rewrite, a transport, a branch or a cut", "weft methods shows kinds"
            raise OptionError("this method does not change a model", where=name, got=method.kind, want=want, fix=fix)
        if not isinstance(options, dict | None):
            want, fix = "{OPTION: VALUE}", f"{name}: {{}} takes every default"
            raise OptionError("options are no table", where=name, got=_shown(options), want=want, fix=fix)
        return Step(name, tuple(method.bind(options or {}).items()))
    except OptionError as e:
        problems.append(OptionError(e.what, where=f"{where}: {e.where}", got=e.got, want=e.want, fix=e.fix))
        return None


def _globs(value: Any, where: str, problems: list[WeftError]) -> At | None:
    """The globs of `at`, short enough to match at once."""
    globs: Any = [value] if isinstance(value, str) else value
    if not isinstance(globs, list) or not 0 < len(globs) <= MAX_ITEMS:
        got, want = _shown(globs), f"a glob, or a list of 1 to {MAX_ITEMS}"
        problems.append(OptionError("at names no sites", where=where, got=got, want=want, fix="leave at out for all"))
        return None
    want = f"1 to {MAX_GLOB} characters, at most {MAX_STARS} of them *"
    for glob in globs:
        if not isinstance(glob, str) or not 0 < len(glob) <= MAX_GLOB or glob.count("*") > MAX_STARS:
            fix = "write a glob such as *.mlp.*"
            problems.append(OptionError("this is no glob of sites", where=where, got=_shown(glob), want=want, fix=fix))
    return tuple(globs)


def _shown(value: Any) -> object:
    """What to tell of something that is not what it should be."""
    return f"a list of {len(value)}" if isinstance(value, list) else "nothing" if value in (None, "") else value
