"""A user's mistakes: one line that names the flag and the remedy, before anything is built."""

import json

import pytest

from tests.flags.refused import refused
from tests.train.launch import flags

CASES = {
    "no such directory": (dict(hf_model="/nowhere/model"), ["/nowhere/model"]),
    "unknown loss": (dict(loss="dtf"), ["--loss", "dtf", "dft"]),
    "flag of another loss": (dict(dft_mix_alpha=0.5), ["--dft-mix-alpha", "--loss dft-mix"]),
    "value out of range": (
        dict(loss="dft-mix", dft_mix_alpha=1.5),
        ["--dft-mix-alpha", "1.5", "at most 1"],
    ),
    "contradicting model flag": (
        dict(num_layers=7),
        ["--num-layers", "config.json says 4", "got 7", "leave the flag out"],
    ),
    "contradicting switch": (
        dict(normalization="LayerNorm"),
        ["--normalization", "RMSNorm", "got LayerNorm"],
    ),
    "no data": (dict(train_data=None), ["--train-data"]),
    "a save that is not asynchronous": (
        dict(save="/tmp/none", async_save=True),
        ["--async-save", "--use-persistent-ckpt-worker"],
    ),
    "a writer process on a CPU": (
        dict(save="/tmp/none", async_save=True, use_persistent_ckpt_worker=True),
        ["--async-save", "needs CUDA", "drop it"],
    ),
    "no steps": (dict(train_iters=None), ["--train-iters"]),
    "two lengths": (dict(train_epochs=2), ["--train-epochs 2", "--train-iters 5", "drop one"]),
    "no epoch": (dict(train_iters=None, train_epochs=0), ["--train-epochs", "above 0"]),
    "a warm-up longer than the epochs": (
        dict(train_iters=None, train_epochs=1, lr_warmup_iters=6, lr_decay_style="cosine"),
        ["--lr-warmup-iters", "shorter than --train-iters 6", "got 6"],
    ),
    "a column without a name": (dict(columns=["question"]), ["--columns", "NAME=COLUMN"]),
    "shares in the order of the files": (
        dict(no_shuffle=True, train_data="epochs=2:CHATS"),
        ["--no-shuffle", "--train-data", "drop them"],
    ),
    "no learning rate": (dict(lr=None), ["--lr"]),
    "row longer than the model's positions": (
        dict(seq_length=256),
        ["--seq-length", "128", "256"],
    ),
    "fp16 cross entropy": (dict(fp16_lm_cross_entropy=True), ["--fp16-lm-cross-entropy", "exp"]),
    "MTP over context ranks": (
        dict(mtp_num_layers=1, context_parallel_size=2),
        ["--context-parallel-size", "--mtp-num-layers"],
    ),
    "a weight for no MTP heads": (dict(dft_mtp=True), ["--dft-mtp", "--mtp-num-layers"]),
    "a weight that MTP heads cannot have": (
        dict(mtp_num_layers=1, dft_mtp=True, loss="eaft"),
        ["--dft-mtp", "eaft"],
    ),
    "MTP with a reference": (dict(mtp_num_layers=1, kl_coeff=0.1), ["--mtp-num-layers"]),
    "Megatron's own SFT": (dict(sft=True), ["--sft", "--train-data"]),
    "a dtype for nothing": (dict(save_hf_interval=2), ["--save-hf-interval", "--save-hf"]),
    "checkpoints without an interval": (dict(save="somewhere"), ["--save", "--save-interval"]),
    "an object store": (dict(enable_msc=True), ["--enable-msc", "file system", "copy finished"]),
    "a URL for checkpoints": (
        dict(save="msc://store/run", save_interval=1),
        ["--save: expected a directory", "msc://store/run"],
    ),
    "a card's base that no hub has": (
        dict(save_hf="out", hf_base_model="/m/qwen"),
        ["--hf-base-model", "ORG/NAME", "/m/qwen"],
    ),
    "a card's base without a card": (
        dict(hf_base_model="org/qwen"),
        ["--hf-base-model", "--save-hf"],
    ),
    "a flag that Megatron refuses": (dict(lr_warmup_fraction=0.1, lr_warmup_iters=3), ["warmup"]),
    "evaluation without data": (dict(eval_iters=2), ["--eval-iters", "--valid-data"]),
    "an interval without data": (dict(eval_interval=5), ["--eval-interval 5", "--valid-data"]),
    "data without evaluation": (
        dict(valid_share=0.1, eval_iters=0),
        ["--eval-iters 0", "--valid-share", "drop one"],
    ),
    "whole and in part": (
        dict(valid_share=0.1, eval_iters=1, full_validation=True),
        ["--full-validation", "--eval-iters 1", "drop one"],
    ),
    "never": (dict(valid_share=0.1, eval_interval=0), ["--eval-interval", "at least 1", "0"]),
    "a reference for nothing": (
        dict(dft_reference_model="x"),
        ["--dft-reference-model", "--kl-coeff"],
    ),
    "validation pairs without a reference": (
        dict(loss="dpo", no_packing=None, valid_share=0.1, dft_reference_scores="x"),
        ["--dft-reference-scores", "--valid-share", "drop one"],
    ),
    "KL twice": (dict(loss="asft", kl_coeff=0.1), ["--kl-coeff", "asft"]),
    "a row filter with a KL": (
        dict(loss="asft", loss_row_filter=1e-4),
        ["--loss-row-filter", "KL", "drop one"],
    ),
    "a row filter that drops everything": (
        dict(loss_row_filter=1.5),
        ["--loss-row-filter", "below 1", "1.5"],
    ),
    "no memory for the head": (
        dict(loss_route="head", loss_memory=0),
        ["--loss-memory", "above 0", "1024"],
    ),
    "offloaded activations without Transformer Engine": (
        dict(fine_grained_activation_offloading=True, offload_modules=["core_attn"]),
        ["offloading", "transformer_engine"],
    ),
    "chunks of logits": (
        dict(loss_route="logits", loss_chunk_size=16),
        ["--loss-route logits", "--loss-chunk-size", "drop one"],
    ),
    "a cross entropy that the head does not take": (
        dict(loss_route="head", cross_entropy="megatron"),
        ["--cross-entropy megatron", "--loss-route head", "drop one"],
    ),
    "no chunk": (dict(loss_chunk_size=0), ["--loss-chunk-size", "at least 1"]),
    "a warm-up longer than the run": (
        dict(train_iters=3, lr_warmup_iters=5, lr_decay_style="cosine"),
        ["--lr-warmup-iters", "shorter than --train-iters 3", "got 5"],
    ),
    "full weight where all have it": (
        dict(loss="sft", dft_full_weight="end"),
        ["--dft-full-weight end", "--loss sft"],
    ),
    "full weight of bad answers": (
        dict(loss="rift", dft_full_weight="end"),
        ["--dft-full-weight end", "--loss rift"],
    ),
    "pairs and a KL": (dict(loss="dpo", kl_coeff=0.1), ["--kl-coeff", "--loss dpo"]),
    "pairs that share no row": (dict(loss="dpo"), ["--no-packing", "pair"]),
    "a reference for a weight that is none of p": (
        dict(loss="eaft", dft_weight_from="reference"),
        ["--dft-weight-from reference", "--loss eaft"],
    ),
    "packed micro-batches": (dict(no_packing=None), ["--micro-batch-size", "--no-packing"]),
    "batch that does not divide": (
        dict(global_batch_size=7),
        ["--global-batch-size", "multiple", "7"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(case, tiny_model, chats):
    given, words = CASES[case]
    words_given = flags(tiny_model, chats, **given)
    ((status, text),) = refused(1, [w.replace("CHATS", str(chats)) for w in words_given])
    assert status == 2, text
    line = text.strip().splitlines()[-1]
    assert "Traceback" not in text
    for word in words:
        assert word in line, line


def test_an_evaluation_that_would_read_rows_twice(tiny_model, chats):
    ((status, text),) = refused(1, flags(tiny_model, chats, valid_data=chats, eval_iters=7))
    assert status == 2 and text.count("\n") == 1
    assert "--eval-iters: --valid-data has 6 global batches of 8 rows, got 7" in text


LAYOUTS = {
    "world size": (3, dict(tensor_model_parallel_size=2), ["--tensor-model-parallel-size", "3"]),
    "heads": (3, dict(tensor_model_parallel_size=3), ["--tensor-model-parallel-size 3", "heads"]),
    "layers": (
        3,
        dict(pipeline_model_parallel_size=3),
        ["--pipeline-model-parallel-size 3", "layers"],
    ),
    "context": (
        2,
        dict(context_parallel_size=2, seq_length=66),
        ["--context-parallel-size 2", "--seq-length"],
    ),
    "sequence parallel": (
        2,
        dict(tensor_model_parallel_size=2, sequence_parallel=True, seq_length=63),
        ["--seq-length", "63"],
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_that_do_not_divide(case, tiny_model, chats):
    world_size, given, words = LAYOUTS[case]
    given = {"global_batch_size": 24, "micro_batch_size": 1, **given}
    results = refused(world_size, flags(tiny_model, chats, **given))
    assert [status for status, _ in results] == [2] * world_size
    for word in words:
        assert word in results[0][1], results[0][1]
    # One voice a node.
    assert all(text == "" for _, text in results[1:])


BAD_ROWS = {
    "not JSON": ('{"messages": [', ["chats.jsonl", "2"]),
    "no assistant turn": (
        json.dumps({"messages": [{"role": "user", "content": "a"}]}),
        ["chats.jsonl", "2", "assistant"],
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(case, tiny_model, tmp_path):
    bad, words = BAD_ROWS[case]
    good = json.dumps(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )
    (tmp_path / "chats.jsonl").write_text(f"{good}\n{bad}\n{good}\n")
    out = tmp_path / "out"
    argv = flags(
        tiny_model, tmp_path / "chats.jsonl", save_hf=out, save=tmp_path / "save", save_interval=9
    )
    ((status, text),) = refused(1, argv)
    assert status == 2
    for word in words:
        assert word in text, text
    assert not out.exists() and not (tmp_path / "save").exists()


MODEL_FAULTS = {
    "malformed config": ("config.json", "{", ["config.json"]),
    "architecture": (
        "config.json",
        json.dumps({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}),
        ["BloomForCausalLM"],
    ),
}


@pytest.mark.parametrize("case", MODEL_FAULTS)
def test_a_faulty_model_directory(case, tiny_model, chats, tmp_path):
    import shutil

    name, text, words = MODEL_FAULTS[case]
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / name).write_text(text)
    ((status, said),) = refused(1, flags(model, chats))
    assert status == 2
    for word in words:
        assert word in said, said


def test_an_existing_export_is_not_overwritten(tiny_model, chats, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    ((status, text),) = refused(1, flags(tiny_model, chats, save_hf=tmp_path / "out"))
    assert status == 2 and "--overwrite" in text
