"""A rule: a scheduling heuristic written once, run compiled in the simulator and from Python on an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..core.kernel import njit
from .state import Decision, State


@dataclass(frozen=True)
class Rule:
    """A `Policy` over `State`, given by an njit kernel and its parameters.

    The kernel is `decide(state, params, memory, decision) -> None`: `params` (P,) float64 are the knobs, `memory`
    float64 is what the rule remembers during a run (the first `memory_size` entries, then `memory_per_request` for
    each request), `decision` comes holding the engine's default.
    """

    name: str
    decide_kernel: Callable
    params: tuple[float, ...] = ()
    memory_size: int = 0
    memory_per_request: int = 0
    source: str = ""
    """The paper or code that the rule is from."""
    is_oracle: bool = False

    @property
    def param_array(self) -> np.ndarray:
        return np.asarray(self.params, np.float64)

    def new_memory(self, num_requests: int) -> np.ndarray:
        """Zeroed memory for a run over `num_requests` requests."""
        return np.zeros(self.memory_size + self.memory_per_request * num_requests + 1)

    def with_params(self, *params: float, name: str | None = None) -> Rule:
        """The same rule with other knobs."""
        return replace(self, params=params, name=name or self.name)

    def reset(self, state: State) -> None:
        # The memory belongs to a run, the rule itself is a frozen value: keep it beside the dataclass fields.
        object.__setattr__(self, "_memory", self.new_memory(len(state.requests)))

    def decide(self, state: State, decision: Decision) -> None:
        """Write the decision for `state` into `decision` (`Policy.decide`)."""
        self.decide_kernel(state, self.param_array, self._memory, decision)  # type: ignore[attr-defined]


@njit(cache=True)
def pick_smallest(state: State, keys, decision: Decision, tokens: int) -> None:
    """List waiting requests in `decision.order` by increasing key until their prefill covers `tokens` tokens.

    `keys` (num_waiting,) float64 belongs to the places of `state.waiting` and is destroyed; an infinite key leaves
    its request out. Selection, not sorting: few requests are admitted in an iteration, thousands may wait.
    """
    levers = decision.levers[0]
    num_waiting = state.engine[0].num_waiting
    room = state.engine[0].max_running - state.engine[0].num_running
    while tokens > 0 and room > 0:
        best = -1
        for i in range(num_waiting):
            if keys[i] < np.inf and (best < 0 or keys[i] < keys[best]):
                best = i
        if best < 0:
            return
        row = state.requests[state.waiting[best]]
        keys[best] = np.inf
        decision.order[levers.num_order] = state.waiting[best]
        levers.num_order += 1
        tokens -= row.prompt_tokens + row.generated_tokens - row.cached_tokens
        room -= 1
