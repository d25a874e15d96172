"""Learned schedulers of task graphs: a compiled DeepSets pointer over the action table, greedy or the best of samples.

`PointerScheduling` is a `Policy` over `State`: it runs compiled in the simulator and unchanged on a real executor.
`sampled_plans` plays one job many times on a simulator of its own before it begins: plans, of which the best is kept.
`sample_best` serves self-labelling (`soc_dag_train.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..envs.core.errors import InputError
from ..envs.core.kernel import njit, njit_borrowed
from ..envs.soc_dag.env import loss_of
from ..envs.soc_dag.library import Plan
from ..envs.soc_dag.sim import Sim, Simulator, run_decision, start
from ..envs.soc_dag.spec import Soc, SocDagSpec
from ..envs.soc_dag.state import (
    Decision,
    State,
    bind_first,
    empty_decision,
    reset_decision,
)
from ..envs.soc_dag.table import (
    FEATURE_VERSION,
    NUM_CANDIDATE,
    NUM_CONTEXT,
    Table,
    action_of,
    choose,
    empty_table,
    open_table,
    write_observation,
)
from ..envs.soc_dag.workload import Dag, Workload
from .checkpoint import load_checkpoint
from .compiled import DeepSetsWeights, deepsets_choose, deepsets_logits, pack_weights

ENV_ID = "schedlab/SocDag-v0"
SHIPPED = Path(__file__).parent / "shipped" / "soc_dag"
"""The agent that comes with the package."""


class Desk(NamedTuple):
    """What a policy works on. C, F and K as in `table.py`."""

    table: Table
    context: np.ndarray  # (C,) float32
    candidates: np.ndarray  # (K, F) float32
    mask: np.ndarray  # (K,) bool
    logits: np.ndarray  # (K,) float32


class Log(NamedTuple):
    """What a policy saw and chose in the T decisions of a run; with T = 0 nothing is written down."""

    context: np.ndarray  # (T, C) float32
    candidates: np.ndarray  # (T, K, F) float32
    action_mask: np.ndarray  # (T, K) bool
    actions: np.ndarray  # (T,) int64
    loss: np.ndarray  # (T,) float64 the objective so far, before the decision
    written: np.ndarray  # (1,) int64 how many decisions are in it


def empty_desk(num_candidates: int, num_pes: int, num_jobs: int, num_tasks: int) -> Desk:
    """A Desk for K rows."""
    return Desk(
        empty_table(num_candidates, num_pes, num_jobs, num_tasks),
        np.zeros(NUM_CONTEXT, np.float32),
        np.zeros((num_candidates, NUM_CANDIDATE), np.float32),
        np.zeros(num_candidates, np.bool_),
        np.zeros(num_candidates, np.float32),
    )


def empty_log(num_decisions: int, num_candidates: int) -> Log:
    """A Log with room for T decisions."""
    return Log(
        np.zeros((num_decisions, NUM_CONTEXT), np.float32),
        np.zeros((num_decisions, num_candidates, NUM_CANDIDATE), np.float32),
        np.zeros((num_decisions, num_candidates), np.bool_),
        np.zeros(num_decisions, np.int64),
        np.zeros(num_decisions),
        np.zeros(1, np.int64),
    )


# ------------------------------------------------------------------------------------------------------ kernels


@njit_borrowed
def see(state: State, desk: Desk, decision: Decision) -> bool:
    """Write the observation. False if there is no choice: then the decision is written instead, as the env takes it."""
    open_table(state, desk.table)
    if desk.table.head[0].num_rows <= 2 and state.engine[0].num_in_progress == 0:
        choose(desk.table, decision, 1)
        return False
    write_observation(state, desk.table, desk.context, desk.candidates, desk.mask)
    return True


@njit_borrowed
def decide_pointer(state: State, weights: DeepSetsWeights, desk: Desk, decision: Decision) -> bool:
    """The row of the highest logit. False if the logits are not finite."""
    if not see(state, desk, decision):
        return True
    action = deepsets_choose(weights, desk.context, desk.candidates, desk.mask, desk.logits)
    if action < 0 or not np.isfinite(desk.logits[action]):
        return False
    choose(desk.table, decision, action)
    return True


@njit_borrowed
def decide_or_default(
    state: State, weights: DeepSetsWeights, desk: Desk, failures: np.ndarray, decision: Decision
) -> None:
    """As `decide_pointer`; where the logits are not finite, the default binding, and one more in `failures`."""
    if not decide_pointer(state, weights, desk, decision):
        failures[0] += 1
        reset_decision(decision)
        bind_first(state, decision)


@njit_borrowed
def sample_row(weights: DeepSetsWeights, desk: Desk, temperature: float) -> int:
    """A row drawn with probabilities softmax(logits / temperature), by the Gumbel trick; -1 if none is finite."""
    deepsets_logits(weights, desk.context, desk.candidates, desk.mask, desk.logits)
    best, highest = -1, -np.inf
    for row in range(len(desk.mask)):
        if desk.mask[row]:
            drawn = desk.logits[row] - temperature * np.log(-np.log(max(np.random.random(), 1e-300)))  # noqa: NPY002
            if drawn > highest:
                best, highest = row, drawn
    return best


@njit_borrowed
def write_log(log: Log, desk: Desk, action: int, loss: float) -> None:
    """Append a decision, if there is room."""
    at = log.written[0]
    if at < len(log.actions):
        for i in range(len(desk.context)):
            log.context[at, i] = desk.context[i]
        for row in range(len(desk.mask)):
            log.action_mask[at, row] = desk.mask[row]
            for i in range(desk.candidates.shape[1]):
                log.candidates[at, row, i] = desk.candidates[row, i]
        log.actions[at] = action
        log.loss[at] = loss
        log.written[0] = at + 1


@njit(cache=True)
def run_pointer(
    sim: Sim, weights: DeepSetsWeights, desk: Desk, log: Log, decision: Decision, temperature: float
) -> None:
    """Run to the end under the policy: greedy at temperature 0, else sampled."""
    log.written[0] = 0
    while not sim.books[0].done:
        reset_decision(decision)
        if see(sim.state, desk, decision):
            if temperature > 0.0:
                action = sample_row(weights, desk, temperature)
            else:
                action = deepsets_choose(weights, desk.context, desk.candidates, desk.mask, desk.logits)
            if action < 0 or not np.isfinite(desk.logits[action]):
                raise ValueError("the policy's logits are not finite")
            write_log(log, desk, action, loss_of(sim))
            choose(desk.table, decision, action)
        run_decision(sim, decision)


@njit(cache=True)
def play(
    sim: Sim, weights: DeepSetsWeights, desk: Desk, log: Log, decision: Decision, temperature: float, seed: int
) -> float:
    """Play the loaded jobs once, greedily at temperature 0, into `log`. Returns the objective."""
    np.random.seed(seed)  # noqa: NPY002 - numba's own generator
    start(sim)
    run_pointer(sim, weights, desk, log, decision, temperature)
    return loss_of(sim)


@njit(cache=True)
def sample_best(
    sim: Sim,
    weights: DeepSetsWeights,
    desk: Desk,
    log: Log,
    decision: Decision,
    samples: int,
    temperature: float,
    seed: int,
    losses: np.ndarray,
) -> int:
    """Play the loaded jobs greedily (sample 0) and `samples` - 1 times at random; leave the best in `sim` and `log`.

    losses float64 (samples,): the objective of each run. Returns the best one's number.
    """
    size = len(log.actions)
    blind = Log(
        log.context[:0], log.candidates[:0], log.action_mask[:0], log.actions[:0], log.loss[:0], np.zeros(1, np.int64)
    )
    for sample in range(samples):
        heat = temperature if sample > 0 else 0.0
        losses[sample] = play(sim, weights, desk, blind, decision, heat, seed + sample)
    best = int(np.argmin(losses))
    play(sim, weights, desk, log if size > 0 else blind, decision, temperature if best > 0 else 0.0, seed + best)
    return best


@njit
def log_rule(
    sim: Sim,
    decide,
    params,
    memory,
    weights: DeepSetsWeights,
    share: float,
    seed: int,
    desk: Desk,
    log: Log,
    decision: Decision,
) -> None:
    """Run to the end, writing down what a rule would choose among the rows wherever the run comes, if it is there.

    With `share` 1 the rule is followed, as by an agent that imitates it perfectly; with less, that share of decisions
    is the rule's and the others are the policy's, sampled (DAgger: Ross, Gordon and Bagnell 2011).
    """
    np.random.seed(seed)  # noqa: NPY002 - numba's own generator
    log.written[0] = 0
    while not sim.books[0].done:
        reset_decision(decision)
        if see(sim.state, desk, decision):
            decide(sim.state, params, memory, decision)
            advised = action_of(sim.state, desk.table, decision)
            if advised >= 0:
                write_log(log, desk, advised, loss_of(sim))
            if share < 1.0 and np.random.random() >= share:  # noqa: NPY002
                choose(desk.table, decision, sample_row(weights, desk, 1.0))
            elif advised >= 0:
                choose(desk.table, decision, advised)
        run_decision(sim, decision)


@njit(cache=True)
def draw_plans(
    sim: Sim,
    weights: DeepSetsWeights,
    desk: Desk,
    log: Log,
    decision: Decision,
    temperature: float,
    seed: int,
    pe: np.ndarray,
    times: np.ndarray,
) -> None:
    """Play the loaded jobs S times as `sample_best` does; where and when every task ran.

    pe int64 (S, n); times float64 (S, 2, n): start and finish.
    """
    for sample in range(len(pe)):
        play(sim, weights, desk, log, decision, temperature if sample > 0 else 0.0, seed + sample)
        for i in range(pe.shape[1]):
            task = sim.state.tasks[i]
            pe[sample, i], times[sample, 0, i], times[sample, 1, i] = task.pe, task.start, task.finish


# ----------------------------------------------------------------------------------------------------- policies


class PointerScheduling:
    """A pointer network over the action table, compiled. Implements `Policy`.

    Args:
        name: shown in results.
        weights: from `compiled.pack_weights`.
        num_candidates: rows of the table.

    Raises ValueError from `decide` if the network yields no finite logit (a guarded backend then falls back).
    """

    is_oracle = False
    binding = "late"

    def __init__(self, name: str, weights: DeepSetsWeights, num_candidates: int) -> None:
        self.name, self.weights, self.num_candidates = name, weights, num_candidates
        self._desk: Desk | None = None
        self.failures = np.zeros(1, np.int64)
        """Decisions of the last run by `compiled` that were the backend's default, for want of a finite logit."""

    def desk_for(self, state: State) -> Desk:
        """Working memory for a State of this size."""
        return empty_desk(self.num_candidates, len(state.pes), len(state.jobs), len(state.tasks))

    def reset(self, state: State) -> None:
        """Nothing is remembered from run to run; make room for a State of this size."""
        self._desk = self.desk_for(state)

    def decide(self, state: State, decision: Decision) -> None:
        """Write the decision for `state` into `decision`."""
        if self._desk is None:
            self._desk = self.desk_for(state)
        if not decide_pointer(state, self.weights, self._desk, decision):
            raise ValueError(f"policy {self.name!r}: logits are not finite")

    def compiled(self, state: State, decision: Decision) -> tuple[Callable, tuple]:
        """The compiled function that decides through a run, and its arguments, for a backend that calls it itself."""
        self.failures[:] = 0
        return decide_or_default, (state, self.weights, self.desk_for(state), self.failures, decision)

    def run(self, simulator: Simulator) -> None:
        """Serve the simulator's whole workload, compiled."""
        sim = simulator.sim
        log = empty_log(0, self.num_candidates)
        run_pointer(sim, self.weights, self.desk_for(sim.state), log, simulator.default_decision(), 0.0)


