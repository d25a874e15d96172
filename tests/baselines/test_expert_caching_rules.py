"""The field's expert caches: exact oracles against exhaustive search, and what each paper says of its system."""

from __future__ import annotations

import os
from collections import OrderedDict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from schedlab.baselines.expert_caching import (
    RULES,
    batch_by_experts,
    belady,
    belady_loads,
    copy_rule,
    fate_slots,
    layer_streaming,
    lrfu_rule,
    regroup_by_paths,
    stream_spec,
    system_spec,
)
from schedlab.baselines.expert_fitted import (
    fit_affinity_prefetch,
    fit_expert_flow,
    fit_learned_score,
    fit_moe_infinity,
    fit_ridge,
    predicted_paths,
)
from schedlab.envs.core.errors import InputError
from schedlab.envs.expert_caching.check import check_residency, check_times
from schedlab.envs.expert_caching.metrics import compute_metrics
from schedlab.envs.expert_caching.rule import Rule, evict_lowest, lowest_slot, prefetch
from schedlab.envs.expert_caching.sim import Simulator
from schedlab.envs.expert_caching.spec import CostModel, ExpertCachingSpec
from schedlab.envs.expert_caching.state import (
    AUTO,
    CANDIDATE,
    FREE,
    LOADING,
    QUEUED,
    RESIDENT,
    WAITING,
    slot_kind,
)
from schedlab.envs.expert_caching.timeline import PREFETCH
from schedlab.envs.expert_caching.workload import Workload, find_routing, generate, load_routing

PLAIN = ExpertCachingSpec(eviction_only=True, history_tokens=1)
FAST = CostModel("fast", attention_s=1e-3, expert_s=1e-4, expert_bytes=1000, bandwidth=1e8, chunk_bytes=250)
"""A load takes 10 us, a layer 1 ms: whatever is asked for ahead of a layer is there in time."""


def run(rule: Rule, spec: ExpertCachingSpec, workload: Workload, batches: np.ndarray | None = None) -> Simulator:
    """Step by step: `Simulator.run` would compile its loop anew for every rule (and is tested to do the same)."""
    simulator = Simulator(spec)
    simulator.reset(workload, batches=batches)
    rule.reset(simulator.state())
    done = False
    while not done:
        decision = simulator.default_decision()
        rule.decide(simulator.state(), decision)
        done = simulator.step(decision).done
    return simulator


def loads(rule: Rule, spec: ExpertCachingSpec, workload: Workload) -> int:
    return int(run(rule, spec, workload).state().engine[0]["num_demand_loads"])


def random_routing(rng, tokens, layers, experts, k) -> Workload:
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :k]
    return Workload.from_arrays("random", ids, [tokens], num_experts=experts)


def sequence(*experts: int, num_experts: int = 4) -> Workload:
    """One layer, one expert a token."""
    return Workload.from_arrays("sequence", np.array(experts)[:, None, None], [len(experts)], num_experts=num_experts)


# --------------------------------------------------------------------------------------------------------- oracles


def fewest_loads(workload: Workload, room: int, bypass: bool) -> int:
    """Exhaustive: all caches that can follow, epoch after epoch; layers share the room (one layer, or a pool)."""
    costs = {frozenset(): 0}
    for token in workload.experts:
        for layer, ids in enumerate(token):
            needed = frozenset((layer, int(e)) for e in ids)
            following: dict[frozenset, int] = {}
            for held, cost in costs.items():
                union = held | needed
                price = cost + len(needed - held)
                must = frozenset() if bypass else needed
                most = min(room, len(union))
                for size in range(len(must), most + 1) if bypass else (most,):
                    for others in combinations(sorted(union - must), size - len(must)):
                        kept = must | frozenset(others)
                        if price < following.get(kept, 1 << 30):
                            following[kept] = price
            costs = following
    return min(costs.values())


@pytest.mark.parametrize("bypass", [False, True])
def test_belady_is_exact(bypass):
    """On random instances no policy of any kind loads less; the plain loop counts the same."""
    rng = np.random.default_rng(int(bypass))
    for _ in range(40):
        k = int(rng.integers(1, 3))
        room = int(rng.integers(1 if bypass else k, 4))
        workload = random_routing(rng, int(rng.integers(3, 9)), 1, 5, k)
        spec = PLAIN.replace(layer_slots=(room,), bypass=bypass)
        best = fewest_loads(workload, room, bypass)
        assert loads(belady(workload, spec), spec, workload) == best
        assert belady_loads(workload, (room,), bypass=bypass).sum() == best


