"""The learned expert cache as policies over `State`: compiled, streaming, strictly causal.

`LearnedEviction` runs the network of `expert_caching_network` one epoch at a time: a token costs one step of the
recurrence, an epoch the bookkeeping of its features, and only an epoch that must evict runs the copy kernel and scores
the experts of its layer. Where the batch interleaves sequences, each row has its own stream, and an expert is kept by
the chance that any row needs it.

`LearnedCaching` also prefetches and bypasses. In every epoch `advise` writes what the network says into the state:
`keep` for the experts of the present layer, `predicted` for those of the layer above. A rule over the state decides
by these two columns (`rule_by_advice`), or a pointer network that sees them among the columns of the action table.

A checkpoint is a folder of `policy.safetensors`, `config.json` and `card.md`, read without torch. The large tables are
kept as int8 with a scale for every row, all else as float16.
"""

from __future__ import annotations

import json
import os
import shutil
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..envs.core.errors import InputError
from ..envs.core.kernel import njit, njit_borrowed
from ..envs.expert_caching.advice import Advice, stored
from ..envs.expert_caching.rule import Rule, evict_lowest, prefetch
from ..envs.expert_caching.sim import Sim, Simulator, has_room, run_epoch
from ..envs.expert_caching.state import (
    ABSENT,
    AUTO,
    BYPASS,
    CANDIDATE,
    FREE,
    IN_USE,
    Decision,
    State,
    is_taken,
    reset_decision,
    slot_kind,
)
from .expert_caching_features import (
    FEATURE_VERSION,
    NUM_COPIES,
    NUM_FEATURES,
    Stream,
    begin_token,
    empty_stream,
    observe_layer,
    read_future,
    read_layer_above,
    weigh_past,
    write_features,
)

if TYPE_CHECKING:
    from ..envs.expert_caching.workload import Workload
    from .expert_caching_network import EvictionNetwork, NextLayerHead, PortableNetwork

FORMAT = "expert_caching/eviction/2"
SHIPPED = Path(__file__).parent / "shipped" / "expert_caching" / "deepseek_v2_lite"
"""Folder of the shipped scores for DeepSeek-V2-Lite; those for other models stand beside it."""

WEIGHTS, CONFIG, CARD = "policy.safetensors", "config.json", "card.md"
TABLES = ("embedding", "own", "channels", "above_own", "above_channels")
"""Arrays that are stored as int8; scales run along the last axis."""


class Weights(NamedTuple):
    """Weights of an `EvictionNetwork` and a `NextLayerHead`, matrices as (inputs, outputs), float32, C-contiguous.

    L layers, E experts, D width, I recurrences, K channels, H and G hidden, F features, O outputs.
    """

    embedding: np.ndarray  # (L, E, D)
    own: np.ndarray  # (L, E, D)
    norm: np.ndarray  # (2, D): scale, shift
    token_w: np.ndarray  # (D, D)
    token_b: np.ndarray  # (D,)
    gates_w: np.ndarray  # (I, D, 2 D): keep, value
    gates_b: np.ndarray  # (I, 2 D)
    mixer_w: np.ndarray  # (I, D, D)
    mixer_b: np.ndarray  # (I, D)
    history_w: np.ndarray  # ((I + 1) D, D)
    history_b: np.ndarray  # (D,)
    prefix_scale: np.ndarray  # (L,)
    layer_bias: np.ndarray  # (L, D)
    middle_w: np.ndarray  # (D, D)
    middle_b: np.ndarray  # (D,)
    channels: np.ndarray  # (L, E, K, D)
    channel_bias: np.ndarray  # (L, E, K)
    hidden_w: np.ndarray  # (F + K, H)
    hidden_b: np.ndarray  # (L, H)
    out_w: np.ndarray  # (F + K + H, O)
    out_b: np.ndarray  # (L, O)
    shares: np.ndarray  # (O,): cache sizes that the outputs are for, increasing
    above_own: np.ndarray  # (L, E, D)
    above_prefix_w: np.ndarray  # (D, D)
    above_context_w: np.ndarray  # (D, D)
    above_bias: np.ndarray  # (L, D)
    above_middle_w: np.ndarray  # (D, D)
    above_middle_b: np.ndarray  # (D,)
    above_channels: np.ndarray  # (L, E, D)
    above_channel_bias: np.ndarray  # (L, E)
    above_hidden_w: np.ndarray  # (G, F + 1)
    above_hidden_b: np.ndarray  # (L, G)
    above_out_w: np.ndarray  # (G,)
    above_feature_w: np.ndarray  # (F,)


