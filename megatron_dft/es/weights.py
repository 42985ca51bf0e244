"""A checkpoint's weights in float32, and the model in memory that wears them, perturbed or not.

The paper restores a member by subtracting its noise, which leaves a rounding behind at each weight
and member. Here the model's weights are made anew from the float32 copy: restoring is exact, and
updates below half a unit of bfloat16 add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_dft.es.noise import scaled_normal
from megatron_dft.hf import directory
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.storage.safetensors import Reader, read_header
from megatron_dft.storage.safetensors_writer import Writer


def parameters_by_name(
    model: torch.nn.Module, checkpoint: HFCheckpoint
) -> dict[str, torch.nn.Parameter]:
    """Checkpoint name → the model's parameter; of names that share one, the model's first.

    Raises ValueError where transformers holds the weights under other names or in other shapes.
    """
    found: dict[str, torch.nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        info = checkpoint.tensors.get(name)
        if info is None or info.shape != tuple(parameter.shape):
            raise ValueError(
                f"{checkpoint.name}: transformers holds {name!r} in a form that the checkpoint has "
                "not; such architectures cannot be perturbed by name"
            )
        found[name] = parameter
    return found


class Weights:
    """θ_t in float32 on the CPU: `names` in the model's order, θ_0 on disk in `checkpoint`.

    Raises ValueError as `parameters_by_name`.
    """

    def __init__(self, model: torch.nn.Module, checkpoint: HFCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._parameters = parameters_by_name(model, checkpoint)
        # A tied head that the checkpoint stores too follows the tensor it is tied to.
        self._tied = {
            name: next(n for n, p in self._parameters.items() if p is parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if name not in self._parameters
        }
        self._now = {name: self.base(name) for name in self._parameters}

    def base(self, name: str) -> torch.Tensor:
        """θ_0 of one tensor, read from the checkpoint: float32, on the CPU."""
        info = self._checkpoint.tensors[name]
        tensor = torch.empty(info.shape)
        with Reader() as reader:
            reader.read_into(info, 0, tensor)
        return tensor

    @torch.no_grad()
    def perturb(self, seed: int, sigma: float) -> None:
        """The model becomes θ_t + σ ε(seed), tensor by tensor."""
        for name, parameter in self._parameters.items():
            now = self._now[name].to(parameter.device)
            parameter.copy_(now + scaled_normal(sigma, seed, name, now))

    @torch.no_grad()
    def restore(self) -> None:
        """The model becomes θ_t, exactly."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._now[name])

    @torch.no_grad()
    def update(
        self, seeds: Sequence[int], scores: Sequence[float], alpha: float, anchor_decay: float = 0.0
    ) -> None:
        """θ_t ← θ_{t−1} + α/N Σ_n Z_n ε(seed_n), then θ_t ← θ_t − αλ (θ_t − θ_0).

        scores: Z_n, the z-scored rewards. 2509.24372 algorithm 1, with 1/σ inside α; the second
        line is 2605.30148's anchored weight decay with its L2 penalty, λ = anchor_decay. In
        float32, members in order, so that a repetition gives the same bits.
        """
        for name, parameter in self._parameters.items():
            now = self._now[name]
            step = torch.zeros(now.shape, device=parameter.device)
            for seed, score in zip(seeds, scores, strict=True):
                if score:
                    step += scaled_normal(score, seed, name, step)
            now.add_(step.cpu(), alpha=alpha / len(seeds))
            if anchor_decay:
                now.lerp_(self.base(name), alpha * anchor_decay)

    def relative_norm(self) -> float:
        """‖θ_t − θ_0‖ / ‖θ_0‖ over all parameters, a shared one once."""
        moved = whole = 0.0
        for name, now in self._now.items():
            base = self.base(name)
            moved += float((now - base).double().square().sum())
            whole += float(base.double().square().sum())
        return math.sqrt(moved / whole) if whole else 0.0

    def save(self, file: Path) -> None:
        """θ_t in float32 as a safetensors file that is there whole or not at all."""
        part = file.with_name(file.name + ".part")
        part.unlink(missing_ok=True)
        _write(
            part,
            {n: (tuple(t.shape), t.dtype) for n, t in self._now.items()},
            self._now.__getitem__,
        )
        part.replace(file)

    def load(self, file: Path) -> None:
        """What `save` wrote. Raises ValueError where the file is damaged."""
        stored = read_header(file)
        with Reader() as reader:
            for name, tensor in self._now.items():
                if name not in stored or stored[name].shape != tuple(tensor.shape):
                    raise ValueError(f"{file}: does not hold {name!r} of this model; delete it")
                reader.read_into(stored[name], 0, tensor)

    def export(self, out: Path, card: str) -> None:
        """θ_t as a Hugging Face directory: the base's files, names and dtypes."""
        staging = directory.start(self._checkpoint, out, overwrite=True)
        try:
            files: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
            for name, info in self._checkpoint.tensors.items():
                files.setdefault(info.file.name, {})[name] = (info.shape, info.dtype)
            for file, contents in files.items():
                _write(staging / file, contents, self._stored)
            directory.finish(self._checkpoint, staging, out, list(files), dtype=None, card=card)
        except BaseException:
            directory.discard(staging)
            raise

    def _stored(self, name: str) -> torch.Tensor:
        """A tensor as the base stores it, θ_t's where it is perturbed."""
        info = self._checkpoint.tensors[name]
        name = self._tied.get(name, name)
        if name in self._now:
            return self._now[name].to(info.dtype)
        tensor = torch.empty(info.shape, dtype=info.dtype)
        with Reader() as reader:
            reader.read_into(info, 0, tensor)
        return tensor


def _write(
    file: Path,
    contents: dict[str, tuple[tuple[int, ...], torch.dtype]],
    tensor_of: Callable[[str], torch.Tensor],
) -> None:
    writer = Writer(file, contents)
    try:
        for name in contents:
            writer.write(name, tensor_of(name))
    except BaseException:
        writer.abandon()
        raise
    writer.close()
