"""Jobs for a system of processing elements: task graphs (`Dag`), lists of jobs (`Workload`), their source (`Stream`).

A workload belongs to SoCs with the same kinds of PEs: the columns of `Dag.times` are those of `Workload.kind_names`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np

from ..core.errors import InputError
from .spec import Soc


@dataclass(frozen=True, eq=False)
class Dag:
    """One application: n tasks, their times on every kind of PE, and e precedences with the data they carry.

    Tasks are in a topological order: edges lead from lower to higher numbers. Arrays are read-only.
    """

    name: str
    times: np.ndarray  # (n, T) float64 us on an idle PE of each kind at its highest frequency; inf: cannot run there
    edges: np.ndarray  # (e, 2) int64 source and target, sorted
    volumes: np.ndarray  # (e,) float64 data that the target needs of the source
    task_names: tuple[str, ...]
    source: str = ""
    """Where the graph is from, as printed beside results."""

    def turned(self) -> Dag:
        """The graph with its edges turned round and its tasks in the opposite order."""
        last = self.num_tasks - 1
        return Dag.from_arrays(self.name, self.times[::-1], last - self.edges[:, ::-1], self.volumes)

    @property
    def num_tasks(self) -> int:
        return len(self.times)

    @classmethod
    def from_arrays(
        cls,
        name: str,
        times: Any,
        edges: Any = (),
        volumes: Any = 0.0,
        *,
        task_names: Sequence[str] | None = None,
        connected: bool = False,
        source: str = "",
        file: str | PathLike[str] | None = None,
    ) -> Dag:
        """A validated graph from array-likes (copied); tasks are renumbered if their order is not topological.

        Args:
            name: printed beside results.
            times: (n, T) us by kind of PE; inf where a task cannot run.
            edges: (e, 2) pairs of task numbers.
            volumes: (e,), or one number for all edges.
            task_names: (n,), default `t0`, `t1`, ...
            connected: refuse graphs that fall into several parts.
            source: where the graph is from.
            file: named in errors.

        Raises:
            InputError: for cycles, edges twice or to unknown tasks, negative times or volumes, tasks that no PE can
            run.
        """

        def error(problem: str, remedy: str) -> InputError:
            return InputError(problem if file else f"DAG {name!r}: {problem}", remedy=remedy, file=file)

        table = np.array(times, np.float64)
        if table.ndim != 2 or table.size == 0:
            raise error(f"times has shape {table.shape}", "Give (tasks, kinds of PEs)")
        names = tuple(task_names) if task_names is not None else tuple(f"t{i}" for i in range(len(table)))
        if len(names) != len(table):
            raise error(f"{len(names)} task names for {len(table)} tasks", "Give one a task")
        bad = np.argwhere(~(table >= 0))
        if len(bad):
            task, kind = bad[0]
            raise error(
                f"time of task {names[task]!r} on PE kind {kind} is {table[task, kind]}", "Give non-negative us"
            )
        nowhere = np.flatnonzero(np.isinf(table).all(1))
        if len(nowhere):
            raise error(f"no PE can run task {names[nowhere[0]]!r}", "Give it a time on at least one kind of PE")
        pairs = np.array(edges, np.int64).reshape(-1, 2)
        sizes = np.array(np.broadcast_to(np.asarray(volumes, np.float64), (len(pairs),)))
        outside = np.flatnonzero(((pairs < 0) | (pairs >= len(table))).any(1))
        if len(outside):
            raise error(f"edge {pairs[outside[0]].tolist()} leaves tasks 0..{len(table) - 1}", "Name tasks that exist")
        bad_volume = np.flatnonzero(~((sizes >= 0) & (sizes < math.inf)))
        if len(bad_volume):
            at = bad_volume[0]
            raise error(f"edge {pairs[at].tolist()} carries {sizes[at]}", "Give a finite, non-negative volume")
        keys, first, counts = np.unique(pairs[:, 0] * len(table) + pairs[:, 1], return_index=True, return_counts=True)
        if len(keys) < len(pairs):
            raise error(f"edge {pairs[first[counts.argmax()]].tolist()} is there twice", "Add up its volumes")
        order = topological_order(len(table), pairs)
        if len(order) < len(table):
            cycle = " -> ".join(names[task] for task in find_cycle(pairs, set(order)))
            raise error(f"the precedences form a cycle: {cycle}", "Remove one of these edges")
        if connected and (parts := num_parts(len(table), pairs)) > 1:
            raise error(f"the graph falls into {parts} parts", "Give each part as a job of its own, or connect them")
        place = np.empty(len(table), np.int64)
        place[order] = np.arange(len(table))
        pairs = place[pairs]
        by_source = np.lexsort((pairs[:, 1], pairs[:, 0]))
        dag = cls(name, table[order], pairs[by_source], sizes[by_source], tuple(names[task] for task in order), source)
        for array in (dag.times, dag.edges, dag.volumes):
            array.setflags(write=False)
        return dag


def topological_order(num_tasks: int, edges: np.ndarray) -> list[int]:
    """Tasks so that every edge leads forward, lowest number first; tasks on or behind a cycle are left out."""
    targets: list[list[int]] = [[] for _ in range(num_tasks)]
    missing = np.bincount(edges[:, 1], minlength=num_tasks).tolist()
    for source, target in edges.tolist():
        targets[source].append(target)
    open_tasks = [task for task in range(num_tasks) if missing[task] == 0]
    order = []
    while open_tasks:
        task = heapq.heappop(open_tasks)
        order.append(task)
        for target in targets[task]:
            missing[target] -= 1
            if missing[target] == 0:
                heapq.heappush(open_tasks, target)
    return order


def find_cycle(edges: np.ndarray, done: set[int]) -> list[int]:
    """The tasks of one cycle, the first one again at the end; `done` are the tasks before all cycles."""
    before: dict[int, int] = {}
    for source, target in edges.tolist():
        if source not in done and target not in done:
            before[target] = source  # every task outside `done` has a predecessor outside
    walk = [next(iter(before))]
    while walk[-1] not in walk[:-1]:
        walk.append(before[walk[-1]])
    return walk[walk.index(walk[-1]) :][::-1]


def num_parts(num_tasks: int, edges: np.ndarray) -> int:
    """Connected components of the graph, edges taken both ways."""
    part = list(range(num_tasks))

    def root(task: int) -> int:
        while part[task] != task:
            part[task] = part[part[task]]
            task = part[task]
        return task

    for source, target in edges.tolist():
        part[root(source)] = root(target)
    return sum(root(task) == task for task in range(num_tasks))


@dataclass(frozen=True, eq=False)
class Workload:
    """J jobs in order of arrival, each a run of one of D graphs. All of it is the future until a job has arrived."""

    name: str
    kind_names: tuple[str, ...]
    dags: tuple[Dag, ...]
    dag_of_job: np.ndarray  # (J,) int64
    arrival_us: np.ndarray  # (J,) float64, not decreasing
    deadline_us: np.ndarray  # (J,) float64, after the arrival; inf: none
    source: str = ""

    def __len__(self) -> int:
        """Number of jobs."""
        return len(self.dag_of_job)

    @property
    def task_offsets(self) -> np.ndarray:
        """int64 (J + 1,): tasks are numbered through the jobs, those of job j from task_offsets[j] on."""
        sizes = np.array([dag.num_tasks for dag in self.dags])
        return np.concatenate([[0], np.cumsum(sizes[self.dag_of_job])])

    @property
    def num_tasks(self) -> int:
        return int(self.task_offsets[-1])

    @classmethod
    def from_arrays(
        cls,
        name: str,
        kind_names: Sequence[str],
        dags: Sequence[Dag],
        dag_of_job: Any = None,
        arrival_us: Any = None,
        deadline_us: Any = math.inf,
        *,
        source: str = "",
    ) -> Workload:
        """A validated workload (arrays are copied). Raises InputError.

        Args:
            name: printed beside results.
            kind_names: the kinds of PEs, columns of every `Dag.times`.
            dags: the graphs.
            dag_of_job: (J,) graph of each job; default: one job of each graph.
            arrival_us: (J,); default: all at 0.
            deadline_us: (J,) us after the arrival, or one number for all; inf: none.
            source: where the jobs are from.
        """

        def error(problem: str, remedy: str) -> InputError:
            return InputError(f"workload {name!r}: {problem}", remedy=remedy)

        if not dags:
            raise error("there is no graph", "Give at least one Dag")
        kinds = tuple(kind_names)
        for dag in dags:
            if dag.times.shape[1] != len(kinds):
                raise error(
                    f"graph {dag.name!r} has times on {dag.times.shape[1]} kinds of PEs, not on {', '.join(kinds)}",
                    "Give a column for each kind",
                )
        jobs = np.arange(len(dags)) if dag_of_job is None else np.array(dag_of_job, np.int64).reshape(-1)
        arrivals = np.zeros(len(jobs)) if arrival_us is None else np.array(arrival_us, np.float64).reshape(-1)
        deadlines = np.array(np.broadcast_to(np.asarray(deadline_us, np.float64), jobs.shape))
        if not len(jobs) or not 0 <= jobs.min() <= jobs.max() < len(dags):
            raise error(
                f"dag_of_job names graphs {np.unique(jobs)[:5]} of {len(dags)}", "Give at least one job, by index"
            )
        if len(arrivals) != len(jobs):
            raise error(f"{len(arrivals)} arrivals for {len(jobs)} jobs", "Give one a job")
        if not (np.isfinite(arrivals).all() and arrivals[0] >= 0 and (np.diff(arrivals) >= 0).all()):
            raise error("arrivals are negative, not finite or not in order", "Sort the jobs by arrival")
        if not (deadlines > 0).all():
            raise error(f"a deadline is {deadlines[~(deadlines > 0)][0]}", "Give us after the arrival, or inf for none")
        for array in (jobs, arrivals, deadlines):
            array.setflags(write=False)
        return cls(name, kinds, tuple(dags), jobs, arrivals, deadlines, source)

    def window(self, first: int, num_jobs: int) -> Workload:
        """Some jobs on end, the first of them arriving at 0."""
        some = slice(first, first + num_jobs)
        arrivals = self.arrival_us[some]
        if not len(arrivals):
            raise InputError(
                f"window [{first}, {first + num_jobs}) of {len(self)} jobs", remedy="Choose jobs that exist"
            )
        return Workload.from_arrays(
            self.name,
            self.kind_names,
            self.dags,
            self.dag_of_job[some],
            arrivals - arrivals[0],
            self.deadline_us[some],
            source=self.source,
        )

    def with_deadlines(self, soc: Soc, slack: float) -> Workload:
        """The same jobs, due `slack` times their shortest possible latency on that SoC after their arrival."""
        if not slack > 0:
            raise InputError(f"slack is {slack}", remedy="Give a positive factor")
        shortest = np.array([shortest_us(dag) for dag in self.matching(soc).dags])
        return replace(self, deadline_us=slack * shortest[self.dag_of_job])

    def matching(self, soc: Soc) -> Workload:
        """This workload, if the SoC has its kinds of PEs in its order; else an InputError."""
        if self.kind_names != soc.kind_names:
            unknown = [name for name in self.kind_names if name not in soc.kind_names]
            raise InputError(
                f"workload {self.name!r} has times on the PE kinds {', '.join(self.kind_names)}, SoC {soc.name!r} has "
                f"{', '.join(soc.kind_names)}" + (f": {', '.join(unknown)} is unknown" if unknown else ""),
                remedy="Load the jobs for this SoC, or give the SoC these kinds in this order",
            )
        return self


def shortest_us(dag: Dag) -> float:
    """Length of the critical path with every task on its fastest PE and no transfers: no schedule is shorter."""
    best = dag.times.min(1)
    done = best.copy()
    for source, target in dag.edges:  # sorted by source, and sources come before their targets
        done[target] = max(done[target], done[source] + best[target])
    return float(done.max())


@dataclass(frozen=True, eq=False)
class Stream:
    """A source of workloads: jobs drawn from a mix of graphs, with exponential gaps between their arrivals."""

    name: str
    kind_names: tuple[str, ...]
    dags: tuple[Dag, ...]
    gap_us: float
    """Mean time between arrivals (DS3's `scale`); 0: all jobs are there at the start."""
    num_jobs: int
    weights: tuple[float, ...] = ()
    """Share of each graph; empty: equal shares."""
    slack: float = math.inf
    """Deadlines, as multiples of a graph's shortest possible latency."""
    source: str = ""

    def __post_init__(self) -> None:
        if self.num_jobs < 1 or not 0 <= self.gap_us < math.inf or not self.slack > 0:
            raise InputError(
                f"stream {self.name!r}: num_jobs {self.num_jobs}, gap_us {self.gap_us}, slack {self.slack}",
                remedy="Give at least one job, a non-negative gap and a positive slack",
            )
        if self.weights and (len(self.weights) != len(self.dags) or min(self.weights) < 0 or sum(self.weights) <= 0):
            raise InputError(
                f"stream {self.name!r}: weights {self.weights} for {len(self.dags)} graphs",
                remedy="Give a non-negative weight for each",
            )

    @cached_property
    def shortest(self) -> np.ndarray:
        """float64 (D,): `shortest_us` of each graph."""
        return np.array([shortest_us(dag) for dag in self.dags])

    def draw(self, rng: np.random.Generator) -> Workload:
        """One workload, whose first job arrives at 0."""
        shares = np.array(self.weights or [1.0] * len(self.dags))
        jobs = rng.choice(len(self.dags), self.num_jobs, p=shares / shares.sum())
        gaps = self.gap_us * rng.standard_exponential(self.num_jobs - 1)
        return Workload.from_arrays(
            self.name,
            self.kind_names,
            self.dags,
            jobs,
            np.concatenate([[0.0], np.cumsum(gaps)]),
            self.slack * self.shortest[jobs] if self.slack < math.inf else math.inf,
            source=self.source,
        )


def noise_draws(workload: Workload, seed: int) -> np.ndarray:
    """float64 (num_tasks,) standard normals, one for each execution, in the order of `Workload.task_offsets`.

    A draw belongs to (seed, task of the job), whatever the policy does and wherever the task runs: policies are
    compared under common random numbers. More jobs at the end change no draw before them.
    """
    return np.random.default_rng([seed, 0x50C]).standard_normal(workload.num_tasks)
