"""Small skills to tune: sums, sorting, dates, renaming, naming a function, telling packages apart, other wordings. No downloads."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache

from weft.lab import corpora
from weft.learn.data import Example, Response

COUNT = 8000
"""Different items of a task that is made from random numbers."""
LARGEST = {"test": 400, "select": 200}
"""Of these sets no more is kept, so that scoring stays short."""
ORIGINS = ("numpy", "scipy", "torch", "transformers", "accelerate", "sympy", "pydantic", "huggingface_hub")
"""Packages that snippets are told apart by: what weft needs installs all of them, and `python` is not tested on any."""
SNIPPET = 8
"""Lines of a snippet."""


@dataclass(frozen=True)
class Item:
    """A prompt and its one right answer. `key`: what is asked, in one form; items that tell each other's answer share it."""

    key: str
    prompt: str
    answer: str
    reference: str = ""
    """What the prompt says in reference words, of a task with several wordings."""


@dataclass(frozen=True)
class Parts:
    """Four sets with no key in common."""

    calibration: list[Example]
    train: list[Example]
    select: list[Example]
    test: list[Example]


def names() -> list[str]:
    """Every task of this file."""
    return list(_MAKERS)


@cache
def items(name: str) -> tuple[Item, ...]:
    """All items of the task."""
    return tuple(_MAKERS[name]())


@cache
def parts(name: str) -> Parts:
    """The task's items, the same each time, dealt by a hash of their keys: 20 % each to test and to calibrate on, 10 % to choose by."""
    made: dict[str, dict[str, Example]] = {"calibration": {}, "train": {}, "select": {}, "test": {}}
    for item in items(name):
        held = made[part(item.key)]
        if len(held) < LARGEST.get(part(item.key), COUNT):
            held.setdefault(item.prompt, Response(item.prompt, item.answer, name, reference=item.reference))
    return Parts(**{k: list(v.values()) for k, v in made.items()})


def part(key: str) -> str:
    """The set that all items of this key are in."""
    at = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 10
    return "test" if at < 2 else "select" if at < 3 else "calibration" if at < 5 else "train"


def _random(name: str, make: Callable[[random.Random], Item]) -> Iterator[Item]:
    """`COUNT` items from one stream of random numbers, no prompt twice."""
    rng, seen = random.Random(name), set[str]()  # noqa: S311
    while len(seen) < COUNT:
        item = make(rng)
        if item.prompt not in seen:
            seen.add(item.prompt)
            yield item


