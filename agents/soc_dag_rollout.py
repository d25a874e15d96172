"""Rollouts: the rows that an agent likes best, each played on by a rule under durations drawn from the noise.

One step of policy improvement where it is needed, at decision time (Bertsekas, Tsitsiklis and Wu, J. Heuristics 1997).
Durations of unfinished tasks, and what is left of running ones given how long they have run, are drawn for all rows
alike (common random numbers). No further job is thought to arrive. Rows that are clearly worse than the agent's own
choice drop out early (racing: Maron and Moore, NIPS 1993), and another one is taken only if it is clearly better: the
least mean of a few rollouts is a lucky one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..envs.core.errors import InputError
from ..envs.core.kernel import UNCOUNTED, njit, njit_borrowed, njit_inlined
from ..envs.soc_dag.env import loss_of
from ..envs.soc_dag.rule import Rule
from ..envs.soc_dag.sim import Sim, Simulator, duration_us, new_sim, run_decision, run_rule, set_active
from ..envs.soc_dag.state import BUSY, FETCHING, Decision, State, empty_decision, nominal_us, reset_decision
from ..envs.soc_dag.table import choose
from .compiled import deepsets_logits
from .soc_dag import Desk, PointerScheduling, see

SCENARIOS_A_ROUND = 8
"""After so many rollouts of every row, the rows that are clearly worse drop out."""
SURE = 2.0
"""Standard errors by which a row must be better, or worse, than the agent's choice to be clearly so."""
REDRAWS = 20
"""A running task's duration is drawn again, so often at most, until it is longer than it has run."""
OVERDUE = 0.1
"""What is left of a task that was never drawn long enough, in its nominal durations."""


class Race(NamedTuple):
    """What rollouts work on, for K rows and P PEs."""

    played: Sim  # a copy of what is known, to play on
    ends: np.ndarray  # (P,) float64 when running tasks end, as drawn
    rows: np.ndarray  # (K,) int64 rows of the table by logit, the highest first
    sums: np.ndarray  # (K,) float64 of how much worse than the first row each one is, over scenarios
    squares: np.ndarray  # (K,) float64 of its square
    is_out: np.ndarray  # (K,) bool clearly worse
    decision: Decision


def new_race(simulator: Simulator, num_candidates: int) -> Race:
    """A Race for the simulator's workload. It shares what never changes, and nothing that is not known."""
    sim = simulator.sim
    fresh = new_sim(simulator.spec, simulator.workload, 0)
    shared = {name: getattr(sim.state, name) for name in ("times", "ahead", "edges", "levels", "default_level")}
    return Race(
        fresh._replace(state=fresh.state._replace(**shared), arrivals=fresh.arrivals[:0].copy()),
        np.zeros(simulator.spec.soc.num_pes),
        np.zeros(num_candidates, np.int64),
        np.zeros(num_candidates),
        np.zeros(num_candidates),
        np.zeros(num_candidates, np.bool_),
        empty_decision(),
    )


@njit_borrowed
def draw_scenario(state: State, race: Race) -> None:
    """Draw what all unfinished tasks take, and when the running ones end: later than now."""
    engine, books, draws = state.engine[0], race.played.books[0], race.played.draws
    for i in range(engine.num_live):
        job = state.jobs[state.live[i]]
        for task in range(job.first_task, job.first_task + job.num_tasks):
            draws[task] = np.random.standard_normal()  # noqa: NPY002 - numba's own generator
    for pe in range(engine.num_pes):
        row = state.pes[pe]
        if row.status != BUSY:
            continue
        task = state.tasks[row.task]
        nominal, end = nominal_us(state, row.task, pe, task.level), -np.inf
        for _ in range(REDRAWS):
            if end <= engine.now:
                draw = np.random.standard_normal()  # noqa: NPY002
                end = task.start + duration_us(nominal, draw, books.noise, books.noise_sigma)
        race.ends[pe] = end if end > engine.now else engine.now + OVERDUE * nominal


