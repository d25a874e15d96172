"""The experiment that measures the share of the gap: its eviction loop against the simulator and Belady's bound."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_expert_caching import EXPERTS, random_workload

from schedlab.baselines.expert_caching import RULES, belady, belady_loads
from schedlab.envs.expert_caching.workload import Workload, save_routing
from schedlab.experiments import expert_caching_gap as gap


@pytest.fixture(scope="module")
def workload():
    return random_workload(3, (150, 20, 400, 60))


def test_scores_evict_as_the_rule_does(workload):
    """Top 1, so that no two experts are equally recent: ties are broken in another way by the simulator."""
    workload = Workload.from_arrays("top 1", workload.experts[:, :, :1], workload.lengths, num_experts=EXPERTS)
    last = np.full((workload.num_layers, EXPERTS), -1.0, np.float32)
    scores = np.empty((1, workload.num_tokens, *last.shape), np.float32)
    for t, token in enumerate(workload.experts):
        np.put_along_axis(last, token.astype(int), t, 1)
        scores[0, t] = last
    expected = gap.rule_misses(workload, lambda spec, share: RULES["lru"])
    np.testing.assert_array_equal(
        gap.count_misses(workload, lambda: iter([scores[:, :100], scores[:, 100:]])), expected
    )


def test_misses_of_belady_are_the_fewest_and_booked_on_their_sequences(workload):
    misses = gap.rule_misses(workload, lambda spec, share: belady(workload, spec))
    for share, row in zip(gap.SHARES, misses, strict=True):
        slots = round(share * EXPERTS)
        assert row.sum() == belady_loads(workload, (slots,) * workload.num_layers).sum()
    head = workload.select([0, 1])
    alone = gap.rule_misses(head, lambda spec, share: RULES["ema_95"])
    np.testing.assert_array_equal(gap.rule_misses(workload, lambda spec, share: RULES["ema_95"])[:, :2], alone)


def test_intervals_hold_the_gap_and_grow_with_the_spread_of_seeds():
    rng = np.random.default_rng(0)
    lru, belady = rng.integers(80, 120, (4, 50)), rng.integers(40, 60, (4, 50))
    halfway = (lru + belady) // 2
    alike = gap.Row("alike", np.stack([halfway, halfway]))
    apart = gap.Row("apart", np.stack([halfway - 8, halfway + 8]))
    gap.fill_in([alike, apart], lru, belady, np.full(50, 200), 500)
    for row in (alike, apart):
        assert row.gap == pytest.approx([50] * 4, abs=1.5)
        assert all(low <= g <= high for low, g, high in zip(row.low, row.gap, row.high, strict=True))
    assert apart.high[0] - apart.low[0] > 2 * (alike.high[0] - alike.low[0])


@pytest.mark.slow
def test_the_command_writes_the_table_and_a_checkpoint(tmp_path, capsys):
    save_routing(tmp_path / "kinds.npz", random_workload(3, (40,) * 24, experts=32))
    argv = ["--trace", str(tmp_path / "kinds.npz"), "--out", str(tmp_path / "out"), "--seeds", "2", "--steps", "4"]
    argv += ["--head-steps", "4", "--members", "2"]
    assert gap.main([*argv, "--bootstrap", "50", "--ship", str(tmp_path / "shipped")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [row["policy"] for row in results["rows"]]
    assert names == ["lru", "ema_95", "learned_score", "ridge", "copy_kernel", "belady", "one_network", "agent"]
    gaps = {row["policy"]: row["gap"] for row in results["rows"]}
    assert gaps["lru"] == [0.0] * 4 and gaps["belady"] == pytest.approx([100.0] * 4)
    # The rounded checkpoint, run in the simulator, does what the network does.
    assert results["deployed"]["loads"] == pytest.approx(results["deployed"]["loads_in_torch"], rel=0.02)
    assert "agent" in capsys.readouterr().out
    assert (tmp_path / "shipped" / "card.md").read_text().startswith("# The shipped eviction score")


def test_no_gap_is_no_number():
    closed = gap.percent_closed(np.array([0, 5]), np.array([0, 10]))
    np.testing.assert_array_equal(closed, [np.nan, 50.0])
