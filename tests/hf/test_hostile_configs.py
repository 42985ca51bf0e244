"""config.json that no model can have, or that is not of these tensors: refused before a build."""

import json
import time

import pytest

from megatron_dft.hf.config import megatron_args
from megatron_dft.hf.source import open_checkpoint
from tests.hf.tiny import make_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    out = tmp_path_factory.mktemp("models")
    return {kind: make_tiny(kind, out / kind) for kind in ("qwen2", "qwen3-moe", "deepseek-v3")}


def refusal(model, tmp_path, **changes):
    """The one line for a copy of the model's config.json with these settings (None: left out)."""
    for file in model.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text()) | changes
    for key in [k for k, v in changes.items() if v is None]:
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        megatron_args(open_checkpoint(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    return str(caught.value), time.process_time() - began


@pytest.mark.parametrize("layers", [5, 40, 10_000, 10**6, 10**9])
def test_more_layers_than_tensors_are_no_work(layers, models, tmp_path):
    message, seconds = refusal(
        models["qwen2"], tmp_path, num_hidden_layers=layers, layer_types=None
    )
    assert "num_hidden_layers" in message
    assert seconds < 5  # building 10,000 layers took 17


def _rope(**changes):
    return dict(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0} | changes)


NAN, INF = float("nan"), float("inf")
BAD = {
    "theta NaN": (_rope(rope_theta=NAN), "rope_theta"),
    "theta infinite": (_rope(rope_theta=INF), "rope_theta"),
    "theta 0": (_rope(rope_theta=0.0), "rope_theta"),
    "theta 0 in float32": (_rope(rope_theta=1e-320), "rope_theta"),
    "theta negative": (_rope(rope_theta=-1.0), "rope_theta"),
    "factor 0": (_rope(rope_type="linear", factor=0.0), "factor"),
    "eps 0 in float32": (dict(rms_norm_eps=1e-46), "rms_norm_eps"),
    "eps NaN": (dict(rms_norm_eps=NAN), "rms_norm_eps"),
    "no heads": (dict(num_attention_heads=0), "num_attention_heads"),
    "hidden 0": (dict(hidden_size=0), "hidden_size"),
    "vocabulary negative": (dict(vocab_size=-5), "vocab_size"),
    "vocabulary of another": (dict(vocab_size=300), "embed_tokens"),
    "vocabulary a fraction": (dict(vocab_size=259.5), "vocab_size"),
    "ffn of another": (dict(intermediate_size=10**9), "gate_proj"),
    "groups": (dict(num_key_value_heads=3), "num_key_value_heads"),
    "heads of another": (dict(num_attention_heads=8, num_key_value_heads=8), "k_proj"),
    "positions": (dict(max_position_embeddings=10**12), "max_position_embeddings"),
    "type a list": (dict(model_type=["qwen2"]), "model_type"),
    "architecture a list": (dict(architectures=[["x"]]), "architectures"),
    "tied a word": (dict(tie_word_embeddings="yes"), "tie_word_embeddings"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings(name, models, tmp_path):
    changes, word = BAD[name]
    assert word in refusal(models["qwen2"], tmp_path, **changes)[0]


@pytest.mark.parametrize(
    "kind, changes, word",
    [
        ("qwen3-moe", dict(num_experts=10**6, num_local_experts=10**6), "experts"),
        ("qwen3-moe", dict(num_experts_per_tok=9), "num_experts_per_tok"),
        ("qwen3-moe", dict(moe_intermediate_size=10**8), "experts.0.gate_proj"),
        ("deepseek-v3", dict(kv_lora_rank=10**8), "kv_a_proj_with_mqa"),
        ("deepseek-v3", dict(v_head_dim=None, n_group=0), "n_group"),
    ],
)
def test_mixtures_and_latent_attention(kind, changes, word, models, tmp_path):
    assert word in refusal(models[kind], tmp_path, **changes)[0]
