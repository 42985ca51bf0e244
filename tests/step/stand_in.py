"""The parts of a GPTModel that the self-test touches; it needs no training run, and no pytest."""

from types import SimpleNamespace

import torch

from megatron_dft.losses import registry

VOCABULARY, HIDDEN = 300, 32
CASES = {name: (name, {}, 0.0) for name in registry.OBJECTIVES} | {
    "iw-sft by conversation": ("iw-sft", dict(level="sequence"), 0.0),
    "dft and a KL": ("dft", {}, 0.3),
    "dft by the reference's p": ("dft", dict(weight_from="reference"), 0.0),
    "asft by the reference's p": ("asft", dict(weight_from="reference"), 0.0),
}


def model(objective, sequence_parallel, own=False):
    """The parts of a GPTModel that the self-test touches; own: with our cross entropy."""
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_dft.step.logits_probe import LogitsProbe

    group = mpu.get_tensor_model_parallel_group()

    def compute_language_model_loss(labels, logits):
        loss = vocab_parallel_cross_entropy(logits.float(), labels.t().contiguous(), 0.0, group)
        return loss.transpose(0, 1).contiguous()

    model = SimpleNamespace(
        pg_collection=SimpleNamespace(tp=group),
        config=SimpleNamespace(cross_entropy_loss_fusion=False, hidden_size=HIDDEN),
        output_layer=SimpleNamespace(
            output_size_per_partition=VOCABULARY // group.size(),
            sequence_parallel=sequence_parallel,
        ),
        parameters=lambda: iter([torch.zeros(1, device="cuda")]),
        compute_language_model_loss=compute_language_model_loss,
        training=True,
    )
    LogitsProbe(model, objective, own=own)
    return model


def run(cases, chunked, dtype, packing=True, cp=1, sp=False, own=False):
    """case → the self-test's error, or the message with which it ends the run."""
    from megatron.core import parallel_state as mpu

    from megatron_dft.step import chunked_head
    from megatron_dft.step.self_test import SelfTest

    world = torch.distributed.get_world_size()
    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=world // cp, context_parallel_size=cp
        )
    found = {}
    for case in cases:
        name, parameters, kl_coeff = CASES[case]
        objective = registry.get(name, **parameters)
        route = SimpleNamespace(memory=None, row_filter=None)
        settings = SimpleNamespace(objective=objective, vocab_size=VOCABULARY, route=route)
        args = SimpleNamespace(
            loss_chunk_size=7, kl_coeff=kl_coeff, gradient_accumulation_fusion=False
        )
        chunked_head.settings = lambda s=settings: s
        chunked_head.get_args = lambda a=args: a
        test = SelfTest(model(objective, sp, own), objective, VOCABULARY, dtype, packing, kl_coeff)
        try:
            found[case] = test.run(chunked)
        except RuntimeError as error:
            found[case] = str(error)
    return found