def sampled_plans(
    policy: PointerScheduling, soc: Soc, dag: Dag, samples: int = 64, temperature: float = 1.0, seed: int = 0
) -> list[Plan]:
    """Schedules of one job of this graph that the policy draws on a simulator without noise, before the job begins.

    Half of them are drawn backwards: of the graph with its edges turned round, and read from its end, as in
    bidirectional planning (Li and Willis, EJOR 1992). What is decided last, and with least choice, is then its begin.
    The first one of each half is greedy. Data move as soon as they are made, as they do for a plan, all of whose tasks
    are bound when the job arrives.
    """
    backwards = samples // 2
    plans = drawn_forwards(policy, soc, dag, samples - backwards, temperature, seed)
    if backwards:
        drawn = drawn_forwards(policy, soc.turned(), dag.turned(), backwards, temperature, seed)
        plans += [plan.turned() for plan in drawn]
    return plans


def drawn_forwards(
    policy: PointerScheduling, soc: Soc, dag: Dag, samples: int, temperature: float, seed: int
) -> list[Plan]:
    """As `sampled_plans`, all of them forwards."""
    simulator = Simulator(SocDagSpec(soc, transfers="push", objective="makespan"))
    simulator.reset(Workload.from_arrays(dag.name, soc.kind_names, [dag]))
    sim, log = simulator.sim, empty_log(0, policy.num_candidates)
    pe, times = np.empty((samples, dag.num_tasks), np.int64), np.empty((samples, 2, dag.num_tasks))
    draw_plans(sim, policy.weights, policy.desk_for(sim.state), log, empty_decision(), temperature, seed, pe, times)
    return [Plan(to, *when) for to, when in zip(pe, times, strict=True)]


def load_pointer(folder: str | PathLike[str] = SHIPPED, name: str | None = None) -> PointerScheduling:
    """The policy of a checkpoint folder (default: ours). Raises InputError if it is missing, broken or for another env.

    Only networks with a compiled twin ("deepsets") are taken.
    """
    sizes = {"context_size": NUM_CONTEXT, "candidate_size": NUM_CANDIDATE}
    checkpoint = load_checkpoint(folder, env_id=ENV_ID, feature_version=FEATURE_VERSION, **sizes)
    rows = int(checkpoint.config["spec"]["num_candidates"])
    try:
        weights = pack_weights(checkpoint.network, rows)
    except ValueError as error:
        raise InputError(str(error), file=Path(folder), remedy="Give a checkpoint with encoder='deepsets'") from error
    return PointerScheduling(name or Path(folder).name, weights, rows)
