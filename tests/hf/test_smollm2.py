"""A real model, where the quickstart has unpacked it: the re-exported SmolLM2 says the same."""

from pathlib import Path

import pytest
import torch

from megatron_dft.hf.source import open_checkpoint
from tests.hf.test_offline import apart
from tests.hf.test_round_trip import assert_same_bytes, import_and_export
from tests.ranks import run_ranks

MODEL = Path(__file__).parents[2] / "runs" / "quickstart" / "model"
PROMPTS = [
    "What is 12 + 7?",
    "Name the capital of France.",
    "Write one sentence about the sea.",
    "Is 17 a prime number?",
    "Translate 'good morning' into Spanish.",
]


def answers(directory: Path) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).input_ids
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=16, do_sample=False)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def offline(source: Path, out: Path) -> None:
    from megatron_dft.hf.convert_export import export_checkpoint
    from megatron_dft.hf.convert_import import import_checkpoint

    checkpoint = open_checkpoint(source)
    import_checkpoint(checkpoint, out / "torch_dist")
    export_checkpoint(out / "torch_dist", checkpoint, out / "back")


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="run examples/quickstart.sh first")
def test_the_same_greedy_text_for_five_prompts(tmp_path):
    expected = answers(MODEL)
    print(expected)
    apart(offline, MODEL, tmp_path)
    run_ranks(import_and_export, 3, MODEL, tmp_path / "ranks", (3, 1, None))
    for directory in (tmp_path / "back", tmp_path / "ranks"):
        assert_same_bytes(directory, MODEL)
        assert answers(directory) == expected
