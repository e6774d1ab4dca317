"""Folders of diffusers, of weft's own classes, and models of no library: right, or refused with the reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model.zoo import DIFFUSION, OWN, build
from torch import nn

import weft
from weft.error import ConflictError, FormatError, OptionError, PathError
from weft.model import weave
from weft.store import load, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A U-Net as diffusers writes it."""
    build("unet").save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def change(folder: Path, **said: Any) -> None:
    """Other values in the configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_configuration_is_kept(name: str, tmp_path: Path) -> None:
    """Every entry, and the class's name under the library's own key."""
    build(name).save_pretrained(tmp_path / "theirs")
    save(load(tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("theirs", "ours"))
    assert ours == theirs and "architectures" not in ours
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "library_name: diffusers" in card and f"diffusers.{ours['_class_name']}.from_pretrained" in card


@pytest.mark.parametrize("name", OWN)
def test_classes_of_weft_are_known_by_name(name: str, tmp_path: Path) -> None:
    """Their folders say whose they are, as plain weights too, and go to no other tool's format."""
    model = weave(build(name))
    save(model, tmp_path / "ours")
    weft.apply(back := load(tmp_path / "ours"), "rtn", at="all-linear", bits=4, group=8)
    weft.export(back, tmp_path / "plain")
    assert type(load(tmp_path / "plain")) is type(model)
    for kept in ("ours", "plain"):
        card = (tmp_path / kept / "README.md").read_text()
        assert "library_name: weft\n" in card and 'weft.load("FOLDER")' in card and "Hugging Face" not in card
    with pytest.raises(ConflictError, match="only transformers reads this format"):
        weft.export(back, tmp_path / "packed", to="compressed-tensors")


@pytest.mark.parametrize("name", ["CrossNetworkConfig", "CrossLayer", "cross", "__all__"])
def test_what_is_no_model_of_weft_is_refused(name: str, tmp_path: Path) -> None:
    """Only its model classes."""
    save(weave(build("cross")), tmp_path / "one")
    change(tmp_path / "one", architectures=[name])
    with pytest.raises(FormatError, match="unknown architecture"):
        load(tmp_path / "one")


@pytest.mark.parametrize(
    "said", [{"patch_size": 3}, {"num_attention_heads": 5}, {"hidden_size": 31}, {"patch_size": 0}]
)
def test_a_flow_whose_sizes_do_not_fit_is_refused(said: dict[str, int], tmp_path: Path) -> None:
    """Patches that do not fill the image, heads and waves that cannot share the width."""
    save(weave(build("flow")), tmp_path / "one")
    change(tmp_path / "one", **said)
    with pytest.raises(FormatError, match="makes no model"):
        load(tmp_path / "one")


def test_without_diffusers_its_folders_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(PathError, match="pip install diffusers"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "StableDiffusionPipeline", "__version__", "no such", "LlamaForCausalLM"]
)
def test_other_classes_are_refused(name: str, folder: Path) -> None:
    """Only model classes of diffusers itself."""
    change(folder, _class_name=name)
    with pytest.raises(FormatError, match="unknown architecture"):
        load(folder)


def test_a_configuration_that_does_not_fit_is_refused(folder: Path) -> None:
    """Other widths, and one that makes no model."""
    change(folder, block_out_channels=[8, 32])
    with pytest.raises(FormatError, match="another shape"):
        load(folder)
    change(folder, block_out_channels=[8, 7])
    with pytest.raises(FormatError, match="makes no model"):
        load(folder)


def test_a_stale_checkpoint_beside_is_refused(folder: Path) -> None:
    """A weft folder that also holds a plain checkpoint of diffusers."""
    model = load(folder)
    weft.apply(model, "rtn", group=8)
    save(model, folder.parent / "small")
    (folder / "diffusion_pytorch_model.safetensors").rename(
        folder.parent / "small" / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(FormatError, match="two checkpoints"):
        load(folder.parent / "small")


def test_formats_of_transformers_alone_are_refused(folder: Path) -> None:
    """compressed-tensors is read by transformers."""
    with pytest.raises(ConflictError, match="only transformers"):
        weft.export(load(folder), folder.parent / "out", to="compressed-tensors")


def test_a_model_of_no_library_is_woven_and_not_saved(tmp_path: Path) -> None:
    """Everything in memory works; a folder could not say what it is."""
    model = weave(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    weft.apply(model, "rtn", group=8)
    assert model(torch.ones(2, 8)).shape == (2, 4)
    with pytest.raises(OptionError, match="no configuration"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
