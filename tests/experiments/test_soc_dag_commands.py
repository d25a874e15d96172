"""`schedlab evaluate soc_dag`: what it prints and writes, that it can be re-checked, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from schedlab.envs.core.results import read_results
from schedlab.experiments import evaluate, report


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
    assert "lognormal noise 0.3" in capsys.readouterr().out
    assert "deadline_misses" in set(read_results(out / "results.csv")["metric"])
    assert evaluate.main(["--validate", str(out)]) == 0


def test_errors_are_clear(capsys):
    assert "Did you mean 'heft'" in error_of(capsys, "--policies", "hefd")
    assert "cholesky_<tiles>" in error_of(capsys, "--workload", "nothing")
    assert "what its PEs draw" in error_of(capsys, "--objective", "energy")
    assert "socs.json" in error_of(capsys, "--workload", "ds3")
    assert "at least one job" in error_of(capsys, "--window", "0").lower()
