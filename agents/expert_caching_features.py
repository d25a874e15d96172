"""What a learned cache policy reads from the routing so far: compiled, streaming, the same in training and deployment.

A `Stream` remembers one row of the batch. Every feature is a function of past tokens (all their layers) and of the
present token's layers up to the present one: nothing else is ever written into it. None of them names a layer or an
expert, so they mean the same in every model.

The copy features are a kernel regression over the last `WINDOW` tokens: tokens whose routing (and that of the tokens
before them) overlaps the present one's are weighted up, and what followed them is read off: the later tokens' use of
the same layer, discounted (`read_future`), or their own use of the layer above (`read_layer_above`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..envs.core.kernel import UNCOUNTED, njit, njit_borrowed

WINDOW = 1024
"""Tokens that the copy features look back on, the present one included."""

DECAYS = np.array([0.5, 0.75, 0.875, 0.94, 0.97, 0.985, 0.995, 0.999], np.float32)
"""Decays a token of the frequencies of use."""

COPY_DISCOUNTS = np.array([0.0, 0.75, 0.95], np.float32)
"""Discounts a token of what followed a similar token: the next token alone, the next few, the next twenty."""

NUM_DECAYS, NUM_COPIES = len(DECAYS), len(COPY_DISCOUNTS)
assert NUM_COPIES == 3  # also: the weights of `read_layer_above`, as they are, squared, and their square roots
IN_SEQUENCE, AGE, COPIES = NUM_DECAYS, NUM_DECAYS + 1, NUM_DECAYS + 2
MATCH = COPIES + NUM_COPIES
NUM_FEATURES = MATCH + 1
"""Rows of a feature table: frequencies (one a decay), share of this sequence, recency, copies, best match."""

FEATURE_VERSION = 1
"""Changes with the meaning of the features; a checkpoint of another version is refused."""

SHARPNESS = np.float32(25.0)  # weight of a token = exp(SHARPNESS * similarity), similarity in [0, 1]
CONTEXT_WEIGHT = np.float32(0.1)  # of an expert shared by the tokens before, against one of the present token
CONTEXT_DECAY = np.float32(0.5)  # of that weight, a token further back
NEGLIGIBLE = np.float32(1e-3)  # share of the weight below which nothing is read any more
LEAST_COPIED = np.float32(1e-4)  # weight of a token under which its next layer is not read
LEAST = np.float32(10.0)  # a token of weight under exp(-LEAST) times the largest has none
FORGOTTEN = np.float32(-1e6)  # similarity of what is not remembered
FLOOR = np.float32(2.0**-10)  # added before a logarithm
NEVER = np.float32(1000.0)  # age of what was not used yet


class Stream(NamedTuple):
    """Memory of one sequence after another. L layers, E experts, k a token, W tokens, M = ceil(E / 64) words."""

    frequency: np.ndarray  # (L, NUM_DECAYS, E) float32: sums of decay ** tokens since each use
    in_sequence: np.ndarray  # (L, E) float32: uses in this sequence
    age: np.ndarray  # (L, E) float32: tokens since the last use
    masks: np.ndarray  # (L, M, W) uint64: experts of the last W tokens as bits, a ring
    used: np.ndarray  # (L, W, k) int16: the same as ids, -1: none
    overlap: np.ndarray  # (W,) int32: experts that each remembered token shares with the present one so far
    context: np.ndarray  # (W,) float32: the same of the tokens before both, decayed
    weight: np.ndarray  # (W,) float32: scratch of the copy kernel
    powers: np.ndarray  # (W,) int32: the same
    place: np.ndarray  # (3,) int64: tokens served, place of the present one in the ring, position in its sequence


@njit(cache=True)
def empty_stream(num_layers: int, num_experts: int, top_k: int) -> Stream:
    """A Stream that has seen nothing."""
    return Stream(
        np.zeros((num_layers, NUM_DECAYS, num_experts), np.float32),
        np.zeros((num_layers, num_experts), np.float32),
        np.full((num_layers, num_experts), NEVER, np.float32),
        np.zeros((num_layers, (num_experts + 63) // 64, WINDOW), np.uint64),
        np.full((num_layers, WINDOW, top_k), np.int16(-1), np.int16),
        np.zeros(WINDOW, np.int32),
        np.zeros(WINDOW, np.float32),
        np.zeros(WINDOW, np.float32),
        np.zeros(WINDOW, np.int32),
        np.array([0, WINDOW - 1, 0]),
    )


@njit(cache=True, inline="always")
def popcount(word):
    """Bits set in a uint64 (Hacker's Delight): no multiplication, so that compilers vectorise it."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    word = word + (word >> np.uint64(8))
    word = word + (word >> np.uint64(16))
    return np.int32((word + (word >> np.uint64(32))) & np.uint64(0x7F))


@njit_borrowed
def count_use(frequency, in_sequence, age, used):
    """Book one token's use of one layer. frequency (G, E), in_sequence and age (E,), used (k,) ids, -1: none."""
    num_experts = len(age)
    for g in range(NUM_DECAYS):
        decay, row = DECAYS[g], frequency[g]
        for e in range(num_experts):
            row[e] *= decay
    for e in range(num_experts):
        age[e] += np.float32(1.0)
    for e in used:
        if e >= 0:
            for g in range(NUM_DECAYS):
                frequency[g, e] += np.float32(1.0)
            in_sequence[e] += np.float32(1.0)
            age[e] = 0


@njit_borrowed
def begin_token(stream: Stream, position: int) -> None:
    """The next token of the row: what was the present token becomes the context of its own copies."""
    overlap, context, place = stream.overlap, stream.context, stream.place
    last = np.float32(overlap[WINDOW - 1]) + CONTEXT_DECAY * context[WINDOW - 1]
    for r in range(WINDOW - 1, 0, -1):
        context[r] = np.float32(overlap[r - 1]) + CONTEXT_DECAY * context[r - 1]
    context[0] = last
    overlap[:] = 0
    if position == 0:
        stream.in_sequence[:] = 0
    place[0] += 1
    place[1] = (place[1] + 1) % WINDOW
    place[2] = position
    stream.used[:, place[1]] = -1


@njit_borrowed
def observe_layer(stream: Stream, layer: int, used) -> None:
    """The gate of one layer has spoken: `used` (k,) expert ids of the present token."""
    place, masks, overlap = stream.place[1], stream.masks[layer], stream.overlap
    for word in range(masks.shape[0]):
        mask = np.uint64(0)
        for e in used:
            if e >= 0 and e // 64 == word:
                mask |= np.uint64(1) << np.uint64(e % 64)
        row = masks[word]
        for r in range(WINDOW):
            overlap[r] += popcount(mask & row[r])
        row[place] = mask
    for i in range(len(used)):
        stream.used[layer, place, i] = used[i]
    count_use(stream.frequency[layer], stream.in_sequence[layer], stream.age[layer], used)


@njit(cache=True, fastmath=True, **UNCOUNTED)
def weigh_past(stream: Stream, layer: int):
    """Weights of the past tokens by similarity, summing to 1, into `stream.weight`. Returns (tokens, best match).

    similarity = (overlap + c * context) / its largest value; weight = exp(SHARPNESS * (similarity - best)) / sum.
    """
    num_layers, _, top_k = stream.used.shape
    overlap, context, weight = stream.overlap, stream.context, stream.weight
    here = stream.place[1]
    num_past = min(stream.place[0] - 1, WINDOW - 1)
    if num_past <= 0:
        return 0, np.float32(0.0)
    most = top_k * (layer + 1 + CONTEXT_WEIGHT * num_layers / (1 - CONTEXT_DECAY))
    scale, best = np.float32(1.0 / most), np.float32(0.0)
    for r in range(WINDOW):
        weight[r] = (np.float32(overlap[r]) + CONTEXT_WEIGHT * context[r]) * scale
    weight[here] = FORGOTTEN
    weight[min(stream.place[0], WINDOW) :] = FORGOTTEN  # the ring is not full yet
    for r in range(WINDOW):
        best = max(best, weight[r])
    for r in range(WINDOW):
        weight[r] = SHARPNESS * (weight[r] - best)
    total = exponentials(weight, stream.powers)
    for r in range(WINDOW):
        weight[r] /= total
    return num_past, best


@njit(cache=True, fastmath=True, **UNCOUNTED)
def exponentials(row, powers) -> np.float32:
    """row = exp(row) where row > -LEAST, else 0, in place, within 2e-4; returns the sum. powers: int32 scratch.

    exp(x) = 2 ** n * 2 ** f with n an integer and f in [0, 1), by exponent bits and a polynomial: unlike np.exp, this
    is vectorised, and the copy kernel needs a thousand of them.
    """
    total = np.float32(0.0)
    for r in range(len(row)):
        y = max(row[r], -LEAST) * np.float32(1.4426950409)
        n = np.int32(y + np.float32(64.0)) - np.int32(64)  # floor, as y > -64
        f = y - np.float32(n)
        powers[r] = (n + np.int32(127)) << np.int32(23)
        tail = np.float32(0.2265) + np.float32(0.0776) * f
        value = np.float32(1.0) + f * (np.float32(0.6959) + f * tail)
        row[r] = value if row[r] > -LEAST else np.float32(0.0)
    twos = powers.view(np.float32)
    for r in range(len(row)):
        row[r] *= twos[r]
        total += row[r]
    return total


@njit_borrowed
def copy_future(stream: Stream, layer: int, copied) -> np.float32:
    """`weigh_past`, then `read_future`. Returns the best match."""
    num_past, best = weigh_past(stream, layer)
    read_future(stream, layer, num_past, copied)
    return best


@njit(cache=True, fastmath=True, **UNCOUNTED)
def read_future(stream: Stream, layer: int, num_past: int, copied) -> None:
    """What followed similar tokens, weighed before: writes `copied` float32 (NUM_COPIES, E), log scale.

    copied[g, e] = log of (1 - d) * sum over past tokens s of weight[s] * sum_j d ** (j - 1) * [s + j used e], d the
    g-th discount; the inner sums run forward in time, so that one pass over the ring does.
    """
    copied[:] = 0
    weight, used, here = stream.weight, stream.used[layer], stream.place[1]
    top_k = used.shape[1]
    d0, d1, d2 = COPY_DISCOUNTS[0], COPY_DISCOUNTS[1], COPY_DISCOUNTS[2]
    a0, a1, a2 = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for back in range(num_past, 1, -1):  # token s = present - back; what follows it is s + 1
        r = here - back
        w = weight[r if r >= 0 else r + WINDOW]
        a0, a1, a2 = a0 * d0 + w, a1 * d1 + w, a2 * d2 + w
        if a2 > NEGLIGIBLE:
            r += 1
            row = used[r if r >= 0 else r + WINDOW]
            for i in range(top_k):
                e = row[i]
                if e >= 0:
                    copied[0, e] += a0
                    copied[1, e] += a1
                    copied[2, e] += a2
    for g in range(NUM_COPIES):
        row, rest = copied[g], np.float32(1.0) - COPY_DISCOUNTS[g]
        for e in range(copied.shape[1]):
            row[e] = row[e] * rest + FLOOR
        log_scale(row)


@njit(cache=True, fastmath=True, **UNCOUNTED)
def read_layer_above(stream: Stream, layer: int, num_past: int, copied) -> None:
    """What similar tokens, weighed before, used in the next layer: writes `copied` float32 (NUM_COPIES, E), log scale.

    copied[g, e] = log of sum over past tokens s of w[s] * [s used e], w = weight, weight ** 2 or sqrt(weight), made to
    sum to 1.
    Above the last layer comes the first one of the token after.
    """
    copied[:] = 0
    above = (layer + 1) % len(stream.used)
    weight, used, here = stream.weight, stream.used[above], stream.place[1]
    top_k = used.shape[1]
    later = 1 if above == 0 else 0
    t0, t1, t2 = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for back in range(1, num_past + 1):
        r = here - back
        r = r if r >= 0 else r + WINDOW
        w0 = weight[r]
        if w0 > LEAST_COPIED:
            w1, w2 = w0 * w0, np.sqrt(w0)
            t0, t1, t2 = t0 + w0, t1 + w1, t2 + w2
            row = used[r + later if r + later < WINDOW else 0]
            for i in range(top_k):
                e = row[i]
                if e >= 0:
                    copied[0, e] += w0
                    copied[1, e] += w1
                    copied[2, e] += w2
    for g in range(NUM_COPIES):
        total = t0 if g == 0 else (t1 if g == 1 else t2)
        row, scale = copied[g], np.float32(1.0) / max(total, np.float32(1e-9))
        for e in range(copied.shape[1]):
            row[e] = row[e] * scale + FLOOR
        log_scale(row)


@njit_borrowed
def log_scale(row) -> None:
    """In place: log2 in about [-1.3, 1.3], by exponent and mantissa of the float32 (piecewise linear in between)."""
    bits = row.view(np.int32)
    for e in range(len(row)):
        row[e] = (np.float32(bits[e]) * np.float32(2.0**-23) - np.float32(122.0)) * np.float32(0.25)


@njit_borrowed
def write_features(frequency, in_sequence, age, position, copied, match, table) -> None:
    """The feature table float32 (NUM_FEATURES, E) of one layer; `copied` as `copy_future` writes it."""
    num_experts = len(age)
    for g in range(NUM_DECAYS):
        rest, row, uses = np.float32(1.0) - DECAYS[g], table[g], frequency[g]
        for e in range(num_experts):
            row[e] = uses[e] * rest + FLOOR
        log_scale(row)
    row, share = table[IN_SEQUENCE], np.float32(1.0 / (position + 9.0))
    for e in range(num_experts):
        row[e] = in_sequence[e] * share + FLOOR
    log_scale(row)
    row = table[AGE]
    for e in range(num_experts):
        row[e] = np.float32(1.0) / (age[e] + np.float32(1.0)) + np.float32(2.0) * FLOOR
    log_scale(row)
    best = match * np.float32(2.0) - np.float32(1.0)
    for e in range(num_experts):
        for g in range(NUM_COPIES):
            table[COPIES + g, e] = copied[g, e]
        table[MATCH, e] = best


COPY_STEPS = np.float32(1.0 / 102.0)  # of the log scale between two stored values
COPY_LOWEST = np.float32(-1.25)


@njit(cache=True)
def copy_table(experts, positions, copies, above, matches) -> None:
    """The copy features of a whole trace, which cost most, once and for all.

    Args:
        experts: (T, L, k).
        positions: (T,) of each token in its sequence.
        copies: uint8 (T, L, NUM_COPIES, E), written: COPY_LOWEST + COPY_STEPS * value is the feature of `read_future`.
        above: the same of `read_layer_above`.
        matches: float32 (T, L), written.
    """
    num_tokens, num_layers, top_k = experts.shape
    num_experts = copies.shape[3]
    stream = empty_stream(num_layers, num_experts, top_k)
    copied = np.zeros((NUM_COPIES, num_experts), np.float32)
    for t in range(num_tokens):
        begin_token(stream, positions[t])
        for layer in range(num_layers):
            observe_layer(stream, layer, experts[t, layer])
            num_past, matches[t, layer] = weigh_past(stream, layer)
            read_future(stream, layer, num_past, copied)
            store_copies(copied, copies[t, layer])
            read_layer_above(stream, layer, num_past, copied)
            store_copies(copied, above[t, layer])


@njit(cache=True)
def store_copies(copied, out) -> None:
    """Round `copied` float32 (NUM_COPIES, E) to uint8."""
    for g in range(copied.shape[0]):
        for e in range(copied.shape[1]):
            value = (copied[g, e] - COPY_LOWEST) / COPY_STEPS + np.float32(0.5)
            out[g, e] = np.uint8(min(max(value, np.float32(0.0)), np.float32(255.0)))


@njit(cache=True)
def restore_copies(stored, copied) -> None:
    """What `store_copies` rounded."""
    for g in range(copied.shape[0]):
        for e in range(copied.shape[1]):
            copied[g, e] = COPY_LOWEST + COPY_STEPS * np.float32(stored[g, e])


@njit(cache=True)
def distances(experts, num_experts: int, most: int, out) -> None:
    """Tokens until the next use after the present token: out uint8 (T, L, E), at most `most`. The future: targets."""
    num_tokens, num_layers, top_k = experts.shape
    ahead = np.full((num_layers, num_experts), most, np.int64)
    for t in range(num_tokens - 1, -1, -1):
        for layer in range(num_layers):
            for e in range(num_experts):
                out[t, layer, e] = ahead[layer, e]
                ahead[layer, e] = min(ahead[layer, e] + 1, most)
            for i in range(top_k):
                ahead[layer, experts[t, layer, i]] = 1
