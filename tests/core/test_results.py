from __future__ import annotations

import io
import os

import numpy as np
import pytest
from rich.console import Console

from schedlab.envs.core import InputError
from schedlab.envs.core.results import (
    COLUMNS,
    ResultsFile,
    RunKey,
    atomic_folder,
    atomic_path,
    best_policies,
    bootstrap_ci,
    format_value,
    paired_difference,
    print_summary,
    read_results,
    summary_table,
)

UNITS = {"latency_s": "s", "goodput": "share"}


def key(policy="fcfs", seed=0, **changes) -> RunKey:
    fields = dict(domain="d", workload="w", instance="i", policy=policy, backend="sim", clock="model", seed=seed)
    return RunKey(**(fields | changes))


def test_rows_are_tidy_and_read_back_exactly(tmp_path):
    results = ResultsFile(tmp_path / "new" / "results.csv")
    results.append(key("a,b"), {"latency_s": 0.1 + 0.2, "goodput": float("nan")}, UNITS)
    results.append(key("nan", seed=1), {"latency_s": np.float64(2)}, UNITS)
    frame = results.read()
    assert tuple(frame.columns) == COLUMNS
    assert frame["policy"].tolist() == ["a,b", "a,b", "nan"]
    assert frame["value"][0] == 0.1 + 0.2 and np.isnan(frame["value"][1]) and frame["value"][2] == 2.0
    assert frame["seed"].tolist() == [0, 0, 1]
    text = results.path.read_text().splitlines()
    assert text[0] == ",".join(COLUMNS)
    assert text[3] == 'd,w,i,"a,b",sim,model,0,num_metrics,2,count'


def test_a_file_cut_at_any_byte_resumes_to_the_same_file(tmp_path):
    path = tmp_path / "results.csv"
    runs = [
        (key(policy, seed), {"latency_s": seed / 3, "goodput": 0.5}) for policy in ("fcfs", "srpt") for seed in (0, 1)
    ]
    results = ResultsFile(path)
    for run, metrics in runs:
        results.append(run, metrics, UNITS)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        resumed = ResultsFile(path)
        done = resumed.done_runs()
        assert done == {run for run, _ in runs[: len(done)]}
        assert (resumed.dropped is None) == (path.read_bytes() == whole[:size])
        for run, metrics in runs:
            if run not in done:
                resumed.append(run, metrics, UNITS)
        assert path.read_bytes() == whole


def test_append_refuses(tmp_path):
    results = ResultsFile(tmp_path / "results.csv")
    results.append(key(), {"latency_s": 1.0}, UNITS)
    with pytest.raises(InputError, match="already there"):
        results.append(key(), {"latency_s": 1.0}, UNITS)
    with pytest.raises(InputError, match="have no unit"):
        results.append(key(seed=1), {"other": 1.0}, UNITS)
    with pytest.raises(InputError, match="at least one"):
        results.append(key(seed=1), {}, UNITS)
    with pytest.raises(InputError, match="--resume"):
        ResultsFile(results.path, resume=False)
    with pytest.raises(InputError, match="policy is"):
        key("two\nlines")
    with pytest.raises(InputError, match="policy is"):
        key("")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "results.csv:1: columns are"),
        ("{head}d,w,i,p,sim,model,0,m,fast,s\n", "results.csv:2: not a results row"),
        ("{head}d,w,i,p,sim,model,0,m\n", "results.csv:2: not a results row"),
        ("{head}d,w,i,p,sim,model,0,m,1,s\nd,w,i,p,sim,model,1,m,1,s\n", "results.csv:3: .* no closing"),
        ("{head}d,w,i,p,sim,model,0,m,1,s\nd,w,i,p,sim,model,0,num_metrics,2,count\n", "results.csv:3: .* says 2"),
    ],
)
def test_a_file_that_is_not_ours_is_left_alone(tmp_path, text, message):
    path = tmp_path / "results.csv"
    text = text.replace("{head}", ",".join(COLUMNS) + "\n")
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        ResultsFile(path)
    assert path.read_text() == text


