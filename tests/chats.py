"""Small chat data sets with answers of very different lengths."""

import json
import random
from pathlib import Path


def write_chats(path: Path, rows: int = 48, seed: int = 0, longest: int = 24) -> Path:
    """Conversations whose supervised share runs from one token to most of the row."""
    draw = random.Random(seed)
    words = ["sum", "two", "seven", "is", "and", "then", "x"]
    with open(path, "w") as file:
        for _ in range(rows):
            question = " ".join(draw.choices(words, k=draw.randint(1, 2)))
            answer = " ".join(draw.choices(words, k=draw.randint(1, 4)))[: draw.randint(1, longest)]
            turns = [("user", question), ("assistant", answer.strip() or "x")]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
