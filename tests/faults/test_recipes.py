"""Recipes of strangers: every fault is one WeftError that says everything, quickly, and runs nothing."""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import weft.engine.recipe as module
from weft.engine.recipe import Recipe, parse, read
from weft.engine.run import Step
from weft.error import FormatError, OptionError, PathError, WeftError
from weft.model import match, weave
from weft.store.yaml import MAX_BYTES, MAX_DEPTH, MAX_NUMBER, MAX_VALUES, parse_yaml, read_yaml

EXAMPLES = sorted((Path(__file__).parents[2] / "recipes").iterdir())
GOOD = 'weft: 1\nsteps:\n  - sparsegpt: {sparsity: 0.5}\n    at: "*.mlp.*"\n  - gptq: {bits: 4, group: 64}\n'
Refused = Callable[..., WeftError]


def told(e: WeftError) -> WeftError:
    """All five fields are filled, and the text shows each."""
    assert all(isinstance(x, str) and x for x in (e.what, e.fix)) and all(str(x) for x in (e.where, e.got, e.want))
    assert all(f"\n  {k}" in str(e) for k in ("where", "got", "want", "fix"))
    return e


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of change."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Reads a file of this content; returns the error of that class, after a look at its fields, the folder and the time."""
    folder = tmp_path / "from-a-stranger"
    folder.mkdir()

    def of(
        content: str | bytes, kind: type[WeftError], name: str = "r.yaml", by: Callable[[Path], Any] = read
    ) -> WeftError:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        before, start = contents(folder), time.process_time()
        with pytest.raises(WeftError) as e:
            by(folder / name)
        assert type(e.value) is kind and contents(folder) == before and time.process_time() - start < 3
        return told(e.value)

    return of


def step(text: str) -> str:
    """A recipe of this one step."""
    return f"weft: 1\nsteps:\n  - {text}\n"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_example_reads(path: Path) -> None:
    """The recipes that weft ships, and what they fill in is what Python fills in."""
    recipe = read(path)
    assert recipe.steps and all(s == Step.of(s.method, **dict(s.options)) for s, _ in recipe.steps)
    assert path.suffix == ".yaml" and len(EXAMPLES) >= 3


def test_a_recipe_is_its_steps(tmp_path: Path) -> None:
    """In order, with all options; the same from JSON, and from other spellings of the same."""
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "a.json").write_text(
        '{"weft": 1, "steps": [{"sparsegpt": {"sparsity": 0.5}, "at": ["*.mlp.*"]}, {"gptq": {"group": 64}}]}'
    )
    made = read(tmp_path / "a.yaml")
    assert made.steps == ((Step.of("sparsegpt", sparsity=0.5), ("*.mlp.*",)), (Step.of("gptq", bits=4, group=64), None))
    assert read(tmp_path / "a.json") == made
    assert parse({"weft": 1, "steps": [{"eora": None}]}, "r").steps == ((Step.of("eora"), None),)


def test_a_fingerprint_tells_recipes_apart() -> None:
    """Defaults written out change nothing; an option, the sites, the order and the number of steps do."""

    def of(*steps: dict[str, Any]) -> str:
        return parse({"weft": 1, "steps": list(steps)}, "r").fingerprint()

    one, two = {"gptq": {"bits": 3}, "at": "*.mlp.*"}, {"rtn": {}}
    assert of(one) == of({"gptq": {"group": 64, "bits": 3}, "at": ["*.mlp.*"]})
    others = [of(one), of(two), of(one, two), of(two, one), of({**one, "at": "*"}), of({"gptq": {"bits": 3}})]
    assert len({*others, of({**one, "gptq": {"bits": 4}})}) == 7 and all(len(f) == 32 for f in others)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("weft: 1\nweft: 1\nsteps: [{rtn: {}}]\n", 2),
        ("weft: 1\nsteps: [{rtn: {}}]\nsteps: []\n", 3),
        ("weft: 1\nsteps:\n  - gptq: {bits: 8, bits: 2}\n", 3),
        ("weft: 1\nsteps:\n  - gptq: {bits: 8}\n    'gptq': {bits: 2}\n", 4),
        ('weft: 1\nsteps:\n  - rtn: {}\n    at: "*"\n    "\\x61t": b\n', 5),
    ],
)
def test_f09_a_key_that_comes_twice_is_refused(text: str, line: int, refused: Refused) -> None:
    """At any depth and in any spelling, with the line of the second."""
    e = refused(text, FormatError)
    assert str(e.where).startswith(f"r.yaml line {line}, column ") and "again" in str(e.got)


