"""Online rules: their decisions in small situations, and properties that hold for all of them."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedlab.baselines.soc_dag import RULES, system_spec
from schedlab.baselines.soc_static import STATIC, heft, placement_rule, plan_rule
from schedlab.envs.soc_dag.check import check_durations, check_schedule
from schedlab.envs.soc_dag.generate import random_stream
from schedlab.envs.soc_dag.library import Graph
from schedlab.envs.soc_dag.metrics import compute_metrics
from schedlab.envs.soc_dag.sim import Simulator
from schedlab.envs.soc_dag.spec import PeKind, Soc, SocDagSpec
from schedlab.envs.soc_dag.traces import ds3_stream
from schedlab.envs.soc_dag.workload import Dag, Workload, shortest_us

TWO = Soc("two", (PeKind("fast"), PeKind("slow")))
needs_data = pytest.mark.skipif("SCHEDLAB_DATA" not in os.environ, reason="no SCHEDLAB_DATA")


def run(name: str, dags: list[Dag], arrivals: list[float] | None = None, soc: Soc = TWO, **changes):
    """(pe, start) of all tasks under a rule, as published."""
    spec = system_spec(RULES[name], SocDagSpec(soc)).replace(**changes)
    workload = Workload.from_arrays("w", soc.kind_names, dags, arrival_us=arrivals)
    simulator = Simulator(spec)
    simulator.reset(workload)
    simulator.run(RULES[name])
    timeline = simulator.timeline()
    assert check_schedule(timeline, workload, spec) == []
    return timeline.pe.tolist(), timeline.start.tolist()


THREE = Dag.from_arrays("three", [[4, 9], [2, 3], [6, 7]])
"""Three independent tasks; on (fast, slow)."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # every task to its fastest PE, in order
        ("met", ([0, 0, 0], [0, 4, 6])),
        # 0 to fast (4); 1 would end at 6 on fast, 3 on slow; 2 at 10 on both: the lower PE
        ("eft", ([0, 1, 0], [0, 0, 4])),
        # 0 to fast, which is free first by number; 1 to slow; 2 to slow, free at 3
        ("olb", ([0, 1, 1], [0, 0, 3])),
        # the soonest finish first: 1 on fast (2), then 0 on fast (6), then 2 on slow (7)
        ("min_min", ([0, 0, 1], [2, 0, 0])),
        # the latest best finish first: 2 on fast (6), 0: 9 on slow before 10 on fast, 1: 8 on fast
        ("max_min", ([1, 0, 0], [0, 6, 0])),
        # shortest first: 1, 0, 2 to their earliest finish
        ("stf", ([0, 0, 1], [2, 0, 0])),
        # by mean time: 0 and 2 (6.5 each), in order: 0 fast; 2 slow (7); 1 fast (6)
        ("heft_rt", ([0, 0, 1], [0, 4, 0])),
        # as heft_rt, with the last task waiting for fast although slow is busy longer
        ("late_rank", ([0, 0, 1], [0, 4, 0])),
    ],
)
def test_decisions_by_hand(name, expected):
    assert run(name, [THREE]) == expected


def test_heft_rt_sees_ready_tasks_alone():
    """HEFT over the ready tasks only: neither what comes behind them nor where their data are counts (DS3)."""
    first_of_chain = Dag.from_arrays("chain", [[2, 9], [50, 60]], [(0, 1)])
    alone = Dag.from_arrays("alone", [[4, 9]])
    assert run("heft_rt", [first_of_chain, alone]) == ([0, 0, 0], [4, 6, 0])
    linked = replace(TWO, bandwidth=((1.0, 1.0), (1.0, 1.0)), self_bandwidth=math.inf)
    far = Dag.from_arrays("far", [[9, 3], [4, 8]], [(0, 1)], [100.0])
    assert run("heft_rt", [far], soc=linked) == ([1, 0], [0, 103])
    assert run("eft", [far], soc=linked) == ([1, 1], [0, 3])


