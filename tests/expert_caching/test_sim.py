"""The simulator: hand-worked miniatures, and random play replayed by the independent checker."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from routing import ODD_COST, RandomPolicy, random_routing, routing_of, run_policy

from schedlab.baselines.expert_caching import RULES
from schedlab.envs.core.interface import Backend
from schedlab.envs.expert_caching.check import check_residency, check_times
from schedlab.envs.expert_caching.metrics import compute_metrics
from schedlab.envs.expert_caching.sim import Simulator
from schedlab.envs.expert_caching.spec import COMPOSITION_OF_EXPERTS, CostModel, ExpertCachingSpec
from schedlab.envs.expert_caching.state import ABSENT, AUTO, BYPASS, LOADING, QUEUED, RESIDENT
from schedlab.envs.expert_caching.timeline import DEMAND, Timeline
from schedlab.envs.expert_caching.workload import generate, interleave

SECONDS = CostModel("by-hand", attention_s=1.0, expert_s=2.0, expert_bytes=4, bandwidth=1.0, chunk_bytes=1)
"""Attention 1 s, an expert 2 s, a load 4 s in chunks of 1 s."""


def test_is_a_backend():
    assert isinstance(Simulator(ExpertCachingSpec()), Backend)


def test_demand_loads_by_hand():
    """Two slots for one layer of four experts, top 1; tokens use 0, 1, 0, 2, 1.

    | epoch | gate answers | load       | stall | computed |
    |-------|--------------|------------|-------|----------|
    | 0     | 1            | 0:  1 - 5  | 4     | 7        |
    | 1     | 8            | 1:  8 - 12 | 4     | 14       |
    | 2     | 15           |            | 0     | 17       |
    | 3     | 18           | 2: 18 - 22 | 4     | 24       | evicts 1, least recently used
    | 4     | 25           | 1: 25 - 29 | 4     | 31       | evicts 0
    """
    workload = routing_of([[0]], [[1]], [[0]], [[2]], [[1]])
    simulator = Simulator(ExpertCachingSpec(cost=SECONDS, cache_share=0.5))
    simulator.reset(workload)
    seconds = []
    for _ in range(5):
        outcome = simulator.step(simulator.default_decision())
        seconds.append(outcome.seconds)
    assert outcome.done
    timeline = simulator.timeline()
    assert timeline.start_s.tolist() == [1, 8, 15, 18, 25]
    assert timeline.end_s.tolist() == [7, 14, 17, 24, 31]
    assert timeline.stall_s.tolist() == [4, 4, 0, 4, 4]
    assert timeline.loads["expert"].tolist() == [0, 1, 2, 1]
    assert timeline.loads["slot"].tolist() == [0, 1, 1, 0]
    assert seconds == [7, 7, 3, 7, 6]  # from decision to decision; the last one ends with the layer
    assert compute_metrics(timeline)["hit_rate"] == 1 / 5


def test_experts_at_hand_are_computed_while_others_load():
    """Top 2, all four fit: the second token needs 0 (there) and 2 (not): 2 s of the load are hidden."""
    workload = routing_of([[0, 1]], [[0, 2]])
    for overlap, stall in ((True, [6, 2]), (False, [8, 4])):
        cost = CostModel(**{**SECONDS.__dict__, "overlap": overlap})
        simulator = Simulator(ExpertCachingSpec(cost=cost, cache_share=1.0))
        simulator.reset(workload)
        simulator.step(simulator.default_decision())
        simulator.step(simulator.default_decision())
        # with overlap, the first of two cold experts is computed while the second loads: 8 s of loading less 2
        assert simulator.timeline().stall_s.tolist() == stall


def test_nothing_is_computed_before_the_decision_is_made():
    """Two tokens, top 2, of the same two experts. The first one's load at 1 - 5 and 5 - 9; a decision takes 3 s.

    The first decision is made at 4, and nothing is at hand: a stall until 5, expert 0 until 7, a stall until 9, then
    expert 1 until 11. At the second gate, at 12, both are at hand, and are computed from 15 to 19.
    """
    simulator = Simulator(ExpertCachingSpec(cost=replace(SECONDS, decision_s=3.0), cache_share=1.0))
    simulator.reset(routing_of([[0, 1]], [[0, 1]]))
    simulator.step(simulator.default_decision())
    simulator.step(simulator.default_decision())
    timeline = simulator.timeline()
    assert (timeline.end_s.tolist(), timeline.stall_s.tolist()) == ([11, 19], [3, 0])


def test_a_demand_load_overtakes_a_prefetch_between_chunks():
    """Layers 0 and 1, top 1. In epoch 0 expert 3 of layer 1 is prefetched, and expert 2 is what layer 1 needs.

    Epoch 0 (gate at 1 s): expert 0 loads 1 - 5, is computed until 7; the prefetch reads its chunks from 5 on. Epoch 1
    (gate at 8 s): chunks of 5, 6 and 7 s are read, so three of four; the demand load of 2 reads 8 - 12 and is computed
    until 14; the prefetch's last chunk takes 12 - 13. It is there for the gate of epoch 2 at 15 s.
    """
    workload = routing_of([[0], [2]], [[0], [3]])
    spec = ExpertCachingSpec(cost=SECONDS, cache_share=0.5, max_prefetch=1)
    simulator = Simulator(spec)
    simulator.reset(workload)
    decision = simulator.default_decision()
    decision.plan[0]["num_prefetch"] = 1
    decision.prefetch[0] = 1, 3, AUTO
    assert simulator.state().experts[1, 3]["status"] == ABSENT
    simulator.step(decision)
    row = simulator.state().experts[1, 3]
    assert row["status"] == LOADING
    assert row["seconds_left"] == 1.0
    simulator.step(simulator.default_decision())
    assert simulator.state().experts[1, 3]["status"] == RESIDENT
    simulator.step(simulator.default_decision())
    simulator.step(simulator.default_decision())
    timeline = simulator.timeline()
    assert timeline.loads["ready_s"].tolist() == [13, 5, 12]  # the prefetch was asked for first
    assert timeline.stall_s.tolist() == [4, 4, 0, 0]
    metrics = compute_metrics(timeline)
    assert metrics["hit_rate"] == 1 / 4  # expert 0 in the second step; the prefetched 3 was ready, and is no hit
    assert metrics["ready_rate"] == 2 / 4
    assert metrics["prefetch_use"] == 1


def test_a_late_prefetch_goes_on_where_it_was():
    """The prefetched expert is needed after three of its four chunks: the layer waits for one second."""
    workload = routing_of([[0], [3]])
    simulator = Simulator(ExpertCachingSpec(cost=SECONDS, cache_share=0.5, max_prefetch=1))
    simulator.reset(workload)
    decision = simulator.default_decision()
    decision.plan[0]["num_prefetch"] = 1
    decision.prefetch[0] = 1, 3, AUTO
    simulator.step(decision)
    engine = simulator.state().engine[0]
    assert engine["num_late"] == 1
    assert engine["num_missing"] == 0
    simulator.step(simulator.default_decision())
    assert simulator.timeline().stall_s.tolist() == [4, 1]


def test_cancelled_prefetches_free_their_slots():
    """Of two prefetches queued behind a demand load only the first is begun when the next gate answers."""
    workload = routing_of([[0], [2]], [[0], [1]])
    spec = ExpertCachingSpec(cost=SECONDS, cache_share=0.75, max_prefetch=2)
    simulator = Simulator(spec)
    simulator.reset(workload)
    decision = simulator.default_decision()
    decision.plan[0]["num_prefetch"] = 2
    decision.prefetch[:] = [(1, 3, AUTO), (1, 1, AUTO)]
    simulator.step(decision)
    state = simulator.state()
    assert [state.experts[1, e]["status"] for e in (3, 1)] == [LOADING, QUEUED]
    decision = simulator.default_decision()
    decision.plan[0]["cancel_queued"] = 1
    simulator.step(decision)
    assert state.experts[1, 1]["status"] == ABSENT
    assert state.engine[0]["num_prefetch_loads"] == 1
    assert simulator.timeline().loads["cancelled"].tolist() == [-1, 1, -1, -1]


def test_bypass_and_swap():
    """One slot, top 1 of three: a bypassed expert leaves the slot alone; a needed one gives its slot up at the end."""
    workload = routing_of([[0, 1]], [[0, 2]], num_experts=3)
    spec = ExpertCachingSpec(cost=SECONDS, layer_slots=(1,), bypass=True)
    simulator = Simulator(spec)
    simulator.reset(workload)
    decision = simulator.default_decision()
    decision.victims[:2] = 0, BYPASS
    simulator.step(decision)
    state = simulator.state()
    assert state.slots["expert"].tolist() == [0]
    assert state.missing[: state.engine[0]["num_missing"]].tolist() == [2]
    decision = simulator.default_decision()
    decision.victims[0] = 0  # holds 0, which this epoch needs
    simulator.step(decision)
    assert state.slots["expert"].tolist() == [2]
    assert state.engine[0]["num_illegal"] == 0
    assert check_residency(simulator.timeline(), workload, spec) == []


def test_nothing_of_the_future_is_in_the_state():
    """Two workloads that agree up to an epoch show the same State there: no later step, no higher layer."""
    rng = np.random.default_rng(0)
    first = random_routing(rng, layers=3, experts=8, k=2, lengths=[6, 9])
    other = first.experts.copy()
    step, layer = 7, 1
    shuffled = random_routing(rng, layers=3, experts=8, k=2, lengths=[6, 9]).experts
    other[step, layer + 1 :] = shuffled[step, layer + 1 :]
    other[step + 1 :] = shuffled[step + 1 :]
    second = type(first).from_arrays("other", other, first.lengths, num_experts=8)
    spec = ExpertCachingSpec(cache_share=0.5, history_tokens=4, max_prefetch=2)
    states = []
    for workload in (first, second):
        simulator = Simulator(spec)
        simulator.reset(workload)
        for _ in range(step * 3 + layer):
            simulator.step(simulator.default_decision())
        states.append(simulator.state())
    for name, a, b in zip(states[0]._fields, *states, strict=True):
        if name == "missing":  # rows beyond the live ones are left over
            a, b = (s.missing[: s.engine[0]["num_missing"]] for s in states)
        assert a.tobytes() == b.tobytes(), name
    assert (states[0].history[0, step % 4, layer + 1 :] == -1).all()
    assert (states[0].history[0, step % 4, : layer + 1] == first.experts[step, : layer + 1]).all()


def test_known_steps_show_the_queue():
    workload = routing_of([[0]], [[1]], [[2]])
    simulator = Simulator(ExpertCachingSpec(cache_share=0.5, known_steps=2))
    simulator.reset(workload)
    assert simulator.state().known.ravel().tolist() == [1, 2]
    simulator.step(simulator.default_decision())
    assert simulator.state().known.ravel().tolist() == [2, -1]


def test_counts_belong_to_the_sequences_in_the_batch():
    workload = random_routing(np.random.default_rng(1), layers=2, experts=6, k=2, lengths=[3, 5, 4])
    simulator = Simulator(ExpertCachingSpec(cache_share=1.0, num_sequences=2))
    simulator.reset(workload)
    batches = interleave(workload.lengths, 2)
    assert batches.tolist() == [[0, 3], [1, 4], [2, 5], [8, 6], [9, 7], [10, -1], [11, -1]]
    for _ in range(2 * 5 + 1):  # in step 5 row 0 is at token 10, sequence 2, and row 1 is idle
        simulator.step(simulator.default_decision())
    state = simulator.state()
    expected = np.zeros((2, 6), int)
    for token, layers in ((8, 2), (9, 2), (10, 2)):
        for layer in range(layers):
            expected[layer, workload.experts[token, layer]] += 1
    assert (state.experts["count"] == expected).all()
    assert state.engine[0]["num_active"] == 1
    assert state.sequences["sequence"].tolist() == [2, -1]


VARIANTS = [
    {},
    {"pooled": True},
    {"bypass": True},
    {"bypass": True, "pooled": True, "num_sequences": 3},
    {"num_sequences": 2, "cache_share": 0.7},
    {"host_share": 0.8},
    {"warm_start": True, "prefetch_depth": 2},
    {"overlap": False},
    {"max_prefetch": 0},
    {"decision_s": 0.009},
    {"decision_s": 0.07, "num_sequences": 2, "cache_share": 0.7},
]
OF_COST = ("overlap", "decision_s")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_random_play_is_possible(changes, seed):
    """Slots, channel and layers of a random run agree with the checker's replay, chunk by chunk."""
    rng = np.random.default_rng(seed)
    workload = random_routing(rng, layers=3, experts=10, k=2, lengths=[int(n) for n in rng.integers(4, 20, 8)])
    changes = {"cache_share": 0.5, "max_prefetch": 3, "history_tokens": 4, **changes}
    cost = replace(ODD_COST, **{name: changes.pop(name) for name in OF_COST if name in changes})
    spec = ExpertCachingSpec(cost=cost, **changes)
    simulator = run_policy(spec, workload, RandomPolicy(seed))
    timeline = simulator.timeline()
    assert check_residency(timeline, workload, spec) == []
    assert check_times(timeline, workload, spec) == []
    engine = simulator.state().engine[0]
    assert engine["num_used"] == timeline.used.sum()
    assert engine["num_illegal"] > 0
    if spec.max_prefetch:
        assert engine["num_prefetch_loads"] > 5
    assert math.isclose(timeline.stall_s.sum(), simulator.sim.books[0]["total_stall_s"])


