"""Compile every kernel of the losses for a Hopper GPU, without one, and print what it will use.

    python tools/compile_kernels.py                   # registers, spills, shared memory, bytes
    python tools/compile_kernels.py --capability 80   # another architecture

The package's own functions start the kernels on tensors that have shapes and no memory; what they
would have started is compiled instead. Bytes a logit are what a kernel asks of memory beside a few
numbers a row.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from megatron_dft.losses.kernels.gradient import Upstream, gradient_
from megatron_dft.losses.kernels.likeliest import likeliest
from megatron_dft.losses.kernels.merge import finish
from megatron_dft.losses.kernels.statistics import part_statistics
from megatron_dft.losses.kernels.target_logit import target_logit
from megatron_dft.losses.vocab_statistics import Wanted

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
WANTED = {
    "log p": Wanted(),
    "entropy, Σp²": Wanted(entropy=True, sum_sq_prob=True),
    "KL": Wanted(kl=True),
    "guided KL": Wanted(kl=True, reference_share=0.5),
}
TOP = Wanted(top_k=20)


class Case(NamedTuple):
    name: str
    bytes_a_logit: float
    start: Callable[[], object]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases(tokens: int, vocab: int, hidden: int) -> Iterator[Case]:
    """Every variant of every kernel that the losses start in training."""
    target, row = meta(tokens, dtype=torch.int64), meta(tokens)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        z, name, size = meta(tokens, vocab, dtype=dtype), TYPES[dtype], dtype.itemsize
        for label, want in WANTED.items():
            more = {"reference_nV": z if want.kl else None}
            stats = meta(want.count, tokens)
            upstream = Upstream(
                row,
                row if want.entropy else None,
                row if want.sum_sq_prob else None,
                row if want.kl else None,
            )
            for kind, options in (
                ("all rows", {"ignore_index": -100}),
                ("exact target", {"exact_n": row}),
            ):
                given = (z, target, 0, want)
                yield Case(
                    f"K1 {label}, {kind}, {name}",
                    size * (1 + want.kl),
                    lambda given=given, o={**more, **options}: part_statistics(*given, **o),
                )
                yield Case(
                    f"K2 {label}, {kind}, {name}",
                    size * (2 + want.kl),
                    lambda given=given, o={**more, **options}, s=stats, u=upstream: gradient_(
                        given[0], *given, s, u, **o
                    ),
                )
        yield Case(f"K1 top 20, {name}", size, lambda z=z: part_statistics(z, target, 0, TOP))
        lanes = part_statistics(z, target, 0, TOP)[1]
        yield Case(
            f"likeliest, {name}",
            0.0,
            lambda z=z, lanes=lanes: likeliest(
                z, target, 0, 20, lanes, exact_n=None, ignore_index=-100
            ),
        )
        yield Case(
            f"target logit, {name}",
            0.0,
            lambda t=dtype: target_logit(
                meta(tokens, hidden, dtype=t), meta(vocab, hidden, dtype=t), target, 0, vocab
            ),
        )
    for label, want in WANTED.items():
        parts = meta(8, want.count, tokens)
        yield Case(f"merge {label}", 0.0, lambda p=parts, w=want: finish(p, target, w, -100))


def specialised(kernel: JITFunction, values: dict) -> ASTSource:
    """The kernel as a start with these arguments would compile it."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        fixed = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or fixed:
            signature[name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if signature[name] == "constexpr" or parameter.do_not_specialize:
            continue
        if signature[name][0] == "*" or value % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of the only kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90, help="90 is Hopper")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--ir", help="also print this stage of each: ttgir, ptx")
    options = parser.parse_args()
    target = GPUTarget("cuda", options.capability, 32)
    started: list = []

    def record(self, *args, grid, warmup, **keywords):
        started.append((self, args, keywords))

    JITFunction.run = record
    print(f"{'kernel':<40} warps  registers  spilled bytes  shared bytes  bytes a logit")
    for case in cases(options.tokens, options.vocab, options.hidden):
        if options.only and options.only not in case.name:
            continue
        started.clear()
        case.start()
        kernel, args, keywords = started[0]
        values = dict(zip(kernel.arg_names, args, strict=False)) | keywords
        warps = keywords["num_warps"]
        compiled = triton.compile(
            specialised(kernel, values), target=target, options={"num_warps": warps}
        )
        used = resources(compiled.asm["cubin"])
        print(
            f"{case.name:<40} {warps:>5}  {used['REG']:>9}  {used['STACK'] + used['LOCAL']:>13}  "
            f"{compiled.metadata.shared:>12}  {case.bytes_a_logit:>13g}"
        )
        if options.ir:
            print(compiled.asm[options.ir])


if __name__ == "__main__":
    main()