def test_belady_is_exact_for_a_pool():
    rng = np.random.default_rng(7)
    for _ in range(20):
        workload = random_routing(rng, int(rng.integers(2, 5)), 2, 4, 1)
        spec = PLAIN.replace(layer_slots=(1, 2), pooled=True)
        assert loads(belady(workload, spec), spec, workload) == fewest_loads(workload, 3, False)


@pytest.mark.parametrize("bypass", [False, True])
def test_both_beladys_agree_on_layers_and_bound_every_rule(bypass):
    workload = generate(12, seed=6)
    spec = PLAIN.replace(cache_share=0.25, bypass=bypass)
    run_ = run(belady(workload, spec), spec, workload)
    by_layer = run_.state().layers["num_missed"]
    assert by_layer.tolist() == belady_loads(workload, (8,) * 4, bypass=bypass).tolist()
    fewest = by_layer.sum()
    for name in ("lru", "lfu", "ema_95", "fifo", "static", "random", "arc"):
        assert loads(RULES[name], spec, workload) > fewest, name


def test_an_oracle_is_marked_and_belongs_to_its_workload():
    workload = generate(3, seed=1)
    rule = belady(workload, PLAIN)
    assert rule.is_oracle
    assert not any(rule.is_oracle for rule in RULES.values())
    simulator = Simulator(PLAIN)
    simulator.reset(generate(3, num_experts=16))
    with pytest.raises(InputError, match="fitted to a model of"):
        simulator.run(rule)


# ----------------------------------------------------------------------------------------------------- replacement


def evicted(rule: Rule, *experts: int, slots: int = 2) -> list[int]:
    """Experts in the order in which they leave a cache of one layer."""
    simulator = Simulator(PLAIN.replace(layer_slots=(slots,)))
    simulator.reset(sequence(*experts, num_experts=max(experts) + 1))
    rule.reset(simulator.state())
    gone, done = [], False
    while not done:
        before = set(simulator.state().slots["expert"].tolist())
        decision = simulator.default_decision()
        rule.decide(simulator.state(), decision)
        done = simulator.step(decision).done
        gone += sorted(before - set(simulator.state().slots["expert"].tolist()) - {-1})
    return gone


def test_whom_each_rule_evicts():
    """Two slots; 0 is used three times, then 1, and 0 once more; then 2 comes, then 3."""
    play = (0, 0, 0, 1, 0, 2, 3)
    assert evicted(RULES["lru"], *play) == [1, 0]
    assert evicted(RULES["lfu"], *play) == [1, 2]  # 0 was used four times
    assert evicted(RULES["fifo"], *play) == [0, 1]  # 0 came first, then 1
    assert evicted(RULES["ema_99"], *play) == [1, 2]
    assert evicted(RULES["ema_50"], *play) == [1, 0]  # half of it is gone after two steps
    assert evicted(lrfu_rule(1e9), *play) == evicted(RULES["lfu"], *play)
    assert evicted(lrfu_rule(0.01), *play) == evicted(RULES["lru"], *play)


def test_victims_found_at_once_are_those_found_one_by_one():
    """On random play with prefetches, some of them cancelled, free slots, ties, and keys of minus infinity."""
    rng = np.random.default_rng(3)
    for pooled in (False, True):
        spec = ExpertCachingSpec(cache_share=0.5, num_sequences=3, max_prefetch=6, prefetch_depth=3, pooled=pooled)
        simulator = Simulator(spec)
        simulator.reset(generate(12, seed=4))
        state, decision, done, kinds = simulator.state(), simulator.default_decision(), False, set()
        while not done:
            decision = simulator.default_decision()
            decision.plan[0]["cancel_queued"] = rng.random() < 0.5
            keys = rng.choice([-np.inf, -1.0, 0.5, 2.0], len(state.slots))
            one_by_one = []
            for i in range(state.engine[0]["num_missing"]):
                layer = int(state.engine[0]["layer"])
                decision.victims[i] = lowest_slot(state, keys, decision, layer, i, 0)
                one_by_one.append(int(decision.victims[i]))
                kinds.add(int(slot_kind(state.experts, state.slots, layer, decision.victims[i])))
            decision.victims[:] = AUTO
            evict_lowest(state, keys, decision)
            assert decision.victims[: len(one_by_one)].tolist() == one_by_one
            for _ in range(3):
                target = (state.engine[0]["layer"] + rng.integers(1, 4)) % state.engine[0]["num_layers"]
                prefetch(state, decision, int(target), int(rng.integers(state.engine[0]["num_experts"])), AUTO)
            done = simulator.step(decision).done
        assert kinds == {FREE, CANDIDATE, WAITING}


