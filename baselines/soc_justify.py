"""Justification of plans of one task graph: everything as late as it goes, then as early, into the gaps that open."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..envs.soc_dag.library import Graph, Plan
from .soc_static import insertion_kernel

ROUNDS = 20
"""At most; most plans are done after three."""


def pushed(graph: Graph, plan: Plan, is_free: bool) -> Plan:
    """The tasks of a plan in the order of their start, each as soon as it can: on its PE, or on any (`is_free`)."""
    return Plan(*insertion_kernel(graph, plan.order, np.full_like(plan.pe, -1) if is_free else plan.pe))


def justified(graph: Graph, plans: Iterable[Plan]) -> list[Plan]:
    """Plans that are never longer: from the end back and forth again, until that no longer helps.

    From the end, tasks are placed in the order in which they finish last, as late as their successors allow; then from
    the beginning in the order in which they start now, as early as they can: on any PE, where they begin (or finish)
    best, and then once more on the PE that they have. Forward-backward improvement (Li and Willis, EJOR 1992; Valls,
    Ballestin and Quintanilla: Justification and RCPSP, EJOR 2005), with the choice of PE of HEFT.
    """
    mirror = graph.turned()
    return [_justify(graph, mirror, plan) for plan in plans]


def _justify(graph: Graph, mirror: Graph, best: Plan) -> Plan:
    for _ in range(ROUNDS):
        before = best.makespan_us
        for is_free in (True, False):
            late = pushed(mirror, best.turned(), is_free).turned()
            best = min(best, late, pushed(graph, late, is_free), key=lambda plan: plan.makespan_us)
        if best.makespan_us >= before:
            break
    return best
