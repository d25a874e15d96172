"""Requests to serve: loaders of public traces, generators, splits, and the declared length predictor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..core.errors import InputError
from .spec import SloClass


@dataclass(frozen=True)
class Workload:
    """A list of requests, sorted by arrival. Every array has one entry a request, N in all.

    `output_tokens` is the future: engines read it to know when a request ends, policies never do.
    """

    name: str
    arrival_s: np.ndarray  # (N,) float64, non-decreasing, from 0
    prompt_tokens: np.ndarray  # (N,) int64, >= 1
    output_tokens: np.ndarray  # (N,) int64, >= 1
    predicted_output_tokens: np.ndarray  # (N,) float64, > 0
    slo_class: np.ndarray  # (N,) int32
    priority: np.ndarray  # (N,) int32, lower is more urgent
    client: np.ndarray  # (N,) int32
    hash_offsets: np.ndarray  # (N + 1,) int64: blocks of request i are hash_ids[hash_offsets[i]:hash_offsets[i + 1]]
    hash_ids: np.ndarray  # int64, dense ids from 0; equal ids are equal prompt prefixes; full blocks only
    hash_block_tokens: int = 0  # prompt tokens a hash id covers; 0: no prefix information
    source: str = ""
    """Where the requests are from, as printed beside results."""
    has_true_lengths: bool = False
    """True when `predicted_output_tokens` are the true lengths: results are then an oracle's."""

    def __len__(self) -> int:
        return len(self.arrival_s)
