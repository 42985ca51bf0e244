"""The memory and speed in the comments of examples/configs, as `megatron-dft plan` counts them.

    python tools/plan_comments.py            # says which comments are not what plan says; status 1
    python tools/plan_comments.py --write    # writes them

A configuration is sourced by bash, so what it does with recipe.sh counts; the nodes are those of
its `sbatch --nodes N` line, the GPUs H100s. The sizes of the models are those of their config.json.
"""

import argparse
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from megatron_dft.cluster import memory, ranking, speed
from megatron_dft.cluster.model_shape import Shape, shape_of

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
_KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
_LLAMA_8B = ("llama", 4096, 32, 32, 8, 14336, 128256, False)
MODELS: dict[str, tuple[Any, ...]] = {
    "Qwen/Qwen2.5-Math-1.5B": ("qwen2", 1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-Math-7B": ("qwen2", 3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-32B": ("qwen2", 5120, 64, 40, 8, 27648, 152064, False),
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": ("llama", 8192, 80, 64, 8, 28672, 128256, False),
    "deepseek-ai/deepseek-math-7b-base": ("llama", 4096, 30, 32, 32, 11008, 102400, False),
    "Qwen/Qwen3-30B-A3B": ("qwen3_moe", 2048, 48, 32, 4, 6144, 151936, False),
}
_MORE: dict[str, dict[str, int]] = {
    "Qwen/Qwen3-30B-A3B": {
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }
}
_WIDTH = 110
_BEGIN, _END = "# plan: ", "(estimate)."


def shape(model: str) -> Shape:
    """The sizes of a model that a configuration names."""
    return shape_of(dict(zip(_KEYS, MODELS[model], strict=True)) | _MORE.get(model, {}))


def train_args(config: Path) -> dict[str, str]:
    """The configuration's flags and their first values; "" for a flag alone."""
    script = f'. "{config}" && printf "%s\\n" "${{TRAIN_ARGS[@]}}"'
    environment = {"TRAIN_DATA": "x", "RUN_DIR": "x", "PATH": "/usr/bin:/bin"}
    said = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    words, found = said.stdout.split("\n"), {}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            found[word] = "" if after.startswith("--") else after
    return found


def comment(config: Path) -> list[str]:
    """The lines that plan has to say of a configuration."""
    given = train_args(config)
    nodes = re.search(r"sbatch --nodes (\d+)", config.read_text(encoding="utf-8"))
    assert nodes is not None, f"{config} names no nodes"
    job = memory.Job(
        int(given["--seq-length"]),
        int(given["--global-batch-size"]),
        recompute="--recompute-granularity" in given,
        chunk=int(given["--loss-chunk-size"]) if "--loss-chunk-size" in given else None,
    )
    wanted = tuple(
        int(given.get(f"--{name}-parallel-size", 1))
        for name in ("tensor-model", "pipeline-model", "context", "expert-model")
    )
    on = speed.Cluster(speed.GPUS["h100"])
    rows = ranking.ranked(shape(given["--hf-model"]), job, int(nodes[1]), on, on.gpu.gigabytes)
    (row,) = (
        r
        for r in rows
        if (r.layout.tensor, r.layout.pipeline, r.layout.context, r.layout.expert) == wanted
    )
    assert row.share(on.gpu.gigabytes) <= ranking.FULL, f"{config}: too full"
    text = f"{nodes[1]} × 8 H100, {ranking.sentence(row, job, on.gpu.gigabytes)}"
    return textwrap.wrap(_BEGIN + text, _WIDTH, subsequent_indent="# ")


def with_comment(config: Path) -> str:
    """The file's text with plan's lines in the place of those it has."""
    lines = config.read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(_BEGIN))
    end = next(i for i, line in enumerate(lines[begin:], begin) if line.endswith(_END))
    return "\n".join([*lines[:begin], *comment(config), *lines[end + 1 :]]) + "\n"


def configurations() -> list[Path]:
    return [path for path in sorted(CONFIGS.glob("*.sh")) if path.name != "recipe.sh"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    args, stale = parser.parse_args(), 0
    for config in configurations():
        text = with_comment(config)
        if text != config.read_text(encoding="utf-8"):
            stale += 1
            print(f"{config}: {'written' if args.write else 'is not what plan says'}")
            if args.write:
                config.write_text(text, encoding="utf-8")
    return 1 if stale and not args.write else 0


if __name__ == "__main__":
    sys.exit(main())
