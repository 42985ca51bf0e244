"""Read bytes at an offset into memory that the caller owns."""

import os

import torch


def fill(fd: int, buffer: torch.Tensor | memoryview, position: int) -> bool:
    """Fill `buffer` (a contiguous CPU tensor, or bytes) from `position` of the file `fd`.

    False where the file ends before.
    """
    if isinstance(buffer, torch.Tensor):
        buffer = memoryview(buffer.reshape(-1).view(torch.uint8).numpy())
    while buffer:
        got = os.preadv(fd, [buffer], position)
        if got <= 0:
            return False
        buffer, position = buffer[got:], position + got
    return True
