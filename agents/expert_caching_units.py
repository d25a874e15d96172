"""The small network that an `EvictionNetwork` runs for every expert of every token, forward and backward in one pass.

    hidden = relu(W x + b),  logits = V (x, hidden) + c,  x = (features, channels) of one expert

In torch this is a dozen passes over arrays of millions, most of its training time; here a block of experts stays in the
processor's first cache from the features to the logits, and the backward pass computes the hidden units again. The
arithmetic is the same, within rounding. Measured at the size that is trained: 23 ms instead of 69.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..envs.core.kernel import njit

BLOCK = 128
"""Experts computed together: their numbers, 5 to 25 KiB, fit the first cache."""


def run_units(features: Tensor, channels: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """Logits of N experts of each of n layers. Features get no gradient.

    Shapes:
        features (n, F, N), channels (n, K, N), w (H, F + K), b (n, H), v (O, F + K + H), c (n, O), all float32
        -> (n, O, N)
    """
    logits: Tensor = _Units.apply(features, channels, w, b, v, c)
    return logits


class _Units(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, channels: Tensor, *weights: Tensor) -> Tensor:
        arguments = [tensor.detach().contiguous() for tensor in (features, channels, *weights)]
        ctx.save_for_backward(*arguments)
        logits = torch.empty(len(features), len(weights[2]), features.shape[2])
        arrays: tuple[Any, ...] = tuple(tensor.numpy() for tensor in (*arguments, logits))
        forward(*arrays)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        arguments = ctx.saved_tensors
        gradients = [torch.zeros_like(tensor) for tensor in arguments[1:]]
        arrays: tuple[Any, ...] = tuple(tensor.numpy() for tensor in (*arguments, gradient.contiguous(), *gradients))
        backward(*arrays)
        return None, *gradients


@njit(cache=True, fastmath=True)
def forward(features, channels, w, b, v, c, logits) -> None:
    """See `run_units`; `logits` (n, O, N) is written."""
    num_columns = features.shape[2]
    rows = np.zeros((v.shape[1], BLOCK), np.float32)  # features, channels, hidden units
    out = np.zeros((len(v), BLOCK), np.float32)
    for i in range(len(features)):
        for first in range(0, num_columns, BLOCK):
            live = min(BLOCK, num_columns - first)
            read_block(features[i], channels[i], first, live, rows)
            run_hidden(w, b[i], rows)
            spread(c[i], out)
            add_product(v, rows, out)
            logits[i, :, first : first + live] = out[:, :live]


@njit(cache=True, fastmath=True)
def backward(features, channels, w, b, v, c, gradient, d_channels, d_w, d_b, d_v, d_c) -> None:
    """Add up the gradients of `forward`'s arguments, given that of its logits."""
    num_hidden, num_inputs = w.shape
    num_features, num_columns = features.shape[1:]
    w_channels, v_channels = w[:, num_features:].copy(), v[:, num_features:num_inputs].copy()
    v_hidden = v[:, num_inputs:].copy()
    rows = np.zeros((v.shape[1], BLOCK), np.float32)
    d_out = np.zeros((len(v), BLOCK), np.float32)
    d_hidden = np.zeros((num_hidden, BLOCK), np.float32)
    d_row = np.zeros((channels.shape[1], BLOCK), np.float32)
    for i in range(len(features)):
        for first in range(0, num_columns, BLOCK):
            live = min(BLOCK, num_columns - first)
            read_block(features[i], channels[i], first, live, rows)
            run_hidden(w, b[i], rows)
            d_out[:, :live] = gradient[i, :, first : first + live]
            d_out[:, live:] = 0
            add_outer(d_out, rows, d_v, d_c[i])
            d_hidden[:] = 0
            add_transposed(v_hidden, d_out, d_hidden)
            for h in range(num_hidden):
                for j in range(BLOCK):
                    d_hidden[h, j] = d_hidden[h, j] if rows[num_inputs + h, j] > 0 else np.float32(0.0)
            add_outer(d_hidden, rows[:num_inputs], d_w, d_b[i])
            d_row[:] = 0
            add_transposed(v_channels, d_out, d_row)
            add_transposed(w_channels, d_hidden, d_row)
            d_channels[i, :, first : first + live] = d_row[:, :live]


@njit(cache=True)
def read_block(features, channels, first: int, live: int, rows) -> None:
    """Columns first .. first + live of the features and channels into the first rows; what is beyond stays."""
    num_features, num_inputs = len(features), len(features) + len(channels)
    rows[:num_features, :live] = features[:, first : first + live]
    rows[num_features:num_inputs, :live] = channels[:, first : first + live]


@njit(cache=True, fastmath=True)
def run_hidden(w, b, rows) -> None:
    """The last rows = relu(w @ the first ones + b)."""
    num_inputs = w.shape[1]
    hidden = rows[num_inputs:]
    spread(b, hidden)
    add_product(w, rows[:num_inputs], hidden)
    for h in range(len(w)):
        for j in range(BLOCK):
            hidden[h, j] = max(hidden[h, j], np.float32(0.0))


@njit(cache=True)
def spread(column, out) -> None:
    """out (R, BLOCK) = column (R,) in every column."""
    for r in range(len(column)):
        out[r, :] = column[r]


@njit(cache=True, fastmath=True)
def add_product(matrix, x, out) -> None:
    """out (R, BLOCK) += matrix (R, C) @ x (C, BLOCK)."""
    num_columns = matrix.shape[1]
    whole = num_columns // 4 * 4
    for r in range(len(matrix)):
        for c in range(0, whole, 4):
            m0, m1, m2, m3 = matrix[r, c], matrix[r, c + 1], matrix[r, c + 2], matrix[r, c + 3]
            for j in range(BLOCK):
                out[r, j] += m0 * x[c, j] + m1 * x[c + 1, j] + m2 * x[c + 2, j] + m3 * x[c + 3, j]
        for c in range(whole, num_columns):
            m = matrix[r, c]
            for j in range(BLOCK):
                out[r, j] += m * x[c, j]


@njit(cache=True, fastmath=True)
def add_transposed(matrix, x, out) -> None:
    """out (C, BLOCK) += matrix (R, C) transposed @ x (R, BLOCK)."""
    num_rows = len(matrix)
    whole = num_rows // 4 * 4
    for c in range(matrix.shape[1]):
        for r in range(0, whole, 4):
            m0, m1, m2, m3 = matrix[r, c], matrix[r + 1, c], matrix[r + 2, c], matrix[r + 3, c]
            for j in range(BLOCK):
                out[c, j] += m0 * x[r, j] + m1 * x[r + 1, j] + m2 * x[r + 2, j] + m3 * x[r + 3, j]
        for r in range(whole, num_rows):
            m = matrix[r, c]
            for j in range(BLOCK):
                out[c, j] += m * x[r, j]


@njit(cache=True, fastmath=True)
def add_outer(x, y, out, sums) -> None:
    """out (R, C) += x (R, BLOCK) @ y (C, BLOCK) transposed; sums (R,) += sums of x over its columns."""
    for r in range(len(x)):
        total = np.float32(0.0)
        for j in range(BLOCK):
            total += x[r, j]
        sums[r] += total
        for c in range(len(y)):
            total = np.float32(0.0)
            for j in range(BLOCK):
                total += x[r, j] * y[c, j]
            out[r, c] += total
