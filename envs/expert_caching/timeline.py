"""What happened in a run, in full: enough to recompute every metric from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

DEMAND, SWAPPED, BYPASSED, PREFETCH = 0, 1, 2, 3
"""Kinds of loads: into a slot; into a buffer that becomes the slot when the epoch ends; into a buffer that is dropped
then; into a slot, ahead of need."""

LOAD_DTYPE = np.dtype(
    [
        ("epoch", "i8"),  # in which it was asked for
        ("ready_s", "f8"),  # when it was there; nan: never (cancelled, or in flight at the end)
        ("cancelled", "i8"),  # epoch in which it was cancelled, -1: it was not
        ("layer", "i4"),
        ("expert", "i4"),
        ("slot", "i4"),  # -1: BYPASSED
        ("kind", "i4"),
    ],
    align=True,
)


@dataclass(frozen=True)
class Timeline:
    """The record of one run of I epochs over L layers, on a simulator or on a real model."""

    num_layers: int
    batches: np.ndarray  # (steps, B) int64: the workload's token of each row in each step, -1: idle
    initial: np.ndarray  # (S, 2) int64: layer and expert of each slot at the start; expert -1: free
    start_s: np.ndarray  # (I,) float64: the gate answered and the decision was made
    end_s: np.ndarray  # (I,) float64: the layer was computed
    stall_s: np.ndarray  # (I,) float64: of this, time in which its experts waited for loads
    used: np.ndarray  # (I,) int64: needed experts
    ready: np.ndarray  # (I,) int64: of these, RESIDENT at the decision
    hits: np.ndarray  # (I,) int64: of these, not brought for this use by a prefetch
    loads: np.ndarray  # (N,) LOAD_DTYPE, in the order in which they were asked for
    expert_bytes: int

    def save(self, path: str | PathLike[str]) -> None:
        """Write a compressed .npz."""
        np.savez_compressed(path, **{name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Timeline:
        """Read what `save` wrote (never pickled objects)."""
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in cls.__dataclass_fields__}
        values: dict[str, Any] = {name: value if value.ndim else int(value) for name, value in arrays.items()}
        return cls(**values)