class Memory(NamedTuple):
    """What the policy remembers during a run. B rows of the batch, S slots."""

    streams: Stream  # every array with a leading axis B
    hidden: np.ndarray  # (B, I, D) float32: state of the recurrences
    context: np.ndarray  # (B, D) float32: what the tokens before say
    above_context: np.ndarray  # (B, D) float32: the same for the head of the layer above
    prefix: np.ndarray  # (B, D) float32: sum of the present token's embeddings so far
    vector: np.ndarray  # (D,) float32: of the present token and layer
    scratch: np.ndarray  # (4, 2 D + E) float32
    copied: np.ndarray  # (NUM_COPIES, E) float32
    table: np.ndarray  # (F + K, E) float32: features, then channels
    unit: np.ndarray  # (E,) float32: of a hidden layer
    logits: np.ndarray  # (O, E) float32
    scores: np.ndarray  # (L, E) float64: at the last visit of each layer
    above: np.ndarray  # (E,) float32: log-odds of the layer above
    unused: np.ndarray  # (E,) float32: P(no row needs it in the layer above)
    keys: np.ndarray  # (S,) float64
    knobs: np.ndarray  # float64: `Knobs`


def new_memory(weights: Weights, num_rows: int, top_k: int, num_slots: int) -> Memory:
    """The Memory of a run that has seen nothing."""
    num_layers, num_experts, width = weights.embedding.shape
    stream = empty_stream(num_layers, num_experts, top_k)
    return Memory(
        Stream(*(np.repeat(array[None], num_rows, 0) for array in stream)),
        np.zeros((num_rows, len(weights.gates_b), width), np.float32),
        np.zeros((num_rows, width), np.float32),
        np.zeros((num_rows, width), np.float32),
        np.zeros((num_rows, width), np.float32),
        np.zeros(width, np.float32),
        np.zeros((4, 2 * width + num_experts), np.float32),
        np.zeros((NUM_COPIES, num_experts), np.float32),
        np.zeros((NUM_FEATURES + weights.channel_bias.shape[2], num_experts), np.float32),
        np.zeros(num_experts, np.float32),
        np.zeros((weights.out_w.shape[1], num_experts), np.float32),
        np.zeros((num_layers, num_experts)),
        np.zeros(num_experts, np.float32),
        np.zeros(num_experts, np.float32),
        np.zeros(num_slots),
        np.array(Knobs(), np.float64),
    )


@njit(cache=True)
def row_of(streams: Stream, b: int) -> Stream:
    """The Stream of one row, as views."""
    return Stream(
        streams.frequency[b],
        streams.in_sequence[b],
        streams.age[b],
        streams.masks[b],
        streams.used[b],
        streams.overlap[b],
        streams.context[b],
        streams.weight[b],
        streams.powers[b],
        streams.place[b],
    )


@njit(cache=True, fastmath=True)
def add_product(x, matrix, out) -> None:
    """out += x @ matrix."""
    for i in range(len(x)):
        factor, row = x[i], matrix[i]
        for j in range(len(out)):
            out[j] += factor * row[j]


@njit(cache=True, fastmath=True)
def silu(x) -> None:
    """x = x * sigmoid(x), in place."""
    for i in range(len(x)):
        x[i] = x[i] / (np.float32(1.0) + np.exp(-x[i]))


@njit(cache=True, fastmath=True)
def end_token(weights: Weights, hidden, context, whole, scratch) -> None:
    """One step of the recurrence: the token whose embeddings sum to `whole` (D,) is past. Writes hidden and context."""
    width, num_recurrences = len(whole), len(hidden)
    x, below, gates, normed = scratch[0, :width], scratch[1, :width], scratch[2, : 2 * width], scratch[3, :width]
    mean, square = np.float32(0.0), np.float32(0.0)
    for i in range(width):
        mean += whole[i]
    mean /= np.float32(width)
    for i in range(width):
        square += (whole[i] - mean) ** 2
    scale = np.float32(1.0) / np.sqrt(square / np.float32(width) + np.float32(1e-5))
    for i in range(width):
        normed[i] = (whole[i] - mean) * scale * weights.norm[0, i] + weights.norm[1, i]
    x[:] = weights.token_b
    add_product(normed, weights.token_w, x)
    silu(x)
    context[:] = weights.history_b
    add_product(x, weights.history_w[:width], context)
    below[:] = x
    for r in range(num_recurrences):
        gates[:] = weights.gates_b[r]
        add_product(below, weights.gates_w[r], gates)
        h = hidden[r]
        for i in range(width):
            keep = np.float32(1.0) / (np.float32(1.0) + np.exp(-gates[i]))
            h[i] = keep * h[i] + (np.float32(1.0) - keep) * gates[width + i]
        add_product(h, weights.history_w[(r + 1) * width : (r + 2) * width], context)
        below[:] = weights.mixer_b[r]
        add_product(h, weights.mixer_w[r], below)
        silu(below)
        for i in range(width):
            below[i] += x[i]


