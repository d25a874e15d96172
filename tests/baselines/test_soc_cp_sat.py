"""CP-SAT on task graphs: published optima, a bound that holds, plans that can be run."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from schedlab.baselines.cp_sat.soc_dag import solve
from schedlab.baselines.soc_static import STATIC, plan_rule
from schedlab.envs.core.errors import InputError
from schedlab.envs.soc_dag.check import check_schedule
from schedlab.envs.soc_dag.generate import random_layered, topcuoglu
from schedlab.envs.soc_dag.library import Graph
from schedlab.envs.soc_dag.sim import Simulator
from schedlab.envs.soc_dag.spec import PeKind, Soc, SocDagSpec, uniform_soc
from schedlab.envs.soc_dag.traces import ds3_stream
from schedlab.envs.soc_dag.workload import Dag, Workload

pytest.importorskip("ortools")
needs_data = pytest.mark.skipif("SCHEDLAB_DATA" not in os.environ, reason="no SCHEDLAB_DATA")


def test_the_published_example_has_a_better_schedule():
    """73 is optimal for the example in which HEFT takes 80."""
    soc, dag = topcuoglu()
    solution = solve(dag, soc, num_workers=2)
    assert solution.is_optimal
    assert solution.plan.makespan_us == solution.bound_us == 73


@needs_data
def test_optima_of_the_ds3_jobs():
    """On the idle 16-PE SoC: WiFi-TX, WiFi-RX, lag detection, SC-TX, SC-RX, temporal mitigation."""
    soc, stream = ds3_stream(100.0, 1)
    found = {dag.name: solve(dag, soc, seconds=60.0, num_workers=4) for dag in stream.dags}
    assert all(solution.is_optimal for solution in found.values())
    assert {name: solution.plan.makespan_us for name, solution in found.items()} == {
        "WiFi_Transmitter": 69,
        "WiFi_Receiver": 288,
        "lag_detection": 176,
        "SC-T": 56,
        "SC-R": 153,
        "Temporal_Mitigation": 79,
    }


def brute_force(dag: Dag, soc: Soc) -> float:
    """The shortest schedule of a small graph: all orders and PEs, without gaps left."""
    graph, best = Graph.of(dag, soc), np.inf

    def extend(placed: dict[int, tuple[int, float]], free: list[float]) -> None:
        nonlocal best
        if len(placed) == dag.num_tasks:
            best = min(best, max(finish for _, finish in placed.values()))
            return
        for task in range(dag.num_tasks):
            parents = graph.in_task[graph.in_first[task] : graph.in_first[task + 1]]
            if task in placed or any(parent not in placed for parent in parents):
                continue
            for pe in range(soc.num_pes):
                begin = free[pe]
                for edge in range(graph.in_first[task], graph.in_first[task + 1]):
                    source, made = placed[graph.in_task[edge]]
                    us = graph.latency[source, pe] + graph.in_volume[edge] / graph.bandwidth[source, pe]
                    begin = max(begin, made + us)
                finish = begin + graph.times[task, pe]
                if finish < best:
                    extend({**placed, task: (pe, finish)}, [finish if p == pe else f for p, f in enumerate(free)])

    extend({}, [0.0] * soc.num_pes)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_equal_to_brute_force(seed):
    """Two PEs of one kind and one of another, so that transfers between PEs of a kind and on one PE differ."""
    rng = np.random.default_rng(seed)
    soc = Soc(
        "s", (PeKind("a", 2), PeKind("b")), ((1.0, 0.5), (0.5, 1.0)), ((1.0, 0.0), (0.0, 1.0)), self_bandwidth=4.0
    )
    times = rng.integers(1, 12, (5, 2)).astype(float)
    if seed % 2:
        times[rng.integers(5), 1] = np.inf
    pairs = [(a, b) for b in range(5) for a in range(b) if rng.random() < 0.5]
    dag = Dag.from_arrays("small", times, pairs, 4.0 * rng.integers(0, 4, len(pairs)))
    solution = solve(dag, soc, num_workers=2)
    assert solution.is_optimal
    assert solution.plan.makespan_us == brute_force(dag, soc)


def test_bound_and_plan_with_broken_times():
    """Times are rounded down to the resolution: the bound stays one, the plan has the true times and can be run."""
    soc, dag = uniform_soc(3), random_layered(14, 3, seed=5)
    solution = solve(dag, soc, seconds=10.0, resolution_us=0.05, num_workers=2)
    assert solution.bound_us <= solution.plan.makespan_us
    assert solution.gap < 0.05
    assert solution.plan.makespan_us <= min(static(Graph.of(dag, soc)).makespan_us for static in STATIC.values())
    workload, spec = Workload.from_arrays("w", soc.kind_names, [dag]), SocDagSpec(soc, binding="arrival")
    simulator = Simulator(spec)
    simulator.reset(workload)
    simulator.run(plan_rule("cp_sat", [solution.plan]))
    assert check_schedule(simulator.timeline(), workload, spec) == []
    assert simulator.timeline().finish.max() == pytest.approx(solution.plan.makespan_us)


def test_without_time_the_hint_remains():
    soc, dag = uniform_soc(4), random_layered(40, 4, seed=1)
    solution = solve(dag, soc, seconds=0.01, num_workers=1)
    assert solution.plan.makespan_us <= min(static(Graph.of(dag, soc)).makespan_us for static in STATIC.values())
    assert 0 <= solution.bound_us <= solution.plan.makespan_us


def test_errors(monkeypatch):
    _, dag = topcuoglu()
    with pytest.raises(InputError, match="has times on 3 kinds"):
        solve(dag, uniform_soc(2))
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    with pytest.raises(InputError, match=r"schedlab\[exact\]"):
        solve(dag, uniform_soc(3))
