"""The runs of the GPU suite, section by section; plan.py says what a run is."""

from tests.gpu.plan import Run

BF16 = dict(bf16=True)
SHARDED = dict(use_distributed_optimizer=True)
OVERLAPS = dict(BF16, **SHARDED, overlap_grad_reduce=True, overlap_param_gather=True)
CHUNK = dict(loss_chunk_size=64)
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
SELECTIVE = dict(recompute_granularity="selective")
UNPACKED = dict(no_packing=True)
LENS = dict(log_drift_interval=2, l2sp_coeff=0.1, kl_coeff=0.1)
ROUTERS = dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.05,
               moe_z_loss_coeff=0.01)  # fmt: skip
NO_TE = ("--hide", "transformer_engine")
APEX = "fused_weight_gradient_mlp_cuda"
NO_APEX = ("--hide", "apex", "--hide", APEX)
CPU = dict(device="cpu")
OWN_LAYERS = "the CPU runtime's own layers take it"
CAPTURE = "a CPU has no graph to capture"
TE_ATTENTION = "Transformer Engine's attention is asked"
TWO = dict(train_iters=2)
HALF = dict(TWO, save_interval=2)
# A head of multi-token prediction starts from random weights: all runs go on from one checkpoint.
MTP_START = dict(CPU, **UNPACKED, mtp_num_layers=1, train_iters=1, save_interval=1)
MTP = dict(UNPACKED, mtp_num_layers=1, load="WORK/ck/mtp")
MTP_TIED = dict(MTP, load="WORK/ck/mtp-tied")
ITERATIVE = dict(CHUNK, loss="iw-sft", dft_iw_level="sequence")


def _out(name: str) -> dict:
    return dict(save_hf=f"WORK/out/{name}")


START = [
    Run("as-installed", flags=dict(BF16, **TWO),
        says=("machine:", "software:", "gradient accumulation fusion:", "attention of packed")),
    Run("te-alone", flags=dict(BF16, **TWO), launch=NO_APEX,
        says=("gradient accumulation fusion: cuBLAS",), gpu="the runtime hides both packages"),
    Run("te-and-apex", flags=dict(BF16, **TWO), packages=("transformer_engine", APEX),
        says=("gradient accumulation fusion: apex",)),
    Run("without-te", flags=dict(UNPACKED, **TWO), launch=NO_TE),
    Run("without-te-packed", flags=TWO, launch=NO_TE, status=2, says=("--no-packing: expected",),
        gpu=OWN_LAYERS),
    Run("without-te-fp8", flags=dict(BF16, **UNPACKED, fp8_format="hybrid"), launch=NO_TE,
        status=2, says=("--fp8", "transformer-engine"), gpu=OWN_LAYERS),
    Run("without-te-grouped", model="qwen3-moe", flags=dict(UNPACKED, moe_grouped_gemm=True),
        launch=NO_TE, status=2, says=("--moe-grouped-gemm",), gpu=OWN_LAYERS),
    Run("cpu-beside-te", flags=dict(CPU, **TWO), says=("running on the CPU",)),
    Run("fused-required", flags=dict(BF16, **TWO, require_fused_attention=True),
        gpu=TE_ATTENTION),
    Run("unfused-warns", flags=dict(BF16, **TWO, attention_backend="unfused"),
        says=("warning: attention is unfused", "LD_LIBRARY_PATH"), gpu=TE_ATTENTION),
    Run("unfused-refused", flags=dict(BF16, **TWO, attention_backend="unfused",
                                      require_fused_attention=True),
        status=2, says=("--require-fused-attention: expected fused",), gpu=TE_ATTENTION),
    Run("fp8-param-gather", flags=dict(BF16, fp8_format="hybrid", fp8_param_gather=True), status=2,
        says=("--fp8-param-gather",)),
    # Its status is of a node that has nothing else to do.
    Run("preflight", program=("megatron_dft.cli", "preflight", "--run-dir", "WORK/preflight",
                              "--procs-per-node", "1", "--need-gb", "1", "--nodes-only"),
        flags=BF16, status=None, says=("machine:", "attention of packed rows:")),
]  # fmt: skip