@njit(cache=True)
def observe(weights: Weights, memory: Memory, b: int, layer: int, position: int, used) -> None:
    """The gate of `layer` chose `used` (k,) for the token of row b, which is at `position` in its sequence."""
    stream = row_of(memory.streams, b)
    hidden, context, prefix = memory.hidden[b], memory.context[b], memory.prefix[b]
    if layer == 0:
        if position == 0:
            hidden[:] = 0
            context[:] = 0
        else:
            end_token(weights, hidden, context, prefix, memory.scratch)
        memory.above_context[b] = 0
        add_product(context, weights.above_context_w, memory.above_context[b])
        prefix[:] = 0
        begin_token(stream, position)
    observe_layer(stream, layer, used)
    for e in used:
        if e >= 0:
            row = weights.embedding[layer, e]
            for i in range(len(prefix)):
                prefix[i] += row[i]


@njit(cache=True, fastmath=True)
def prepare_scores(weights: Weights, memory: Memory, b: int, layer: int, used, num_past: int, match) -> None:
    """Write the token's vector and the feature table of row b, from which `score_layer` works.

    `num_past` and `match` are what `weigh_past` returned for this row and layer.
    """
    stream = row_of(memory.streams, b)
    prefix, context, vector = memory.prefix[b], memory.context[b], memory.vector
    scale, width = weights.prefix_scale[layer], len(vector)
    for i in range(width):
        vector[i] = prefix[i] * scale + weights.layer_bias[layer, i] + context[i]
    for e in used:
        if e >= 0:
            row = weights.own[layer, e]
            for i in range(width):
                vector[i] += row[i]
    silu(vector)
    more = memory.scratch[0, :width]
    more[:] = weights.middle_b
    add_product(vector, weights.middle_w, more)
    silu(more)
    for i in range(width):
        vector[i] += more[i]
    read_future(stream, layer, num_past, memory.copied)
    write_features(
        stream.frequency[layer],
        stream.in_sequence[layer],
        stream.age[layer],
        stream.place[2],
        memory.copied,
        match,
        memory.scratch[0, : memory.table.shape[1]],
        memory.table,
    )


@njit(cache=True, fastmath=True)
def score_layer(weights: Weights, memory: Memory, layer: int) -> None:
    """Write the outputs for all experts into `memory.logits` (O, E), after `prepare_scores`."""
    table, vector, unit, logits = memory.table, memory.vector, memory.unit, memory.logits
    num_channels, num_inputs, num_experts = weights.channel_bias.shape[2], len(table), table.shape[1]
    for e in range(num_experts):
        for k in range(num_channels):
            row, total = weights.channels[layer, e, k], weights.channel_bias[layer, e, k]
            for i in range(len(vector)):
                total += vector[i] * row[i]
            table[NUM_FEATURES + k, e] = total
    for o in range(len(logits)):
        logits[o] = weights.out_b[layer, o]
    for f in range(num_inputs):
        add_scaled(table[f], weights.out_w[f], logits)
    for h in range(weights.hidden_b.shape[1]):
        unit[:] = weights.hidden_b[layer, h]
        for f in range(num_inputs):
            factor, row = weights.hidden_w[f, h], table[f]
            for e in range(num_experts):
                unit[e] += factor * row[e]
        for e in range(num_experts):
            unit[e] = max(unit[e], np.float32(0.0))
        add_scaled(unit, weights.out_w[num_inputs + h], logits)


@njit(cache=True, fastmath=True)
def add_scaled(row, factors, out) -> None:
    """out[o] += factors[o] * row for every o."""
    for o in range(len(factors)):
        factor, total = factors[o], out[o]
        for e in range(len(row)):
            total[e] += factor * row[e]


