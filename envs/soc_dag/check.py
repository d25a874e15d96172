"""Is this record possible? An independent check of a `Timeline`, in plain Python, task by task.

`check_schedule` holds for every backend: tasks run once, where they can, after their predecessors and their data, one
at a time on a PE, bound when the spec allows. `check_durations` holds for the simulator's clock: executions take what
the noise says. Both return a list of problems, empty if there is none.
"""

from __future__ import annotations

import math
from itertools import pairwise

from .spec import SocDagSpec
from .timeline import Timeline
from .workload import Dag, Workload, noise_draws

MOST_PROBLEMS = 20
"""Problems after which a check stops looking."""


def check_schedule(
    timeline: Timeline, workload: Workload, spec: SocDagSpec, *, tolerance_us: float = 1e-6
) -> list[str]:
    """Whether a finished run is one that the SoC and the jobs allow.

    `tolerance_us` is for the clocks of real backends; those pass an SoC without links, as their transfers are what they
    are.
    """
    kinds = _kinds(spec)
    problems = _check_tasks(timeline, workload, spec, kinds, tolerance_us)
    if not problems:  # the others look tasks up by their PE
        problems = _check_data(timeline, workload, spec, kinds, tolerance_us)
        problems += _check_pes(timeline, spec, tolerance_us)
    return problems[:MOST_PROBLEMS]


def _kinds(spec: SocDagSpec) -> list[int]:
    """The kind of each PE."""
    return [k for k, kind in enumerate(spec.soc.kinds) for _ in range(kind.count)]


def _jobs(timeline: Timeline, workload: Workload) -> list[tuple[int, Dag, int]]:
    """Of every job its number, its graph and its first task."""
    return [(j, workload.dags[g], int(timeline.first_task[j])) for j, g in enumerate(workload.dag_of_job)]


def _check_tasks(
    timeline: Timeline, workload: Workload, spec: SocDagSpec, kinds: list[int], tolerance_us: float
) -> list[str]:
    """Every task ran once, where it can, after its job arrived and it was bound; jobs end with their last task."""
    problems: list[str] = []
    for job, dag, first in _jobs(timeline, workload):
        num_tasks = int(timeline.first_task[job + 1]) - first
        if num_tasks != dag.num_tasks:
            return [f"job {job}: {num_tasks} tasks, its graph has {dag.num_tasks}"]
        arrival, last = float(workload.arrival_us[job]), 0.0
        for place, name in enumerate(dag.task_names):
            task = first + place
            where = f"task {task} (job {job}, {name})"
            pe, level = int(timeline.pe[task]), int(timeline.level[task])
            bound, start, finish = (float(a[task]) for a in (timeline.bound_at, timeline.start, timeline.finish))
            last = max(last, finish)
            if not 0 <= pe < len(kinds) or math.isinf(dag.times[place, kinds[pe]]):
                problems.append(f"{where}: on PE {pe}, which cannot run it")
                continue
            mhz = spec.soc.kinds[kinds[pe]].frequencies_mhz
            default = range(len(mhz))[spec.soc.kinds[kinds[pe]].default_level]
            if not 0 <= level < len(mhz) or (level != default and not spec.choose_frequency):
                problems.append(f"{where}: at operating point {level}")
            if not (arrival - tolerance_us <= bound <= start + tolerance_us and start <= finish < math.inf):
                problems.append(f"{where}: arrives {arrival}, bound {bound}, starts {start}, ends {finish}")
        if not abs(timeline.job_finish[job] - last) <= tolerance_us:
            problems.append(f"job {job}: finished at {timeline.job_finish[job]}, its last task ends at {last}")
    return problems


def _check_data(
    timeline: Timeline, workload: Workload, spec: SocDagSpec, kinds: list[int], tolerance_us: float
) -> list[str]:
    """Tasks start when their data are there, and are bound when the spec allows."""
    problems: list[str] = []
    for _, dag, first in _jobs(timeline, workload):
        for (a, b), volume in zip(dag.edges, dag.volumes, strict=True):
            source, target = first + int(a), first + int(b)
            made, bound = float(timeline.finish[source]), float(timeline.bound_at[target])
            sent = made if spec.transfers == "push" else max(made, bound)
            there = sent + _transfer(spec, kinds, int(timeline.pe[source]), int(timeline.pe[target]), float(volume))
            if timeline.start[target] < there - tolerance_us:
                problems.append(
                    f"task {target} starts at {timeline.start[target]}, data of task {source} come at {there}"
                )
            if spec.binding != "arrival" and bound < made - tolerance_us:
                problems.append(f"task {target} is bound at {bound}, before task {source} ends at {made}")
    return problems


def _check_pes(timeline: Timeline, spec: SocDagSpec, tolerance_us: float) -> list[str]:
    """A PE runs one task at a time, and late binding finds it idle."""
    problems: list[str] = []
    for pe in range(spec.soc.num_pes):
        tasks = [task for task in range(len(timeline.pe)) if timeline.pe[task] == pe]
        tasks.sort(key=lambda task: (timeline.start[task], timeline.finish[task]))
        for one, other in pairwise(tasks):
            if timeline.start[other] < timeline.finish[one] - tolerance_us:
                problems.append(f"PE {pe} runs task {other} from {timeline.start[other]}, before task {one} ends")
            if spec.binding == "late" and timeline.bound_at[other] < timeline.finish[one] - tolerance_us:
                problems.append(f"task {other} is bound to PE {pe} before task {one} ends there")
    return problems


def check_durations(timeline: Timeline, workload: Workload, spec: SocDagSpec, seed: int) -> list[str]:
    """Whether every execution takes its nominal time under the noise of this seed."""
    problems: list[str] = []
    kinds, draws, sigma = _kinds(spec), noise_draws(workload, seed), spec.noise_sigma
    for job, dag, first in _jobs(timeline, workload):
        for place in range(dag.num_tasks):
            task = first + place
            kind = kinds[int(timeline.pe[task])]
            mhz = spec.soc.kinds[kind].frequencies_mhz
            nominal = float(dag.times[place, kind]) * mhz[-1] / mhz[int(timeline.level[task])]
            expected = nominal
            if spec.noise == "normal":
                expected = max(float(round(nominal + sigma * nominal * float(draws[task]))), 1.0)
            elif spec.noise == "lognormal":
                expected = nominal * math.exp(sigma * float(draws[task]) - sigma**2 / 2)
            took = float(timeline.finish[task] - timeline.start[task])
            if abs(took - expected) > 1e-9 * max(float(timeline.finish[task]), 1.0):
                problems.append(f"task {task} (job {job}, {dag.task_names[place]}) took {took} us, not {expected}")
    return problems[:MOST_PROBLEMS]


def _transfer(spec: SocDagSpec, kinds: list[int], source: int, target: int, volume: float) -> float:
    """us to move `volume` from one PE to another."""
    if source == target:
        us = volume / spec.soc.self_bandwidth
    else:
        a, b = kinds[source], kinds[target]
        us = spec.soc.latency_us[a][b] if spec.soc.latency_us else 0.0
        us += volume / spec.soc.bandwidth[a][b] if spec.soc.bandwidth else 0.0
    return float(math.floor(us)) if spec.soc.whole_us else us
