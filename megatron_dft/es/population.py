"""Iterations of evolution strategies: perturb, reward, move; a killed run goes on where it was."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_dft.es.log import RewardLog, master_file, newest_master
from megatron_dft.es.noise import member_seed
from megatron_dft.es.settings import Settings, z_scores
from megatron_dft.es.weights import Weights
from megatron_dft.hf.collective import gather

Evaluate = Callable[[int], float]  # iteration → mean reward of the model as it is now
Tell = Callable[[str], None]


def evolve(
    weights: Weights,
    settings: Settings,
    iterations: int,
    evaluate: Evaluate,
    log: RewardLog,
    *,
    save_interval: int = 0,
    saved: Callable[[int], None] = lambda iteration: None,
    tell: Tell = lambda line: None,
) -> None:
    """Bring the weights to `iterations` iterations and leave the model restored to them.

    What the log holds is replayed, not evaluated again. Under torch.distributed each rank holds a
    model of its own, on any device, and evaluates every world-size-th member; rewards alone are
    exchanged, and all ranks take the same step. The float32 weights are kept every `save_interval`
    iterations and at the end, `saved` is called on rank 0 then.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    gather(None)  # no rank reads the log while another still heals its own
    known = log.rewards()
    start = newest_master(log.directory, iterations)
    if start:
        weights.load(master_file(log.directory, start))
    for iteration in range(start, iterations):
        begin = time.monotonic()
        mine = {n: r for (i, n), r in known.items() if i == iteration}
        replayed = len(mine) == settings.population
        for member in range(rank, settings.population, ranks):
            if member in mine:
                continue
            seed = member_seed(settings.seed, iteration, member)
            weights.perturb(seed, settings.sigma)
            mine[member] = evaluate(iteration)
            log.append(iteration, member, seed, mine[member])
        found = {n: r for part in gather(mine) for n, r in part.items()}
        rewards = [found[n] for n in range(settings.population)]
        _step(weights, settings, iteration, rewards)
        done = iteration + 1
        if not replayed:
            tell(_line(done, rewards, weights, time.monotonic() - begin))
        if done == iterations or (save_interval and done % save_interval == 0):
            if rank == 0:
                _keep(weights, log.directory, done)
            weights.restore()
            if rank == 0:
                saved(done)
            gather(None)
    weights.restore()


def _step(weights: Weights, settings: Settings, iteration: int, rewards: list[float]) -> None:
    seeds = [member_seed(settings.seed, iteration, n) for n in range(settings.population)]
    weights.update(seeds, z_scores(rewards), settings.alpha, settings.anchor_decay)


def _keep(weights: Weights, directory: Path, done: int) -> None:
    """The newest weights take the place of those before."""
    before = newest_master(directory, done - 1)
    weights.save(master_file(directory, done))
    if before:
        master_file(directory, before).unlink()


def _line(done: int, rewards: list[float], weights: Weights, seconds: float) -> str:
    return (
        f"iteration {done}: reward {statistics.fmean(rewards):.4f} (members {min(rewards):.4f} to "
        f"{max(rewards):.4f}), relative norm {weights.relative_norm():.3e}, {seconds:.1f} s"
    )
