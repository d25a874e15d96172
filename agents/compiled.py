"""The DeepSets policy as a compiled float32 kernel: microseconds a decision, no allocation, no Python.

`pack_weights` turns a trained `PointerNetwork` into a flat `DeepSetsWeights`, a NamedTuple of arrays that numba takes
as an argument; `deepsets_logits` and `deepsets_choose` run it, from Python or inside other compiled code such as a
simulator's rollout loop. The formulae are those of `networks.DeepSetsEncoder` and `networks.PointerHead`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from .networks import MASKED_LOGIT, PointerNetwork

_MASKED = np.float32(MASKED_LOGIT)

NUM_VECTORS = 8
"""Rows of the scratch memory beyond those of the candidates."""


class DeepSetsWeights(NamedTuple):
    """Weights of a DeepSets pointer network, matrices as (inputs, outputs), the input scaling folded in.

    H hidden, C context, F candidate numbers; all float32 and C-contiguous. `scratch` is working memory: threads that
    run at the same time need one struct each (`with_own_scratch`).
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
    scratch: np.ndarray  # (max_candidates + NUM_VECTORS, C + 2H) — embeddings of the live rows, then vectors


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
        "scratch": np.zeros((max_candidates + NUM_VECTORS, context_size + 2 * hidden)),
    }
    return DeepSetsWeights(**{name: np.ascontiguousarray(array, np.float32) for name, array in packed.items()})


def with_own_scratch(weights: DeepSetsWeights) -> DeepSetsWeights:
    """The same weights with working memory of their own, for another thread."""
    return weights._replace(scratch=np.zeros_like(weights.scratch))


@njit(cache=True, fastmath=True)
def _add_product(x, w, num_inputs, out):  # pragma: no cover - compiled
    """out (H,) += x (I,) @ w (I, H). Four inputs at a time: one load and store of `out` serves four multiply-adds."""
    hidden = w.shape[1]
    i = 0
    while i + 4 <= num_inputs:
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        for j in range(hidden):
            out[j] += x0 * w0[j] + x1 * w1[j] + x2 * w2[j] + x3 * w3[j]
        i += 4
    while i < num_inputs:
        x0, w0 = x[i], w[i]
        for j in range(hidden):
            out[j] += x0 * w0[j]
        i += 1


@njit(cache=True, fastmath=True)
def _add_products(x, y, w, num_inputs, out_x, out_y):  # pragma: no cover - compiled
    """Two rows at once, so that each weight is loaded once for both: fills the registers of AVX2 (14 of 16)."""
    hidden = w.shape[1]
    i = 0
    while i + 4 <= num_inputs:
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        y0, y1, y2, y3 = y[i], y[i + 1], y[i + 2], y[i + 3]
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        for j in range(hidden):
            a, b, c, d = w0[j], w1[j], w2[j], w3[j]
            out_x[j] += x0 * a + x1 * b + x2 * c + x3 * d
            out_y[j] += y0 * a + y1 * b + y2 * c + y3 * d
        i += 4
    while i < num_inputs:
        x0, y0, w0 = x[i], y[i], w[i]
        for j in range(hidden):
            out_x[j] += x0 * w0[j]
            out_y[j] += y0 * w0[j]
        i += 1


@njit(cache=True, fastmath=True)
def _relu(x, hidden):  # pragma: no cover - compiled
    for j in range(hidden):
        x[j] = max(x[j], np.float32(0.0))


@njit(cache=True, fastmath=True)
def _relu_pool(row, mean, highest, hidden):  # pragma: no cover - compiled
    for j in range(hidden):
        row[j] = max(row[j], np.float32(0.0))
    for j in range(hidden):
        mean[j] += row[j]
    for j in range(hidden):
        highest[j] = max(highest[j], row[j])


@njit(cache=True, fastmath=True)
def _score(query, key, hidden):  # pragma: no cover - compiled
    score = np.float32(0.0)
    for j in range(hidden):
        score += query[j] * max(key[j], np.float32(0.0))
    return score


