"""Metrics of a run, computed from its timeline with numpy, without expanding tokens."""

from __future__ import annotations

import numpy as np

from ..core.errors import InputError
from .timeline import Timeline

METRICS: dict[str, tuple[str, bool | None]] = {
    "mean_e2e_s": ("s", True),
    "p50_e2e_s": ("s", True),
    "p90_e2e_s": ("s", True),
    "p99_e2e_s": ("s", True),
    "mean_ttft_s": ("s", True),
    "p50_ttft_s": ("s", True),
    "p90_ttft_s": ("s", True),
    "p99_ttft_s": ("s", True),
    "max_wait_s": ("s", True),
    "p50_tbt_s": ("s", True),
    "p99_tbt_s": ("s", True),
    "mean_tpot_s": ("s", True),
    "p99_tpot_s": ("s", True),
    "slo_goodput": ("share", False),
    "goodput_rps": ("requests/s", False),
    "throughput_rps": ("requests/s", False),
    "throughput_tokens_per_s": ("tokens/s", False),
    "makespan_s": ("s", True),
    "preemptions": ("count", True),
    "refused": ("count", True),
    "kv_use_mean": ("share", None),
    "iterations": ("count", None),
}
"""metric -> (unit, lower is better; None: neither side is better). Definitions stand at `compute_metrics`."""

CLASS_GOODPUT = "slo_goodput_class"
"""Prefix of the goodput of one SLO class: `slo_goodput_class0`, ..."""


def metric_info(name: str) -> tuple[str, bool | None]:
    """(unit, lower is better) of a metric, the metrics of single SLO classes included. Raises InputError."""
    name = "slo_goodput" if name.startswith(CLASS_GOODPUT) else name
    if name not in METRICS:
        raise InputError(f"unknown metric {name!r}", remedy=f"Choose one of {', '.join(METRICS)}")
    return METRICS[name]


def compute_metrics(timeline: Timeline, kv_blocks: int | None = None) -> dict[str, float]:
    """All metrics of a finished run.

    With a = arrival, f and l = the times of the first and last token and n = the number of tokens of a request:

    - e2e = l - a and ttft = f - a: mean and percentiles over the requests that were served; `max_wait_s` is the
      largest ttft.
    - tbt: every gap between consecutive tokens of a request, all requests pooled (token-weighted).
    - tpot = (l - f) / (n - 1) over served requests with n >= 2 (request-weighted).
    - `slo_goodput`: share of all requests, weighted by `slo_weight`, that meet both limits, ttft <= ttft_slo_s and
      tpot <= tpot_slo_s; a single token meets the latter, a refused request neither. `slo_goodput_class<c>` is the
      same within class c, when there is more than one class.
    - makespan: first arrival to last token. `goodput_rps`: the weighted number of requests that meet both limits, and
      `throughput_*`: served requests and their tokens, per second of makespan (0 when nothing was served).
    - `kv_use_mean`: KV blocks in use at the end of an iteration as a share of the pool, weighted by the duration of
      the iteration.

    Percentiles interpolate linearly (numpy's default). A mean or percentile of nothing is nan.

    Args:
        timeline: of a run in which every request was served to its end or refused.
        kv_blocks: blocks in the pool; without it there is no `kv_use_mean`.

    Returns:
        metric -> value, in the order and with the units of `METRICS`.

    Raises:
        InputError: if a served request has more or fewer tokens than its output length.
    """
    end_s, arrival_s = timeline.iteration_end_s, timeline.arrival_s
    served = ~timeline.refused
    # Time order within a request is all that is promised: group the segments by request, keep their order.
    segments = timeline.segments[np.argsort(timeline.segments[:, 0], kind="stable")]
    owner, first, num_tokens = segments[:, 0], segments[:, 1], segments[:, 2]
    last = first + num_tokens - 1
    _check_tokens(timeline, owner, num_tokens)

    # first and last segment of every served request; owner is sorted, so these are runs of equal owners
    is_head = np.ones(len(owner), bool)
    is_head[1:] = owner[1:] != owner[:-1]
    is_tail = np.roll(is_head, -1)
    first_token_s = end_s[first[is_head]]
    last_token_s = end_s[last[is_tail]]
    ttft_s = first_token_s - arrival_s[served]
    e2e_s = last_token_s - arrival_s[served]
    num_output = timeline.output_tokens[served]
    decode_span_s = last_token_s - first_token_s
    tpot_s = np.divide(decode_span_s, num_output - 1, out=np.zeros(len(num_output)), where=num_output > 1)

    is_met = np.zeros(len(arrival_s), bool)
    is_met[served] = (ttft_s <= timeline.ttft_slo_s[served]) & (tpot_s <= timeline.tpot_slo_s[served])
    met_weight = np.where(is_met, timeline.slo_weight, 0.0)

    makespan_s = float(last_token_s.max() - arrival_s.min()) if len(last_token_s) else 0.0
    per_makespan = 1 / makespan_s if makespan_s > 0 else 0.0
    tbt = _token_gaps(end_s, first, last, ~is_head)

    metrics = {
        "mean_e2e_s": _mean(e2e_s),
        **_percentiles("e2e_s", e2e_s, (50, 90, 99)),
        "mean_ttft_s": _mean(ttft_s),
        **_percentiles("ttft_s", ttft_s, (50, 90, 99)),
        "max_wait_s": float(ttft_s.max()) if len(ttft_s) else float("nan"),
        "p50_tbt_s": weighted_percentile(*tbt, 50),
        "p99_tbt_s": weighted_percentile(*tbt, 99),
        "mean_tpot_s": _mean(tpot_s[num_output > 1]),
        **_percentiles("tpot_s", tpot_s[num_output > 1], (99,)),
        "slo_goodput": _share(met_weight, timeline.slo_weight),
        "goodput_rps": float(met_weight.sum()) * per_makespan,
        "throughput_rps": float(served.sum()) * per_makespan,
        "throughput_tokens_per_s": float(num_output.sum()) * per_makespan,
        "makespan_s": makespan_s,
        "preemptions": float(timeline.preemptions.sum()),
        "refused": float(timeline.refused.sum()),
    }
    if kv_blocks is not None:
        duration_s = end_s - timeline.iteration_start_s
        metrics["kv_use_mean"] = _share(timeline.kv_blocks_used * duration_s, duration_s * kv_blocks)
    metrics["iterations"] = float(len(end_s))
    classes = np.unique(timeline.slo_class)
    if len(classes) > 1:
        for c in classes:
            members = timeline.slo_class == c
            metrics[f"{CLASS_GOODPUT}{c}"] = _share(met_weight[members], timeline.slo_weight[members])
    return metrics


