"""What happened in a run, in full: enough to recompute every metric from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

import numpy as np


@dataclass(frozen=True)
class Timeline:
    """The record of one run of J jobs with N tasks, on a simulator or on real PEs. Times in us; inf: not yet."""

    arrival: np.ndarray  # (J,) float64
    deadline: np.ndarray  # (J,) float64; inf: none
    job_finish: np.ndarray  # (J,) float64
    first_task: np.ndarray  # (J + 1,) int64: tasks of job j are first_task[j] : first_task[j + 1]
    ready_at: np.ndarray  # (N,) float64: the last predecessor was finished
    bound_at: np.ndarray  # (N,) float64
    start: np.ndarray  # (N,) float64: all data were there, and the PE began
    finish: np.ndarray  # (N,) float64
    pe: np.ndarray  # (N,) int64, -1: not bound
    level: np.ndarray  # (N,) int64 operating point, -1: not bound

    def save(self, path: str | PathLike[str]) -> None:
        """Write a compressed .npz."""
        np.savez_compressed(path, **{name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Timeline:
        """Read what `save` wrote (never pickled objects)."""
        with np.load(path, allow_pickle=False) as data:
            return cls(**{name: data[name] for name in cls.__dataclass_fields__})
