"""A rule: a scheduling heuristic written once, run compiled in the simulator and from Python on a real executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .state import Decision, State

if TYPE_CHECKING:
    from .sim import Simulator


@dataclass(frozen=True, eq=False)
class Rule:
    """A `Policy` over `State`, given by an njit kernel and its parameters.

    The kernel is `decide(state, params, memory, decision) -> None`: `params` (P,) float64 are the knobs, then whatever
    tables belong to it (a plan); `memory` float64 is what the rule remembers during a run (the first `memory_size`
    entries, then `memory_per_pe` for each PE and `memory_per_task` for each task), zero at the start; `decision` comes
    holding a wait. It is called as long as something may be bound, and binds one task or leaves the wait.
    """

    name: str
    decide_kernel: Callable
    params: tuple[float, ...] | np.ndarray = ()
    memory_size: int = 0
    memory_per_pe: int = 0
    memory_per_task: int = 0
    binding: str = "late"
    """When the rule binds tasks as published (`spec.BINDINGS`); it runs under other bindings as well."""
    source: str = ""
    """The paper or code that the rule is from."""
    is_oracle: bool = False

    @property
    def param_array(self) -> np.ndarray:
        return np.ascontiguousarray(self.params, np.float64)

    def new_memory(self, state: State) -> np.ndarray:
        """Zeroed memory for a run over as many PEs and tasks as `state` has room for."""
        per_item = self.memory_per_pe * len(state.pes) + self.memory_per_task * len(state.tasks)
        return np.zeros(self.memory_size + per_item + 1)

    def compiled(self, state: State, decision: Decision) -> tuple[Callable, tuple]:
        """The compiled function that decides through a run, and its arguments, for a backend that calls it itself."""
        return self.decide_kernel, (state, self.param_array, self.new_memory(state), decision)

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
