"""Gaussian noise that depends on seed, tensor name and the element's place alone.

Element (row, column) of a tensor has the same noise in whatever block, shard, or order it is made:
a counter-based generator (Philox4x32-10; Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as
easy as 1, 2, 3", SC11) is asked for that place. A tensor of more axes is a matrix of its first axis
and all others; one of one axis is one row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LANES = 4  # 32-bit words of one counter
# Made at a time: what a CPU's cache holds; for a GPU's launches enough work, in about 1 GiB.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four 32-bit words for each counter of four; all int64 tensors of one shape, not changed."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _product(word: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of word · factor.

    Through factor − 2³², whose product stays within int64.
    """
    product = word * (factor - (1 << 32))
    return ((product >> 32) + word) & _WORD, product & _WORD


def normal(
    seed: int,
    name: str,
    rows: range,
    columns: range,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """N(0, 1) at these places of the matrix `name`: float32 [len(rows), len(columns)].

    The same bits for a place whatever the ranges, on one kind of device; a CPU and a GPU may differ
    in the last digit of the inverse normal distribution function.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
    first = columns.start // _LANES
    count = -(-columns.stop // _LANES) - first
    out = torch.empty(len(rows), len(columns), device=device)
    step = max(_BLOCK_ELEMENTS[out.device.type] // max(count * _LANES, 1), 1)
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        row = torch.arange(start, stop, device=device)[:, None].expand(-1, count)
        column = torch.arange(first, first + count, device=device).expand(stop - start, -1)
        zero = torch.zeros_like(row)
        words = torch.stack(philox4x32((column, row, zero, zero), key), -1).flatten(1)
        words = words[:, columns.start - first * _LANES :][:, : len(columns)]
        # In float64: 32 bits and their half do not fit into float32.
        uniform = (words.double() + 0.5) / (1 << 32)
        out[start - rows.start : stop - rows.start] = torch.special.ndtri(uniform)
    return out


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) under which a tensor of this shape is asked for its noise."""
    if len(shape) < 2:
        return 1, torch.Size(shape).numel()
    return shape[0], torch.Size(shape[1:]).numel()


def normal_like(seed: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor's noise: float32, of its shape, on its device."""
    rows, columns = matrix_shape(tensor.shape)
    return normal(seed, name, range(rows), range(columns), tensor.device).reshape(tensor.shape)


def scaled_normal(scale: float, seed: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """scale · `normal_like`, rounded to float32 before anyone adds it.

    `add(noise, alpha=scale)` rounds once or twice, by how a kernel's loop happens to be cut.
    """
    return normal_like(seed, name, tensor).mul_(scale)


def member_seed(seed: int, iteration: int, member: int) -> int:
    """A number below 2⁶³ for a member of an iteration's population."""
    digest = hashlib.blake2b(f"{seed}:{iteration}:{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