def test_the_checker_sees_what_is_wrong(tmp_path):
    workload = random_routing(np.random.default_rng(5), layers=2, experts=8, k=2, lengths=[20])
    spec = ExpertCachingSpec(cost=ODD_COST, cache_share=0.5, max_prefetch=2)
    timeline = run_policy(spec, workload, RandomPolicy(5)).timeline()
    timeline.save(tmp_path / "timeline.npz")

    def spoilt(**changes) -> Timeline:
        arrays = dict(Timeline.load(tmp_path / "timeline.npz").__dict__)
        for name, change in changes.items():
            array = arrays[name].copy()
            change(array)
            arrays[name] = array
        return Timeline(**arrays)

    assert check_residency(spoilt(), workload, spec) == check_times(spoilt(), workload, spec) == []

    def other_expert(loads):
        loads["expert"][3] = (loads["expert"][3] + 1) % 8

    def two_in_a_slot(loads):
        loads["slot"][:] = loads["slot"][0]

    def faster(end_s):
        end_s[7] -= 1e-3

    assert check_residency(spoilt(loads=other_expert), workload, spec)
    assert check_residency(spoilt(loads=two_in_a_slot), workload, spec)
    assert check_times(spoilt(end_s=faster), workload, spec)
    dropped = spoilt()
    first = np.flatnonzero(dropped.loads["kind"] == DEMAND)[0]
    dropped = Timeline(**{**dropped.__dict__, "loads": np.delete(dropped.loads, first)})
    assert check_residency(dropped, workload, spec)


