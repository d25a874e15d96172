"""Self-labelling for task graphs: the best of many sampled schedules is the teacher of the next round. And groups of
runs under the same noise, for the policy gradient that follows (`group_gradient`).

Corsini, Porrello, Calderara, Dell'Amico: Self-labeling the job shop scheduling problem, NeurIPS 2024. Where a plan or a
rule does better on an instance than all samples, it is imitated instead: so the first rounds are the warm start (by
CP-SAT's plans, HEFT's, searched rules ...), and there is one loop and one loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..envs.soc_dag.env import loss_of
from ..envs.soc_dag.rule import Rule
from ..envs.soc_dag.sim import Simulator, start
from ..envs.soc_dag.spec import SocDagSpec
from ..envs.soc_dag.state import empty_decision
from ..envs.soc_dag.workload import Workload
from .compiled import DeepSetsWeights, pack_weights
from .networks import PointerNetwork
from .soc_dag import Log, empty_desk, empty_log, log_rule, play, sample_best


class Instance(NamedTuple):
    """Jobs to learn from."""

    spec: SocDagSpec
    workload: Workload
    seed: int
    """Of the noise."""
    rules: Sequence[Rule]
    """What is imitated where it does better than the samples: plans of this very instance, or online rules."""
    samples: int
    """Schedules to draw, the greedy one included. 0: none; the first rule labels what the policy visits."""
    share: float = 1.0
    """Share of the states that is kept, drawn at random: long runs need not have more of a say than short ones."""


FOLLOWED = 0.1
"""Share of its own choices that a rule gets while it labels what the policy visits."""

Draw = Callable[[np.random.Generator, int], Instance]
"""draw(rng, round)"""


class Labelled(NamedTuple):
    """One schedule to imitate."""

    log: Log
    returns: np.ndarray  # (T,) float32 minus what the objective still grew by after each decision
    greedy: float
    """The objective of the greedy schedule; nan if there are no samples."""
    best: float
    """Of the schedule to imitate."""
    is_own: bool
    """It is a sample, not a rule's."""


def label(instance: Instance, weights: DeepSetsWeights, temperature: float, seed: int) -> Labelled:
    """The best schedule of an instance: of the policy's samples and the instance's rules."""
    spec, workload, samples = instance.spec, instance.workload, instance.samples
    simulator = Simulator(spec.replace(binding="late"))
    simulator.reset(workload, instance.seed)
    sim, decision = simulator.sim, empty_decision()
    rows, room = spec.num_candidates, 4 * workload.num_tasks
    desk = empty_desk(rows, len(sim.state.pes), len(sim.state.jobs), len(sim.state.tasks))
    log, losses = empty_log(room, rows), np.full(max(samples, 1), np.nan)
    if samples > 0:
        sample_best(sim, weights, desk, log, decision, samples, temperature, seed, losses)
    best, is_own, share = float(losses.min()), True, 1.0 if samples > 0 else FOLLOWED
    for rule in instance.rules:
        other, memory = empty_log(room, rows), rule.new_memory(sim.state)
        start(sim)
        log_rule(sim, rule.decide_kernel, rule.param_array, memory, weights, share, seed, desk, other, decision)
        if not loss_of(sim) >= best:  # nan: there are no samples
            log, best, is_own = other, float(loss_of(sim)), False
    log = thinned(log, instance.share, np.random.default_rng(seed))
    return Labelled(log, (log.loss - best).astype(np.float32), float(losses[0]), best, is_own)


def thinned(log: Log, share: float, rng: np.random.Generator) -> Log:
    """A copy of what is written in a log, of which each decision is kept with this chance."""
    kept = np.flatnonzero(rng.random(int(log.written[0])) < share)
    return Log._make([*(array[kept] for array in log[:-1]), log.written])


