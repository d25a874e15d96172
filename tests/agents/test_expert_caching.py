"""The learned eviction score: features, network, compiled twin, causality, training, checkpoints."""

from __future__ import annotations

import dataclasses
import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from schedlab.agents.expert_caching import SHIPPED, LearnedCaching, LearnedEviction, advice_for, load_eviction
from schedlab.agents.expert_caching_checkpoint import pack_eviction, pack_portable, save_eviction
from schedlab.agents.expert_caching_features import (
    AGE,
    CONTEXT_DECAY,
    CONTEXT_WEIGHT,
    COPY_DISCOUNTS,
    DECAYS,
    FLOOR,
    IN_SEQUENCE,
    NUM_COPIES,
    NUM_FEATURES,
    SHARPNESS,
    WINDOW,
    begin_token,
    copy_future,
    empty_stream,
    observe_layer,
    read_layer_above,
    weigh_past,
)
from schedlab.agents.expert_caching_network import DISCOUNTS, EvictionNetwork, NextLayerHead, scan
from schedlab.agents.expert_caching_rule import advice_rule
from schedlab.agents.expert_caching_score import new_memory, observe, score_layer, score_layer_above, weigh_row
from schedlab.agents.expert_caching_train import (
    IN_USE,
    EvictionTraining,
    begin_counts,
    eviction_loss,
    layer_above_targets,
    next_use_targets,
    prepare_trace,
    read_chunk,
    train_eviction,
    train_head,
    train_portable,
)
from schedlab.agents.expert_caching_units import BLOCK, run_units
from schedlab.envs.core.errors import InputError
from schedlab.envs.expert_caching.advice import run_with_advice
from schedlab.envs.expert_caching.sim import Simulator
from schedlab.envs.expert_caching.spec import CostModel, ExpertCachingSpec
from schedlab.envs.expert_caching.workload import Workload, find_routing
from schedlab.experiments.expert_caching_presets import MOE_DISK
from schedlab.experiments.expert_traces import find_trace

LAYERS, EXPERTS, K = 3, 16, 2
SMALL = EvictionTraining(
    steps=6, num_streams=4, chunk_tokens=8, layers_per_step=2, width=16, hidden=8, checkpoint_every=3, head_steps=3
)


def random_workload(seed: int, lengths: tuple[int, ...] = (37, 5, 60, 1, 80), experts: int = EXPERTS) -> Workload:
    """Routing in which tokens of one of six kinds follow each other, with some noise: there is something to learn."""
    rng = np.random.default_rng(seed)
    favourites = np.argsort(np.random.default_rng(99).random((6, LAYERS, experts)), 2)[:, :, :K]
    tokens = sum(lengths)
    kinds = np.cumsum(rng.random(tokens) < 0.9) % 6
    noisy = np.argsort(rng.random((tokens, LAYERS, experts)), 2)[:, :, :K]
    routing = np.where(rng.random((tokens, LAYERS, 1)) < 0.85, favourites[kinds], noisy)
    return Workload.from_arrays("kinds", routing, lengths, num_experts=experts)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return random_workload(0)


@pytest.fixture(scope="module")
def network() -> EvictionNetwork:
    torch.manual_seed(3)
    return EvictionNetwork(LAYERS, EXPERTS, width=16, hidden=8).eval()


@pytest.fixture(scope="module")
def head() -> NextLayerHead:
    torch.manual_seed(4)
    return NextLayerHead(LAYERS, EXPERTS, width=16, hidden=8).eval()


@pytest.fixture
def policy(network, head) -> LearnedEviction:
    return LearnedEviction("learned", pack_eviction([network], head), K)


class Streamed(NamedTuple):
    """What the kernels compute, token by token."""

    logits: np.ndarray  # (T, L, E, O)
    tables: np.ndarray  # (T, L, F, E)
    above_logits: np.ndarray  # (T, L, E)
    above_tables: np.ndarray  # (T, L, F, E)


