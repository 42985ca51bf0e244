"""`megatron-dft COMMAND`: one command line for everything.

A command is a module with SUMMARY, add_arguments(parser) and run(args) → exit status, or with
main(words) → exit status; it is imported only when it is called, so that `megatron-dft --help` is
quick.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from megatron_dft import __version__
from megatron_dft.storage import terminal

USER_ERROR = 2

# name → (module, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("megatron_dft.commands.train", "fine-tune a model with DFT or another of its family"),
    "import": ("megatron_dft.commands.import_hf", "Hugging Face checkpoint → Megatron torch_dist"),
    "export": ("megatron_dft.commands.export_hf", "Megatron torch_dist → Hugging Face checkpoint"),
    "inspect-data": ("megatron_dft.commands.inspect_data", "statistics and masks of chat data"),
    "drift": ("megatron_dft.commands.drift", "what fine-tuning did to the weights"),
    "retention": ("megatron_dft.commands.retention", "what the tuned model still knows"),
    "diagnose": ("megatron_dft.commands.diagnose", "is DFT the right loss for this data?"),
    "compare": ("megatron_dft.commands.compare", "a table and curves of your own runs"),
    "score": (
        "megatron_dft.commands.score",
        "a reference's log-probabilities, for iw-sft, psft, dpo",
    ),
    "sample": ("megatron_dft.commands.sample", "samples of a model to each prompt"),
    "verify": ("megatron_dft.commands.verify", "reward samples, keep what verifies, for training"),
    "evaluate": ("megatron_dft.commands.evaluate", "pass@1, Avg@k, maj@k of checkpoints on sets"),
    "es": ("megatron_dft.commands.es", "evolution strategies, rewarded by a verifier"),
    "plan": ("megatron_dft.commands.plan", "layouts and memory for a job"),
    "preflight": ("megatron_dft.commands.preflight", "check the nodes of an allocation"),
    "patch": ("megatron_dft.commands.patch", "put --loss into a stock Megatron-LM checkout"),
}


def _usage() -> str:
    lines = [
        "usage: megatron-dft COMMAND [options]; megatron-dft COMMAND --help for its options",
        "",
    ]
    lines += [f"  {name:14}{summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "On several nodes: torchrun … -m megatron_dft.train, with the flags of train"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on standard error and status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else USER_ERROR
    if words[0] == "--version":
        print(__version__)
        return 0
    name, *rest = words
    if name not in COMMANDS:
        print(f"megatron-dft: no command {name!r}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return USER_ERROR
    module = importlib.import_module(COMMANDS[name][0])
    if hasattr(module, "main"):  # it has a parser of its own
        return module.main(rest)
    parser = argparse.ArgumentParser(prog=f"megatron-dft {name}", description=module.SUMMARY)
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    try:
        return module.run(args)
    except ValueError as error:
        line = terminal.visible(" ".join(str(error).split()))
        print(f"megatron-dft {name}: {line}", file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
