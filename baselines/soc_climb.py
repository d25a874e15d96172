"""Hill climbing from a plan of one task graph: tasks of the critical chain to other PEs and places, unless it hurts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..envs.core.kernel import njit, njit_borrowed
from ..envs.soc_dag.library import Graph, Plan, transfer_us
from .soc_justify import justified
from .soc_static import STATIC

MOVES = 500
"""Moves that are tried from a plan: 2,000 shorten graphs of 20 to 50 tasks by 0.4% more at most (measured)."""


@njit_borrowed
def write_transfers(graph, transfers) -> None:
    """us to move every edge's data (edges by target) from a PE to another, into float64 (e, P, P)."""
    num_pes, whole = len(graph.latency), graph.whole[0] != 0
    for edge in range(len(graph.in_task)):
        for a in range(num_pes):
            for b in range(num_pes):
                us = transfer_us(graph.in_volume[edge], graph.latency[a, b], graph.bandwidth[a, b], whole)
                transfers[edge, a, b] = us


@njit_borrowed
def run_order(graph, transfers, order, pe, start, finish, tail, waited_for) -> int:
    """Write the times of tasks in a topological order, each behind those before it on its PE. Returns the last one.

    waited_for int64 (n,): the task whose end, or data, a task begins with; -1: none. tail int64 (P,) is working memory.
    """
    tail[:] = -1
    end = -1
    for task in order:
        to = pe[task]
        waited_for[task] = tail[to]
        begin = finish[tail[to]] if tail[to] >= 0 else 0.0
        for edge in range(graph.in_first[task], graph.in_first[task + 1]):
            source = graph.in_task[edge]
            there = finish[source] + transfers[edge, pe[source], to]
            if there > begin:
                begin, waited_for[task] = there, source
        start[task], finish[task], tail[to] = begin, begin + graph.times[task, to], task
        if end < 0 or finish[task] > finish[end]:
            end = task
    return end


@njit_borrowed
def write_chain(end, waited_for, chain) -> int:
    """The critical chain, from its end back, into int64 (n,). Returns its length."""
    length = 0
    while end >= 0:
        chain[length] = end
        length += 1
        end = waited_for[end]
    return length


@njit_borrowed
def shift(order, place_of, task, to) -> None:
    """Move a task to another place of the order."""
    at = place_of[task]
    step = 1 if to > at else -1
    while at != to:
        order[at] = order[at + step]
        place_of[order[at]] = at
        at += step
    order[to], place_of[task] = task, to


@njit_borrowed
def window(graph, place_of, task):
    """First and last place that a task may have in the order without passing a predecessor or a successor."""
    first, last = 0, len(place_of) - 1
    for edge in range(graph.in_first[task], graph.in_first[task + 1]):
        first = max(first, place_of[graph.in_task[edge]] + 1)
    for edge in range(graph.out_first[task], graph.out_first[task + 1]):
        last = min(last, place_of[graph.out_task[edge]] - 1)
    return first, last


@njit(cache=True)
def climb_kernel(graph, order, pe, moves, seed):
    """See `climb`. Changes `order` and `pe` int64 (n,) in place; returns start and finish."""
    np.random.seed(seed)  # noqa: NPY002 - numba's own generator
    n, p = graph.times.shape
    transfers, start, finish = np.empty((len(graph.in_task), p, p)), np.empty(n), np.empty(n)
    tail, waited_for, chain, place_of = np.empty(p, np.int64), order.copy(), order.copy(), order.copy()
    write_transfers(graph, transfers)
    for at in range(n):
        place_of[order[at]] = at
    end = run_order(graph, transfers, order, pe, start, finish, tail, waited_for)
    least, length = finish[end], write_chain(end, waited_for, chain)
    for _ in range(moves):
        task, to = chain[np.random.randint(length)], np.random.randint(p)  # noqa: NPY002
        first, last = window(graph, place_of, task)
        at, was, place = place_of[task], pe[task], np.random.randint(first, last + 1)  # noqa: NPY002
        if graph.times[task, to] == np.inf or (to == was and place == at):
            continue
        pe[task] = to
        shift(order, place_of, task, place)
        end = run_order(graph, transfers, order, pe, start, finish, tail, waited_for)
        if finish[end] <= least:  # sideways, too: off plateaus
            least, length = finish[end], write_chain(end, waited_for, chain)
        else:
            pe[task] = was
            shift(order, place_of, task, at)
    run_order(graph, transfers, order, pe, start, finish, tail, waited_for)
    return start, finish


def climb(graph: Graph, plan: Plan, moves: int = MOVES, seed: int = 0) -> Plan:
    """A plan that is never longer: `moves` random moves of critical tasks, undone where they lengthen it.

    A task moves to any PE and any place in the order that its precedences allow (Wu, Shu and Gu: Efficient local search
    for DAG scheduling, TPDS 2001). Without moves: the plan with every task as early as its order allows.
    """
    order, pe = plan.order, plan.pe.astype(np.int64)
    start, finish = climb_kernel(graph, order, pe, moves, seed)
    return Plan(pe, start, finish)


def best_climbed(graph: Graph, plans: Iterable[Plan], moves: int = MOVES, seed: int = 0) -> Plan:
    """The shortest of plans, after climbing from each."""
    return min((climb(graph, plan, moves, seed + i) for i, plan in enumerate(plans)), key=lambda plan: plan.makespan_us)


def climb_from_static(graph: Graph, starts: int = 64, moves: int = MOVES) -> Plan:
    """The best of `starts` climbs from the justified plans of the static schedulers, which take turns."""
    plans = justified(graph, (scheduler(graph) for scheduler in STATIC.values()))
    return best_climbed(graph, (plans[i % len(plans)] for i in range(starts)), moves)
