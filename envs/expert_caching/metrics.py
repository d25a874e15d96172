"""Metrics of a run, computed from its timeline with numpy."""

from __future__ import annotations

import numpy as np

from ..core.errors import InputError
from .timeline import BYPASSED, PREFETCH, Timeline

METRICS: dict[str, tuple[str, bool | None]] = {
    "hit_rate": ("share", False),
    "ready_rate": ("share", False),
    "loads_per_token": ("experts", True),
    "prefetch_use": ("share", False),
    "bypassed_per_token": ("experts", True),
    "bytes_per_token": ("bytes", True),
    "stall_s": ("s", True),
    "mean_stall_s": ("s", True),
    "p99_stall_s": ("s", True),
    "time_s": ("s", True),
    "tokens_per_s": ("tokens/s", False),
    "tokens": ("count", None),
}
"""metric -> (unit, lower is better; None: neither side is better). Definitions stand at `compute_metrics`."""


def metric_info(name: str) -> tuple[str, bool | None]:
    """(unit, lower is better) of a metric. Raises InputError."""
    if name not in METRICS:
        raise InputError(f"unknown metric {name!r}", remedy=f"Choose one of {', '.join(METRICS)}")
    return METRICS[name]


def compute_metrics(timeline: Timeline) -> dict[str, float]:
    """All metrics of a run.

    - `ready_rate`: needed experts that were resident when the gate asked for them, over needed experts. `hit_rate`
      counts those only that no prefetch had brought for this use. Belady's hit rate bounds the hit rate of policies
      without prefetch, and bounds no ready rate: the two never stand in one column.
    - `loads_per_token`: loads begun on demand or by prefetch, cancelled ones left out. `prefetch_use`: of the
      prefetched copies that were not cancelled, the share used at least once before they were evicted (1 without any).
    - `stall_s` is the sum over layers, `mean_` and `p99_` are over layers; `time_s` ends with the last layer.
    """
    tokens = int((timeline.batches >= 0).sum())
    loads = timeline.loads[timeline.loads["cancelled"] < 0]
    used = int(timeline.used.sum())
    time_s = float(timeline.end_s[-1]) if len(timeline.end_s) else 0.0
    metrics = {
        "hit_rate": float(timeline.hits.sum() / max(used, 1)),
        "ready_rate": float(timeline.ready.sum() / max(used, 1)),
        "loads_per_token": len(loads) / max(tokens, 1),
        "prefetch_use": prefetch_use(timeline),
        "bypassed_per_token": float((loads["kind"] == BYPASSED).sum() / max(tokens, 1)),
        "bytes_per_token": len(loads) * timeline.expert_bytes / max(tokens, 1),
        "stall_s": float(timeline.stall_s.sum()),
        "mean_stall_s": float(timeline.stall_s.mean()) if len(timeline.stall_s) else 0.0,
        "p99_stall_s": float(np.percentile(timeline.stall_s, 99)) if len(timeline.stall_s) else 0.0,
        "time_s": time_s,
        "tokens_per_s": tokens / time_s if time_s > 0 else float("nan"),
        "tokens": float(tokens),
    }
    assert list(metrics) == list(METRICS)
    return metrics


def prefetch_use(timeline: Timeline) -> float:
    """Share of prefetched copies, cancelled ones left out, that were used before they were evicted.

    A copy's first use is either a ready use that is no hit, or a late one: a needed expert that was neither ready nor
    loaded on demand.
    """
    loads = timeline.loads
    prefetched = int(((loads["kind"] == PREFETCH) & (loads["cancelled"] < 0)).sum())
    demanded = int((loads["kind"] != PREFETCH).sum())
    first_uses = int((timeline.ready - timeline.hits).sum())
    late = int((timeline.used - timeline.ready).sum()) - demanded
    return (first_uses + late) / prefetched if prefetched else 1.0
