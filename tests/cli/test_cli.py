"""The shell: help without torch, exit codes, JSON, errors without tracebacks."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import weft
from weft.catalog import entries
from weft.cli.app import build
from weft.engine import get

SRC = Path(weft.__file__).parent.parent


def weft_(*argv: str) -> Any:
    """The command line in this process."""
    return CliRunner().invoke(build(argv), list(argv), catch_exceptions=False)


def shell(code: str | None = None, *argv: str) -> subprocess.CompletedProcess[str]:
    """Another process: `python -m weft ARGV`, or some code."""
    what = ["-c", code] if code else ["-m", "weft", *argv]
    return subprocess.run([sys.executable, *what], capture_output=True, text=True, cwd=SRC, timeout=120)


@pytest.fixture
def model(tmp_path: Path, tiny: Callable[..., nn.Module], words: Any) -> Path:
    place = tmp_path / "model"
    tiny("llama-tied", dtype=torch.bfloat16).save_pretrained(place)
    words.save_pretrained(place)
    return place


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    place = tmp_path / "texts.jsonl"
    lines = ["the cat sat on the mat .", "a dog ran under the old tree .", "the red bird flew over a hill ."]
    rows = [{"text": " ".join(lines[(i + k) % 3] for k in range(4)) + " the" * i} for i in range(24)]
    place.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return place


HEAVY = ("torch", "transformers", "weft.engine", "weft.api", "numpy", "scipy", "safetensors", "rich.progress")


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["methods"], ["fit", "--help"], ["nonsense"], []])
def test_nothing_heavy_is_imported_before_a_command_needs_it(argv: Sequence[str]) -> None:
    code = (
        "import sys, time; begun = time.process_time()\n"
        f"sys.argv = ['weft', *{list(argv)!r}]\n"
        "from weft.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
        "print('SECONDS', time.process_time() - begun, file=sys.stderr)"
    )
    made = shell(code)
    assert "HEAVY []" in made.stderr, made.stderr
    assert float(made.stderr.split("SECONDS")[1]) < 0.5


def test_importing_weft_imports_nothing() -> None:
    code = "import sys, weft; print([m for m in sys.modules if m.startswith(('torch', 'pydantic', 'typer', 'weft.'))])"
    assert shell(code).stdout.strip() == "[]"


def test_help_lists_every_command_and_rewrite() -> None:
    said = weft_("--help").output
    core = ["fit", "show", "methods", "eval", "generate", "train", "merge", "export", "report", "prove"]
    core += ["verify", "cache", "attach", "adapters", "diff", "patch", "run", "realism"]
    for name in [
        *core,
        *(e.name for e in entries() if e.kind in ("rewrite", "branch", "cut", "recipe", "merge", "probe")),
    ]:
        assert re.search(rf"^\s+{name}\s", said, re.M), name


@pytest.mark.parametrize("command", ["fit", "eval", "train"])
def test_help_lists_every_lab_task(command: str) -> None:
    from weft.lab import tasks

    said = re.findall(r"[\w-]+", weft_(command, "--help").output)
    assert set(tasks.names()) <= set(said)


@pytest.mark.parametrize(
    "entry", [e for e in entries() if e.kind in ("rewrite", "branch", "cut", "recipe")], ids=lambda e: e.name
)
def test_every_option_of_every_method_is_on_its_command(entry: Any) -> None:
    from weft.engine import get

    made = weft_(entry.name, "--help")
    assert made.exit_code == 0
    for name in [*get(entry.name).options.model_fields, "at", "data", "out", "seed", "json"]:
        assert f"--{name.replace('_', '-')}" in made.output


def test_a_method_rewrites_saves_and_prints(model: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = [
        "gptq",
        str(model),
        "--bits",
        "3",
        "--group",
        "16",
        "--no-symmetric",
        "--at",
        "*.mlp.*",
        "--data",
        str(texts),
    ]
    made = weft_(*argv, "--tokens", "512", "--out", str(out), "--json")
    assert made.exit_code == 0
    rows = json.loads(made.stdout)
    assert (
        len(rows) == 6 and {r["after"] for r in rows} == {"int3[g16, asymmetric]"} and all(r["error"] > 0 for r in rows)
    )
    shown = json.loads(weft_("show", str(out), "--json").stdout)
    assert sum(r["expression"] == "int3[g16, asymmetric]" for r in shown) == 6
    assert weft_("verify", str(out)).output.strip() == "whole"
    again = weft_(*argv, "--out", str(out))
    assert again.exit_code == 4 and "exists already" in again.stderr
    table = weft_("magnitude", str(model), "--pattern", "2:4").stdout
    assert "2:4" in table and "not saved" in table
    assert weft_("rtn", str(model), "--group", "16", "--quiet", "--out", str(out), "--replace").output == ""


def test_blocks_are_taken_out_and_saved(model: Path, texts: Path, tmp_path: Path) -> None:
    """By the command and by a recipe, to the same model; a share of no whole block is a fallback, a block that is named a refusal."""
    out, recipe = tmp_path / "out", tmp_path / "r.yaml"
    how = ["--data", str(texts), "--tokens", "512"]
    made = weft_("depth", str(model), "--share", "0.5", *how, "--out", str(out), "--json")
    (row,) = json.loads(made.stdout)
    assert made.exit_code == 0 and row["after"] == "taken out" and row["before"].startswith("block of influence ")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1
    recipe.write_text("weft: 1\nsteps:\n  - depth: {share: 0.5}\n")
    assert weft_("run", str(recipe), str(model), *how, "--out", str(tmp_path / "again"), "--quiet").exit_code == 0
    files = [p / "model.safetensors" for p in (out, tmp_path / "again", model)]
    one, two, whole = (p.read_bytes() for p in files)
    assert one == two and len(one) < len(whole)
    none = weft_("depth", str(model), "--share", "0.1", *how)
    assert none.exit_code == 3 and "0 of 2 blocks go" in none.stderr
    assert weft_("depth", str(model), "--at", "model.layers.0").exit_code == 2


def test_usage_errors_are_2_and_say_what_is_possible(model: Path) -> None:
    assert weft_("gptqq", str(model)).exit_code == 2
    assert weft_("rtn").exit_code == 2
    assert weft_("rtn", str(model), "--nonsense").exit_code == 2
    assert weft_("magnitude", str(model), "--pattern", "3:4").exit_code == 2
    made = weft_("rtn", "no-such-model", "--bits", "9")
    assert made.exit_code == 2
    assert [line.split()[0] for line in made.stderr.splitlines()[1:5]] == ["where", "got", "want", "fix"]
    made = weft_("rtn", str(model), "--at", "*.nope")
    assert made.exit_code == 2 and "matches no site" in made.stderr


def test_bad_input_is_4_with_five_fields_and_no_traceback(tmp_path: Path) -> None:
    made = weft_("show", str(tmp_path / "nowhere"))
    assert made.exit_code == 4 and made.stdout == ""
    lines = made.stderr.splitlines()
    assert lines[0] == "error: no such model" and [x.split()[0] for x in lines[1:]] == ["where", "got", "want", "fix"]
    assert weft_("report", str(tmp_path)).exit_code == 4
    assert weft_("verify", str(tmp_path)).exit_code == 4


def test_every_other_exit_code(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.error import ResourceError

    def fail(error: BaseException) -> Any:
        def load(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr("weft.cli.commands.load", load)
        return weft_("show", str(model))

    assert fail(KeyboardInterrupt()).exit_code == 130
    assert "goes on" in fail(KeyboardInterrupt()).stderr
    assert fail(MemoryError()).exit_code == 5
    assert fail(OSError(28, "No space left on device", "x")).exit_code == 5
    assert fail(FileNotFoundError(2, "No such file", "x")).exit_code == 4
    assert fail(ResourceError("a", where="b", got="c", want="d", fix="e")).exit_code == 5
    bug = fail(ZeroDivisionError("oh"))
    assert bug.exit_code == 1 and "Traceback" not in bug.stderr and "bug in weft: ZeroDivisionError: oh" in bug.stderr
    made = weft_("--debug", "show", str(model))
    assert made.exit_code == 1 and "Traceback" in made.stderr


def test_train_eval_merge_export(model: Path, texts: Path, tmp_path: Path) -> None:
    small, tuned, whole = (str(tmp_path / n) for n in ("small", "tuned", "whole"))
    assert weft_("rtn", str(model), "--at", "all-linear", "--group", "16", "--out", small, "-q").exit_code == 0
    how = ["--rank", "2", "--steps", "6", "--batch", "2", "--length", "32", "--cache", str(tmp_path / "c")]
    made = weft_("train", small, "--data", str(texts), "--out", tuned, *how, "--json")
    assert made.exit_code == 0 and json.loads(made.stdout)[0]["steps"] == 6
    score = json.loads(weft_("eval", tuned, "--data", str(texts), "--limit", "6", "--json").stdout)[0]
    assert score["low"] <= score["mean"] <= score["high"] and score["documents"] == 6
    made = weft_("merge", tuned, "--to", "grid", "--out", whole, "--json")
    assert len(json.loads(made.stdout)) == 14
    assert weft_("merge", tuned, "--to", "nothing", "--out", str(tmp_path / "unmade")).exit_code == 2
    assert weft_("export", tuned, "--to", "peft", "--out", str(tmp_path / "p")).exit_code == 4
    peft = weft_("export", tuned, "--to", "peft", "--out", str(tmp_path / "p"), "--base", str(tmp_path / "b"))
    assert peft.exit_code == 0 and (tmp_path / "b" / "model.safetensors").exists()
    packed = weft_("export", whole, "--to", "compressed-tensors", "--out", str(tmp_path / "ct"))
    assert packed.exit_code == 0, packed.output
    said = weft_("generate", whole, "the cat", "--max-new-tokens", "4")
    assert said.exit_code == 0


def test_train_starts_anew_on_what_has_changed(model: Path, texts: Path, tmp_path: Path) -> None:
    """The same command gives the same bits, and others when its data or its model are others at the same place."""

    def trained(name: str) -> Any:
        how = [
            "--rank",
            "2",
            "--steps",
            "2",
            "--batch",
            "2",
            "--length",
            "32",
            "--cache",
            str(tmp_path / "cache"),
            "-q",
        ]
        assert weft_("train", str(model), "--data", str(texts), "--out", str(tmp_path / name), *how).exit_code == 0
        held = load_file(tmp_path / name / "weft.safetensors")
        return {k: v for k, v in held.items() if "adapter" in k}

    def same(a: Any, b: Any) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    first = trained("a")
    assert first and same(first, trained("b"))
    texts.write_text("".join(texts.read_text().splitlines(keepends=True)[:12]))
    second = trained("c")
    assert not same(first, second)
    weights = load_file(model / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    assert not same(second, trained("d"))


def test_train_takes_an_optimizer_with_its_options(model: Path, texts: Path, tmp_path: Path) -> None:
    """Beside the method's; one of the same name has its own name before it; a rewrite moves nothing."""
    how = [
        "--data",
        str(texts),
        "--steps",
        "2",
        "--batch",
        "2",
        "--length",
        "32",
        "--out",
        str(tmp_path / "tuned"),
        "--json",
    ]
    given = ["--rank", "2", "--optimizer", "galore", "--galore-rank", "3", "--every", "1"]
    made = weft_("train", str(model), *how, *given)
    assert made.exit_code == 0 and json.loads(made.stdout)[0]["steps"] == 2
    for bad, said in (
        (["--optimizer", "rtn"], "moves no tensors"),
        (["--optimizer", "muon", "--galore-rank", "3"], "galore-rank"),
    ):
        made = weft_("train", str(model), *how, "--replace", *bad)
        assert made.exit_code == 2 and said in made.output


