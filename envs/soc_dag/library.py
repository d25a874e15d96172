"""Task graphs on one SoC as flat arrays, for kernels: times by PE, edges both ways, links, upward ranks.

`Graph` is what static schedulers (HEFT and its kin) read, one graph at a time. `Library` is what the simulator copies a
job from when it arrives: the graphs of a workload end to end. A `Plan` is a schedule of one graph.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.kernel import njit_borrowed
from .spec import Soc
from .workload import Dag, shortest_us


class Graph(NamedTuple):
    """One task graph on P PEs. Tasks are in a topological order."""

    times: np.ndarray  # (n, P) float64 us; inf: cannot run there
    out_first: np.ndarray  # (n + 1,) int64: edges out of task i are out_first[i] : out_first[i + 1]
    out_task: np.ndarray  # (e,) int64 their targets
    out_volume: np.ndarray  # (e,) float64
    in_first: np.ndarray  # (n + 1,) int64: edges into task i are in_first[i] : in_first[i + 1]
    in_task: np.ndarray  # (e,) int64 their sources
    in_volume: np.ndarray  # (e,) float64
    latency: np.ndarray  # (P, P) float64 us
    bandwidth: np.ndarray  # (P, P) float64
    whole: np.ndarray  # (1,) int64: 1 if transfers are rounded down to whole us

    @classmethod
    def of(cls, dag: Dag, soc: Soc) -> Graph:
        """The arrays of a graph whose times are on this SoC's kinds of PEs."""
        latency, bandwidth = soc.links()
        sources, targets = dag.edges.T
        by_target = np.lexsort((sources, targets))
        size = range(dag.num_tasks + 1)
        return cls(
            np.ascontiguousarray(dag.times[:, soc.kind_of_pe]),
            np.searchsorted(sources, size).astype(np.int64),
            np.ascontiguousarray(targets),
            dag.volumes.copy(),
            np.searchsorted(targets[by_target], size).astype(np.int64),
            sources[by_target],
            dag.volumes[by_target],
            latency,
            bandwidth,
            np.array([soc.whole_us], np.int64),
        )

    def turned(self) -> Graph:
        """The graph with its edges turned round, its tasks in the opposite order and links that go the other way."""
        last = len(self.times) - 1
        return Graph(
            np.ascontiguousarray(self.times[::-1]),
            self.in_first[-1] - self.in_first[::-1],
            last - self.in_task[::-1],
            self.in_volume[::-1].copy(),
            self.out_first[-1] - self.out_first[::-1],
            last - self.out_task[::-1],
            self.out_volume[::-1].copy(),
            np.ascontiguousarray(self.latency.T),
            np.ascontiguousarray(self.bandwidth.T),
            self.whole,
        )


class Plan(NamedTuple):
    """Where and when every task of one graph runs."""

    pe: np.ndarray  # (n,) int64
    start: np.ndarray  # (n,) float64 us
    finish: np.ndarray  # (n,) float64 us

    @property
    def makespan_us(self) -> float:
        return float(self.finish.max())

    @property
    def order(self) -> np.ndarray:
        """int64 (n,): the tasks in the order of their start; tasks without length before those that begin with them."""
        return np.lexsort((np.arange(len(self.start)), self.finish, self.start))

    def turned(self) -> Plan:
        """The plan read from its end: one of the turned graph. Twice: the plan itself, from time 0."""
        end = self.makespan_us
        return Plan(self.pe[::-1].copy(), end - self.finish[::-1], end - self.start[::-1])


@njit_borrowed
def transfer_us(volume: float, latency: float, bandwidth: float, whole: bool) -> float:
    """Time to move `volume` over a link."""
    us = latency + volume / bandwidth
    return np.floor(us) if whole else us


@njit_borrowed
def link_sums(latency, bandwidth):
    """(sum of latencies, sum of us a unit of volume, number) of all pairs of different PEs."""
    num_pes, us, per_unit = len(latency), 0.0, 0.0
    for p in range(num_pes):
        for q in range(num_pes):
            if p != q:
                us += latency[p, q]
                per_unit += 1.0 / bandwidth[p, q]
    return us, per_unit, num_pes * (num_pes - 1)


@njit_borrowed
def mean_transfer_us(graph: Graph, volume: float, sums) -> float:
    """Mean over all pairs of different PEs of the time to move `volume`, 0 with one PE. `sums` are `link_sums`."""
    us, per_unit, pairs = sums
    if pairs == 0:
        return 0.0
    if graph.whole[0] == 0:
        return (us + per_unit * volume) / pairs
    num_pes, total = len(graph.latency), 0.0
    for p in range(num_pes):
        for q in range(num_pes):
            if p != q:
                total += transfer_us(volume, graph.latency[p, q], graph.bandwidth[p, q], True)
    return total / pairs


@njit_borrowed
def write_mean_transfers(graph: Graph, moved) -> None:
    """`mean_transfer_us` of every edge, into float64 (e,)."""
    sums = link_sums(graph.latency, graph.bandwidth)
    for edge in range(len(moved)):
        moved[edge] = mean_transfer_us(graph, graph.out_volume[edge], sums)


@njit_borrowed
def mean_time(row) -> float:
    """Mean of a task's times over the PEs that can run it."""
    total, count = 0.0, 0
    for us in row:
        if us < np.inf:
            total += us
            count += 1
    return total / count


