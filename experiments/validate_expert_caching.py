"""Re-check a run of expert caching from its timeline and its routing: residency, times, and every metric.

Residency and times are replayed by `envs.expert_caching.check`, in plain Python, one chunk at a time; the metrics are
counted here, load by load and epoch by epoch, sharing no code with `envs.expert_caching.metrics`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..envs.core.errors import InputError
from ..envs.expert_caching.check import check_residency, check_times
from ..envs.expert_caching.spec import ExpertCachingSpec
from ..envs.expert_caching.timeline import BYPASSED, PREFETCH, Timeline
from ..envs.expert_caching.workload import load_routing
from .validate import Checked


def check_run(folder: Path, npz: Path, about: dict[str, Any]) -> Checked:
    """Re-check one run. Raises InputError if its schedule or its routing cannot be read."""
    try:
        timeline = Timeline.load(npz)
        spec = ExpertCachingSpec.from_dict(about["spec"])
        routing = npz.parent / str(about["routing"])
    except InputError:
        raise
    except Exception as error:  # a damaged archive raises anything from KeyError to zlib.error
        raise InputError(
            f"not a schedule ({error!r})", file=npz, remedy="Evaluate this run again, its schedule is damaged"
        ) from error
    workload = load_routing(routing)
    problems = [("residency", text) for text in check_residency(timeline, workload, spec)]
    if about["run"]["backend"] == "sim" and not spec.eviction_only:
        problems += [("times", text) for text in check_times(timeline, workload, spec)]
    inputs = [routing.name, workload.experts.shape, timeline.batches.shape]
    return Checked(inputs, problems[:3], recompute(timeline, with_times=not spec.eviction_only))


def recompute(timeline: Timeline, *, with_times: bool) -> dict[str, tuple[float, str]]:
    """Every metric of a timeline: metric -> (value, unit)."""
    tokens = sum(1 for row in timeline.batches.tolist() for token in row if token >= 0)
    used, ready, hits = (sum(getattr(timeline, name).tolist()) for name in ("used", "ready", "hits"))
    loads = demanded = prefetched = bypassed = 0
    for kind, cancelled in zip(timeline.loads["kind"].tolist(), timeline.loads["cancelled"].tolist(), strict=True):
        demanded += kind != PREFETCH
        if cancelled < 0:
            loads += 1
            prefetched += kind == PREFETCH
            bypassed += kind == BYPASSED
    # a copy's first use was ready without being a hit, or late: needed, not ready, not loaded on demand
    first_uses = (ready - hits) + (used - ready - demanded)
    values = {
        "hit_rate": (hits / max(used, 1), "share"),
        "ready_rate": (ready / max(used, 1), "share"),
        "loads_per_token": (loads / max(tokens, 1), "experts"),
        "prefetch_use": (first_uses / prefetched if prefetched else 1.0, "share"),
        "bypassed_per_token": (bypassed / max(tokens, 1), "experts"),
        "bytes_per_token": (loads * timeline.expert_bytes / max(tokens, 1), "bytes"),
        "tokens": (float(tokens), "count"),
    }
    if with_times:
        stalls = sorted(timeline.stall_s.tolist())
        place = 0.99 * (len(stalls) - 1)
        below = math.floor(place)
        above = min(below + 1, len(stalls) - 1)
        time_s = timeline.end_s.tolist()[-1]
        values |= {
            "stall_s": (math.fsum(stalls), "s"),
            "mean_stall_s": (math.fsum(stalls) / len(stalls), "s"),
            "p99_stall_s": (stalls[below] + (stalls[above] - stalls[below]) * (place - below), "s"),
            "time_s": (time_s, "s"),
            "tokens_per_s": (tokens / time_s, "tokens/s"),
        }
    return values
