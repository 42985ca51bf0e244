"""The losses' kernels under Triton's interpreter, on gloo ranks: no GPU is needed."""

from collections.abc import Callable
from typing import Any

from tests.ranks import run_ranks


def _with_small_tiles(function: Callable[..., Any], block: int, programs: int, *args: Any) -> Any:
    from megatron_dft.losses.kernels import gradient, keep, statistics

    # Small vocabularies then have several tiles, parts and programs, with an odd rest.
    statistics.BLOCK, statistics.PROGRAMS = block, programs
    statistics.SEARCHED_TILES = 2
    gradient.BLOCK_BYTES = 2 * block
    keep.ALIGNED = 8
    return function(*args)


def run_kernels(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    block: int = 32,
    programs: int = 8,
) -> list[Any]:
    """`run_ranks` of a function whose losses run in the kernels, tiles of `block` logits each and
    rows in parts until there are `programs`."""
    return run_ranks(
        _with_small_tiles,
        world_size,
        function,
        block,
        programs,
        *args,
        env={"TRITON_INTERPRET": "1"},
    )