@njit(cache=True, fastmath=True)
def score_layer_above(weights: Weights, memory: Memory, b: int, layer: int, used, num_past: int, match) -> None:
    """Write the log-odds that row b's token uses each expert of the layer above into `memory.above` (E,).

    `num_past` and `match` are what `weigh_past` returned for this row and layer.
    """
    stream, vector, width = row_of(memory.streams, b), memory.vector, len(memory.vector)
    above, table, num_experts = (layer + 1) % len(weights.layer_bias), memory.table, memory.table.shape[1]
    logits, unit = memory.above, memory.unit
    vector[:] = weights.above_bias[layer]
    for i in range(width):
        vector[i] += memory.above_context[b, i]
    add_product(memory.prefix[b], weights.above_prefix_w, vector)
    for e in used:
        if e >= 0:
            row = weights.above_own[layer, e]
            for i in range(width):
                vector[i] += row[i]
    silu(vector)
    more = memory.scratch[0, :width]
    more[:] = weights.above_middle_b
    add_product(vector, weights.above_middle_w, more)
    silu(more)
    for i in range(width):
        vector[i] += more[i]
    for e in range(num_experts):
        row, total = weights.above_channels[layer, e], weights.above_channel_bias[layer, e]
        for i in range(width):
            total += vector[i] * row[i]
        logits[e] = total
    read_layer_above(stream, layer, num_past, memory.copied)
    write_features(
        stream.frequency[above],
        stream.in_sequence[above],
        stream.age[above],
        stream.place[2],
        memory.copied,
        match,
        memory.scratch[0, :num_experts],
        table,
    )
    channel = memory.scratch[1, :num_experts]
    channel[:] = logits
    for h in range(len(weights.above_out_w)):
        unit[:] = weights.above_hidden_b[layer, h]
        for f in range(NUM_FEATURES):
            factor, row = weights.above_hidden_w[h, f], table[f]
            for e in range(num_experts):
                unit[e] += factor * row[e]
        factor, out = weights.above_hidden_w[h, NUM_FEATURES], weights.above_out_w[h]
        for e in range(num_experts):
            logits[e] += out * max(unit[e] + factor * channel[e], np.float32(0.0))
    for f in range(NUM_FEATURES):
        factor, row = weights.above_feature_w[f], table[f]
        for e in range(num_experts):
            logits[e] += factor * row[e]


@njit(cache=True)
def for_share(logits, expert: int, shares, share: float) -> float:
    """The output for a cache of this share of the experts, interpolated between the sizes that outputs are for."""
    last = len(shares) - 1
    if share <= shares[0]:
        return logits[0, expert]
    for i in range(last):
        if share < shares[i + 1]:
            part = (share - shares[i]) / (shares[i + 1] - shares[i])
            return (1 - part) * logits[i, expert] + part * logits[i + 1, expert]
    return logits[last, expert]


@njit(cache=True)
def hear_gate(state: State, weights: Weights, memory: Memory) -> None:
    """Take note of what the gate of the present layer chose, in every row."""
    engine, history = state.engine[0], state.history
    for b in range(engine.num_sequences):
        row = state.sequences[b]
        if row.sequence >= 0:
            used = history[b, (row.served - 1) % history.shape[1], engine.layer]
            observe(weights, memory, b, engine.layer, row.position, used)


@njit(cache=True)
def score_rows(state: State, weights: Weights, memory: Memory, above: bool) -> None:
    """Write `memory.scores` of the present layer's experts: -log P(no row needs it soon).

    With `above` also `memory.unused`: P(no row needs it in the layer above).
    """
    engine, num_experts = state.engine[0], state.experts.shape[1]
    layer, scores, unused = engine.layer, memory.scores[engine.layer], memory.unused
    num_slots = state.layers[layer].end_slot - state.layers[layer].first_slot
    share = num_slots / (state.experts.size if engine.pooled else num_experts)
    scores[:] = 0
    unused[:] = 1
    for b in range(engine.num_sequences):
        row = state.sequences[b]
        if row.sequence < 0:
            continue
        used = state.history[b, (row.served - 1) % state.history.shape[1], layer]
        num_past, match = weigh_past(row_of(memory.streams, b), layer)
        prepare_scores(weights, memory, b, layer, used, num_past, match)
        score_layer(weights, memory, layer)
        for e in range(num_experts):
            logit = for_share(memory.logits, e, weights.shares, share)
            scores[e] += np.log1p(np.exp(logit))  # up to rounding of the product
        if above:
            score_layer_above(weights, memory, b, layer, used, num_past, match)
            for e in range(num_experts):
                unused[e] /= np.float32(1.0) + np.exp(memory.above[e])


@njit(cache=True)
def decide_learned(state: State, weights: Weights, memory: Memory, decision: Decision) -> None:
    """Evict the candidate that is least likely to be needed soon by any row. Called in every epoch, in order."""
    engine, slots = state.engine[0], state.slots
    hear_gate(state, weights, memory)
    if engine.num_missing == 0 and engine.pooled == 0:
        return
    score_rows(state, weights, memory, False)
    for slot in range(state.layers[engine.layer].first_slot, state.layers[engine.layer].end_slot):
        held = slots[slot]
        if held.expert >= 0:
            memory.keys[slot] = memory.scores[held.layer, held.expert]
    evict_lowest(state, memory.keys, decision)


