"""GRPO by TRL's GRPOTrainer on the prompts, the verifier and the start model of everything else.

    pip install trl
    python examples/compare/grpo.py --model start --prompts train.jsonl --verifier exact \\
        --marker '####' --steps 200 --lr 1e-6 --out grpo

Nothing of the algorithm is ours: prompts are read and rendered as `megatron-dft sample` does,
rewards come from `megatron-dft verify`'s verifiers, TRL does the rest. OUT is a Hugging Face
directory, for `megatron-dft evaluate`, `drift` and `retention`. A sample that the verifier cannot
judge has no reward, which TRL leaves out of its group's mean.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from megatron_dft.commands import rollout_flags as flags
from megatron_dft.rollout.chat import raw_text
from megatron_dft.rollout.prompts import Prompt, read_prompts
from megatron_dft.rollout.verdict import Task
from megatron_dft.rollout.verifiers import VerifyAll, verifying


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face directory or name")
    add("--prompts", nargs="+", required=True, metavar="FILE", help="JSON lines or Parquet")
    add("--out", type=Path, required=True, metavar="DIR", help="the tuned model")
    add("--steps", type=int, required=True, help="optimizer steps")
    add("--save-interval", type=int, default=0, metavar="STEPS", help="also write DIR-step-N")
    add("--lr", type=float, default=1e-6, help="cosine, a tenth of warm-up (%(default)s)")
    add("--batch", type=int, default=64, help="completions of a step (%(default)s)")
    add("--group", type=int, default=8, help="completions of a prompt (%(default)s)")
    add("--beta", type=float, default=0.0, help="coefficient of the KL (%(default)s)")
    add("--loss-type", default="grpo", help="TRL's word: grpo, dapo, dr_grpo (%(default)s)")
    add("--max-tokens", type=int, default=512, help="longest answer [tokens] (%(default)s)")
    add("--temperature", type=float, default=1.0, help="(%(default)s)")
    add("--seed", type=int, default=1, help="(%(default)s)")
    flags.add_prompt_arguments(parser)
    flags.add_verifier_arguments(parser)
    args = parser.parse_args(argv)
    if args.batch % args.group:
        parser.error(f"--batch {args.batch}: expected a multiple of --group {args.group}")
    return args


def rows(prompts: Sequence[Prompt], raw: bool) -> list[dict[str, Any]]:
    """TRL's rows: the prompt as text or conversation, and the number that finds it again."""
    return [
        {"prompt": raw_text(p.messages) if raw else p.messages, "number": p.number} for p in prompts
    ]


def reward(prompts: Sequence[Prompt], verify_all: VerifyAll) -> Callable[..., list[float | None]]:
    """A reward function as TRL calls it: one number a completion, None where none can be told."""
    by_number = {p.number: p for p in prompts}

    def verified(completions: Sequence[Any], number: Sequence[int], **_: Any) -> list[float | None]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        asked = [by_number[n] for n in number]
        tasks = [Task(p.messages, t, p.answer) for p, t in zip(asked, texts, strict=True)]
        return [verdict.reward for verdict in verify_all(tasks, lambda done: None)]

    return verified


class Snapshots(TrainerCallback):
    """Writes OUT-step-N every `interval` steps."""

    def __init__(self, out: Path, interval: int, tokenizer: Any) -> None:
        self._out, self._interval, self._tokenizer = out, interval, tokenizer

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._interval and state.global_step % self._interval == 0:
            write(model, self._tokenizer, Path(f"{self._out}-step-{state.global_step}"))


def write(model: Any, tokenizer: Any, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def config(args: argparse.Namespace) -> Any:
    from trl import GRPOConfig

    gpu = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=str(args.out.with_name(args.out.name + ".trl")),
        max_steps=args.steps,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(args.steps // 10, 1),
        weight_decay=0.01,
        max_grad_norm=1.0,
        per_device_train_batch_size=args.batch,
        num_generations=args.group,
        max_completion_length=args.max_tokens,
        temperature=args.temperature,
        beta=args.beta,
        loss_type=args.loss_type,
        seed=args.seed,
        bf16=gpu,
        use_cpu=not gpu,
        gradient_checkpointing=gpu,
        save_strategy="no",
        report_to="none",
        logging_steps=max(args.steps // 20, 1),
        disable_tqdm=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    try:
        from trl import GRPOTrainer
    except ImportError as error:
        print(f"error: {error}; pip install trl", file=sys.stderr)
        return 2
    from datasets import Dataset

    try:
        spec = flags.verifier(args)
        prompts, skips = read_prompts(args.prompts, flags.shape(args), "--prompts")
        rendering = flags.rendering(args)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        rendering.check(tokenizer, args.model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if skips.counts:
        print(f"skipped rows: {skips}", file=sys.stderr)
    if rendering.template:
        tokenizer.chat_template = rendering.template
    with verifying(spec, args.workers) as verify_all:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            args=config(args),
            reward_funcs=reward(prompts, verify_all),
            train_dataset=Dataset.from_list(rows(prompts, args.raw)),
            processing_class=tokenizer,
            callbacks=[Snapshots(args.out, args.save_interval, tokenizer)],
        )
        trainer.train()
    write(trainer.model, tokenizer, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
