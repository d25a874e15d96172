"""`GuardedPolicy` for schedulers of task graphs: one that fails is replaced by earliest finish time."""

from __future__ import annotations

from typing import Any

from ..envs.soc_dag.state import WAIT, Decision, State, bind_first, empty_decision, is_legal, reset_decision
from .guard import GuardedPolicy


class GuardedScheduler(GuardedPolicy):
    """Runs a policy on a copy of the state; where it raises or asks for what is illegal, the first ready task goes to
    the PE on which it would finish first.

    Args: as `GuardedPolicy`, but decisions are made in the caller's thread unless `time_budget_s` is given: handing
    one to a thread takes longer than most of them.
    """

    default_name = "earliest finish time"

    def __init__(self, policy: Any, time_budget_s: float | None = None, **kwargs: Any) -> None:
        super().__init__(policy, time_budget_s, **kwargs)
        self.binding: str = getattr(policy, "binding", "late")
        self.source: str = getattr(policy, "source", "")

    def decide(self, state: Any, decision: Any) -> None:
        """Write the policy's decision, or the default's."""
        before = self.failures.total()
        super().decide(state, decision)
        if self.is_fallback or self.failures.total() > before:
            reset_decision(decision)
            bind_first(state, decision)

    def _allocate(self, state: State) -> tuple[State, Decision]:
        return State(*(array.copy() for array in state)), empty_decision()

    def _clear(self) -> None:
        reset_decision(self._private)

    def _problem(self, state: State) -> str | None:
        task, pe, level = (int(value) for value in self._private.bind[0])
        if task == WAIT:
            return None if state.engine[0]["num_in_progress"] else "it waits, but nothing is in progress"
        return None if is_legal(state, task, pe, level) else f"task {task} cannot be bound to PE {pe} at {level} now"

    def _accept(self, decision: Decision) -> None:
        decision.bind[:] = self._private.bind

    def _copy(self, state: State) -> None:
        for ours, theirs in zip(self._snapshot, state, strict=True):
            ours[:] = theirs
