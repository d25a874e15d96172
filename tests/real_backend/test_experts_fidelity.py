"""`schedlab fidelity experts` in small: the same windows on engine and simulator, and what is said of them."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from schedlab.baselines.expert_caching import belady_loads
from schedlab.envs.core.errors import InputError
from schedlab.envs.expert_caching.affinity import Affinity
from schedlab.envs.expert_caching.spec import CostModel, ExpertCachingSpec
from schedlab.envs.expert_caching.workload import Workload, generate, save_routing
from schedlab.experiments import fidelity_experts
from schedlab.experiments.expert_traces import Trace, with_guesses
from schedlab.experiments.fidelity_experts import bound, groups_of, line_up, main, ratio_of, simulate, verdict
from schedlab.real_backend.experts import OffloadedModel
from schedlab.real_backend.experts_model import build_olmoe

COST = CostModel("simple", attention_s=1e-3, expert_s=1e-4, expert_bytes=1 << 20, bandwidth=1e9, step_s=5e-4)


@pytest.fixture
def trace():
    work = generate(24, num_layers=3, num_experts=8, top_k=2, mean_length=30, prediction_noise=None, seed=3)
    work = Workload.from_arrays("made-up", work.experts, work.lengths, num_experts=8)
    test, training = work.split(0.5, 0.5, seed=1)
    return Trace("made-up", test, training)


def test_guesses_are_the_experts_that_follow_most_often():
    routing = np.tile(np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]]]), (10, 1, 1))
    work = Workload.from_arrays("regular", routing, [20], num_experts=8)
    told = with_guesses(work, Affinity.fit(work))
    assert (told.predicted[:, 0] == -1).all()
    np.testing.assert_array_equal(np.sort(told.predicted[:, 1, :2]), routing[:, 1])
    assert (told.predicted_probability[:, 1, :2] == 1.0).all() and (told.predicted_probability[:, 1, 2:] == 0.0).all()


def one_layer(window: Workload) -> Workload:
    """The same as a model of one layer, whose slots all experts share: each layer of a token is a token of its own."""
    tokens, layers, k = window.experts.shape
    routing = window.experts + window.num_experts * np.arange(layers)[:, None]
    return Workload.from_arrays(
        "one layer", routing.reshape(-1, 1, k), [tokens * layers], num_experts=layers * window.num_experts
    )


def test_bound_is_the_slower_of_computing_and_belady(trace):
    spec = ExpertCachingSpec(cache_share=0.5)  # cold: Belady's loads are those of `belady_loads`
    windows = [trace.draw(50, seed) for seed in range(2)]
    loads = sum(int(belady_loads(one_layer(window), (12,)).sum()) for window in windows)
    assert loads < sum(int(belady_loads(window, (4, 4, 4)).sum()) for window in windows)
    for bandwidth in (1e8, 1e10):
        cost = CostModel(**{**vars(COST), "bandwidth": bandwidth})
        found = bound(spec.replace(cost=cost), windows)
        assert found["load_s"] == pytest.approx(loads * cost.load_s)
        assert found["compute_s"] == pytest.approx(2 * (149 * 1e-3 + 150 * 2e-4 + 49 * 5e-4))
        assert found["seconds"] == pytest.approx(found["load_s" if bandwidth < 1e9 else "compute_s"])
        for contender in line_up(["ema_95", "affinity_prefetch", "belady"], spec, trace, 2):
            assert sum(simulate(contender, windows, cost)) >= found["seconds"] * (1 - 1e-9)


def test_published_systems_are_held_to_a_few_prefetches(trace):
    names = ["fate", "affinity_prefetch", "moe_infinity", "ridge", "belady"]
    for most in (0, 1, 5):
        specs = {one.name: one.spec for one in line_up(names, ExpertCachingSpec(COST, cache_share=0.5), trace, most)}
        assert list(specs) == ["lru", *names]
        for name in ("fate", "affinity_prefetch", "moe_infinity"):
            assert specs[name].max_prefetch == min(most, 2)
        assert specs["ridge"].max_prefetch == specs["belady"].max_prefetch == 0
    with pytest.raises(InputError, match="no policy and no folder is called 'nonesuch'"):
        line_up(["nonesuch"], ExpertCachingSpec(COST, cache_share=0.5), trace, 1)


def test_groups_all_have_the_first_and_nobody_is_left_out():
    names = [[cell.contender for cell in group] for group in groups_of(["lru", "a", "b", "c", "d"], 3)]
    assert names == [["lru", "a", "b"], ["lru", "c", "d"]]
    assert [[cell.contender for cell in group] for group in groups_of(["lru"], 3)] == [["lru"]]


def test_drift_that_hits_both_alike_does_not_widen_the_interval():
    rng = np.random.default_rng(0)
    drift = rng.uniform(0.5, 2.0, 60)
    ratio, (low, high) = ratio_of(1.2 * drift, drift)
    assert ratio == pytest.approx(1.2) and low == pytest.approx(1.2) and high == pytest.approx(1.2)
    ratio, (low, high) = ratio_of(1.2 * drift, rng.permutation(drift))
    assert ratio == pytest.approx(1.2) and low < 1.15 and high > 1.25


def test_verdict_names_the_best_row_that_can_be_deployed():
    def row(policy, tokens_per_s, oracle=False, error=0.0):
        return {
            "policy": policy,
            "oracle": oracle,
            "tokens_per_s": tokens_per_s,
            "speedup": tokens_per_s / 4.0,
            "of_bound": tokens_per_s / 10.0,
            "error": error,
        }

    rows = [row("lru", 4.0, error=-0.3), row("ridge", 4.5), row("belady", 8.0, True), row("agent", 5.4, error=0.1)]
    text = verdict({"rows": rows})
    assert text.startswith("agent: 1.35x lru, 1.20x ridge (the best other row), 54% of the bound; ")
    assert text.endswith("median error of the simulator 5.0%")


def test_command_measures_simulates_and_writes(trace, tmp_path, monkeypatch, capsys):
    save_routing(tmp_path / "made-up.npz", trace.training)

    def small_model(workload, path, *, device, folder):
        shape = {"layers": 3, "experts": 8, "top_k": 2, "hidden": 32, "intermediate": 48, "heads": 2, "kv_heads": 1}
        return OffloadedModel(build_olmoe(vocab=64, **shape), device, folder), "trace"

    monkeypatch.setattr("schedlab.real_backend.experts.open_model", small_model)
    monkeypatch.setattr(fidelity_experts, "CALIBRATION_TOKENS", 140)
    out = tmp_path / "experts.json"
    arguments = ["--workload", str(tmp_path / "made-up.npz"), "--policies", "ema_95", "affinity_prefetch", "belady"]
    arguments += ["--tokens", "30", "--repeats", "2", "--cache-shares", "0.25", "0.5", "--json", str(out)]
    arguments += ["--turn-tokens", "7", "--together", "3"]
    assert main([*arguments, "--folder", str(Path(__file__).parent)]) == 0
    content = json.loads(out.read_text())
    assert [table["cache_share"] for table in content["tables"]] == [0.25, 0.5]
    # in turns with two groups of policies at each size of cache, in two windows
    assert (
        content["calibration"]["repeats"] == 4
        and content["calibration"]["tokens"] == 140
        and content["cost"]["expert_bytes"] > 0
    )
    assert [run["cache_share"] for run in content["calibration"]["runs"]] == [0.25, 0.5]
    assert content["tables"][0]["cost"] != content["tables"][1]["cost"]  # each of the run that took turns with it
    for table in content["tables"]:
        rows = {row["policy"]: row for row in table["rows"]}
        assert list(rows) == ["lru", "ema_95", "affinity_prefetch", "belady"]
        assert rows["lru"]["speedup"] == 1.0 and rows["belady"]["oracle"]
        assert rows["belady"]["loads_per_token"] <= min(row["loads_per_token"] for row in rows.values())
        for row in rows.values():
            measured, simulated = sum(row["measured_s"]), sum(row["simulated_s"])
            assert len(row["measured_s"]) == 2 and row["error"] == pytest.approx(simulated / measured - 1)
            assert [len(slices) for slices in row["slices_s"]] == [5, 5]
            np.testing.assert_allclose([sum(slices) for slices in row["slices_s"]], row["measured_s"])
            assert row["speedup_interval"][0] <= row["speedup"] <= row["speedup_interval"][1]
            assert row["tokens_per_s"] == pytest.approx(60 / measured)
            assert 0 < row["decision_share"] < 1
    assert "median error of the simulator" in capsys.readouterr().out
    assert main([*arguments, "--folder", str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err
