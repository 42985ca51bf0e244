"""Refuse a parallel layout that does not divide the model, before anything is built."""

from megatron_dft.hf.config import megatron_args
from megatron_dft.hf.source import HFCheckpoint


def check_layout(
    checkpoint: HFCheckpoint,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual_pipeline: int | None = None,
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
    expert_parallel: int = 1,
    expert_tensor_parallel: int | None = None,
) -> None:
    """Raise one ValueError naming the flag, the size that does not divide, and layouts that do.

    Sizes are numbers of ranks; `virtual_pipeline` is the number of chunks a rank holds, and the
    stage layers are --decoder-first/last-pipeline-num-layers. Vocabularies of any size divide:
    Megatron pads them, and `padding.mask_padded_vocab` takes the padding out again.
    """
    a = megatron_args(checkpoint)
    tp = tensor_parallel
    _divides("--tensor-model-parallel-size", tp, "attention heads", a["num_attention_heads"])
    groups = a["num_query_groups"]
    if groups % tp and tp % groups:
        raise ValueError(
            f"--tensor-model-parallel-size {tp}: the model has {groups} key-value heads, which "
            f"neither divide among {tp} ranks nor divide it; use {_choices(groups)}"
        )
    _divides("--tensor-model-parallel-size", tp, "MLP hidden units", a["ffn_hidden_size"])
    _check_layers(
        a["num_layers"], pipeline_parallel, virtual_pipeline, first_stage_layers, last_stage_layers
    )
    experts = a.get("num_experts")
    if experts is None:
        if expert_parallel > 1:
            raise ValueError(
                f"--expert-model-parallel-size {expert_parallel}: {checkpoint.architecture} has no "
                "experts; use 1"
            )
        return
    _divides("--expert-model-parallel-size", expert_parallel, "experts", experts)
    etp = tp if expert_tensor_parallel is None else expert_tensor_parallel
    _divides("--expert-tensor-parallel-size", etp, "expert hidden units", a["moe_ffn_hidden_size"])


def _choices(size: int) -> str:
    return ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)


def _divides(flag: str, ranks: int, what: str, size: int) -> None:
    if size % ranks:
        raise ValueError(
            f"{flag} {ranks}: the model has {size} {what}, which do not divide among {ranks} "
            f"ranks; use one of {_choices(size)}"
        )


def _check_layers(
    layers: int, stages: int, virtual: int | None, first: int | None, last: int | None
) -> None:
    rest, middle, said = layers, stages, ""
    for name, count in (("first", first), ("last", last)):
        if count is not None:
            flag = f"--decoder-{name}-pipeline-num-layers {count}"
            if stages == 1:
                raise ValueError(f"{flag} needs --pipeline-model-parallel-size > 1; it is 1")
            said += f" and {flag}"
            rest, middle = rest - count, middle - 1
    if rest < middle or (middle == 0 and rest != 0) or (middle > 0 and rest % middle):
        raise ValueError(
            f"--pipeline-model-parallel-size {stages}{said}: {rest} of the model's {layers} layers "
            f"are left for {middle} stages and do not divide; use one of {_choices(layers)} "
            "stages, or set --decoder-first-pipeline-num-layers and "
            "--decoder-last-pipeline-num-layers to fit"
        )
    if virtual is None:
        return
    parts = {rest // middle} if middle else set()
    parts |= {n for n in (first, last) if n is not None}
    if any(n % virtual for n in parts):
        raise ValueError(
            f"virtual pipeline of {virtual} chunks a stage: stages of {sorted(parts)} layers do "
            "not divide; use a number of chunks that divides each"
        )
