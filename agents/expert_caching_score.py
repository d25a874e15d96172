"""The network of `expert_caching_network` as compiled kernels that run one epoch at a time.

A token costs one step of the recurrence, an epoch the bookkeeping of its features (`observe`). Only an epoch that asks
for scores runs the copy kernel (`weigh_row`), writes the features (`write_table`) and scores the experts of its layer
(`score_layer`), or those of the layer above (`score_layer_above`).

A score is the mean of the logits of a committee of networks that read the same features; the head for the layer above
reads the memory of the first one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..envs.core.kernel import UNCOUNTED, njit, njit_borrowed
from .expert_caching_features import (
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


class Weights(NamedTuple):
    """Weights of M `EvictionNetwork`s and a `NextLayerHead`, matrices as (inputs, outputs), float32, C-contiguous.

    L layers, E experts, D width, I recurrences, K channels, H and G hidden, F features, O outputs.

    The tables, those with a `_scale`, are int8 as in a checkpoint, or float32 as they were trained: a row's values
    times its scale are the weights. Beside a model that leaves nothing in the processor's caches, a decision waits for
    its weights; these are most of them.
    """

    embedding: np.ndarray  # (M, L, E, D)
    embedding_scale: np.ndarray  # (M, L, E)
    own: np.ndarray  # (M, L, E, D)
    own_scale: np.ndarray  # (M, L, E)
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
    channels_scale: np.ndarray  # (M, L, E, K)
    channel_bias: np.ndarray  # (M, L, E, K)
    hidden_w: np.ndarray  # (M, F + K, H)
    hidden_b: np.ndarray  # (M, L, H)
    out_w: np.ndarray  # (M, F + K + H, O): over M, so that the sum is the mean
    out_b: np.ndarray  # (M, L, O): the same
    shares: np.ndarray  # (O,): cache sizes that the outputs are for, increasing
    above_own: np.ndarray  # (L, E, D)
    above_own_scale: np.ndarray  # (L, E)
    above_prefix_w: np.ndarray  # (D, D)
    above_context_w: np.ndarray  # (D, D)
    above_bias: np.ndarray  # (L, D)
    above_middle_w: np.ndarray  # (D, D)
    above_middle_b: np.ndarray  # (D,)
    above_channels: np.ndarray  # (L, E, D)
    above_channels_scale: np.ndarray  # (L, E)
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
    table: np.ndarray  # (F + K + H, E) float32: features, channels, hidden units
    unit: np.ndarray  # (E,) float32: hidden unit of the head for the layer above
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
        np.zeros((weights.out_w.shape[1], num_experts), np.float32),
        np.zeros(num_experts, np.float32),
        np.zeros((weights.out_w.shape[2], num_experts), np.float32),
        np.zeros((num_layers, num_experts)),
        np.zeros(num_experts, np.float32),
        np.zeros(num_experts, np.float32),
        np.zeros(num_slots),
        np.array(knobs, np.float64),
    )


@njit_borrowed
def row_of(streams: Stream, b: int) -> Stream:
    """The Stream of one row, as views: for uncounted kernels only, as it is not counted what is returned."""
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


@njit_borrowed
def copy_to(out, values) -> None:
    """out = values, both (D,): numba's own assignment of slices counts references."""
    for i in range(len(out)):
        out[i] = values[i]


@njit_borrowed
def fill(out, value) -> None:
    """out = value, in all of it."""
    for i in range(len(out)):
        out[i] = value


@njit(cache=True, fastmath=True, **UNCOUNTED)
def add_product(x, matrix, out) -> None:
    """out += x @ matrix."""
    for i in range(len(x)):
        factor, row = x[i], matrix[i]
        for j in range(len(out)):
            out[j] += factor * row[j]


@njit(cache=True, fastmath=True, **UNCOUNTED)
def add_rows(table, scale, experts, out) -> None:
    """out (D,) += the rows of some experts, of table (E, D) with scale (E,); expert -1: none."""
    for e in experts:
        if e >= 0:
            row, factor = table[e], scale[e]
            for i in range(len(out)):
                out[i] += factor * np.float32(row[i])


@njit(cache=True, fastmath=True, **UNCOUNTED)
def dot(vector, row) -> np.float32:
    """The product of a float32 vector and a row of a table."""
    total = np.float32(0.0)
    for i in range(len(vector)):
        total += vector[i] * np.float32(row[i])
    return total


