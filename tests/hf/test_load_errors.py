"""A checkpoint that does not fit its config.json: one ValueError names the tensor, on all ranks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dft.hf.load import load_hf_weights
from megatron_dft.hf.source import open_checkpoint
from tests.hf import megatron_model
from tests.hf.test_round_trip import import_and_export, transformers_logits, whole_logits
from tests.hf.tiny import make_tiny
from tests.ranks import run_ranks

K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def refusals(directories: dict[str, Path]) -> dict[str, str]:
    """Import each into a TP2 model; the message, or '' where it was accepted."""
    megatron_model.start(tp=2)
    messages = {}
    for name, directory in directories.items():
        try:
            load_hf_weights(megatron_model.build(directory), open_checkpoint(directory))
            messages[name] = ""
        except ValueError as error:
            messages[name] = str(error)
    return messages


def add(tensors, name, tensor):
    tensors[name] = tensor


def poison(tensors, row):
    # In the half of the rows that only one of the two ranks reads.
    tensors[K_PROJ][row, 0] = float("nan")


# what is done to the tensors -> what the message must name
DAMAGES = {
    "missing": (lambda t: t.pop(K_PROJ), [repr(K_PROJ), "missing"]),
    "extra": (
        lambda t: add(t, "model.layers.0.self_attn.o_proj.bias", torch.zeros(32)),
        ["'model.layers.0.self_attn.o_proj.bias'", "fits nowhere"],
    ),
    "layer too many": (
        lambda t: add(t, "model.layers.2.input_layernorm.weight", torch.zeros(32)),
        ["'model.layers.2.input_layernorm.weight'"],
    ),
    "too few rows": (
        lambda t: add(t, K_PROJ, t[K_PROJ][:8].clone()),
        [repr(K_PROJ), "[8, 32]", "[16, 32]"],
    ),
    "too many columns": (
        lambda t: add(t, K_PROJ, torch.zeros(16, 33)),
        [repr(K_PROJ), "[16, 33]"],
    ),
    "one axis": (lambda t: add(t, K_PROJ, torch.zeros(16 * 32)), [repr(K_PROJ), "[512]"]),
    "vocabulary": (
        lambda t: add(t, "lm_head.weight", torch.zeros(260, 32)),
        ["'lm_head.weight'", "[260, 32]", "[259, 32]"],
    ),
    "codes of eight bits": (
        lambda t: add(t, K_PROJ, t[K_PROJ].to(torch.float8_e4m3fn)),
        [repr(K_PROJ), "float8_e4m3fn", "model.safetensors", "dequantise"],
    ),
    "whole numbers": (
        lambda t: add(t, K_PROJ, t[K_PROJ].to(torch.int8)),
        [repr(K_PROJ), "int8", "dequantise"],
    ),
    "NaN on rank 0": (lambda t: poison(t, 0), [repr(K_PROJ), "NaN"]),
    "NaN on rank 1": (lambda t: poison(t, 15), [repr(K_PROJ), "NaN"]),
}


def test_damages_are_named(tmp_path):
    directories = {}
    for damage, (break_it, _) in DAMAGES.items():
        directory = make_tiny("llama", tmp_path / damage, num_hidden_layers=2)
        tensors = load_file(directory / "model.safetensors")
        break_it(tensors)
        save_file(tensors, directory / "model.safetensors")
        directories[damage] = directory
    whole = make_tiny("llama", tmp_path / "whole", num_hidden_layers=2)
    ranks = run_ranks(refusals, 2, directories | {"whole": whole})
    assert ranks[0] == ranks[1]
    for damage, (_, named) in DAMAGES.items():
        message = ranks[0][damage]
        assert "\n" not in message
        for word in named:
            assert word in message, (damage, message)
    assert ranks[0]["whole"] == ""


def edited(directory: Path, change) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_a_tied_checkpoint_may_repeat_the_embedding_but_not_another(tmp_path):
    same = edited(
        make_tiny("llama-tied", tmp_path / "same", num_hidden_layers=2),
        lambda t: add(t, "lm_head.weight", t["model.embed_tokens.weight"].clone()),
    )
    other = edited(
        make_tiny("llama-tied", tmp_path / "other", num_hidden_layers=2),
        lambda t: add(t, "lm_head.weight", t["model.embed_tokens.weight"] + 1),
    )
    messages = run_ranks(refusals, 2, {"same": same, "other": other})[0]
    assert messages["same"] == ""
    assert "lm_head.weight" in messages["other"] and "tie_word_embeddings" in messages["other"]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_recomputed_rotary_buffers_are_ignored(kind, tmp_path):
    directory = edited(
        make_tiny(kind, tmp_path / "in", num_hidden_layers=2, vocab_size=277),
        lambda t: add(t, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
    )
    expected = transformers_logits(directory)
    results = run_ranks(import_and_export, 1, directory, tmp_path / "out", (1, 1, None))
    assert (whole_logits(results, 1) - expected).abs().max() <= 1e-5


def build_with_bias(directory: Path):
    megatron_model.start()
    models = megatron_model.build(directory, add_qkv_bias=True)
    load_hf_weights(models, open_checkpoint(directory))


def build_with_more_groups(directory: Path):
    megatron_model.start()
    models = megatron_model.build(directory, num_query_groups=4)
    load_hf_weights(models, open_checkpoint(directory))


def test_a_model_flag_that_adds_a_parameter(tmp_path):
    directory = make_tiny("llama", tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match="linear_qkv.bias.*has no tensor"):
        run_ranks(build_with_bias, 1, directory)


def test_a_model_flag_that_contradicts_a_shape(tmp_path):
    directory = make_tiny("llama", tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"k_proj.weight' has shape \[16, 32\].*imply \[32, 32\]"):
        run_ranks(build_with_more_groups, 1, directory)


def train_wrapped(directory: Path, out: Path):
    """bf16, Float16Module and DDP around the model, as in training."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from megatron_dft.hf.export import save_hf

    megatron_model.start(tp=2)
    (model,) = megatron_model.build(
        directory, bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16
    )
    config = model.config
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(), Float16Module(config, model)
    )
    checkpoint = open_checkpoint(directory)
    load_hf_weights([wrapped], checkpoint)
    save_hf([wrapped], checkpoint, out)


def test_wrapped_models(tmp_path):
    from tests.hf.test_round_trip import assert_same_bytes

    directory = make_tiny("llama", tmp_path / "in", num_hidden_layers=2, dtype=torch.bfloat16)
    run_ranks(train_wrapped, 4, directory, tmp_path / "out")  # TP2 × DP2
    assert_same_bytes(tmp_path / "out", directory)