class BestOfSamples:
    """A `self_label.Labeller`: draws instances and labels each by the best schedule that is found.

    Args:
        draw: instances to learn from.
        instances: in a round.
        seed: of instances and samples.
        temperature: of the samples.
    """

    def __init__(self, draw: Draw, instances: int, seed: int = 0, temperature: float = 1.0) -> None:
        self.draw, self.instances, self.seed, self.temperature = draw, instances, seed, temperature

    def __call__(self, network: PointerNetwork, index: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """States of the best schedules, the share of these that are samples, and how much worse greedy ones are."""
        rng = np.random.default_rng([self.seed, index])
        weights, schedules = None, []
        for _ in range(self.instances):
            instance = self.draw(rng, index)
            if weights is None:
                weights = pack_weights(network, instance.spec.num_candidates)
            schedules.append(label(instance, weights, self.temperature, int(rng.integers(1 << 30))))
        figures = {
            "own": float(np.mean([one.is_own for one in schedules])),
            "greedy_over_best": float(np.nanmean([one.greedy / one.best for one in schedules if one.best > 0])),
        }
        return states_of(schedules), figures


def states_of(schedules: Sequence[Labelled]) -> dict[str, torch.Tensor]:
    """The states of schedules, named as in `clone.LabelledStates.store`."""
    names = {"context": "context", "candidates": "candidates", "action_mask": "action_mask", "labels": "actions"}
    store = {
        key: torch.from_numpy(np.concatenate([getattr(one.log, field) for one in schedules]))
        for key, field in names.items()
    }
    return store | {"returns": torch.from_numpy(np.concatenate([one.returns for one in schedules]))}


class GroupsOfRuns:
    """A `group_gradient.Player`: sampled runs of noisy instances, in groups that share jobs and noise.

    The advantage of a run's decisions is how much less than the mean of its group it lost, as a share of that.

    Args:
        draw: instances to play; their `samples` are the runs of a group, their rules are not used.
        instances: groups in a round.
        share: of the states that is learned from, drawn at random.
        seed: of instances and samples.
    """

    def __init__(self, draw: Draw, instances: int, share: float = 0.3, seed: int = 0) -> None:
        self.draw, self.instances, self.share, self.seed = draw, instances, share, seed

    def __call__(self, network: PointerNetwork, index: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """States of the runs with their advantages, and the mean spread of a group."""
        rng = np.random.default_rng([self.seed, index, 1])
        parts: dict[str, list[np.ndarray]] = {key: [] for key in ("context", "candidates", "action_mask", "actions")}
        weights, advantages, spreads = None, [], []
        for _ in range(self.instances):
            instance = self.draw(rng, index)
            if weights is None:
                weights = pack_weights(network, instance.spec.num_candidates)
            logs, losses = play_group(instance, weights, self.share, rng)
            gains = (1.0 - losses / losses.mean()).astype(np.float32)
            advantages.append(np.repeat(gains, [len(log.actions) for log in logs]))
            spreads.append(float(gains.std()))
            for key, arrays in parts.items():
                arrays += [getattr(log, key) for log in logs]
        states = {key: torch.from_numpy(np.concatenate(arrays)) for key, arrays in parts.items()}
        states["advantages"] = torch.from_numpy(np.concatenate(advantages))
        return states, {"spread": float(np.mean(spreads))}


def play_group(
    instance: Instance, weights: DeepSetsWeights, share: float, rng: np.random.Generator
) -> tuple[list[Log], np.ndarray]:
    """What was seen and chosen in `instance.samples` sampled runs, thinned to `share`, and each one's objective."""
    spec, workload = instance.spec, instance.workload
    simulator = Simulator(spec.replace(binding="late"))
    simulator.reset(workload, instance.seed)
    sim, rows = simulator.sim, spec.num_candidates
    desk = empty_desk(rows, len(sim.state.pes), len(sim.state.jobs), len(sim.state.tasks))
    log, decision = empty_log(4 * workload.num_tasks, rows), empty_decision()
    logs, losses = [], []
    for _ in range(instance.samples):
        seed = int(rng.integers(1 << 30))
        losses.append(play(sim, weights, desk, log, decision, 1.0, seed))
        logs.append(thinned(log, share, rng))
    return logs, np.array(losses)