def test_train_takes_a_schedule_with_its_options(model: Path, texts: Path, tmp_path: Path) -> None:
    """Beside those of the method and the optimizer; another kind, and a model without its terms, are refused."""
    how = [
        "--data",
        str(texts),
        "--steps",
        "4",
        "--batch",
        "2",
        "--length",
        "32",
        "--json",
        "--out",
        str(tmp_path / "t"),
    ]
    both = [
        "--optimizer",
        "galore",
        "--galore-rank",
        "3",
        "--every",
        "2",
        "--during",
        "spiel",
        "--spiel-every",
        "3",
        "--over",
        "1",
    ]
    made = weft_("train", str(model), *how, "--method", "sparse", "--rank", "1", *both)
    assert made.exit_code == 0 and json.loads(made.stdout)[0]["steps"] == 4
    for bad, said in (
        (["--method", "sparse", "--during", "rtn"], "rewrites nothing during training"),
        (["--method", "lora", "--during", "spiel"], "there is nothing to rewrite"),
    ):
        made = weft_("train", str(model), *how, "--replace", *bad)
        assert made.exit_code in (2, 4) and said in made.output


def test_train_takes_an_objective_and_what_trains_through_rounding(model: Path, texts: Path, tmp_path: Path) -> None:
    """With the options of both; the saved weights are ordinary packed ones. A teacher is a model; other kinds are refused."""
    how = [
        "--data",
        str(texts),
        "--steps",
        "3",
        "--batch",
        "2",
        "--length",
        "32",
        "--json",
        "--out",
        str(tmp_path / "t"),
    ]
    made = weft_(
        "train",
        str(model),
        *how,
        "--method",
        "lsq",
        "--bits",
        "3",
        "--group",
        "16",
        "--objective",
        "distill",
        "--labels",
        "0.5",
    )
    assert made.exit_code == 0 and json.loads(made.stdout)[0]["steps"] == 3
    rows = {r.name: r.expression for r in weft.show(weft.load(tmp_path / "t"))}
    assert rows["model.layers.0.mlp.up_proj.weight"] == "int3[g16]" and "soft" not in "".join(rows.values())
    made = weft_("train", str(model), *how, "--replace", "--objective", "distill", "--teacher", str(tmp_path / "t"))
    assert made.exit_code == 0 and json.loads(made.stdout)[0]["loss"] > 0
    for bad, said in (
        (["--objective", "muon"], "nothing to lower"),
        (["--teacher", str(model)], "nothing is learnt from a teacher"),
        (["--objective", "align"], "no example has a reference"),
    ):
        made = weft_("train", str(model), *how, "--replace", *bad)
        assert made.exit_code != 0 and said in made.output