def streamed(weights, workload: Workload) -> Streamed:
    shape = (workload.num_tokens, LAYERS)
    memory = new_memory(weights, 1, K)
    out = Streamed(
        np.zeros((*shape, EXPERTS, len(DISCOUNTS)), np.float32),
        np.zeros((*shape, NUM_FEATURES, EXPERTS), np.float32),
        np.zeros((*shape, EXPERTS), np.float32),
        np.zeros((*shape, NUM_FEATURES, EXPERTS), np.float32),
    )
    for t in range(workload.num_tokens):
        for layer in range(LAYERS):
            used = workload.experts[t, layer]
            observe(weights, memory, 0, layer, workload.token_position[t], used)
            weighed = weigh_row(memory, 0, layer)
            for output, share in enumerate(weights.shares):
                score_layer(weights, memory, 0, layer, used, *weighed, share)
                out.logits[t, layer, :, output] = memory.logits[output]
            out.tables[t, layer] = memory.table[:NUM_FEATURES]
            score_layer_above(weights, memory, 0, layer, used, *weighed)
            out.above_logits[t, layer], out.above_tables[t, layer] = memory.above, memory.table[:NUM_FEATURES]
    return out


# ------------------------------------------------------------------------------------------------- the features


def logarithm(x):
    """What `log_scale` approximates."""
    return (np.log2(x) + 5.0) / 4.0


def test_frequencies_age_and_share_are_what_they_say(workload, policy):
    tables = streamed(policy.weights, workload).tables
    used = np.zeros((workload.num_tokens, LAYERS, EXPERTS), bool)
    np.put_along_axis(used, workload.experts.astype(int), True, 2)
    position = workload.token_position
    for t, layer, e in [(0, 0, 1), (20, 2, 5), (36, 1, 0), (37, 0, 3), (41, 2, 7), (182, 1, 11)]:
        back = np.arange(t, -1, -1)
        for g, decay in enumerate(DECAYS):
            expected = (1 - decay) * (used[: t + 1, layer, e] * decay**back).sum() + FLOOR
            assert tables[t, layer, g, e] == pytest.approx(logarithm(expected), abs=0.03)
        count = used[t - position[t] : t + 1, layer, e].sum()
        assert tables[t, layer, IN_SEQUENCE, e] == pytest.approx(logarithm(count / (position[t] + 9) + FLOOR), abs=0.03)
        last = np.flatnonzero(used[: t + 1, layer, e])
        if len(last):
            expected = 1 / (t - last[-1] + 1) + 2 * FLOOR
            assert tables[t, layer, AGE, e] == pytest.approx(logarithm(expected), abs=0.03)


def plain_copies(workload: Workload, t: int, layer: int) -> tuple[np.ndarray, np.ndarray, float]:
    """`copy_future` and `read_layer_above` by their definitions, and the best match."""
    sets = [[set(row.tolist()) for row in token] for token in workload.experts]

    def overlap(a: int, b: int, layers: int) -> int:
        return sum(len(sets[a][m] & sets[b][m]) for m in range(layers))

    similarity = {}
    for s in range(max(0, t - WINDOW + 1), t):
        before = sum(
            float(CONTEXT_DECAY) ** (j - 1) * overlap(t - j, s - j, LAYERS) for j in range(1, s + 1) if s - j >= 0
        )
        most = K * (layer + 1 + CONTEXT_WEIGHT * LAYERS / (1 - CONTEXT_DECAY))
        similarity[s] = (overlap(t, s, layer + 1) + CONTEXT_WEIGHT * before) / most
    best = max(similarity.values())
    weight = {s: np.exp(SHARPNESS * (x - best)) for s, x in similarity.items()}
    total = sum(weight.values())
    out = np.zeros((NUM_COPIES, EXPERTS))
    for s, w in weight.items():
        for g, discount in enumerate(COPY_DISCOUNTS.astype(float)):
            for follower in range(s + 1, t):
                for e in sets[follower][layer]:
                    out[g, e] += w / total * (1 - discount) * discount ** (follower - s - 1)
    return out, plain_above(sets, weight, t, layer), best


