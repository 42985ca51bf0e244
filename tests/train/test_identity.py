"""A run is told from another by its weights too, whatever else is the same."""

import shutil
from types import SimpleNamespace

import pytest

from megatron_dft.flags.route import LossRoute
from megatron_dft.flags.settings import Settings, set_settings
from megatron_dft.hf.source import open_checkpoint
from megatron_dft.losses import registry
from megatron_dft.recovery import resume
from megatron_dft.training.identity import model_identity, run_identity
from tests.hf.tiny import make_tiny

_NO_ROUTE = LossRoute(head=False, own=False, memory=None, row_filter=None, line="")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one config, and the second one's weights with one number changed."""
    root = tmp_path_factory.mktemp("models")
    made = {name: make_tiny("llama", root / name, seed=seed) for name, seed in (("a", 0), ("b", 1))}
    shutil.copytree(made["a"], root / "c")
    (file,) = (root / "c").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return {name: open_checkpoint(root / name) for name in "abc"}


def identity(model, reference=None):
    set_settings(Settings(registry.get("sft"), model, 259, _NO_ROUTE, reference))
    return run_identity()


def refusal(saved, current, allowed=()):
    with pytest.raises(resume.ResumeError) as found:
        resume.check_same_run(saved, current, list(allowed), "there")
    return str(found.value)


@pytest.mark.parametrize("other", "bc")
def test_other_base_weights_are_another_run(other, models):
    saved = identity(models["a"])
    assert resume.check_same_run(saved, identity(models["a"]), [], "there") == []
    said = refusal(saved, identity(models[other]))
    assert "model: weights was" in said and "--allow-change model" in said
    (line,) = resume.check_same_run(saved, identity(models[other]), ["model"], "there")
    assert line.startswith("resuming with a change: model: weights was")


def test_another_reference_is_another_run(models):
    a = models["a"]
    saved = identity(a, a)
    assert resume.check_same_run(saved, identity(a, a), [], "there") == []
    assert "loss: reference_weights was" in refusal(saved, identity(a, models["b"]))
    assert "loss: reference_weights was" in refusal(saved, identity(a))
    said = refusal(identity(a), identity(models["b"], models["b"]))
    assert "--allow-change loss model" in said


def test_a_checkpoint_of_before_says_nothing_of_weights_and_resumes(models):
    old = identity(models["a"])
    del old["model"]["weights"]
    for current in (identity(models["b"]), identity(models["b"], models["a"])):
        (line,) = resume.check_same_run(old, current, [], "there")
        assert "there: written before" in line and "not compared" in line
    old["model"]["hidden_size"] = 3
    assert "hidden_size was 3" in refusal(old, identity(models["a"]))


def test_words_of_the_config_that_say_nothing_are_no_change(models, tmp_path):
    """transformers writes its version; `score`, which is stricter, has its own fingerprint."""
    path = tmp_path / "a"
    shutil.copytree(models["a"].path, path)
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace('"transformers_version": "', '"x": 1, "_": "'))
    one, two = identity(models["a"]), identity(open_checkpoint(path))
    assert one["model"]["weights"] == two["model"]["weights"]
    args = SimpleNamespace(bf16=False, fp16=False, load=None)
    other = model_identity(args)
    set_settings(Settings(registry.get("sft"), models["a"], 259, _NO_ROUTE))
    assert model_identity(args)["weights"] != other["weights"]