def test_stepping_equals_running_compiled():
    workload = generate(6, mean_length=20, seed=3)
    spec = ExpertCachingSpec(cache_share=0.25, num_sequences=2, history_tokens=8)
    for name in ("ema_95", "random"):
        stepped = run_policy(spec, workload, RULES[name])
        simulator = Simulator(spec)
        simulator.reset(workload)
        simulator.run(RULES[name])
        assert stepped.timeline().loads.tobytes() == simulator.timeline().loads.tobytes()
        assert (stepped.timeline().end_s == simulator.timeline().end_s).all()


def test_composition_of_experts():
    """SambaNova's CoE: whole models of 13.5 GB, one of 150 a prompt; DDR holds them all, HBM the recent ones.

    A model in HBM costs no switch; one from DDR some 14 ms; with DDR taken away it comes over the host's 32 GB/s link,
    some 31 times slower, as in the paper's comparison with GPU nodes.
    """
    rng = np.random.default_rng(0)
    prompts = np.minimum(rng.geometric(0.04, (1500, 1, 1)) - 1, 149)
    workload = type(routing_of([[0]])).from_arrays("coe", prompts, np.ones(1500, int), num_experts=150)
    stalls = {}
    for share in (1.0, 35 / 150):  # all in DDR; DDR no larger than HBM, so that misses come from the host
        spec = COMPOSITION_OF_EXPERTS.replace(host_share=share)
        timeline = run_policy(spec, workload, RULES["lru"]).timeline()
        assert check_residency(timeline, workload, spec) == check_times(timeline, workload, spec) == []
        stalls[share] = timeline.stall_s[timeline.stall_s > 1e-6]
        assert 0.5 < compute_metrics(timeline)["hit_rate"] < 0.95
    assert stalls[1.0].mean() == pytest.approx(13.5e9 / 1e12, rel=1e-3)
    assert stalls[35 / 150][50:].mean() / stalls[1.0].mean() == pytest.approx(1e12 / 32e9, rel=0.05)
