from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedlab.envs.core import InputError
from schedlab.envs.request_scheduling.metrics import METRICS, compute_metrics, metric_info, weighted_percentile

BY_HAND = {
    # e2e 7.5, 4.0, 13.75
    "mean_e2e_s": 25.25 / 3,
    "p50_e2e_s": 7.5,
    "p90_e2e_s": 7.5 + 0.8 * 6.25,
    "p99_e2e_s": 7.5 + 0.98 * 6.25,
    # ttft 2.0, 4.0, 6.5
    "mean_ttft_s": 12.5 / 3,
    "p50_ttft_s": 4.0,
    "p90_ttft_s": 6.0,
    "p99_ttft_s": 6.45,
    "max_wait_s": 6.5,
    # gaps 2.5, 3.0 of r0; 4.25, 1.5, 1.5 of r2
    "p50_tbt_s": 2.5,
    "p99_tbt_s": 3 + 0.96 * 1.25,
    # tpot 5.5 / 2 of r0, 7.25 / 3 of r2; r1 has one token
    "mean_tpot_s": (2.75 + 7.25 / 3) / 2,
    "p99_tpot_s": 7.25 / 3 + 0.99 * (2.75 - 7.25 / 3),
    # r0 and r1 meet their limits to the dot (weight 1 each); r2 is late, r3 refused (weight 2 each)
    "slo_goodput": 2 / 6,
    "goodput_rps": 2 / 14.75,
    "throughput_rps": 3 / 14.75,
    "throughput_tokens_per_s": 8 / 14.75,
    "makespan_s": 14.75,
    "preemptions": 1,
    "refused": 1,
    # blocks x seconds: 2 + 12.5 + 12 + 6.75 + 6 + 4.5 + 4.5
    "kv_use_mean": 48.25 / 147.5,
    "iterations": 7,
    "slo_goodput_class0": 1.0,
    "slo_goodput_class1": 0.0,
}


def test_by_hand(miniature):
    metrics = compute_metrics(miniature, kv_blocks=10)
    assert metrics == pytest.approx(BY_HAND, rel=1e-12)
    assert list(metrics)[: len(METRICS)] == list(METRICS)
    assert metric_info("slo_goodput_class1") == ("share", False)
    assert "kv_use_mean" not in compute_metrics(miniature)


def test_one_class_has_no_class_rows(miniature):
    metrics = compute_metrics(replace(miniature, slo_class=np.zeros(4, np.int32)), kv_blocks=10)
    assert list(metrics) == list(METRICS)


def test_unfinished_run_is_an_error(miniature):
    with pytest.raises(InputError, match="request 2 has 1 of 4 tokens"):
        compute_metrics(replace(miniature, segments=miniature.segments[:3]))
    with pytest.raises(InputError, match="unknown metric"):
        metric_info("mean_latency")


def test_all_refused(miniature):
    metrics = compute_metrics(
        replace(miniature, refused=np.ones(4, bool), segments=np.zeros((0, 3), np.int64)), kv_blocks=10
    )
    assert np.isnan(metrics["mean_e2e_s"]) and np.isnan(metrics["p99_tbt_s"]) and np.isnan(metrics["max_wait_s"])
    assert metrics["slo_goodput"] == metrics["throughput_rps"] == metrics["makespan_s"] == 0


def test_no_iterations(miniature):
    arrays = {name: getattr(miniature, name)[:0] for name in miniature.__dataclass_fields__}
    metrics = compute_metrics(type(miniature)(**arrays), kv_blocks=10)
    assert metrics["iterations"] == 0 and np.isnan(metrics["kv_use_mean"])


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 5)), max_size=12), st.sampled_from([0, 50, 90, 99, 100]))
def test_weighted_percentile_equals_numpy(pairs, percent):
    values = np.array([v for v, _ in pairs], float)
    counts = np.array([c for _, c in pairs], int)
    expanded = np.repeat(values, counts)
    found = weighted_percentile(values, counts, percent)
    if len(expanded) == 0:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(np.percentile(expanded, percent), rel=1e-12, abs=1e-300)