def test_late_tasks_wait_for_a_better_pe():
    """The second task would take 20 on slow, and 3 after waiting until 2 for fast: late waits, eager does not."""
    dag = Dag.from_arrays("wait", [[2, 9], [3, 20]])
    assert run("late_fifo", [dag]) == ([0, 0], [0, 2])
    assert run("eager_rank", [dag]) == ([1, 0], [0, 0])


def test_srpt_prefers_the_job_with_less_left():
    """At 5 a chain of 3 and a chain of 1 are open on one PE: the short one goes first."""
    one = Soc("one", (PeKind("p"),))
    long = Dag.from_arrays("long", [[5], [5], [5]], [(0, 1), (1, 2)])
    short = Dag.from_arrays("short", [[5]])
    assert run("late_srpt", [long, short], [0, 1], one)[1] == [0, 10, 15, 5]
    assert run("late_fifo", [long, short], [0, 1], one)[1] == [0, 10, 15, 5]  # it was ready first
    assert run("late_rank", [long, short], [0, 1], one)[1] == [0, 5, 15, 10]  # at 10 both have 5 left


def test_laxity_looks_at_the_deadline():
    one = Soc("one", (PeKind("p"),))
    dags = [Dag.from_arrays("a", [[5]]), Dag.from_arrays("b", [[5]]), Dag.from_arrays("c", [[5]])]
    workload = Workload.from_arrays("w", ("p",), dags, deadline_us=[math.inf, 30.0, 12.0])
    simulator = Simulator(SocDagSpec(one))
    simulator.reset(workload)
    simulator.run(RULES["late_laxity"])
    assert simulator.timeline().start.tolist() == [10, 5, 0]


def test_least_energy_takes_the_frugal_point():
    kind = PeKind("p", 1, (500.0, 1000.0), ((0.2,), (1.0,)))
    soc = Soc("one", (kind,))
    dag = Dag.from_arrays("a", [[10.0]])
    for choose, took in ((True, 20.0), (False, 10.0)):
        spec = SocDagSpec(soc, choose_frequency=choose)
        simulator = Simulator(spec)
        simulator.reset(Workload.from_arrays("w", ("p",), [dag]))
        simulator.run(RULES["least_energy"])
        assert simulator.timeline().finish[0] == took


def frugal(dag: Dag, stretch: float, deadline_us: float = math.inf, choose: bool = True) -> tuple[list, list]:
    """Levels and ends under slack reclaiming on a PE that takes twice as long at a fifth of the power."""
    soc = Soc("one", (PeKind("p", 1, (500.0, 1000.0), ((0.2,), (1.0,))),))
    rule = RULES["slack_reclaiming"].with_params(RULES["slack_reclaiming"].params[0], stretch)
    simulator = Simulator(SocDagSpec(soc, choose_frequency=choose))
    simulator.reset(Workload.from_arrays("w", ("p",), [dag], deadline_us=[deadline_us]))
    simulator.run(rule)
    return simulator.timeline().level.tolist(), simulator.timeline().finish.tolist()