def test_train_collects_what_a_start_has_to_know(model: Path, texts: Path, tmp_path: Path) -> None:
    """Evidence of the training data, for a start that asks for it and for no other."""
    for init, collected in (("pissa", False), ("eva", True)):
        cache = tmp_path / init
        how = [
            "--steps",
            "1",
            "--batch",
            "2",
            "--length",
            "32",
            "--cache",
            str(cache),
            "--out",
            str(tmp_path / f"o-{init}"),
        ]
        made = weft_("train", str(model), "--data", str(texts), "--rank", "2", "--init", init, *how, "-q")
        assert made.exit_code == 0, made.output
        assert (cache / "evidence").exists() == collected


@pytest.mark.parametrize("method", ["full", "layernorm", "ia3"])
def test_train_makes_trainable_what_is_asked_for(method: str, model: Path, texts: Path, tmp_path: Path) -> None:
    """The result differs from the original in just that; options of another method are refused."""
    given = (
        "train",
        str(model),
        "--data",
        str(texts),
        "--method",
        method,
        "--steps",
        "2",
        "--batch",
        "2",
        "--lr",
        "0.01",
    )
    assert weft_(*given, "--out", str(tmp_path / "out"), "-q").exit_code == 0
    (before, after) = (weft.load(p) for p in (model, tmp_path / "out"))
    changed = {
        n for n, e in weft.expressions(after).items() if not torch.equal(e.dense(), weft.expressions(before)[n].dense())
    }
    kinds = {"full": 15, "layernorm": 0, "ia3": 6}
    assert len(changed) == kinds[method]
    norms = [(p, after.get_parameter(n)) for n, p in before.named_parameters() if "norm" in n]
    assert all(torch.equal(a, b) == (method == "ia3") for a, b in norms) and len(norms) == 5
    assert weft_(*given, "--rank", "4", "--out", str(tmp_path / "no"), "-q").exit_code == 2


