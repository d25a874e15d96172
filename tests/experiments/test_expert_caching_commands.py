"""The commands for expert caching: what they print and write, that it can be re-checked, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from schedlab.envs.core.results import read_results
from schedlab.envs.expert_caching.workload import load_routing, save_routing
from schedlab.experiments import evaluate, expert_caching, report

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
    trace = expert_caching.find_trace("synthetic")
    assert len(trace.test) + len(trace.training) == 32
    first, again, other = trace.draw(50, 3), trace.draw(50, 3), trace.draw(50, 4)
    np.testing.assert_array_equal(first.experts, again.experts)
    assert not np.array_equal(first.experts, other.experts)
    np.testing.assert_array_equal(first.prior, trace.training.popularity())


def test_the_trace_of_our_own_model_is_there():
    trace = expert_caching.find_trace("moe")
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

    trace = expert_caching.find_trace("synthetic").test.head(40)
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
