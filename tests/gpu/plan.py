"""What a run of the GPU suite is, and its command line; lines.py has the runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Seconds: of the whole, of each section. A run of a tiny model is about 20 s of start and 3 s of
# steps, 14 share the 16 cores; a run of the 1.5B model is about 12 s beside its imports, which
# happen while the one before it trains, and 14 steps of 0.7 s.
WHOLE = 420
LIMITS = {"start": 60, "parity": 130, "train": 155, "heads": 75, "try": 60}
DEFAULT = ("start", "parity", "train", "heads")  # what is worth most comes first

SHAPES = {
    "1.5b": ("qwen2", dict(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True)),
    "8b": ("llama", dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=8,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False)),
}  # fmt: skip


def parameters(kind: str) -> tuple[int, int]:
    """(weights of the layers, of the output layer) that a token is multiplied with."""
    s = SHAPES[kind][1]
    h, head = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"]
    attention = h * (2 * h + 2 * s["num_key_value_heads"] * head)
    return s["num_hidden_layers"] * (attention + 3 * h * s["intermediate_size"]), h * s[
        "vocab_size"
    ]


@dataclass(frozen=True)
class Run:
    """One process.

    model: a directory of make_model.py. data: its file there. flags: of megatron_dft.train.
    launch: of launch.py. program: another program in their place, its words. status: expected;
    None: any. says: words in its output. like: the run whose figures, and exported weights where
    both export, it has to have within BOUNDS[bound]. after: runs that have to end before. ranks:
    processes, all on the one GPU. counts: False for what is tried and only told. packages: without
    one of them the run is skipped. gpu: why it means nothing without a GPU. limit: seconds.
    """

    name: str
    model: str = "llama"
    data: str = "chats.jsonl"
    flags: dict[str, Any] = field(default_factory=dict)
    launch: tuple[str, ...] = ()
    program: tuple[str, ...] = ()
    status: int | None = 0
    says: tuple[str, ...] = ()
    like: str | None = None
    bound: str = "fp32"
    after: tuple[str, ...] = ()
    ranks: int = 1
    counts: bool = True
    packages: tuple[str, ...] = ()
    gpu: str = ""
    limit: int = 100

    @property
    def awaited(self) -> tuple[str, ...]:
        """What has to end before this run is judged."""
        return (*self.after, *([self.like] if self.like else []))


def command_line(run: Run, work: Path) -> list[str]:
    """The run's flags of megatron_dft.train."""
    given: dict[str, Any] = {
        "hf_model": work / run.model / "model",
        "train_data": work / run.model / run.data,
        "seq_length": 128, "global_batch_size": 4, "micro_batch_size": 1, "train_iters": 5,
        "lr": 1e-3, "lr_decay_style": "constant", "seed": 7, "progress": "plain", "loss": "dft",
        "make_vocab_size_divisible_by": 8, "data_cache": work / "cache" / run.name, **run.flags,
    }  # fmt: skip
    found: list[str] = []
    for name, value in given.items():
        if value is None or value is False:
            continue
        found.append("--" + name.replace("_", "-"))
        words = [] if value is True else value if isinstance(value, list) else [value]
        found += [str(word).replace("WORK", str(work)) for word in words]
    return found
