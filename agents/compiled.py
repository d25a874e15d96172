"""The DeepSets policy as a compiled float32 kernel: microseconds a decision, no allocation, no Python.

`pack_weights` turns a trained `PointerNetwork` into a flat `DeepSetsWeights`, a NamedTuple of arrays that numba takes
as an argument; `deepsets_logits` and `deepsets_choose` run it, from Python or inside other compiled code such as a
simulator's rollout loop. The formulae are those of `networks.DeepSetsEncoder` and `networks.PointerHead`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..envs.core.kernel import UNCOUNTED, njit, njit_borrowed
from .networks import MASKED_LOGIT, PointerNetwork

_MASKED = np.float32(MASKED_LOGIT)


class DeepSetsWeights(NamedTuple):
    """Weights of a DeepSets pointer network, matrices as (inputs, outputs), the input scaling folded in.

    H hidden, C context, F candidate numbers, K most candidates; all float32 and C-contiguous. The last five are
    working memory: threads that run at the same time need one struct each (`with_own_scratch`).
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
    live: np.ndarray  # (K', F) candidates that may be chosen; K' is K, rounded up to a multiple of four
    inner: np.ndarray  # (K', H)
    rows: np.ndarray  # (K', H) their embeddings
    pooled: np.ndarray  # (C + 2H,) context, mean, max
    vectors: np.ndarray  # (4, H)


def pack_weights(network: PointerNetwork, max_candidates: int = 256) -> DeepSetsWeights:
    """Flatten a DeepSets `PointerNetwork` for the kernels, for tables of up to `max_candidates` rows.

    Raises ValueError for another encoder: only DeepSets has a compiled twin.
    """
    if network.config["encoder"] != "deepsets":
        raise ValueError(
            f"encoder {network.config['encoder']!r} has no compiled kernel. "
            "Train with encoder='deepsets', or run the ONNX file"
        )
    scratch_rows = -(-max_candidates // 4) * 4  # `_product` computes four at a time
    state = {name: tensor.detach().cpu().numpy().astype(np.float64) for name, tensor in network.state_dict().items()}
    hidden, context_size = network.config["hidden"], network.config["context_size"]

    def matrix(name: str) -> np.ndarray:
        return state[f"{name}.weight"].T.copy()

    def bias(name: str) -> np.ndarray:
        return state[f"{name}.bias"].copy()

    # (x - mean) * s @ W + b  =  x @ (s W) + (b - (mean s) @ W)
    context_scale, candidate_scale = (state[f"normalizer.{n}_inverse_std"] for n in ("context", "candidate"))
    context_shift = state["normalizer.context_mean"] * context_scale
    candidate_shift = state["normalizer.candidate_mean"] * candidate_scale
    candidate_w, context_w = matrix("encoder.from_candidate"), matrix("encoder.from_context")
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
        "live": np.zeros((scratch_rows, network.config["candidate_size"])),
        "inner": np.zeros((scratch_rows, hidden)),
        "rows": np.zeros((scratch_rows, hidden)),
        "pooled": np.zeros(context_size + 2 * hidden),
        "vectors": np.zeros((4, hidden)),
    }
    return DeepSetsWeights(**{name: np.ascontiguousarray(array, np.float32) for name, array in packed.items()})


def with_own_scratch(weights: DeepSetsWeights) -> DeepSetsWeights:
    """The same weights with working memory of their own, for another thread."""
    scratch = ("live", "inner", "rows", "pooled", "vectors")
    return weights._replace(**{name: np.zeros_like(getattr(weights, name)) for name in scratch})


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
def _product(rows, num_rows, w, vector, out):  # pragma: no cover - compiled
    """out (N, H) = relu(rows (N, I) @ w (I, H) + vector (H,)), of the first `num_rows` rows; more of `out` may change.

    Four rows at a time share what is loaded of `w`; both matrices have a multiple of four rows. No call of BLAS: after
    a forward pass its code and buffers are out of the processor's caches.
    """
    num_in, hidden = w.shape
    even = num_in // 2 * 2
    for first in range(0, num_rows, 4):
        x0, x1, x2, x3 = rows[first], rows[first + 1], rows[first + 2], rows[first + 3]
        out0, out1, out2, out3 = out[first], out[first + 1], out[first + 2], out[first + 3]
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
            out0[j], out1[j] = max(out0[j], np.float32(0.0)), max(out1[j], np.float32(0.0))
            out2[j], out3[j] = max(out2[j], np.float32(0.0)), max(out3[j], np.float32(0.0))