def test_lru_is_what_a_backend_does_by_itself():
    workload = generate(12, seed=4)
    for spec in (PLAIN.replace(cache_share=0.25), PLAIN.replace(cache_share=0.25, num_sequences=3, bypass=True)):
        alone = Simulator(spec)
        alone.reset(workload)
        while not alone.step(alone.default_decision()).done:
            pass
        chosen = run(RULES["lru"], spec, workload).timeline()
        assert all(np.array_equal(a, b) for a, b in zip(chosen.loads, alone.timeline().loads, strict=True))


def test_static_keeps_what_is_popular():
    """Once the experts of highest prior are in, a static cache keeps them and changes the rest."""
    prior = np.array([[0.9, 0.8, 0.1, 0.1]])
    workload = sequence(0, 1, 2, 3, 2, 3, 0).with_prior(prior)
    simulator = run(RULES["static"], PLAIN.replace(layer_slots=(3,)), workload)
    assert set(simulator.state().slots["expert"].tolist()) >= {0, 1}
    assert simulator.state().engine[0]["num_hits"] == 1


def test_random_is_reproducible():
    workload = generate(4, seed=9)
    spec = PLAIN.replace(cache_share=0.25)
    assert loads(RULES["random"], spec, workload) == loads(RULES["random"], spec, workload)
    other = RULES["random"].with_params(*RULES["random"].params[:2], 5.0)
    assert loads(other, spec, workload) != loads(RULES["random"], spec, workload)


def test_lrfu_is_the_decayed_frequency():
    workload = generate(8, seed=2)
    spec = PLAIN.replace(cache_share=0.25)
    half_life = np.log(0.5) / np.log(0.95)
    exact, stored = (loads(rule, spec, workload) for rule in (lrfu_rule(half_life), RULES["ema_95"]))
    assert abs(exact - stored) <= 0.005 * stored  # float64 and float32 break a few ties differently


class Arc:
    """ARC as in figure 4 of Megiddo and Modha (FAST 2003), one request at a time."""

    def __init__(self, room: int) -> None:
        self.room, self.p = room, 0.0
        self.t1, self.t2, self.b1, self.b2 = OrderedDict(), OrderedDict(), OrderedDict(), OrderedDict()

    def replace(self, in_b2: bool) -> None:
        if self.t1 and (len(self.t1) > self.p or (in_b2 and len(self.t1) == self.p)):
            self.b1[self.t1.popitem(last=False)[0]] = None
        else:
            self.b2[self.t2.popitem(last=False)[0]] = None

    def hit(self, x: int) -> bool:
        if x in self.t1 or x in self.t2:
            self.t1.pop(x, None)
            self.t2.pop(x, None)
            self.t2[x] = None
            return True
        if x in self.b1:
            self.p = min(self.room, self.p + max(1.0, len(self.b2) / len(self.b1)))
            self.replace(False)
            del self.b1[x]
            self.t2[x] = None
        elif x in self.b2:
            self.p = max(0.0, self.p - max(1.0, len(self.b1) / len(self.b2)))
            self.replace(True)
            del self.b2[x]
            self.t2[x] = None
        else:
            if len(self.t1) + len(self.b1) == self.room:
                if len(self.t1) < self.room:
                    self.b1.popitem(last=False)
                    self.replace(False)
                else:
                    self.t1.popitem(last=False)
            elif len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2) >= self.room:
                if len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2) == 2 * self.room:
                    self.b2.popitem(last=False)
                self.replace(False)
            self.t1[x] = None
        return False


@pytest.mark.parametrize("seed", range(6))
def test_arc_is_arc(seed):
    rng = np.random.default_rng(seed)
    room = int(rng.integers(2, 7))
    hot = rng.geometric(0.35, 600) - 1
    scan = np.arange(600) % 17
    play = np.where(rng.random(600) < 0.6, np.minimum(hot, 16), scan)
    cache = Arc(room)
    hits = [cache.hit(int(x)) for x in play]
    simulator = run(RULES["arc"], PLAIN.replace(layer_slots=(room,)), sequence(*play, num_experts=17))
    assert simulator.timeline().hits.astype(bool).tolist() == hits