def weighted_percentile(values: np.ndarray, counts: np.ndarray, percent: float) -> float:
    """`np.percentile(np.repeat(values, counts), percent)` without the repetition; nan when nothing is counted."""
    live = counts > 0
    values, counts = values[live], counts[live]
    if len(values) == 0:
        return float("nan")
    order = np.argsort(values)
    values, cumulative = values[order], np.cumsum(counts[order])
    position = percent / 100 * (cumulative[-1] - 1)
    below = int(position)
    low, high = values[np.searchsorted(cumulative, [below, min(below + 1, cumulative[-1] - 1)], side="right")]
    return float(low + (high - low) * (position - below))


def _token_gaps(
    end_s: np.ndarray, first: np.ndarray, last: np.ndarray, is_continued: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gaps between consecutive tokens of a request as (seconds, how many).

    Inside segments a gap is the distance of two neighbouring iteration ends, shared by all segments that run over
    both; between segments of one request each gap stands alone.
    """
    num_iterations = len(end_s)
    starts = np.bincount(first, minlength=num_iterations + 1)[: num_iterations + 1]
    stops = np.bincount(last, minlength=num_iterations + 1)[: num_iterations + 1]
    running = np.cumsum(starts - stops)[: max(num_iterations - 1, 0)]
    within_s = np.diff(end_s)
    later = np.flatnonzero(is_continued)
    between_s = end_s[first[later]] - end_s[last[later - 1]]
    return np.concatenate([within_s, between_s]), np.concatenate([running, np.ones(len(later), running.dtype)])


def _check_tokens(timeline: Timeline, owner: np.ndarray, num_tokens: np.ndarray) -> None:
    """Every request has its tokens. Raises InputError."""
    emitted = np.bincount(owner, weights=num_tokens, minlength=len(timeline.arrival_s))
    expected = np.where(timeline.refused, 0, timeline.output_tokens)
    wrong = np.flatnonzero(emitted != expected)
    if len(wrong):
        i = wrong[0]
        raise InputError(
            f"{len(wrong)} requests of the timeline are unfinished or overfull, request {i} has {int(emitted[i])} of "
            f"{expected[i]} tokens",
            remedy="Run to the end of the workload before computing metrics",
        )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _percentiles(name: str, values: np.ndarray, percents: tuple[int, ...]) -> dict[str, float]:
    found = np.percentile(values, percents) if len(values) else np.full(len(percents), np.nan)
    return {f"p{percent}_{name}": float(value) for percent, value in zip(percents, found, strict=True)}


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    total = float(whole.sum())
    return float(part.sum()) / total if total > 0 else float("nan")
