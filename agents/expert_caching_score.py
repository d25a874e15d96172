"""The network of `expert_caching_network` as compiled kernels that run one epoch at a time.

A token costs one step of the recurrence, an epoch the bookkeeping of its features (`observe`). Only an epoch that asks
for scores runs the copy kernel (`weigh_past`), writes the features (`write_table`) and scores the experts of its layer
(`score_layer`), or those of the layer above (`score_layer_above`).

A score is the mean of the logits of a committee of networks that read the same features; the head for the layer above
reads the memory of the first one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..envs.core.kernel import njit
from .expert_caching_features import (
    NUM_COPIES,
    NUM_FEATURES,
    Stream,
    begin_token,
    empty_stream,
    observe_layer,
    read_future,
    read_layer_above,
    write_features,
)


class Weights(NamedTuple):
    """Weights of M `EvictionNetwork`s and a `NextLayerHead`, matrices as (inputs, outputs), float32, C-contiguous.

    L layers, E experts, D width, I recurrences, K channels, H and G hidden, F features, O outputs.
    """

    embedding: np.ndarray  # (M, L, E, D)
    own: np.ndarray  # (M, L, E, D)
    norm: np.ndarray  # (M, 2, D): scale, shift
    token_w: np.ndarray  # (M, D, D)
    token_b: np.ndarray  # (M, D)
    gates_w: np.ndarray  # (M, I, D, 2 D): keep, value
    gates_b: np.ndarray  # (M, I, 2 D)
    mixer_w: np.ndarray  # (M, I, D, D)
    mixer_b: np.ndarray  # (M, I, D)
    history_w: np.ndarray  # (M, (I + 1) D, D)
    history_b: np.ndarray  # (M, D)
    prefix_scale: np.ndarray  # (M, L)
    layer_bias: np.ndarray  # (M, L, D)
    middle_w: np.ndarray  # (M, D, D)
    middle_b: np.ndarray  # (M, D)
    channels: np.ndarray  # (M, L, E, K, D)
    channel_bias: np.ndarray  # (M, L, E, K)
    hidden_w: np.ndarray  # (M, F + K, H)
    hidden_b: np.ndarray  # (M, L, H)
    out_w: np.ndarray  # (M, F + K + H, O): over M, so that the sum is the mean
    out_b: np.ndarray  # (M, L, O): the same
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
    """What a policy remembers during a run. B rows of the batch, S slots; the other sizes as in `Weights`."""

    streams: Stream  # every array with a leading axis B
    hidden: np.ndarray  # (B, M, I, D) float32: state of the recurrences
    context: np.ndarray  # (B, M, D) float32: what the tokens before say
    above_context: np.ndarray  # (B, D) float32: the same for the head of the layer above
    prefix: np.ndarray  # (B, M, D) float32: sum of the present token's embeddings so far
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
    knobs: np.ndarray  # float64: of the rule that decides by the scores


def new_memory(
    weights: Weights, num_rows: int, top_k: int, num_slots: int = 1, knobs: tuple[float, ...] = ()
) -> Memory:
    """The Memory of a run that has seen nothing."""
    num_members, num_layers, num_experts, width = weights.embedding.shape
    stream = empty_stream(num_layers, num_experts, top_k)
    return Memory(
        Stream(*(np.repeat(array[None], num_rows, 0) for array in stream)),
        np.zeros((num_rows, num_members, weights.gates_b.shape[1], width), np.float32),
        np.zeros((num_rows, num_members, width), np.float32),
        np.zeros((num_rows, width), np.float32),
        np.zeros((num_rows, num_members, width), np.float32),
        np.zeros(width, np.float32),
        np.zeros((4, 2 * width + num_experts), np.float32),
        np.zeros((NUM_COPIES, num_experts), np.float32),
        np.zeros((NUM_FEATURES + weights.channel_bias.shape[3], num_experts), np.float32),
        np.zeros(num_experts, np.float32),
        np.zeros((weights.out_w.shape[2], num_experts), np.float32),
        np.zeros((num_layers, num_experts)),
        np.zeros(num_experts, np.float32),
        np.zeros(num_experts, np.float32),
        np.zeros(num_slots),
        np.array(knobs, np.float64),
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
def deepen(vector, w, b, scratch) -> None:
    """vector = f(vector), in place: silu, then silu(w @ that + b) on top. scratch (D,)."""
    silu(vector)
    scratch[:] = b
    add_product(vector, w, scratch)
    silu(scratch)
    for i in range(len(vector)):
        vector[i] += scratch[i]


@njit(cache=True, fastmath=True)
def end_token(weights: Weights, m: int, hidden, context, whole, scratch) -> None:
    """One step of network m's recurrence: the token whose embeddings sum to `whole` (D,) is past.

    Writes `hidden` (I, D) and `context` (D,).
    """
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
        normed[i] = (whole[i] - mean) * scale * weights.norm[m, 0, i] + weights.norm[m, 1, i]
    x[:] = weights.token_b[m]
    add_product(normed, weights.token_w[m], x)
    silu(x)
    context[:] = weights.history_b[m]
    add_product(x, weights.history_w[m, :width], context)
    below[:] = x
    for r in range(num_recurrences):
        gates[:] = weights.gates_b[m, r]
        add_product(below, weights.gates_w[m, r], gates)
        h = hidden[r]
        for i in range(width):
            keep = np.float32(1.0) / (np.float32(1.0) + np.exp(-gates[i]))
            h[i] = keep * h[i] + (np.float32(1.0) - keep) * gates[width + i]
        add_product(h, weights.history_w[m, (r + 1) * width : (r + 2) * width], context)
        below[:] = weights.mixer_b[m, r]
        add_product(h, weights.mixer_w[m, r], below)
        silu(below)
        for i in range(width):
            below[i] += x[i]


@njit(cache=True)
def observe(weights: Weights, memory: Memory, b: int, layer: int, position: int, used) -> None:
    """The gate of `layer` chose `used` (k,) for the token of row b, which is at `position` in its sequence."""
    stream, num_members = row_of(memory.streams, b), len(weights.embedding)
    hidden, context, prefix = memory.hidden[b], memory.context[b], memory.prefix[b]
    if layer == 0:
        if position == 0:
            hidden[:] = 0
            context[:] = 0
        else:
            for m in range(num_members):
                end_token(weights, m, hidden[m], context[m], prefix[m], memory.scratch)
        memory.above_context[b] = 0
        add_product(context[0], weights.above_context_w, memory.above_context[b])
        prefix[:] = 0
        begin_token(stream, position)
    observe_layer(stream, layer, used)
    for m in range(num_members):
        for e in used:
            if e >= 0:
                row, total = weights.embedding[m, layer, e], prefix[m]
                for i in range(len(total)):
                    total[i] += row[i]


@njit(cache=True)
def write_table(stream: Stream, memory: Memory, layer: int, match) -> None:
    """Write the features of a layer's experts, given `memory.copied`, and the best match that `weigh_past` returned."""
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
def score_layer(weights: Weights, memory: Memory, b: int, layer: int, used, num_past: int, match) -> None:
    """Write the outputs for the experts of `layer` into `memory.logits` (O, E), as row b's token sees them.

    `num_past` and `match` are what `weigh_past` returned for this row and layer.
    """
    stream = row_of(memory.streams, b)
    read_future(stream, layer, num_past, memory.copied)
    write_table(stream, memory, layer, match)
    memory.logits[:] = 0
    for m in range(len(weights.embedding)):
        write_vector(weights, m, memory, b, layer, used)
        add_logits(weights, m, memory, layer)


