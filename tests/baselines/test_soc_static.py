"""Static schedulers: the published example, an independent reference on 1,000 graphs, pipelines' closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedlab.baselines.soc_static import (
    STATIC,
    cpop,
    heft,
    lookahead_heft,
    peft,
    placement_rule,
    plan_of_order,
    plan_rule,
)
from schedlab.baselines.soc_training import assign_by_lp, choose_chunks, moe_plan, pipeline_plan
from schedlab.envs.core.errors import InputError
from schedlab.envs.soc_dag.check import check_schedule
from schedlab.envs.soc_dag.generate import cpu_gpu_soc, random_layered, tiled, topcuoglu
from schedlab.envs.soc_dag.library import Graph, Plan
from schedlab.envs.soc_dag.sim import Simulator
from schedlab.envs.soc_dag.spec import PeKind, Soc, SocDagSpec, uniform_soc
from schedlab.envs.soc_dag.training import Group, MoeCosts, holmes, pipeline, sequence_batch
from schedlab.envs.soc_dag.workload import Dag, Workload, shortest_us

# ------------------------------------------------------------------------------------- the reference, in plain Python


class Reference:
    """Schedules of one graph with dictionaries and lists, after the papers' pseudo-code."""

    def __init__(self, dag: Dag, soc: Soc) -> None:
        self.tasks = range(dag.num_tasks)
        self.kind = [k for k, kind in enumerate(soc.kinds) for _ in range(kind.count)]
        self.pes = range(len(self.kind))
        self.soc = soc
        self.volume = {(int(a), int(b)): float(v) for (a, b), v in zip(dag.edges, dag.volumes, strict=True)}
        self.children = {t: [b for a, b in self.volume if a == t] for t in self.tasks}
        self.parents = {t: [a for a, b in self.volume if b == t] for t in self.tasks}
        self.times = {(t, p): float(dag.times[t, self.kind[p]]) for t in self.tasks for p in self.pes}

    def able(self, t: int) -> list[int]:
        return [p for p in self.pes if self.times[t, p] < math.inf]

    def mean(self, t: int) -> float:
        return sum(self.times[t, p] for p in self.able(t)) / len(self.able(t))

    def transfer(self, volume: float, p: int, q: int) -> float:
        if p == q:
            us = volume / self.soc.self_bandwidth
        else:
            us = self.soc.latency_us[self.kind[p]][self.kind[q]] if self.soc.latency_us else 0.0
            us += volume / self.soc.bandwidth[self.kind[p]][self.kind[q]] if self.soc.bandwidth else 0.0
        return float(math.floor(us)) if self.soc.whole_us else us

    def mean_transfer(self, a: int, b: int) -> float:
        pairs = [(p, q) for p in self.pes for q in self.pes if p != q]
        return sum(self.transfer(self.volume[a, b], p, q) for p, q in pairs) / len(pairs) if pairs else 0.0

    def up(self, t: int, known: dict[int, float]) -> float:
        if t not in known:
            behind = [self.mean_transfer(t, c) + self.up(c, known) for c in self.children[t]]
            known[t] = self.mean(t) + max(behind, default=0.0)
        return known[t]

    def down(self, t: int, known: dict[int, float]) -> float:
        if t not in known:
            before = [self.down(a, known) + self.mean(a) + self.mean_transfer(a, t) for a in self.parents[t]]
            known[t] = max(before, default=0.0)
        return known[t]

    def start_on(self, t: int, p: int, placed: dict[int, tuple[int, float, float]]) -> float:
        """Earliest start in any gap of the PE."""
        ready = 0.0
        for a in self.parents[t]:
            q, _, finish = placed[a]
            ready = max(ready, finish + self.transfer(self.volume[a, t], q, p))
        busy = sorted((start, finish) for q, start, finish in placed.values() if q == p)
        at = ready
        for start, finish in busy:
            if at + self.times[t, p] <= start:
                break
            at = max(at, finish)
        return at

    def place(self, t: int, placed: dict, extra: dict[int, float] | None = None, only: int | None = None) -> None:
        best = None
        for p in self.able(t) if only is None else [only]:
            start = self.start_on(t, p, placed)
            value = start + self.times[t, p] + (extra[p] if extra else 0.0)
            if best is None or value < best[0]:
                best = value, p, start
        _, p, start = best
        placed[t] = p, start, start + self.times[t, p]

    def heft(self) -> dict:
        known, placed = {}, {}
        for t in sorted(self.tasks, key=lambda t: (-self.up(t, known), t)):
            self.place(t, placed)
        return placed

    def by_priority(self, priority: dict[int, float], how) -> dict:
        placed: dict = {}
        while len(placed) < len(self.tasks):
            ready = [t for t in self.tasks if t not in placed and all(a in placed for a in self.parents[t])]
            how(min(ready, key=lambda t: (-priority[t], t)), placed)
        return placed

    def cpop(self) -> dict:
        up, down = {}, {}
        priority = {t: self.up(t, up) + self.down(t, down) for t in self.tasks}
        entries = [t for t in self.tasks if not self.parents[t]]
        path = [min(entries, key=lambda t: (-priority[t], t))]
        while self.children[path[-1]]:
            path.append(min(self.children[path[-1]], key=lambda t: (-priority[t], t)))
        sums = {p: sum(self.times[t, p] for t in path) for p in self.pes}
        best = min(self.pes, key=lambda p: (sums[p], p))

        def how(t: int, placed: dict) -> None:
            self.place(t, placed, only=best if t in path and sums[best] < math.inf else None)

        return self.by_priority(priority, how)

    def peft(self) -> dict:
        costs: dict[tuple[int, int], float] = {}
        for t in reversed(self.tasks):
            for p in self.pes:
                costs[t, p] = max(
                    (
                        min(
                            costs[c, q] + self.times[c, q] + (self.mean_transfer(t, c) if p != q else 0.0)
                            for q in self.able(c)
                        )
                        for c in self.children[t]
                    ),
                    default=0.0,
                )
        priority = {t: sum(costs[t, p] for p in self.able(t)) / len(self.able(t)) for t in self.tasks}
        return self.by_priority(
            priority, lambda t, placed: self.place(t, placed, extra={p: costs[t, p] for p in self.pes})
        )


