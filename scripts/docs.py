"""Write docs/methods.md from the methods and their proofs, and the tables of nodes and of PEFT's types in docs/files.md from their classes.

--check only says whether they are fresh."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import weft
from weft.engine import Method, get, names
from weft.engine.method import REWRITES
from weft.expr import NODES, Expr, Field, fields
from weft.lab.prove import KNOWN_ANSWERS
from weft.store.peft import KINDS
from weft.store.peft.layers import Layers

ROOT = Path(__file__).resolve().parent.parent
PAGE, FILES, PROOFS = ROOT / "docs" / "methods.md", ROOT / "docs" / "files.md", ROOT / "proofs"
TABLE = re.compile(r"(?<=<!-- nodes, by scripts/docs.py -->\n\n).*?(?=\n\n<!-- end of nodes -->)", re.DOTALL)
PEFT = re.compile(r"(?<=<!-- PEFT's types, by scripts/docs.py -->\n\n).*?(?=\n\n<!-- end of the types -->)", re.DOTALL)
HOUSE = ROOT / "docs" / "architecture.md"
SAMPLE = re.compile(r"(?<=<!-- a method, by scripts/docs.py -->\n\n).*?(?=\n\n<!-- end of the method -->)", re.DOTALL)
HEAD = """# Methods

Every file in `weft/methods/VERB/` is a method. This page is written from those files and from `proofs/` by
`python scripts/docs.py`; what is wrong here is wrong there. A verdict is what `weft prove NAME` found on the lab's
models: **reproduced**, **no detectable difference** or **contradicted**.
"""


def plain(text: str) -> str:
    """Text as Markdown that shows it literally; `code` stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_\[\]<>|#~^])", r"\\\1", p) for p in parts)


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def options(method: Method) -> str:
    """The options with their ranges and defaults."""
    fields: dict[str, Any] = method.options.model_json_schema().get("properties", {})
    if not fields:
        return "No options."
    rows = [["option", "default", "values", "meaning"]]
    for name, f in fields.items():
        default = f"`{json.dumps(f['default'])}`" if "default" in f else "needed"
        rows.append([f"`{name}`", default, values(f), plain(f.get("description", ""))])
    return table(rows)