ON_CPU = [
    Run("cpu", flags=dict(CPU, **_out("cpu"))),
    Run("cpu-unpacked", flags=dict(CPU, **UNPACKED)),
    Run("cpu-tied", model="llama-tied", flags=dict(CPU, **_out("cpu-tied"))),
    Run("cpu-moe", model="qwen3-moe", flags=dict(CPU, **ROUTERS)),
    Run("mtp-start", flags=dict(MTP_START, save="WORK/ck/mtp")),
    Run("mtp-tied-start", model="llama-tied", flags=dict(MTP_START, save="WORK/ck/mtp-tied")),
    Run("cpu-asft", flags=dict(CPU, loss="asft")),
    Run("cpu-iw", flags=dict(CPU, **ITERATIVE)),
    Run("cpu-drift", flags=dict(CPU, **LENS)),
    Run("cpu-dpo", data="pairs.jsonl", flags=dict(CPU, loss="dpo")),
    Run("cpu-rift", data="rewards.jsonl", flags=dict(CPU, loss="rift")),
    Run("cpu-gemma3", model="gemma3", flags=CPU),
    Run("save-cpu", flags=dict(CPU, **HALF, save="WORK/ck/cpu")),
    Run("save-cpu-sharded", flags=dict(CPU, **HALF, **SHARDED, save="WORK/ck/cpu-sharded")),
    Run("cpu-mtp", flags=dict(CPU, **MTP), after=("mtp-start",)),
    Run("cpu-mtp-tied", model="llama-tied", flags=dict(CPU, **MTP_TIED), after=("mtp-tied-start",)),
]  # fmt: skip

RIGHT = [
    Run("te", flags=_out("te"), like="cpu"),
    Run("te-chunk", flags=dict(CHUNK, **_out("te-chunk")), like="cpu"),
    Run("te-logits", flags=dict(loss_route="logits"), like="cpu"),
    Run("te-unpacked", flags=UNPACKED, like="cpu-unpacked"),
    Run("te-unpacked-chunk", flags=dict(UNPACKED, **CHUNK), like="cpu-unpacked"),
    Run("te-unpacked-logits", flags=dict(UNPACKED, loss_route="logits"), like="cpu-unpacked"),
    Run("local-unpacked", flags=UNPACKED, launch=NO_TE, like="cpu-unpacked"),
    Run("te-megatron-ce", flags=dict(loss_route="logits", cross_entropy="megatron"), like="cpu"),
    Run("bf16-overlaps", flags=OVERLAPS, like="cpu", bound="bf16"),
    Run("bf16-overlaps-chunk", flags=dict(OVERLAPS, **CHUNK), like="cpu", bound="bf16"),
    Run("save-gpu", flags=dict(HALF, save="WORK/ck/gpu")),
    Run("resume-on-cpu", flags=dict(CPU, load="WORK/ck/gpu", **_out("resumed-cpu")),
        after=("save-gpu",), like="cpu"),
    Run("resume-on-gpu", flags=dict(load="WORK/ck/cpu", **_out("resumed-gpu")),
        after=("save-cpu",), like="cpu"),
    Run("save-gpu-sharded", flags=dict(HALF, **SHARDED, save="WORK/ck/gpu-sharded")),
    Run("resume-on-cpu-sharded", flags=dict(CPU, **SHARDED, load="WORK/ck/gpu-sharded"),
        after=("save-gpu-sharded",), like="cpu"),
    Run("resume-on-gpu-sharded", flags=dict(SHARDED, load="WORK/ck/cpu-sharded"),
        after=("save-cpu-sharded",), like="cpu"),
    Run("te-tied-chunk", model="llama-tied", flags=dict(CHUNK, **_out("te-tied")),
        like="cpu-tied"),
    Run("te-mtp", flags=MTP, after=("mtp-start",), like="cpu-mtp"),
    Run("te-mtp-chunk", flags=dict(MTP, **CHUNK), after=("mtp-start",), like="cpu-mtp"),
    Run("te-mtp-chunk-unfused", flags=dict(MTP, **CHUNK, no_gradient_accumulation_fusion=True),
        after=("mtp-start",), like="cpu-mtp"),
    Run("te-mtp-tied-chunk", model="llama-tied", flags=dict(MTP_TIED, **CHUNK),
        after=("mtp-tied-start",), like="cpu-mtp-tied"),
    Run("te-recompute", flags=FULL, like="cpu"),
    Run("te-selective", flags=SELECTIVE, like="cpu"),
    Run("te-offload", like="cpu", launch=("--env", "NVTE_CPU_OFFLOAD_V1=1"),
        flags=dict(fine_grained_activation_offloading=True, min_offloaded_tensor_size=1,
                   offload_modules=["core_attn", "attn_proj", "qkv_linear"]),
        gpu="Megatron offloads with Transformer Engine alone"),
    Run("te-moe", model="qwen3-moe", flags=ROUTERS, like="cpu-moe", bound="experts"),
    Run("te-moe-grouped", model="qwen3-moe", flags=dict(ROUTERS, moe_grouped_gemm=True),
        like="cpu-moe", bound="experts"),
    Run("te-gemma3", model="gemma3", like="cpu-gemma3"),
    Run("te-asft", flags=dict(loss="asft"), like="cpu-asft"),
    Run("te-asft-logits", flags=dict(loss="asft", loss_route="logits"), like="cpu-asft"),
    Run("te-iw-chunk", flags=ITERATIVE, like="cpu-iw"),
    Run("te-drift", flags=LENS, says=("drift at step 4",), like="cpu-drift"),
    Run("te-dpo", data="pairs.jsonl", flags=dict(loss="dpo"), like="cpu-dpo"),
    Run("te-rift", data="rewards.jsonl", flags=dict(loss="rift"), like="cpu-rift"),
    Run("bf16-recompute", flags=dict(OVERLAPS, **FULL), like="cpu", bound="bf16"),
    Run("bf16-selective", flags=dict(OVERLAPS, **SELECTIVE), like="cpu", bound="bf16"),
    Run("bf16-drift", flags=dict(OVERLAPS, **LENS), says=("drift at step 4",), like="cpu-drift",
        bound="bf16"),
    Run("bf16-fused-ce", flags=dict(BF16, cross_entropy_loss_fusion=True), like="cpu",
        bound="bf16"),
    Run("fp8", flags=dict(BF16, **UNPACKED, fp8_format="hybrid"), like="cpu-unpacked", bound="fp8",
        gpu="fp8 is Transformer Engine's"),
    Run("save-async", flags=dict(HALF, save="WORK/ck/async", async_save=True,
                                 use_persistent_ckpt_worker=True, async_strategy="mcore"),
        says=("checkpoint: ",)),
    Run("resume-async", flags=dict(load="WORK/ck/async"), after=("save-async",), like="cpu"),
    Run("qat-refused", flags=dict(BF16, qat="int8"), launch=("--hide", "modelopt"), status=2,
        says=("--qat int8: needs nvidia-modelopt",)),
    Run("qat-cpu", flags=dict(CPU, qat="int8"), packages=("modelopt",)),
    Run("qat", flags=dict(qat="int8"), packages=("modelopt",), like="qat-cpu", bound="bf16"),
]  # fmt: skip