def test_slack_is_reclaimed_as_far_as_it_goes():
    one = Dag.from_arrays("one", [[10.0]])
    assert frugal(one, 2.0) == ([0], [20.0])
    assert frugal(one, 1.9) == ([1], [10.0])  # 20 us are more than 19
    assert frugal(one, 2.0, deadline_us=19.0) == ([1], [10.0])
    assert frugal(one, 2.0, choose=False) == ([1], [10.0])  # no frequency may be chosen: race to idle
    chain = Dag.from_arrays("chain", [[10.0], [10.0]], [(0, 1)])
    assert frugal(chain, 2.0) == ([0, 0], [20.0, 40.0])
    # 30 us in all: 15 are the first task's share, so it hurries, and leaves 20 to the other
    assert frugal(chain, 1.5) == ([1, 0], [10.0, 30.0])


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(RULES)),
    binding=st.sampled_from(["late", "ready", "arrival"]),
    transfers=st.sampled_from(["pull", "push"]),
    sigma=st.sampled_from([0.0, 0.5]),
    gap=st.sampled_from([0.0, 20.0, 200.0]),
    seed=st.integers(0, 1000),
)
def test_every_rule_serves_every_job(name, binding, transfers, sigma, gap, seed):
    """Under any binding: all jobs are finished, no decision is illegal, the record passes the checker."""
    soc, stream = random_stream(3, num_tasks=(3, 12), num_pes=3, gap_us=gap, num_jobs=8, seed=seed)
    spec = SocDagSpec(soc, binding=binding, transfers=transfers, noise="lognormal", noise_sigma=sigma)
    workload = stream.draw(np.random.default_rng(seed))
    simulator = Simulator(spec)
    simulator.reset(workload, seed)
    simulator.run(RULES[name])
    timeline = simulator.timeline()
    assert simulator.state().engine[0]["num_illegal"] == 0
    assert check_schedule(timeline, workload, spec) == []
    assert check_durations(timeline, workload, spec, seed) == []
    if sigma == 0.0:
        shortest = np.array([shortest_us(dag) for dag in workload.dags])[workload.dag_of_job]
        assert (timeline.job_finish - timeline.arrival >= shortest - 1e-6).all()


@pytest.mark.parametrize("name", ["late_srpt", "eft", "heft"])
def test_a_rule_decides_the_same_from_python(name):
    """`Policy.decide` on a stepped backend leads to the schedule of the compiled run."""
    soc, stream = random_stream(3, num_tasks=(5, 12), gap_us=15.0, num_jobs=6, seed=3)
    rule = RULES.get(name) or plan_rule("heft", [heft(Graph.of(dag, soc)) for dag in stream.dags])
    spec = system_spec(rule, SocDagSpec(soc, noise="lognormal", noise_sigma=0.3))
    workload = stream.draw(np.random.default_rng(1))
    compiled, stepped = Simulator(spec), Simulator(spec)
    compiled.reset(workload, 5)
    compiled.run(rule)
    stepped.reset(workload, 5)
    rule.reset(stepped.state())
    done = False
    while not done:
        decision = stepped.default_decision()
        rule.decide(stepped.state(), decision)
        done = stepped.step(decision).done
    np.testing.assert_array_equal(compiled.timeline().finish, stepped.timeline().finish)


@needs_data
def test_ranking_on_the_ds3_mix():
    """What the field reports: late SRPT ahead, static placement far behind, the more so under load. Three seeds."""
    latency = {}
    for scale in (100.0, 50.0):
        soc, stream = ds3_stream(scale, 500)
        plans = [STATIC["heft"](Graph.of(dag, soc)) for dag in stream.dags]
        rules = [RULES[name] for name in ("late_srpt", "eft", "heft_rt", "met")] + [placement_rule("heft", plans)]
        for rule in rules:
            spec = system_spec(rule, SocDagSpec(soc, noise="normal", noise_sigma=0.2))
            runs = []
            for seed in range(3):
                workload = stream.draw(np.random.default_rng(seed))
                simulator = Simulator(spec)
                simulator.reset(workload, seed)
                simulator.run(rule)
                runs.append(compute_metrics(simulator.timeline(), workload, soc)["mean_latency"])
            latency[rule.name, scale] = float(np.mean(runs))
    assert latency["late_srpt", 100.0] < latency["eft", 100.0]
    assert latency["late_srpt", 50.0] < 0.95 * latency["heft_rt", 50.0]
    assert 150 < latency["late_srpt", 100.0] < 180
    assert latency["heft", 100.0] > 2 * latency["eft", 100.0]
    assert latency["heft", 50.0] > 20 * latency["eft", 50.0]
