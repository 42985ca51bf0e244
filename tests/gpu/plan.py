"""The runs of the GPU suite: what each is, and what has to hold of it. Nothing is run here.

A run's figures are compared with those of another run, its reference: step 1 and all five steps
have bounds of their own, since a rounding grows with the steps. `limit`: seconds.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMITS = {"start": 60, "parity": 120, "heads": 80, "train": 160, "try": 60}  # seconds a section
# dtype → figure → relative difference at step 1 and at any of five steps. A wrong weight or a lost
# gradient changes the norm by tens of percent.
STEP: dict[str, dict[str, tuple[float, float]]] = {
    "fp32": {"lm loss": (1e-5, 2e-4), "grad_norm": (1e-5, 5e-3)},
    "bf16": {"lm loss": (5e-3, 5e-3), "grad_norm": (3e-2, 6e-2)},
    "fp8": {"lm loss": (2.5e-2, 2.5e-2), "grad_norm": (1e-1, 2e-1)},
}


SHAPES = {
    "1.5b": ("qwen2", dict(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True)),
    "8b": ("llama", dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=8,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False)),
}  # fmt: skip


def parameters(kind: str) -> tuple[int, int]:
    """(weights of the layers, of the output layer) that a token is multiplied with."""
    s = SHAPES[kind][1]
    h, head = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"]
    attention = h * (2 * h + 2 * s["num_key_value_heads"] * head)
    return s["num_hidden_layers"] * (attention + 3 * h * s["intermediate_size"]), h * s[
        "vocab_size"
    ]


@dataclass(frozen=True)
class Run:
    """One process.

    model: a directory of make_model.py. flags: of megatron_dft.train. launch: of launch.py.
    status: expected. says: words in its output. like: the run whose figures it has to have, within
    STEP[bound] (first step, all steps). after: runs that have to end before. counts: False for what
    is tried and only told.
    """

    name: str
    model: str = "llama"
    flags: dict[str, Any] = field(default_factory=dict)
    launch: tuple[str, ...] = ()
    status: int = 0
    says: tuple[str, ...] = ()
    like: str | None = None
    bound: str = "fp32"
    after: tuple[str, ...] = ()
    ranks: int = 1
    counts: bool = True
    limit: int = 100


def command_line(run: Run, work: Path) -> list[str]:
    """The run's command line, without the launcher."""
    given: dict[str, Any] = {
        "hf_model": work / run.model / "model",
        "train_data": work / run.model / "chats.jsonl",
        "seq_length": 128, "global_batch_size": 4, "micro_batch_size": 1, "train_iters": 5,
        "lr": 1e-3, "lr_decay_style": "constant", "seed": 7, "progress": "plain", "loss": "dft",
        "make_vocab_size_divisible_by": 8, "data_cache": work / "cache" / run.name, **run.flags,
    }  # fmt: skip
    found: list[str] = []
    for name, value in given.items():
        if value is None or value is False:
            continue
        found.append("--" + name.replace("_", "-"))
        if value is not True:
            found.append(str(value).replace("WORK", str(work)))
    return found


BF16 = dict(bf16=True)
OVERLAPS = dict(
    bf16=True, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
)
CHUNK = dict(loss_chunk_size=64)
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
NO_TE = ("--hide", "transformer_engine")
CPU = dict(device="cpu")
ALL = dict(save_interval=2, train_iters=2)

START = [
    Run("as-installed", flags=dict(BF16, train_iters=2), says=("machine:", "attention of packed")),
    Run("fused-required", flags=dict(BF16, train_iters=2, require_fused_attention=True)),
    Run("cpu-beside-te", flags=dict(CPU, train_iters=2), says=("running on the CPU",)),
    Run("without-te", flags=dict(no_packing=True, train_iters=2), launch=NO_TE),
    Run("without-te-packed", flags=dict(train_iters=2), launch=NO_TE, status=2,
        says=("--no-packing: expected",)),
    Run("fp8-param-gather", flags=dict(BF16, fp8_format="hybrid", fp8_param_gather=True), status=2,
        says=("--fp8-param-gather",)),
]  # fmt: skip

