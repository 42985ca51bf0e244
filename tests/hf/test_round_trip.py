"""Families and layouts: logits equal transformers', an untrained export equals its source."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dft.hf.export import save_hf
from megatron_dft.hf.load import load_hf_weights
from megatron_dft.hf.source import open_checkpoint
from tests.hf import megatron_model
from tests.hf.tiny import KINDS, MOE_KINDS, make_tiny
from tests.ranks import run_ranks

# tp, pp, vpp; the vocabulary of 277 and the sequence of 19 divide by nothing
LAYOUTS = [(1, 1, None), (2, 1, None), (1, 2, None), (2, 2, None), (1, 2, 2)]
VOCABULARY = 277


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(3))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def assert_same_bytes(got: Path, expected: Path) -> None:
    a, b = weights(got), weights(expected)
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert a[name].dtype == tensor.dtype and a[name].shape == tensor.shape, name
        assert torch.equal(a[name].view(torch.uint8), tensor.view(torch.uint8)), name
    config = (got / "config.json").read_bytes(), (expected / "config.json").read_bytes()
    assert config[0] == config[1]


def transformers_logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens()).logits


def import_and_export(directory: Path, out: Path, layout, build=None, groups=None, **save):
    tp, pp, vpp = layout
    megatron_model.start(tp, pp, vpp, **(groups or {}))
    models = megatron_model.build(directory, vpp=vpp, **(build or {}))
    checkpoint = open_checkpoint(directory)
    assert load_hf_weights(models, checkpoint) is models
    save_hf(models, checkpoint, out, card="a card", **save)
    return megatron_model.logits(models, tokens())


def whole_logits(results: list, tp: int) -> torch.Tensor:
    """Cat the last stage's vocabulary shards and cut the padding off."""
    return torch.cat([r for r in results if r is not None][-tp:], -1)[..., :VOCABULARY]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def get(kind: str, **overrides):
        key = kind + str(sorted(overrides.items()))
        if key not in made:
            directory = tmp_path_factory.mktemp(kind)
            make_tiny(kind, directory, vocab_size=VOCABULARY, **overrides)
            made[key] = directory, transformers_logits(directory)
        return made[key]

    return get


def import_and_export_all(directories: dict[str, Path], out: Path, layout, groups=None):
    """All families on one set of ranks: starting ranks costs more than the models."""
    return {k: import_and_export(d, out / k, layout, groups=groups) for k, d in directories.items()}


def check_all(kinds, world_size, layout, groups, reference, tmp_path):
    tp = layout[0]
    models = {kind: reference(kind) for kind in kinds}
    directories = {kind: directory for kind, (directory, _) in models.items()}
    results = run_ranks(import_and_export_all, world_size, directories, tmp_path, layout, groups)
    for kind, (directory, expected) in models.items():
        error = (whole_logits([r[kind] for r in results], tp) - expected).abs().max().item()
        assert error <= 1e-5, (kind, error)
        assert_same_bytes(tmp_path / kind, directory)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_and_bytes(layout, reference, tmp_path):
    check_all(KINDS, layout[0] * layout[1], layout, None, reference, tmp_path)


# world size, tp, pp, expert-parallel, expert-tensor-parallel
EXPERT_LAYOUTS = [
    (2, 1, 1, 2, 1),
    (2, 2, 1, 2, 1),
    (4, 1, 2, 2, 1),
    (4, 2, 1, 2, 2),
    (4, 2, 2, 1, 2),
]


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=str)
def test_expert_layouts(layout, reference, tmp_path):
    world_size, tp, pp, ep, etp = layout
    groups = dict(expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
    check_all(MOE_KINDS, world_size, (tp, pp, None), groups, reference, tmp_path)


def test_multi_query_attention_splits_one_key_head_over_two_ranks(reference, tmp_path):
    directory, expected = reference("llama", num_key_value_heads=1)
    out = tmp_path / "out"
    results = run_ranks(import_and_export, 2, directory, out, (2, 1, None))
    assert (whole_logits(results, 2) - expected).abs().max() <= 1e-5
    assert_same_bytes(out, directory)


def test_uneven_pipeline_stages(reference, tmp_path):
    directory, expected = reference("qwen2", num_hidden_layers=5)
    build = dict(num_layers_in_first_pipeline_stage=2, num_layers_in_last_pipeline_stage=3)
    out = tmp_path / "out"
    results = run_ranks(import_and_export, 2, directory, out, (1, 2, None), build)
    assert (whole_logits(results, 1) - expected).abs().max() <= 1e-5
    assert_same_bytes(out, directory)


def test_sliding_window(reference, tmp_path):
    directory, expected = reference("mistral", sliding_window=7)
    whole, _ = reference("mistral")
    results = run_ranks(import_and_export, 1, directory, tmp_path / "out", (1, 1, None))
    assert (whole_logits(results, 1) - expected).abs().max() <= 1e-5
    # The window is narrower than the sequence: without it the logits are others.
    assert (transformers_logits(whole) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_survives_a_float32_model(dtype, tmp_path):
    directory = make_tiny("qwen3", tmp_path / "in", vocab_size=VOCABULARY, dtype=dtype)
    run_ranks(import_and_export, 2, directory, tmp_path / "out", (2, 1, None))
    assert_same_bytes(tmp_path / "out", directory)


def test_many_small_files_in_and_out(tmp_path):
    directory = make_tiny("llama", tmp_path / "in", vocab_size=VOCABULARY, max_shard_size="30KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    out = tmp_path / "out"
    run_ranks(import_and_export, 2, directory, out, (1, 2, None), max_file_bytes=30_000)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert all(f.stat().st_size < 45_000 for f in out.glob("*.safetensors"))
    assert_same_bytes(out, directory)
    assert (transformers_logits(out) - transformers_logits(directory)).abs().max() == 0


def test_requested_dtype_is_written_and_named(tmp_path):
    directory = make_tiny("llama", tmp_path / "in", vocab_size=VOCABULARY)
    out = tmp_path / "out"
    run_ranks(import_and_export, 1, directory, out, (1, 1, None), dtype=torch.bfloat16)
    for name, tensor in weights(directory).items():
        assert torch.equal(weights(out)[name], tensor.to(torch.bfloat16)), name
    assert open_checkpoint(out).config["dtype"] == "bfloat16"


def test_companions_are_copied(tmp_path):
    directory = make_tiny("llama", tmp_path / "in", vocab_size=VOCABULARY)
    out = tmp_path / "out"
    run_ranks(import_and_export, 1, directory, out, (1, 1, None))
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (out / name).read_bytes() == (directory / name).read_bytes()
    assert (out / "README.md").read_text() == "a card"