@njit(cache=True)
def advise(state: State, weights: Weights, memory: Memory) -> None:
    """Write `keep` of the present layer's experts, and `predicted` of those above. Called in every epoch, in order."""
    layer = state.engine[0].layer
    above = (layer + 1) % state.engine[0].num_layers
    hear_gate(state, weights, memory)
    score_rows(state, weights, memory, True)
    for e in range(state.experts.shape[1]):
        state.experts[layer, e].keep = 1.0 - np.exp(-memory.scores[layer, e])
        state.experts[layer, e].predicted = 0.0
        state.experts[above, e].predicted = 1.0 - memory.unused[e]


@njit
def run_learned(sim: Sim, decide, params, memory, decision: Decision) -> bool:
    """`sim.run_rule` for kernels that slice arrays, and therefore count references."""
    while not sim.books[0].done:
        if not has_room(sim):
            return False
        reset_decision(sim.state, decision)
        decide(sim.state, params, memory, decision)
        run_epoch(sim, decision)
    return True


class LearnedEviction:
    """The learned eviction score as a `Policy`. It neither prefetches nor bypasses.

    Args:
        name: shown in results.
        weights: from `load_eviction` or `pack_eviction`.
        top_k: experts a token of the model that the weights are for.
    """

    is_oracle = False

    def __init__(self, name: str, weights: Weights, top_k: int) -> None:
        self.name = name
        self.weights = weights
        self.shape = (*weights.embedding.shape[:2], top_k)

    def reset(self, state: State) -> None:
        """Forget the previous run. Raises InputError if the weights are for a model of another shape."""
        engine = state.engine[0]
        shape = (int(engine["num_layers"]), int(engine["num_experts"]), int(engine["top_k"]))
        if shape != self.shape:
            raise InputError(
                f"policy {self.name!r} knows the routing of {_told(self.shape)}, the workload is of {_told(shape)}",
                remedy="Train one on a trace of this model: python -m schedlab.experiments.expert_caching_gap --help",
            )
        self.memory = new_memory(self.weights, len(state.sequences), shape[2], len(state.slots))

    def decide(self, state: State, decision: Decision) -> None:
        """Write the decision for `state` into `decision`; to be called in every epoch."""
        decide_learned(state, self.weights, self.memory, decision)

    def run(self, simulator: Simulator) -> None:
        """Serve the simulator's whole workload, compiled."""
        self.reset(simulator.state())
        while not run_learned(simulator.sim, decide_learned, self.weights, self.memory, simulator.default_decision()):
            simulator.make_room()


# ------------------------------------------------------------------------------------------- prefetch and bypass


LEAST_DONE = 0.5
"""Share of a load that must be done when the next gate answers: one begun later delays the loads on demand by a chunk,
which costs more than it saves (simulated at the measured cost of the CPU backend, on training tokens: 1.30 and 1.28
times LRU at 25% and 50% cache with up to two prefetches, against 1.17 without the limit)."""


class Knobs(NamedTuple):
    """What `by_advice` is decided by; tuned on real stalls (`experiments/expert_caching_stalls.py`)."""

    bypass_margin: float = 0.0
    """A missing expert is streamed if its `keep` does not exceed the lowest resident one by this much."""
    keep_weight: float = 0.5
    """Loads that a copy is worth, per unit of `keep`."""
    prefetch_margin: float = 0.05
    """Loads that a prefetch must be expected to save, net of its victim."""


@njit_borrowed
def keep_best(state, keys, margin, decision):
    """Victims with bypass: keep the best by `keep` of what is there and what comes in, stream the rest.

    Missing experts are taken from the highest `keep` down, each into a free slot, else into that of the lowest key, if
    its own exceeds that by `margin`. Experts in use may go: they are done with when the layer is.
    """
    engine, experts, slots, victims = state.engine[0], state.experts, state.slots, decision.victims
    layer, first, end = engine.layer, state.layers[engine.layer].first_slot, state.layers[engine.layer].end_slot
    for slot in range(first, end):
        kind, held = slot_kind(experts, slots, layer, slot), slots[slot]
        keys[slot] = np.inf  # may not be taken
        if kind == FREE:
            keys[slot] = -np.inf
        elif kind in (CANDIDATE, IN_USE):
            keys[slot] = experts[held.layer, held.expert].keep
    for i in range(engine.num_missing):
        victims[i] = AUTO
    for _ in range(engine.num_missing):
        best, lowest = -1, first
        for i in range(engine.num_missing):
            keep = experts[layer, state.missing[i]].keep
            if victims[i] == AUTO and (best < 0 or keep > experts[layer, state.missing[best]].keep):
                best = i
        for slot in range(first, end):
            lowest = slot if keys[slot] < keys[lowest] else lowest
        if first < end and keys[lowest] < experts[layer, state.missing[best]].keep - margin:
            victims[best] = lowest
            keys[lowest] = np.inf
        else:
            victims[best] = BYPASS