def test_arc_resists_a_scan():
    """A working set of four, used again and again; then a scan of twelve others, once each; then the set again."""
    play = [0, 1, 2, 3] * 6 + list(range(4, 16)) + [0, 1, 2, 3]
    spec = PLAIN.replace(layer_slots=(6,))
    workload = sequence(*play, num_experts=16)
    after = {name: run(RULES[name], spec, workload).timeline().hits[-4:].sum() for name in ("arc", "lru")}
    assert after["lru"] == 0
    assert after["arc"] >= 3


def test_sliding_window_loads_the_difference():
    """With room for the window's union, a step loads what the last w steps did not use."""
    workload = generate(3, num_layers=2, num_experts=16, top_k=2, mean_length=40, seed=3)
    w = 4
    rule = RULES["sliding_window"].with_params(float(w))
    simulator = run(rule, PLAIN.replace(cache_share=0.75), workload)  # 12 slots, at most 4 * 2 + 2 in the window
    loaded = simulator.timeline().loads
    for epoch in range(w * 2, 2 * workload.num_tokens):
        step, layer = divmod(epoch, 2)
        window = set(workload.experts[max(step - w, 0) : step, layer].ravel().tolist())
        fresh = loaded["expert"][loaded["epoch"] == epoch]
        assert not set(fresh.tolist()) & window


def test_copying_finds_what_came_before():
    """A text that repeats itself with a period longer than the cache's reach: only the copy kernel sees it coming."""
    rng = np.random.default_rng(0)
    once = np.argsort(rng.random((60, 2, 16)), axis=2)[:, :, :2]
    workload = Workload.from_arrays("repeats", np.concatenate([once] * 5), [300], num_experts=16)
    spec = PLAIN.replace(cache_share=0.375, history_tokens=128)
    rates = {}
    for rule in (RULES["ema_95"], RULES["lru"], copy_rule(16.0, 0.9, 0.01, window=128), belady(workload, spec)):
        hits = run(rule, spec, workload).timeline().hits[2 * 180 :]
        rates[rule.name] = hits.sum() / (2 * len(hits))
    gap = (rates["copy"] - rates["lru"]) / (rates["belady"] - rates["lru"])
    assert gap > 0.8
    assert rates["ema_95"] < rates["copy"]


# --------------------------------------------------------------------------------------------------------- systems


def oracle_predictions(workload: Workload) -> Workload:
    return workload.with_predictions(workload.experts)


@pytest.mark.parametrize("name", ["mixtral_offloading", "fate", "least_stale"])
def test_next_gate_prefetch(name):
    """With a predictor that is right and a channel that is fast, Fate is ready for 99% (its claim) after the start.

    Mixtral-offloading guesses two experts of four; nothing is prefetched for the first layer, which nobody foresees.
    """
    workload = oracle_predictions(generate(8, num_layers=8, seed=4))
    base = ExpertCachingSpec(cost=FAST, cache_share=0.5, history_tokens=1, max_prefetch=4)
    spec = system_spec(RULES[name], base, workload)
    timeline = run(RULES[name], spec, workload).timeline()
    assert check_residency(timeline, workload, spec) == []
    assert check_times(timeline, workload, spec) == []
    prefetched = timeline.loads[timeline.loads["kind"] == PREFETCH]
    assert not (prefetched["layer"] == 0).any()
    assert compute_metrics(timeline)["prefetch_use"] == 1.0
    ready = timeline.ready.sum() / timeline.used.sum()
    by_demand = run(RULES["lru"], base, workload).timeline()
    assert ready > by_demand.ready.sum() / by_demand.used.sum()
    if name == "fate":
        half = len(timeline.used) // 2
        assert timeline.ready[half:].sum() / timeline.used[half:].sum() > 0.99
        assert spec.layer_slots[0] == 32
        assert sum(spec.layer_slots) == 8 * 16
    if name == "mixtral_offloading":
        per_epoch = np.bincount(prefetched["epoch"])
        assert per_epoch.max() == 2