@njit(**UNCOUNTED, cache=True, fastmath=True)
def _pool(rows, mean, highest):  # pragma: no cover - compiled
    """Mean and maximum (H,) over rows (N, H); the rows are not negative."""
    for j in range(rows.shape[1]):
        mean[j] = 0.0
        highest[j] = 0.0
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            mean[j] += rows[i, j]
            highest[j] = max(highest[j], rows[i, j])
    scale = np.float32(1.0) / np.float32(max(rows.shape[0], 1))
    for j in range(rows.shape[1]):
        mean[j] *= scale


@njit(**UNCOUNTED, cache=True, fastmath=True)
def _score(query, keys, i):  # pragma: no cover - compiled
    """query (H,) @ keys[i], keys (N, H)."""
    score = np.float32(0.0)
    for j in range(query.shape[0]):
        score += query[j] * keys[i, j]
    return score


@njit(**UNCOUNTED, cache=True, fastmath=True)
def _logits(weights, context, candidates, mask, logits_out):  # pragma: no cover - compiled
    """`deepsets_logits` without the value; leaves the summary of the set in `weights.vectors[2]`."""
    num_candidates, hidden, context_size = candidates.shape[0], weights.row_w.shape[0], context.shape[0]
    if num_candidates > weights.live.shape[0]:
        raise ValueError("more candidates than pack_weights(max_candidates=...) allowed for")
    num_live = 0
    for k in range(num_candidates):
        if mask[k]:
            for j in range(candidates.shape[1]):
                weights.live[num_live, j] = candidates[k, j]
            num_live += 1
    inner, rows = weights.inner[:num_live], weights.rows[:num_live]
    vectors = weights.vectors
    shift, hidden_vector, summary, query = vectors[0], vectors[1], vectors[2], vectors[3]

    _affine(context, weights.context_w, weights.context_b, shift)
    _product(weights.live, num_live, weights.candidate_w, shift, weights.inner)
    _product(weights.inner, num_live, weights.row_w, weights.row_b, weights.rows)

    pooled = weights.pooled
    for i in range(context_size):
        pooled[i] = context[i]
    _pool(rows, pooled[context_size : context_size + hidden], pooled[context_size + hidden :])
    _affine(pooled, weights.summary_in_w, weights.summary_in_b, hidden_vector)
    _relu(hidden_vector)
    _affine(hidden_vector, weights.summary_out_w, weights.summary_out_b, summary)
    _relu(summary)

    _affine(summary, weights.key_set_w, weights.key_set_b, shift)
    _affine(summary, weights.query_w, weights.query_b, query)
    _product(weights.rows, num_live, weights.key_row_w, shift, weights.inner)
    clip, i = weights.clip[0], 0
    for k in range(num_candidates):
        if mask[k]:
            logits_out[k] = clip * np.float32(math.tanh(_score(query, inner, i)))
            i += 1
        else:
            logits_out[k] = _MASKED


@njit(**UNCOUNTED, cache=True, fastmath=True)
def deepsets_logits(weights, context, candidates, mask, logits_out):  # pragma: no cover - compiled
    """Write the logits of one table and return the value of its state.

    context float32 (C,), candidates float32 (K, F), mask bool (K,), logits_out float32 (K,); masked rows get
    `MASKED_LOGIT`. Only live rows are computed: they are gathered, and then three products of matrices do most of the
    work. Raises ValueError if the scratch memory has too few rows.
    """
    _logits(weights, context, candidates, mask, logits_out)
    hidden_vector, summary = weights.vectors[1], weights.vectors[2]
    _affine(summary, weights.value_hidden_w, weights.value_hidden_b, hidden_vector)
    _relu(hidden_vector)
    return weights.value_b[0] + _score(weights.value_w, weights.vectors, 1)


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