@njit(cache=True, fastmath=True)
def deepsets_logits(weights, context, candidates, mask, logits_out):  # pragma: no cover - compiled
    """Write the logits of one table and return the value of its state.

    context float32 (C,), candidates float32 (K, F), mask bool (K,), logits_out float32 (K,); masked rows get
    `MASKED_LOGIT`. Only live rows are computed. Raises ValueError if the scratch memory has too few rows.
    """
    num_candidates, hidden = candidates.shape[0], weights.row_w.shape[0]
    context_size, candidate_size = context.shape[0], candidates.shape[1]
    scratch = weights.scratch
    first_vector = scratch.shape[0] - NUM_VECTORS
    if num_candidates > first_vector:
        raise ValueError("more candidates than pack_weights(max_candidates=...) allowed for")
    from_context = scratch[first_vector]
    inner, other = scratch[first_vector + 1], scratch[first_vector + 2]
    summary_in = scratch[first_vector + 3]
    mean, highest = summary_in[context_size:], summary_in[context_size + hidden :]
    summary = scratch[first_vector + 4]
    from_set = scratch[first_vector + 5]
    query = scratch[first_vector + 6]

    for j in range(hidden):
        from_context[j] = weights.context_b[j]
        mean[j] = 0.0
        highest[j] = 0.0
    _add_product(context, weights.context_w, context_size, from_context)

    num_live, waiting = 0, -1
    for k in range(num_candidates):
        if not mask[k]:
            continue
        if waiting < 0:
            waiting = k
            continue
        row, next_row = scratch[num_live], scratch[num_live + 1]
        for j in range(hidden):
            inner[j] = from_context[j]
            other[j] = from_context[j]
            row[j] = weights.row_b[j]
            next_row[j] = weights.row_b[j]
        _add_products(candidates[waiting], candidates[k], weights.candidate_w, candidate_size, inner, other)
        _relu(inner, hidden)
        _relu(other, hidden)
        _add_products(inner, other, weights.row_w, hidden, row, next_row)
        _relu_pool(row, mean, highest, hidden)
        _relu_pool(next_row, mean, highest, hidden)
        num_live += 2
        waiting = -1
    if waiting >= 0:
        row = scratch[num_live]
        for j in range(hidden):
            inner[j] = from_context[j]
            row[j] = weights.row_b[j]
        _add_product(candidates[waiting], weights.candidate_w, candidate_size, inner)
        _relu(inner, hidden)
        _add_product(inner, weights.row_w, hidden, row)
        _relu_pool(row, mean, highest, hidden)
        num_live += 1

    scale = np.float32(1.0) / np.float32(max(num_live, 1))
    for i in range(context_size):
        summary_in[i] = context[i]
    for j in range(hidden):
        mean[j] *= scale
        inner[j] = weights.summary_in_b[j]
        summary[j] = weights.summary_out_b[j]
        from_set[j] = weights.key_set_b[j]
        query[j] = weights.query_b[j]
    _add_product(summary_in, weights.summary_in_w, context_size + 2 * hidden, inner)
    _relu(inner, hidden)
    _add_product(inner, weights.summary_out_w, hidden, summary)
    _relu(summary, hidden)
    _add_product(summary, weights.key_set_w, hidden, from_set)
    _add_product(summary, weights.query_w, hidden, query)

    for i in range(0, num_live, 2):
        for j in range(hidden):
            inner[j] = from_set[j]
            other[j] = from_set[j]
        if i + 1 < num_live:
            _add_products(scratch[i], scratch[i + 1], weights.key_row_w, hidden, inner, other)
            scratch[i + 1, 0] = _score(query, other, hidden)  # the embedding has served
        else:
            _add_product(scratch[i], weights.key_row_w, hidden, inner)
        scratch[i, 0] = _score(query, inner, hidden)

    clip, i = weights.clip[0], 0
    for k in range(num_candidates):
        if mask[k]:
            logits_out[k] = clip * np.float32(math.tanh(scratch[i, 0]))
            i += 1
        else:
            logits_out[k] = _MASKED

    for j in range(hidden):
        inner[j] = weights.value_hidden_b[j]
    _add_product(summary, weights.value_hidden_w, hidden, inner)
    value = weights.value_b[0]
    for j in range(hidden):
        value += weights.value_w[j] * max(inner[j], np.float32(0.0))
    return value


@njit(cache=True)
def deepsets_batch(weights, context, candidates, mask, logits_out, values_out):  # pragma: no cover - compiled
    """`deepsets_logits` of B tables: arguments with a leading axis B, and values_out float32 (B,)."""
    for b in range(context.shape[0]):
        values_out[b] = deepsets_logits(weights, context[b], candidates[b], mask[b], logits_out[b])


@njit(cache=True)
def deepsets_choose(weights, context, candidates, mask, logits_out):  # pragma: no cover - compiled
    """Index of the best live row, the first of equals; -1 if every row is masked. Arguments as `deepsets_logits`."""
    deepsets_logits(weights, context, candidates, mask, logits_out)
    best = -1
    for k in range(mask.shape[0]):
        if mask[k] and (best < 0 or logits_out[k] > logits_out[best]):
            best = k
    return best
