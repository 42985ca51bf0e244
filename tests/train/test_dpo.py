"""DPO over packed pairs equals TRL's DPOTrainer, in every layout, with a frozen model or scores."""

import json
from pathlib import Path

import pytest

from tests.train.launch import flags, run_train, scalars, slow_events
from tests.train.preferences import PAIRS, ROWS, RUN, SEQ_LENGTH, digest, pairs, write_pairs
from tests.train.scored import no_frozen_model, score, score_flags

THEIRS = json.loads((Path(__file__).parent / "trl_dpo.json").read_text())
PACKED = dict(
    loss="dpo", dpo_beta=RUN["beta"], no_packing=None, micro_batch_size=1, seq_length=SEQ_LENGTH,
    global_batch_size=ROWS, lr=RUN["lr"], min_lr=RUN["lr"], weight_decay=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def test_the_figures_are_of_this_model_and_every_step_has_all_pairs(tiny_model, path):
    from megatron_dft.data.dataset import build_dataset
    from megatron_dft.data.options import DatasetOptions
    from megatron_dft.data.spec import RowKind
    from megatron_dft.data.tokenizer import load_tokenizer

    assert digest(tiny_model) == THEIRS["weights"], "run tools/trl_dpo.py"
    options = DatasetOptions(SEQ_LENGTH, RUN["steps"] * ROWS, 1234, rows=RowKind("pairs"))
    data = build_dataset([path], load_tokenizer(tiny_model), options)
    for step in range(RUN["steps"]):
        rows = [data.plan.members(step * ROWS + r) for r in range(ROWS)]
        assert sorted(m // 2 for row in rows for m in row[::2]) == list(range(PAIRS))
        assert sorted(map(len, rows)) == [4, 4, 6, 6], "rows of two and of three pairs"


def _equals_trl(found, kind):
    for step, (ours, theirs) in enumerate(zip(found, THEIRS[kind], strict=False)):
        assert ours["dpo loss"] == pytest.approx(theirs["loss"], abs=1e-4), step
        # At first model and base agree: which answer is ahead, rounding decides.
        for name in theirs.keys() - ({"loss"} if step else {"loss", "rewards/accuracies"}):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-3), (step, name)


# (ranks, steps, TRL's loss_type, flags)
RUNS = {
    "one rank": (1, RUN["steps"], "sigmoid", {}),
    "tp2, sp, head, length-normalised": (
        2,
        5,
        "sigmoid_norm",
        dict(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            loss_route="head",
            dpo_log_probs="mean",
        ),
    ),
    "pp2": (2, 5, "sigmoid", dict(pipeline_model_parallel_size=2)),
    "cp2": (2, 5, "sigmoid", dict(context_parallel_size=2)),
    "dp2": (2, 5, "sigmoid", {}),
}


@pytest.mark.parametrize("case", RUNS)
def test_the_losses_and_figures_are_trl_s(case, tiny_model, path, tmp_path):
    ranks, steps, kind, given = RUNS[case]
    # Each step has all pairs, so an evaluation on them has the figures of the step behind it.
    evaluated = dict(valid_data=path, tensorboard_dir=tmp_path) if steps < RUN["steps"] else {}
    argv = flags(tiny_model, path, **PACKED, train_iters=steps, **evaluated, **given)
    found = run_train(ranks, *argv, before=slow_events)
    assert len(found) == steps
    _equals_trl(found, kind)
    assert found[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert found[-1]["rewards/accuracies"] == 1
    if evaluated:
        _evaluation_equals_trl(scalars(tmp_path), THEIRS[kind][steps])


CHOSEN_TOKENS = sum(len(row["chosen"]) + 1 for row in pairs())  # a byte each, and the end


def _evaluation_equals_trl(found, theirs):
    last = " validation"
    ours = {name.removesuffix(last): v for name, v in found.items() if name.endswith(last)}
    assert ours["dpo loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    for name in theirs.keys() - {"loss"}:
        assert ours[name] == pytest.approx(theirs[name], abs=2e-3), name
    # The cross entropy is that of the preferred answers alone.
    of_chosen = -theirs["logps/chosen"] * PAIRS / CHOSEN_TOKENS
    assert ours["lm loss"] == pytest.approx(of_chosen, abs=1e-3)


def test_stored_scores_serve(tiny_model, path, tmp_path):
    scores = tmp_path / "scores"
    layout = dict(PACKED, tensor_model_parallel_size=2)
    score(2, score_flags(tiny_model, path, scores, **layout))
    argv = flags(tiny_model, path, **PACKED, train_iters=5, dft_reference_scores=scores)
    _equals_trl(run_train(1, *argv, before=no_frozen_model), "sigmoid")
