"""`evaluate`, `deploy`, `calibrate` and `fidelity` with task graphs on real cores."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
import torch

from schedlab.agents.checkpoint import save_checkpoint
from schedlab.agents.networks import PointerNetwork
from schedlab.agents.soc_dag import ENV_ID
from schedlab.envs.core.results import read_results
from schedlab.envs.soc_dag.spec import SocDagSpec, uniform_soc
from schedlab.envs.soc_dag.table import FEATURE_VERSION, NUM_CANDIDATE, NUM_CONTEXT
from schedlab.experiments import calibrate, deploy, evaluate, fidelity
from schedlab.experiments.fidelity_threads import verdict
from schedlab.real_backend.threads_kernels import KERNELS
from schedlab.real_backend.threads_programs import KernelCosts

two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


@pytest.fixture
def costs(tmp_path):
    path = tmp_path / "costs.json"
    KernelCosts(16, ("big", "little"), {kernel: (20.0, 40.0) for kernel in KERNELS}, name="given").save(path)
    return path


def refused(capsys, command, *argv):
    assert command.main([*map(str, argv)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_evaluate_on_cores_can_be_checked_again(tmp_path, costs, capsys):
    out = tmp_path / "out"
    argv = ["soc_dag", "--backend", "threads", "--workload", "cholesky_4", "--tile", "16", "--cost-model", str(costs)]
    argv += ["--policies", "eft", "late_rank", "heft", "--objective", "makespan", "--seeds", "2", "--out", str(out)]
    assert evaluate.main(argv) == 0
    assert "on threads (wall clock)" in capsys.readouterr().out.replace("\n", " ")
    frame = read_results(out / "results.csv")
    assert set(frame["clock"]) == {"wall"} and {"makespan", "decision_share"} <= set(frame["metric"])
    assert len(frame["policy"].unique()) == 3 and "energy" not in set(frame["metric"])
    assert evaluate.main(["--validate", str(out)]) == 0

    schedule = next((out / "schedules").glob("*_eft_*.npz"))
    with np.load(schedule) as data:
        arrays = dict(data)
    arrays["start"][-1] -= 1e6  # before its predecessors
    np.savez_compressed(schedule, **arrays)
    assert evaluate.main(["--validate", str(out)]) == 1


def test_deploy_shows_the_policy_beside_rules(costs, capsys):
    argv = ["late_rank", "--backend", "threads", "--workload", "mix_2", "--window", "4", "--gap", "300"]
    argv += ["--tile", "16", "--cost-model", str(costs)]
    assert deploy.main(argv) == 0
    text = capsys.readouterr().out
    assert "late_srpt" in text and "heft_rt" in text
    assert "fallbacks to earliest finish time: 0 (0 raised, 0 invalid, 0 timeout)" in text


@pytest.mark.parametrize("is_broken", [False, True])
def test_deploy_a_checkpoint(is_broken, tmp_path, costs, capsys):
    """A learned policy runs on the cores; one whose logits are not finite falls back, and that is said."""
    torch.manual_seed(0)
    network = PointerNetwork(NUM_CONTEXT, NUM_CANDIDATE, "deepsets", 16)
    if is_broken:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=1e30)  # finite, and its logits are not
    spec = SocDagSpec(uniform_soc(2))
    config = {"env_id": ENV_ID, "spec": spec.to_dict(), "feature_version": FEATURE_VERSION}
    save_checkpoint(tmp_path / "mine", network, config, with_onnx=False)
    argv = [str(tmp_path / "mine"), "--backend", "threads", "--workload", "cholesky_4", "--tile", "16"]
    out = tmp_path / "out"
    assert deploy.main([*argv, "--cost-model", str(costs), "--out", str(out)]) == 0
    said = re.search(r"fallbacks to earliest finish time: (\d+) \((\d+) raised", capsys.readouterr().out)
    assert said and (int(said[1]) > 0) == (int(said[2]) > 0) == is_broken
    assert {"decision_p50_us", "decision_share"} <= set(read_results(out / "results.csv")["metric"]) or is_broken
    assert evaluate.main(["--validate", str(out)]) == 0


def test_what_is_refused(costs, capsys, tmp_path):
    evaluate_threads = (evaluate, "soc_dag", "--backend", "threads", "--cost-model", costs, "--tile", "16")
    assert "no jobs called 'random'" in refused(capsys, *evaluate_threads)
    assert "makes its own" in refused(capsys, *evaluate_threads, "--workload", "lu_3", "--noise", "0.1")
    assert "what they draw" in refused(capsys, *evaluate_threads, "--workload", "lu_3", "--objective", "energy")
    assert "Give --tile 16" in refused(capsys, *evaluate_threads[:-1], "32", "--workload", "lu_3")
    assert "at least one" in refused(capsys, calibrate, "threads", "--big", 0, "--little", 0)
    assert "repeats is 0" in refused(capsys, calibrate, "threads", "--repeats", 0)
    assert "PEs on" in refused(capsys, calibrate, "threads", "--big", 4096, "--tile", 8)
    assert "as in cholesky_8@256" in refused(capsys, fidelity, "threads", "--graphs", "cholesky_8")
    assert "Did you mean 'heft'" in refused(capsys, fidelity, "threads", "--policies", "hefd")
    assert "repeats" in refused(capsys, fidelity, "threads", "--repeats", 0)
    for command, argv in ((deploy, ["agent_rollout_8"]), (evaluate, ["soc_dag", "--policies", "agent_rollout_8"])):
        message = refused(capsys, command, *argv, "--backend", "threads", "--cost-model", costs)
        assert "'agent_rollout_8' runs in the simulator only" in message


@two_cores
def test_calibrate_writes_what_evaluate_reads(tmp_path, capsys):
    path = tmp_path / "new.json"
    assert calibrate.main(["threads", "--tile", "16", "--repeats", "3", "--out", str(path)]) == 0
    text = capsys.readouterr().out
    assert "GEMM" in text and "hand-over" in text and "held_out" in text
    costs = KernelCosts.load(path)
    assert costs.tile == 16 and set(costs.times_us) == set(KERNELS)
    argv = ["soc_dag", "--backend", "threads", "--workload", "flow_12", "--tile", "16", "--cost-model", str(path)]
    assert evaluate.main([*argv, "--policies", "met", "--seeds", "1"]) == 0


@two_cores
def test_fidelity_in_small(tmp_path, capsys):
    path = tmp_path / "threads.json"
    argv = ["threads", "--graphs", "cholesky_4@16", "mix_2x3@16", "--policies", "eft", "met", "heft", "--repeats", "2"]
    assert fidelity.main([*argv, "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "largest residual: cholesky" in text and "short tasks" in text and "wrong" not in text
    content = json.loads(path.read_text())
    assert len(content["rows"]) == 6 and content["verdict"]["problems"] == []
    for row in content["rows"]:
        assert len(row["latency_us"]) == len(row["corrected_us"]) == 2 and row["residual"] < 1e-13
        assert row["error"] == pytest.approx(row["simulator"] / row["engine"] - 1)
    assert set(content["calibration"]) == {"16"}


def test_the_verdict_tells_long_tasks_from_short_ones():
    def row(graph, policy, engine, simulator, is_long):
        return {
            "graph": graph,
            "policy": policy,
            "engine": engine,
            "simulator": simulator,
            "error": simulator / engine - 1,
            "run_errors": [simulator / engine - 1] * 2,
            "own_errors": [0.01, -0.01],
            "raw_errors": [0.5, -0.5],
            "spread": 0.001,
            "is_long": is_long,
            "task_us": 300.0 if is_long else 80.0,
            "residual": 1e-16,
            "problems": [],
        }

    rows = [row("lu_4@256", p, 100.0 + i, 103.0 + i, True) for i, p in enumerate(("a", "b", "c"))]
    rows += [row("qr_4@64", "a", 100.0, 90.0, False), row("qr_4@64", "b", 120.0, 80.0, False)]
    found = verdict(rows, repeats=4)
    assert found["long"]["median_error"] == pytest.approx(0.03, rel=0.02)
    assert found["short"]["median_error"] == pytest.approx((0.1 + 1 / 3) / 2)
    assert found["ranks"]["lu_4@256"] == {"kendall_tau": 1.0, "same_sign": 1.0, "clear_pairs": 3}
    assert found["ranks"]["qr_4@64"] == {"kendall_tau": -1.0, "same_sign": 0.0, "clear_pairs": 1}
    assert set(found["residual"]) == {"lu", "qr"}
