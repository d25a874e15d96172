"""What happened in a run, in full: enough to recompute every metric from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

import numpy as np


@dataclass(frozen=True)
class Timeline:
    """The record of one run over N requests and I iterations, on a simulator or on an engine.

    A *segment* (request, first_iteration, num_tokens) says that the request yielded one token at the end of each of
    the iterations first_iteration ... first_iteration + num_tokens - 1. The segments of a request are in order of
    time; a new one starts whenever the request skipped an iteration (waiting, preempted).
    """

    arrival_s: np.ndarray  # (N,) float64
    prompt_tokens: np.ndarray  # (N,) int64
    output_tokens: np.ndarray  # (N,) int64, true lengths
    slo_class: np.ndarray  # (N,) int32
    ttft_slo_s: np.ndarray  # (N,) float64
    tpot_slo_s: np.ndarray  # (N,) float64
    slo_weight: np.ndarray  # (N,) float64
    refused: np.ndarray  # (N,) bool: turned away at admission, yields no token
    preemptions: np.ndarray  # (N,) int64
    iteration_start_s: np.ndarray  # (I,) float64, the run's clock
    iteration_end_s: np.ndarray  # (I,) float64
    prefill_tokens: np.ndarray  # (I,) int64, prefill tokens computed in the iteration
    decode_requests: np.ndarray  # (I,) int64, decodes in the iteration
    kv_blocks_used: np.ndarray  # (I,) int64, blocks referenced while the iteration ran
    segments: np.ndarray  # (S, 3) int64

    def save(self, path: str | PathLike[str]) -> None:
        """Write a compressed .npz."""
        np.savez_compressed(path, **{name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Timeline:
        """Read what `save` wrote (never pickled objects)."""
        with np.load(path, allow_pickle=False) as data:
            return cls(**{name: data[name] for name in cls.__dataclass_fields__})
