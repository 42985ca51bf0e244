"""Gemma 2 and 3: what Megatron's layers lack, in training and against the formulas."""

import json
from argparse import Namespace

import pytest
import torch

from megatron_dft.flags import model, route
from megatron_dft.hf.config import megatron_args, own_layers
from megatron_dft.hf.source import open_checkpoint
from megatron_dft.losses import registry
from tests.chats import write_chats
from tests.hf.tiny import make_tiny
from tests.train.launch import flags, largest_relative_error, run_train, weights

LAYOUTS = {
    "tp2": dict(tensor_model_parallel_size=2),
    "tp2-sp": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": dict(pipeline_model_parallel_size=2),
    "packed-cp2": dict(context_parallel_size=2),
    "packed-tp2-sp-recompute": dict(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    ),
}
PACKED = dict(no_packing=None, micro_batch_size=1, seq_length=96)
CASES = [
    ("gemma2", "tp2", {}),
    ("gemma2", "pp2", {}),
    ("gemma2", "packed-cp2", {}),
    ("gemma3", "tp2-sp", {}),
    ("gemma3", "tp2", dict(loss_chunk_size=16)),
    ("gemma3", "packed-cp2", {}),
    ("gemma3", "packed-tp2-sp-recompute", {}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    out = tmp_path_factory.mktemp("gemma")
    return {kind: make_tiny(kind, out / kind, vocab_size=277) for kind in ("gemma2", "gemma3")}


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    chats = write_chats(out / "chats.jsonl")
    done: dict[str, tuple] = {}

    def get(kind: str, layout: str, **given):
        key = f"{kind}-{layout}-{sorted(given)}"
        if key not in done:
            packed = PACKED if layout.startswith("packed") else {}
            settings = dict(train_iters=3, save_hf=out / key) | packed | given
            argv = flags(models[kind], chats, **settings, **LAYOUTS.get(layout, {}))
            world_size = 2 if layout in LAYOUTS else 1
            done[key] = run_train(world_size, *argv), weights(out / key)
        return done[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGATRON_DFT_DATA_CACHE", str(out / "cache"))
        yield get


@pytest.mark.parametrize(("kind", "layout", "given"), CASES, ids=str)
def test_layouts_train_alike(kind, layout, given, run):
    expected, expected_weights = run(kind, "packed" if layout.startswith("packed") else "single")
    got, trained = run(kind, layout, **given)
    assert len(got) == 3
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for name in ("lm loss", "dft loss", "dft/mean-prob", "dft/token-accuracy", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (step, name)
    assert largest_relative_error(trained, expected_weights) <= 1e-5


def test_the_first_loss_is_that_of_transformers(models, run, tmp_path):
    """Soft-capped logits reach the loss: one step over all conversations, not packed."""
    from transformers import AutoModelForCausalLM

    from megatron_dft.data.dataset import build_dataset
    from megatron_dft.data.options import DatasetOptions
    from megatron_dft.data.tokenizer import load_tokenizer

    chats = write_chats(tmp_path / "chats.jsonl")
    rows = build_dataset(
        [chats], load_tokenizer(models["gemma2"]), DatasetOptions(seq_length=96, seed=1234)
    )
    figures, _ = run("gemma2", "packed-once", train_iters=1, global_batch_size=rows.rows_per_pass)
    model = AutoModelForCausalLM.from_pretrained(models["gemma2"], dtype=torch.float32)
    total = count = 0.0
    for i in range(rows.rows_per_pass):
        row = rows[i]
        edges = row["cu_seqlens"].tolist()
        for a, b in zip(edges, edges[1:], strict=False):
            if b <= a:
                continue
            tokens, labels, mask = (row[k][a:b] for k in ("tokens", "labels", "loss_mask"))
            with torch.no_grad():
                logits = model(torch.as_tensor(tokens)[None]).logits[0].double()
            loss = torch.nn.functional.cross_entropy(
                logits, torch.as_tensor(labels), reduction="none"
            )
            total += float((loss * torch.as_tensor(mask)).sum())
            count += float(mask.sum())
    assert figures[0]["lm loss"] == pytest.approx(total / count, abs=1e-5)


def test_soft_cap_is_the_formula_with_its_gradient():
    from megatron_dft.hf.families.gemma_layers import soft_cap

    x = torch.linspace(-9, 9, 7, dtype=torch.float64, requires_grad=True)
    (soft_cap(x, 3.0) * torch.arange(7)).sum().backward()
    e = torch.exp(2 * x.detach() / 3.0)
    tanh = (e - 1) / (e + 1)
    assert torch.allclose(soft_cap(x, 3.0).detach(), 3.0 * tanh, atol=1e-14)
    assert torch.allclose(x.grad, torch.arange(7) * (1 - tanh**2), atol=1e-14)


def edited(directory, out, **changes):
    out.mkdir()
    for file in directory.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    (out / "config.json").write_text(json.dumps(config))
    return open_checkpoint(out)


def test_the_hubs_spelling_of_gemma3(models, tmp_path):
    hub = edited(
        models["gemma3"], tmp_path / "hub", rope_parameters=None, layer_types=None,
        rope_theta=1_000_000, rope_local_base_freq=10_000, sliding_window_pattern=3,
        rope_scaling=dict(rope_type="linear", factor=8.0),
    )  # fmt: skip
    own, args = own_layers(hub), megatron_args(hub)
    assert own.local_layers == (True, True, False, True)
    assert (own.local_rotary_base, own.position_factor) == (10_000, 8.0)
    assert (args["rotary_base"], args["rotary_seq_len_interpolation_factor"]) == (1_000_000, 8.0)
    assert args["window_attn_skip_freq"] == [1, 1, 0, 1] and args["window_size"] == (6, 0)
    assert own.embedding_scale == 32**0.5 and own.softmax_scale == 24**-0.5
    assert own.logit_softcap is None and own.attention_softcap is None


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("gemma2", dict(hidden_activation="gelu"), "hidden_activation 'gelu'"),
        ("gemma3", dict(attention_bias=True), "attention_bias True"),
        ("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention True"),
        ("gemma3", dict(final_logit_softcapping=30.0), "final_logit_softcapping 30.0"),
        (
            "gemma3",
            dict(
                rope_parameters=dict(
                    full_attention=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0),
                    sliding_attention=dict(rope_type="default", rope_theta=1e4),
                )
            ),
            "rope_type 'dynamic'",
        ),
    ],
)
def test_what_is_not_built_is_named(kind, changes, named, models, tmp_path):
    with pytest.raises(ValueError) as caught:
        megatron_args(edited(models[kind], tmp_path / "edited", **changes))
    assert named in str(caught.value) and "\n" not in str(caught.value)


PLAIN = dict(
    transformer_impl="local",
    loss_chunk_size=None,
    loss_route=None,
    loss_memory=1024.0,
    loss_row_filter=None,
    cross_entropy="auto",
    cross_entropy_loss_fusion=False,
    gradient_accumulation_fusion=False,
    kl_coeff=0.0,
    mtp_num_layers=None,
    qat=None,
    attention_backend=None,
)


def _check(given, checkpoint, on_cpu):
    args = Namespace(**given)
    model.check(args, checkpoint, on_cpu)
    route.check(args, registry.get("dft"), model.head_lacks(checkpoint))


@pytest.mark.parametrize(
    ("kind", "given", "on_cpu", "named"),
    [
        ("gemma2", dict(loss_chunk_size=64), True, "--loss-chunk-size.*4.0.*drop the flag"),
        ("gemma2", dict(transformer_impl="transformer_engine"), False, "--device cuda.*cpu"),
        ("gemma3", {}, False, "--transformer-impl local.*install transformer-engine"),
        ("gemma3", dict(qat="fp8"), True, "--qat.*drop the flag"),
        ("gemma3", dict(mtp_num_layers=1), True, "--mtp-num-layers.*drop the flag"),
        (
            "gemma3",
            dict(attention_backend=Namespace(name="local")),
            True,
            "--attention-backend local.*drop",
        ),
    ],
)
def test_refused_combinations(kind, given, on_cpu, named, models):
    checkpoint = open_checkpoint(models[kind])
    with pytest.raises(ValueError, match=named) as caught:
        _check(PLAIN | given, checkpoint, on_cpu)
    assert "\n" not in str(caught.value)
    _check(PLAIN, checkpoint, True)


def test_a_reference_model_with_other_layers_is_refused(models, tmp_path):
    other = edited(models["gemma2"], tmp_path / "other", final_logit_softcapping=5.0)
    model.same_architecture(open_checkpoint(models["gemma2"]), open_checkpoint(models["gemma2"]))
    with pytest.raises(ValueError, match="--dft-reference-model.*logit_softcap=5.0"):
        model.same_architecture(open_checkpoint(models["gemma2"]), other)