def random_problem(seed: int) -> tuple[Dag, Soc]:
    """A graph whose means over PEs and links are whole numbers, so that ties are ties in both implementations."""
    rng = np.random.default_rng(seed)
    counts = [(1, 1), (2, 2), (4,), (1, 1, 2), (1,), (2, 1, 1)][seed % 6]
    kinds = len(counts)
    matrix = tuple(tuple(2.0 ** int(rng.integers(-1, 3)) for _ in range(kinds)) for _ in range(kinds))
    latency = tuple(tuple(12.0 * int(rng.integers(0, 3)) for _ in range(kinds)) for _ in range(kinds))
    soc = Soc(
        "random",
        tuple(PeKind(f"k{i}", count) for i, count in enumerate(counts)),
        matrix,
        latency,
        self_bandwidth=math.inf if seed % 3 else 16.0,
        whole_us=seed % 4 == 0,
    )
    n = int(rng.integers(1, 22))
    times = 12.0 * rng.integers(0 if seed % 5 == 0 else 1, 30, (n, kinds))
    if seed % 2:
        times[rng.random((n, kinds)) < 0.2] = math.inf
        times[np.isinf(times).all(1), 0] = 84.0
    pairs = [(a, b) for b in range(n) for a in range(b) if rng.random() < rng.uniform(0.05, 0.5)]
    return Dag.from_arrays("random", times, pairs, 96.0 * rng.integers(0, 9, len(pairs))), soc


@pytest.mark.parametrize("part", range(10))
def test_equal_to_the_reference_on_1000_graphs(part):
    """HEFT, CPOP and PEFT: every task on the same PE at the same time; ties go to lower numbers in both."""
    for seed in range(100 * part, 100 * part + 100):
        dag, soc = random_problem(seed)
        reference, graph = Reference(dag, soc), Graph.of(dag, soc)
        for kernel, expected in ((heft, reference.heft()), (cpop, reference.cpop()), (peft, reference.peft())):
            plan = kernel(graph)
            told = [expected[t] for t in range(dag.num_tasks)]
            assert plan.finish.max() == pytest.approx(max(finish for _, _, finish in told), abs=1e-9), (seed, kernel)
            assert plan.pe.tolist() == [pe for pe, _, _ in told], (seed, kernel)
            np.testing.assert_allclose(plan.start, [start for _, start, _ in told], atol=1e-9)


def test_the_published_example():
    soc, dag = topcuoglu()
    graph = Graph.of(dag, soc)
    assert heft(graph).makespan_us == 80
    assert cpop(graph).makespan_us == 86
    assert heft(graph).pe.tolist() == [2, 0, 2, 1, 2, 1, 2, 0, 1, 1]
    assert lookahead_heft(graph).makespan_us <= 80


# --------------------------------------------------------------------------------------------------- what plans are