@njit_borrowed
def write_upward_ranks(graph: Graph, ranks) -> None:
    """HEFT's upward ranks into float64 (n,): a task's mean time, plus the largest sum of transfer and rank behind it.

    Topcuoglu, Hariri, Wu: Performance-effective and low-complexity task scheduling for heterogeneous computing, TPDS
    2002. Means are over the PEs that can run a task, and over all pairs of different PEs for transfers.
    """
    first, targets, volumes, times = graph.out_first, graph.out_task, graph.out_volume, graph.times
    sums = link_sums(graph.latency, graph.bandwidth)
    for task in range(len(times) - 1, -1, -1):
        behind = 0.0
        for edge in range(first[task], first[task + 1]):
            moved = mean_transfer_us(graph, volumes[edge], sums)
            behind = max(behind, moved + ranks[targets[edge]])
        ranks[task] = mean_time(times[task]) + behind


@njit_borrowed
def write_optimistic_costs(graph: Graph, costs) -> None:
    """PEFT's table into float64 (n, P): us from a task's end on a PE to the end of the graph, with nobody in the way.

    Arabnejad and Barbosa: List scheduling algorithm for heterogeneous systems by an optimistic cost table, TPDS 2014.
    Every task behind it takes the PE that is best for what follows; transfers are means as in `write_upward_ranks`.
    """
    n, p = graph.times.shape
    sums = link_sums(graph.latency, graph.bandwidth)
    for task in range(n - 1, -1, -1):
        for at in range(p):
            costs[task, at] = 0.0
        for edge in range(graph.out_first[task], graph.out_first[task + 1]):
            target = graph.out_task[edge]
            anywhere = np.inf
            for at in range(p):
                anywhere = min(anywhere, costs[target, at] + graph.times[target, at])
            anywhere += mean_transfer_us(graph, graph.out_volume[edge], sums)
            for at in range(p):
                here = costs[target, at] + graph.times[target, at]
                costs[task, at] = max(costs[task, at], min(here, anywhere))


DAG_DTYPE = np.dtype(
    [
        ("first_task", "i8"),
        ("num_tasks", "i8"),
        ("first_edge", "i8"),
        ("num_edges", "i8"),
        ("shortest", "f8"),  # critical path on the fastest PEs, without transfers
        ("best_work", "f8"),  # sum of the tasks' best times
    ],
    align=True,
)

NODE_DTYPE = np.dtype(
    [
        ("rank", "f8"),  # upward rank
        ("best", "f8"),  # shortest time on any PE
        ("mean", "f8"),  # mean time over the PEs that can run it
        ("kinds", "i8"),  # bit (kind % 63) is set if PEs of that kind can run it
        ("first_out", "i8"),  # edges out of it, in the library's numbering
        ("num_out", "i8"),
        ("num_in", "i8"),
    ],
    align=True,
)


class Library(NamedTuple):
    """The graphs of a workload end to end, for P PEs: n tasks and e edges in all."""

    dags: np.ndarray  # (D,) DAG_DTYPE
    nodes: np.ndarray  # (n,) NODE_DTYPE
    times: np.ndarray  # (n, P) float64
    targets: np.ndarray  # (e,) int64, counted from the first task of the graph
    volumes: np.ndarray  # (e,) float64
    moved: np.ndarray  # (e,) float64 mean us to move them between two PEs
    ahead: np.ndarray  # (n, P) float64 `write_optimistic_costs`


def build_library(dags: tuple[Dag, ...], soc: Soc) -> Library:
    """The library of these graphs on an SoC with their kinds of PEs."""
    rows, parts = np.zeros(len(dags), DAG_DTYPE), []
    kind_bits = np.int64(1) << (np.arange(len(soc.kinds)) % 63)
    first_task = first_edge = 0
    for row, dag in zip(rows, dags, strict=True):
        graph = Graph.of(dag, soc)
        node = np.zeros(dag.num_tasks, NODE_DTYPE)
        ranks, ahead, moved = np.empty(dag.num_tasks), np.empty(graph.times.shape), np.empty(len(dag.edges))
        write_upward_ranks(graph, ranks)
        write_optimistic_costs(graph, ahead)
        write_mean_transfers(graph, moved)
        can_run = np.isfinite(dag.times)
        node["rank"], node["best"] = ranks, graph.times.min(1)
        node["mean"] = np.where(np.isfinite(graph.times), graph.times, 0.0).sum(1) / np.isfinite(graph.times).sum(1)
        node["kinds"] = np.bitwise_or.reduce(np.where(can_run, kind_bits, 0), axis=1)
        node["first_out"] = first_edge + graph.out_first[:-1]
        node["num_out"], node["num_in"] = np.diff(graph.out_first), np.diff(graph.in_first)
        row["first_task"], row["num_tasks"], row["first_edge"] = first_task, dag.num_tasks, first_edge
        row["num_edges"], row["shortest"], row["best_work"] = len(dag.edges), shortest_us(dag), node["best"].sum()
        first_task, first_edge = first_task + dag.num_tasks, first_edge + len(dag.edges)
        parts.append((node, graph.times, graph.out_task, graph.out_volume, moved, ahead))
    return Library(rows, *(np.ascontiguousarray(np.concatenate(part)) for part in zip(*parts, strict=True)))
