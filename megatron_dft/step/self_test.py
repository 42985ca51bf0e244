"""The start-up self-test: does the objective's weight reach the gradient of this very model's loss?

A fused cross entropy that ignores its upstream gradient, or assumes it uniform over tokens, turns
DFT into SFT without a word. So before the first step a few rows go through the loss as training
takes it, in the run's own route, layout, dtype and reference, and the gradient is compared with a
dense one in float64 (dense_gradient.py). Route 1: the model's own cross entropy on random logits of
its whole vocabulary. Route 2: the chunked head on a few vocabulary rows, hidden states cut for
sequence parallelism, d_hidden and dW. The KL is included, some tokens are not supervised, and
conversations differ.

Shapes: b rows of s tokens, V/tp the local vocabulary, R a few rows of it, h hidden size.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from torch import Tensor

from megatron_dft.losses.registry import Objective
from megatron_dft.step.batch import MicroBatch, Packing, ReferenceHead
from megatron_dft.step.chunked_head import output_processor
from megatron_dft.step.dense_gradient import dense_gradient
from megatron_dft.step.loss import token_loss

TOKENS = 16
_VOCABULARY_ROWS = 256
_SEED = 250805629


@dataclass(frozen=True)
class SelfTest:
    """What is tested.

    model: GPTModel with an output layer and its LogitsProbe, unwrapped, training. vocab_size: real
    vocabulary. dtype: of the logits in training; decides the tolerance. kl_coeff: of --kl-coeff.
    """

    model: Any
    objective: Objective
    vocab_size: int
    dtype: torch.dtype
    packing: bool = True
    kl_coeff: float = 0.0

    @property
    def group(self) -> dist.ProcessGroup:
        """The tensor-parallel ranks."""
        return self.model.pg_collection.tp

    @property
    def needs_kl(self) -> bool:
        """Whether the loss looks at a reference's whole distribution."""
        return bool(self.kl_coeff) or "kl" in self.objective.needs

    def run(self, chunked: bool) -> float:
        """The largest error relative to the largest entry of each gradient.

        Args:
            chunked: route 2, else route 1.

        Raises:
            RuntimeError: a gradient is not the objective's.
        """
        return _check_head(self) if chunked else _check_logits(self)


def _generator(number: int) -> torch.Generator:
    """The same random numbers for the same number on every rank."""
    return torch.Generator().manual_seed(_SEED + number)