def plain_above(sets: list, weight: dict[int, float], t: int, layer: int) -> np.ndarray:
    """`read_layer_above` by its definition."""
    above, later = (layer + 1) % LAYERS, layer == LAYERS - 1
    out = np.zeros((NUM_COPIES, EXPERTS))
    for g, power in enumerate((1.0, 2.0, 0.5)):
        total = sum(w**power for w in weight.values())
        for s, w in weight.items():
            for e in sets[s + later][above]:
                out[g, e] += w**power / total
    return out


@pytest.mark.parametrize("experts", [EXPERTS, 100], ids=["one word", "two words"])
def test_copies_are_what_followed_similar_tokens(experts):
    workload = random_workload(4, (60, 30), experts)
    stream, copied = empty_stream(LAYERS, experts, K), np.zeros((NUM_COPIES, experts), np.float32)
    for t in range(workload.num_tokens):
        begin_token(stream, workload.token_position[t])
        for layer in range(LAYERS):
            observe_layer(stream, layer, workload.experts[t, layer])
            best = copy_future(stream, layer, copied)
            if experts == EXPERTS and t in (1, 2, 17, 60, 89):
                expected, above, expected_best = plain_copies(workload, t, layer)
                assert best == pytest.approx(expected_best, abs=1e-5)
                read = 2.0 ** (4.0 * copied - 5.0) - FLOOR
                np.testing.assert_allclose(read, expected, atol=0.07)  # log_scale is within 6%, plus what is negligible
                num_past, _ = weigh_past(stream, layer)
                read_layer_above(stream, layer, num_past, copied)
                read = 2.0 ** (4.0 * copied - 5.0) - FLOOR
                np.testing.assert_allclose(read, above, atol=0.07)
    masks = stream.masks[:, :, : workload.num_tokens]
    bits = [[{w * 64 + b for w in range(masks.shape[1]) for b in range(64) if int(masks[m, w, t]) >> b & 1}
             for m in range(LAYERS)] for t in range(workload.num_tokens)]  # fmt: skip
    assert bits == [[set(row.tolist()) for row in token] for token in workload.experts]


def test_the_ring_forgets_what_is_older_than_the_window():
    stream = empty_stream(1, 8, 1)
    copied = np.zeros((NUM_COPIES, 8), np.float32)
    tokens = [0, 1] + [2, 3] * (WINDOW // 2 - 1) + [0]  # the first token is WINDOW tokens back: out of reach
    for t, e in enumerate(tokens):
        begin_token(stream, t)
        observe_layer(stream, 0, np.array([e], np.int16))
        best = copy_future(stream, 0, copied)
    assert best < 0.5  # nothing in reach shares an expert with the present token
    begin_token(stream, len(tokens))
    observe_layer(stream, 0, np.array([2], np.int16))
    assert copy_future(stream, 0, copied) > 0.5
    assert copied[0].argmax() == 3


# -------------------------------------------------------------------------------------------------- the network


def test_scan_is_the_recurrence():
    keep, value = torch.rand(2, 13, 3), torch.randn(2, 13, 3)
    h, expected = torch.zeros(2, 3), []
    for t in range(13):
        h = keep[:, t] * h + value[:, t]
        expected.append(h)
    torch.testing.assert_close(scan(keep, value), torch.stack(expected, 1))


def in_torch(network: EvictionNetwork, workload: Workload, tables: np.ndarray, chunk: int) -> torch.Tensor:
    """Logits (T, L, E, O) of a network, chunk by chunk, on these feature tables."""
    features = torch.from_numpy(tables).permute(1, 2, 0, 3)  # (L, F, T, E)
    used = torch.zeros(1, workload.num_tokens, LAYERS, EXPERTS)
    used.scatter_(3, torch.from_numpy(workload.experts.astype(np.int64))[None], 1.0)
    begins = torch.from_numpy(workload.token_position == 0)[None]
    recurrence, out = network.begin(1), []
    with torch.no_grad():
        for a in range(0, workload.num_tokens, chunk):
            b = min(a + chunk, workload.num_tokens)
            flat = features[:, :, a:b].reshape(LAYERS, NUM_FEATURES, -1)
            result, recurrence = network(used[:, a:b], begins[:, a:b], recurrence, range(LAYERS), flat)
            out.append(result.view(LAYERS, len(DISCOUNTS), b - a, EXPERTS).permute(2, 0, 3, 1))
        some = network(used, begins, network.begin(1), [1], features[1:2].flatten(2))[0]
    logits = torch.cat(out)
    alone = some.view(len(DISCOUNTS), -1, EXPERTS).permute(1, 2, 0)
    torch.testing.assert_close(alone, logits[:, 1], atol=2e-4, rtol=1e-4)
    return logits


@pytest.mark.parametrize("chunk", [183, 20])
def test_kernel_equals_torch(workload, network, policy, chunk):
    logits, tables, *_ = streamed(policy.weights, workload)
    expected = in_torch(network, workload, tables, chunk)
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=2e-4, rtol=1e-4)