@njit_borrowed
def load(state: State, race: Race, num_more: int) -> None:
    """Put what is known into the copy: the live jobs, with running tasks that end as drawn, and so many jobs more."""
    played = race.played
    copy, books, engine = played.state, played.books[0], state.engine[0]
    copy.engine[0] = engine
    for i in range(engine.num_ready):
        copy.ready[i] = state.ready[i]
    for i in range(engine.num_live):
        number = state.live[i]
        job = state.jobs[number]
        copy.live[i] = number
        copy.jobs[number] = job
        for task in range(job.first_task, job.first_task + job.num_tasks):
            copy.tasks[task] = state.tasks[task]
            for pe in range(engine.num_pes):
                copy.transfer[task, pe] = state.transfer[task, pe]
    for kind in range(len(played.kinds)):
        played.kinds[kind].active = 0
        played.kinds[kind].watts = 0.0
    for pe in range(engine.num_pes):
        row = state.pes[pe]
        copy.pes[pe] = row
        played.next_at[pe] = np.inf
        if row.task >= 0:
            played.tail[pe] = row.task
            played.next_task[row.task] = -1
        if row.status == BUSY:
            played.kinds[row.kind].active += 1
            played.next_at[pe] = race.ends[pe]
        elif row.status == FETCHING:
            played.next_at[pe] = row.expected_end - nominal_us(state, row.task, pe, state.tasks[row.task].level)
    copy.engine[0].watts = 0.0
    for kind in range(len(played.kinds)):
        if played.kinds[kind].count > 0:
            set_active(played, kind, 0)
    books.done = 0
    books.num_jobs = engine.num_arrived + num_more
    books.next_job = engine.num_arrived


@njit_borrowed
def time_in_system(state: State) -> float:
    """Sum of the times that the jobs have been there so far, us."""
    total = 0.0
    for number in range(state.engine[0].num_arrived):
        job = state.jobs[number]
        total += min(job.finish, state.engine[0].now) - job.arrival
    return total


@njit_inlined
def rank_rows(desk: Desk, rows: np.ndarray, most: int) -> int:
    """The live rows of the highest logits, in order; how many there are."""
    count = 0
    for row in range(len(desk.mask)):
        if not desk.mask[row] or not np.isfinite(desk.logits[row]):
            continue
        at = min(count, most)
        while at > 0 and desk.logits[rows[at - 1]] < desk.logits[row]:
            at -= 1
            if at + 1 < most:
                rows[at + 1] = rows[at]
        if at < most:
            rows[at] = row
            count = min(count + 1, most)
    return count


@njit_inlined
def likeliest_rows(weights, desk: Desk, rows: np.ndarray, most: int) -> int:
    """What the agent would choose at the table that `see` has written: `rank_rows` of its logits."""
    deepsets_logits(weights, desk.context, desk.candidates, desk.mask, desk.logits)
    count = rank_rows(desk, rows, most)
    if count == 0:
        raise ValueError("the policy's logits are not finite")
    return count


@njit_inlined
def bounds(race: Race, i: int, played: int):
    """How much worse than the first row the i-th one is at best, and at worst: its mean over scenarios, less and more
    `SURE` standard errors."""
    mean = race.sums[i] / played
    error = np.sqrt(max(race.squares[i] / played - mean * mean, 0.0) / played)
    return mean - SURE * error, mean + SURE * error


@njit(**UNCOUNTED)
def play_on(state, table, row, race, lived, decide, params, memory):
    """The objective if a row is chosen now and the rule decides from there on, under the scenario drawn."""
    load(state, race, 0)
    race.played.books[0].live_us = lived
    reset_decision(race.decision)
    choose(table, race.decision, row)
    run_decision(race.played, race.decision)
    run_rule(race.played, decide, params, memory, race.decision)
    return loss_of(race.played)


@njit_borrowed
def count_open(race: Race, count: int, played: int) -> int:
    """Drop the rows that are clearly no better than the first one, or worse than a clearly better one. Returns how many
    are left to be told from the first; 0: the race is decided."""
    is_out, bar, left = race.is_out, 0.0, 0
    for i in range(1, count):
        if not is_out[i]:
            bar = min(bar, bounds(race, i, played)[1])
    for i in range(1, count):
        if not is_out[i]:
            at_best = bounds(race, i, played)[0]
            is_out[i] = at_best >= 0.0 or at_best > bar
            left += not is_out[i]
    return 0 if left == 1 and bar < 0.0 else left