def _batch(test: SelfTest, vocab_size: int, device: torch.device) -> tuple[MicroBatch, Tensor]:
    """Labels that differ, conversations of several lengths, and uneven upstream gradients."""
    size = dist.get_world_size(test.group)
    tokens = -(-TOKENS // size) * size
    shape = (1, tokens) if test.packing else (2, tokens // 2)
    labels = torch.randperm(vocab_size, generator=_generator(0))[:tokens].view(shape)
    mask = torch.ones(tokens)
    mask[3::6] = 0.0
    mask = mask.view(shape)
    upstream = (torch.rand(shape, generator=_generator(1)) + 0.5).to(device)
    packing = None
    if test.packing:
        edges = torch.tensor([0, 5, 11, tokens], dtype=torch.int32)
        packing = Packing(edges.to(device), int(edges.diff().max()))
    batch = MicroBatch(
        tokens=labels.to(device),
        labels=torch.where(mask.bool(), labels, -100).to(device),
        loss_mask=mask.to(device),
        position_ids=torch.arange(shape[1]).expand(shape).to(device),
        reward=torch.linspace(-1.5, 1.0, tokens).view(shape).to(device),
        packing=packing,
        training=True,
        whole_gradient=True,
    )
    return batch, upstream


def _boosts(batch: MicroBatch, vocab_size: int) -> Tensor:
    """[b, s] added to the target's logit: from hopeless to nearly certain, so that p covers (0, 1).

    In eighths, which bf16 keeps.
    """
    highest = 8.0 + float(torch.tensor(float(vocab_size)).log())
    steps = torch.linspace(0, highest, batch.tokens.numel()).mul(8).round().div(8)
    return steps.view(batch.tokens.shape).to(batch.tokens.device)


def _whole_vocabulary(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[b, s, V] of every rank side by side."""
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _give_reference(batch: MicroBatch, whole: Tensor) -> None:
    """Let a reference differ a little from the model in each target's probability."""
    log_prob = whole.double().log_softmax(-1)
    found = log_prob.gather(-1, batch.labels.clamp(min=0)[..., None]).squeeze(-1)
    noise = torch.randn(found.shape, generator=_generator(2)).to(found.device)
    batch.reference_log_prob = (found + 0.3 * noise).clamp(max=0.0).float()


def _dense(test: SelfTest, whole: Tensor, batch: MicroBatch, upstream: Tensor, reference: Any):
    copies = mpu.get_context_parallel_world_size()
    return dense_gradient(
        whole, batch, upstream, test.objective, test.kl_coeff, reference, copies=copies
    )


def _judge(test: SelfTest, pairs: list[tuple[Tensor, Tensor]], limit: float) -> float:
    """The largest error of (found, expected) over the tensor-parallel ranks."""
    error = 0.0
    for found, expected in pairs:
        pair = torch.stack([(found.double() - expected).abs().max(), expected.abs().max()])
        dist.all_reduce(pair, op=dist.ReduceOp.MAX, group=test.group)
        error = max(error, (pair[0] / pair[1].clamp(min=1e-30)).item())
        if not error <= limit:
            raise RuntimeError(
                f"--loss {test.objective.name}: self-test failed, the weight does not reach the "
                f"gradient (relative error {error:.2g}, limit {limit:g}); a fused cross entropy "
                "may ignore its upstream gradient: drop --cross-entropy-loss-fusion or update "
                "transformer-engine"
            )
    return error


def _check_logits(test: SelfTest) -> float:
    model, group = test.model, test.group
    local = model.output_layer.output_size_per_partition
    device = next(model.parameters()).device
    batch, upstream = _batch(test, test.vocab_size, device)

    def draw(number: int) -> Tensor:
        """A shard [b, s, V/tp] of random logits, another one on each rank."""
        shape = (*batch.tokens.shape, local)
        return torch.randn(shape, generator=_generator(number + group.rank())).to(device)

    ids = torch.arange(local, device=device) + group.rank() * local
    shard = draw(100)
    is_target = ids == batch.tokens[..., None]
    shard = torch.where(is_target, shard + _boosts(batch, test.vocab_size)[..., None], shard)
    shard = shard.to(test.dtype)
    whole, reference = _whole_vocabulary(shard, group), None
    _give_reference(batch, whole)
    if test.needs_kl:
        near = (shard.float() + 0.5 * draw(100_000)).to(test.dtype)
        model.dft_probe.reference_logits = near
        reference = _whole_vocabulary(near, group)

    logits = shard.transpose(0, 1).contiguous().requires_grad_()
    # The cross entropy may overwrite its input, which a leaf does not allow.
    cross_entropy = model.compute_language_model_loss(batch.labels, logits * 1.0)
    found = model.dft_probe.take()
    found.pop("correct", None)
    loss, _, _ = token_loss(batch, cross_entropy, found, test.objective, test.kl_coeff)
    (loss * upstream).sum().backward()
    assert logits.grad is not None
    expected = _dense(test, whole, batch, upstream, reference)
    expected = expected[..., group.rank() * local : (group.rank() + 1) * local]
    # bf16 keeps 8 bits; Megatron's fused cross entropy gives a bf16 gradient even of fp32 logits.
    fp32 = test.dtype == torch.float32 and not model.config.cross_entropy_loss_fusion
    return _judge(test, [(logits.grad.transpose(0, 1), expected)], 1e-5 if fp32 else 2e-2)


def _head_inputs(test: SelfTest, batch: MicroBatch, rows: int) -> tuple[Tensor, Tensor]:
    """hidden [s, b, h] and this rank's weight [R, h], whose product the dtype keeps exactly.

    Each token's hidden state has a 1 in two places and the weights are eighths, so that logits are
    the same numbers in bf16 and in the reference, and no weight lies on the other side of a border.
    """
    width = test.model.config.hidden_size
    tokens, rank = batch.tokens.numel(), test.group.rank()
    weight = torch.randint(-8, 9, (rows, width), generator=_generator(100 + rank)) / 8.0
    flat = batch.tokens.t().reshape(-1).cpu()  # in the order of the hidden states, [s · b]
    boosts = _boosts(batch, rows * test.group.size()).t().reshape(-1).cpu()
    mine = (flat >= rank * rows) & (flat < (rank + 1) * rows)
    places = torch.arange(tokens)
    weight[(flat - rank * rows)[mine], places[mine]] += boosts[mine]
    hidden = torch.zeros(tokens, width)
    hidden[places, places] = 1.0
    hidden[places, (places + 1) % width] += 1.0
    hidden = hidden.view(*batch.tokens.t().shape, width)
    device = batch.tokens.device
    return hidden.to(device, test.dtype), weight.to(device, test.dtype)


def _near(weight: Tensor, rank: int) -> Tensor:
    """The output weight of a reference: eighths away, which bf16 keeps."""
    steps = torch.randint(-2, 3, weight.shape, generator=_generator(200_000 + rank)) / 8.0
    return weight + steps.to(weight)


def _check_head(test: SelfTest) -> float:
    model, group = test.model, test.group
    device = next(model.parameters()).device
    rows = min(_VOCABULARY_ROWS, test.vocab_size // group.size())
    batch, upstream = _batch(test, rows * group.size(), device)
    hidden, weight = _head_inputs(test, batch, rows)
    whole = _whole_vocabulary((hidden.float() @ weight.float().t()).transpose(0, 1), group)
    _give_reference(batch, whole)

    is_cut = model.output_layer.sequence_parallel
    own = hidden.chunk(group.size())[group.rank()] if is_cut else hidden
    reference = None
    if test.needs_kl:
        near = _near(weight, group.rank())
        batch.reference_head = ReferenceHead(own.clone(), near)
        logits = (hidden.float() @ near.float().t()).transpose(0, 1)
        reference = _whole_vocabulary(logits, group)
    own, weight = own.clone().requires_grad_(), weight.requires_grad_()
    loss = output_processor(
        hidden_states=own,
        output_layer=SimpleNamespace(
            weight=weight, sequence_parallel=is_cut, _forward_pre_hooks={}
        ),
        output_weight=None,
        labels=batch.labels,
        context=batch,
    )
    (loss * upstream).sum().backward()
    assert own.grad is not None and weight.grad is not None
    dense = _dense(test, whole, batch, upstream, reference)
    mine = dense[..., group.rank() * rows : (group.rank() + 1) * rows].transpose(0, 1)
    d_hidden = mine @ weight.detach().double()
    dist.all_reduce(d_hidden, group=group)
    if is_cut:
        d_hidden = d_hidden.chunk(group.size())[group.rank()]
    d_weight = torch.einsum("sbr,sbh->rh", mine, hidden.double())
    limit = 1e-4 if test.dtype == torch.float32 else 3e-2
    return _judge(test, [(own.grad, d_hidden), (weight.grad, d_weight)], limit)