def test_a_probe_prints_a_table_or_json(model: Path, tmp_path: Path) -> None:
    """Of a compressed model, whose pretrained values are known; of the original it says that nothing was tuned."""
    assert weft_("rtn", str(model), "--bits", "2", "--out", str(tmp_path / "small"), "-q").exit_code == 0
    shown = weft_("intruder_dimensions", str(tmp_path / "small"), "--k", "4")
    rows = json.loads(weft_("intruder_dimensions", str(tmp_path / "small"), "--k", "4", "--json").stdout)
    assert shown.exit_code == 0 and rows["says"] in shown.stdout and all(n in shown.stdout for n in rows["sites"])
    assert len(rows["sites"]) == 14 and all(at["change"] > 0 for at in rows["sites"].values())
    for argv in (["--k", "0"], ["--epsilon", "2"]):
        assert weft_("intruder_dimensions", str(model), *argv).exit_code == 2
    assert "nothing was tuned" in weft_("intruder_dimensions", str(model)).stderr


def test_a_probe_reads_data(model: Path, texts: Path, tmp_path: Path) -> None:
    """Texts by the name of a file; the command of a probe that reads none has no such option."""
    small = str(tmp_path / "small")
    assert weft_("rtn", str(model), "--bits", "2", "--group", "16", "--out", small, "-q").exit_code == 0
    given = ["path_sharpness", small, "--points", "2", "--tokens", "256", "--data", str(texts), "--at", "*.mlp.*"]
    made = weft_(*given, "--json")
    rows = json.loads(made.stdout)
    assert made.exit_code == 0 and len(rows["sites"]) == 6
    assert all(set(at) == {"at 0", "at 1", "where", "most"} for at in rows["sites"].values())
    assert json.loads(weft_(*given, "--json").stdout) == rows and weft_(*given, "--tokens", "0").exit_code == 2
    assert weft_("intruder_dimensions", small, "--data", str(texts)).exit_code == 2


