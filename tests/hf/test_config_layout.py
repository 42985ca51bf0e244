"""config.json -> Megatron's arguments, and the layouts that divide."""

import json
import shlex
import sys

import pytest

from megatron_dft.hf.config import TRAINING_DEFAULTS, megatron_args
from megatron_dft.hf.layout import check_layout
from megatron_dft.hf.source import open_checkpoint
from megatron_dft.hf.stock_flags import megatron_flags, megatron_parser
from tests.hf.tiny import KINDS, make_tiny


@pytest.fixture(scope="module")
def parser_namespace():
    from megatron.training.arguments import parse_args

    argv, sys.argv = sys.argv, ["train"]
    try:
        return vars(parse_args())
    finally:
        sys.argv = argv


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = {}

    def get(kind, **changes):
        if kind not in made:
            made[kind] = make_tiny(kind, tmp_path_factory.mktemp(kind))
        if not changes:
            return open_checkpoint(made[kind])
        directory = tmp_path_factory.mktemp("edited")
        for file in made[kind].iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        config = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(config))
        return open_checkpoint(directory)

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_a_destination_of_megatrons_parser(kind, tiny, parser_namespace):
    assert megatron_args(tiny(kind)).keys() <= parser_namespace.keys()


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("gemma")])
def test_the_printed_flags_say_the_same_to_megatrons_parser(kind, tiny):
    words = [word for flag in megatron_flags(tiny(kind)) for word in shlex.split(flag)]
    parsed = vars(megatron_parser().parse_args(words))
    for name, value in megatron_args(tiny(kind)).items():
        if name not in TRAINING_DEFAULTS or "dropout" in name:
            assert parsed[name] == value, name


def test_values_of_a_llama3(tiny):
    a = megatron_args(tiny("llama3"))
    assert a["kv_channels"] == 16 and a["num_query_groups"] == 2 and a["group_query_attention"]
    assert (a["use_rope_scaling"], a["rope_scaling_factor"], a["rotary_base"]) == (True, 8.0, 500.0)
    assert a["untie_embeddings_and_output_weights"] and not a["add_bias_linear"]
    assert a["vocab_size"] == 259


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama", dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        ("llama", dict(attention_bias=True), "attention_bias True"),
        ("llama", dict(mlp_bias=True), "mlp_bias True"),
        ("qwen3", dict(attention_bias=True), "attention_bias True"),
        ("llama", dict(rope_parameters=dict(rope_type="spiral", rope_theta=1e4)), "'spiral'"),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
            "'dynamic'",
        ),
        (
            "llama3",
            dict(
                rope_parameters=dict(
                    rope_type="llama3",
                    rope_theta=500.0,
                    factor=8.0,
                    low_freq_factor=2.0,
                    high_freq_factor=4.0,
                    original_max_position_embeddings=8192,
                )
            ),
            "low_freq_factor 2.0",
        ),
    ],
)
def test_what_megatron_cannot_represent_is_named(kind, changes, named, tiny):
    with pytest.raises(ValueError) as caught:
        megatron_args(tiny(kind, **changes))
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("GptOssForCausalLM", "packed, interleaved and with biases.*DeepSeek-V3"),
        ("GemmaForCausalLM", "Gemma 2 and 3 are"),
        ("Gemma3ForConditionalGeneration", "image encoder"),
        ("Llama4ForCausalLM", "chunked attention"),
        ("MadeUpForCausalLM", "mapped are .*Gemma3ForCausalLM.*LlamaForCausalLM"),
    ],
)
def test_families_that_are_not_mapped_are_named(architecture, reason, tiny):
    with pytest.raises(ValueError, match=f"{architecture}.*{reason}") as caught:
        megatron_args(tiny("llama", architectures=[architecture]))
    assert "\n" not in str(caught.value)


def test_longrope_is_named(tiny):
    rope = dict(
        rope_type="longrope",
        rope_theta=1e4,
        short_factor=[1.0] * 4,
        long_factor=[2.0] * 4,
        original_max_position_embeddings=64,
    )
    with pytest.raises(ValueError, match="longrope"):
        megatron_args(tiny("phi3", rope_parameters=rope))


def test_latent_attention_with_yarn_and_without_query_compression(tiny):
    rope = dict(
        rope_type="yarn",
        rope_theta=1e4,
        factor=40.0,
        original_max_position_embeddings=4096,
        mscale=1.0,
        mscale_all_dim=1.0,
        beta_fast=32,
        beta_slow=1,
    )
    a = megatron_args(tiny("deepseek-v3", rope_parameters=rope, max_position_embeddings=163840))
    assert (a["rope_type"], a["rotary_scaling_factor"], a["mscale_all_dim"]) == ("yarn", 40.0, 1.0)
    with pytest.raises(ValueError, match="beta_fast 16"):
        megatron_args(tiny("deepseek-v3", rope_parameters=rope | dict(beta_fast=16)))


def test_sliding_window_of_some_layers(tiny):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    a = megatron_args(tiny("qwen2", layer_types=kinds, sliding_window=8, use_sliding_window=True))
    assert a["window_size"] == (7, 0) and a["window_attn_skip_freq"] == [0, 1, 0, 1]
    assert "window_size" not in megatron_args(tiny("qwen2"))


@pytest.mark.parametrize(
    "layout",
    [
        {},
        dict(tensor_parallel=2),
        dict(tensor_parallel=4),  # more ranks than key-value heads, but a multiple
        dict(pipeline_parallel=4),
        dict(pipeline_parallel=2, virtual_pipeline=2),
        dict(pipeline_parallel=2, first_stage_layers=1, last_stage_layers=3),
        dict(pipeline_parallel=3, last_stage_layers=2),
    ],
    ids=str,
)
def test_layouts_that_divide(layout, tiny):
    check_layout(tiny("llama"), **layout)


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        (dict(tensor_parallel=3), "--tensor-model-parallel-size 3: the model has 4 attention"),
        (dict(tensor_parallel=8), "--tensor-model-parallel-size 8"),
        (dict(pipeline_parallel=3), "--pipeline-model-parallel-size 3"),
        (dict(pipeline_parallel=8), "--pipeline-model-parallel-size 8"),
        (dict(pipeline_parallel=2, virtual_pipeline=3), "virtual pipeline of 3"),
        (dict(first_stage_layers=2), "--decoder-first-pipeline-num-layers 2"),
        (dict(pipeline_parallel=2, first_stage_layers=1, last_stage_layers=1), "2 of the model's"),
        (dict(pipeline_parallel=3, first_stage_layers=4), "first-pipeline-num-layers 4"),
        (dict(pipeline_parallel=2, last_stage_layers=5), "last-pipeline-num-layers 5"),
        (dict(expert_parallel=2), "has no experts"),
    ],
)
def test_layouts_that_do_not(layout, named, tiny):
    with pytest.raises(ValueError) as caught:
        check_layout(tiny("llama"), **layout)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_six_heads_in_three_groups_do_not_divide_among_two(tmp_path):
    sizes = dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    checkpoint = open_checkpoint(make_tiny("llama", tmp_path / "six", **sizes))
    with pytest.raises(ValueError, match="3 key-value heads"):
        check_layout(checkpoint, tensor_parallel=2)