def test_f09_a_json_key_that_comes_twice_is_refused(refused: Refused) -> None:
    """A recipe in JSON is no way around."""
    refused('{"weft": 1, "steps": [{"gptq": {"bits": 8, "bits": 2}}]}', FormatError, "r.json")


class Longest(nn.Module):
    """One layer whose site has a name of 512 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("a" * 505, nn.Linear(2, 2))


HOSTILE = [
    "*a*a*a*a*a*a*a*a*a*a*a*a*a*b",
    "*a" * 31 + "*b",
    "*?" * 31 + "*b",
    "*" + "a" * 255 + "b*" + "a" * 254,
    "*[ab]" * 31 + "c",
    "[" * 512,
    "*[" * 32,
    "(a+)+$",
    "(a|a)*" * 32 + "b",
]


@pytest.mark.parametrize("glob", HOSTILE, ids=range(len(HOSTILE)))
def test_f24_a_hostile_glob_does_not_hang(glob: str) -> None:
    """Whatever a recipe may hold, against a name of 512 characters: matched at once, and never as a regular expression."""
    recipe = parse({"weft": 1, "steps": [{"rtn": {}, "at": glob}]}, "r")
    model, start = weave(Longest()), time.process_time()
    with pytest.raises(OptionError) as e:
        match(model, recipe.steps[0][1] or ())
    assert told(e.value).got == glob and time.process_time() - start < 0.5
    assert match(model, "*a*a*a*a*a*a*a*a*a*a*a*a*a*a") == ["a" * 505 + ".weight"]


@pytest.mark.parametrize(
    "at",
    [
        "''", "[]", "[[]]", "null", "7", "{a: b}", "['*', 8]", "['*', '']", "x" * 513, "'" + "*a" * 33 + "'",
        "[a" + ",a" * 100 + "]",
    ],
)  # fmt: skip
def test_f24_globs_have_limits(at: str, refused: Refused) -> None:
    """Texts of 1 to 512 characters with at most 32 stars, at most 100 of them."""
    assert str(refused(step(f"rtn: {{}}\n    at: {at}"), OptionError).where) == "r.yaml, step 1: at"


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("gptq", "bits", "9"), ("gptq", "bits", "0"), ("gptq", "bits", "-4"), ("gptq", "bits", '"8"'),
        ("gptq", "bits", "4.5"), ("gptq", "bits", "true"), ("gptq", "bits", "null"), ("gptq", "bits", "[4]"),
        ("gptq", "bits", "0xffffffffffffffff"), ("gptq", "bits", "1e999"), ("gptq", "group", "-1"),
        ("gptq", "symmetric", "yes"), ("gptq", "symmetric", "1"), ("gptq", "damp", "0.0"), ("eora", "rank", "0"),
        ("eora", "rank", "4097"), ("eora", "rank", '"8"'), ("sparsegpt", "sparsity", "1.0"),
        ("sparsegpt", "sparsity", "50"), ("sparsegpt", "sparsity", "50%"), ("sparsegpt", "sparsity", "-0.1"),
        ("sparsegpt", "pattern", "3:4"), ("sparsegpt", "pattern", "2:4:8"), ("lora", "name", "../x"),
        ("gptq", "bitz", "4"), ("gptq", "method", "rtn"), ("gptq", "self", "1"), ("gptq", "cls", "1"),
    ],
)  # fmt: skip
def test_f28_an_option_out_of_range_is_refused(method: str, option: str, value: str, refused: Refused) -> None:
    """By the method's own bounds, naming step and option; text is no number."""
    e = refused(step(f"{method}: {{{option}: {value}}}"), FormatError if value == "1e999" else OptionError)
    assert value == "1e999" or str(e.where) == f"r.yaml, step 1: {method}: {option}"


def test_f28_endless_and_huge_json_numbers_are_refused(refused: Refused) -> None:
    """JSON's own ways to a number that is none."""
    for value in ("1e999", "-1e999", "NaN", "Infinity", "9" * 5000):
        refused(f'{{"weft": 1, "steps": [{{"sparsegpt": {{"sparsity": {value}}}}}]}}', FormatError, "r.json")
    for value in ("1e99", "9" * 4000):
        refused(f'{{"weft": 1, "steps": [{{"sparsegpt": {{"sparsity": {value}}}}}]}}', OptionError, "r.json")