def test_both_modes_run_and_tell_their_bytes(model: Path, texts: Path, tmp_path: Path) -> None:
    small = str(tmp_path / "small")
    weft_("rtn", str(model), "--group", "16", "--out", small, "-q")
    rows, said = {}, {}
    for name in ("memory", "speed"):
        how = ["--data", str(texts), "--limit", "6", "--mode", name, "--json"]
        rows[name] = json.loads(weft_("eval", small, *how).stdout)[0]
        said[name] = weft_("generate", small, "the cat", "--max-new-tokens", "4", "--mode", name)
        assert rows[name]["mode"] == name and said[name].exit_code == 0
        assert re.search(rf"{name} mode: \d+ resident bytes", said[name].stderr) and "bytes" not in said[name].stdout
    assert rows["memory"]["resident_bytes"] < rows["speed"]["resident_bytes"]
    assert rows["memory"]["mean"] == pytest.approx(rows["speed"]["mean"], rel=1e-4)
    assert said["memory"].stdout == said["speed"].stdout
    assert weft_("generate", small, "the cat", "--mode", "fast").exit_code == 2


def test_recorded_fallbacks_are_3(model: Path, tmp_path: Path) -> None:
    small = str(tmp_path / "small")
    weft_("rtn", str(model), "--group", "16", "--out", small, "-q")
    made = weft_("export", small, "--to", "compressed-tensors", "--out", str(tmp_path / "ct"))
    assert made.exit_code == 3 and "embed_tokens" in made.stderr


