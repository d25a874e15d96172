"""What could have been done: before each decision the future is played out as it will be, by every row.

A rolling horizon with the future known, for streams of jobs: at each decision the agent's likeliest rows, and the
choice of a rule, are each played on by that rule until the jobs that are there and the next few to come are finished,
with the arrivals and durations that will be; and the best one is taken (Bertsekas, Tsitsiklis and Wu, J. Heuristics
1997, where nothing is random). An oracle: it says how much is left to win, in a schedule that is possible.
"""

from __future__ import annotations

from ..envs.core.errors import InputError
from ..envs.core.kernel import UNCOUNTED, njit
from ..envs.soc_dag.env import loss_of
from ..envs.soc_dag.rule import Rule
from ..envs.soc_dag.sim import Simulator, run_decision, run_rule
from ..envs.soc_dag.state import reset_decision
from ..envs.soc_dag.table import choose
from .soc_dag import PointerScheduling, see
from .soc_dag_rollout import Race, likeliest_rows, load, new_race

RULES_OWN = -1
"""In place of a row: what the rule itself decides."""
TIE = 1e-6
"""Weight of the time that jobs are there, in units: what decides where the objective is the same."""


@njit(**UNCOUNTED)
def play_known(sim, race, table, row, num_more, decide, params, memory):
    """The objective if a row is chosen now and the rule decides from there on, in the future that will be."""
    for pe in range(sim.state.engine[0].num_pes):
        race.ends[pe] = sim.next_at[pe]
    load(sim.state, race, num_more)
    played = race.played
    played.books[0].live_us = sim.books[0].live_us
    if row != RULES_OWN:
        reset_decision(race.decision)
        choose(table, race.decision, row)
        run_decision(played, race.decision)
    run_rule(played, decide, params, memory, race.decision)
    return loss_of(played) + TIE * played.books[0].live_us / played.state.engine[0].unit


@njit
def run_known(sim, weights, desk, race, most_rows, horizon, decide, params, memory, decision):
    """Run to the end, each decision the best of `most_rows` rows and of the rule's own."""
    while not sim.books[0].done:
        reset_decision(decision)
        if see(sim.state, desk, decision):
            count = likeliest_rows(weights, desk, race.rows, most_rows)
            num_more = min(horizon, len(sim.arrivals) - sim.state.engine[0].num_arrived)
            best = RULES_OWN
            least = play_known(sim, race, desk.table, RULES_OWN, num_more, decide, params, memory)
            for i in range(count):
                loss = play_known(sim, race, desk.table, race.rows[i], num_more, decide, params, memory)
                if loss < least:
                    best, least = race.rows[i], loss
            reset_decision(decision)
            if best == RULES_OWN:
                decide(sim.state, params, memory, decision)
            else:
                choose(desk.table, decision, best)
        run_decision(sim, decision)


class HindsightScheduling:
    """The best of an agent's likeliest rows and a rule's own choice, by what will come. Simulator only, bound late.

    Args:
        name: shown in results.
        agent: says which rows are looked into.
        rule: plays on, without memory of its own from decision to decision.
        horizon_jobs: jobs to come that are played to their end, beside those that are there.
        most_rows: rows that are looked into, at most.
    """

    is_oracle = True
    binding = "late"

    def __init__(
        self, name: str, agent: PointerScheduling, rule: Rule, horizon_jobs: int = 12, most_rows: int = 6
    ) -> None:
        if horizon_jobs < 0 or most_rows < 1:
            raise InputError(f"{horizon_jobs} jobs, {most_rows} rows", remedy="Give at least 0 jobs and 1 row")
        self.name, self.agent, self.rule = name, agent, rule
        self.horizon_jobs, self.most_rows = horizon_jobs, most_rows
        self.source = f"a rolling horizon of {horizon_jobs} jobs with the future known, played by {rule.name}"

    def run(self, simulator: Simulator) -> None:
        """Serve the simulator's whole workload, compiled. Raises InputError if tasks are not bound late."""
        if simulator.spec.binding != "late":
            raise InputError(f"binding {simulator.spec.binding!r}", remedy="Give a spec whose tasks are bound late")
        run_known(
            simulator.sim,
            self.agent.weights,
            self.agent.desk_for(simulator.sim.state),
            race_of(simulator, self.agent.num_candidates),
            min(self.most_rows, self.agent.num_candidates),
            self.horizon_jobs,
            self.rule.decide_kernel,
            self.rule.param_array,
            self.rule.new_memory(simulator.sim.state),
            simulator.default_decision(),
        )


def race_of(simulator: Simulator, num_candidates: int) -> Race:
    """What is played on, with all that will come."""
    race, sim = new_race(simulator, num_candidates), simulator.sim
    return race._replace(played=race.played._replace(arrivals=sim.arrivals, draws=sim.draws))
