"""Random checkpoints and chats for the GPU suite: `python -m tests.gpu.make_model DIR KIND`.

Tiny ones come from tests/hf/tiny.py and tests/chats.py, with rows of pairs and of rewards; `1.5b`
is Qwen2.5-1.5B's shape, `8b` eight layers of Llama 3.1 8B's, with rows long enough to fill packed
ones of 4,096 tokens. `--tiny`: these two as small as the others.
"""

import json
import random
import sys
from pathlib import Path

import torch

from tests.gpu.plan import SHAPES

# What a GPU's kernels take: fp8 asks for multiples of 16, cuDNN's attention for heads of 8 · n.
# Weights half as large at four times the width: a layer does to a rounding what it did.
WIDE = dict(hidden_size=128, intermediate_size=256, initializer_range=0.075)
HEADS = {
    "qwen3-moe": dict(head_dim=32, moe_intermediate_size=64),
    "gemma3": dict(head_dim=32),
}


def make(directory: Path, kind: str, tiny: bool = False) -> None:
    """Write DIR/model, and chats.jsonl, pairs.jsonl, rewards.jsonl beside it."""
    from tests.hf.tiny import tiny_tokenizer

    directory.mkdir(parents=True, exist_ok=True)
    if tiny or kind not in SHAPES:
        _make_tiny(directory, SHAPES[kind][0] if kind in SHAPES else kind)
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    name, shape = SHAPES[kind]
    config = AutoConfig.for_model(name, max_position_embeddings=8192, **shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(directory / "model")
    draw = random.Random(0)
    words = "sum of two numbers is then we add carry and so the answer equals because".split()
    with (directory / "chats.jsonl").open("w") as file:
        for _ in range(400):
            answer = " ".join(draw.choices(words, k=draw.randint(200, 380)))
            turns = [("user", "What is it?"), ("assistant", answer)]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def _make_tiny(directory: Path, kind: str) -> None:
    from tests.chats import write_chats
    from tests.hf.tiny import make_tiny
    from tests.train.preferences import write_pairs

    make_tiny(kind, directory / "model", **WIDE, **HEADS.get(kind, {}))
    rows = write_chats(directory / "chats.jsonl").read_text().splitlines()
    write_pairs(directory / "pairs.jsonl")
    rewarded = [{**json.loads(r), "reward": (1.0, -1.5, 0.5)[n % 3]} for n, r in enumerate(rows)]
    (directory / "rewards.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rewarded))


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2], "--tiny" in sys.argv)
