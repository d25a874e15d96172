"""Schedulers of task graphs that cannot break the executor: one that fails is replaced by earliest finish time.

`CompiledGuard` is for policies that decide compiled, in the threads of the PEs; `GuardedScheduler`, which is asked from
Python, is for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ..envs.core.errors import InputError
from ..envs.core.kernel import UNCOUNTED, njit, njit_borrowed
from ..envs.soc_dag.state import WAIT, Decision, State, bind_first, empty_decision, is_legal, reset_decision
from .guard import FAILURES, GuardedPolicy, report_of
from .threads_machine import MONOTONIC, THREAD_CPU, read_ns

GUARD_DTYPE = np.dtype(
    [
        ("clock", "i8"),  # address of two int64
        ("budget_ns", "i8"),  # for one decision
        ("num_decisions", "i8"),
        ("num_invalid", "i8"),  # decisions that could not be carried out
        ("num_late", "i8"),  # decisions that took longer than the budget
        ("is_fallback", "i8"),  # 1: the default decides for the rest of the run
    ]
)
KEPT = 1 << 16
"""Decisions of a run whose times are kept."""


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


# ------------------------------------------------------------------------------------------------------ compiled


class CompiledGuard:
    """Runs a compiled policy where it is, and books what it does wrong: no decision leaves the compiled code.

    A decision that cannot be carried out, or for which the policy found no finite score, becomes the default binding.
    After one that took longer than its budget the default decides for the rest of the run: compiled code cannot be
    interrupted, so that one delays the run by what it took. What the policy is shown is the executor's own state.

    Args:
        policy: has `compiled(state, decision)`; where it counts in `failures` (int64) the decisions in which it took
            the default itself, they are "raised" here.
        time_budget_s: wall seconds for one decision. None: no limit.

    Attributes:
        decision_wall_s, decision_cpu_s: seconds of the policy's decisions, of all runs (of each the last `KEPT`).
    """

    default_name = GuardedScheduler.default_name

    def __init__(self, policy: Any, time_budget_s: float | None = None) -> None:
        if time_budget_s is not None and not 0 < time_budget_s < float("inf"):
            raise InputError(f"time_budget_s is {time_budget_s}", remedy="Give positive seconds, or None")
        self.policy = policy
        self.name: str = policy.name
        self.is_oracle: bool = policy.is_oracle
        self.binding: str = getattr(policy, "binding", "late")
        self.source: str = getattr(policy, "source", "")
        self.decision_wall_s: list[float] = []
        self.decision_cpu_s: list[float] = []
        self._failures = dict.fromkeys(FAILURES, 0)
        self._num_decisions = 0
        self._board = np.zeros(1, GUARD_DTYPE)
        self._clock = np.zeros(2, np.int64)
        self._spent = np.zeros((2, KEPT), np.int64)
        self._board["clock"] = self._clock.ctypes.data
        self._board["budget_ns"] = np.iinfo(np.int64).max if time_budget_s is None else int(time_budget_s * 1e9)

    def compiled(self, state: State, decision: Decision) -> tuple[Callable, tuple]:
        """The compiled function that decides through a run, and its arguments."""
        self.collect()
        kernel, arguments = self.policy.compiled(state, decision)
        return guarded(kernel), (state, decision, self._board, self._spent, self._clock, *arguments)

    def collect(self) -> None:
        """Book the run that has ended, if there was one."""
        board = self._board[0]
        kept = self._spent[:, : min(int(board["num_decisions"]), KEPT)] * 1e-9
        self.decision_wall_s += kept[0, kept[0] > 0].tolist()
        self.decision_cpu_s += kept[1, kept[0] > 0].tolist()
        self._num_decisions += int(board["num_decisions"])
        own = getattr(self.policy, "failures", None)
        if own is not None and board["num_decisions"]:
            self._failures["raised"] += int(own[0])
        self._failures["invalid"] += int(board["num_invalid"])
        self._failures["timeout"] += int(board["num_late"])
        for name in ("num_decisions", "num_invalid", "num_late", "is_fallback"):
            board[name] = 0
        self._spent[:] = 0

    def report(self) -> dict[str, float]:
        """As `GuardedPolicy.report`."""
        self.collect()
        return report_of(self._num_decisions, self._failures, self.decision_wall_s, self.decision_cpu_s)


@cache
def guarded(decide: Callable) -> Callable:
    """The compiled function `decide(*arguments)`, which fills a decision, with a guard around it."""

    @njit(**UNCOUNTED)
    def decide_guarded(state, decision, board, spent, clock, *arguments):
        guard = board[0]
        if guard.is_fallback:
            bind_default(state, decision, guard)
            return
        wall, cpu = read_ns(MONOTONIC, clock, guard.clock), read_ns(THREAD_CPU, clock, guard.clock)
        decide(*arguments)
        at = guard.num_decisions % KEPT
        spent[1, at] = read_ns(THREAD_CPU, clock, guard.clock) - cpu
        spent[0, at] = read_ns(MONOTONIC, clock, guard.clock) - wall
        judge(state, decision, guard, spent[0, at])

    return decide_guarded


@njit_borrowed
def bind_default(state, decision, guard) -> None:
    """What is done instead of a decision that failed."""
    guard.num_decisions += 1
    reset_decision(decision)
    bind_first(state, decision)


@njit_borrowed
def judge(state, decision, guard, wall_ns: int) -> None:
    """Take a decision that can be carried out and came in time, else the default."""
    choice, waits = decision.bind[0], decision.bind[0].task == WAIT
    fits = state.engine[0].num_in_progress > 0 if waits else is_legal(state, choice.task, choice.pe, choice.level)
    if fits and wall_ns <= guard.budget_ns:
        guard.num_decisions += 1
        return
    if wall_ns > guard.budget_ns:
        guard.num_late += 1
        guard.is_fallback = 1
    else:
        guard.num_invalid += 1
    bind_default(state, decision, guard)