@njit(cache=True, fastmath=True, **UNCOUNTED)
def silu(x) -> None:
    """x = x * sigmoid(x), in place."""
    for i in range(len(x)):
        x[i] = x[i] / (np.float32(1.0) + np.exp(-x[i]))


@njit(cache=True, fastmath=True, **UNCOUNTED)
def deepen(vector, w, b, scratch) -> None:
    """vector = f(vector), in place: silu, then silu(w @ that + b) on top. scratch (D,)."""
    silu(vector)
    copy_to(scratch, b)
    add_product(vector, w, scratch)
    silu(scratch)
    for i in range(len(vector)):
        vector[i] += scratch[i]


@njit(cache=True, fastmath=True, **UNCOUNTED)
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
    copy_to(x, weights.token_b[m])
    add_product(normed, weights.token_w[m], x)
    silu(x)
    copy_to(context, weights.history_b[m])
    add_product(x, weights.history_w[m, :width], context)
    copy_to(below, x)
    for r in range(num_recurrences):
        copy_to(gates, weights.gates_b[m, r])
        add_product(below, weights.gates_w[m, r], gates)
        h = hidden[r]
        for i in range(width):
            keep = np.float32(1.0) / (np.float32(1.0) + np.exp(-gates[i]))
            h[i] = keep * h[i] + (np.float32(1.0) - keep) * gates[width + i]
        add_product(h, weights.history_w[m, (r + 1) * width : (r + 2) * width], context)
        copy_to(below, weights.mixer_b[m, r])
        add_product(h, weights.mixer_w[m, r], below)
        silu(below)
        for i in range(width):
            below[i] += x[i]


@njit_borrowed
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
        add_rows(weights.embedding[m, layer], weights.embedding_scale[m, layer], used, prefix[m])


@njit_borrowed
def weigh_row(memory: Memory, b: int, layer: int):
    """`weigh_past` of row b. Returns (tokens, best match)."""
    return weigh_past(row_of(memory.streams, b), layer)


@njit_borrowed
def write_table(stream: Stream, memory: Memory, layer: int, match) -> None:
    """Write the features of a layer's experts, given `memory.copied`, and the best match that `weigh_past` returned."""
    write_features(
        stream.frequency[layer],
        stream.in_sequence[layer],
        stream.age[layer],
        stream.place[2],
        memory.copied,
        match,
        memory.table,
    )


@njit(cache=True, fastmath=True, **UNCOUNTED)
def score_layer(weights: Weights, memory: Memory, b: int, layer: int, used, num_past: int, match, share) -> None:
    """Write the outputs for the experts of `layer` into `memory.logits` (O, E), as row b's token sees them.

    `num_past` and `match` are what `weigh_row` returned for this row and layer. Written are the outputs that
    `for_share` reads for a cache of this share of the experts.
    """
    first, end = outputs_for(weights.shares, share)
    stream = row_of(memory.streams, b)
    read_future(stream, layer, num_past, memory.copied)
    write_table(stream, memory, layer, match)
    memory.logits[:] = np.float32(0.0)
    for m in range(len(weights.embedding)):
        write_vector(weights, m, memory, b, layer, used)
        add_logits(weights, m, memory, layer, first, end)


@njit(cache=True, fastmath=True, **UNCOUNTED)
def write_vector(weights: Weights, m: int, memory: Memory, b: int, layer: int, used) -> None:
    """What network m makes of the token of row b, into `memory.vector` (D,)."""
    prefix, context, vector = memory.prefix[b, m], memory.context[b, m], memory.vector
    scale, bias = weights.prefix_scale[m, layer], weights.layer_bias[m, layer]
    for i in range(len(vector)):
        vector[i] = prefix[i] * scale + bias[i] + context[i]
    add_rows(weights.own[m, layer], weights.own_scale[m, layer], used, vector)
    deepen(vector, weights.middle_w[m], weights.middle_b[m], memory.scratch[0, : len(vector)])


