"""A pointer network that evicts, bypasses and prefetches by the learned scores: compiled, over the env's action table.

It sees what `ExpertCachingVectorEnv` shows of tasks with advice: the same kernels write both.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..envs.core.kernel import njit
from ..envs.expert_caching.affinity import Affinity
from ..envs.expert_caching.sim import Simulator
from ..envs.expert_caching.state import Decision, State
from ..envs.expert_caching.table import (
    FEATURE_VERSION,
    NUM_CANDIDATE,
    NUM_CONTEXT,
    Table,
    choose,
    empty_table,
    next_choice,
    open_epoch,
    write_candidates,
    write_context,
    write_mask,
)
from .checkpoint import load_checkpoint
from .compiled import DeepSetsWeights, deepsets_choose, pack_weights
from .expert_caching import SHIPPED, LearnedEviction, Memory, Weights, advise, load_eviction, run_learned

ENV_ID = "schedlab/ExpertCaching-v0"


class Brain(NamedTuple):
    """What `PointerCaching` decides by."""

    weights: Weights
    pointer: DeepSetsWeights
    affinity: Affinity


class Desk(NamedTuple):
    """What it works on. C, F and K as in `table.py`."""

    memory: Memory
    table: Table
    context: np.ndarray  # (C,) float32
    candidates: np.ndarray  # (K, F) float32
    mask: np.ndarray  # (K,) bool
    logits: np.ndarray  # (K,) float32


@njit(cache=True)
def decide_pointer(state: State, brain: Brain, desk: Desk, decision: Decision) -> None:
    """`advise`, then one row of the action table after the other, as in the env. Called in every epoch, in order."""
    table = desk.table
    advise(state, brain.weights, desk.memory)
    open_epoch(state, table, brain.affinity)
    filled = len(desk.candidates)
    while next_choice(state, table, decision):
        write_context(state, table, decision, desk.context)
        write_candidates(state, table, filled, desk.candidates)
        write_mask(state, table, desk.mask)
        filled = table.head[0].num_rows
        action = deepsets_choose(brain.pointer, desk.context, desk.candidates, desk.mask, desk.logits)
        if action < 0 or not np.isfinite(desk.logits[action]):
            raise ValueError("the policy's logits are not finite")
        choose(state, table, decision, action)


class PointerCaching(LearnedEviction):
    """A pointer network over the action table, fed with the learned scores, as a `Policy`.

    It was trained without affinities: the scores say more.

    Args:
        name: shown in results.
        weights: of the scores.
        top_k: experts a token of the model that the weights are for.
        pointer: from `compiled.pack_weights`.
        num_candidates: rows of the table (`ExpertCachingSpec.num_candidates`).
    """

    def __init__(self, name: str, weights: Weights, top_k: int, pointer: DeepSetsWeights, num_candidates: int) -> None:
        super().__init__(name, weights, top_k)
        self.num_candidates = num_candidates
        self.brain = Brain(weights, pointer, Affinity.unknown(*self.shape[:2]))

    def reset(self, state: State) -> None:
        """Forget the previous run. Raises InputError if the weights are for a model of another shape."""
        super().reset(state)
        rows = self.num_candidates
        self.desk = Desk(
            self.memory,
            empty_table(rows, self.shape[1]),
            np.zeros(NUM_CONTEXT, np.float32),
            np.zeros((rows, NUM_CANDIDATE), np.float32),
            np.zeros(rows, np.bool_),
            np.zeros(rows, np.float32),
        )

    def decide(self, state: State, decision: Decision) -> None:
        """Write the decision for `state` into `decision`; to be called in every epoch."""
        decide_pointer(state, self.brain, self.desk, decision)

    def run(self, simulator: Simulator) -> None:
        """Serve the simulator's whole workload, compiled."""
        self.reset(simulator.state())
        while not run_learned(simulator.sim, decide_pointer, self.brain, self.desk, simulator.default_decision()):
            simulator.make_room()


def load_pointer(
    folder: str | PathLike[str], scores: str | PathLike[str] | None = None, name: str | None = None
) -> PointerCaching:
    """The policy of a run of `schedlab train expert_caching/...`, over the scores of a checkpoint (default: ours).

    Raises InputError if a file is missing or broken.
    """
    eviction = load_eviction(scores or SHIPPED)
    sizes = {"context_size": NUM_CONTEXT, "candidate_size": NUM_CANDIDATE}
    policy = load_checkpoint(folder, env_id=ENV_ID, feature_version=FEATURE_VERSION, **sizes)
    rows = int(policy.config["spec"]["num_candidates"])
    pointer = pack_weights(policy.network, rows)
    return PointerCaching(name or Path(folder).name, eviction.weights, eviction.shape[2], pointer, rows)
