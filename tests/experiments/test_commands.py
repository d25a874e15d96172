"""Each command for a short run, in this process; and that its errors are one line and leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from schedlab.agents.checkpoint import save_checkpoint
from schedlab.agents.networks import PointerNetwork
from schedlab.envs.core import InputError
from schedlab.envs.core.results import read_results
from schedlab.envs.request_scheduling.spec import CostModel, RequestSchedulingSpec
from schedlab.envs.request_scheduling.table import FEATURE_VERSION, NUM_CANDIDATE, NUM_CONTEXT
from schedlab.experiments import bench, cli, deploy, evaluate, fidelity, policies, report, train
from schedlab.experiments.calibrate import main as calibrate_main
from schedlab.experiments.demo import main as demo_main
from schedlab.experiments.presets import PRESETS
from schedlab.experiments.scenario import ScaledPolicy, build_scenario

SHORT = ["--workload", "synthetic", "--window", "40", "--seeds", "2"]
SMALL_ENGINE = ["--workload", "synthetic", "--window", "6", "--length-scale", "64"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SCHEDLAB_OFFLINE", "1")
    monkeypatch.setenv("SCHEDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SCHEDLAB_DATA", raising=False)
    torch.set_num_threads(1)


@pytest.fixture
def checkpoint(tmp_path):
    """Writes an untrained checkpoint; keyword arguments change its config."""

    def write(name="agent", encoder="deepsets", context=NUM_CONTEXT, **changes):
        network = PointerNetwork(context, NUM_CANDIDATE, encoder=encoder, hidden=16)
        config = {"env_id": policies.ENV_ID, "spec": RequestSchedulingSpec().to_dict()}
        config |= {"feature_version": FEATURE_VERSION, **changes}
        return str(save_checkpoint(tmp_path / name, network, config, with_onnx=encoder != "deepsets"))

    return write


@pytest.fixture
def cost(tmp_path):
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({"name": "by-hand", "coefficients_s": [5e-3, 1e-4, 2e-4, 1e-6, 1e-7, 1e-7, 1e-3]}))
    return str(path)


def error_of(capsys, main, *argv):
    assert main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1]


# ------------------------------------------------------------------------------------------------- schedlab


def test_envs_and_help(capsys):
    assert cli.main(["envs"]) == 0
    assert "schedlab/RequestScheduling-v0" in capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    assert cli.main([]) == 2
    capsys.readouterr()
    assert "Did you mean 'evaluate'" in error_of(capsys, cli.main, "evalute")


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "envs"])
def test_every_command_teaches(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"schedlab {name}" in out and "xample" in out
    assert "--seed" in out or name == "report"


def test_help_is_light():
    heavy = "torch transformers pandas matplotlib stable_baselines3 onnxruntime scipy numba"
    code = (
        "import sys, schedlab.experiments.cli as cli\n"
        "try: cli.main(['evaluate', '--help'])\nexcept SystemExit: pass\n"
        f"print('LOADED', *[m for m in {heavy.split()} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1].split() == ["LOADED"]


# ------------------------------------------------------------------------------------------------- evaluate


def test_a_reader_that_leaves_ends_the_command_quietly():
    command = f"{sys.executable} -m schedlab.experiments.cli envs"
    run = subprocess.run(
        ["bash", "-c", f"{{ sleep 0.5; {command}; echo $? >&2; }} | true"], capture_output=True, text=True, check=True
    )
    assert run.stderr.split() == [str(cli.CUT_OFF)]


def test_evaluate_resume_validate_report(tmp_path, capsys, checkpoint):
    agent, out = checkpoint(), tmp_path / "out"
    argv = ["request_scheduling", "--policies", "fcfs", agent, *SHORT, "--out", str(out)]
    assert evaluate.main([*argv, "--true-lengths"]) == 0
    printed = capsys.readouterr().out
    assert "mean_e2e_s" in printed and "max_wait_s" in printed and "(oracle)" in printed and "*" in printed
    frame = read_results(out / "results.csv")
    assert set(frame["policy"]) == {"fcfs", agent, "fcfs with true lengths", f"{agent} with true lengths"}
    assert set(frame["seed"]) == {0, 1}
    assert {"decision_p50_us", "decision_p99_us", "max_wait_s"} <= set(frame["metric"])

    assert "--resume" in error_of(capsys, evaluate.main, *argv)
    # killed in the middle of a run: the half run goes, the others stay, the missing ones are made again
    path = out / "results.csv"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:-40]) + lines[-40][:20])
    kept = path.read_text().splitlines()[: len(lines) - 80]
    assert evaluate.main([*argv, "--true-lengths", "--resume"]) == 0
    again = read_results(path)
    assert path.read_text().splitlines()[: len(kept)] == kept
    simulated = frame[~frame["metric"].str.startswith("decision")].reset_index(drop=True)
    same = again[~again["metric"].str.startswith("decision")].reset_index(drop=True)
    assert simulated.equals(same)
    before = path.read_bytes()
    assert evaluate.main([*argv, "--true-lengths", "--resume"]) == 0  # nothing left to do
    assert path.read_bytes() == before

    assert evaluate.main(["--validate", str(out)]) == 0
    capsys.readouterr()
    path.write_text(whole.replace("mean_e2e_s,", "mean_e2e_s,1", 1))
    assert evaluate.main(["--validate", str(out)]) == 1
    assert "mean_e2e_s" in capsys.readouterr().out
    path.write_bytes(before)

    assert report.main([str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.split("<body>")[1]
    assert agent.rsplit("/", 1)[1] in page


def test_seeds_are_paired_and_differ():
    scenario = build_scenario("synthetic", requests=50)
    first, again, other = scenario.draw(3), scenario.draw(3), scenario.draw(4)
    for name in ("arrival_s", "prompt_tokens", "predicted_output_tokens", "slo_class"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.prompt_tokens, other.prompt_tokens)
    double = scenario.draw(3, load=2.2)
    np.testing.assert_allclose(double.arrival_s * 2, first.arrival_s)


def test_a_changed_engine_or_agent_is_not_mixed_in(tmp_path, capsys, checkpoint):
    agent, out = checkpoint(), tmp_path / "out"
    argv = ["--policies", agent, "--workload", "synthetic", "--window", "20", "--seeds", "1", "--out", str(out)]
    assert evaluate.main(argv) == 0
    torch.manual_seed(1)
    checkpoint()  # other weights in the same folder
    assert "other weights" in error_of(capsys, evaluate.main, *argv, "--resume")
    cells = json.loads((out / "evaluate.json").read_text())
    next(iter(cells.values()))["spec"]["engine"]["kv_blocks"] = 1
    (out / "evaluate.json").write_text(json.dumps(cells))
    assert "another engine" in error_of(capsys, evaluate.main, *argv, "--resume")


def test_errors_are_clear_and_leave_nothing(tmp_path, capsys, checkpoint):
    out = tmp_path / "out"

    def error(*argv):
        message = error_of(capsys, evaluate.main, *argv, "--out", out)
        assert not out.exists()
        return message

    message = error("--policies", "fcsf", *SHORT)
    assert "Did you mean 'fcfs'" in message and "sarathi_512" in message
    assert "azure_conv" in error("--workload", "azure_con")
    assert "8192" in error("--policies", "sarathi_16384", *SHORT)
    assert "256" in error("--policies", "knobs(srpt,1024,999)", *SHORT)
    assert "--window" in error("--workload", "synthetic", "--window", "1000000")
    assert "load" in error("--workload", "synthetic", "--load", "-1")
    assert "named twice" in error("--policies", "fcfs", "fcfs", *SHORT)
    assert "'toy'" in error("--policies", checkpoint("a", env_id="toy"), *SHORT)
    assert "feature_version" in error("--policies", checkpoint("b", feature_version=0), *SHORT)
    assert "context_size" in error("--policies", checkpoint("c", context=5), *SHORT)
    assert "config.json" in error("--policies", str(tmp_path), *SHORT)
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,-5,4\n")
    assert f"{trace}:2" in error("--workload", str(trace))
    assert "'speed'" in error("--metrics", "speed", "--policies", "fcfs", *SHORT)


def test_no_shipped_agent(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(policies, "SHIPPED", tmp_path / "none")
    assert "no shipped agent" in error_of(capsys, evaluate.main, "--policies", "agent", *SHORT)


def test_knobs_are_searched_on_other_requests(monkeypatch):
    scenario = build_scenario("synthetic", requests=30, part="test")
    windows = scenario.training_windows(1)
    from schedlab.experiments import headroom

    few = headroom.knob_rules()[:3]
    monkeypatch.setattr(headroom, "knob_rules", lambda *_: few)
    rule = policies.search_knobs(scenario.spec, "mean_e2e_s", windows)
    assert rule.name == "knobs" and "searched" in rule.source
    best = max(headroom.score(policies._Cell(scenario.spec, "mean_e2e_s"), r, windows) for r in few)
    assert headroom.score(policies._Cell(scenario.spec, "mean_e2e_s"), rule, windows) == best
    with pytest.raises(InputError, match="needs requests"):
        policies.find_policy("knobs", scenario.spec)


def test_attention_agent_runs_by_onnx(checkpoint):
    policy = policies.find_policy(checkpoint(encoder="attention"), build_scenario("synthetic").spec)
    assert type(policy).__name__ == "TablePolicy"


# -------------------------------------------------------------------------------------- small and full size


def test_small_engine_in_full_size_units():
    cost = CostModel("by-hand", (5e-3, 1e-4, 2e-4, 1e-6, 1e-7, 1e-7, 1e-3))
    scenario = build_scenario("synthetic", requests=40, cost=cost, length_scale=16)
    spec, shown, scale = scenario.spec, scenario.policy_spec, scenario.scale
    assert spec.engine.max_batch_tokens == 512 and shown.engine.max_batch_tokens == 8192
    assert shown.engine.kv_tokens == pytest.approx(scenario.full_spec.engine.kv_tokens, rel=0.01)
    assert shown.slo_classes[0].ttft_s == pytest.approx(scenario.full_spec.slo_classes[0].ttft_s)

    seen = {}
    units = {"arrival_gap_s": 1 / scale.seconds, "prefill_tokens": 16, "query_context": 256}
    units |= {"decode_steps": 16, "decode_context": 256}

    class Spy:
        name, is_oracle = "spy", False

        def reset(self, state):
            pass

        def decide(self, state, decision):
            row = state.requests[state.waiting[0]]
            seen.update(prompt=int(row["prompt_tokens"]), slo=float(row["ttft_slo_s"]))
            seen["default"] = int(decision.levers[0]["prefill_tokens"])
            seen["means"] = [float(state.engine[0][f"mean_{name}"]) for name in units]
            decision.levers[0]["prefill_tokens"] = 500

    from schedlab.envs.request_scheduling.sim import Simulator

    simulator, workload = Simulator(spec), scenario.draw(0)
    simulator.reset(workload)
    simulator.sim.state.engine[0]["mean_arrival_gap_s"] = 7.0  # there is none yet
    policy = ScaledPolicy(Spy(), scale)
    policy.reset(simulator.state())
    decision = simulator.default_decision()
    policy.decide(simulator.state(), decision)
    assert seen == {
        "prompt": 16 * workload.prompt_tokens[0],
        "slo": pytest.approx(scenario.full_spec.slo_classes[0].ttft_s),
        "default": 8192,
        "means": pytest.approx([simulator.state().engine[0][f"mean_{n}"] * k for n, k in units.items()]),
    }
    assert decision.levers[0]["prefill_tokens"] == 32  # 500 / 16, rounded up


# ---------------------------------------------------------------------------------------------- real engine


def test_evaluate_on_the_engine(tmp_path, capsys, cost):
    out = tmp_path / "out"
    argv = ["--policies", "sarathi_512", "srpt", *SMALL_ENGINE, "--seeds", "1", "--backend", "hf", "--out", str(out)]
    assert evaluate.main([*argv, "--cost-model", cost]) == 0
    assert "on hf (cpu clock)" in capsys.readouterr().out
    frame = read_results(out / "results.csv")
    assert set(frame["backend"]) == {"hf"} and set(frame["clock"]) == {"cpu"}
    assert "decision_share" in set(frame["metric"])
    assert evaluate.main([*argv[:1], "fcfs", *argv[2:], "--resume"]) == 0  # with the cost model of the runs there
    assert evaluate.main(["--validate", str(out)]) == 0
    assert error_of(capsys, evaluate.main, *argv, "--cost-model", tmp_path / "none.json", "--resume")


def test_deploy_falls_back(tmp_path, capsys, cost, checkpoint, monkeypatch):
    from schedlab.agents.request_scheduling import CompiledPolicy

    agent = checkpoint()
    argv = [agent, *SMALL_ENGINE, "--cost-model", cost]
    assert deploy.main(argv) == 0
    printed = capsys.readouterr().out
    assert "fcfs" in printed and "sarathi_512" in printed and "fallbacks to first come first served: 0" in printed

    def broken(self, state, decision):
        raise ValueError("logits are not finite")

    monkeypatch.setattr(CompiledPolicy, "decide", broken)
    assert deploy.main([*argv, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "fallbacks to first come first served: 0" not in printed and "raised" in printed
    assert evaluate.main(["--validate", str(tmp_path / "out")]) == 0
    assert "no policy" in error_of(capsys, deploy.main, "nobody", *SMALL_ENGINE)


def test_calibrate_and_fidelity(tmp_path, capsys):
    path = tmp_path / "cost.json"
    argv = ["hf", "--iterations", "60", "--repeats", "1", "--length-scale", "64", "--workload", "synthetic"]
    assert calibrate_main([*argv, "--out", str(path)]) == 0
    assert "held_out" in capsys.readouterr().out
    assert min(CostModel.load(path).coefficients_s) >= 0
    assert "60 iterations" in error_of(capsys, calibrate_main, *argv[:2], "3", *argv[3:])

    figures = tmp_path / "fidelity.json"
    argv = ["hf", "--policies", "fcfs", "srpt", *SMALL_ENGINE, "--repeats", "2", "--cost-model", str(path)]
    assert fidelity.main([*argv, "--json", str(figures)]) == 0
    assert "Kendall tau" in capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert set(found["runs"]) == {"burst", "poisson"} == set(found["ranks"])
    assert set(found["runs"]["burst"]) == {"fcfs", "srpt"}


def test_ranks_by_hand():
    def row(simulator, engine, spread):
        return {"m": {"simulator": simulator, "engine": engine, "spread": spread}}

    rows = {"a": row(1, 1, 0.1), "b": row(2, 2, 0.1), "c": row(4, 2.1, 0.1), "d": row(3, 8, 0.1)}
    found = fidelity.ranks(rows, "m", repeats=1)
    assert found["clear_pairs"] == 5  # b and c are within the noise
    assert found["same_sign"] == pytest.approx(4 / 5)
    assert found["kendall_tau"] == pytest.approx((5 - 1) / 6)


# ------------------------------------------------------------------------------------- train, bench, demo


def test_train_then_evaluate(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    argv = ["request_scheduling/tiny", "--out", str(run), "--steps", "1", "--clone-steps", "1600"]
    assert train.main(argv) == 0
    assert "final" in capsys.readouterr().out
    assert "--resume" in error_of(capsys, train.main, *argv)
    assert train.main([*argv, "--resume"]) == 0
    assert evaluate.main(["--policies", "fcfs", str(run), *SHORT]) == 0
    assert "request_scheduling/tiny" in error_of(capsys, train.main, "nothing")
    assert train.main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in PRESETS)


def test_bench(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert bench.main(["request_scheduling", "--quick", "--json", str(path)]) == 0
    rows = {row["name"].removeprefix("request_scheduling/"): row for row in json.loads(path.read_text())}
    fixed = ("requests_per_cpu_s", "iterations_per_cpu_s", "vector_env_iterations_per_cpu_s")
    for name in (*fixed, "ppo_decisions_per_s", "decision_p99_us"):
        assert {"name", "value", "unit", "reference", "reference_value", "ratio"} <= set(rows[name])
        assert rows[name]["value"] > 0


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    out = tmp_path / "demo"
    assert demo_main(["--quick", "--out", str(out)]) == 0
    assert (out / "report.html").exists()
    assert evaluate.main(["--validate", str(out)]) == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("mine")
    assert "not the demo's" in error_of(capsys, demo_main, "--out", other)
    assert (other / "precious").exists()