@njit(cache=True, fastmath=True, **UNCOUNTED)
def add_logits(weights: Weights, m: int, memory: Memory, layer: int, first: int, end: int) -> None:
    """Add what network m says of the experts, from the token's vector and the table of features, to some outputs."""
    table, vector, logits = memory.table, memory.vector, memory.logits
    channels, scale, bias = weights.channels[m, layer], weights.channels_scale[m, layer], weights.channel_bias[m, layer]
    hidden_w, out_w = weights.hidden_w[m], weights.out_w[m]
    num_inputs, num_hidden = hidden_w.shape
    for e in range(table.shape[1]):
        for k in range(channels.shape[1]):
            table[NUM_FEATURES + k, e] = bias[e, k] + scale[e, k] * dot(vector, channels[e, k])
    for h in range(num_hidden):
        unit = table[num_inputs + h]
        fill(unit, weights.hidden_b[m, layer, h])
        add_mix(table, hidden_w[:, h], unit)
        for e in range(len(unit)):
            unit[e] = max(unit[e], np.float32(0.0))
    for o in range(first, end):
        out, shift = logits[o], weights.out_b[m, layer, o]
        for e in range(len(out)):
            out[e] += shift
        add_mix(table, out_w[:, o], out)


@njit(cache=True, fastmath=True, **UNCOUNTED)
def add_mix(rows, factors, out) -> None:
    """out (E,) += factors (n,) @ the first n of rows, four at a time: so `out` is read and written less often."""
    r = 0
    while r + 4 <= len(factors):
        a, b, c, d = factors[r], factors[r + 1], factors[r + 2], factors[r + 3]
        w, x, y, z = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
        for e in range(len(out)):
            out[e] += a * w[e] + b * x[e] + c * y[e] + d * z[e]
        r += 4
    while r < len(factors):
        factor, row = factors[r], rows[r]
        for e in range(len(out)):
            out[e] += factor * row[e]
        r += 1


@njit(cache=True, fastmath=True, **UNCOUNTED)
def score_layer_above(weights: Weights, memory: Memory, b: int, layer: int, used, num_past: int, match) -> None:
    """Write the log-odds that row b's token uses each expert of the layer above into `memory.above` (E,).

    `num_past` and `match` are what `weigh_row` returned for this row and layer.
    """
    stream, vector, width = row_of(memory.streams, b), memory.vector, len(memory.vector)
    above, table, num_experts = (layer + 1) % len(weights.above_bias), memory.table, memory.table.shape[1]
    logits, unit = memory.above, memory.unit
    copy_to(vector, weights.above_bias[layer])
    for i in range(width):
        vector[i] += memory.above_context[b, i]
    add_product(memory.prefix[b, 0], weights.above_prefix_w, vector)
    add_rows(weights.above_own[layer], weights.above_own_scale[layer], used, vector)
    deepen(vector, weights.above_middle_w, weights.above_middle_b, memory.scratch[0, :width])
    channels, scale, bias = (
        weights.above_channels[layer],
        weights.above_channels_scale[layer],
        weights.above_channel_bias[layer],
    )
    for e in range(num_experts):
        logits[e] = bias[e] + scale[e] * dot(vector, channels[e])
    read_layer_above(stream, layer, num_past, memory.copied)
    write_table(stream, memory, above, match)
    channel = memory.scratch[1, :num_experts]
    copy_to(channel, logits)
    for h in range(len(weights.above_out_w)):
        fill(unit, weights.above_hidden_b[layer, h])
        add_mix(table, weights.above_hidden_w[h, :NUM_FEATURES], unit)
        factor, out = weights.above_hidden_w[h, NUM_FEATURES], weights.above_out_w[h]
        for e in range(num_experts):
            logits[e] += out * max(unit[e] + factor * channel[e], np.float32(0.0))
    add_mix(table, weights.above_feature_w, logits)


@njit_borrowed
def outputs_for(shares, share: float):
    """First and end of the outputs for a cache of this share of the experts: one, or two to interpolate between."""
    last = len(shares) - 1
    for i in range(last):
        if share <= shares[i]:
            return i, i + 1
        if share < shares[i + 1]:
            return i, i + 2
    return last, last + 1


@njit_borrowed
def for_share(logits, expert: int, shares, share: float) -> float:
    """The output for a cache of this share of the experts, interpolated between the sizes that outputs are for."""
    first, end = outputs_for(shares, share)
    if end == first + 1:
        return logits[first, expert]
    part = (share - shares[first]) / (shares[first + 1] - shares[first])
    return (1 - part) * logits[first, expert] + part * logits[first + 1, expert]
