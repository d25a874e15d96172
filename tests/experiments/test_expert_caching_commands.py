"""The commands for expert caching: what they print and write, that it can be re-checked, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from schedlab.envs.core.results import read_results
from schedlab.envs.expert_caching.workload import load_routing, save_routing
from schedlab.experiments import calibrate, deploy, evaluate, expert_caching, report
from schedlab.experiments.expert_traces import find_trace

SHORT = ["--workload", "synthetic", "--window", "60", "--seeds", "2"]


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("SCHEDLAB_DATA", raising=False)


def error_of(capsys, *argv):
    assert evaluate.main(["expert_caching", *map(str, argv)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_hit_rates_resume_validate_report(tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["expert_caching", "--policies", "lru", "ema_95", "belady", *SHORT, "--out", str(out)]
    assert evaluate.main(argv) == 0
    printed = capsys.readouterr().out
    assert "gap_closed" in printed and "belady (oracle)" in printed
    frame = read_results(out / "results.csv")
    value = frame.set_index(["policy", "seed", "metric"])["value"]
    for seed in (0, 1):
        assert value["lru", seed, "gap_closed"] == 0 and value["belady", seed, "gap_closed"] == 1
        assert value["lru", seed, "hit_rate"] < value["belady", seed, "hit_rate"]
    assert not any(name.endswith("_s") for name in frame["metric"])  # no times where loads take none
    assert "--resume" in error_of(capsys, *argv[1:])
    before = (out / "results.csv").read_bytes()
    assert evaluate.main([*argv, "--resume"]) == 0
    assert (out / "results.csv").read_bytes() == before
    assert evaluate.main(["--validate", str(out)]) == 0
    capsys.readouterr()
    assert report.main([str(out)]) == 0

    text = (out / "results.csv").read_text()
    (out / "results.csv").write_text(text.replace("ready_rate,0.", "ready_rate,0.9", 1))
    assert evaluate.main(["--validate", str(out)]) == 1
    assert "ready_rate" in capsys.readouterr().out


def test_speed_with_systems_that_load_ahead(tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--policies", "lru", "affinity_prefetch", "layer_streaming", "belady", *SHORT, "--seeds", "1"]
    assert evaluate.main(["expert_caching", *argv, "--objective", "tokens_per_s", "--out", str(out)]) == 0
    assert "bound_share" in capsys.readouterr().out
    frame = read_results(out / "results.csv")
    shares = frame[frame["metric"] == "bound_share"]["value"]
    assert len(shares) == 4 and (shares > 0).all() and (shares <= 1).all()
    assert evaluate.main(["--validate", str(out)]) == 0
    # a timeline that was tampered with is found out
    capsys.readouterr()
    schedule = next((out / "schedules").glob("*_lru_*.npz"))
    with np.load(schedule) as data:
        arrays = dict(data)
    arrays["ready"] = arrays["ready"] + 1
    np.savez_compressed(schedule, **arrays)
    assert evaluate.main(["--validate", str(out)]) == 1
    assert "residency" in capsys.readouterr().out


def test_seeds_draw_held_out_sequences(tmp_path):
    trace = find_trace("synthetic")
    assert len(trace.test) + len(trace.training) == 32
    first, again, other = trace.draw(50, 3), trace.draw(50, 3), trace.draw(50, 4)
    np.testing.assert_array_equal(first.experts, again.experts)
    assert not np.array_equal(first.experts, other.experts)
    np.testing.assert_array_equal(first.prior, trace.training.popularity())


def test_the_trace_of_our_own_model_is_there():
    trace = find_trace("moe")
    assert trace.test.num_tokens > 1000 and "OLMoE" in trace.test.source


def test_errors_are_clear_and_leave_nothing(tmp_path, capsys):
    out = tmp_path / "out"

    def error(*argv):
        message = error_of(capsys, *argv, "--out", out)
        assert not out.exists()
        return message

    assert "Did you mean 'lru'" in error("--policies", "lrv", *SHORT)
    assert "named twice" in error("--policies", "lru", "lru", *SHORT)
    assert "SCHEDLAB_DATA" in error("--workload", "deepseek")
    assert "smaller than" in error("--cache", "0.05", *SHORT)
    assert "share in" in error("--cache", "1.5", *SHORT)
    assert "positive number of tokens" in error(*SHORT, "--window", "0")
    assert "--objective tokens_per_s" in error(*SHORT, "--backend", "experts")
    assert "'speed'" in error("--metrics", "speed", *SHORT)
    assert "no shipped agent knows" in error("--policies", "agent", *SHORT)
    assert "config.json" in error("--policies", str(tmp_path), *SHORT)

    trace = find_trace("synthetic").test.head(40)
    path = tmp_path / "trace.npz"
    save_routing(path, trace)
    load_routing(path)
    arrays = dict(np.load(path))
    np.savez(path, **(arrays | {"experts": arrays["experts"] + 40}))
    message = error("--workload", path)
    assert str(path) in message and "0 .. 31" in message.replace("0..31", "0 .. 31")


def test_an_unknown_domain_is_refused(capsys):
    assert evaluate.main(["expert_cashing"]) == 2
    assert "request_scheduling, expert_caching" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the real model


@pytest.fixture
def small_model(monkeypatch, tmp_path):
    """Makes the models in the shape of a trace small, and keeps their files in a folder on a disk."""
    from schedlab.real_backend import experts

    build = experts.build_olmoe
    monkeypatch.setattr(experts, "build_olmoe", lambda **sizes: build(**sizes | {"hidden": 64, "intermediate": 64}))
    return ["--workload", "synthetic", "--folder", str(tmp_path)]


def test_calibrate_evaluate_deploy_on_the_real_model(tmp_path, capsys, small_model, monkeypatch):
    from schedlab.envs.expert_caching.spec import CostModel

    cost, out = tmp_path / "cost.json", tmp_path / "out"
    assert calibrate.main(["experts", *small_model, "--tokens", "110", "--repeats", "1", "--out", str(cost)]) == 0
    assert "held_out" in capsys.readouterr().out
    assert CostModel.load(cost).load_s > 0

    real = [*small_model, "--window", "12", "--cost-model", str(cost)]
    argv = ["expert_caching", *real, "--seeds", "1", "--backend", "experts", "--objective", "tokens_per_s"]
    assert evaluate.main([*argv, "--policies", "lru", "affinity_prefetch", "belady", "--out", str(out)]) == 0
    assert "on experts (wall" in capsys.readouterr().out
    assert evaluate.main(["--validate", str(out)]) == 0

    deployed = ["ema_95", "--backend", "experts", *real]
    assert deploy.main(deployed) == 0
    assert "fallbacks to LRU on demand: 0" in capsys.readouterr().out

    class Broken:
        name, is_oracle = "broken", False

        def reset(self, state):
            pass

        def decide(self, state, decision):
            raise ValueError("scores are not finite")

    find = expert_caching.find_contender

    def find_broken(name, base, trace):
        found = find("lru" if name == "broken" else name, base, trace)
        return replace(found, name="broken", make=lambda workload: Broken()) if name == "broken" else found

    monkeypatch.setattr(expert_caching, "find_contender", find_broken)
    assert deploy.main(["broken", *deployed[1:], "--out", str(tmp_path / "deployed")]) == 0
    printed = capsys.readouterr().out
    assert "raised" in printed and "fallbacks to LRU on demand: 0" not in printed
    assert evaluate.main(["--validate", str(tmp_path / "deployed")]) == 0
    assert "needs to know the future" in error_of_deploy(capsys, "belady", "--backend", "experts", *small_model)


def error_of_deploy(capsys, *argv):
    assert deploy.main([str(a) for a in argv]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]