PARITY = [*ON_CPU, *RIGHT]

BIG = dict(seq_length=4096, train_iters=14, lr=1e-5, log_throughput=True, **OVERLAPS,
           data_cache="WORK/cache/big", make_vocab_size_divisible_by=128,
           require_fused_attention=True)  # fmt: skip
WHOLE_CHUNK = dict(BIG, loss_chunk_size=4096)
TRAIN = [
    Run("plain-ce", model="1.5b", flags=dict(BIG, loss="sft"), launch=("--plain",)),
    Run("dft", model="1.5b", flags=BIG, launch=("--profile", "WORK/profile.json")),
    Run("8b-dft-chunk", model="8b", flags=WHOLE_CHUNK),
    Run("dft-chunk", model="1.5b", flags=WHOLE_CHUNK),
    Run("dft-drift-anchor", model="1.5b", counts=False,
        flags=dict(BIG, log_drift_interval=5, l2sp_coeff=1e-3)),
    Run("asft-reference", model="1.5b", flags=dict(BIG, loss="asft"), counts=False),
    Run("dft-megatron-ce", model="1.5b", counts=False,
        flags=dict(BIG, loss_route="logits", cross_entropy="megatron")),
]  # fmt: skip

TP2 = dict(distributed_backend="gloo", tensor_model_parallel_size=2)
TRY = [
    Run("tp2-gloo", ranks=2, like="cpu", counts=False, launch=("--share-gpu",), flags=TP2),
    Run("tp2-sp-gloo", ranks=2, like="cpu", counts=False, launch=("--share-gpu",),
        flags=dict(TP2, sequence_parallel=True)),
    # What is refused, since nobody has seen it run: with the refusal lifted.
    Run("graphs-local", like="cpu-unpacked", counts=False, launch=("--allow", "cuda_graph_impl"),
        flags=dict(UNPACKED, cuda_graph_impl="local"), gpu=CAPTURE),
    Run("graphs-te", like="cpu-unpacked", counts=False, launch=("--allow", "cuda_graph_impl"),
        flags=dict(UNPACKED, cuda_graph_impl="transformer_engine"), gpu=CAPTURE),
    Run("megatron-fsdp", like="cpu", counts=False, launch=("--allow", "use_megatron_fsdp"),
        flags=dict(BF16, use_megatron_fsdp=True), gpu="its device mesh is CUDA's", bound="bf16"),
]  # fmt: skip

SECTIONS = {"start": START, "parity": PARITY, "heads": [], "train": TRAIN, "try": TRY}
EVERY = {run.name: run for runs in SECTIONS.values() for run in runs}
