"""Flags that sample, verify and evaluate share, and what they come to."""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_dft.rollout.chat import Rendering
from megatron_dft.rollout.draws import Backend, Decoding
from megatron_dft.rollout.prompts import Shape, parse_columns
from megatron_dft.rollout.verifiers import KINDS, VerifierSpec

BACKENDS = ("auto", "transformers", "vllm")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="FIELD=COLUMN",
        help="where prompt, messages and answer stand, as prompt=question answer=solution; of "
        "several columns (prompt=question,problem) the first present one counts",
    )
    group.add_argument("--system", help="system message for prompts that have none")
    group.add_argument(
        "--prompt-template", metavar="TEXT", help="the user's message, {prompt} in its place"
    )
    group.add_argument(
        "--raw", action="store_true", help="continue the prompt's text, without a chat template"
    )
    group.add_argument(
        "--chat-template", metavar="FILE", help="Jinja file in place of the tokenizer's template"
    )
    group.add_argument(
        "--chat-template-args", metavar="JSON", help="variables for the chat template"
    )


def add_decoding_arguments(parser: argparse.ArgumentParser, samples: int) -> None:
    group = parser.add_argument_group("decoding")
    add = group.add_argument
    add("--samples", type=int, default=samples, metavar="N", help="a prompt (%(default)s)")
    add("--temperature", type=float, default=1.0, help="0 is greedy (%(default)s)")
    add("--top-p", type=float, default=1.0, help="nucleus sampling (%(default)s)")
    add("--max-tokens", type=int, default=1024, help="longest answer [tokens] (%(default)s)")
    add("--seed", type=int, default=1, help="a sample's own seed comes from it (%(default)s)")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end an answer")


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who answers")
    add = group.add_argument
    add(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="in this process: vllm where it is installed and a GPU is there, else transformers",
    )
    add("--endpoint", metavar="URL", help="an OpenAI-compatible server instead, up to /v1")
    add("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="holds the server's key")
    add("--concurrency", type=int, default=32, help="requests at a time (%(default)s)")
    add("--timeout", type=float, default=600.0, help="[seconds] of a request (%(default)s)")
    add("--retries", type=int, default=5, help="of a request (%(default)s)")
    add("--batch-size", type=int, help="answers drawn at once (transformers 64, vllm 4096)")
    add("--device", default="auto", help="for transformers: cpu, cuda (default: a GPU if any)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="default: the checkpoint's, float32 on the CPU",
    )
    add("--tensor-parallel-size", type=int, default=1, help="GPUs for vllm (%(default)s)")
    add("--trust-remote-code", action="store_true", help="accept a checkpoint's own Python code")
    add(
        "--part",
        default="0/1",
        metavar="I/N",
        help="this process draws every N-th prompt from the I-th on; N processes fill one "
        "directory together",
    )


def add_verifier_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("verifier")
    add = group.add_argument
    add("--verifier", choices=KINDS, required=True, help="math needs megatron-dft[verify]")
    add("--marker", metavar="TEXT", help="math, exact: the answer follows its last occurrence")
    add("--pattern", metavar="REGEX", help="regex: the last match, or its first group, counts")
    add(
        "--function",
        metavar="MODULE:NAME",
        help="python: called as f(text, answer, messages), returns a number or a bool; also "
        "FILE.py:NAME",
    )
    add(
        "--command",
        help="command: run in a fresh folder with response.txt, code.txt and answer.txt, no "
        "network; exit status 0 is right",
    )
    add("--time-limit", type=float, default=10.0, help="[seconds] a sample (%(default)s)")
    add("--memory-limit", type=int, default=2048, help="[MiB] of a command (%(default)s)")
    add("--workers", type=int, help="samples verified at a time (default: one a core)")
    add("--threshold", type=float, default=1.0, help="reward from which on a sample is correct")


def shape(args: argparse.Namespace) -> Shape:
    if args.raw and args.system is not None:
        raise ValueError("--raw and --system: a text has no system message; leave one out")
    return Shape(parse_columns(args.columns), args.system, args.prompt_template)


def decoding(args: argparse.Namespace) -> Decoding:
    how = Decoding(args.temperature, args.top_p, args.max_tokens, args.seed, tuple(args.stop))
    how.check(args.samples)
    return how


def part(args: argparse.Namespace) -> tuple[int, int]:
    """(I, N) of --part."""
    words = args.part.split("/")
    if len(words) != 2 or not all(w.isdecimal() for w in words):
        raise ValueError(f"--part {args.part!r}: expected I/N, as 0/8")
    mine, parts = map(int, words)
    if mine >= parts:
        raise ValueError(f"--part {args.part}: expected I from 0 to N − 1")
    return mine, parts


def verifier(args: argparse.Namespace) -> VerifierSpec:
    spec = VerifierSpec(
        args.verifier,
        marker=args.marker,
        pattern=args.pattern,
        function=args.function,
        command=args.command,
        seconds=args.time_limit,
        memory_mib=args.memory_limit,
    )
    spec.check()
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers: expected 1 or more, got {args.workers}")
    return spec


def rendering_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the samples depend on beside model and decoding."""
    template = _template(args)
    return {"raw": args.raw, "chat_template": template, "chat_template_args": _variables(args)}


def backend(args: argparse.Namespace, model: str, how: Decoding) -> Backend:
    """The backend that the flags name. Raises ValueError where it cannot be had."""
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size: expected 1 or more, got {args.batch_size}")
    if args.endpoint:
        return _endpoint(args, model, how)
    from megatron_dft.rollout.prompt_tokens import PromptTokens

    prompts = PromptTokens(model, rendering(args), args.trust_remote_code)
    sizes = {} if args.batch_size is None else {"batch_size": args.batch_size}
    common: dict[str, Any] = {
        **sizes,
        "dtype": args.dtype,
        "trust_remote_code": args.trust_remote_code,
    }
    if _use_vllm(args):
        from megatron_dft.rollout.vllm_backend import VllmBackend

        parallel = args.tensor_parallel_size
        return VllmBackend(model, how, prompts, tensor_parallel_size=parallel, **common)
    if args.tensor_parallel_size != 1:
        raise ValueError("--tensor-parallel-size: transformers takes one GPU; use --backend vllm")
    from megatron_dft.rollout.transformers_backend import TransformersBackend

    return TransformersBackend(model, how, prompts, device=args.device, **common)


def rendering(args: argparse.Namespace) -> Rendering:
    return Rendering(args.raw, _template(args), _variables(args))


def _endpoint(args: argparse.Namespace, model: str, how: Decoding) -> Backend:
    for flag in ("chat_template", "chat_template_args"):
        if getattr(args, flag) is not None:
            name = flag.replace("_", "-")
            raise ValueError(f"--{name}: the server renders the prompts; set it there")
    if args.backend != "auto":
        raise ValueError(f"--backend {args.backend} and --endpoint: leave one out")
    from megatron_dft.rollout.endpoint_backend import EndpointBackend

    return EndpointBackend(
        args.endpoint,
        model,
        how,
        raw=args.raw,
        key=os.environ.get(args.api_key_env),
        concurrency=args.concurrency,
        timeout=args.timeout,
        retries=args.retries,
    )


def _use_vllm(args: argparse.Namespace) -> bool:
    installed = importlib.util.find_spec("vllm") is not None
    if args.backend == "vllm" and not installed:
        raise ValueError("--backend vllm: it is not installed; pip install vllm, or leave it out")
    if args.backend != "auto" or not installed:
        return args.backend == "vllm"
    import torch

    gpu = torch.cuda.is_available() and not args.device.startswith("cpu")
    print(f"backend: {'vllm' if gpu else 'transformers'}", file=sys.stderr)
    return gpu


def _template(args: argparse.Namespace) -> str | None:
    if args.chat_template is None:
        return None
    try:
        return Path(args.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {args.chat_template!r}: {error}") from None


def _variables(args: argparse.Namespace) -> dict[str, Any]:
    try:
        found = json.loads(args.chat_template_args or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("--chat-template-args: expected a JSON object, as '{\"a\": true}'")
    return found
