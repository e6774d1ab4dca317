"""Try the claims of methods on the lab models and keep what came out, whatever it is, in a folder of proofs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from weft.engine import Method, get
from weft.engine import names as method_names
from weft.engine.run import code_version
from weft.error import OptionError
from weft.lab import known
from weft.lab.claims import SEEDS, Claim, Lab, installed
from weft.lab.realism import Specimen, card
from weft.lab.specimens import of, specimens
from weft.lab.trial import Subject
from weft.model import fingerprint
from weft.progress import Progress, Silent
from weft.store.cache import Cache, default, key
from weft.store.files import read_json, write_json

PROOFS = Path("proofs")
REALISM = "realism.json"
KNOWN_ANSWERS = "known.json"


def prove(
    names: Sequence[str],
    *,
    folder: str | Path = PROOFS,
    seeds: int = SEEDS,
    cache: Cache | None = None,
    progress: Progress | None = None,
    models: Sequence[str] | None = None,
    subjects: Sequence[Subject] | None = None,
) -> dict[str, Claim]:
    """Try these methods' claims, or single ones (`lora.dora`); write `folder`/NAME.json for each, and the lab models' realism cards.

    A lab model on which a known answer of the method's verb came out the other way (`folder`/known.json) is left out, and the file
    says so. Files depend on the code and the lab models alone, but for the date and the seconds. A killed run resumes from the cache.
    `models`: for a first look, some of the lab's; nothing is written then. `subjects`: models of one's own instead.
    Errors: OptionError for methods without a claim, fewer than three seeds, and unknown models; ConflictError if no model is left.
    """
    claimed, folder = _claimed(names), Path(folder)
    lab = Lab(installed(models) if subjects is None else subjects, cache=cache, seeds=seeds)
    if models is None:
        realism([of(trials[0]) for trials in lab.trials.values()], folder=folder, cache=cache)
    held = read_json(folder / KNOWN_ANSWERS) if (folder / KNOWN_ANSWERS).exists() else {}
    made: dict[str, Claim] = {}
    with (progress or Silent()).bar("prove", len(claimed)) as step:
        for name, m in claimed.items():
            left_out = known.failed(held, m.verb)
            made[name] = m.proofs[name].tried(lab.without(left_out, name))
            if models is None:
                write_json(folder / f"{name}.json", _file(m, name, made[name], left_out))
            step(1)
    return made


def _file(m: Method, name: str, claim: Claim, left_out: dict[str, list[str]]) -> dict[str, Any]:
    """What a file of proof says."""
    of = m.proofs[name]
    head = {"method": m.name, "claim": of.claim, "paper": of.paper, "date": today(), "fingerprint": m.fingerprint()}
    return head | claim.as_json() | ({"left_out": left_out} if left_out else {})


def answer(
    *,
    folder: str | Path = PROOFS,
    seeds: int = SEEDS,
    cache: Cache | None = None,
    progress: Progress | None = None,
    subjects: Sequence[Subject] | None = None,
) -> dict[str, Claim]:
    """Try every known answer on every lab model; write `folder`/known.json. Errors: OptionError for fewer than three seeds."""
    lab = Lab(subjects, cache=cache, seeds=seeds)
    made: dict[str, Claim] = {}
    with (progress or Silent()).bar("known answers", len(known.KNOWN)) as step:
        for name, one in known.KNOWN.items():
            made[name] = one.tried(lab)
            step(1)
    about = {n: {"verb": known.KNOWN[n].verb, "claim": known.KNOWN[n].text, "date": today()} for n in made}
    write_json(Path(folder) / KNOWN_ANSWERS, {n: about[n] | c.as_json() for n, c in made.items()})
    return made


def realism(
    given: Iterable[Specimen] | None = None,
    *,
    folder: str | Path | None = PROOFS,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """The realism cards of these lab models, written to `folder`/realism.json beside those of others; if not given of all.

    Models that have to be made first take minutes each. Without a folder nothing is written.
    """
    held, made = cache or Cache(default()), dict[str, dict[str, Any]]()
    code = [code_version("lab", "lab/made", "learn"), *(get(n).fingerprint() for n in ("rtn", "gptq"))]
    for s in specimens(progress=progress) if given is None else given:
        name = key("realism", fingerprint(s.model), s.name, code)
        made[s.name] = held.json("realism", name, lambda s=s: card(s))
    if folder is not None:
        path = Path(folder) / REALISM
        write_json(path, dict(sorted({**(read_json(path) if path.exists() else {}), **made}.items())))
    return made


def today() -> str:
    """The date, as proofs hold it."""
    return date.today().isoformat()


def stale(folder: str | Path = PROOFS) -> dict[str, str]:
    """Claims without a proof that holds today, and why: none, or a file changed, the method's or one's that took part.

    Errors: OptionError for methods without a claim; FormatError for a proof that is not JSON.
    """
    found = {name: _changed(m, name, Path(folder) / f"{name}.json") for name, m in _claimed(method_names()).items()}
    return {name: why for name, why in found.items() if why}


def _changed(m: Method, name: str, path: Path) -> str:
    if not path.exists():
        return "no proof"
    held, known_ = read_json(path), set(method_names())
    if held["claim"] != m.proofs[name].claim:
        return "another claim"
    now = {n: get(n).fingerprint() if n in known_ else "" for n in {**held["methods"], m.name: ""}}
    changed = [n for n, f in {**held["methods"], m.name: held["fingerprint"]}.items() if now[n] != f]
    return f"changed: {', '.join(sorted(changed))}" if changed else ""


def _claimed(names: Sequence[str]) -> dict[str, Method]:
    """The method of every claim that is asked for: all of a method's, or one by its name."""
    asked = {name: get(name.partition(".")[0]) for name in names}
    bare = [name for name, m in asked.items() if not m.proofs or ("." in name and name not in m.proofs)]
    if bare:
        raise OptionError(
            "every method has a claim that can be tried",
            where=", ".join(bare),
            got="no such claim",
            want="a function (lab) -> Claim under @NAME.claim",
            fix="add one to the method's file",
        )
    return {name: m for word, m in asked.items() for name in ([word] if "." in word else m.proofs)}
