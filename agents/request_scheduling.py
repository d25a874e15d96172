"""Learned request schedulers as policies over `State`: compiled in the simulator, and inside a real engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..envs.core.blocks import BoundCall, load
from ..envs.core.kernel import UNCOUNTED, njit, njit_borrowed
from ..envs.request_scheduling.sim import (
    Sim,
    Simulator,
    fast_forward,
    has_room,
    refresh_waiting,
    run_iteration,
    skip_idle,
)
from ..envs.request_scheduling.spec import RequestSchedulingSpec
from ..envs.request_scheduling.state import Decision, State, empty_decision, reset_decision
from ..envs.request_scheduling.table import (
    NUM_CANDIDATE,
    NUM_CONTEXT,
    Problem,
    Table,
    choose,
    empty_table,
    open_table,
    update_observation,
    write_mask,
    write_observation,
)
from .compiled import DeepSetsWeights, deepsets_choose


class View(NamedTuple):
    """Where a policy's observation is written."""

    context: np.ndarray  # (C,) float32
    candidates: np.ndarray  # (K, F) float32
    mask: np.ndarray  # (K,) bool
    logits: np.ndarray  # (K,) float32


def empty_view(num_candidates: int) -> View:
    """A View for K rows."""
    return View(
        np.zeros(NUM_CONTEXT, np.float32),
        np.zeros((num_candidates, NUM_CANDIDATE), np.float32),
        np.zeros(num_candidates, np.bool_),
        np.zeros(num_candidates, np.float32),
    )


@njit_borrowed
def decide_compiled(
    state: State, problem: Problem, table: Table, weights: DeepSetsWeights, view: View, decision: Decision
) -> bool:
    """The decision of one iteration under the compiled DeepSets policy. False if its logits were not finite."""
    if not open_table(state, problem, table, decision):
        reset_decision(state, decision)
        return True
    write_observation(state, problem, table, view.context, view.candidates)
    while True:
        write_mask(state, problem, table, view.mask)
        action = deepsets_choose(weights, view.context, view.candidates, view.mask, view.logits)
        if action < 0 or not np.isfinite(view.logits[action]):
            return False
        if choose(state, problem, table, decision, action):
            return True
        update_observation(state, problem, table, action, view.context, view.candidates)


@njit(cache=True, **UNCOUNTED)
def _decide_at(address: int, kind: Any, decision: Decision) -> bool:
    """`decide_compiled` with its other arguments in a block of memory."""
    state, problem, table, weights, view = load(address, kind)
    return decide_compiled(state, problem, table, weights, view, decision)


@njit(cache=True)
def run_compiled(
    sim: Sim, problem: Problem, table: Table, weights: DeepSetsWeights, view: View, decision: Decision
) -> bool:
    """Serve the workload under the compiled policy. False when the record is full: make room and call again."""
    while skip_idle(sim):
        if not has_room(sim):
            return False
        if fast_forward(sim) > 0:
            continue
        refresh_waiting(sim)
        if not decide_compiled(sim.state, problem, table, weights, view, decision):
            raise ValueError("the policy's logits are not finite")
        run_iteration(sim, decision)
    return True


class CompiledPolicy:
    """A DeepSets policy run by the numba kernel: microseconds a decision. Implements `Policy`.

    Raises ValueError from `decide` if the network yields no finite logit (a guarded backend then falls back).
    """

    is_oracle = False

    def __init__(self, name: str, weights: DeepSetsWeights, spec: RequestSchedulingSpec) -> None:
        self.name = name
        self.weights = weights
        self.problem = Problem.of(spec)
        self.table = empty_table(spec.num_candidates)
        self.view = empty_view(spec.num_candidates)
        self._bound: BoundCall | None = None

    def reset(self, state: State) -> None:
        """Nothing is remembered from run to run; what decides is compiled, and bound to this state's arrays, now."""
        self._bound = self._bind(state)

    def decide(self, state: State, decision: Decision) -> None:
        """Write the decision for `state` into `decision`."""
        bound = self._bound
        if bound is None or bound.arguments[0] is not state:
            bound = self._bound = self._bind(state)
        if not bound(decision):
            raise ValueError(f"policy {self.name!r}: logits are not finite")

    def _bind(self, state: State) -> BoundCall:
        arguments = (state, self.problem, self.table, self.weights, self.view)
        return BoundCall(_decide_at, arguments, empty_decision(1))

    def run(self, simulator: Simulator) -> None:
        """Serve the simulator's whole workload, compiled."""
        while not run_compiled(
            simulator.sim, self.problem, self.table, self.weights, self.view, simulator.default_decision()
        ):
            simulator.make_room()


class TablePolicy:
    """Any chooser of rows (a torch policy, an ONNX session) as a `Policy` over `State`.

    `act(observation) -> int` gets the dict of `context` (C,), `candidates` (K, F) and `action_mask` (K,).
    """

    is_oracle = False

    def __init__(self, name: str, act: Callable[[dict[str, np.ndarray]], int], spec: RequestSchedulingSpec) -> None:
        self.name = name
        self.act = act
        self.problem = Problem.of(spec)
        self.table = empty_table(spec.num_candidates)
        self.view = empty_view(spec.num_candidates)

    def reset(self, state: State) -> None:
        """Nothing is remembered from run to run."""

    def decide(self, state: State, decision: Decision) -> None:
        """Write the decision for `state` into `decision`. Raises ValueError if `act` chooses a masked row."""
        view = self.view
        if not open_table(state, self.problem, self.table, decision):
            reset_decision(state, decision)
            return
        while True:
            write_observation(state, self.problem, self.table, view.context, view.candidates)
            write_mask(state, self.problem, self.table, view.mask)
            action = int(self.act({"context": view.context, "candidates": view.candidates, "action_mask": view.mask}))
            if not (0 <= action < len(view.mask) and view.mask[action]):
                raise ValueError(f"policy {self.name!r} chose row {action}, which is masked")
            if choose(state, self.problem, self.table, decision, action):
                return
