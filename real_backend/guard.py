"""A policy that cannot break the engine: whatever it does, every iteration gets a valid decision in bounded time."""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from ..envs.core.errors import InputError
from ..envs.core.interface import Policy
from ..envs.request_scheduling.state import (
    LEVERS_DTYPE,
    NO_LIMIT,
    RUNNING,
    WAITING,
    Decision,
    State,
    empty_decision,
    empty_state,
    reset_decision,
)

FAILURES = ("raised", "invalid", "timeout")
"""Kinds of failure that are counted: an exception, a decision that makes no sense, no decision in time."""


def problem_with(state: State, decision: Decision) -> str | None:
    """What is wrong with `decision` in `state`, or None if it may be executed."""
    engine = state.engine[0]
    # One conversion for all fields: this runs at every iteration.
    levers = dict(zip(LEVERS_DTYPE.names or (), decision.levers[0].item(), strict=True))
    num_running, num_waiting = int(engine["num_running"]), int(engine["num_waiting"])
    for name, low, high in (
        ("prefill_tokens", 0, NO_LIMIT),
        ("chunk_tokens", 1, NO_LIMIT),
        ("max_running", 0, NO_LIMIT),
        ("kv_reserve_blocks", 0, NO_LIMIT),
        ("whole_prompts", 0, 1),
        ("admit_rest", 0, 1),
        ("num_preempt", 0, num_running),
        ("num_order", 0, min(num_waiting + num_running, len(decision.order))),
    ):
        # A NaN or an infinity written into an integer lever has become the smallest integer, and is out of range.
        if not low <= levers[name] <= high:
            return f"{name} is {levers[name]}, outside {low}..{high}"
    preempt = decision.preempt[: levers["num_preempt"]].tolist()
    order = decision.order[: levers["num_order"]].tolist()
    arrived = int(engine["num_arrived"])
    for name, ids in (("preempt", preempt), ("order", order)):
        if ids and not (min(ids) >= 0 and max(ids) < arrived):
            return f"{name} lists request ids outside 0..{arrived - 1}"
        if len(set(ids)) < len(ids):
            return f"{name} lists a request twice"
    status = state.requests["status"]
    if preempt and (status[preempt] != RUNNING).any():
        return "preempt lists a request that does not run"
    if order and not set(np.array(order)[status[order] != WAITING].tolist()) <= set(preempt):
        return "order lists a request that does not wait"
    return None


