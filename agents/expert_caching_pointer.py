"""A pointer network that evicts, bypasses and prefetches by the learned scores: compiled, over the env's action table.

It sees what `ExpertCachingVectorEnv` shows of tasks with advice: the same kernels write both.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..envs.core.blocks import load
from ..envs.core.kernel import UNCOUNTED, njit
from ..envs.expert_caching.affinity import Affinity
from ..envs.expert_caching.state import Decision, State, empty_decision, reset_decision
from ..envs.expert_caching.table import (
    FEATURE_VERSION,
    NUM_CANDIDATE,
    NUM_CONTEXT,
    Table,
    action_of,
    choose,
    empty_table,
    next_choice,
    open_epoch,
    resolve_wanted,
    show_choice,
    write_candidates,
    write_context,
    write_mask,
)
from .checkpoint import load_checkpoint
from .compiled import DeepSetsWeights, deepsets_choose, pack_weights
from .expert_caching import SHIPPED, LearnedCaching, advise
from .expert_caching_checkpoint import load_weights
from .expert_caching_rule import Knobs, by_advice
from .expert_caching_score import Memory, Weights

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
    wanted: Decision  # what the rule by the scores wants
    context: np.ndarray  # (C,) float32
    candidates: np.ndarray  # (K, F) float32
    mask: np.ndarray  # (K,) bool
    logits: np.ndarray  # (K,) float32


@njit(cache=True, nogil=True)
def decide_pointer(state: State, brain: Brain, desk: Desk, decision: Decision) -> None:
    """`advise`, then one row of the action table after the other, as in the env. Called in every epoch, in order."""
    table, wanted = desk.table, desk.wanted
    advise(state, brain.weights, desk.memory)
    reset_decision(state, wanted)
    by_advice(state, desk.memory.knobs, desk.memory.keys, wanted)
    resolve_wanted(state, wanted)
    open_epoch(state, table, brain.affinity)
    filled = len(desk.candidates)
    while next_choice(state, table, decision):
        write_context(state, table, decision, desk.context)
        write_candidates(state, table, filled, desk.candidates)
        write_mask(state, table, desk.mask)
        show_choice(desk.candidates, action_of(state, table, wanted, decision))
        filled = table.head[0].num_rows
        action = deepsets_choose(brain.pointer, desk.context, desk.candidates, desk.mask, desk.logits)
        if action < 0 or not np.isfinite(desk.logits[action]):
            raise ValueError("the policy's logits are not finite")
        choose(state, table, decision, action)


@njit(cache=True, nogil=True, **UNCOUNTED)
def decide_pointer_at(address: int, kind: Any, decision: Decision) -> None:
    """`decide_pointer` with its other arguments in a block of memory."""
    state, brain, desk = load(address, kind)
    decide_pointer(state, brain, desk, decision)


class PointerCaching(LearnedCaching):
    """A pointer network over the action table, as a `Policy`. It sees the learned scores, and what their rule would do.

    It was trained without affinities: the scores say more.

    Args:
        name: shown in results.
        weights: of the scores.
        top_k: experts a token of the model that the weights are for.
        pointer: from `compiled.pack_weights`.
        num_candidates: rows of the table (`ExpertCachingSpec.num_candidates`).
        knobs: of the rule that it sees (`by_advice`).
    """

    kernel: Any = staticmethod(decide_pointer)
    kernel_at: Any = staticmethod(decide_pointer_at)

    def __init__(
        self,
        name: str,
        weights: Weights,
        top_k: int,
        pointer: DeepSetsWeights,
        num_candidates: int,
        knobs: Knobs | None = None,
    ) -> None:
        super().__init__(name, weights, top_k, knobs)
        self.num_candidates = num_candidates
        self.brain = Brain(weights, pointer, Affinity.unknown(*self.shape[:2]))

    def reset(self, state: State) -> None:
        """Forget the previous run. Raises InputError if the weights are for a model of another shape."""
        super().reset(state)
        rows = self.num_candidates
        self.desk = Desk(
            self.memory,
            empty_table(rows, self.shape[1]),
            empty_decision(state, int(state.engine[0]["max_prefetch"])),
            np.zeros(NUM_CONTEXT, np.float32),
            np.zeros((rows, NUM_CANDIDATE), np.float32),
            np.zeros(rows, np.bool_),
            np.zeros(rows, np.float32),
        )

    @property
    def _inputs(self) -> tuple[Brain, Desk]:
        return self.brain, self.desk


def load_pointer(
    folder: str | PathLike[str],
    scores: str | PathLike[str] | None = None,
    name: str | None = None,
    knobs: Knobs | None = None,
) -> PointerCaching:
    """The policy of a run of `schedlab train expert_caching/...`.

    Args:
        folder: its checkpoint.
        scores: the checkpoint of scores that it sees. Default: the shipped one that it was trained with.
        name: shown in results. Default: that of the folder.
        knobs: of the rule that it sees.

    Raises:
        InputError: a file is missing or broken.
    """
    sizes = {"context_size": NUM_CONTEXT, "candidate_size": NUM_CANDIDATE}
    policy = load_checkpoint(folder, env_id=ENV_ID, feature_version=FEATURE_VERSION, **sizes)
    spec = policy.config["spec"]
    weights, top_k = load_weights(scores or SHIPPED.parent / spec["scores"])
    rows = int(spec["num_candidates"])
    pointer = pack_weights(policy.network, rows)
    return PointerCaching(name or Path(folder).name, weights, top_k, pointer, rows, knobs)