def test_fate_keeps_shallow_layers_first():
    assert fate_slots(26, 64, 6, 26 * 16) == (64,) * 4 + (8,) * 6 + (7,) * 16 == fate_slots(26, 64, 6, 416)
    assert sum(fate_slots(26, 64, 6, 26 * 8)) == 26 * 8
    assert fate_slots(4, 8, 2, 32) == (8, 8, 8, 8)


@pytest.mark.parametrize("name", ["layer_streaming", "se_moe_ring"])
def test_streams_are_blind_to_the_routing(name):
    """Every step loads every expert of every layer, the same whatever the gate says, and in time."""
    first, second = (generate(2, mean_length=20, seed=seed).head(12) for seed in (0, 1))
    spec = system_spec(RULES[name], ExpertCachingSpec(cost=FAST, history_tokens=1), first)
    depth = int(RULES[name].params[0])
    assert spec.slots_of(4, 32, 4) and sum(spec.layer_slots) == (depth + 1) * 32
    timelines = [run(RULES[name], spec, workload).timeline() for workload in (first, second)]
    asked = [t.loads[(t.loads["cancelled"] < 0) & (t.loads["epoch"] > 4)] for t in timelines]
    for column in ("epoch", "layer", "expert", "slot"):
        assert np.array_equal(asked[0][column], asked[1][column])
    assert np.bincount(asked[0]["epoch"])[5:].tolist() == [32] * (4 * 12 - 5)
    for timeline, workload in zip(timelines, (first, second), strict=True):
        assert check_residency(timeline, workload, spec) == []
        assert (timeline.ready[4:] == timeline.used[4:]).all()
        assert compute_metrics(timeline)["hit_rate"] == 0  # nothing outlives its epoch


def test_a_slow_channel_bounds_streams():
    """A layer cannot come faster than its experts are read: the ring overlaps, it does not do wonders."""
    slow = CostModel("slow", attention_s=1e-5, expert_s=1e-6, expert_bytes=1000, bandwidth=1e6, chunk_bytes=1000)
    workload = generate(2, mean_length=20, seed=0).head(10)
    spec = stream_spec(ExpertCachingSpec(cost=slow, history_tokens=1), 4, 32, 1)
    timeline = run(layer_streaming(1, "stream", ""), spec, workload).timeline()
    assert check_residency(timeline, workload, spec) == []
    assert check_times(timeline, workload, spec) == []
    loaded = np.isfinite(timeline.loads["ready_s"]).sum()
    assert timeline.end_s[-1] >= (loaded - 32) * slow.load_s
    with pytest.raises(InputError, match="ring of 5 buffers"):
        stream_spec(spec, 4, 32, 4)


def test_least_stale_looks_at_layers_where_lru_looks_at_time():
    """A pool of four slots, two layers, top 1.

    When step 3 needs (0, 2), the pool holds (0, 0) of step 1, (1, 0) of step 0, (0, 1) and (1, 1) of step 2. LRU drops
    (1, 0), the oldest, which the pass is about to need. For Least-Stale the leftovers of layer 0 have their next use a
    whole pass away: it drops (0, 0).
    """
    workload = Workload.from_arrays("passes", [[[0], [0]], [[0], [1]], [[1], [1]], [[2], [0]]], [4], num_experts=3)
    spec = PLAIN.replace(layer_slots=(2, 2), pooled=True)
    hits = {name: run(RULES[name], spec, workload).timeline().hits.tolist() for name in ("least_stale", "lru")}
    assert hits["least_stale"] == [0, 0, 1, 0, 0, 1, 0, 1]
    assert hits["lru"] == [0, 0, 1, 0, 0, 1, 0, 0]


def test_read_me_with_a_long_queue_is_belady_and_without_one_lru():
    workload = generate(6, num_layers=2, mean_length=15, seed=8)
    spec = PLAIN.replace(cache_share=0.25)
    known = spec.replace(known_steps=workload.num_tokens)
    assert loads(RULES["read_me"], known, workload) == belady_loads(workload, (8, 8)).sum()
    assert loads(RULES["read_me"], spec, workload) == loads(RULES["lru"], spec, workload)
    short = loads(RULES["read_me"], spec.replace(known_steps=4), workload)
    assert belady_loads(workload, (8, 8)).sum() < short < loads(RULES["lru"], spec, workload)


def check_batches(batches: np.ndarray, workload: Workload) -> None:
    """Every token once, and those of a sequence in order."""
    served = batches[batches >= 0]
    assert sorted(served) == list(range(workload.num_tokens))
    step_of = np.empty(workload.num_tokens, int)
    step_of[served] = np.nonzero(batches >= 0)[0]
    inside = workload.token_position[1:] > 0
    assert (np.diff(step_of)[inside] > 0).all()


