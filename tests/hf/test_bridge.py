"""--hf-bridge: who maps a checkpoint, what is refused, and what is checked of the package's work.

megatron-bridge needs transformer-engine, which does not build here: a stand-in has its interface.
"""

import json
import shutil
import sys
from argparse import ArgumentParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dft.commands import import_hf as import_command
from megatron_dft.hf import bridge
from megatron_dft.hf.source import open_checkpoint
from tests.hf.test_round_trip import assert_same_bytes
from tests.hf.tiny import make_tiny

NORM = "model.norm.weight"


class StandIn:
    """AutoBridge's calls; its "Megatron checkpoint" is a copy. `spoil` changes what comes back."""

    spoil: Any = None

    @classmethod
    def import_ckpt(cls, hf_model_id: str, megatron_path: str, **kwargs: Any) -> None:
        shutil.copytree(hf_model_id, megatron_path)

    @classmethod
    def from_hf_pretrained(cls, path: str, **kwargs: Any) -> "StandIn":
        return cls()

    def export_ckpt(self, megatron_path: str, hf_path: str, show_progress: bool) -> None:
        Path(hf_path).mkdir(exist_ok=True)
        shutil.copytree(megatron_path, hf_path, dirs_exist_ok=True)
        if self.spoil is not None:
            file = Path(hf_path) / "model.safetensors"
            tensors = load_file(file)
            type(self).spoil(tensors)
            save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def olmo(tmp_path_factory):
    """A checkpoint of an architecture that has no table."""
    directory = make_tiny("llama", tmp_path_factory.mktemp("olmo"), num_hidden_layers=1)
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["OlmoForCausalLM"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def installed(monkeypatch):
    class AutoBridge(StandIn):
        pass

    module = ModuleType("megatron.bridge")
    module.AutoBridge = AutoBridge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.bridge", module)
    monkeypatch.setattr(bridge, "is_installed", lambda: True)
    return AutoBridge


def run_import(*words: str) -> int:
    parser = ArgumentParser()
    import_command.add_arguments(parser)
    return import_command.run(parser.parse_args(words))


@pytest.mark.parametrize(
    ("kind", "wanted", "named"),
    [
        ("olmo", "auto", "OlmoForCausalLM.*mapped are.*Llama.*not installed: pip install"),
        ("olmo", "table", "'OlmoForCausalLM' is not mapped"),
        ("olmo", "megatron-bridge", "--hf-bridge megatron-bridge: is not installed; pip install"),
        ("llama", "megatron-bridge", "--hf-bridge megatron-bridge: is not installed; pip install"),
    ],
)
def test_without_the_package(kind, wanted, named, olmo, tmp_path, monkeypatch):
    monkeypatch.setattr(bridge, "is_installed", lambda: False)
    source = olmo if kind == "olmo" else make_tiny(kind, tmp_path / kind, num_hidden_layers=1)
    with pytest.raises(ValueError, match=named) as caught:
        run_import(str(source), str(tmp_path / "out"), "--hf-bridge", wanted)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_our_tables_come_first(olmo, tmp_path, installed):
    llama = open_checkpoint(make_tiny("llama", tmp_path / "llama", num_hidden_layers=1))
    assert not bridge.uses_bridge(llama, "auto") and not bridge.uses_bridge(llama, "table")
    assert bridge.uses_bridge(llama, "megatron-bridge")
    assert bridge.uses_bridge(open_checkpoint(olmo), "auto")


def test_a_package_that_does_not_import_is_one_line(olmo, tmp_path, monkeypatch):
    monkeypatch.setattr(bridge, "is_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    with pytest.raises(ValueError, match="cannot be imported: ModuleNotFoundError") as caught:
        run_import(str(olmo), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_there_and_back(olmo, tmp_path, installed):
    assert run_import(str(olmo), str(tmp_path / "out")) == 0
    out = bridge.export_checkpoint(
        tmp_path / "out", open_checkpoint(olmo), tmp_path / "hf",
        overwrite=False, trust_remote_code=False, card="a card",
    )  # fmt: skip
    assert_same_bytes(out, olmo)
    assert (out / "README.md").read_text() == "a card"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def loses_a_tensor(tensors):
    del tensors[NORM]


def adds_a_tensor(tensors):
    tensors["model.extra.weight"] = torch.zeros(2)


def changes_a_bit(tensors):
    tensors[NORM][3] += 2**-20


def holds_nan(tensors):
    tensors[NORM][3] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (loses_a_tensor, f"{NORM}' is in only one"),
        (adds_a_tensor, "model.extra.weight' is in only one"),
        (changes_a_bit, f"{NORM}' differs"),
    ],
)
def test_an_import_that_does_not_come_back_is_refused(spoil, named, olmo, tmp_path, installed):
    installed.spoil = staticmethod(spoil)
    with pytest.raises(ValueError, match=named):
        run_import(str(olmo), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(loses_a_tensor, f"{NORM}' was not written"), (holds_nan, f"{NORM}' holds NaN")],
)
def test_an_export_that_is_not_whole_is_refused(spoil, named, olmo, tmp_path, installed):
    assert run_import(str(olmo), str(tmp_path / "out")) == 0
    installed.spoil = staticmethod(spoil)
    with pytest.raises(ValueError, match=named):
        bridge.export_checkpoint(
            tmp_path / "out", open_checkpoint(olmo), tmp_path / "hf",
            overwrite=False, trust_remote_code=False, card=None,
        )  # fmt: skip
    assert not (tmp_path / "hf").exists()


def test_a_base_model_with_nan_is_refused(olmo, tmp_path, installed):
    directory = tmp_path / "nan"
    shutil.copytree(olmo, directory)
    tensors = load_file(directory / "model.safetensors")
    holds_nan(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{NORM}' holds NaN"):
        run_import(str(directory), str(tmp_path / "out"))


def test_training_takes_our_tables(olmo, tmp_path, installed):
    with pytest.raises(ValueError, match="--hf-bridge megatron-bridge: training takes our tables"):
        bridge.check_training("megatron-bridge", open_checkpoint(olmo))
    with pytest.raises(ValueError, match="'OlmoForCausalLM' is not mapped"):
        bridge.check_training("auto", open_checkpoint(olmo))
