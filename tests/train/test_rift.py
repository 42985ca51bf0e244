"""RIFT and reward weights in Megatron's loop equal the same training in plain torch."""

import json

import pytest

from tests.train import reference
from tests.train.launch import flags, largest_relative_error, run_train, weights

STEPS, BATCH, WRONG = 3, 8, -0.2


def _reward(number: int) -> float:
    return (1.0, -1.5, 0.0, 0.5)[number % 4]


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory, chats):
    """The chats with a reward each, of either sign and 0."""
    path = tmp_path_factory.mktemp("rewards") / "rewarded.jsonl"
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    lines = [json.dumps({**row, "reward": _reward(n)}) for n, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def _order(tiny_model, chats):
    """Numbers of the conversations of each step."""
    from megatron_dft.data.dataset import build_dataset
    from megatron_dft.data.options import DatasetOptions
    from megatron_dft.data.tokenizer import load_tokenizer

    options = DatasetOptions(64, STEPS * BATCH, 1234, packing=False)
    data = build_dataset([chats], load_tokenizer(tiny_model), options)
    numbers = [int(data.plan.members(i)[0]) for i in range(STEPS * BATCH)]
    return [numbers[s * BATCH : (s + 1) * BATCH] for s in range(STEPS)]


def _loss_of(rewards):
    """The loss of one conversation after another, each with its reward."""
    left = iter(rewards)

    def rift(logits, labels, mask):
        log_p = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
        reward = next(left)
        return ((-reward * (log_p if reward > 0 else log_p.exp())) * mask).sum()

    return rift


LAYOUTS = {
    "logits": (1, {}),
    "head, tp2, sp": (
        2,
        dict(tensor_model_parallel_size=2, sequence_parallel=True, loss_route="head"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rewards_of_either_sign(layout, tiny_model, chats, rewarded, tmp_path):
    ranks, given = LAYOUTS[layout]
    argv = flags(
        tiny_model, rewarded, loss="rift", train_iters=STEPS, save_hf=tmp_path / "out", **given
    )
    curve = run_train(ranks, *argv)
    order, rows = _order(tiny_model, chats), reference.read_rows(tiny_model, chats)
    rewards = [_reward(n) or WRONG for step in order for n in step]
    batches = [[rows[n] for n in step] for step in order]
    expected, state = reference.train(tiny_model, batches, _loss_of(rewards))
    assert [step["lm loss"] for step in curve] == pytest.approx(expected, abs=1e-4)
    trained = weights(tmp_path / "out")
    assert largest_relative_error(trained, {k: state[k] for k in trained}) <= 1e-4