def test_a_broken_folder_is_found(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    weft_("rtn", str(model), "--group", "16", "--out", str(out), "-q")
    (out / "tokenizer.json").unlink()
    made = weft_("verify", str(out), "--json")
    assert made.exit_code == 4 and json.loads(made.stdout) == ["tokenizer.json: missing"]


def test_a_recipe_runs(model: Path, texts: Path, tmp_path: Path) -> None:
    """Its steps in order, each on its sites; what is wrong with it shows before the model is loaded."""
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(
        'weft: 1\nsteps:\n  - magnitude: {sparsity: 0.5}\n    at: "*.mlp.*"\n  - rtn: {bits: 4, group: 16}\n'
    )
    made = weft_("run", str(recipe), str(model), "--data", str(texts), "--out", str(out), "--json")
    assert made.exit_code == 0, made.output
    rows = json.loads(made.stdout)
    forms = {r["site"]: r["after"] for r in rows}
    assert "int4" in forms["model.layers.0.self_attn.q_proj.weight"] and len(rows) > len(forms)
    assert forms["model.layers.0.mlp.up_proj.weight"] != forms["model.layers.0.self_attn.q_proj.weight"]
    assert weft_("verify", str(out)).output.strip() == "whole"
    recipe.write_text("weft: 1\nsteps:\n  - os.system: {}\n")
    assert weft_("run", str(recipe), "no-such-model").exit_code == 2


def test_a_broken_checkpoint_is_imported(model: Path, tmp_path: Path, forked: None) -> None:
    """The error of a model says which option mends it; the table says what was mended."""
    folder, out = tmp_path / "old", tmp_path / "out"
    shutil.copytree(model, folder)
    held = load_file(folder / "model.safetensors")
    torch.save({**held, "head.bias": torch.ones(2)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "weft import" in weft_("show", str(folder)).stderr
    refused = weft_("import", str(folder), "--out", str(out))
    assert refused.exit_code == 4 and "--drop" in refused.stderr and not out.exists()
    made = weft_("import", str(folder), "--out", str(out), "--drop", "head.*", "--json")
    assert json.loads(made.stdout) == [{"tensor": "head.bias", "mended": "dropped"}]
    assert weft_("verify", str(out)).output.strip() == "whole"


def test_an_adapter_is_attached(model: Path, tmp_path: Path) -> None:
    """A PEFT folder onto its base; onto another, only if that is asked for."""
    trained = weft.load(model)
    weft.apply(trained, "lora", rank=2)
    weft.export(trained, tmp_path / "adapter", to="peft")
    out = tmp_path / "out"
    made = weft_("attach", str(model), str(tmp_path / "adapter"), "--out", str(out), "--name", "mine")
    assert made.exit_code == 0 and "mine" in made.output
    assert all("adapter:mine" in r.expression for r in weft.show(weft.load(out)) if "_proj" in r.name)
    changed = weft.load(model)
    weft.apply(changed, "rtn", bits=2)
    weft.export(changed, tmp_path / "changed", to="hf")
    refused = weft_("attach", str(tmp_path / "changed"), str(tmp_path / "adapter"), "--out", str(tmp_path / "no"))
    assert refused.exit_code == 4 and "base" in refused.stderr and not (tmp_path / "no").exists()


def test_taps_are_put_on_and_shown(model: Path, tmp_path: Path) -> None:
    """On linear layers by default; the table says what every weight reads."""
    out = tmp_path / "out"
    made = weft_(
        "act_quant", str(model), "--grid", "fp4", "--group", "16", "--scale", "e4m3", "--out", str(out), "--json"
    )
    assert made.exit_code == 0
    assert {row["after"] for row in json.loads(made.stdout)} == {"bfloat16 on fp4[token, g16, e4m3 scales]"}
    rows = json.loads(weft_("show", str(out), "--json").stdout)
    assert {r["input"] for r in rows if "_proj" in r["name"]} == {"fp4[token, g16, e4m3 scales]"}
    assert {r["input"] for r in rows if "_proj" not in r["name"]} == {""}
    assert "read their input through" in (out / "README.md").read_text()
    refused = weft_("export", str(out), "--out", str(tmp_path / "no"))
    assert refused.exit_code == 4 and "rounds activations" in refused.stderr and not (tmp_path / "no").exists()


def test_the_cache_is_shown_limited_and_cleaned(tmp_path: Path) -> None:
    """What it holds by kind; a limit keeps the latest; clean keeps nothing."""
    from weft.store.cache import Cache

    folder = tmp_path / "cache"
    for i in range(4):
        Cache(folder).json("scores", str(i), lambda: "x" * 500)
    shown = json.loads(weft_("cache", "--cache", str(folder), "--json").stdout)
    assert [(r["kind"], r["results"]) for r in shown] == [("scores", 4)]
    assert weft_("cache", "--cache", str(folder), "--limit", "1200B").exit_code == 0
    assert json.loads(weft_("cache", "--cache", str(folder), "--json").stdout)[0]["results"] == 2
    assert "(nothing)" in weft_("cache", "--cache", str(folder), "--clean").output
    assert weft_("cache", "--cache", str(folder), "--limit", "much").exit_code == 2


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """No evidence is collected, nothing is trained, for a result that could not be saved."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    monkeypatch.setattr("weft.api._evidence", lambda *_: pytest.fail("work was done"))
    monkeypatch.setattr("weft.training.train", lambda *_, **__: pytest.fail("work was done"))
    for argv in (
        ["gptq", str(model), "--out", str(out)],
        ["train", str(model), "--data", "python", "--out", str(out)],
        ["merge", str(model), "--to", "dense", "--out", str(out), "--replace"],
        ["fit", str(model), "--budget", "50%", "--out", str(out)],
    ):
        made = weft_(*argv)
        assert made.exit_code == 4 and ("exists already" in made.stderr or "not weft's" in made.stderr), made.output


def test_the_installed_entry_point(tmp_path: Path) -> None:
    made = shell(None, "--version")
    assert made.returncode == 0 and made.stdout.strip() == f"weft {weft.__version__}"
    made = shell(None, "methods", "--json")
    assert {r["name"] for r in json.loads(made.stdout)} == {e.name for e in entries()}
    assert f'version = "{weft.__version__}"' in (SRC / "pyproject.toml").read_text()


def test_the_plan_of_a_fit(model: Path, texts: Path) -> None:
    argv = [
        "fit",
        str(model),
        "--budget",
        "30%,40%",
        "--budget",
        "3.5bpw",
        "--data",
        str(texts),
        "--quick",
        "--dry-run",
    ]
    made = weft_(*argv)
    assert made.exit_code == 0, made.output
    assert all(f"budget {b}" in made.stdout for b in ("30%", "40%", "3.5bpw"))
    assert isinstance(json.loads(weft_(*argv, "--json").stdout), list)
    assert weft_("fit", str(model)).exit_code == 2
    assert weft_("fit", str(model), "--budget", "much", "--dry-run").exit_code == 2


def test_a_pipe_that_closes_is_no_bug() -> None:
    line = f"{sys.executable} -m weft methods | head -c 1"
    made = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=SRC, env={**os.environ}, timeout=60)
    assert "Traceback" not in made.stderr and "bug" not in made.stderr


def test_a_report_is_drawn_anew(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    sample = SRC / "tests" / "report" / "sample.py"
    found = runpy.run_path(str(sample))
    (tmp_path / "report.json").write_text(found["report"]().model_dump_json())
    made = weft_("report", str(tmp_path))
    assert (
        made.exit_code in (0, 3) and "report.html" in made.stdout and (tmp_path / "report.html").stat().st_size > 1000
    )
    assert json.loads(weft_("report", str(tmp_path), "--json").stdout)["format"] == 1


def test_stale_proofs_are_listed(tmp_path: Path) -> None:
    made = weft_("prove", "--stale", "--folder", str(tmp_path), "--json")
    assert made.exit_code == 0
    assert {r["method"] for r in json.loads(made.stdout)} == {claim for e in entries() for claim in get(e.name).proofs}
    assert weft_("prove", "nonsense", "--folder", str(tmp_path)).exit_code == 2
    assert "--changed" in weft_("prove", "--folder", str(tmp_path)).stderr
    assert "no lab model" in weft_("prove", "rtn", "--model", "gpt", "--folder", str(tmp_path)).stderr


@pytest.mark.parametrize("error", ["KeyboardInterrupt()", "ZeroDivisionError()"])
def test_what_fails_before_the_command_has_no_traceback_either(error: str) -> None:
    code = (
        "import sys, weft.cli.methods as m, weft.cli as c\n"
        f"def fail(name): raise {error}\n"
        "m.command = fail; sys.argv = ['weft', 'rtn', 'x']; c.main()"
    )
    made = shell(code)
    assert made.returncode == (130 if "Keyboard" in error else 1)
    assert "Traceback" not in made.stderr and len(made.stderr.splitlines()) == 1


def test_adapters_are_listed_and_chosen(model: Path, tmp_path: Path) -> None:
    woven = weft.load(model)
    for name in ("a", "b"):
        weft.apply(woven, "lora", name=name, rank=2)
    weft.save(woven, tmp_path / "two")
    made = weft_("adapters", str(tmp_path / "two"), "--on", "b=0.5", "--out", str(tmp_path / "b"))
    assert made.exit_code == 0 and str(tmp_path / "b") in made.stdout
    rows = json.loads(weft_("adapters", str(tmp_path / "b"), "--json").stdout)
    assert [(r["adapter"], r["strength"], r["places"]) for r in rows] == [("a", 0.0, 14), ("b", 0.5, 14)]
    for wrong in (["--on", "b"], ["--on", "b=x", "--out", "o"], ["--on", "c", "--out", "o"]):
        assert weft_("adapters", str(tmp_path / "two"), *wrong).exit_code == 2
