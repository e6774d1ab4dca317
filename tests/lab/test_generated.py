"""Tasks that are made: right answers by another way, keys that tell what items share, the same items each time."""

from __future__ import annotations

import ast
import calendar
import operator
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from weft.fitting.data import resolve
from weft.lab import corpora, generated, tasks
from weft.learn.data import Response, fingerprint
from weft.score import examples

SYNTHETIC = ["arithmetic", "sorting", "dates", "edits"]
PRINTS = {
    "arithmetic": "f8de33-4ce359-b797aa-068c7d",
    "sorting": "d9a49f-4fc334-244148-8f50c8",
    "dates": "51a894-48f75c-1a7a8e-6adc1c",
    "edits": "6444ec-811884-4a74e2-807530",
}


def sets(task: tasks.Task) -> dict[str, list[Any]]:
    """The four sets by name."""
    return {k: getattr(task, k) for k in ("calibration", "train", "select", "test")}


def check_arithmetic(prompt: str, answer: str) -> None:
    a, sign, b, equals = prompt.split()
    assert equals == "=" and max(int(a), int(b)) < 1000
    assert int(answer) == {"+": operator.add, "-": operator.sub}[sign](int(a), int(b)) >= 0


def check_sorting(prompt: str, answer: str) -> None:
    given, made = prompt.split()[1:-1], answer.split()
    values = [int(x) for x in made] if made[0].isdigit() else made
    assert sorted(given) == sorted(made) and 3 <= len(made) <= 5
    assert all(a < b for a, b in pairwise(values))  # type: ignore[operator]


def days(text: str) -> int:
    """Days since the year 1, counted by months."""
    year, month, day = map(int, text.split("-"))
    whole = 365 * (year - 1) + calendar.leapdays(1, year)
    return whole + sum(calendar.monthrange(year, m)[1] for m in range(1, month)) + day


def check_dates(prompt: str, answer: str) -> None:
    if found := re.fullmatch(r"weekday of (\S+) =", prompt):
        assert answer.strip() == calendar.day_name[(days(found[1]) - 1) % 7]  # the first day of the year 1 is a Monday
    else:
        found = re.fullmatch(r"(\S+) \+ (\d+) days =", prompt)
        assert found and days(answer.strip()) - days(found[1]) == int(found[2])


class _Rename(ast.NodeTransformer):
    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.new if node.id == self.old else node.id, node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(self.new if node.arg == self.old else node.arg)


def check_edits(prompt: str, answer: str) -> None:
    head, body = prompt.split("\n", 1)
    _, _, old, _, new = head.split()
    before = ast.parse(body)
    names = {n.id for n in ast.walk(before) if isinstance(n, ast.Name)}
    assert old in names and new not in names and body.endswith("# renamed\n")
    assert ast.dump(_Rename(old, new).visit(before)) == ast.dump(ast.parse(answer))


CHECKS: dict[str, Callable[[str, str], None]] = {
    "arithmetic": check_arithmetic,
    "sorting": check_sorting,
    "dates": check_dates,
    "edits": check_edits,
}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_answers_are_right_by_another_way(name: str) -> None:
    """Integers, order, days counted by months, the renamed tree."""
    for item in generated.items(name):
        CHECKS[name](item.prompt, item.answer)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_the_same_items_wherever_they_are_made(name: str) -> None:
    """Their hash is this one, on every machine; no prompt comes twice."""
    task = tasks.task(name)
    assert "-".join(fingerprint(part)[:6] for part in sets(task).values()) == PRINTS[name]
    assert len({i.prompt for i in generated.items(name)}) == len(generated.items(name)) == generated.COUNT


@pytest.mark.parametrize("name", generated.names())
def test_what_tells_an_answer_is_in_one_set(name: str) -> None:
    """The set that holds an item is that of its key; sizes are near their shares, and each set is of use."""
    keys = {i.prompt: i.key for i in generated.items(name)}
    held = sets(tasks.task(name))
    found = {part: {keys[e.prompt] for e in examples} for part, examples in held.items()}
    assert all(generated.part(k) == part for part, ks in found.items() for k in ks)
    assert sum(map(len, found.values())) == len(set().union(*found.values()))
    assert len(held["train"]) > 500 and len(held["calibration"]) > 200
    assert len(held["select"]) >= 100 and len(held["test"]) >= 100