def experts_a_batch(batches: np.ndarray, workload: Workload) -> np.ndarray:
    """Mean over layers of the distinct experts of each batch, for full batches."""
    full = batches[(batches >= 0).all(1)]
    return np.array([[len(np.unique(workload.experts[b, layer])) for layer in range(4)] for b in full]).mean(1)


def test_expert_aware_batches_share_experts():
    workload = generate(24, mean_length=20, seed=5)
    near = batch_by_experts(workload, 4, limit=11.0)
    blind = batch_by_experts(workload, 4, limit=32.0, queue=1)
    check_batches(near, workload)
    check_batches(blind, workload)
    assert experts_a_batch(near, workload).max() <= 11.0
    assert experts_a_batch(near, workload).mean() < experts_a_batch(blind, workload).mean() - 1.0
    with pytest.raises(InputError, match="a token needs 4"):
        batch_by_experts(workload, 4, limit=2.0)


def token_paths_workload(sequences: int = 30, seed: int = 0) -> Workload:
    """The experts of a token are a function of its id."""
    rng = np.random.default_rng(seed)
    paths = np.argsort(np.random.default_rng(99).random((20, 4, 32)), axis=2)[:, :, :4]
    ids = rng.integers(20, size=sequences * 12)
    return Workload.from_arrays("paths", paths[ids], [12] * sequences, num_experts=32, token_ids=ids)


def test_expert_flow_foresees_paths():
    """Where ids decide the routing, all but the first layer is ready; on generated routing it beats LRU on demand."""
    train, test = token_paths_workload(40, 0), token_paths_workload(10, 1)
    rule = fit_expert_flow(train)
    spec = ExpertCachingSpec(cost=FAST, cache_share=0.5, history_tokens=1, max_prefetch=8, prefetch_depth=2)
    timeline = run(rule, spec, test).timeline()
    assert check_residency(timeline, test, spec) == []
    layers = np.arange(len(timeline.used)) % 4
    assert (timeline.ready == timeline.used)[layers > 0].all()
    assert not (timeline.ready == timeline.used)[layers == 0].all()
    with pytest.raises(InputError, match="tokens without ids"):
        fit_expert_flow(Workload.from_arrays("bare", train.experts, train.lengths))


def test_expert_flow_regroups_tokens():
    workload = token_paths_workload(16, 2)
    rule = fit_expert_flow(workload)
    batches = regroup_by_paths(workload, predicted_paths(workload, rule), 4, queue=3)
    plain = regroup_by_paths(workload, np.zeros((workload.num_tokens, 1), bool), 4, queue=3)
    check_batches(batches, workload)
    assert experts_a_batch(batches, workload).mean() < experts_a_batch(plain, workload).mean()
    spec = ExpertCachingSpec(cost=FAST, cache_share=0.5, history_tokens=1, num_sequences=4, max_prefetch=16)
    grouped, ungrouped = (run(rule, spec, workload, b).timeline() for b in (batches, plain))
    assert len(grouped.loads) < len(ungrouped.loads)