@njit_borrowed
def prefetch_best(state, keep_weight, margin, decision):
    """Prefetch for the layer above as long as a load is expected to save more than its victim was worth.

    In loads: gain = P(needed) * share of the load that is done when it is asked for + keep_weight * keep, the victim's
    worth = P(needed) + keep_weight * keep. The channel is free for prefetches once it has read what is missing now,
    until the next gate.
    """
    engine, experts, slots, plan = state.engine[0], state.experts, state.slots, decision.plan[0]
    above = (engine.layer + 1) % engine.num_layers
    if above == engine.layer or engine.load_s <= 0.0:
        return
    compute_s = engine.num_needed * engine.expert_s
    busy_s = engine.channel_s + engine.num_missing * engine.load_s
    window_s = engine.attention_s + max(compute_s - busy_s, engine.expert_s if busy_s > 0.0 else compute_s)
    while plan.num_prefetch < engine.max_prefetch:
        done = min(1.0, window_s / engine.load_s - plan.num_prefetch)
        if done < LEAST_DONE:
            return
        best, gain = -1, -np.inf
        for e in range(engine.num_experts):
            row = experts[above, e]
            value = row.predicted * done + keep_weight * row.keep
            if row.status == ABSENT and value > gain and not is_asked(decision, above, e):
                best, gain = e, value
        victim, worth = -1, np.inf
        for slot in range(state.layers[above].first_slot, state.layers[above].end_slot):
            kind, held = slot_kind(experts, slots, engine.layer, slot), slots[slot]
            if kind > CANDIDATE or is_taken(
                decision.victims, engine.num_missing, decision.prefetch, plan.num_prefetch, slot
            ):
                continue
            row = experts[held.layer, held.expert]
            value = -np.inf if kind == FREE else row.predicted + keep_weight * row.keep
            if value < worth:
                victim, worth = slot, value
        if best < 0 or victim < 0 or gain - max(worth, 0.0) <= margin:
            return
        prefetch(state, decision, above, best, victim)


@njit_borrowed
def is_asked(decision, layer, expert):
    """True if the decision has this prefetch."""
    for j in range(decision.plan[0].num_prefetch):
        if decision.prefetch[j, 0] == layer and decision.prefetch[j, 1] == expert:
            return True
    return False


@njit_borrowed
def by_advice(state, params, memory, decision):
    """Evict, bypass and prefetch by what a predictor wrote into `keep` and `predicted`. params: `Knobs`."""
    engine, keys = state.engine[0], memory
    if engine.bypass:
        keep_best(state, keys, params[0], decision)
    elif engine.num_missing > 0:
        for slot in range(state.layers[engine.layer].first_slot, state.layers[engine.layer].end_slot):
            held = state.slots[slot]
            if held.expert >= 0:
                keys[slot] = state.experts[held.layer, held.expert].keep
        evict_lowest(state, keys, decision)
    prefetch_best(state, params[1], params[2], decision)


def advice_rule(knobs: Knobs | None = None) -> Rule:
    """`by_advice` as a `Rule`: it needs a state whose `keep` and `predicted` somebody writes."""
    knobs = knobs or Knobs()
    return Rule("advice", by_advice, tuple(knobs), memory_per_expert=1, source="the learned score")


@njit(cache=True)
def decide_advised(state: State, weights: Weights, memory: Memory, decision: Decision) -> None:
    """`advise`, then `by_advice`. Called in every epoch, in order."""
    advise(state, weights, memory)
    by_advice(state, memory.knobs, memory.keys, decision)


@njit(cache=True)
def foresee(weights: Weights, memory: Memory, experts, positions, share: float, keep, above) -> None:
    """Fill `Advice` for one sequence after the other: experts (T, L, k), positions (T,) in their sequences."""
    num_tokens, num_layers, _ = experts.shape
    for t in range(num_tokens):
        for layer in range(num_layers):
            used = experts[t, layer]
            observe(weights, memory, 0, layer, positions[t], used)
            num_past, match = weigh_past(row_of(memory.streams, 0), layer)
            prepare_scores(weights, memory, 0, layer, used, num_past, match)
            score_layer(weights, memory, layer)
            for e in range(keep.shape[2]):
                logit = for_share(memory.logits, e, weights.shares, share)
                keep[t, layer, e] = stored(1.0 / (1.0 + np.exp(-logit)))
            score_layer_above(weights, memory, 0, layer, used, num_past, match)
            for e in range(keep.shape[2]):
                above[t, layer, e] = stored(1.0 / (1.0 + np.exp(-memory.above[e])))


