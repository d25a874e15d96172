"""`python -m schedlab.experiments.soc_dag_headroom`: what is measured is kept, and rules once for all agents."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from schedlab.agents.checkpoint import save_checkpoint
from schedlab.agents.networks import PointerNetwork
from schedlab.agents.soc_dag import ENV_ID
from schedlab.envs.soc_dag.spec import SocDagSpec, uniform_soc
from schedlab.envs.soc_dag.table import FEATURE_VERSION, NUM_CANDIDATE, NUM_CONTEXT
from schedlab.experiments import soc_dag_headroom
from schedlab.experiments.soc_dag_presets import teachers
from schedlab.experiments.soc_dag_search import StreamCell, teacher_cells

DATA = Path(os.environ.get("SCHEDLAB_DATA", "nowhere")) / "task_dags"


@pytest.mark.skipif(not DATA.is_dir(), reason="no task_dags/ in SCHEDLAB_DATA")
@pytest.mark.parametrize("table", [["streams"], ["ds3", "--transfers", "push"]])
def test_rules_are_measured_once_for_all_agents(table, tmp_path, capsys):
    torch.manual_seed(0)
    config = {"env_id": ENV_ID, "spec": SocDagSpec(uniform_soc(2)).to_dict(), "feature_version": FEATURE_VERSION}
    network = PointerNetwork(NUM_CONTEXT, NUM_CANDIDATE, hidden=8)
    save_checkpoint(tmp_path / "other", network, config, with_onnx=False)
    out, printed, times = ["--quick", "--out", str(tmp_path / "out")], [], []
    for agent in ([], [], ["--agent", str(tmp_path / "other")]):
        assert soc_dag_headroom.main([*table, *out, *agent]) == 0
        printed.append(capsys.readouterr().out)
        times.append({path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")})
    assert printed[0] == printed[1] != printed[2]
    assert times[0] == times[1]
    assert times[1].items() < times[2].items()
    new = set(times[2]) - set(times[0])
    assert {path.parent.name.split("-")[0] for path in new} == {"agent"}
    assert {path.name for path in new} == {path.name for path in times[0] if path.parent == tmp_path / "out"}


def test_data_that_are_pushed_are_another_cell():
    pulled, pushed = (StreamCell("ds3", "latency", 50.0, transfers=transfers) for transfers in ("pull", "push"))
    assert pulled.name != pushed.name
    soc = uniform_soc(2)
    assert (pulled.spec(soc).transfers, pushed.spec(soc).transfers) == ("pull", "push")


def test_every_kind_of_stream_has_a_teacher():
    names = [cell.name for cell in teacher_cells()]
    assert [cell.name for cell, _ in teachers()] == names
    assert len(set(names)) == len(names)
