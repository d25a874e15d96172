"""Re-check a run of task graphs on a SoC from its timeline and its jobs: the schedule, the durations, every metric.

The schedule is checked by `envs.soc_dag.check`, task by task; the metrics are worked out here in plain Python, sharing
no code with `envs.soc_dag.metrics`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..envs.core.errors import InputError
from ..envs.soc_dag.check import check_durations, check_schedule
from ..envs.soc_dag.spec import Soc, SocDagSpec
from ..envs.soc_dag.timeline import Timeline
from ..envs.soc_dag.workload import Dag, Workload
from .soc_dag import workload_of
from .validate import Checked


def check_run(folder: Path, npz: Path, about: dict[str, Any]) -> Checked:
    """Re-check one run. Raises InputError if its schedule or its jobs cannot be read."""
    try:
        timeline, spec = Timeline.load(npz), SocDagSpec.from_dict(about["spec"])
        workload, seed = workload_of(about), int(about["seed"])
    except InputError:
        raise
    except Exception as error:  # a damaged archive raises anything from KeyError to zlib.error
        raise InputError(
            f"not a schedule ({error!r})", file=npz, remedy="Evaluate this run again, its schedule is damaged"
        ) from error
    problems = [("schedule", text) for text in check_schedule(timeline, workload, spec)]
    if not problems and not about.get("is_measured"):  # what real PEs take, they take
        problems = [("durations", text) for text in check_durations(timeline, workload, spec, seed)]
    inputs = [about[name] for name in ("dags", "dag_of_job", "arrival_us", "deadline_us")]
    return Checked(inputs, problems[:3], recompute(timeline, workload, spec.soc))


def recompute(timeline: Timeline, workload: Workload, soc: Soc) -> dict[str, tuple[float, str]]:
    """Every metric of a timeline: metric -> (value, unit)."""
    shortest = [critical_path_us(dag) for dag in workload.dags]
    latency, slowdown, due, missed = [], [], 0, 0
    for job, graph in enumerate(workload.dag_of_job.tolist()):
        arrival, deadline = float(workload.arrival_us[job]), float(workload.deadline_us[job])
        latency.append(float(timeline.job_finish[job]) - arrival)
        slowdown.append(latency[-1] / max(shortest[graph], 1e-9))
        if deadline < math.inf:
            due += 1
            missed += float(timeline.job_finish[job]) > arrival + deadline
    ordered = sorted(latency)
    place = 0.95 * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    mean, makespan = math.fsum(latency) / len(latency), max(timeline.job_finish.tolist())
    busy = math.fsum(timeline.finish.tolist()) - math.fsum(timeline.start.tolist())
    values = {
        "mean_latency": (mean, "us"),
        "p95_latency": (ordered[below] + (ordered[above] - ordered[below]) * (place - below), "us"),
        "mean_slowdown": (math.fsum(slowdown) / len(slowdown), "ratio"),
        "makespan": (makespan, "us"),
        "utilisation": (busy / (makespan * soc.num_pes), "share"),
        "jobs": (float(len(latency)), "count"),
    }
    if any(kind.power_w or kind.idle_w for kind in soc.kinds):
        energy = energy_uj(timeline, soc, makespan)
        values |= {"energy": (energy, "uJ"), "edp": (energy * 1e-6 * mean * 1e-6, "J s")}
    return values | ({"deadline_misses": (missed / due, "share")} if due else {})


def critical_path_us(dag: Dag) -> float:
    """The longest path with every task on its fastest PE and no transfers."""
    longest = [float(min(row)) for row in dag.times.tolist()]
    own = list(longest)
    for source, target in sorted(map(tuple, dag.edges.tolist())):
        longest[target] = max(longest[target], longest[source] + own[target])
    return max(longest)


def energy_uj(timeline: Timeline, soc: Soc, makespan: float) -> float:
    """What all PEs draw from 0 to the makespan, from one event to the next."""
    times = sorted({0.0, makespan, *timeline.start.tolist(), *timeline.finish.tolist()})
    tasks = list(
        zip(
            timeline.pe.tolist(),
            timeline.level.tolist(),
            timeline.start.tolist(),
            timeline.finish.tolist(),
            strict=True,
        )
    )
    tasks.sort(key=lambda task: task[2])
    total, first = 0.0, 0
    for kind in soc.kinds:
        mine = [task for task in tasks if first <= task[0] < first + kind.count]
        first += kind.count
        running: list[tuple[int, int, float, float]] = []
        following = 0
        for begin, end in pairwise(times):
            running = [task for task in running if task[3] > begin]
            while following < len(mine) and mine[following][2] <= begin:
                if mine[following][3] > begin:
                    running.append(mine[following])
                following += 1
            watts = kind.idle_w * (kind.count - len(running))
            if running and kind.power_w:
                watts += math.fsum(kind.power_w[task[1]][len(running) - 1] for task in running) / len(running)
            total += watts * (end - begin)
    return total
