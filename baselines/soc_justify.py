"""Justification of plans of one task graph: everything as late as it goes, then as early, into the gaps that open."""

from __future__ import annotations

import numpy as np

from ..envs.core.kernel import njit
from ..envs.soc_dag.library import Graph, Plan
from .soc_static import gap_for, place, place_soonest, write_arrivals

ROUNDS = 20
"""At most; most plans are done after three."""


@njit(cache=True)
def schedule_kernel(graph, order, pe, is_free):
    """Place tasks in a topological order as soon as they can, in gaps too: on their PE, or where they finish first.

    order, pe int64 (n,). Returns pe, start and finish.
    """
    n, p = graph.times.shape
    last, before, following = np.full(p, -1), np.full(n, -1), np.full(n, -1)
    placed, start, finish, arrivals, extra = np.full(n, -1), np.empty(n), np.empty(n), np.empty(p), np.zeros(p)
    for task in order:
        if is_free:
            place_soonest(graph, task, extra, arrivals, last, before, following, placed, start, finish)
        else:
            write_arrivals(graph, task, placed, finish, arrivals)
            to = pe[task]
            us = graph.times[task, to]
            begin, behind = gap_for(task, arrivals[to], us, last[to], before, start, finish)
            place(task, to, begin, us, behind, last, before, following, placed, start, finish)
    return placed, start, finish


def in_order(graph: Graph, plan: Plan, is_free: bool) -> Plan:
    """The tasks of a plan in the order of their start, each as soon as it can: on its PE, or on any (`is_free`)."""
    return Plan(*schedule_kernel(graph, plan.order, plan.pe.astype(np.int64), is_free))


def justify(graph: Graph, plan: Plan) -> Plan:
    """A plan that is never longer: from the end back and forth again, until that no longer helps.

    From the end, tasks are placed in the order in which they finish last, as late as their successors allow; then from
    the beginning in the order in which they start now, as early as they can: on any PE, where they begin (or finish)
    best, and then once more on the PE that they have. Forward-backward improvement (Li and Willis, EJOR 1992; Valls,
    Ballestin and Quintanilla: Justification and RCPSP, EJOR 2005), with the choice of PE of HEFT.
    """
    mirror, best = graph.turned(), plan
    for _ in range(ROUNDS):
        before = best.makespan_us
        for is_free in (True, False):
            late = in_order(mirror, best.turned(), is_free).turned()
            best = min(best, late, in_order(graph, late, is_free), key=lambda each: each.makespan_us)
        if best.makespan_us >= before:
            break
    return best