def advice_for(weights: Weights, workload: Workload, share: float) -> Advice:
    """What the network says at every token, for caches of this share of the experts: about 2 CPU-ms a token."""
    shape = (workload.num_tokens, workload.num_layers, workload.num_experts)
    advice = Advice(np.empty(shape, np.uint8), np.empty(shape, np.uint8))
    memory = new_memory(weights, 1, workload.top_k, 1)
    foresee(weights, memory, workload.experts, workload.token_position, share, *advice)
    return advice


class LearnedCaching(LearnedEviction):
    """The learned scores as a `Policy` that evicts, prefetches where the spec allows it, and bypasses.

    Args:
        name: shown in results.
        weights: from `load_eviction` or `pack_eviction`.
        top_k: experts a token of the model that the weights are for.
        knobs: of `by_advice`.
    """

    def __init__(self, name: str, weights: Weights, top_k: int, knobs: Knobs | None = None) -> None:
        super().__init__(name, weights, top_k)
        self.knobs = knobs or Knobs()

    def reset(self, state: State) -> None:
        """Forget the previous run. Raises InputError if the weights are for a model of another shape."""
        super().reset(state)
        self.memory = self.memory._replace(knobs=np.array(self.knobs, np.float64))

    def decide(self, state: State, decision: Decision) -> None:
        """Write the decision for `state` into `decision`; to be called in every epoch."""
        decide_advised(state, self.weights, self.memory, decision)

    def run(self, simulator: Simulator) -> None:
        """Serve the simulator's whole workload, compiled."""
        self.reset(simulator.state())
        while not run_learned(simulator.sim, decide_advised, self.weights, self.memory, simulator.default_decision()):
            simulator.make_room()


def _told(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} layers x {shape[1]} experts, top {shape[2]}"


# ------------------------------------------------------------------------------------------------- checkpoints


def pack_eviction(network: EvictionNetwork, head: NextLayerHead) -> Weights:
    """The weights of a torch network and its head for the kernels."""
    from .expert_caching_network import SHARES

    state, of_head = (
        {name: tensor.detach().cpu().numpy().astype(np.float32) for name, tensor in module.state_dict().items()}
        for module in (network, head)
    )
    recurrences = range(network.config["num_recurrences"])

    def stacked(name: str, transpose: bool) -> np.ndarray:
        return np.stack([state[name.format(i)].T if transpose else state[name.format(i)] for i in recurrences])

    arrays = {
        "embedding": state["embedding"],
        "own": state["own"],
        "norm": np.stack([state["norm.weight"], state["norm.bias"]]),
        "token_w": state["token.weight"].T,
        "token_b": state["token.bias"],
        "gates_w": stacked("recurrences.{}.gates.weight", True),
        "gates_b": stacked("recurrences.{}.gates.bias", False),
        "mixer_w": stacked("mixers.{}.weight", True),
        "mixer_b": stacked("mixers.{}.bias", False),
        "history_w": state["from_history.weight"].T,
        "history_b": state["from_history.bias"],
        "prefix_scale": state["prefix_scale"],
        "layer_bias": state["layer_bias"],
        "middle_w": state["middle.weight"].T,
        "middle_b": state["middle.bias"],
        "channels": state["channels"].transpose(0, 3, 1, 2),
        "channel_bias": state["channel_bias"][:, :, 0].transpose(0, 2, 1),
        "hidden_w": np.concatenate([state["feature_in"], state["channel_in"]], 1).T,
        "hidden_b": state["hidden_bias"][:, :, 0],
        "out_w": np.concatenate([state["feature_out"], state["channel_out"], state["hidden_out"]], 1).T,
        "out_b": state["out_bias"][:, :, 0],
        "shares": np.array(SHARES),
        "above_own": of_head["own"],
        "above_prefix_w": of_head["from_prefix.weight"].T,
        "above_context_w": of_head["from_context.weight"].T,
        "above_bias": of_head["layer_bias"],
        "above_middle_w": of_head["middle.weight"].T,
        "above_middle_b": of_head["middle.bias"],
        "above_channels": of_head["channels"].transpose(0, 2, 1),
        "above_channel_bias": of_head["channel_bias"][:, 0],
        "above_hidden_w": of_head["hidden_in"],
        "above_hidden_b": of_head["hidden_bias"][:, :, 0],
        "above_out_w": of_head["hidden_out"][0],
        "above_feature_w": of_head["feature_out"][0],
    }
    return Weights(**{name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()})


