"""What TRL's DPOTrainer makes of a tiny model and ten pairs: writes tests/train/trl_dpo.json.

    pip install trl
    PYTHONPATH=. python tools/trl_dpo.py

Every step takes all pairs, so that neither side's order of rows matters. TRL is no dependency of
the package; the file says which release made it, and what the first weights were.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hf.tiny import make_tiny
from tests.train.preferences import PAIRS, RUN, digest, pairs

OUT = Path(__file__).resolve().parents[1] / "tests" / "train" / "trl_dpo.json"
FIGURES = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected",
)  # fmt: skip


class Heard(trl.DPOTrainer):
    """Keeps each step's loss and figures as they are computed, before a log rounds them."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        value = loss[0] if isinstance(loss, tuple) else loss
        metrics = {name: self._metrics["train"][name][-1] for name in FIGURES}
        self.heard.append({"loss": float(value.detach()), **metrics})
        return loss


def run(directory: Path, loss_type: str) -> list[dict[str, float]]:
    """The figures of each step."""
    models = [
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32) for _ in range(2)
    ]
    config = trl.DPOConfig(
        output_dir=str(directory / "out"),
        per_device_train_batch_size=PAIRS,
        max_steps=RUN["steps"],
        learning_rate=RUN["lr"],
        lr_scheduler_type="constant",
        beta=RUN["beta"],
        loss_type=loss_type,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_dropout=True,
    )
    trainer = Heard(
        model=models[0],
        ref_model=models[1],
        args=config,
        train_dataset=Dataset.from_list(pairs()),
        processing_class=AutoTokenizer.from_pretrained(directory),
    )
    trainer.heard = []
    trainer.train()
    return trainer.heard


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = make_tiny("llama", Path(name) / "tiny", vocab_size=259)
        found = {
            "made by": "tools/trl_dpo.py",
            "releases": {m.__name__: m.__version__ for m in (trl, transformers, torch)},
            "weights": digest(directory),
            "sigmoid": run(directory, "sigmoid"),
            "sigmoid_norm": run(directory, "sigmoid_norm"),
        }
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
