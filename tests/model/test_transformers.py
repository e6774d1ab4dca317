"""A woven model under transformers' own machinery: generation, Trainer, checkpointing, ties, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from weft.engine.run import Step, apply
from weft.error import ConflictError, OptionError
from weft.model import expressions, fingerprint, unweave, weave
from weft.store import load


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_greedy_generation_equals_the_plain_models(name: str, cached: bool, tiny: Any) -> None:
    """The same tokens, with and without the cache."""
    ids = torch.arange(5, 11)[None].repeat(2, 1)
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "use_cache": cached,
        "attention_mask": torch.ones_like(ids),
    }
    want = tiny(name).generate(ids, **options)
    assert torch.equal(weave(tiny(name)).generate(ids, **options), want)


def test_generation_of_the_reference_model(ref_lm: Path) -> None:
    """The shipped model: the same greedy tokens as transformers' own load."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(ref_lm, dtype=torch.float32).eval()
    ids = torch.arange(40, 60)[None]
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(load(ref_lm).generate(ids, **options), plain.generate(ids, **options))


def trainer(model: Any, out: Path, steps: int = 1, **options: Any) -> transformers.Trainer:
    """transformers' own Trainer on a handful of token sequences."""
    rng = torch.Generator().manual_seed(0)
    rows = [{"input_ids": (x := torch.randint(2, 96, (8,), generator=rng)), "labels": x} for _ in range(8)]
    args = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=1e-2,
        **{"save_strategy": "no", **options},
    )
    return transformers.Trainer(model=model, args=args, train_dataset=rows)


@pytest.mark.parametrize("base", [None, "rtn", "nf4"])
def test_trainer_trains_an_adapter_and_nothing_else(base: str | None, tiny: Any, tmp_path: Path) -> None:
    """One step of the Trainer moves the adapters; all else keeps every bit."""
    model = weave(tiny("llama-tied"))
    apply(model, [Step.of(base)] if base else [])
    apply(model, [Step.of("lora", rank=2)], at="all-linear")
    before = {n: p.detach().clone() for n, p in (*model.named_parameters(), *model.named_buffers())}
    trainer(model, tmp_path).train()
    moved = {n for n, p in (*model.named_parameters(), *model.named_buffers()) if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".adapter:default.b" in n} and moved


def test_trainer_saves_a_folder_that_weft_loads(tiny: Any, tmp_path: Path) -> None:
    """The Trainer's checkpoint and `save_model` are weft folders with the trained values."""
    model = weave(tiny())
    apply(model, [Step.of("rtn"), Step.of("lora", rank=2)], at="all-linear")
    t = trainer(model, tmp_path / "run", save_strategy="steps", save_steps=1)
    t.train()
    t.save_model(str(tmp_path / "end"))
    assert (
        fingerprint(load(tmp_path / "end"))
        == fingerprint(load(tmp_path / "run" / "checkpoint-1"))
        == fingerprint(model)
    )


@pytest.mark.parametrize("base", [None, "rtn", "magnitude"])
def test_gradient_checkpointing_gives_equal_gradients(base: str | None, tiny: Any, batches: Any) -> None:
    """Recomputing blocks changes no gradient."""
    grads: list[dict[str, torch.Tensor]] = []
    for on in (False, True):
        model = weave(tiny("llama-tied"))
        apply(model, [Step.of(base)] if base else [])
        apply(model, [Step.of("lora", rank=2)], at="all-linear")
        with torch.no_grad():
            for n, p in sorted(model.named_parameters()):
                if n.endswith(".b") and p.requires_grad:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        if on:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        batch = batches(1)[0]
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0] and all(torch.equal(g, grads[1][n]) and bool(g.any()) for n, g in grads[0].items())


def test_tie_weights_changes_nothing(family: str, tiny: Any) -> None:
    """Tied sites share one expression; tying again is harmless."""
    model = weave(tiny(family))
    apply(model, [Step.of("rtn")])
    before, held = fingerprint(model), expressions(model)
    model.tie_weights()
    assert fingerprint(model) == before and expressions(model) == held


def test_resizing_is_refused_until_unwoven(tiny: Any) -> None:
    """A woven embedding cannot be resized, and is not touched; the plain model can."""
    model = weave(tiny("llama-tied"))
    mark = fingerprint(model)
    with pytest.raises(ConflictError):
        model.resize_token_embeddings(100)
    assert fingerprint(model) == mark and model.config.vocab_size == 96
    assert unweave(model).resize_token_embeddings(100).weight.shape[0] == 100


def test_save_pretrained_of_plain_values_is_an_ordinary_checkpoint(family: str, tiny: Any, tmp_path: Path) -> None:
    """from_pretrained reads what a woven model's save_pretrained wrote, bit for bit."""
    model = tiny(family)
    want = {k: v.clone() for k, v in model.state_dict().items()}
    weave(model).save_pretrained(tmp_path / "out")
    held = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert held.keys() == want.keys() and all(torch.equal(held[k], v) for k, v in want.items())


def test_save_pretrained_refuses_what_it_cannot_do(tiny: Any, tmp_path: Path) -> None:
    """An option that would be ignored is an error; other processes write nothing."""
    model = weave(tiny())
    with pytest.raises(OptionError):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_unwoven_models_have_transformers_methods_again(tiny: Any, tmp_path: Path) -> None:
    """After unweave, save_pretrained is transformers' own."""
    model = unweave(weave(tiny("llama-tied")))
    model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "weft.json").exists()
    assert "_weft" not in model.__dict__ and "tie_weights" not in model.__dict__
