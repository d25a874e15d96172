"""What frequencies are worth: DS3's mix where every decision may choose one, beside racing to idle.

  python -m schedlab.experiments.soc_dag_dvfs

Every rule has the same jobs, arrivals and noise. Racing to idle is to run at the governor's frequency (DS3's
"performance": the highest): late SRPT, and the rule searched for energy times delay (`soc_dag_teachers.json`, on other
jobs), which weighs energy against finish in the choice of PE. With frequencies: slack reclaiming, which binds as late
SRPT does and slows down the tasks of jobs that have time (`baselines.soc_dag.reclaim_slack`), at the stretch that does
best; least energy; and the searched rule, which chooses the operating point as it chooses the PE. The agent is the
shipped one, without and with. The reference in hindsight: the family of the searched rules, searched on the very jobs
that it is judged on, with and without frequencies. All schedules pass the independent checker. Intervals are 95%
bootstrap intervals over seeds; the share is that of the gap between the best published rule and the reference with
frequencies.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tyro

from ..agents.soc_dag import PointerScheduling, load_pointer
from ..baselines.soc_dag import RULES
from ..baselines.soc_linear import linear_rule
from ..envs.soc_dag.check import check_durations, check_schedule
from ..envs.soc_dag.metrics import compute_metrics
from ..envs.soc_dag.rule import Rule
from ..envs.soc_dag.sim import Simulator
from ..envs.soc_dag.spec import SocDagSpec
from ..envs.soc_dag.workload import Workload
from .soc_dag_headroom import interval, row, rule_line
from .soc_dag_search import TEACHERS, StreamCell, search_linear

STRETCHES = (1.0, 1.25, 1.5, 2.0, 3.0)
"""Of slack reclaiming: how many times its shortest latency a job may take."""
RACE, BOUND = "late SRPT", "searched on these jobs, with frequencies"
NUM_PUBLISHED = 3
"""The first rows are published rules: late SRPT, slack reclaiming, least energy."""
SHOWN = {"energy": ",.0f", "mean_latency": ".1f", "p95_latency": ".0f", "deadline_misses": ".4f"}
"""Metrics that are shown, with their form."""
HEADS = ("energy, uJ", "mean latency, us", "P95", "late jobs")


@dataclass
class Config:
    """Arguments of the measurement."""

    gaps: tuple[float, ...] = (200.0, 100.0, 60.0, 50.0, 40.0)
    """Mean us between jobs."""
    noise: float = 0.2
    """Relative spread of the durations."""
    jobs: int = 500
    """Of a run."""
    seeds: int = 5
    """Paired runs."""
    generations: int = 6
    """Of the search on the jobs of the run."""


def measure(spec: SocDagSpec, rule: Rule | PointerScheduling, workloads: Sequence[Workload]) -> list[dict[str, float]]:
    """The metrics of a run on each seed, whose schedule has been checked; late is who takes more than three times the
    shortest latency, which nobody is told. Raises RuntimeError for an impossible schedule."""
    spec, found = spec.replace(binding=rule.binding), []
    simulator = Simulator(spec)
    for seed, workload in enumerate(workloads):
        simulator.reset(workload, seed)
        rule.run(simulator)
        timeline = simulator.timeline()
        problems = check_schedule(timeline, workload, spec) + check_durations(timeline, workload, spec, seed)
        if problems:
            raise RuntimeError(f"{rule.name}, seed {seed}: {problems[0]}")
        judged = workload.with_deadlines(spec.soc, 3.0)
        found.append(
            compute_metrics(replace(timeline, deadline=judged.arrival_us + judged.deadline_us), judged, spec.soc)
        )
    return found


def measure_cell(cell: StreamCell, args: Config) -> dict[str, list[dict[str, float]]]:
    """Policy -> metrics of every seed."""
    soc, stream = cell.stream(args.jobs)
    workloads = [stream.draw(np.random.default_rng(seed)) for seed in range(args.seeds)]
    races = cell.spec(soc)
    chooses = races.replace(choose_frequency=True)
    searched = linear_rule(json.loads(TEACHERS.read_text())[cell.name], "searched")
    reclaiming = RULES["slack_reclaiming"]
    order = float(reclaiming.param_array[0])
    slowed = [measure(chooses, reclaiming.with_params(order, stretch), workloads) for stretch in STRETCHES]
    agent = load_pointer()
    best = min(range(len(STRETCHES)), key=lambda i: float(column(slowed[i], "edp").mean()))
    found = {
        RACE: measure(races, RULES["late_srpt"], workloads),
        f"slack reclaiming, stretch {STRETCHES[best]:g}": slowed[best],
        "least energy": measure(chooses, RULES["least_energy"], workloads),
        "searched": measure(races, searched, workloads),
        "searched, with frequencies": measure(chooses, searched, workloads),
        "agent": measure(races, agent, workloads),
        "agent, with frequencies": measure(chooses, agent, workloads),
    }
    for name, spec in (("searched on these jobs", races), (BOUND, chooses)):
        weights, _ = search_linear(
            spec, workloads, range(args.seeds), start=searched.param_array.tolist(), generations=args.generations
        )
        found[name] = measure(spec, linear_rule(weights), workloads)
    return found


def column(runs: Sequence[Mapping[str, float]], metric: str) -> np.ndarray:
    """A metric of every seed."""
    return np.array([run[metric] for run in runs])


def main(args: Config) -> int:
    """Print the table."""
    names = ("gap", "rule", "energy times delay, of late SRPT's", "share of the gap", *HEADS)
    print(row(*names), rule_line(len(names)), sep="\n")
    for gap in args.gaps:
        found = measure_cell(StreamCell("ds3", "edp", gap, args.noise), args)
        bound = column(found[BOUND], "edp")
        bar = min(
            (column(runs, "edp") for runs in list(found.values())[:NUM_PUBLISHED]), key=lambda edp: float(edp.mean())
        )
        for name, runs in found.items():
            edp = column(runs, "edp")
            of_srpt, closed = edp / column(found[RACE], "edp"), (bar - edp) / (bar - bound).mean()
            shown = "" if name in list(found)[:NUM_PUBLISHED] else interval(closed, "{:.2f}")
            values = [f"{column(runs, metric).mean():{form}}" for metric, form in SHOWN.items()]
            ratio = "1" if name == RACE else interval(of_srpt, "{:.3f}")
            print(row(f"{gap:g}", name, ratio, shown, *values), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
