"""Methods: found by their files, strict about options, named by their content."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import weft
from weft.catalog import files
from weft.engine import get, names
from weft.engine.method import METHODS
from weft.engine.run import Step, chain_key, code_version
from weft.error import OptionError

ROOT = Path(weft.__file__).parent / "methods"


def test_methods_are_the_files() -> None:
    """Every file that is not private is a method, and nothing else is."""
    assert names() == sorted(p.stem for p in ROOT.glob("*/*.py") if not p.name.startswith("_"))
    assert len(names()) == len(set(names())) >= 10


@pytest.mark.parametrize("name", names())
def test_a_method_is_what_its_file_says(name: str) -> None:
    """Named as the file, in the folder's verb, with a first line and described options that all have a default."""
    m = get(name)
    assert m.name == name and m.verb == files()[name].parent.name and m.doc.splitlines()[0].strip()
    assert METHODS[name] is m is get(name)
    schema = m.options.model_json_schema()["properties"]
    assert all("default" in o and o.get("description") for o in schema.values())
    assert m.bind({}).keys() == schema.keys()


@pytest.mark.parametrize("name", ["", "absent", "RTN", "quantize.rtn", "../error", "rtn ", "_rtn", "__init__"])
def test_an_unknown_method_is_an_option_error(name: str) -> None:
    """The error lists those that exist, and nothing is imported."""
    with pytest.raises(OptionError) as e:
        get(name)
    assert "rtn" in str(e.value.want) and e.value.exit_code == 2


def test_two_methods_of_one_name_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """Wherever the second one lies."""
    from weft import catalog

    for verb in ("a", "b"):
        (tmp_path / verb).mkdir()
        (tmp_path / verb / "same.py").write_text("")
    monkeypatch.setattr(catalog, "ROOT", tmp_path)
    with pytest.raises(OptionError):
        files.__wrapped__()


def test_listing_imports_no_method() -> None:
    """Names cost no import."""
    code = "import sys; from weft.engine import names; names(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "weft.engine.registry" in loaded and not any(m.startswith("weft.methods.") for m in loaded)


BAD: list[tuple[str, dict[str, Any], list[str]]] = [
    ("rtn", {"bit": 4}, ["bit"]),
    ("rtn", {"bits": "4"}, ["bits"]),
    ("rtn", {"bits": 4.0}, ["bits"]),
    ("rtn", {"bits": True}, ["bits"]),
    ("rtn", {"bits": 1}, ["bits"]),
    ("rtn", {"bits": 9}, ["bits"]),
    ("rtn", {"bits": None}, ["bits"]),
    ("rtn", {"symmetric": 1}, ["symmetric"]),
    ("rtn", {"group": -1}, ["group"]),
    ("gptq", {"damp": 0}, ["damp"]),
    ("gptq", {"damp": float("nan")}, ["damp"]),
    ("gptq", {"damp": float("inf")}, ["damp"]),
    ("magnitude", {"pattern": "3:4"}, ["pattern"]),
    ("magnitude", {"sparsity": 1.0}, ["sparsity"]),
    ("lora", {"name": "a b"}, ["name"]),
    ("lora", {"name": ""}, ["name"]),
    ("rtn", {"bits": 99, "group": -1, "speed": 1}, ["bits", "group", "speed"]),
]


@pytest.mark.parametrize(("name", "options", "bad"), BAD)
def test_options_are_strict(name: str, options: dict[str, Any], bad: list[str]) -> None:
    """Unknown, ill-typed and out-of-range options are refused, all at once, each by name."""
    with pytest.raises(OptionError) as e:
        Step.of(name, **options)
    assert all(b in str(e.value.where) and b in str(e.value.got) and b in str(e.value.want) for b in bad)


@pytest.mark.parametrize(
    ("step", "want"),
    [
        (("rtn", {}), "rtn()"),
        (("rtn", {"bits": 3}), "rtn(bits=3)"),
        (("rtn", {"symmetric": False, "bits": 3}), "rtn(bits=3, symmetric=False)"),
        (("rtn", {"bits": 4}), "rtn()"),
        (("uniform", {}), "uniform()"),
    ],
)
def test_a_step_describes_itself(step: tuple[str, dict[str, Any]], want: str) -> None:
    """The options that differ from the defaults, in the method's order."""
    assert Step.of(step[0], **step[1]).describe() == want


def test_steps_with_the_same_options_are_one() -> None:
    """Given or left to the default, in any order."""
    a, b = Step.of("rtn", bits=4, group=32), Step.of("rtn", group=32)
    assert a == b and hash(a) == hash(b) and dict(a.options) == {"bits": 4, "group": 32, "symmetric": True}
    assert chain_key((a,)) == chain_key((b,))


def test_chain_keys_differ_where_results_may() -> None:
    """In an option, the method, the order and the number of steps."""
    chains = [(), ("rtn",), ("nf4",), ("rtn", "nf4"), ("nf4", "rtn"), ("rtn", "rtn")]
    keys = [chain_key(tuple(Step.of(m) for m in c)) for c in chains] + [chain_key((Step.of("rtn", bits=3),))]
    assert len(set(keys)) == len(keys)


def test_keys_are_the_same_in_another_process() -> None:
    """Under another hash seed."""
    code = (
        "from weft.engine.run import Step, chain_key, code_version\n"
        "print(chain_key((Step.of('rtn', bits=3), Step.of('lora', rank=2))), code_version())"
    )
    env = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT.parent.parent)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    ).stdout.split()
    assert out == [chain_key((Step.of("rtn", bits=3), Step.of("lora", rank=2))), code_version()]


def test_an_edited_method_has_another_fingerprint(tmp_path: Path, monkeypatch: Any) -> None:
    """Its results are not those of the old code."""
    copy = tmp_path / "rtn.py"
    copy.write_bytes(files()["rtn"].read_bytes())
    monkeypatch.setattr("inspect.getfile", lambda _: str(copy))
    first = chain_key((Step.of("rtn"),))
    copy.write_text(copy.read_text() + "# edited\n")
    assert chain_key((Step.of("rtn"),)) != first


def test_words_and_claims_leave_a_fingerprint_as_it_is(tmp_path: Path, monkeypatch: Any) -> None:
    """Results do not depend on docstrings, on the papers that are named, or on what is claimed of them."""
    copy, text = tmp_path / "wanda.py", files()["wanda"].read_text()
    copy.write_text(text)
    monkeypatch.setattr("inspect.getfile", lambda _: str(copy))
    first, doc = METHODS["wanda"].fingerprint(), get("wanda").doc.splitlines()[0]
    assert text.count(doc) == 1 and 'paper="' in text
    claim = '\n\n@wanda.claim("Another.", paper="none")\ndef another(lab):\n    return lab.compare()\n'
    for said in (
        text.replace(doc, "Other words."),
        re.sub(r'paper="[^"]*"', 'paper="1706.03762"', text, count=1),
        text + claim,
    ):
        assert said != text
        copy.write_text(said)
        assert METHODS["wanda"].fingerprint() == first


@pytest.mark.parametrize("name", names())
def test_options_survive_json(name: str) -> None:
    """A step written to a manifest is the step that is read."""
    step = Step.of(name)
    assert Step.of(name, **json.loads(json.dumps(dict(step.options)))) == step