def pack_portable(network: PortableNetwork, num_layers: int, num_experts: int) -> Weights:
    """The weights of a network that knows no layer and no expert, for a model of any shape: all else is nothing."""
    from .expert_caching_network import EvictionNetwork, NextLayerHead

    whole = EvictionNetwork(num_layers, num_experts, width=1, hidden=network.hidden_in.out_features)
    weights = pack_eviction(whole, NextLayerHead(num_layers, num_experts, width=1, hidden=1))
    state = {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}
    num_channels, num_features = weights.channel_bias.shape[2], state["hidden_in.weight"].shape[1]
    hidden_w = np.zeros_like(weights.hidden_w)
    hidden_w[:num_features] = state["hidden_in.weight"].T
    out_w = np.zeros_like(weights.out_w)
    out_w[:num_features] = state["feature_out.weight"].T
    out_w[num_features + num_channels :] = state["hidden_out.weight"].T
    nothing = {name: np.zeros_like(getattr(weights, name)) for name in ("channels", "channel_bias")}
    return weights._replace(
        hidden_w=hidden_w,
        hidden_b=np.tile(state["hidden_in.bias"], (num_layers, 1)),
        out_w=out_w,
        out_b=np.tile(state["hidden_out.bias"], (num_layers, 1)),
        **nothing,
    )


def save_eviction(
    folder: str | PathLike[str], weights: Weights, top_k: int, config: dict[str, Any], card: str = ""
) -> Path:
    """Write a checkpoint folder, replacing an older one of that name; written under a temporary name and renamed.

    Args:
        folder: its name.
        weights: what to save.
        top_k: experts a token of the model.
        config: what else to keep (JSON-able): training, split, versions.
        card: Markdown: what it was trained on and measured at.
    """
    folder = Path(folder)
    tensors: dict[str, np.ndarray] = {}
    for name, array in weights._asdict().items():
        if name in TABLES:
            scale = np.maximum(np.abs(array).max(-1, keepdims=True), 1e-12) / 127.0
            tensors[f"{name}.int8"] = np.rint(array / scale).astype(np.int8)
            tensors[f"{name}.scale"] = scale.astype(np.float32)
        else:
            tensors[name] = array.astype(np.float16)
    num_layers, num_experts, _ = weights.embedding.shape
    model = {"num_layers": num_layers, "num_experts": num_experts, "top_k": top_k}
    text = json.dumps({"format": FORMAT, "feature_version": FEATURE_VERSION, "model": model, **config}, indent=2)
    temporary, replaced = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    temporary.mkdir(parents=True)
    try:
        (temporary / WEIGHTS).write_bytes(save(tensors))
        (temporary / CONFIG).write_text(text + "\n")
        (temporary / CARD).write_text(card)
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return folder


def load_eviction(folder: str | PathLike[str], name: str | None = None) -> LearnedEviction:
    """The policy of a checkpoint folder.

    Raises:
        InputError: a file is missing, corrupt or of another format or feature version; weights do not fit together or
            are not finite.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError("no such file", file=path, remedy=_COPY_AGAIN)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"not readable as safetensors ({error})", file=path, remedy=_COPY_AGAIN) from error
    arrays = {}
    for field in Weights._fields:
        parts = [f"{field}.int8", f"{field}.scale"] if field in TABLES else [field]
        if any(part not in tensors for part in parts):
            raise InputError(f"lacks {parts[0]!r}", file=path, remedy=_COPY_AGAIN)
        array = tensors[parts[0]].astype(np.float32)
        if field in TABLES:
            array *= tensors[parts[1]]
        if not np.isfinite(array).all():
            raise InputError(f"{field} holds values that are not finite", file=path, remedy="Train again")
        arrays[field] = np.ascontiguousarray(array)
    weights, model = Weights(**arrays), config["model"]
    if weights.channels.shape[:2] != (model["num_layers"], model["num_experts"]):
        raise InputError(
            f"weights are for {weights.channels.shape[:2]} layers and experts, {CONFIG} says {model}",
            file=path,
            remedy=_COPY_AGAIN,
        )
    return LearnedEviction(name or folder.name, weights, model["top_k"])


_COPY_AGAIN = "Copy the checkpoint folder again, or train again"


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError("no such file", file=path, remedy="Give a folder that holds an eviction policy")
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"not readable as JSON ({error})", file=path, remedy=_COPY_AGAIN) from error
    for key, wanted in (("format", FORMAT), ("feature_version", FEATURE_VERSION)):
        if not isinstance(config, dict) or config.get(key) != wanted:
            found = config.get(key) if isinstance(config, dict) else config
            raise InputError(f"{key} is {found!r}, expected {wanted!r}", file=path, remedy="Train again")
    return config
