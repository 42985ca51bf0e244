"""Stock Megatron-LM's own pretrain_gpt.py loads what is written here, at any layout: same loss.

Dense models: mixtures carry the keys of the Transformer Engine spec, which the local spec, the only
one that runs here, does not read (it says so and stops).
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dft.hf.source import open_checkpoint
from tests.hf.test_offline import apart, convert, save_torch_dist
from tests.hf.tiny import make_tiny
from tests.patches.checkouts import copy_scripts, sources
from tests.ranks import run_ranks

VOCABULARY = 264  # Megatron's NullTokenizer adds one to --vocab-size: nothing is padded

FLAGS = """
--distributed-backend gloo --transformer-impl local --use-cpu-initialization
--no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --seq-length 32
--micro-batch-size 2 --global-batch-size 4 --train-iters 1 --lr 1e-9 --min-lr 1e-9
--lr-decay-style constant --mock-data --tokenizer-type NullTokenizer --eval-iters 0
--eval-interval 9 --log-interval 1 --split 98,1,1 --num-workers 0
--no-create-attention-mask-in-dataloader --seed 3 --finetune --no-load-optim --no-load-rng
--vocab-size 263
""".split()


def printed_flags(source: Path) -> list[str]:
    """What `megatron-dft import` prints, as words."""
    from megatron_dft.hf.stock_flags import megatron_flags

    return [w for f in megatron_flags(open_checkpoint(source)) for w in shlex.split(f)]


def stock_loss(tree: str, source: Path, load: Path, tp: int, pp: int) -> tuple[float, list]:
    """Loss of the first step of the stock script, and the micro-batches it was taken on."""
    from megatron_dft.compat.loop import on_training_log
    from megatron_dft.compat.release import skip_built_helpers
    from megatron_dft.cpu import runtime

    runtime.activate()
    skip_built_helpers()
    words = printed_flags(source)
    losses: list[float] = []
    on_training_log(lambda found, call: losses.extend(map(float, found.values())))
    script = Path(tree, "pretrain_gpt.py")
    sys.path.insert(0, tree)
    layout = f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}".split()
    layout += ["--make-vocab-size-divisible-by", str(8 // tp)]  # times TP
    where = ["--load", str(load), "--ckpt-format", "torch_dist"]
    sys.argv = [str(script), *words, *FLAGS, *layout, *where]
    head, guard, main = script.read_text().partition('if __name__ == "__main__":')
    scope: dict[str, Any] = {"__name__": "__main__", "__file__": str(script)}
    exec(compile(head, str(script), "exec"), scope)
    seen: list[Any] = []
    get_batch = scope["get_batch"]

    def remember(*args: Any, **kwargs: Any) -> Any:
        batch = get_batch(*args, **kwargs)
        named = dict(zip(scope["BATCH_KEYS"], batch, strict=True))
        seen.append([named[key] for key in ("tokens", "labels", "loss_mask")])
        return batch

    scope["get_batch"] = remember
    exec(compile(guard + main, str(script), "exec"), scope)
    return (losses[0] if losses else float("nan")), seen


def transformers_loss(source: Path, batches: list) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    total = count = 0.0
    for tokens, labels, mask in batches:
        with torch.no_grad():
            logits = model(tokens).logits.double()
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none"
        )
        total += float((each * mask.flatten()).sum())
        count += float(mask.sum())
    return total / count


@pytest.mark.skipif(
    not any("0.19" in one for one in sources()), reason="set MEGATRON_LM_DIRS to a 0.19 checkout"
)
@pytest.mark.parametrize("kind", ["qwen2"])
def test_stock_megatron_computes_the_same_loss(kind, tmp_path):
    (name,) = [one for one in sources() if "0.19" in one]
    tree = str(copy_scripts(name, tmp_path / "tree"))
    source = make_tiny(kind, tmp_path / "hf" / kind, vocab_size=VOCABULARY)
    # Imported by our loader into TP2 × PP2 ranks, and saved by them.
    run_ranks(save_torch_dist, 4, {kind: source}, tmp_path / "ranks", (2, 2, None), 8, {})
    apart(convert, {kind: source}, tmp_path / "offline")  # and by `megatron-dft import`
    loss, batches = run_ranks(
        stock_loss, 1, tree, source, tmp_path / "ranks" / kind, 1, 1, init=False
    )[0]
    assert loss == pytest.approx(transformers_loss(source, batches), abs=1e-5)
    again = run_ranks(stock_loss, 4, tree, source, tmp_path / "offline" / kind, 2, 2, init=False)[
        -1
    ][0]
    assert again == pytest.approx(loss, abs=1e-5)
