"""Training runs: what they leave behind, and that they go on after a kill."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy import ToyPointerEnv, teacher

from schedlab.agents.checkpoint import load_checkpoint, load_resume
from schedlab.agents.train import CURVE_COLUMNS, TrainConfig, _build_model, _Run, train
from schedlab.envs.core.errors import InputError
from schedlab.envs.core.sb3 import SB3VecEnv

CONFIG = {
    "env_id": "toy",
    "total_steps": 2048,
    "num_envs": 8,
    "hidden": 16,
    "n_steps": 32,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "checkpoint_every": 512,
    "gamma": 0.0,
}


def toy(num_envs, seed):
    env = ToyPointerEnv(num_envs)
    env.reset(seed=seed)
    return env


def rows(folder):
    with (folder / "curve.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_everything(tmp_path):
    scores = iter([1.0, 3.0, 2.0, 2.5])
    seen = []
    result = train(
        TrainConfig(**CONFIG),
        toy,
        tmp_path / "run",
        evaluate=lambda policy: {"score": next(scores)},
        card="# A toy\n",
        progress=seen.append,
    )
    run = tmp_path / "run"
    assert result.decisions == 2048
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["000000001536", "000000002048"]
    record = json.loads((run / "config.json").read_text())
    assert record["config"]["hidden"] == 16
    assert record["versions"]["torch"]
    curve = rows(run)
    assert [int(r["decisions"]) for r in curve] == list(range(256, 2049, 256))
    assert set(curve[0]) == set(CURVE_COLUMNS)
    assert [r["score"] for r in curve if r["score"]] == ["1.0", "3.0", "2.0", "2.5"]
    assert len(seen) == 8
    assert list((run / "tensorboard").iterdir())
    assert load_checkpoint(run / "best").config["decisions"] == 1024
    final = load_checkpoint(result.final, env_id="toy", feature_version=1)
    assert final.card == "# A toy\n"
    assert final.onnx_path.is_file()
    for a, b in zip(final.network.parameters(), result.policy.network.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_resume_goes_on_where_it_was(tmp_path):
    class Killed(Exception):
        pass

    def kill(row):
        if row["decisions"] == 1280:
            raise Killed

    run = tmp_path / "run"
    config = TrainConfig(**CONFIG)
    with pytest.raises(Killed):
        train(config, toy, run, progress=kill)
    with (run / "curve.csv").open("a") as file:
        file.write("1536,0.1")  # half a line
    (run / "checkpoints" / ".000000001536.1.tmp").mkdir()
    saved, values = load_resume(run / "checkpoints" / "000000001024")
    assert values["num_timesteps"] == 1024
    assert any(name.endswith("exp_avg_sq") for name in saved)

    seeds = []

    def recording(num_envs, seed):
        seeds.append(seed)
        return toy(num_envs, seed)

    train(config, recording, run, resume=True)
    assert seeds == [1024]  # other episodes than the first time
    curve = rows(run)
    assert [int(r["decisions"]) for r in curve] == list(range(256, 2049, 256))
    rates = [float(r["learning_rate"]) for r in curve]
    assert rates == pytest.approx([1e-3 * (1 - n / 2048) for n in range(256, 2049, 256)])
    assert load_resume(run / "checkpoints" / "000000002048")[1]["n_updates"] == 8 * 4
    again = train(config, toy, run, resume=True)  # nothing left to do
    assert again.decisions == 2048


def test_restored_state_is_the_saved_state(tmp_path):
    """Optimizer and generators come back bit by bit: saving what was restored gives the same files."""
    config = TrainConfig(**CONFIG)
    train(config, toy, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "000000002048"
    before = (folder / "resume.safetensors").read_bytes(), load_resume(folder)[1]
    model = _build_model(config, SB3VecEnv(toy(8, 0)), 77)
    run = _Run(config, tmp_path / "other", model, None, "")
    run.restore(folder)
    run.saved_at = -1
    run.save_checkpoint()
    copy = tmp_path / "other" / "checkpoints" / "000000002048"
    assert (copy / "resume.safetensors").read_bytes() == before[0]
    assert (copy / "policy.safetensors").read_bytes() == (folder / "policy.safetensors").read_bytes()
    after = load_resume(copy)[1]
    assert {k: v for k, v in after.items() if k != "cpu_s"} == {k: v for k, v in before[1].items() if k != "cpu_s"}


def test_warm_start_and_reference(tmp_path):
    cloning = {"clone_steps": 4096, "clone_rounds": 4, "clone_passes": 4, "clone_lr": 3e-3}
    config = TrainConfig(**{**CONFIG, **cloning, "kl_coef": 0.5, "total_steps": 512})
    result = train(config, toy, tmp_path / "run", teacher=teacher)
    assert result.agreement > 0.6
    assert float(rows(tmp_path / "run")[-1]["kl_reference"]) >= 0.0
    assert load_checkpoint(tmp_path / "run" / "clone").config["agreement_with_teacher"] == result.agreement
    with pytest.raises(InputError, match="no teacher"):
        train(config, toy, tmp_path / "other")


@pytest.mark.parametrize("late_steps", [0, 2048])
def test_rows_lose_sight_of_the_late_context(tmp_path, late_steps):
    """With `late_steps` they saw it first: their weights for it have moved."""
    cloning = {"clone_steps": 2048, "clone_rounds": 4, "clone_lr": 3e-3}
    config = TrainConfig(**{**CONFIG, **cloning, "total_steps": 0}, late_context=(1,), late_steps=late_steps)
    labelled = []
    result = train(
        config, toy, tmp_path / "run", teacher=teacher, progress=lambda row: labelled.append(row["labelled"])
    )
    assert labelled == [512, 1024, 1536, 2048] * (2 if late_steps else 1)
    network = load_checkpoint(result.final).network
    start = _build_model(config, SB3VecEnv(toy(8, 0)), config.seed).policy.network
    moved = (network.encoder.from_context.weight != start.encoder.from_context.weight).any(0)
    assert moved.tolist() == [True, late_steps > 0]
    contexts = torch.tensor([[0.3, -0.8], [0.3, 0.9], [0.4, 0.9]])
    one, other, third = network.encoder.from_early_context(contexts)
    assert torch.equal(one, other) and not torch.equal(other, third)


def test_wrong_use_is_told(tmp_path):
    config = TrainConfig(**{**CONFIG, "total_steps": 0})
    train(config, toy, tmp_path / "run")
    with pytest.raises(InputError, match=r"holds a training run.*--resume"):
        train(config, toy, tmp_path / "run")
    with pytest.raises(InputError, match=r"hidden=16, now it is 32"):
        train(TrainConfig(**{**CONFIG, "total_steps": 0, "hidden": 32}), toy, tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="lr_schedule"):
        TrainConfig(env_id="toy", lr_schedule="cosine")
    with pytest.raises(InputError, match="JSON-able"):
        train(TrainConfig(env_id="toy", spec={"x": object()}), toy, tmp_path / "bad")
    assert not (tmp_path / "bad" / "config.json").exists()


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from toy import ToyPointerEnv
from schedlab.agents.train import TrainConfig, train

def toy(num_envs, seed):
    env = ToyPointerEnv(num_envs)
    env.reset(seed=seed)
    return env

if __name__ == "__main__":
    config = TrainConfig(**{{**{config!r}, "total_steps": 10**9}})
    train(config, toy, {out!r}, resume=True, progress=lambda row: print(int(row["decisions"]), flush=True))
"""


def test_survives_sigkill(tmp_path):
    out = tmp_path / "run"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), config=CONFIG, out=str(out)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    last = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
        first = int(process.stdout.readline())
        assert first == (last // 512) * 512 + 256 if last else first == 256
        while last < first + 700:
            last = int(process.stdout.readline())
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        last = int(rest[-1]) if rest else last
        latest = max((out / "checkpoints").iterdir())
        load_checkpoint(latest)
        last = int(latest.name)