def test_all_problems_of_a_recipe_come_together(refused: Refused) -> None:
    """Top level, methods, options and sites in one error."""
    text = "weft: 2\nextra: 1\nsteps:\n- gptq: {bits: 9}\n  at: ['']\n- nothing: {}\n- {}\n- rtn: {}\n- uniform: {}\n"
    e = refused(text, FormatError)
    assert e.what.startswith("7 problems") and "step 4" not in e.what
    assert all(
        s in e.what for s in ("extra", "version", "1: gptq: bits", "1: at", "step 2", "step 3", "step 5: uniform")
    )


@pytest.mark.parametrize(
    "text",
    [
        "", "7", "[]", "weft", "steps: [{rtn: {}}]", "weft: 1", "weft: 1\nsteps:", "weft: 1\nsteps: []",
        "weft: 1\nsteps: {rtn: {}}", "weft: 2\nsteps: [{rtn: {}}]", "weft: true\nsteps: [{rtn: {}}]",
        "weft: 1.0\nsteps: [{rtn: {}}]", "weft: '1'\nsteps: [{rtn: {}}]", "weft: 1\nstep: []\nsteps: [{rtn: {}}]",
        "weft: 1\nsteps: [rtn]", "weft: 1\nsteps: [[rtn]]", "weft: 1\nsteps: [{at: '*'}]",
        "weft: 1\nsteps: [{rtn: {}, gptq: {}}]", "weft: 1\nsteps: [null]", "weft: 1\nsteps: ['']",
        "weft: 1\nsteps: [{'': {}}]", "weft: ''\nsteps: [{rtn: {}}]", "weft: 1\nsteps: [" + "{rtn: {}}," * 101 + "]",
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused(text: str, refused: Refused) -> None:
    """Unknown keys and versions, empty lists, steps that are not one method."""
    refused(text, FormatError)


@pytest.mark.parametrize("text", ["rtn: 4", "rtn: [4]", "rtn: bits", "rtn: ''", "rtn: 0", "uniform: {}"])
def test_a_step_is_a_rewrite_with_a_table_of_options(text: str, refused: Refused) -> None:
    """Not a search, and not a lone value."""
    refused(step(text), OptionError)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E3", 1e3), (".5", 0.5), ("5.", 5.0), ("-0.5e+2", -50.0), ("012", 12), ("+12", 12),
        ("-7", -7), ("0", 0), ("0o14", 12), ("0x1F", 31), ("0b1", "0b1"), ("1_000", "1_000"), ("0o8", "0o8"),
        ("12:30:00", "12:30:00"), ("1,5", "1,5"), ("on", "on"), ("yes", "yes"), ("no", "no"), ("off", "off"),
        ("y", "y"), ("On", "On"), ("true", True), ("FALSE", False), ("tRue", "tRue"), ("null", None), ("~", None),
        ("", None), ("nULL", "nULL"), ("'null'", "null"), ('"12"', "12"), ("'on'", "on"), ("2024-01-01", "2024-01-01"),
        ("=", "="), ("1.2.3", "1.2.3"), ("inf", "inf"), ("e5", "e5"), ("1 # one", 1), ("'a''b'", "a'b"),
        ('"\\u00fc\\n"', "ü\n"), ("|\n  \ta\n  b\n", "\ta\nb\n"), (">\n  a\n  b\n", "a b\n"),
        ("[1, [a, {b: 2}], ]", [1, ["a", {"b": 2}]]), ("٣", "٣"), ("１", "１"),
    ],
)  # fmt: skip
def test_f29_yaml_means_what_its_core_schema_says(text: str, value: Any) -> None:
    """Numbers, words and text, as YAML 1.2 reads them."""
    found = parse_yaml(f"k: {text}".encode(), "r")["k"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["on: yes", "yes: yes", "no: yes", "'1': yes", "%YAML 1.2\n---\non: yes\n...\n", "\ufeffon: yes"]
)
def test_f29_good_documents_are_read(text: str) -> None:
    """Words as keys, quoted numbers as keys, marks of a document, a byte order mark."""
    assert list(parse_yaml(text.encode(), "r").values()) == ["yes"]


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("a: 1\nb: 2\na: 3", 3, 1), ("a: &x 1\nb: 2", 1, 4), ("a: 1\nb: *x", 2, 4), ("&x a: 1", 1, 1),
        ("a: &x [1]\nb: *x", 1, 4), ("a: !x 1", 1, 4), ("a: !!str 1", 1, 4), ("a: ! 1", 1, 4), ("a: !<x> 1", 1, 4),
        ("!!map {a: 1}", 1, 1), ("a: !!binary aGk=", 1, 4), ("a: !!timestamp 2024-01-01", 1, 4),
        ("a: 1\n<<: {b: 1}", 2, 1), ("a:\n  <<: [{b: 1}]", 2, 3), ("a:\n\tb: 1", 2, 1), ("a:\n  - 1\n\t- 2", 3, 1),
        ("a:\tb", 1, 3), ("a: 1\n---\nb: 2", 2, 1), ("a: 1\n...\n---\nb: 2", 3, 1), ("1: a", 1, 1),
        ("a: {true: 1}", 1, 5), ("null: 1", 1, 1), (": 1", 1, 1), ("? [a]\n: 1", 1, 3), ("{[a]: 1}", 1, 2),
        ("a: .inf", 1, 4), ("a: -.INF", 1, 4), ("a: .nan", 1, 4), ("a: 1e999", 1, 4), ("a: " + "9" * 65, 1, 4),
        ("a: 0x" + "f" * 5_000, 1, 4), ("a: " + "9" * 5_000, 1, 4), ("%YAML 1.1\n---\na: 1", 1, 1),
        ("%YAML 2.0\n---\na: 1", 1, 1), ("%TAG ! tag:x,2000:\n---\na: 1", 1, 1), ("a: \x00", 1, 4),
        ("a\r\n: \x1b[31m", 2, 3), ("a: \u202eb", 1, 4), ("# \u200b", 1, 3), ("a: b\u2028c", 1, 5),
        ("a: b\x85c", 1, 5), ("a: \x7f", 1, 4), ("a: \ufeff", 1, 4), ("a: \uffff", 1, 4), ('a: "\\0"', 1, 4),
        ('a: "\\ud800"', 1, 4), ('a: "\\e[1m"', 1, 4), ('a: "\\UFFFFFFFF"', 1, 7), ('a: "\\U00110000"', 1, 7),
        ("a: [1, 2", 1, 9), ("a: 'b", 1, 6), ("a: b: c", 1, 5), ("a: {b: 1", 1, 9), ("a: @b", 1, 4), ("}", 1, 1),
        ("- " * 33, 1, 65), ("[" * 33, 1, 33), ("{a: " * 33, 1, 129),
    ],
)  # fmt: skip
def test_f29_what_yaml_could_mean_twice_is_refused(text: str, line: int, column: int, refused: Refused) -> None:
    """With line and column."""
    e = refused(text, FormatError, by=read_yaml)
    assert e.where == f"r.yaml line {line}, column {column}"