PARITY = [
    Run("cpu", flags=dict(CPU, save_hf="WORK/out/cpu")),
    Run("cpu-unpacked", flags=dict(CPU, no_packing=True)),
    Run("cpu-asft", flags=dict(CPU, loss="asft")),
    Run("cpu-iw", flags=dict(CPU, loss="iw-sft", dft_iw_level="sequence")),
    Run("cpu-tied", model="llama-tied", flags=CPU),
    Run("cpu-moe", model="qwen3-moe", flags=CPU),
    Run("cpu-gemma3", model="gemma3", flags=CPU),
    Run("te", flags=dict(save_hf="WORK/out/te"), like="cpu"),
    Run("te-unpacked", flags=dict(no_packing=True), like="cpu-unpacked"),
    Run("te-megatron-ce", flags=dict(loss_route="logits", cross_entropy="megatron"), like="cpu"),
    Run("te-logits", flags=dict(loss_route="logits"), like="cpu"),
    Run("te-asft-logits", flags=dict(loss="asft", loss_route="logits"), like="cpu-asft"),
    Run("te-chunk", flags=CHUNK, like="cpu"),
    Run("te-unpacked-chunk", flags=dict(CHUNK, no_packing=True), like="cpu-unpacked"),
    Run("te-tied-chunk", model="llama-tied", flags=CHUNK, like="cpu-tied"),
    Run("te-asft", flags=dict(loss="asft"), like="cpu-asft"),
    Run("te-iw-chunk", flags=dict(CHUNK, loss="iw-sft", dft_iw_level="sequence"), like="cpu-iw"),
    Run("local-unpacked", flags=dict(no_packing=True), launch=NO_TE, like="cpu-unpacked"),
    Run("te-recompute", flags=FULL, like="cpu"),
    Run("te-moe-grouped", model="qwen3-moe", flags=dict(moe_grouped_gemm=True),
        like="cpu-moe", bound="bf16"),
    Run("te-gemma3", model="gemma3", like="cpu-gemma3"),
    Run("bf16-overlaps", flags=OVERLAPS, like="cpu", bound="bf16"),
    Run("bf16-overlaps-chunk", flags=dict(OVERLAPS, **CHUNK), like="cpu", bound="bf16"),
    Run("bf16-fused-ce", flags=dict(BF16, cross_entropy_loss_fusion=True), like="cpu",
        bound="bf16"),
    Run("bf16-selective", flags=dict(BF16, recompute_granularity="selective"), like="cpu",
        bound="bf16"),
    Run("bf16-drift", flags=dict(OVERLAPS, log_drift_interval=2, l2sp_coeff=0.1, kl_coeff=0.1),
        says=("drift at step 4",)),
    Run("fp8", flags=dict(BF16, fp8_format="hybrid", no_packing=True), like="cpu-unpacked",
        bound="fp8"),
    Run("mtp", flags=dict(mtp_num_layers=1, no_packing=True)),
    Run("mtp-chunk", flags=dict(CHUNK, mtp_num_layers=1, no_packing=True,
                                no_gradient_accumulation_fusion=True), like="mtp"),
    Run("mtp-chunk-fused", flags=dict(CHUNK, mtp_num_layers=1, no_packing=True), like="mtp"),
    Run("save-gpu", flags=dict(ALL, save="WORK/ck/gpu")),
    Run("resume-on-cpu", flags=dict(CPU, load="WORK/ck/gpu"), after=("save-gpu",), like="cpu"),
    Run("save-async", flags=dict(ALL, save="WORK/ck/async", async_save=True,
                                 use_persistent_ckpt_worker=True, async_strategy="mcore")),
    Run("resume-async", flags=dict(load="WORK/ck/async"), after=("save-async",), like="cpu"),
    Run("save-cpu", flags=dict(CPU, **ALL, save="WORK/ck/cpu")),
    Run("resume-on-gpu", flags=dict(load="WORK/ck/cpu"), after=("save-cpu",), like="cpu"),
]  # fmt: skip

BIG = dict(seq_length=4096, train_iters=14, lr=1e-5, log_throughput=True, **OVERLAPS,
           data_cache="WORK/cache/big", make_vocab_size_divisible_by=128)  # fmt: skip
FUSED = dict(BIG, require_fused_attention=True)
TRAIN = [
    Run("plain-ce", model="1.5b", flags=dict(FUSED, loss="sft"), launch=("--plain",)),
    Run("dft", model="1.5b", flags=FUSED, launch=("--profile", "WORK/profile.json")),
    Run(
        "dft-megatron-ce",
        model="1.5b",
        flags=dict(FUSED, loss_route="logits", cross_entropy="megatron"),
    ),
    Run("dft-chunk", model="1.5b", flags=dict(FUSED, loss_chunk_size=4096)),
    Run("8b-dft-chunk", model="8b", flags=dict(FUSED, loss_chunk_size=4096)),
]

TRY = [
    Run("tp2-sp-gloo", ranks=2, like="cpu", counts=False, flags=dict(
        distributed_backend="gloo", tensor_model_parallel_size=2, sequence_parallel=True)),
    Run("qat-int8", flags=dict(BF16, qat="int8"), counts=False),
]  # fmt: skip

SECTIONS = {"start": START, "parity": PARITY, "heads": [], "train": TRAIN, "try": TRY}