@njit(**UNCOUNTED)
def best_row(state, table, count, race, scenarios, decide, params, memory):
    """Of the first `count` of `race.rows` the one that does clearly better than the first one, by most; else that."""
    sums, squares, is_out = race.sums, race.squares, race.is_out
    sums[:count] = 0.0
    squares[:count] = 0.0
    is_out[:count] = False
    lived, left, played = time_in_system(state), count - 1, 0
    while left > 0 and played < scenarios:
        draw_scenario(state, race)
        first = 0.0
        for i in range(count):
            if is_out[i]:
                continue
            loss = play_on(state, table, race.rows[i], race, lived, decide, params, memory)
            if i == 0:
                first = loss
            sums[i] += loss - first
            squares[i] += (loss - first) * (loss - first)
        played += 1
        if played % SCENARIOS_A_ROUND == 0:
            left = count_open(race, count, played)
    best, least = 0, 0.0
    for i in range(1, count):
        if not is_out[i] and bounds(race, i, played)[1] < least:
            best, least = i, bounds(race, i, played)[1]
    return race.rows[best]


@njit
def run_rollouts(sim, weights, desk, race, most_rows, scenarios, seed, decide, params, memory, decision):
    """Run to the end. Returns how many decisions had a choice, and in how many the agent was overruled."""
    np.random.seed(seed)  # noqa: NPY002 - numba's own generator
    asked, overruled = 0, 0
    while not sim.books[0].done:
        reset_decision(decision)
        if see(sim.state, desk, decision):
            count = likeliest_rows(weights, desk, race.rows, most_rows)
            row = best_row(sim.state, desk.table, count, race, scenarios, decide, params, memory)
            asked += count > 1
            overruled += row != race.rows[0]
            choose(desk.table, decision, row)
        run_decision(sim, decision)
    return asked, overruled


class RolloutScheduling:
    """An agent whose likeliest rows are played on by a rule before one is chosen. Simulator only, tasks bound late.

    Args:
        name: shown in results.
        agent: says which rows are looked into; its own choice is taken if no other is clearly better.
        rule: plays on, without memory of its own from decision to decision.
        scenarios: draws of the durations, at most, for a decision.
        most_rows: rows that are looked into, at most.
        seed: of the scenarios; they have nothing to do with the simulator's own noise.
    """

    is_oracle = False
    binding = "late"

    def __init__(
        self, name: str, agent: PointerScheduling, rule: Rule, scenarios: int = 32, most_rows: int = 8, seed: int = 0
    ) -> None:
        if scenarios < 2 or most_rows < 1:
            raise InputError(f"{scenarios} scenarios, {most_rows} rows", remedy="Give at least 2 scenarios and 1 row")
        self.name, self.agent, self.rule = name, agent, rule
        self.scenarios, self.most_rows, self.seed = scenarios, most_rows, seed
        self.source = f"rollouts of {rule.name} from the agent's rows, {scenarios} draws of the durations"
        self.asked, self.overruled = 0, 0
        """Decisions of the last run that had a choice, and those in which the agent's was not taken."""

    def run(self, simulator: Simulator) -> None:
        """Serve the simulator's whole workload, compiled. Raises InputError if tasks are not bound late."""
        if simulator.spec.binding != "late":
            raise InputError(f"binding {simulator.spec.binding!r}", remedy="Rollouts need tasks that are bound late")
        sim = simulator.sim
        self.asked, self.overruled = run_rollouts(
            sim,
            self.agent.weights,
            self.agent.desk_for(sim.state),
            new_race(simulator, self.agent.num_candidates),
            min(self.most_rows, self.agent.num_candidates),
            self.scenarios,
            self.seed,
            self.rule.decide_kernel,
            self.rule.param_array,
            self.rule.new_memory(sim.state),
            simulator.default_decision(),
        )