@pytest.mark.parametrize(
    ("raw", "column"),
    [(b"a: \xff", 4), (b"a: \xc3\xbc\xe2\x82", 5), (b"a: \xed\xa0\x80", 4), ("a: 1".encode("utf-16"), 1)],
)
def test_f29_bytes_that_are_no_utf8_are_refused(raw: bytes, column: int, refused: Refused) -> None:
    """By line and column, counted in characters."""
    assert refused(raw, FormatError, by=read_yaml).where == f"r.yaml line 1, column {column}"


def test_f29_limits_of_depth_and_size_are_what_they_say(refused: Refused) -> None:
    """The last that is read and the first that is not, of YAML and JSON."""
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_yaml(deep.encode(), "r")) == deep
    for name in ("r.yaml", "r.json"):
        refused(f"[{deep}]", FormatError, name, read_yaml)
        refused("[" * 50_000 + "]" * 50_000, FormatError, name, read_yaml)
        refused(" " * MAX_BYTES + "7", FormatError, name, read_yaml)
        refused("7" + " " * (10 * MAX_BYTES), FormatError, name, read_yaml)


def test_f29_limits_of_length_and_count_are_what_they_say(refused: Refused) -> None:
    """Of the file, a number, and all values."""
    longest = "x" * (MAX_BYTES - 2)
    assert parse_yaml(f"'{longest}'".encode(), "r") == longest
    assert parse_yaml(b"9" * MAX_NUMBER, "r") == 10**MAX_NUMBER - 1
    assert len(parse_yaml(b"- 1\n" * (MAX_VALUES - 1), "r")) == MAX_VALUES - 1
    assert refused("- 1\n" * MAX_VALUES, FormatError, by=read_yaml).where == f"r.yaml line {MAX_VALUES}, column 3"