def test_every_form_of_one_sum_shares_a_key() -> None:
    """a + b, b + a, c - a and c - b state the same fact; each fact has one key, and many come in more than one form."""
    keys: dict[tuple[int, ...], set[str]] = {}
    forms: dict[tuple[int, ...], int] = {}
    for i in generated.items("arithmetic"):
        numbers = tuple(sorted(map(int, re.findall(r"\d+", i.prompt + i.answer))))
        keys.setdefault(numbers, set()).add(i.key)
        forms[numbers] = forms.get(numbers, 0) + 1
    assert all(len(k) == 1 for k in keys.values()) and len(set().union(*keys.values())) == len(keys)
    assert sum(n > 2 for n in forms.values()) > 50


def test_other_orders_and_other_names_share_a_key() -> None:
    """Lists of the same things; functions that differ in names alone."""
    by: dict[str, set[str]] = {}
    for i in generated.items("sorting"):
        by.setdefault(i.key, set()).add(" ".join(sorted(i.prompt.split())))
    assert all(len(lists) == 1 for lists in by.values())
    shapes: dict[str, set[str]] = {}
    for i in generated.items("edits"):
        tree = ast.parse(i.prompt)
        order: dict[str, str] = {}
        for node in ast.walk(tree):
            for field in ("id", "arg", "name"):
                if isinstance(got := getattr(node, field, None), str):
                    setattr(node, field, order.setdefault(got, f"n{len(order)}"))
        shapes.setdefault(i.key, set()).add(ast.dump(tree))
    assert all(len(s) == 1 for s in shapes.values())
    assert len(set().union(*shapes.values())) == len(shapes) < len(generated.items("edits"))


def test_names_and_origins_are_true() -> None:
    """A name is of a function with that docstring; test names are from held-out packages; a snippet names no package."""
    naming = {k: {(e.prompt, e.response.strip()) for e in v} for k, v in sets(tasks.task("naming")).items()}
    for packages, part in ((corpora.TRAIN, "train"), (corpora.HELD_OUT, "test")):
        known = {(f'"""{p.query}"""\ndef', n) for p in corpora.docstring_pairs(packages, 300) for n in _defined(p)}
        assert len(naming[part] & known) > 20
    task = tasks.task("origin")
    assert {e.response.strip() for e in task.test if isinstance(e, Response)} == set(generated.ORIGINS)
    assert not set(generated.ORIGINS) & set(corpora.HELD_OUT)
    for e in (*task.train, *task.test):
        assert isinstance(e, Response) and e.prompt.endswith("\n# package:")
        assert not any(o in e.prompt.removesuffix("\n# package:").lower() for o in generated.ORIGINS)


def _defined(pair: Any) -> list[str]:
    return re.findall(r"^\s*def (\w+)", pair.positive)


def test_wordings_ask_for_one_thing_in_words_of_their_own() -> None:
    """Every answer follows from the reference; no set has a wording of another, and the references are one wording."""
    task, seen = tasks.task("wordings"), dict[str, set[str]]()
    for part, examples_ in sets(task).items():
        for e in examples_:
            what, *given = e.reference.removesuffix(" =>").split()
            want = {"sort": sorted(given), "reverse": given[::-1], "first": given[:1], "last": given[-1:]}[what]
            assert e.response.split() == want and all(w in e.prompt for w in (what, *given))
            plain = e.prompt.replace(" ".join(given), "{words}").replace(what, "{what}")
            seen.setdefault(part, set()).add(plain)
            assert part != "calibration" or e.prompt == e.reference
    assert [len(seen[p]) for p in ("calibration", "train", "select", "test")] == [1, 8, 2, 4]
    assert len(set().union(*seen.values())) == 15


def test_another_seed_turns_the_order_of_what_is_learnt_from() -> None:
    """As for every task: the sets stay, and what is chosen by and tested on does not move."""
    zero, one = tasks.task("dates"), tasks.task("dates", seed=1)
    assert zero.select == one.select and zero.test == one.test and zero.train != one.train
    assert set(zero.train) == set(one.train)


def test_they_are_data_wherever_a_name_is() -> None:
    """For fit as responses with four sets; for train and eval by their part."""
    data, task = resolve("sorting", embeds=False, seed=0), tasks.task("sorting")
    assert data.kind == "response" and data.metric == ("bits per byte of the response", "bits/byte")
    assert (data.train, data.select, data.test) == (task.train, task.select, task.test)
    assert examples("sorting", "test") == task.test and examples("sorting", "train") == task.train
