"""The parts of a GPTModel that the self-test touches; it needs no training run, and no pytest."""

from types import SimpleNamespace

import torch

from megatron_dft.losses import registry

VOCABULARY, HIDDEN = 300, 32
KL = [name for name, entry in registry.OBJECTIVES.items() if "kl" in entry.needs]
CASES = {name: (name, {}, 0.0) for name in registry.OBJECTIVES} | {
    "iw-sft by conversation": ("iw-sft", dict(level="sequence"), 0.0),
    "dft and a KL": ("dft", {}, 0.3),
}


ROUTE_2 = [case for case, (name, _, kl) in CASES.items() if name not in KL and not kl]


def model(objective, sequence_parallel):
    """The parts of a GPTModel that the self-test touches, with Megatron's own cross entropy."""
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
    LogitsProbe(model, objective)
    return model


def run(cases, chunked, dtype, packing=True, cp=1, sp=False):
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
        settings = SimpleNamespace(objective=objective, vocab_size=VOCABULARY)
        chunked_head.settings = lambda s=settings: s
        chunked_head.get_args = lambda: SimpleNamespace(loss_chunk_size=7)
        test = SelfTest(model(objective, sp), objective, VOCABULARY, dtype, packing, kl_coeff)
        try:
            found[case] = test.run(chunked)
        except RuntimeError as error:
            found[case] = str(error)
    return found
