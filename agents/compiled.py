"""The DeepSets policy as a compiled float32 kernel: microseconds a decision, no allocation, no Python.

`pack_weights` turns a trained `PointerNetwork` into a flat `DeepSetsWeights`, a NamedTuple of arrays that numba takes
as an argument; `deepsets_logits` and `deepsets_choose` run it, from Python or inside other compiled code such as a
simulator's rollout loop. The formulae are those of `networks.DeepSetsEncoder` and `networks.PointerHead`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..envs.core.blocks import copies_in_one
from ..envs.core.kernel import UNCOUNTED, njit, njit_borrowed
from .networks import MASKED_LOGIT, PointerNetwork

_MASKED = np.float32(MASKED_LOGIT)
_LEAST = np.finfo(np.float32).min


class DeepSetsWeights(NamedTuple):
    """Weights of a DeepSets pointer network, matrices as (inputs, outputs), the input scaling folded in.

    H hidden, C context, F candidate numbers, K most candidates; all float32 and C-contiguous unless said otherwise.
    From `seen` on they are working memory: threads that run at the same time need one struct each
    (`with_own_scratch`). A row whose numbers are those of the latest pass is not computed again (`_stale_rows`).
    """

    candidate_w: np.ndarray  # (F, H)
    context_w: np.ndarray  # (C, H)
    context_b: np.ndarray  # (H,)
    row_w: np.ndarray  # (H, H)
    row_b: np.ndarray  # (H,)
    summary_in_w: np.ndarray  # (C + 2H, H) — rows: context, mean, max
    summary_in_b: np.ndarray  # (H,)
    summary_out_w: np.ndarray  # (H, H)
    summary_out_b: np.ndarray  # (H,)
    key_row_w: np.ndarray  # (H, H)
    key_set_w: np.ndarray  # (H, H)
    key_set_b: np.ndarray  # (H,)
    query_w: np.ndarray  # (H, H) — times 1 / sqrt(H)
    query_b: np.ndarray  # (H,) — times 1 / sqrt(H)
    value_hidden_w: np.ndarray  # (H, H)
    value_hidden_b: np.ndarray  # (H,)
    value_w: np.ndarray  # (H,)
    value_b: np.ndarray  # (1,)
    clip: np.ndarray  # (1,)
    zero: np.ndarray  # (H,) zeros
    early: np.ndarray  # (C,) int8: 1 where rows see the context's number
    seen: np.ndarray  # (K + 3, F) candidates when they were last computed; three rows more fill blocks of four up
    seen_context: np.ndarray  # (C,) the context then
    known: np.ndarray  # (K,) int8: 1 where `rows` and `keys` hold what belongs to `seen`
    rows: np.ndarray  # (K + 3, H) embeddings
    keys: np.ndarray  # (K + 3, H) their part of the keys
    inner: np.ndarray  # (K + 3, H)
    which: np.ndarray  # (K + 3,) int64: rows to be computed
    pooled: np.ndarray  # (C + 2H,) context, mean, max
    vectors: np.ndarray  # (5, H)


SCRATCH = ("seen", "seen_context", "known", "rows", "keys", "inner", "which", "pooled", "vectors")


def pack_weights(network: PointerNetwork, max_candidates: int = 256) -> DeepSetsWeights:
    """Flatten a DeepSets `PointerNetwork` for the kernels, for tables of up to `max_candidates` rows.

    Raises ValueError for another encoder: only DeepSets has a compiled twin.
    """
    if network.config["encoder"] != "deepsets":
        raise ValueError(
            f"encoder {network.config['encoder']!r} has no compiled kernel. "
            "Train with encoder='deepsets', or run the ONNX file"
        )
    state = {name: tensor.detach().cpu().numpy().astype(np.float64) for name, tensor in network.state_dict().items()}
    hidden, context_size = network.config["hidden"], network.config["context_size"]

    def matrix(name: str) -> np.ndarray:
        return state[f"{name}.weight"].T.copy()

    def bias(name: str) -> np.ndarray:
        return state[f"{name}.bias"].copy()

    candidate_size, rows = network.config["candidate_size"], max_candidates + 3

    # (x - mean) * s @ W + b  =  x @ (s W) + (b - (mean s) @ W)
    context_scale, candidate_scale = (state[f"normalizer.{n}_inverse_std"] for n in ("context", "candidate"))
    context_shift = state["normalizer.context_mean"] * context_scale
    candidate_shift = state["normalizer.candidate_mean"] * candidate_scale
    candidate_w, context_w = matrix("encoder.from_candidate"), matrix("encoder.from_context")
    early = network.encoder.early.cpu().numpy().astype(np.int8)
    context_w *= early[:, None]
    context_b = bias("encoder.from_context") - context_shift @ context_w - candidate_shift @ candidate_w
    summary_in_w, summary_in_b = matrix("encoder.summary_in"), bias("encoder.summary_in")
    summary_in_b -= context_shift @ summary_in_w[:context_size]
    summary_in_w[:context_size] *= context_scale[:, None]
    packed = {
        "candidate_w": candidate_w * candidate_scale[:, None],
        "context_w": context_w * context_scale[:, None],
        "context_b": context_b,
        "row_w": matrix("encoder.row"),
        "row_b": bias("encoder.row"),
        "summary_in_w": summary_in_w,
        "summary_in_b": summary_in_b,
        "summary_out_w": matrix("encoder.summary_out"),
        "summary_out_b": bias("encoder.summary_out"),
        "key_row_w": matrix("head.key_from_row"),
        "key_set_w": matrix("head.key_from_set"),
        "key_set_b": bias("head.key_from_set"),
        "query_w": matrix("head.query") / math.sqrt(hidden),
        "query_b": bias("head.query") / math.sqrt(hidden),
        "value_hidden_w": matrix("value_hidden"),
        "value_hidden_b": bias("value_hidden"),
        "value_w": state["value.weight"][0],
        "value_b": bias("value"),
        "clip": np.array([network.config["clip"]]),
        "zero": np.zeros(hidden),
        "seen": np.zeros((rows, candidate_size)),
        "seen_context": np.full(context_size, np.nan),
        "rows": np.zeros((rows, hidden)),
        "keys": np.zeros((rows, hidden)),
        "inner": np.zeros((rows, hidden)),
        "pooled": np.zeros(context_size + 2 * hidden),
        "vectors": np.zeros((5, hidden)),
    }
    packed = {name: np.asarray(array, np.float32) for name, array in packed.items()}
    packed |= {"early": early, "known": np.zeros(max_candidates, np.int8), "which": np.zeros(rows, np.int64)}
    return DeepSetsWeights(**copies_in_one(packed))


def with_own_scratch(weights: DeepSetsWeights) -> DeepSetsWeights:
    """The same weights with working memory of their own, for another thread."""
    return weights._replace(**copies_in_one({name: getattr(weights, name) for name in SCRATCH}))


@njit(**UNCOUNTED, cache=True, fastmath=True)
def _affine(x, w, b, out):  # pragma: no cover - compiled
    """out (H,) = x (I,) @ w (I, H) + b (H,)."""
    hidden = w.shape[1]
    for j in range(hidden):
        out[j] = b[j]
    i, whole = 0, x.shape[0] // 4 * 4
    while i < whole:
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(hidden):
            out[j] += x0 * w[i, j] + x1 * w[i + 1, j] + x2 * w[i + 2, j] + x3 * w[i + 3, j]
        i += 4
    for i in range(whole, x.shape[0]):
        x0 = x[i]
        for j in range(hidden):
            out[j] += x0 * w[i, j]


@njit(**UNCOUNTED, cache=True, fastmath=True)
def _relu(x):  # pragma: no cover - compiled
    for j in range(x.shape[0]):
        x[j] = max(x[j], np.float32(0.0))


@njit(**UNCOUNTED, cache=True, fastmath=True)
def _product(rows, which, count, w, vector, least, out):  # pragma: no cover - compiled
    """out_k (H,) = max(rows_k (I,) @ w (I, H) + vector (H,), least) for the first `count` k of `which`.

    Four rows at a time share what is loaded of `w`; `which` is filled up to a multiple of four. No call of BLAS: after
    a forward pass its code and buffers are out of the processor's caches.
    """
    num_in, hidden = w.shape
    even = num_in // 2 * 2
    for first in range(0, count, 4):
        k0, k1, k2, k3 = which[first], which[first + 1], which[first + 2], which[first + 3]
        x0, x1, x2, x3 = rows[k0], rows[k1], rows[k2], rows[k3]
        out0, out1, out2, out3 = out[k0], out[k1], out[k2], out[k3]
        for j in range(hidden):
            start = vector[j]
            if even < num_in:
                last = w[even, j]
                out0[j], out1[j] = start + x0[even] * last, start + x1[even] * last
                out2[j], out3[j] = start + x2[even] * last, start + x3[even] * last
            else:
                out0[j], out1[j], out2[j], out3[j] = start, start, start, start
        for i in range(0, even, 2):
            a0, a1, a2, a3 = x0[i], x1[i], x2[i], x3[i]
            b0, b1, b2, b3 = x0[i + 1], x1[i + 1], x2[i + 1], x3[i + 1]
            w0, w1 = w[i], w[i + 1]
            for j in range(hidden):
                wa, wb = w0[j], w1[j]
                out0[j] += a0 * wa + b0 * wb
                out1[j] += a1 * wa + b1 * wb
                out2[j] += a2 * wa + b2 * wb
                out3[j] += a3 * wa + b3 * wb
        for j in range(hidden):
            out0[j], out1[j] = max(out0[j], least), max(out1[j], least)
            out2[j], out3[j] = max(out2[j], least), max(out3[j], least)


@njit(**UNCOUNTED, cache=True, fastmath=True)
def _pool(rows, mask, mean, highest):  # pragma: no cover - compiled
    """Mean and maximum (H,) over the rows (K, H) in the mask (K,); they are not negative."""
    for j in range(rows.shape[1]):
        mean[j] = 0.0
        highest[j] = 0.0
    num_live = 0
    for k in range(mask.shape[0]):
        if mask[k]:
            num_live += 1
            for j in range(rows.shape[1]):
                mean[j] += rows[k, j]
                highest[j] = max(highest[j], rows[k, j])
    scale = np.float32(1.0) / np.float32(max(num_live, 1))
    for j in range(rows.shape[1]):
        mean[j] *= scale


@njit(**UNCOUNTED, cache=True, fastmath=True)
def _score(query, keys, shift):  # pragma: no cover - compiled
    """query (H,) @ relu(keys (H,) + shift (H,))"""
    score = np.float32(0.0)
    for j in range(query.shape[0]):
        score += query[j] * max(keys[j] + shift[j], np.float32(0.0))
    return score


@njit(**UNCOUNTED, cache=True, fastmath=False)
def _has_changed(weights, context):  # pragma: no cover - compiled
    """Whether the context has another number that rows see than in the latest pass; it is noted.

    fastmath is refused here and in `_stale_rows` (numba hands the caller's down to whoever does not): with it a NaN
    might be what it was.
    """
    has_changed = False
    for j in range(context.shape[0]):
        if weights.early[j] and context[j] != weights.seen_context[j]:
            weights.seen_context[j] = context[j]
            has_changed = True
    return has_changed


@njit(**UNCOUNTED, cache=True, fastmath=False)
def _stale_rows(weights, candidates, mask):  # pragma: no cover - compiled
    """Write the live rows that must be computed to `weights.which`, and their numbers to `seen`. Returns how many."""
    seen, known, which = weights.seen, weights.known, weights.which
    num_columns, count = candidates.shape[1], 0
    for k in range(mask.shape[0]):
        if not mask[k]:
            continue
        j = 0
        if known[k]:
            while j < num_columns and candidates[k, j] == seen[k, j]:
                j += 1
        if j < num_columns:
            for i in range(j, num_columns):
                seen[k, i] = candidates[k, i]
            known[k] = 1
            which[count] = k
            count += 1
    return count


@njit(**UNCOUNTED, cache=True, fastmath=True)
def _embed(weights, context, candidates, mask):  # pragma: no cover - compiled
    """Bring `weights.rows` and `weights.keys` of the live rows up to date."""
    shift, known = weights.vectors[4], weights.known
    if _has_changed(weights, context):
        known[:] = 0
        _affine(context, weights.context_w, weights.context_b, shift)
    count = _stale_rows(weights, candidates, mask)
    for i in range(count, -(-count // 4) * 4):
        weights.which[i] = known.shape[0] + i % 4 - 1
    which, zero = weights.which, np.float32(0.0)
    _product(weights.seen, which, count, weights.candidate_w, shift, zero, weights.inner)
    _product(weights.inner, which, count, weights.row_w, weights.row_b, zero, weights.rows)
    _product(weights.rows, which, count, weights.key_row_w, weights.zero, _LEAST, weights.keys)


@njit(**UNCOUNTED, cache=True, fastmath=True)
def _logits(weights, context, candidates, mask, logits_out):  # pragma: no cover - compiled
    """`deepsets_logits` without the value; leaves the summary of the set in `weights.vectors[2]`."""
    num_candidates, hidden, context_size = candidates.shape[0], weights.row_w.shape[0], context.shape[0]
    if num_candidates > weights.known.shape[0]:
        raise ValueError("more candidates than pack_weights(max_candidates=...) allowed for")
    _embed(weights, context, candidates, mask)
    vectors, pooled = weights.vectors, weights.pooled
    shift, hidden_vector, summary, query = vectors[0], vectors[1], vectors[2], vectors[3]
    for i in range(context_size):
        pooled[i] = context[i]
    _pool(weights.rows, mask, pooled[context_size : context_size + hidden], pooled[context_size + hidden :])
    _affine(pooled, weights.summary_in_w, weights.summary_in_b, hidden_vector)
    _relu(hidden_vector)
    _affine(hidden_vector, weights.summary_out_w, weights.summary_out_b, summary)
    _relu(summary)
    _affine(summary, weights.key_set_w, weights.key_set_b, shift)
    _affine(summary, weights.query_w, weights.query_b, query)
    clip = weights.clip[0]
    for k in range(num_candidates):
        if mask[k]:
            logits_out[k] = clip * np.float32(math.tanh(_score(query, weights.keys[k], shift)))
        else:
            logits_out[k] = _MASKED


@njit(**UNCOUNTED, cache=True, fastmath=True)
def deepsets_logits(weights, context, candidates, mask, logits_out):  # pragma: no cover - compiled
    """Write the logits of one table and return the value of its state.

    context float32 (C,), candidates float32 (K, F), mask bool (K,), logits_out float32 (K,); masked rows get
    `MASKED_LOGIT`. Only live rows are computed, and of these the ones that are not what they were in the latest pass:
    three products of matrices do most of the work. Raises ValueError if the scratch memory has too few rows.
    """
    _logits(weights, context, candidates, mask, logits_out)
    hidden_vector, summary = weights.vectors[1], weights.vectors[2]
    _affine(summary, weights.value_hidden_w, weights.value_hidden_b, hidden_vector)
    return weights.value_b[0] + _score(weights.value_w, hidden_vector, weights.zero)


@njit_borrowed
def deepsets_batch(weights, context, candidates, mask, logits_out, values_out):  # pragma: no cover - compiled
    """`deepsets_logits` of B tables: arguments with a leading axis B, and values_out float32 (B,)."""
    for b in range(context.shape[0]):
        values_out[b] = deepsets_logits(weights, context[b], candidates[b], mask[b], logits_out[b])


@njit_borrowed
def deepsets_choose(weights, context, candidates, mask, logits_out):  # pragma: no cover - compiled
    """Index of the best live row, the first of equals; -1 if every row is masked. Arguments as `deepsets_logits`."""
    _logits(weights, context, candidates, mask, logits_out)
    best = -1
    for k in range(mask.shape[0]):
        if mask[k] and (best < 0 or logits_out[k] > logits_out[best]):
            best = k
    return best