def two_kinds(sequences: int, seed: int) -> Workload:
    """Half of the sequences use experts 0 to 7 only, half 8 to 15."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(2, size=sequences)
    ids = np.argsort(rng.random((sequences * 20, 3, 8)), axis=2)[:, :, :2] + 8 * np.repeat(kinds, 20)[:, None, None]
    return Workload.from_arrays("two kinds", ids, [20] * sequences, num_experts=16)


def test_moe_infinity_prefetches_by_the_nearest_sequence():
    """After the first token of a sequence its kind is known: only experts of that kind are loaded ahead."""
    train, test = two_kinds(40, 0), two_kinds(20, 1)
    rule = fit_moe_infinity(train, num_matrices=8)
    spec = ExpertCachingSpec(cost=FAST, cache_share=0.5, history_tokens=1, max_prefetch=4, prefetch_depth=2)
    timeline = run(rule, spec, test).timeline()
    assert check_residency(timeline, test, spec) == []
    ahead = timeline.loads[timeline.loads["kind"] == PREFETCH]
    token = ahead["epoch"] // 3
    kind = test.experts[token, 0, 0] // 8
    inside = (token % 20 < 19) | (ahead["epoch"] % 3 < 1)  # the last layers look at the next sequence already
    assert (ahead["expert"] // 8 == kind)[inside].all()
    lru = run(RULES["lru"], spec, test).timeline()
    assert timeline.ready.sum() > lru.ready.sum()


def test_affinity_prefetch_beats_chance():
    train, test = generate(60, seed=0).split(0.7, 0.3)
    spec = ExpertCachingSpec(cost=FAST, cache_share=0.25, history_tokens=1, max_prefetch=4)
    timeline = run(fit_affinity_prefetch(train), spec, test).timeline()
    assert compute_metrics(timeline)["prefetch_use"] > 2 * 4 / 32


# ---------------------------------------------------------------------------------------------------------- learned


def test_ridge_and_the_learned_score_learn():
    """Fitted on other sequences of the same model, ridge regression beats LRU; the learned score prefers the recent."""
    train, test = generate(120, seed=0).split(0.75, 0.25)
    spec = PLAIN.replace(cache_share=0.25)
    demand = {rule.name: loads(rule, spec, test) for rule in (RULES["lru"], fit_ridge(train), fit_learned_score(train))}
    assert demand["ridge_0.85"] < 0.97 * demand["lru"]
    assert demand["learned_score"] < 1.03 * demand["lru"]
    assert demand["ridge_0.85"] > belady_loads(test, (8,) * 4).sum()
    with pytest.raises(InputError, match="discount is 1"):
        fit_ridge(train, discount=1.0)


@pytest.mark.parametrize("name", [*RULES, "copy"])
def test_rules_never_ask_for_what_is_illegal(name):
    workload = generate(5, seed=11)
    rule = copy_rule(window=16, num_sequences=2) if name == "copy" else RULES[name]
    base = ExpertCachingSpec(cost=FAST, cache_share=0.5, num_sequences=2, history_tokens=16, max_prefetch=4)
    spec = system_spec(rule, base, workload)
    simulator = run(rule, spec, workload)
    assert simulator.state().engine[0]["num_illegal"] == 0
    status = simulator.state().experts["status"]
    assert ((status == RESIDENT) | (status == QUEUED) | (status == LOADING)).sum() <= sum(spec.slots_of(4, 32, 4))


# ------------------------------------------------------------------------------------------------------------- data

PUBLISHED = {
    0.125: (0.317, 0.315, 0.342, 0.425, 0.540),
    0.25: (0.496, 0.468, 0.529, 0.684, 0.717),
    0.5: (0.737, 0.698, 0.759, 0.881, 0.887),
    0.75: (0.907, 0.875, 0.912, 0.966, 0.967),
}
"""Hit rates of LRU, LFU, EMA .95, Belady and Belady with bypass on held-out sequences of another split."""


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("share", PUBLISHED)
def test_hit_rates_of_real_routing(share):
    """Within 0.04 of the table, and in its order."""
    folder = os.environ.get("SCHEDLAB_DATA")
    if not folder or not (Path(folder) / "expert_routing" / "deepseek_v2_lite.npz").is_file():
        pytest.skip("needs expert_routing/deepseek_v2_lite.npz in $SCHEDLAB_DATA")
    _, test = find_routing("deepseek_v2_lite").split(0.75, 0.25, seed=0)
    spec = PLAIN.replace(cache_share=share)
    rates = []
    for rule in (RULES["lru"], RULES["lfu"], RULES["ema_95"]):
        simulator = Simulator(spec, recording=False)
        simulator.reset(test)
        simulator.run(rule)
        engine = simulator.state().engine[0]
        rates.append(engine["num_hits"] / engine["num_used"])
    for bypass in (False, True):
        fewest = belady_loads(test, spec.slots_of(26, 64, 6), bypass=bypass).sum()
        rates.append(1 - fewest / test.experts.size)
    assert np.abs(np.array(rates) - PUBLISHED[share]).max() < 0.04
    assert np.argsort(rates).tolist() == np.argsort(PUBLISHED[share]).tolist()


def test_load_routing_reads_the_data_layout(tmp_path):
    """The layout of the data folder: uint8 experts and int32 lengths, nothing else."""
    np.savez(tmp_path / "t.npz", experts=np.zeros((3, 2, 1), np.uint8), seq_len=np.array([1, 2], np.int32))
    assert load_routing(tmp_path / "t.npz").lengths.tolist() == [1, 2]