def values(field: dict[str, Any]) -> str:
    """What an option may be."""
    if "anyOf" in field:
        return " or ".join("none" if f.get("type") == "null" else values(f) for f in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{json.dumps(v)}`" for v in field["enum"])
    low = f"{field['minimum']:g} ≤ " if "minimum" in field else ""
    low = f"{field['exclusiveMinimum']:g} < " if "exclusiveMinimum" in field else low
    high = f" ≤ {field['maximum']:g}" if "maximum" in field else ""
    high = f" < {field['exclusiveMaximum']:g}" if "exclusiveMaximum" in field else high
    kind = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text"}
    named = kind.get(field.get("type", ""), field.get("type", "any"))
    shape = f" like `{field['pattern']}`" if "pattern" in field else ""
    return f"{low}{named}{high}{shape}"


def facts(method: Method) -> str:
    """Kind, paper and needs in one line."""
    made = [method.kind]
    if method.paper:
        made.append(f"arXiv [{method.paper}](https://arxiv.org/abs/{method.paper})")
    if method.kind == "merge":
        made.append("needs the base" if "base" in method.needs else "needs no base")
        made.append(f"takes {method.members or 'any number of'} models")
    if "reference" in method.needs:
        made.append("reads the field `reference` of records")
    if needs := sorted(method.needs - {"base", "reference"}):
        made.append(f"needs calibration data ({', '.join(needs)})")
    made += [f"{option} {', '.join(sorted(a.values))} need calibration data ({a.need})" for option, a in method.asked()]
    if method.per == "input":
        made.append("solves the weights that read one input together")
    if method.on:
        made.append(f"goes to {'axes' if method.kind == 'transport' else 'sites'} of kind {', '.join(method.on)}")
    if method.taps:
        made.append("changes what weights read" + (", and every term of them with it" if method.whole else ""))
    elif method.kind == "recipe":
        made.append(f"steps: {', '.join(method.uses)}")
    elif method.kind in REWRITES:
        made.append("folds every term of a weight" if method.whole else "rewrites the base term, leaves adapters")
    return "; ".join(made) + "."


def held(name: str) -> dict[str, Any]:
    """What a file of proof says; empty if there is none. One of other code than today's says so."""
    path = PROOFS / f"{name}.json"
    if not path.exists():
        return {}
    made = json.loads(path.read_text("utf8"))
    old = " (of earlier code)" if name in json.loads((PROOFS / "untried.json").read_text("utf8")) else ""
    return made | {"verdict": made["verdict"] + old}


def proof(method: Method) -> str:
    """The claims and their verdicts."""
    return "\n\n".join(
        tried(name, of.claim, of.paper if name != method.name else "") for name, of in method.proofs.items()
    )


def tried(name: str, claim: str, paper: str) -> str:
    """A claim and what came out."""
    found, of = (
        held(name),
        f" of {name.partition('.')[2]} (arXiv [{paper}](https://arxiv.org/abs/{paper}))" if paper else "",
    )
    if not found:
        return f"Claim{of}: {plain(claim)}. Not tried yet."
    each = "; ".join(f"{m['model']}: {m['verdict']}" for m in found.get("models", []) if "verdict" in m)
    return f"Claim{of}: {plain(claim)}. Verdict: **{found['verdict']}**" + (f" ({each})." if each else ".")


def verdicts(method: Method) -> list[str]:
    """The verdicts of its proofs, and the last day."""
    found = {name: held(name) for name in method.proofs}
    words = [
        (f"{name.partition('.')[2]}: " if "." in name else "") + f.get("verdict", "not tried")
        for name, f in found.items()
    ]
    return ["; ".join(words), max(f.get("date", "") for f in found.values())]


def known() -> list[str]:
    """What is known of the lab models."""
    path = PROOFS / KNOWN_ANSWERS
    if not path.exists():
        return []
    held = json.loads(path.read_text("utf8"))
    models = [m["model"] for m in next(iter(held.values()))["models"]]
    rows = [["known answer", "guards", *models]]
    rows += [[plain(c["claim"]), c["verb"], *(m["verdict"] for m in c["models"])] for c in held.values()]
    about = (
        "Orderings that the field agrees on, tried on the lab's models (`weft prove --known`). A model on which one comes out the "
        "other way is left out of claims of that verb."
    )
    return ["## Known answers", about, table(rows)]


def section(method: Method) -> str:
    """One method."""
    parts = [f"### {method.name}", plain(module_line(method)), facts(method)]
    parts += [plain(" ".join(p.split())) for p in method.doc.split("\n\n")]
    return "\n\n".join(p for p in [*parts, options(method), proof(method)] if p)


def page() -> str:
    """The whole page."""
    every = sorted((get(n) for n in names()), key=lambda m: (m.verb, m.name))
    rows = [["method", "verb", "what it does", "verdict", "tried"]]
    rows += [[f"[{m.name}](#{m.name})", m.verb, plain(module_line(m)), *verdicts(m)] for m in every]
    parts = [HEAD.strip(), table(rows), *known()]
    for verb, group in groupby(every, key=lambda m: m.verb):
        about = importlib.import_module(f"weft.methods.{verb}").__doc__ or ""
        parts += [f"## {verb}", plain(about.strip()), *(section(m) for m in group)]
    return "\n\n".join(parts) + "\n"


def node(cls: type[Expr]) -> list[str]:
    """One node's row: its fields by kind, and the first paragraph of its docstring."""
    held = {k: [of(f) for f in fields(cls) if f.kind in k] for k in (("tensor",), ("static",), ("child", "children"))}
    about = (inspect.getdoc(cls) or "").split("\n\n")[0]
    return [f"`{cls.__name__}`", *(", ".join(each) for each in held.values()), plain(" ".join(about.split()))]


def of(f: Field) -> str:
    """A field as the table shows it."""
    if f.kind == "tensor":
        kinds = "float" if "float32" in f.type.dtypes else " or ".join(f.type.dtypes)
        return f"`{f.name}` [{' '.join(f.dims)}] {kinds}"
    return f"`{f.name}`" + (f": {'by name' if f.named else 'a list'}" if f.kind == "children" else "")


def files() -> str:
    """The page of the file format, with the nodes as they are."""
    rows = [["node", "tensors", "plain fields", "children", "what it is"], *(node(NODES[n]) for n in sorted(NODES))]
    made, count = TABLE.subn(lambda _: table(rows), FILES.read_text("utf8"))
    assert count == 1, "docs/files.md has lost its marks around the nodes"
    made, count = PEFT.subn(
        lambda _: table([["`peft_type`", "weft's", "what it is", "refused, or otherwise"], *types()]), made
    )
    assert count == 1, "docs/files.md has lost its marks around PEFT's types"
    return made


def types() -> list[list[str]]:
    """PEFT's types of adapters that go out and in."""
    first = {name: (inspect.getdoc(type(kind)) or "").split("\n\n")[0] for name, kind in KINDS.items()}
    lost = {
        n: "not on GPT-2's transposed weights" for n, k in KINDS.items() if isinstance(k, Layers) and not k.transposed
    }
    notes = {n: "; ".join(text for text in (k.note, lost.get(n, "")) if text) for n, k in KINDS.items()}
    return [[f"`{n}`", f"`{k.method}`", plain(" ".join(first[n].split())), plain(notes[n])] for n, k in KINDS.items()]


def house() -> str:
    """The page of the architecture, with one method's file as it is."""
    text = (ROOT / "weft" / "methods" / "prune" / "wanda.py").read_text("utf8")
    made, count = SAMPLE.subn(lambda _: f"```python\n{text}```", HOUSE.read_text("utf8"))
    assert count == 1, "docs/architecture.md has lost its marks around the method"
    return made


def module_line(method: Method) -> str:
    """The first line of the method's file."""
    return (importlib.import_module(method.fn.__module__).__doc__ or "").strip().splitlines()[0]


def main() -> int:
    """Write the pages, or compare them."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--check", action="store_true", help="fail if a page is stale, write nothing")
    asked = given.parse_args()
    if Path(weft.__file__).parent.parent != ROOT:
        sys.exit(f"this checkout is not the weft that Python imports ({weft.__file__}): set PYTHONPATH=.")
    made = {PAGE: page(), FILES: files(), HOUSE: house()}
    if asked.check:
        stale = [path for path, text in made.items() if not path.exists() or path.read_text("utf8") != text]
        for path in stale:
            print(f"docs/{path.name} is stale: run python scripts/docs.py")
        return int(bool(stale))
    for path, text in made.items():
        same = path.exists() and path.read_text("utf8") == text
        path.write_text(text, "utf8")
        print(f"docs/{path.name}: {'unchanged' if same else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
