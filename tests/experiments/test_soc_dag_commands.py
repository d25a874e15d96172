"""`schedlab evaluate soc_dag`: what it prints and writes, that it can be re-checked, and what it refuses."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from schedlab.envs.core.results import read_results
from schedlab.experiments import evaluate, report, soc_dag_dvfs

DATA = Path(os.environ.get("SCHEDLAB_DATA", "absent"))
needs_data = pytest.mark.skipif(not (DATA / "task_dags").is_dir(), reason="no task_dags/ in SCHEDLAB_DATA")


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("SCHEDLAB_DATA", raising=False)


def error_of(capsys, *argv):
    assert evaluate.main(["soc_dag", *map(str, argv)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_single_graphs_validate_report(tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["soc_dag", "--policies", "eft", "late_srpt", "heft", "peft", "--seeds", "2", "--out", str(out)]
    assert evaluate.main([*argv, "--objective", "makespan"]) == 0
    assert "makespan" in capsys.readouterr().out
    frame = read_results(out / "results.csv")
    assert set(frame["policy"]) == {"eft", "late_srpt", "heft", "peft"} and "energy" not in set(frame["metric"])
    assert evaluate.main(["--validate", str(out)]) == 0
    assert report.main([str(out)]) == 0

    schedule = next((out / "schedules").glob("*_heft_*.npz"))
    with np.load(schedule) as data:
        arrays = dict(data)
    arrays["start"] = arrays["start"] - 1.0  # earlier than its data
    np.savez_compressed(schedule, **arrays)
    capsys.readouterr()
    assert evaluate.main(["--validate", str(out)]) == 1
    assert "schedule" in capsys.readouterr().out


def test_a_stream_with_noise_and_deadlines(tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["soc_dag", "--workload", "cholesky_3", "--gap", "60", "--window", "12", "--noise", "0.3", "--seeds", "2"]
    argv += ["--objective", "deadline", "--policies", "heft_rt", "late_laxity", "--out", str(out)]
    assert evaluate.main(argv) == 0
    assert "lognormal noise 0.3, pull" in " ".join(capsys.readouterr().out.split())
    frame = read_results(out / "results.csv")
    assert "deadline_misses" in set(frame["metric"]) and frame["instance"].str.contains("deadline slack 3").all()
    assert evaluate.main(["--validate", str(out)]) == 0
    late = [frame[frame["metric"] == "deadline_misses"]["value"].mean()]
    for slack in ("1.05", "20"):
        assert evaluate.main([*argv[:-1], str(tmp_path / slack), "--deadline-slack", slack]) == 0
        frame = read_results(tmp_path / slack / "results.csv")
        late.append(frame[frame["metric"] == "deadline_misses"]["value"].mean())
    assert late[1] > late[0] >= late[2] == 0
    assert "slack" in error_of(capsys, *argv[1:-2], "--deadline-slack", "0")


def test_the_agent_with_rollouts(tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["soc_dag", "--workload", "cholesky_3", "--gap", "60", "--window", "6", "--noise", "0.3", "--seeds", "1"]
    assert evaluate.main([*argv, "--policies", "late_srpt", "agent_rollout_4", "--out", str(out)]) == 0
    assert evaluate.main(["--validate", str(out)]) == 0
    assert "1 scenarios" in error_of(capsys, *argv[1:], "--policies", "agent_rollout_1")


def test_hindsight_is_an_oracle(tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["soc_dag", "--workload", "cholesky_3", "--gap", "60", "--window", "6", "--noise", "0.3", "--seeds", "2"]
    assert evaluate.main([*argv, "--policies", "late_srpt", "hindsight", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "hindsight (oracle)" in printed and "late_srpt" in printed
    assert evaluate.main(["--validate", str(out)]) == 0


@needs_data
def test_frequencies_can_be_chosen(tmp_path, capsys):
    """Slack turned into lower frequencies saves energy, and the results say that it was allowed."""
    out = tmp_path / "out"
    argv = ["soc_dag", "--workload", "ds3", "--data-dir", str(DATA), "--gap", "200", "--window", "30", "--seeds", "1"]
    argv += ["--objective", "energy", "--policies", "late_srpt", "slack_reclaiming", "--out", str(out)]
    assert evaluate.main([*argv, "--choose-frequency"]) == 0
    frame = read_results(out / "results.csv")
    energy = frame[frame["metric"] == "energy"].set_index("policy")["value"]
    assert energy["slack_reclaiming"] < 0.95 * energy["late_srpt"]
    assert frame["instance"].str.contains("push, energy, frequencies chosen").all()
    assert evaluate.main(["--validate", str(out)]) == 0


@needs_data
def test_the_table_of_frequencies(capsys, monkeypatch):
    monkeypatch.setenv("SCHEDLAB_DATA", str(DATA))
    assert soc_dag_dvfs.main(soc_dag_dvfs.Config(gaps=(100.0,), jobs=20, seeds=2, generations=1)) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 + 9 and all(line.count("|") == 9 for line in lines)
    assert lines[2].startswith("| 100 | late SRPT | 1 |  |")
    of_srpt, shares = {}, {}
    for line in lines[2:]:
        _, _, name, value, share, *_ = (cell.strip() for cell in line.split("|"))
        of_srpt[name] = float(value.split()[0])
        shares[name] = float(share.split()[0]) if share else None
    assert [share is None for share in shares.values()] == [True] * 3 + [False] * 6
    assert shares["searched on these jobs, with frequencies"] == 1.0
    assert sorted(of_srpt, key=of_srpt.__getitem__)[0] == "searched on these jobs, with frequencies"
    ranked = sorted((name for name in shares if shares[name] is not None), key=lambda name: -shares[name])
    found = [of_srpt[name] for name in ranked]  # means of ratios; the shares are ratios of means
    assert all(later > sooner - 0.01 for sooner, later in pairwise(found))


def test_errors_are_clear(capsys):
    assert "Did you mean 'heft'" in error_of(capsys, "--policies", "hefd")
    assert "cholesky_<tiles>" in error_of(capsys, "--workload", "nothing")
    assert "what its PEs draw" in error_of(capsys, "--objective", "energy")
    assert "socs.json" in error_of(capsys, "--workload", "ds3")
    assert "at least one job" in error_of(capsys, "--window", "0").lower()