def _arithmetic(rng: random.Random) -> Item:
    """A sum or a difference of numbers of one to three digits. The key is the sum a + b that it states, a ≤ b."""
    low, high = sorted(rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
    if rng.random() < 0.5:
        a, b = rng.sample((low, high), 2)
        return Item(f"{low} + {high}", f"{a} + {b} =", f" {a + b}")
    a, b = sorted((low, high - low))
    return Item(f"{a} + {b}", f"{high} - {low} =", f" {high - low}")


def _sorting(rng: random.Random) -> Item:
    """Three to five numbers below a hundred, or words, in order. The key is the answer."""
    count = rng.randint(3, 5)
    numbers = rng.random() < 0.5
    given = [str(n) for n in rng.sample(range(100), count)] if numbers else rng.sample(_WORDS, count)
    made = " ".join(sorted(given, key=int) if numbers else sorted(given))
    return Item(made, f"sort {' '.join(given)} =>", f" {made}")


def _dates(rng: random.Random) -> Item:
    """The weekday of a date, or a date some days later, between 1990 and 2029."""
    day = date(1990, 1, 1) + timedelta(rng.randrange(14610))
    if rng.random() < 0.5:
        return Item(f"{day}", f"weekday of {day} =", f" {_WEEKDAYS[day.weekday()]}")
    later = rng.randint(1, 60)
    return Item(f"{day} + {later}", f"{day} + {later} days =", f" {day + timedelta(later)}")


def _edits(rng: random.Random) -> Item:
    """A small function with one variable renamed. The key is the function with its names numbered in order."""
    name, a, b, c, new = rng.sample(_WORDS, 5)
    steps = [
        f"    {c} = {a} {rng.choice(_SIGNS)} {b}",
        *(
            f"    {rng.choice((a, b, c))} {rng.choice(_SIGNS)}= {rng.choice((a, b, str(rng.randint(2, 9))))}"
            for _ in range(rng.randint(0, 2))
        ),
        f"    return {c} {rng.choice(_SIGNS)} {rng.choice((a, b))}",
    ]
    text = "\n".join([f"def {name}({a}, {b}):", *steps])
    old = rng.choice((a, b, c))
    order: dict[str, int] = {}
    key = re.sub(r"[a-z]+", lambda w: w[0] if w[0] in _KEPT else f"v{order.setdefault(w[0], len(order))}", text)
    return Item(key, f"# rename {old} to {new}\n{text}\n# renamed\n", re.sub(rf"\b{old}\b", new, text))


def _wordings(rng: random.Random) -> Item:
    """Words turned round, sorted, or the first or last of them, asked for in one of several wordings. The key is what is asked of which.

    Each set has wordings of its own; those to calibrate on are the references.
    """
    given, what = rng.sample(_WORDS, rng.randint(3, 5)), rng.choice(("reverse", "sort", "first", "last"))
    made = {"reverse": given[::-1], "sort": sorted(given), "first": given[:1], "last": given[-1:]}[what]
    said = {"what": what, "words": " ".join(given)}
    key = f"{what} {said['words']}"
    prompt = rng.choice(_WORDINGS[part(key)]).format(**said)
    return Item(key, prompt, f" {' '.join(made)}", _WORDINGS["calibration"][0].format(**said))


def _naming() -> Iterator[Item]:
    """A function's name from the first words of its docstring; tested on packages that nothing was learnt from."""
    for packages, count, tested in ((corpora.TRAIN, 2400, False), (corpora.HELD_OUT, 1500, True)):
        for pair in corpora.docstring_pairs(packages, count):
            key = " ".join(re.findall(r"\w+", pair.query.lower()))
            found = re.match(r"\s*def (\w+)", pair.positive)
            if found and (part(key) == "test") == tested:
                yield Item(key, f'"""{pair.query}"""\ndef', f" {found[1]}")


def _origin() -> Iterator[Item]:
    """Which package a few lines of source are from, without comments and lines that name one. A file stays whole: it is the key."""
    named = re.compile("|".join(ORIGINS))
    held = [list(_snippets(package, named)) for package in ORIGINS]
    seen: set[str] = set()
    for items in zip(*held, strict=False):  # as many of each package
        for item in items:
            plain = " ".join(item.prompt.split())
            if plain not in seen:
                seen.add(plain)
                yield item


def _snippets(package: str, named: re.Pattern[str]) -> Iterator[Item]:
    for text in corpora.python_source([package], 600_000):
        lines = [line for line in text.text.splitlines() if _says(line, named)]
        for i in range(0, len(lines) - SNIPPET + 1, SNIPPET):
            said = "\n".join(lines[i : i + SNIPPET])
            yield Item(text.name, f"{said}\n# package:", f" {package}")


def _says(line: str, named: re.Pattern[str]) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#") and not named.search(line.lower())


_WORDINGS = {
    "calibration": ("{what} {words} =>",),
    "train": (
        "please {what}: {words}\n",
        "{words}\n{what} =",
        "# {what} of these words\n{words}\n",
        "task: {what}; input: {words}; output:",
        '{what}("{words}") ==',
        "words = {words}\nprint({what}) #",
        "the {what} of {words} is",
        "given {words}, the {what} is",
    ),
    "select": ("<{what}> {words} </{what}>", "Q: {what} {words}?\nA:"),
    "test": (
        "{words} | {what} |",
        "could you {what} the words {words}?\n",
        "[{what}]\n{words}\n->",
        "{what}: {words};",
    ),
}
_SIGNS = ("+", "-", "*")
_KEPT = ("def", "return")
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_NOUNS = """
apple bridge cloud door eagle farm glass house island jacket kettle lemon moon needle ocean paper queen river stone table
uncle valley window yellow zebra anchor bread candle dinner engine feather garden hammer insect jungle king ladder mirror
night orange pencil quarter rabbit silver tiger umbrella village winter year zero
"""
_WORDS = _NOUNS.split()
_MAKERS: dict[str, Callable[[], Iterable[Item]]] = {
    "arithmetic": lambda: _random("arithmetic", _arithmetic),
    "sorting": lambda: _random("sorting", _sorting),
    "dates": lambda: _random("dates", _dates),
    "edits": lambda: _random("edits", _edits),
    "wordings": lambda: _random("wordings", _wordings),
    "naming": _naming,
    "origin": _origin,
}