@settings(max_examples=60, deadline=None)
@given(
    num_tasks=st.integers(1, 40),
    num_pes=st.integers(1, 6),
    ccr=st.floats(0, 4),
    seed=st.integers(0, 10_000),
    name=st.sampled_from(sorted(STATIC)),
)
def test_plans_can_be_run(num_tasks, num_pes, ccr, seed, name):
    """The simulator, told to keep a plan, does exactly that; the checker agrees; no plan beats the critical path."""
    dag, soc = random_layered(num_tasks, num_pes, ccr=ccr, seed=seed), uniform_soc(num_pes)
    plan = STATIC[name](Graph.of(dag, soc))
    workload = Workload.from_arrays("one", soc.kind_names, [dag])
    for spec in (SocDagSpec(soc, binding="arrival"), SocDagSpec(soc, binding="late", transfers="push")):
        simulator = Simulator(spec)
        simulator.reset(workload)
        simulator.run(plan_rule(name, [plan]))
        timeline = simulator.timeline()
        np.testing.assert_array_equal(timeline.pe, plan.pe)
        np.testing.assert_allclose(
            timeline.start, plan_of_order(Graph.of(dag, soc), plan.pe, plan.order).start, rtol=1e-9
        )
        assert (timeline.start <= plan.start + 1e-6).all()
        assert check_schedule(timeline, workload, spec) == []
        assert simulator.state().engine[0]["num_illegal"] == 0
    assert plan.makespan_us >= shortest_us(dag) - 1e-9


def test_plans_of_streams_follow_each_other():
    """Two jobs of one graph at once: the second's tasks stand behind the first's on every PE."""
    soc, dag = topcuoglu()
    plan = heft(Graph.of(dag, soc))
    simulator = Simulator(SocDagSpec(soc, binding="arrival"))
    workload = Workload.from_arrays("two", soc.kind_names, [dag], [0, 0])
    simulator.reset(workload)
    simulator.run(plan_rule("heft", [plan]))
    timeline = simulator.timeline()
    np.testing.assert_array_equal(timeline.finish[:10], plan.finish)
    for pe in range(3):
        first, second = plan.finish[plan.pe == pe].max(), timeline.start[10:][plan.pe == pe].min()
        assert second >= first
    assert check_schedule(timeline, workload, simulator.spec) == []


def test_a_placement_keeps_the_pes_only():
    """HEFT's PEs for two jobs at once: nobody waits for a task that is not ready, so the second ends sooner."""
    soc, dag = topcuoglu()
    plan = heft(Graph.of(dag, soc))
    workload = Workload.from_arrays("two", soc.kind_names, [dag], [0, 0])
    ends = []
    for rule in (plan_rule("heft", [plan]), placement_rule("heft", [plan])):
        spec = SocDagSpec(soc, binding=rule.binding)
        simulator = Simulator(spec)
        simulator.reset(workload)
        simulator.run(rule)
        timeline = simulator.timeline()
        assert timeline.pe.tolist() == plan.pe.tolist() * 2
        assert check_schedule(timeline, workload, spec) == []
        ends.append(timeline.finish.max())
    assert ends[1] < ends[0]


def test_orders_that_cannot_be():
    soc = uniform_soc(2)
    graph = Graph.of(Dag.from_arrays("d", [[1, 1], [1, math.inf]], [(0, 1)], [3]), soc)
    plan = plan_of_order(graph, np.array([1, 0]), np.array([0, 1]))
    assert plan.start.tolist() == [0.0, 4.0]
    for pe, order, problem in (
        ([0, 0], [1, 0], "contradict"),
        ([0, 1], [0, 1], "cannot run on PE 1"),
        ([0, 2], [0, 1], "no order"),
        ([0, 0], [0, 0], "no order"),
    ):
        with pytest.raises(InputError, match=problem):
            plan_of_order(graph, np.array(pe), np.array(order))


def test_order_of_tasks_without_length():
    plan = Plan(np.array([0, 0, 0]), np.array([5.0, 0.0, 5.0]), np.array([7.0, 5.0, 5.0]))
    assert plan.order.tolist() == [1, 2, 0]


def test_cholesky_of_eight_tiles():
    """PEFT's published 254 with READYS' times on 2 CPUs and 2 GPUs; nobody is below the optimum, 250."""
    spans = {name: static(Graph.of(tiled("cholesky", 8), cpu_gpu_soc())).makespan_us for name, static in STATIC.items()}
    assert spans["peft"] == 254
    assert min(spans.values()) >= 250


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 8), (8, 32), (3, 7), (4, 2)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubbles_of_pipelines(p, m, name):
    """(p - 1) / (m + p - 1), whatever forward and backward take."""
    for forward, backward in ((1, 2), (1, 1), (3, 5)):
        step = pipeline(p, m, forward_us=forward, backward_us=backward)
        makespan = pipeline_plan(step, name).makespan_us
        assert step.bubble_share(makespan) == pytest.approx((p - 1) / (m + p - 1), abs=5e-5)


