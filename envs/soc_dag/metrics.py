"""Metrics of a run, computed from its timeline with numpy."""

from __future__ import annotations

import numpy as np

from ..core.errors import InputError
from .spec import Soc
from .timeline import Timeline
from .workload import Workload, shortest_us

METRICS: dict[str, tuple[str, bool | None]] = {
    "mean_latency": ("us", True),
    "p95_latency": ("us", True),
    "mean_slowdown": ("ratio", True),
    "makespan": ("us", True),
    "energy": ("uJ", True),
    "edp": ("J s", True),
    "deadline_misses": ("share", True),
    "utilisation": ("share", None),
    "jobs": ("count", None),
}
"""metric -> (unit, lower is better; None: neither side is better). Definitions stand at `compute_metrics`."""


def metric_info(name: str) -> tuple[str, bool | None]:
    """(unit, lower is better) of a metric. Raises InputError."""
    if name not in METRICS:
        raise InputError(f"unknown metric {name!r}", remedy=f"Choose one of {', '.join(METRICS)}")
    return METRICS[name]


def compute_metrics(timeline: Timeline, workload: Workload, soc: Soc) -> dict[str, float]:
    """All metrics of a finished run.

    - latency: from a job's arrival to the end of its last task; slowdown: latency over the job's critical path with
    every
      task on its fastest PE and no transfers.
    - `makespan`: the end of the last task; `energy` up to there, by `Soc`'s power; `edp`: energy times mean latency.
    - `deadline_misses`: of the jobs that have a deadline (nan without any), those finished after it.
    - `utilisation`: time that PEs execute, of all PEs from 0 to the makespan.
    """
    latency = timeline.job_finish - timeline.arrival
    shortest = np.array([shortest_us(dag) for dag in workload.dags])[workload.dag_of_job]
    due = np.isfinite(timeline.deadline)
    makespan, energy = float(timeline.job_finish.max()), energy_uj(timeline, soc)
    busy = float((timeline.finish - timeline.start).sum())
    metrics = {
        "mean_latency": float(latency.mean()),
        "p95_latency": float(np.percentile(latency, 95)),
        "mean_slowdown": float((latency / np.maximum(shortest, 1e-9)).mean()),
        "makespan": makespan,
        "energy": energy,
        "edp": energy * 1e-6 * float(latency.mean()) * 1e-6,
        "deadline_misses": float((timeline.job_finish > timeline.deadline)[due].mean()) if due.any() else float("nan"),
        "utilisation": busy / (makespan * soc.num_pes) if makespan > 0 else float("nan"),
        "jobs": float(len(latency)),
    }
    assert list(metrics) == list(METRICS)
    return metrics


def energy_uj(timeline: Timeline, soc: Soc) -> float:
    """Energy from time 0 to the end of the last task, uJ: between events each kind draws what its active PEs do."""
    makespan, total, first = float(timeline.finish.max()), 0.0, 0
    for kind in soc.kinds:
        here = np.flatnonzero((timeline.pe >= first) & (timeline.pe < first + kind.count))
        first += kind.count
        total += kind.idle_w * kind.count * makespan
        begins, ends, levels = timeline.start[here], timeline.finish[here], timeline.level[here]
        times = np.concatenate([ends, begins])
        order = np.argsort(times, kind="stable")  # at one time ends come first: never more active PEs than there are
        spans = np.diff(times[order])
        steps = np.concatenate([-np.ones(len(here)), np.ones(len(here))])[order]
        active = np.cumsum(steps)[:-1].astype(int)
        total -= kind.idle_w * float((spans * active).sum())
        if kind.power_w:
            power = np.array(kind.power_w)
            of_level = np.stack(  # active PEs at each operating point, between events
                [np.cumsum(steps * (np.tile(levels, 2)[order] == level))[:-1] for level in range(len(power))]
            )
            watts = power[:, np.maximum(active, 1) - 1]
            total += float((spans * (of_level * watts).sum(0) / np.maximum(active, 1)).sum())
    return total
