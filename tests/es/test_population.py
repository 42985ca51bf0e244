"""Iterations: they climb, a killed run goes on bit by bit, and ranks share the members."""

import json

import pytest
import torch
import torch.distributed as dist

from megatron_dft.es.log import RewardLog
from megatron_dft.es.population import evolve
from megatron_dft.es.settings import Settings, z_scores
from megatron_dft.es.weights import Weights
from megatron_dft.hf.source import open_checkpoint
from tests.hf.tiny import make_tiny
from tests.ranks import run_ranks

SETTINGS = Settings(population=6, sigma=0.02, alpha=0.02, anchor_decay=0.5, seed=3)
TARGET = 0.3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("es"), num_hidden_layers=1)


def loaded(directory):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model, Weights(model, open_checkpoint(directory))


def fitness(model):
    """Higher where the final norm's weights come near TARGET."""
    return -float((model.model.norm.weight - TARGET).square().mean())


def evolved(directory, out, iterations, stop_after=None, **options):
    """The final weights as one vector, and how many members were evaluated."""
    model, weights = loaded(directory)
    count = 0

    def evaluate(iteration):
        nonlocal count
        if count == stop_after:
            raise KeyboardInterrupt
        count += 1
        return fitness(model)

    log = RewardLog(out, {"seed": SETTINGS.seed}, dist.get_rank() if dist.is_initialized() else 0)
    try:
        evolve(weights, SETTINGS, iterations, evaluate, log, **options)
    finally:
        log.close()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), count


def test_z_scores_have_mean_0_and_deviation_1():
    found = torch.tensor(z_scores([3.0, 1.0, 2.0, 2.5]), dtype=torch.float64)
    assert found.mean().abs() < 1e-12
    assert found.square().mean().item() == pytest.approx(1)
    assert z_scores([0.1 + 0.2, 0.3, 0.3]) == z_scores([0.0, 0.0]) + [0.0]


def test_the_reward_climbs(directory, tmp_path):
    model, _ = loaded(directory)
    before = fitness(model)
    told = []
    _, count = evolved(directory, tmp_path, 15, tell=told.append)
    first, last = (float(line.split("reward ")[1].split()[0]) for line in (told[0], told[-1]))
    assert count == 15 * 6 and len(told) == 15
    assert before == pytest.approx(first, abs=0.02) and last > first + 0.02


def test_a_killed_run_goes_on_bit_by_bit(directory, tmp_path):
    whole, count = evolved(directory, tmp_path / "whole", 3, save_interval=1)
    assert count == 18
    out, again = tmp_path / "killed", 0
    for stop in (0, 4, 9):  # members evaluated before each kill
        with pytest.raises(KeyboardInterrupt):
            evolved(directory, out, 3, stop_after=stop, save_interval=2)
        with open(out / "members.0.jsonl", "a") as file:
            file.write('{"iteration": 2, "mem')  # what a kill leaves of a line
    vector, again = evolved(directory, out, 3, save_interval=2)
    assert again == 18 - 4 - 9
    assert torch.equal(vector, whole)
    lines = [json.loads(line) for line in (out / "members.0.jsonl").read_text().splitlines()]
    assert len(lines) == 18 and len({(r["iteration"], r["member"]) for r in lines}) == 18
    assert [p.name for p in out.glob("master.*")] == ["master.3.safetensors"]


def test_a_run_goes_on_with_more_iterations_and_back_to_fewer(directory, tmp_path):
    whole, _ = evolved(directory, tmp_path / "whole", 4)
    evolved(directory, tmp_path / "parts", 2)
    vector, count = evolved(directory, tmp_path / "parts", 4)
    assert torch.equal(vector, whole) and count == 12
    two, count = evolved(directory, tmp_path / "parts", 2)
    assert count == 0 and torch.equal(two, evolved(directory, tmp_path / "two", 2)[0])


def test_without_its_master_the_log_alone_is_replayed(directory, tmp_path):
    whole, _ = evolved(directory, tmp_path, 3)
    (tmp_path / "master.3.safetensors").unlink()
    vector, count = evolved(directory, tmp_path, 3)
    assert count == 0 and torch.equal(vector, whole)


def test_equal_rewards_move_nothing(directory, tmp_path):
    model, weights = loaded(directory)
    log = RewardLog(tmp_path, {})
    evolve(weights, Settings(population=3), 2, lambda iteration: 0.25, log)
    log.close()
    assert weights.relative_norm() == 0.0


def test_saved_is_called_with_the_restored_model(directory, tmp_path):
    model, weights = loaded(directory)
    seen = []

    def saved(done):
        seen.append((done, fitness(model)))

    log = RewardLog(tmp_path, {})
    evolve(weights, SETTINGS, 5, lambda i: fitness(model), log, save_interval=2, saved=saved)
    log.close()
    assert [done for done, _ in seen] == [2, 4, 5]
    assert seen[-1][1] == fitness(model)


def shared(directory, out):
    return evolved(directory, out, 3)


def test_two_ranks_share_the_members_and_end_alike(directory, tmp_path):
    whole, _ = evolved(directory, tmp_path / "one", 3)
    results = run_ranks(shared, 2, directory, tmp_path / "two")
    assert [count for _, count in results] == [9, 9]
    for vector, _ in results:
        assert torch.equal(vector, whole)


def test_another_runs_directory_is_refused(tmp_path):
    RewardLog(tmp_path, {"sigma": 0.001}).close()
    with pytest.raises(ValueError, match="sigma 0.001, but now it is 0.002"):
        RewardLog(tmp_path, {"sigma": 0.002})
    first = RewardLog(tmp_path, {"sigma": 0.001})
    with pytest.raises(ValueError, match="another process writes"):
        RewardLog(tmp_path, {"sigma": 0.001})
    first.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"population": 1}, "--population: expected 2 or more, got 1"),
        ({"sigma": 0.0}, "--sigma: expected a number above 0"),
        ({"alpha": float("nan")}, "--alpha: expected a number above 0"),
        ({"anchor_decay": 2000.0}, "--anchor-decay 2000.0: expected from 0 to below 1 / alpha"),
        ({"anchor_decay": -1.0}, "--anchor-decay -1.0"),
    ],
)
def test_settings_without_a_meaning(change, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        Settings(**change).check()