@pytest.mark.parametrize(("p", "m", "v"), [(2, 2, 2), (4, 8, 2), (8, 32, 3), (4, 4, 4)])
def test_bubbles_of_interleaved_pipelines(p, m, v):
    step = pipeline(p, m, num_chunks=v, forward_us=1, backward_us=2)
    share = step.bubble_share(pipeline_plan(step, "interleaved").makespan_us)
    assert share == pytest.approx((p - 1) / (v * m + p - 1), abs=5e-5)


@pytest.mark.parametrize(("p", "m"), [(4, 8), (8, 24), (3, 9)])
def test_bubbles_of_zero_bubble_pipelines(p, m):
    for forward, backward, weight in ((1, 1, 1), (1, 1.2, 0.8), (1, 0.9, 0.7)):
        step = pipeline(p, m, forward_us=forward, backward_us=backward, weight_us=weight)
        idle = pipeline_plan(step, "zb_h1").makespan_us - m * (forward + backward + weight)
        assert idle == pytest.approx((p - 1) * (forward + backward - weight), abs=5e-5 * m)


def test_pipelines_that_cannot_be():
    with pytest.raises(InputError, match="Give a multiple of 4"):
        pipeline_plan(pipeline(4, 6, num_chunks=2), "interleaved")
    with pytest.raises(InputError, match="interleaved order"):
        pipeline_plan(pipeline(2, 4, num_chunks=2), "1f1b")
    with pytest.raises(InputError, match="weight_us"):
        pipeline_plan(pipeline(2, 4), "zb_h1")
    with pytest.raises(InputError, match="Choose one of gpipe"):
        pipeline_plan(pipeline(2, 4), "gipe")


def test_unlike_clusters_want_unlike_stages():
    groups = [Group("infiniband", 4), Group("ethernet", 2)]
    even = pipeline_plan(holmes(groups, 16, in_proportion=False), "1f1b").makespan_us
    assert pipeline_plan(holmes(groups, 16), "1f1b").makespan_us < 0.85 * even


def test_chunks_by_hand():
    """One chunk: 12 + 5 + 23 + 5 + 12 = 57. Two chunks hide half of the transfers behind the experts."""
    costs = MoeCosts((2, 10), (1, 4), (1, 4), (1, 22))
    assert moe_plan(costs, 1).makespan_us == 57
    # dispatch 0 - 7 - 14; gather 7 - 10, 14 - 17; experts 10 - 22 - 34; scatter 22 - 25, 34 - 37;
    # combine 25 - 32, 37 - 44
    assert moe_plan(costs, 2).makespan_us == 44
    chunks, plan = choose_chunks(costs, max_chunks=8)
    spans = [moe_plan(costs, r).makespan_us for r in range(1, 9)]
    assert plan.makespan_us == min(spans) and spans[chunks - 1] == min(spans)


def test_the_gradient_all_reduce_hides_in_idle_time():
    costs = MoeCosts((5, 40), (2, 10), (2, 10), (3, 200), (2, 60))
    alone = choose_chunks(costs)[1].makespan_us
    hidden = choose_chunks(costs, all_reduce_parts=3)[1].makespan_us
    assert hidden - alone < 0.5 * 66  # three parts of 22 us each, mostly behind the experts


def test_sequences_by_linear_programme():
    """Three of 4 us on two equal PEs: 6 each in halves, and 8 when the one in two parts has gone to one of them."""
    soc = Soc("two", (PeKind("gpu", 2),))
    dag = Dag.from_arrays("three", [[4.0], [4.0], [4.0], [1.0]], [(0, 3), (1, 3), (2, 3)])
    plan, bound = assign_by_lp(dag, soc)
    assert (plan.makespan_us, bound) == (9.0, pytest.approx(7.0))
    for seed in range(6):
        soc, dag = sequence_batch(24, seed=seed)
        plan, bound = assign_by_lp(dag, soc)
        shortest = min(scheduler(Graph.of(dag, soc)).makespan_us for scheduler in STATIC.values())
        assert bound <= min(shortest, plan.makespan_us) + 1e-6
        assert max(shortest, plan.makespan_us) < 1.2 * bound
    with pytest.raises(InputError, match="other precedences"):
        assign_by_lp(tiled("cholesky", 2), cpu_gpu_soc())
