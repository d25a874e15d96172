"""How experts follow each other: conditional frequencies from layer to layer and from token to token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .workload import Workload


class Affinity(NamedTuple):
    """Shares of tokens, counted on training sequences. Rows sum to k; rows of experts never used are the prior.

    ExFlow (Yao et al., IPDPS 2024) calls the first one inter-layer expert affinity.
    """

    next_layer: np.ndarray  # (L, E, E) float32: P(e' at l + 1 | e at l); after the last: layer 0, next token
    same_layer: np.ndarray  # (L, E, E) float32: P(e' at the next token | e at this one), within a layer

    @classmethod
    def fit(cls, workload: Workload) -> Affinity:
        """Count how the experts of `workload` follow each other, within sequences."""
        layers, num_experts = workload.num_layers, workload.num_experts
        is_last = np.zeros(workload.num_tokens, bool)
        is_last[workload.sequence_offsets[1:] - 1] = True
        before = np.flatnonzero(~is_last)  # tokens that another one of their sequence follows
        used = [_one_hot(workload.experts[:, layer], num_experts) for layer in range(layers)]
        prior = workload.popularity()
        next_layer = np.empty((layers, num_experts, num_experts), np.float32)
        same_layer = np.empty_like(next_layer)
        for layer in range(layers):
            after = (layer + 1) % layers
            same_layer[layer] = _conditional(used[layer][before], used[layer][before + 1], prior[layer])
            if after > 0:
                next_layer[layer] = _conditional(used[layer], used[after], prior[after])
            else:
                next_layer[layer] = _conditional(used[layer][before], used[after][before + 1], prior[after])
        return cls(next_layer, same_layer)

    @classmethod
    def unknown(cls, num_layers: int, num_experts: int) -> Affinity:
        """Zeros: nothing is known of how experts follow each other."""
        zeros = np.zeros((num_layers, num_experts, num_experts), np.float32)
        return cls(zeros, zeros.copy())


def _one_hot(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """float32 (T, E) with ones where `experts` (T, k) names an expert."""
    rows = np.zeros((len(experts), num_experts), np.float32)
    rows[np.arange(len(experts))[:, None], experts] = 1.0
    return rows


def _conditional(before: np.ndarray, after: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """P(after | before), (E, E), from one-hot rows of the same tokens."""
    counts = before.sum(0)
    return np.where(counts[:, None] > 0, before.T @ after / np.maximum(counts, 1)[:, None], prior)