def test_a_committee_says_the_mean(workload, network, head, policy):
    torch.manual_seed(5)
    other = EvictionNetwork(LAYERS, EXPERTS, width=16, hidden=8).eval()
    both = streamed(pack_eviction([network, other], head), workload)
    expected = (in_torch(network, workload, both.tables, 183) + in_torch(other, workload, both.tables, 183)) / 2
    torch.testing.assert_close(torch.from_numpy(both.logits), expected, atol=2e-4, rtol=1e-4)
    np.testing.assert_array_equal(both.above_logits, streamed(policy.weights, workload).above_logits)


@pytest.mark.parametrize("columns", [BLOCK, 3 * BLOCK + 17])
def test_units_and_their_gradients_are_those_of_torch(columns):
    torch.manual_seed(0)
    shapes = {"channels": (2, 3, columns), "w": (6, 8), "b": (2, 6), "v": (4, 14), "c": (2, 4)}
    features = torch.randn(2, 5, columns)
    arguments = [torch.randn(shape, requires_grad=True) for shape in shapes.values()]
    channels, w, b, v, c = arguments
    x = torch.cat([features, channels], 1)
    hidden = torch.relu(w @ x + b[:, :, None])
    expected = v @ torch.cat([x, hidden], 1) + c[:, :, None]
    logits = run_units(features, *arguments)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    gradient = torch.randn_like(logits)
    for name, ours, torchs in zip(
        shapes,
        torch.autograd.grad(logits, arguments, gradient),
        torch.autograd.grad(expected, arguments, gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs, atol=1e-3, rtol=1e-4, msg=name)


def test_head_kernel_equals_torch(workload, network, head, policy):
    seen = streamed(policy.weights, workload)
    features = torch.from_numpy(seen.above_tables).permute(1, 2, 0, 3).flatten(2)  # (L, F, T * E)
    used = torch.zeros(workload.num_tokens, LAYERS, EXPERTS)
    used.scatter_(2, torch.from_numpy(workload.experts.astype(np.int64)), 1.0)
    begins = torch.from_numpy(workload.token_position == 0)[None]
    with torch.no_grad():
        prefix, context, _ = network.remember(used, begins, network.begin(1), range(LAYERS))
        logits = head(prefix, context, used, range(LAYERS), features)
    torch.testing.assert_close(torch.from_numpy(seen.above_logits).transpose(0, 1), logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("above", [False, True])
def test_training_reads_what_deployment_reads(workload, policy, above):
    """The tables of training are those of the kernel, but for the copies, which are stored in 256 steps."""
    seen = streamed(policy.weights, workload)
    tables = seen.above_tables if above else seen.tables
    trace = prepare_trace(workload)
    counts = begin_counts(trace, np.zeros(1, np.int64))
    for first in (0, 100):
        *_, features = read_chunk(trace, counts, 100 if first == 0 else 83, np.array([0, 2]), above)
        expected = tables[first : first + 100, [0, 2]].transpose(1, 2, 0, 3)
        np.testing.assert_allclose(features.view(2, NUM_FEATURES, -1, EXPERTS), expected, atol=0.006)


# ---------------------------------------------------------------------------------------------------- causality


def decisions(policy: LearnedEviction, workload: Workload, share: float = 0.5) -> list[np.ndarray]:
    """Scores of the layer and victims in every epoch."""
    simulator = Simulator(ExpertCachingSpec(cache_share=share, eviction_only=True))
    simulator.reset(workload)
    state = simulator.state()
    policy.reset(state)
    seen, done = [], False
    while not done:
        decision = simulator.default_decision()
        policy.decide(state, decision)
        layer, missing = state.engine[0]["layer"], state.engine[0]["num_missing"]
        seen.append(np.concatenate([policy.memory.scores[layer], decision.victims[:missing]]))
        done = simulator.step(decision).done
    return seen


@pytest.mark.parametrize(("token", "layer"), [(30, 0), (36, 1), (37, 0), (101, 1), (150, 2)])
def test_no_score_changes_with_the_future_or_higher_layers(workload, policy, token, layer):
    now = token * LAYERS + layer
    other = random_workload(17).experts
    routing = workload.experts.copy()
    routing[token + 1 :] = other[token + 1 :]
    routing[token, layer + 1 :] = other[token, layer + 1 :]
    changed = Workload.from_arrays("changed", routing, workload.lengths, num_experts=EXPERTS)
    before, after = decisions(policy, workload), decisions(policy, changed)
    for a, b in zip(before[: now + 1], after[: now + 1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(before[now + 1 :], after[now + 1 :], strict=True))


def test_torch_scores_do_not_change_with_the_future_or_higher_layers(workload, network):
    token, layer = 101, 1
    routing = workload.experts.copy()
    routing[token + 1 :] = random_workload(17).experts[token + 1 :]
    routing[token, layer + 1 :] = random_workload(17).experts[token, layer + 1 :]
    changed = Workload.from_arrays("changed", routing, workload.lengths, num_experts=EXPERTS)
    logits = []
    for one in (workload, changed):
        trace = prepare_trace(one)
        counts = begin_counts(trace, np.zeros(1, np.int64))
        _, used, begins, features = read_chunk(trace, counts, one.num_tokens, np.arange(LAYERS))
        with torch.no_grad():
            out = network(used, begins, network.begin(1), range(LAYERS), features)[0]
        logits.append(out.view(LAYERS, len(DISCOUNTS), -1, EXPERTS))
    torch.testing.assert_close(logits[0][:, :, :token], logits[1][:, :, :token])
    torch.testing.assert_close(logits[0][: layer + 1, :, token], logits[1][: layer + 1, :, token])
    assert (logits[0][layer + 1, :, token] - logits[1][layer + 1, :, token]).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------- the policy


def test_every_row_of_the_batch_has_its_own_stream(policy):
    """Two interleaved sequences leave the same streams as one after the other, and all decisions are legal."""
    workload = random_workload(5, (40, 40))
    simulator = Simulator(ExpertCachingSpec(cache_share=0.5, num_sequences=2, eviction_only=True))
    simulator.reset(workload)
    policy.run(simulator)
    assert simulator.state().engine[0]["num_illegal"] == 0
    hidden = policy.memory.hidden.copy()
    for b in (0, 1):
        alone = Simulator(ExpertCachingSpec(cache_share=0.5, eviction_only=True))
        alone.reset(workload.select([b]))
        policy.run(alone)
        np.testing.assert_array_equal(policy.memory.hidden[0], hidden[b])


@pytest.mark.parametrize("changes", [{"pooled": True}, {"bypass": True}, {"cache_share": 0.2}, {"num_sequences": 3}])
def test_runs_in_every_kind_of_cache(policy, workload, changes):
    simulator = Simulator(ExpertCachingSpec(**({"cache_share": 0.5} | changes)))
    simulator.reset(workload)
    policy.run(simulator)
    assert simulator.sim.books[0]["done"]
    assert simulator.state().engine[0]["num_illegal"] == 0


def test_another_model_is_refused(policy):
    simulator = Simulator(ExpertCachingSpec(cache_share=0.5))
    simulator.reset(random_workload(0, experts=32))
    with pytest.raises(InputError, match="3 layers x 16 experts, top 2, the workload is of 3 layers x 32 experts"):
        policy.run(simulator)


# -------------------------------------------------------------------------------------------- prefetch and bypass


@pytest.mark.parametrize(("token", "layer"), [(30, 0), (101, 1), (150, 2)])
def test_no_advice_changes_with_the_future_or_higher_layers(workload, policy, token, layer):
    routing, other = workload.experts.copy(), random_workload(17).experts
    routing[token + 1 :] = other[token + 1 :]
    routing[token, layer + 1 :] = other[token, layer + 1 :]
    changed = Workload.from_arrays("changed", routing, workload.lengths, num_experts=EXPERTS)
    before, after = (advice_for(policy.weights, one, 0.5) for one in (workload, changed))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[:token], b[:token])
        np.testing.assert_array_equal(a[token, : layer + 1], b[token, : layer + 1])
        assert (a[token + 1 :] != b[token + 1 :]).any()


def test_advice_computed_once_decides_as_the_streaming_policy(workload, policy):
    """But for rounding: ties and near ties may fall otherwise."""
    cost = CostModel("slow attention", attention_s=2e-3, expert_s=1e-4, expert_bytes=1 << 20, bandwidth=1e9)
    spec = ExpertCachingSpec(cost=cost, cache_share=0.5, max_prefetch=2, bypass=True)
    loads = []
    for streaming in (True, False):
        simulator = Simulator(spec)
        simulator.reset(workload)
        if streaming:
            LearnedCaching("agent", policy.weights, K).run(simulator)
        else:
            run_with_advice(simulator, advice_rule(), advice_for(policy.weights, workload, 0.5))
        engine = simulator.state().engine[0]
        assert engine["num_illegal"] == 0 and engine["num_prefetch_loads"] > 0
        loads.append(int(engine["num_demand_loads"] + engine["num_prefetch_loads"]))
    assert loads[0] == pytest.approx(loads[1], rel=0.05)


def test_a_portable_score_fits_any_model(workload):
    network = train_portable(prepare_trace(workload), SMALL)
    other = random_workload(0, experts=100)
    policy = LearnedEviction("portable", pack_portable(network, LAYERS, 100), K)
    tables = streamed(pack_portable(network, LAYERS, EXPERTS), workload)
    with torch.no_grad():
        logits = network(torch.from_numpy(tables.tables).flatten(0, 1))
    torch.testing.assert_close(
        torch.from_numpy(tables.logits).flatten(0, 1).transpose(1, 2), logits, atol=2e-4, rtol=1e-4
    )
    simulator = Simulator(ExpertCachingSpec(cache_share=0.25, eviction_only=True))
    simulator.reset(other)
    policy.run(simulator)
    assert simulator.sim.books[0]["done"]


# ------------------------------------------------------------------------------------------------------- training


def test_targets_and_loss_by_hand():
    routing = np.array([[[0]], [[1]], [[0]], [[2]]])
    trace = prepare_trace(Workload.from_arrays("by-hand", routing, [4], num_experts=4))
    targets = next_use_targets(trace, np.array([[0, 1]]), np.array([0])).view(len(DISCOUNTS), 2, 4)
    d = torch.tensor(DISCOUNTS)
    torch.testing.assert_close(targets[:, 0, :3], torch.stack([d, d**0, d**2], 1))  # used in 2, 1 and 3 tokens
    assert targets[:, :, 3].max() < 1e-4  # never
    used = torch.nn.functional.one_hot(torch.tensor([[[0], [1]]]), 4).float()
    logits = torch.full((1, len(DISCOUNTS), 8), -20.0)
    logits[:, :, [0, 5]] = 20.0  # what the tokens use themselves
    logits[:, :, 1] = 20.0
    own = (1 - targets[:, 0, 0]) + (1 - targets[:, 1, 1])
    expected = 20.0 * (targets[:, 0, 2] + targets[:, 1, [0, 2]].sum(1) + IN_USE * own).mean() / 8
    loss = eviction_loss(logits, targets.view(1, -1, 8), used, np.array([0]))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)  # the tail of what is never used


def test_targets_above_are_what_the_token_uses_next():
    routing = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    trace = prepare_trace(Workload.from_arrays("by-hand", routing, [2], num_experts=8))
    targets = layer_above_targets(trace, np.array([[0, 1]]), np.array([0, 1]))
    above = [[np.flatnonzero(row).tolist() for row in layer] for layer in targets.numpy()]
    assert above == [[[2, 3], [6, 7]], [[4, 5], [0, 1]]]  # the last layer's: the next token's first, round the trace


def test_the_head_is_trained_and_kept(workload, network, tmp_path):
    trace, before = prepare_trace(workload), {n: t.clone() for n, t in network.state_dict().items()}
    losses: list[float] = []
    config = dataclasses.replace(SMALL, head_steps=200)
    trained = train_head(trace, network, config, tmp_path, report=lambda progress: losses.append(progress["loss"]))
    assert losses[1] < 0.8 * losses[0]
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    again = train_head(trace, network, config, tmp_path, resume=True)
    torch.testing.assert_close(trained.channels, again.channels, rtol=0, atol=0)


def test_a_resumed_run_ends_at_the_same_weights(workload, tmp_path):
    trace = prepare_trace(workload)
    whole = train_eviction(trace, SMALL, tmp_path / "whole")

    class Killed(Exception):
        pass

    from schedlab.agents import expert_caching_train as module

    original, calls = module.read_chunk, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise Killed
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_chunk", killed)
        with pytest.raises(Killed):
            train_eviction(trace, SMALL, tmp_path / "killed")
    resumed = train_eviction(trace, SMALL, tmp_path / "killed", resume=True)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    with pytest.raises(InputError, match="another configuration"):
        train_eviction(trace, EvictionTraining(steps=7), tmp_path / "killed", resume=True)


def test_copies_are_kept(workload, tmp_path):
    first, again = prepare_trace(workload, tmp_path), prepare_trace(workload, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(first.copies, again.copies)
    np.testing.assert_array_equal(first.matches, again.matches)
    assert (first.copies != prepare_trace(random_workload(1), tmp_path).copies).any()


@pytest.mark.slow
def test_training_beats_lru():
    config = EvictionTraining(steps=150, num_streams=8, chunk_tokens=16, layers_per_step=2, width=32, hidden=16)
    network = train_eviction(prepare_trace(random_workload(1, (400,) * 5)), config)
    test = random_workload(2, (300, 300))
    loads = {}
    for name in ("lru", "learned"):
        simulator = Simulator(ExpertCachingSpec(cache_share=0.25, eviction_only=True))
        simulator.reset(test)
        if name == "learned":
            head = NextLayerHead(LAYERS, EXPERTS, width=32).eval()
            LearnedEviction(name, pack_eviction([network], head), K).run(simulator)
        else:
            while not simulator.step(simulator.default_decision()).done:
                pass
        loads[name] = int(simulator.state().engine[0]["num_demand_loads"])
    assert loads["learned"] < 0.9 * loads["lru"]


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_holds_the_policy(tmp_path, policy, workload):
    save_eviction(tmp_path / "agent", policy.weights, K, {"training": {"steps": 1}}, "# A card\n")
    loaded = load_eviction(tmp_path / "agent")
    assert loaded.name == "agent" and loaded.shape == policy.shape
    exact, rounded = (streamed(weights, workload) for weights in (policy.weights, loaded.weights))
    assert 0 < np.abs(exact.logits - rounded.logits).max() < 0.05
    assert 0 < np.abs(exact.above_logits - rounded.above_logits).max() < 0.05
    assert json.loads((tmp_path / "agent" / "config.json").read_text())["training"] == {"steps": 1}
    assert (tmp_path / "agent" / "card.md").read_text() == "# A card\n"
    again = load_eviction(save_eviction(tmp_path / "again", loaded.weights, K, {}))
    np.testing.assert_allclose(streamed(again.weights, workload).logits, rounded.logits, atol=1e-5)


def test_broken_checkpoints_are_refused(tmp_path, policy):
    folder = save_eviction(tmp_path / "agent", policy.weights, K, {})
    with pytest.raises(InputError, match="no such file"):
        load_eviction(tmp_path / "nothing")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (({"format": "x"}, "format is 'x'"), ({"feature_version": 0}, "feature_version is 0")):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            load_eviction(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model": config["model"] | {"num_experts": 8}}))
    with pytest.raises(InputError, match=r"config\.json says"):
        load_eviction(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        load_eviction(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "policy.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not readable as safetensors"):
        load_eviction(folder)
    tensors = load_file(save_eviction(tmp_path / "misfit", policy.weights, K, {}) / "policy.safetensors")
    tensors["own.scale"] = tensors["own.scale"][:, :1].copy()
    save_file(tensors, tmp_path / "misfit" / "policy.safetensors")
    with pytest.raises(InputError, match=r"own\.int8 and own\.scale do not fit together"):
        load_eviction(tmp_path / "misfit")
    broken = policy.weights._replace(middle_b=np.full_like(policy.weights.middle_b, np.nan))
    with pytest.raises(InputError, match="middle_b holds values that are not finite"):
        load_eviction(save_eviction(tmp_path / "nan", broken, K, {}))


def test_the_shipped_checkpoint_is_small_and_loads():
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 6 << 20
    assert load_eviction(SHIPPED).shape == (26, 64, 6)


@pytest.mark.data
def test_the_shipped_policy_beats_lru_on_held_out_sequences():
    try:
        workload = find_routing("deepseek_v2_lite")
    except InputError as error:
        pytest.skip(str(error))
    test = workload.split(0.25, seed=2026)[0].head(600)
    loads = []
    for policy in (None, load_eviction(SHIPPED)):
        simulator = Simulator(ExpertCachingSpec(cache_share=0.5, eviction_only=True), recording=False)
        simulator.reset(test)
        if policy:
            policy.run(simulator)
        else:
            while not simulator.step(simulator.default_decision()).done:
                pass
        loads.append(int(simulator.state().engine[0]["num_demand_loads"]))
    assert loads[1] < 0.9 * loads[0]


def test_slots_that_layers_share_begin_by_the_prior_and_end_fuller_of_use():
    """Pooled, the policy must not take the layers that it has not come to yet for useless."""
    policy = load_eviction(SHIPPED.parent / "moe")
    workload = find_trace("moe", None).draw(400, 0)
    loads = {}
    for pooled in (False, True):
        spec = ExpertCachingSpec(MOE_DISK, cache_share=0.5, warm_start=True, max_prefetch=2, pooled=pooled)
        simulator, agent = Simulator(spec, recording=False), LearnedCaching("agent", policy.weights, policy.shape[2])
        simulator.reset(workload)
        state, decision = simulator.state(), simulator.default_decision()
        agent.reset(state)
        agent.decide(state, decision)
        expected = 1 - (1 - state.experts["prior"][1:]) ** 4 if pooled else np.zeros_like(state.experts["prior"][1:])
        np.testing.assert_allclose(state.experts["keep"][1:], expected, atol=1e-6)
        simulator.reset(workload)
        agent.run(simulator)
        loads[pooled] = int(simulator.state().engine[0]["num_demand_loads"])
    assert loads[True] < 0.97 * loads[False]
