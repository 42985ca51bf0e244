"""`megatron-dft es`: evolution strategies on a checkpoint, rewarded by a verifier."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dft.commands import rollout_flags as flags
from megatron_dft.es.fitness import Fitness, usable
from megatron_dft.es.log import RewardLog
from megatron_dft.es.population import evolve
from megatron_dft.es.settings import Settings
from megatron_dft.es.weights import Weights
from megatron_dft.hf.card import model_card
from megatron_dft.hf.source import HFCheckpoint, open_checkpoint
from megatron_dft.rollout.draws import Decoding
from megatron_dft.rollout.prompt_tokens import PromptTokens
from megatron_dft.rollout.prompts import Skips, fingerprint, read_prompts
from megatron_dft.rollout.transformers_backend import TransformersBackend
from megatron_dft.rollout.verifiers import verifying

SUMMARY = (
    "fine-tune by evolution strategies (arXiv 2509.24372): forward passes and a verifier's rewards"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face directory or name")
    add("--prompts", nargs="+", required=True, metavar="FILE", help="JSON lines or Parquet")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="rewards, resume point, and iteration-N, Hugging Face directories",
    )
    group = parser.add_argument_group("evolution strategies")
    add, paper = group.add_argument, Settings()
    add("--iterations", type=int, required=True, help="in all; a finished run goes on with more")
    add("--population", type=int, default=paper.population, help="N, members (%(default)s)")
    add("--sigma", type=float, default=paper.sigma, help="σ, scale of the noise (%(default)s)")
    add("--alpha", type=float, default=paper.alpha, help="α, learning rate (%(default)s)")
    add(
        "--anchor-decay",
        type=float,
        default=paper.anchor_decay,
        metavar="LAMBDA",
        help="after each step the weights go αλ of the way back to the base (arXiv 2605.30148; "
        "%(default)s)",
    )
    add(
        "--prompts-per-iteration",
        type=int,
        default=0,
        metavar="N",
        help="drawn anew for each iteration, the same for all members (default: all)",
    )
    add(
        "--save-interval",
        type=int,
        default=0,
        metavar="N",
        help="iterations between exports, which a killed run goes on from (default: the end alone)",
    )
    flags.add_prompt_arguments(parser)
    flags.add_decoding_arguments(parser, samples=1)
    parser.set_defaults(temperature=0.0)
    group = parser.add_argument_group("who answers: transformers, in this process")
    add = group.add_argument
    add("--batch-size", type=int, default=64, help="answers drawn at once (%(default)s)")
    add("--device", default="auto", help="cpu, cuda (default: a GPU if any)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model that answers (default: the checkpoint's, float32 on the CPU)",
    )
    add("--trust-remote-code", action="store_true", help="accept a checkpoint's own Python code")
    flags.add_verifier_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Under torchrun the members are shared among the processes, a device each."""
    _check(args)
    how, spec = flags.decoding(args), flags.verifier(args)
    settings = Settings(args.population, args.sigma, args.alpha, args.anchor_decay, seed=args.seed)
    settings.check()
    prompts, skips = read_prompts(args.prompts, flags.shape(args), "--prompts")
    backend = _backend(args, how)
    prompts = usable(prompts, backend, spec.kind, args.max_tokens)
    checkpoint = open_checkpoint(args.model, trust_remote_code=args.trust_remote_code)
    rank = _join()
    with verifying(spec, args.workers) as verify_all:
        weights = Weights(backend.model, checkpoint)
        fitness = Fitness(
            prompts,
            backend,
            verify_all,
            samples=args.samples,
            prompts_per_iteration=args.prompts_per_iteration,
            seed=args.seed,
        )
        log = RewardLog(args.out, _identity(args, settings, how, backend, prompts), rank)
        try:
            evolve(
                weights,
                settings,
                args.iterations,
                fitness,
                log,
                save_interval=args.save_interval,
                saved=lambda n: weights.export(
                    args.out / f"iteration-{n}", _card(checkpoint, settings, n)
                ),
                tell=lambda line: print(line, flush=True) if rank == 0 else None,
            )
        finally:
            log.close()
    if rank == 0:
        _tell(skips, fitness.unusual)
        print(f"{args.out / f'iteration-{args.iterations}'}: {args.iterations} iterations")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _check(args: argparse.Namespace) -> None:
    for flag, least in (
        ("iterations", 1),
        ("prompts_per_iteration", 0),
        ("save_interval", 0),
        ("batch_size", 1),
    ):
        value = getattr(args, flag)
        if value < least:
            name = flag.replace("_", "-")
            raise ValueError(f"--{name}: expected {least} or more, got {value}")


def _backend(args: argparse.Namespace, how: Decoding) -> TransformersBackend:
    device = args.device
    if device == "auto" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    return TransformersBackend(
        args.model,
        how,
        PromptTokens(args.model, flags.rendering(args), args.trust_remote_code),
        batch_size=args.batch_size,
        device=device,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )


def _join() -> int:
    """This process's rank; gloo carries the rewards, which are all that is exchanged."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank() if dist.is_initialized() else 0


def _identity(
    args: argparse.Namespace,
    settings: Settings,
    how: Decoding,
    backend: TransformersBackend,
    prompts: list[Any],
) -> dict[str, Any]:
    """What a resumed run must share."""
    return {
        **asdict(settings),
        **backend.identity(),
        "device": backend.model.device.type,
        "prompts": fingerprint(prompts),
        "prompts_per_iteration": args.prompts_per_iteration,
        "samples": args.samples,
        **asdict(how),
        "stop": list(how.stop),
        **flags.rendering_settings(args),
        "verifier": args.verifier,
        "marker": args.marker,
        "pattern": args.pattern,
        "function": args.function,
        "command": args.command,
    }


def _card(checkpoint: HFCheckpoint, settings: Settings, iterations: int) -> str:
    parameters = {**asdict(settings), "iterations": iterations}
    return model_card(checkpoint, objective="es", parameters=parameters)


def _tell(skips: Skips, unusual: Skips) -> None:
    for what, found in (("skipped rows", skips), ("counted as reward 0", unusual)):
        if found.counts:
            print(f"{what}: {found}", file=sys.stderr)
