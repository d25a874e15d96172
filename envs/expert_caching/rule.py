"""A rule: a cache policy written once, run compiled in the simulator and from Python on a real engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..core.kernel import njit_borrowed
from .state import AUTO, CANDIDATE, FREE, WAITING, Decision, State, is_taken, slot_kind

if TYPE_CHECKING:
    from .sim import Simulator


@dataclass(frozen=True, eq=False)
class Rule:
    """A `Policy` over `State`, given by an njit kernel and its parameters.

    The kernel is `decide(state, params, memory, decision) -> None`: `params` (P,) float64 are the knobs, then whatever
    tables were fitted; `memory` float64 is what the rule remembers during a run (the first `memory_size` entries, then
    `memory_per_expert` for each of the L * E experts), zero at the start; `decision` comes holding the backend's
    default. It is called in every epoch, also when nothing is missing.
    """

    name: str
    decide_kernel: Callable
    params: tuple[float, ...] | np.ndarray = ()
    memory_size: int = 0
    memory_per_expert: int = 0
    source: str = ""
    """The paper or code that the rule is from."""
    is_oracle: bool = False
    shape: tuple[int, int, int] | None = None
    """(L, E, k) of the only models whose tables these are; None: any model."""

    @property
    def param_array(self) -> np.ndarray:
        return np.ascontiguousarray(self.params, np.float64)

    def new_memory(self, state: State) -> np.ndarray:
        """Zeroed memory for a run over models of the size of `state`."""
        return np.zeros(self.memory_size + self.memory_per_expert * state.experts.size + 1)

    def with_params(self, *params: float, name: str | None = None) -> Rule:
        """The same rule with other knobs."""
        return replace(self, params=params, name=name or self.name)

    def run(self, simulator: Simulator) -> None:
        """Run the rest of the simulator's workload, compiled, as learned policies do."""
        simulator.run(self)

    def reset(self, state: State) -> None:
        # The memory belongs to a run, the rule itself is a frozen value: keep it beside the dataclass fields.
        object.__setattr__(self, "_memory", self.new_memory(state))
        object.__setattr__(self, "_params", self.param_array)

    def decide(self, state: State, decision: Decision) -> None:
        """Write the decision for `state` into `decision` (`Policy.decide`)."""
        self.decide_kernel(state, self._params, self._memory, decision)  # type: ignore[attr-defined]


@njit_borrowed
def evict_lowest(state: State, keys, decision: Decision) -> None:
    """Give every missing expert a free slot of its layer, else the candidate of lowest key; AUTO where none is left.

    `keys` (S,) float64 by slot, below infinity for candidates; those of slots that may not be taken, and of those that
    are now, become infinity. Ties go to the lower slot. Victims come as AUTO, as they do when a rule is called.

    This is `lowest_slot` for one missing expert after the other, but looks at each slot's kind once, and compares
    without branches, which processors guess wrong here (measured: 0.7 against 1.0 us for an epoch with three victims).
    """
    experts, slots, victims, layer = state.experts, state.slots, decision.victims, state.engine[0].layer
    first, end, cancel = state.layers[layer].first_slot, state.layers[layer].end_slot, decision.plan[0].cancel_queued
    if state.engine[0].num_missing == 0:
        return
    num_free = 0
    for slot in range(first, end):
        kind = slot_kind(experts, slots, layer, slot)
        keys[slot] = keys[slot] if kind == CANDIDATE else np.inf
        num_free += (kind == FREE) | ((kind == WAITING) & (cancel != 0))
    num_free = min(num_free, state.engine[0].num_missing)
    for i in range(num_free):
        victims[i] = lowest_slot(state, keys, decision, layer, i, 0)
    for i in range(num_free, state.engine[0].num_missing):
        best, lowest = AUTO, np.inf
        for slot in range(first, end):
            is_lower = keys[slot] < lowest
            best = slot if is_lower else best
            lowest = keys[slot] if is_lower else lowest
        victims[i] = best
        if best >= 0:
            keys[best] = np.inf


@njit_borrowed
def lowest_slot(state: State, keys, decision: Decision, target: int, num_victims: int, num_prefetch: int) -> int:
    """A free slot of layer `target`, else that of its candidate of lowest key; AUTO if there is none.

    Slots of the first `num_victims` victims and `num_prefetch` prefetches are taken.
    """
    experts, slots, victims, asked = state.experts, state.slots, decision.victims, decision.prefetch
    layer, of_target, cancel = state.engine[0].layer, state.layers[target], decision.plan[0].cancel_queued
    best = AUTO
    for slot in range(of_target.first_slot, of_target.end_slot):
        kind = slot_kind(experts, slots, layer, slot)
        if kind == FREE or (kind == WAITING and cancel):
            if not is_taken(victims, num_victims, asked, num_prefetch, slot):
                return slot
        elif kind == CANDIDATE and (best < 0 or keys[slot] < keys[best]):
            best = best if is_taken(victims, num_victims, asked, num_prefetch, slot) else slot
    return best


@njit_borrowed
def prefetch(state: State, decision: Decision, layer: int, expert: int, slot: int) -> None:
    """Ask for one more prefetch, unless `max_prefetch` are asked for. `slot` may be AUTO."""
    plan = decision.plan[0]
    if plan.num_prefetch < state.engine[0].max_prefetch:
        decision.prefetch[plan.num_prefetch, 0] = layer
        decision.prefetch[plan.num_prefetch, 1] = expert
        decision.prefetch[plan.num_prefetch, 2] = slot
        plan.num_prefetch += 1