class GuardedPolicy:
    """Runs a policy on a copy of the state, and falls back to the engine's default when it fails.

    When the policy raises or decides something invalid, that iteration is scheduled first come first served. When it
    takes longer than its budget, so is the rest of the run: a thread cannot be killed, and the late policy goes on
    with its own copies, which nobody reads any more. A policy that never gives back Python's global lock (a compiled
    endless loop) cannot be bounded this way.

    What belongs to request scheduling stands in the methods below `report`; `experts_guard.py` has those of caches.

    Args:
        policy: what decides.
        time_budget_s: wall seconds for one decision. None: decide in the caller's thread, with no protection
            against hanging.
        first_budget_s: wall seconds for `reset` and for the first decision of the first run, which may compile.
        on_failure: called with (kind, message) at each failure. Default: a RuntimeWarning at the first.

    Attributes:
        failures: Counter by `FAILURES`, over all runs since creation.
        decision_wall_s, decision_cpu_s: seconds of every decision that came back (wall; CPU of its thread).
        is_fallback: True once the policy hung, or failed to reset: the default decides for the rest of the run.
    """

    default_name = "first come first served"
    """What decides instead of a policy that failed, in warnings."""

    def __init__(
        self,
        policy: Policy[State, Decision],
        time_budget_s: float | None = 1.0,
        *,
        first_budget_s: float = 60.0,
        on_failure: Callable[[str, str], None] | None = None,
    ) -> None:
        if time_budget_s is not None and not 0 < time_budget_s < float("inf"):
            raise InputError(f"time_budget_s is {time_budget_s}", remedy="Give positive seconds, or None")
        self.policy = policy
        self.name: str = policy.name
        self.is_oracle: bool = policy.is_oracle
        self.time_budget_s = time_budget_s
        self.first_budget_s = first_budget_s
        self.failures: Counter[str] = Counter()
        self.num_decisions = 0
        self.decision_wall_s: list[float] = []
        self.decision_cpu_s: list[float] = []
        self.is_fallback = False
        self._on_failure = on_failure or self._warn_once
        self._warned = False
        self._is_warm = False
        self._worker: _Worker | None = None

    def reset(self, state: State) -> None:
        """Start a new run: the policy gets another chance, unless it still hangs."""
        self._snapshot, self._private = self._allocate(state)
        self.is_fallback = self._worker is not None and self._worker.is_busy
        if not self.is_fallback:
            self._copy(state)
            snapshot = self._snapshot
            # A policy that could not start the run is not asked to decide in it.
            self.is_fallback = not self._call(lambda: self.policy.reset(snapshot), self.first_budget_s)

    def decide(self, state: State, decision: Decision) -> None:
        """Write the policy's decision, or leave the default, in `decision`."""
        self.num_decisions += 1
        if self.is_fallback:
            return
        self._copy(state)
        snapshot, private = self._snapshot, self._private
        self._clear()
        seconds: list[float] = []

        def timed_decide() -> None:
            wall, cpu = time.perf_counter(), time.thread_time()
            self.policy.decide(snapshot, private)
            seconds.extend((time.perf_counter() - wall, time.thread_time() - cpu))

        budget = self.time_budget_s if self._is_warm else self.first_budget_s
        if not self._call(timed_decide, budget):
            return
        self._is_warm = True
        self.decision_wall_s.append(seconds[0])
        self.decision_cpu_s.append(seconds[1])
        problem = self._problem(state)
        if problem is not None:
            self._fail("invalid", problem)
        else:
            self._accept(decision)

    def report(self) -> dict[str, float]:
        """Decisions, failures by kind, and P50 and P99 of the seconds of a decision."""
        return report_of(self.num_decisions, self.failures, self.decision_wall_s, self.decision_cpu_s)

    def _allocate(self, state: Any) -> tuple[Any, Any]:
        """A state and a decision of our own, of the size of `state`."""
        return empty_state(len(state.requests)), empty_decision(len(state.requests))

    def _clear(self) -> None:
        """Fill our decision with the default of our state."""
        reset_decision(self._snapshot, self._private)

    def _problem(self, state: Any) -> str | None:
        """What is wrong with our decision in `state`, or None."""
        return problem_with(state, self._private)

    def _accept(self, decision: Any) -> None:
        """Write our decision into the backend's."""
        levers = self._private.levers[0]
        decision.levers[0] = levers
        decision.order[: levers["num_order"]] = self._private.order[: levers["num_order"]]
        decision.preempt[: levers["num_preempt"]] = self._private.preempt[: levers["num_preempt"]]

    def _copy(self, state: Any) -> None:
        """Bring the snapshot up to date: the rows of requests that have arrived, and the live parts of the lists."""
        engine = state.engine[0]
        arrived = int(engine["num_arrived"])
        self._snapshot.engine[:] = state.engine
        self._snapshot.requests[:arrived] = state.requests[:arrived]
        self._snapshot.waiting[: engine["num_waiting"]] = state.waiting[: engine["num_waiting"]]
        self._snapshot.running[: engine["num_running"]] = state.running[: engine["num_running"]]

    def _call(self, work: Callable[[], None], budget_s: float | None) -> bool:
        """Run `work` within the budget. False, with the failure booked, if it raised or did not end in time."""
        if self.time_budget_s is None:
            error = _outcome(work)
        else:
            if self._worker is None:
                self._worker = _Worker(f"policy {self.name}")
            try:
                error = self._worker.run(work, budget_s)
            except Empty:
                self.is_fallback = True
                self._fail("timeout", f"no answer within {budget_s} s; the default decides for the rest of the run")
                return False
        if error is not None:
            self._fail("raised", f"{type(error).__name__}: {error}")
        return error is None

    def _fail(self, kind: str, message: str) -> None:
        self.failures[kind] += 1
        self._on_failure(kind, message)

    def _warn_once(self, kind: str, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"policy {self.name!r} failed ({kind}: {message}): {self.default_name} instead; "
                "further failures are only counted",
                RuntimeWarning,
                stacklevel=5,
            )


def report_of(
    num_decisions: int, failures: Mapping[str, int], wall_s: Sequence[float], cpu_s: Sequence[float]
) -> dict[str, float]:
    """Decisions, failures by kind, and P50 and P99 of the seconds of a decision (nan: there was none)."""
    row: dict[str, float] = {"decisions": num_decisions}
    row |= {f"failures_{kind}": failures[kind] for kind in FAILURES}
    for name, seconds in (("wall", wall_s), ("cpu", cpu_s)):
        for percent in (50, 99):
            row[f"decision_{name}_p{percent}_s"] = float(np.percentile(seconds, percent)) if seconds else float("nan")
    return row


def _outcome(work: Callable[[], None]) -> BaseException | None:
    try:
        work()
    except Exception as error:
        return error
    return None


class _Worker:
    """One daemon thread that runs calls one after another; a call that hangs does not stop the process from ending."""

    def __init__(self, name: str) -> None:
        self._todo: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._done: SimpleQueue[Any] = SimpleQueue()
        self._pending = 0
        threading.Thread(target=self._loop, name=name, daemon=True).start()

    @property
    def is_busy(self) -> bool:
        """True while a call that was given up has not ended."""
        if self._pending and not self._done.empty():
            self._done.get()
            self._pending -= 1
        return self._pending > 0

    def run(self, work: Callable[[], None], budget_s: float | None) -> BaseException | None:
        """The exception that `work` ended with, or None. Raises queue.Empty when it takes longer than the budget."""
        self._pending += 1
        self._todo.put(work)
        error = self._done.get(timeout=budget_s)
        self._pending -= 1
        return error

    def _loop(self) -> None:
        while True:
            work = self._todo.get()
            try:
                work()
                error = None
            except BaseException as caught:  # SystemExit included: it must not end the thread unanswered
                error = caught
            self._done.put(error)
