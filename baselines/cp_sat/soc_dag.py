"""The shortest schedule of a task graph on unlike PEs, or a bound on it: CP-SAT with alternative PEs and transfers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...envs.core.errors import InputError
from ...envs.soc_dag.library import Graph, Plan
from ...envs.soc_dag.spec import Soc
from ...envs.soc_dag.workload import Dag
from ..soc_static import STATIC, plan_of_order


@dataclass(frozen=True)
class Solution:
    """What CP-SAT found."""

    plan: Plan
    bound_us: float
    """No schedule is shorter."""
    is_optimal: bool
    seconds: float
    """Wall time of the search."""

    @property
    def gap(self) -> float:
        """Makespan over bound, less one."""
        return self.plan.makespan_us / self.bound_us - 1.0 if self.bound_us > 0 else math.inf


def solve(
    dag: Dag,
    soc: Soc,
    *,
    seconds: float = 30.0,
    resolution_us: float = 1.0,
    num_workers: int = 8,
    seed: int = 0,
    hint: Plan | None = None,
) -> Solution:
    """Minimise the makespan of one graph on an idle SoC.

    Every task has an optional interval on each PE that can run it; a PE's intervals do not overlap; a successor begins
    after its predecessor's end plus the transfer between their PEs.

    Args:
        dag: the graph; its times are on the SoC's kinds of PEs.
        soc: the SoC.
        seconds: wall time to search for.
        resolution_us: times are counted in these and rounded down, so that the bound holds; the plan is worked out anew
            with the true times. Whole-us problems are exact at the default.
        num_workers: threads of the search.
        seed: of the search.
        hint: a plan to begin with; default: the best of `soc_static.STATIC`.

    Raises:
        InputError: without ortools, and if the graph does not belong to the SoC.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise InputError("CP-SAT needs ortools", remedy="pip install 'schedlab[exact]'") from error
    if dag.times.shape[1] != len(soc.kinds):
        raise InputError(
            f"graph {dag.name!r} has times on {dag.times.shape[1]} kinds of PEs, SoC {soc.name!r} has {len(soc.kinds)}",
            remedy="Give a column for each kind",
        )
    graph = Graph.of(dag, soc)
    first = hint or min((static(graph) for static in STATIC.values()), key=lambda plan: plan.makespan_us)
    model = _Model(cp_model.CpModel(), graph, soc, resolution_us, math.ceil(first.makespan_us / resolution_us))
    model.add_hint(first, resolution_us)
    solver: Any = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = num_workers
    solver.parameters.random_seed = seed
    status = solver.solve(model.model)
    bound = max(float(solver.best_objective_bound), 0.0) * resolution_us
    plan = first
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        pe = np.array(
            [next(p for p, x in model.on[t].items() if solver.boolean_value(x)) for t in range(len(graph.times))]
        )
        start = np.array([solver.value(s) for s in model.start])
        finish = np.array([solver.value(e) for e in model.end])
        found = plan_of_order(graph, pe, np.lexsort((np.arange(len(start)), finish, start)))
        plan = min((found, first), key=lambda one: one.makespan_us)
    return Solution(plan, bound, plan.makespan_us <= bound * (1 + 1e-9), float(solver.wall_time))


class _Model:
    """The constraints of one graph; times are whole numbers of `resolution_us`, rounded down."""

    def __init__(self, model: Any, graph: Graph, soc: Soc, resolution_us: float, horizon: int) -> None:
        self.model, self.graph, self.soc = model, graph, soc
        n, p = graph.times.shape
        self.kind = soc.kind_of_pe
        self.start = [model.new_int_var(0, horizon, f"start{t}") for t in range(n)]
        self.end = [model.new_int_var(0, horizon, f"end{t}") for t in range(n)]
        self.on: list[dict[int, Any]] = []
        intervals: list[list[Any]] = [[] for _ in range(p)]
        for t in range(n):
            self.on.append({})
            for pe in np.flatnonzero(np.isfinite(graph.times[t])).tolist():
                x = self.on[t][pe] = model.new_bool_var(f"on{t},{pe}")
                units = math.floor(graph.times[t, pe] / resolution_us + 1e-9)
                intervals[pe].append(
                    model.new_optional_interval_var(self.start[t], units, self.end[t], x, f"run{t},{pe}")
                )
            model.add_exactly_one(self.on[t].values())
        for pe in range(p):
            model.add_no_overlap(intervals[pe])
        self.of_kind = [self._kinds_of(t) for t in range(n)]
        for source in range(n):
            for edge in range(graph.out_first[source], graph.out_first[source + 1]):
                self._add_edge(source, int(graph.out_task[edge]), float(graph.out_volume[edge]), resolution_us)
        makespan = model.new_int_var(0, horizon, "makespan")
        model.add_max_equality(makespan, self.end)
        model.minimize(makespan)

    def _kinds_of(self, t: int) -> dict[int, Any]:
        """Kind of PE -> whether task t runs on one."""
        found: dict[int, Any] = {}
        for kind in dict.fromkeys(int(self.kind[pe]) for pe in self.on[t]):
            literals = [x for pe, x in self.on[t].items() if self.kind[pe] == kind]
            found[kind] = literals[0] if len(literals) == 1 else self.model.new_bool_var(f"kind{t},{kind}")
            if len(literals) > 1:
                self.model.add(sum(literals) == found[kind])
        return found

    def _add_edge(self, source: int, target: int, volume: float, resolution_us: float) -> None:
        """Precedence with the transfer between the kinds of the two PEs, or on one PE."""
        model, graph = self.model, self.graph
        model.add(self.start[target] >= self.end[source])

        def units(p: int, q: int) -> int:
            us = graph.latency[p, q] + volume / graph.bandwidth[p, q]
            return math.floor((math.floor(us) if graph.whole[0] else us) / resolution_us + 1e-9)

        first_pe = {kind: int(np.flatnonzero(self.kind == kind)[0]) for kind in range(len(self.soc.kinds))}
        on_one = units(0, 0)  # the same on every PE
        apart = {
            (a, b): units(first_pe[a], first_pe[b] + (1 if a == b else 0))
            for a in self.of_kind[source]
            for b in self.of_kind[target]
            if a != b or self.soc.kinds[a].count > 1
        }
        shared = self.on[source].keys() & self.on[target].keys()
        if on_one or any(apart.values()):
            same = model.new_bool_var(f"same{source},{target}")
            for pe, x in self.on[source].items():
                y = self.on[target].get(pe)
                if y is None:
                    model.add_implication(x, same.negated())
                else:
                    model.add_bool_or([same.negated(), x.negated(), y])
                    model.add_bool_or([same, x.negated(), y.negated()])
            if on_one and shared:
                model.add(self.start[target] >= self.end[source] + on_one).only_enforce_if(same)
            for (a, b), delay in apart.items():
                if delay:
                    literals = [self.of_kind[source][a], self.of_kind[target][b]] + ([same.negated()] if a == b else [])
                    model.add(self.start[target] >= self.end[source] + delay).only_enforce_if(literals)

    def add_hint(self, plan: Plan, resolution_us: float) -> None:
        """Begin the search with a plan."""
        for t, literals in enumerate(self.on):
            self.model.add_hint(self.start[t], math.floor(plan.start[t] / resolution_us))
            for pe, x in literals.items():
                self.model.add_hint(x, int(plan.pe[t] == pe))