@pytest.mark.parametrize(
    "text",
    [
        "[" * MAX_BYTES, "- " * (MAX_BYTES // 2), "? " * (MAX_BYTES // 2), "{a: " * (MAX_BYTES // 4),
        "[" + "[]," * (MAX_BYTES // 4), "- {a: 1}\n" * 100_000, "".join(" " * i + "a:\n" for i in range(1400)),
        "a: &a [1]\n" + "".join(f"b{i}: &b{i} [{'*a,' * 9}]\n" for i in range(999)),
    ],
    ids=range(8),
)  # fmt: skip
def test_f29_a_bomb_is_refused_quickly(text: str, refused: Refused) -> None:
    """Depth, count and aliases, a megabyte of each."""
    assert " line " in str(refused(text, FormatError, by=read_yaml).where)


def test_f29_scrambled_recipes_give_a_value_or_a_format_error() -> None:
    """Nothing else leaves the reader, whatever stands in the file."""
    rng, alphabet = random.Random(0), "{}[]:,-?*&!|>'\"%@`#<~=\\ \n\t0aexU\u2028é"
    refusals = 0
    for _ in range(300):
        text = list(GOOD)
        for _ in range(rng.randrange(1, 6)):
            i = rng.randrange(len(text))
            text[i : i + rng.randrange(3)] = rng.choices(alphabet, k=rng.randrange(3))
        try:
            parse(parse_yaml("".join(text).encode(), "r"), "r")
        except (FormatError, OptionError) as e:
            refusals += bool(told(e))
    assert refusals > 100


def test_f29_a_full_stack_is_a_format_error() -> None:
    """Whoever calls from deep down gets the one error, not Python's."""

    def down(n: int) -> Any:
        return down(n - 1) if n else parse_yaml(b"- " * 30 + b"a", "r")

    seen: set[type[BaseException]] = set()
    for n in range(600, 1000, 4):
        try:
            down(n)
        except (FormatError, RecursionError) as e:
            seen.add(type(e))
    assert FormatError in seen


def test_f29_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A folder, a pipe that would block, and nothing at all."""
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path, tmp_path / "pipe.yaml", tmp_path / "none.yaml", tmp_path / "none.json"):
        with pytest.raises(PathError) as e:
            read(path)
        told(e.value)


CODE = [
    "_component_: weft.methods.quantize.rtn.rtn", "_target_: os.system", "os.system: {}",
    "os.system: {command: touch ran}", "../x: {}", "/etc/passwd: {}", "../quantize/rtn: {}", "quantize.rtn: {}",
    "weft.methods.quantize.rtn: {}", "rtn.py: {}", "__init__: {}", "_rtn: {}", "calc(1+1): {}", "${env:HOME}: {}",
    "'{{ 7*7 }}': {}", "eval: {}", "__class__: {}", "RTN: {}", "'rtn ': {}", "lambda x: {}", "' ': {}",
    "rtn: {bits: calc(2+2)}", "rtn: {bits: '${oc.env:HOME}'}", "rtn: {bits: eval('4')}", "rtn: {__class__: x}",
    "rtn: {_component_: os.system}", "rtn: {bits: !!python/name:os.system }",
    "rtn: !!python/object/apply:os.system ['touch ran']", "rtn: {bits: !!python/object:x.Y {}}",
    "!!python/module:os : {}", "rtn: {bits: !!python/object/new:type [a, [], {}]}", "rtn: {bits: !calc 2+2}",
    "rtn: {bits: !include /etc/passwd}",
]  # fmt: skip


@pytest.mark.parametrize("text", CODE)
def test_f30_names_of_code_are_refused(
    text: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only registered methods: nothing else is imported, started or made."""
    imported: list[str] = []
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda n, *a: (imported.append(n), real(n, *a))[1])
    for where, name in ((os, "system"), (os, "popen"), (subprocess, "Popen")):
        monkeypatch.setattr(where, name, lambda *_, n=name, **__: pytest.fail(f"{n} was called"))
    monkeypatch.chdir(tmp_path)
    refused(step(text), FormatError if "!" in text else OptionError)
    assert set(imported) <= {"weft.methods.quantize.rtn"} and not (tmp_path / "ran").exists()


def test_f30_a_recipe_is_plain_data() -> None:
    """Frozen, of methods that exist, and the module has no way to code: the registry is its only door."""
    recipe = parse({"weft": 1, "steps": [{"rtn": {}}]}, "r")
    with pytest.raises(AttributeError):
        recipe.steps = ()  # type: ignore[misc]
    assert isinstance(recipe, Recipe) and not {"importlib", "subprocess", "re", "os"} & set(vars(module))
