"""Tasks of lm-evaluation-harness on woven models: local files, no network."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import weft
from weft.cli.app import build
from weft.error import ConflictError, OptionError, PathError, ResourceError

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

MODELS = Callable[..., Path]
CHOICES = ["the cat", "a dog ran"]
KINDS = {
    "local_choice": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{a}}"
fewshot_split: test
num_fewshot: 2
metric_list: [{metric: acc}, {metric: acc_norm}]""",
    "local_answer": """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[a]}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: true, temperature: 1.0}
metric_list: [{metric: exact_match}]""",
    "local_rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]""",
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three tasks over one file of documents."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    place = tmp_path / "tasks"
    place.mkdir()
    lines = ["the cat sat on the mat", "a dog ran under the old tree", "the red bird flew over a hill"]
    rows = [{"q": f"{lines[i % 3]} . " * (1 + i % 4), "choices": CHOICES, "a": i % 2} for i in range(10)]
    (place / "documents.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"data_files": {"test": str(place / "documents.jsonl")}, "cache_dir": str(tmp_path / "datasets")}
    for name, body in KINDS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\ntest_split: test\n"
        (place / f"{name}.yaml").write_text(head + body)
    return place


def plain_results(folder: Path, tasks: Path, batch: int, limit: int | None) -> dict[str, dict[str, Any]]:
    """What the harness itself says of the plain transformers model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lm: Any = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch)  # type: ignore[arg-type]
    manager = TaskManager(include_path=tasks, include_defaults=False)
    how: dict[str, Any] = {"task_manager": manager, "limit": limit, "bootstrap_iters": 1000, "log_samples": False}
    made: Any = lm_eval.simple_evaluate(lm, tasks=list(KINDS), **how)
    return made["results"]


@pytest.mark.parametrize(("batch", "limit"), [(1, None), (4, 7)])
def test_scores_are_those_of_the_plain_model(
    folder: MODELS, tasks: Path, batch: int, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choices by likelihood, sampled answers and rolling perplexity: the same numbers to the last bit."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda *_: None)
    source = folder(max_position_embeddings=128)
    plain = plain_results(source, tasks, batch, limit)
    model = weft.load(source)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    made = weft.evaluate_tasks(model, list(KINDS), include_path=tasks, batch=batch, limit=limit)
    assert random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])
    assert {(s.task, s.metric) for s in made} == {
        ("local_choice", "acc"), ("local_choice", "acc_norm"), ("local_answer", "exact_match"),
        ("local_rolling", "word_perplexity"), ("local_rolling", "bits_per_byte"),
    }  # fmt: skip
    for s in made:
        assert s.value == plain[s.task][f"{s.metric},{s.filter}"] and s.documents == (limit or 10)
        error = plain[s.task][f"{s.metric}_stderr,{s.filter}"]
        assert s.stderr == (None if error == "N/A" else error)
        assert s.better == ("lower" if s.task == "local_rolling" else "higher")


def test_a_rolling_score_is_the_direct_computation(folder: MODELS, tasks: Path) -> None:
    """Bits per byte of all documents together, each token given all before it and the first given the start token."""
    model = weft.load(folder(max_position_embeddings=128))
    words = weft.tokenizer(model)
    nats = size = 0.0
    for line in (tasks / "documents.jsonl").read_text().splitlines():
        text = json.loads(line)["q"]
        ids = torch.tensor([[words.eos_token_id, *words(text)["input_ids"]]])
        with torch.no_grad():
            found = model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        nats, size = nats - float(found.sum()), size + len(text.encode())
    made = {s.metric: s.value for s in weft.evaluate_tasks(model, ["local_rolling"], include_path=tasks)}
    assert made["bits_per_byte"] == pytest.approx(nats / size / np.log(2), rel=1e-5)


@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_a_compressed_model_has_its_own_scores_and_stays_as_it_is(folder: MODELS, tasks: Path, mode: Any) -> None:
    """What the harness does to a model (eval, tie_weights) leaves its expressions alone, tied weights too."""
    model = weft.load(folder(max_position_embeddings=128))
    before = weft.evaluate_tasks(model, ["local_rolling"], include_path=tasks)
    weft.apply(model, "rtn", bits=2, group=16)
    weft.apply(model, "lora", rank=2)
    weft.mode(model, mode)
    held = weft.expressions(model)
    after = weft.evaluate_tasks(model, list(KINDS), include_path=tasks)
    now = weft.expressions(model)
    assert held.keys() == now.keys() and all(held[n] is now[n] for n in held)
    values = [next(s.value for s in made if s.metric == "bits_per_byte") for made in (before, after)]
    assert all(np.isfinite(values)) and abs(values[0] - values[1]) > 1e-3


def _own_tasks(include_path: Path, include_defaults: bool = True) -> TaskManager:
    """Not the harness's 14000 tasks, which take long to list."""
    return TaskManager(include_path=include_path, include_defaults=False)


def test_what_cannot_be_run_is_refused(
    folder: MODELS, tasks: Path, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown names all at once with like ones, no folder, broken files, data that is not there, unsafe code, embeddings."""
    model = weft.load(folder(max_position_embeddings=128))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", _own_tasks)
    with pytest.raises(OptionError, match=r"(?s)local_chioce.*local_choice.*nonsense_zz"):
        weft.evaluate_tasks(model, ["local_chioce", "nonsense_zz"], include_path=tasks)
    with pytest.raises(PathError, match="no folder"):
        weft.evaluate_tasks(model, ["local_choice"], include_path=tmp_path / "nowhere")
    with pytest.raises(OptionError, match="out of range"):
        weft.evaluate_tasks(model, [], include_path=tasks)
    text = (tasks / "local_answer.yaml").read_text()
    for change, error, said in (
        ("unsafe_code: true", ConflictError, "runs the code"),
        ("dataset_name: !function nothing.there", ResourceError, "cannot be loaded"),
    ):
        (tasks / "local_answer.yaml").write_text(f"{text}\n{change}")
        with pytest.raises(error, match=said):
            weft.evaluate_tasks(model, ["local_answer"], include_path=tasks)
    (tasks / "documents.jsonl").unlink()
    with pytest.raises(ResourceError, match="cannot be loaded"):
        weft.evaluate_tasks(model, ["local_choice"], include_path=tasks)
    with pytest.raises(ConflictError, match="language models"):
        weft.evaluate_tasks(weft.weave(tiny("bert")), ["local_choice"], include_path=tasks)


def test_without_the_package_the_error_says_what_to_install(folder: MODELS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ResourceError, match=r"pip install \"weft\[eval\]\""):
        weft.evaluate_tasks(weft.load(folder()), ["arc_easy"])


def weft_(*argv: str) -> Any:
    """The command line in this process."""
    return CliRunner().invoke(build(argv), list(argv), catch_exceptions=False)


def test_the_command_prints_json_and_nothing_else(folder: MODELS, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tasks and the harness print, as of an F1 score's resamples, goes to standard error."""
    monkeypatch.setattr("weft.harness.RESAMPLES", 2)
    choice = tasks / "local_choice.yaml"
    choice.write_text(choice.read_text().replace("acc_norm", "f1"))
    source = folder(max_position_embeddings=128)
    argv = ["eval", str(source), "--tasks", "local_rolling, local_choice", "--include-path", str(tasks)]
    done = weft_(*argv, "--limit", "4", "--json")
    assert done.exit_code == 0 and "bootstrapping" in done.stderr
    rows = json.loads(done.stdout)
    want = weft.evaluate_tasks(weft.load(source), ["local_rolling", "local_choice"], include_path=tasks, limit=4)
    assert [{k: r[k] for k in asdict(want[0])} for r in rows] == [asdict(s) for s in want]
    assert {r["mode"] for r in rows} == {"memory"} and {r["model"] for r in rows} == {str(source)}


@pytest.mark.parametrize(
    "argv", [[], ["--data", "python", "--tasks", "arc_easy"], ["--data", "python", "--include-path", "x"]]
)
def test_the_command_takes_either_data_or_tasks(argv: list[str]) -> None:
    made = weft_("eval", "ref-lm", *argv)
    assert made.exit_code == 2 and "not clear" in made.stderr