@njit(cache=True, fastmath=True)
def write_vector(weights: Weights, m: int, memory: Memory, b: int, layer: int, used) -> None:
    """What network m makes of the token of row b, into `memory.vector` (D,)."""
    prefix, context, vector = memory.prefix[b, m], memory.context[b, m], memory.vector
    scale, bias = weights.prefix_scale[m, layer], weights.layer_bias[m, layer]
    for i in range(len(vector)):
        vector[i] = prefix[i] * scale + bias[i] + context[i]
    for e in used:
        if e >= 0:
            row = weights.own[m, layer, e]
            for i in range(len(vector)):
                vector[i] += row[i]
    deepen(vector, weights.middle_w[m], weights.middle_b[m], memory.scratch[0, : len(vector)])


@njit(cache=True, fastmath=True)
def add_logits(weights: Weights, m: int, memory: Memory, layer: int) -> None:
    """Add what network m says of the experts, from the token's vector and the table of features."""
    table, vector, unit, logits = memory.table, memory.vector, memory.unit, memory.logits
    channels, channel_bias = weights.channels[m, layer], weights.channel_bias[m, layer]
    hidden_w, out_w = weights.hidden_w[m], weights.out_w[m]
    num_inputs, num_experts = table.shape
    for e in range(num_experts):
        for k in range(channels.shape[1]):
            row, total = channels[e, k], channel_bias[e, k]
            for i in range(len(vector)):
                total += vector[i] * row[i]
            table[NUM_FEATURES + k, e] = total
    for o in range(len(logits)):
        logits[o] += weights.out_b[m, layer, o]
    for f in range(num_inputs):
        add_scaled(table[f], out_w[f], logits)
    for h in range(hidden_w.shape[1]):
        unit[:] = weights.hidden_b[m, layer, h]
        for f in range(num_inputs):
            factor, row = hidden_w[f, h], table[f]
            for e in range(num_experts):
                unit[e] += factor * row[e]
        for e in range(num_experts):
            unit[e] = max(unit[e], np.float32(0.0))
        add_scaled(unit, out_w[num_inputs + h], logits)


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
    above, table, num_experts = (layer + 1) % len(weights.above_bias), memory.table, memory.table.shape[1]
    logits, unit = memory.above, memory.unit
    vector[:] = weights.above_bias[layer]
    for i in range(width):
        vector[i] += memory.above_context[b, i]
    add_product(memory.prefix[b, 0], weights.above_prefix_w, vector)
    for e in used:
        if e >= 0:
            row = weights.above_own[layer, e]
            for i in range(width):
                vector[i] += row[i]
    deepen(vector, weights.above_middle_w, weights.above_middle_b, memory.scratch[0, :width])
    for e in range(num_experts):
        row, total = weights.above_channels[layer, e], weights.above_channel_bias[layer, e]
        for i in range(width):
            total += vector[i] * row[i]
        logits[e] = total
    read_layer_above(stream, layer, num_past, memory.copied)
    write_table(stream, memory, above, match)
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