def test_read_results_refuses(tmp_path):
    with pytest.raises(InputError, match="not a results file"):
        read_results(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("seed,value\n1,2\n")
    with pytest.raises(InputError, match="are missing"):
        read_results(tmp_path / "other.csv")


def test_run_ids_are_readable_and_distinct():
    assert key().run_id.startswith("w_i_fcfs_sim_s0_")
    ids = {key().run_id, key("runs/a").run_id, key("runs-a").run_id, key(clock="wall").run_id, key(domain="e").run_id}
    assert len(ids) == 5
    path = key("/".join(["long"] * 50), workload="../../etc")
    assert "/" not in path.run_id and not path.run_id.startswith(".") and len(path.run_id) < 200


def test_atomic_path_leaves_nothing_half_written(tmp_path):
    target = tmp_path / "sub" / "file.npz"
    with pytest.raises(KeyError), atomic_path(target) as path:
        path.write_text("half")
        raise KeyError
    assert list(target.parent.iterdir()) == []
    with atomic_path(target) as path:
        np.savez(path, a=np.arange(3))
    assert [p.name for p in target.parent.iterdir()] == ["file.npz"]
    assert np.load(target)["a"].tolist() == [0, 1, 2]


def test_bootstrap_interval():
    low, high = bootstrap_ci([1.0, 1.0, 1.0])
    assert low == high == 1.0
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = bootstrap_ci(values)
    standard_error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * standard_error, abs=0.3 * standard_error)
    assert high == pytest.approx(values.mean() + 1.96 * standard_error, abs=0.3 * standard_error)
    assert (low, high) == bootstrap_ci([*values, float("nan")])
    assert bootstrap_ci(values, 0.5)[0] > low
    assert np.isnan(bootstrap_ci([3.0])).all() and np.isnan(bootstrap_ci([])).all()


@pytest.fixture
def frame(tmp_path):
    results = ResultsFile(tmp_path / "results.csv")
    noise = [0.0, 5.0, -3.0, 1.0]
    for policy, shift in [("fcfs", 2.0), ("srpt", 1.0), ("true-lengths", 0.0)]:
        for seed, extra in enumerate(noise[: 3 if policy == "srpt" else 4]):
            results.append(key(policy, seed), {"latency_s": 10 + shift + extra, "goodput": shift / 10}, UNITS)
    return results.read()


def test_differences_are_paired_by_seed(frame):
    assert paired_difference(frame, "srpt", "fcfs", "latency_s") == (-1.0, -1.0, -1.0, 3)
    relative = paired_difference(frame, "srpt", "fcfs", "latency_s", relative=True)
    assert relative.mean == pytest.approx(-(1 / 12 + 1 / 17 + 1 / 9) / 3)
    with pytest.raises(InputError, match="no run of 'latency_s' is shared"):
        paired_difference(frame, "srpt", "lru", "latency_s")


def test_summary_and_best(frame):
    summary = summary_table(frame)
    row = summary[(summary.policy == "srpt") & (summary.metric == "latency_s")].iloc[0]
    assert row["mean"] == pytest.approx(11 + 2 / 3) and row["num_seeds"] == 3
    assert row["low"] < row["mean"] < row["high"]
    direction = {"latency_s": True, "goodput": False}
    assert best_policies(summary, direction, {"true-lengths"}) == {"latency_s": {"srpt"}, "goodput": {"fcfs"}}
    assert best_policies(summary, {"latency_s": True}) == {"latency_s": {"true-lengths"}}
    assert best_policies(summary, {"latency_s": None}) == {}


def test_printed_table_marks_the_best_row_that_is_no_oracle(frame):
    out = io.StringIO()
    print_summary(
        summary_table(frame),
        {"latency_s": True},
        oracles={"true-lengths"},
        console=Console(file=out, width=120, color_system=None),
    )
    lines = {line.split()[1]: line for line in out.getvalue().splitlines() if len(line.split()) > 2}
    assert "11.67 [" in lines["srpt"] and "] *" in lines["srpt"]
    assert "*" not in lines["fcfs"] and "*" not in lines["true-lengths"]
    assert "(oracle)" in lines["true-lengths"]
    assert "[share]" in out.getvalue() and "w, i on sim (model clock), 4 seeds" in out.getvalue()


def test_format_value():
    shown = [format_value(v) for v in (0, 5.3512, 0.012344, 66.94, 12345.6, 1e-5, float("nan"), -0.5, 1e7)]
    assert shown == ["0", "5.351", "0.01234", "66.94", "12346", "1e-05", "-", "-0.5000", "1e+07"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for text in ("old", "new"):
        with atomic_folder(folder) as temporary:
            (temporary / text).write_text(text)
    assert [path.name for path in folder.iterdir()] == ["new"]
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as temporary:
        (temporary / "half").write_text("")
        raise ZeroDivisionError

    rename, renamed = os.rename, []

    def fails_at_the_second(source, target):
        renamed.append(target)
        if len(renamed) == 2:
            raise OSError("no room")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_at_the_second)
    with pytest.raises(OSError, match="no room"), atomic_folder(folder) as temporary:
        (temporary / "other").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and (folder / "new").read_text() == "new"
