"""The experiment that measures how many experts of the next layer are foreseen."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_expert_caching import EXPERTS, LAYERS, K, random_workload, streamed

from schedlab.agents.expert_caching_checkpoint import pack_eviction, save_eviction
from schedlab.agents.expert_caching_network import EvictionNetwork, NextLayerHead
from schedlab.envs.expert_caching.workload import Workload, save_routing
from schedlab.experiments import expert_caching_recall as experiment


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    head = NextLayerHead(LAYERS, EXPERTS, width=16, hidden=8).eval()
    return pack_eviction([EvictionNetwork(LAYERS, EXPERTS, width=16, hidden=8).eval()], head)


def test_recall_by_hand():
    workload = Workload.from_arrays("by-hand", np.array([[[0, 1], [2, 3]], [[0, 1], [4, 5]]]), [2], num_experts=8)
    first = [0.0, 0.0, 0.9, 0.5, 0.6, 0.0, 0.0, 0.0]  # of 2 and 3: one among the best 2, both among the best 4
    second = [0.9, 0.8, 0.7, 0.6, 0.5, 0.6, 0.0, 0.0]  # of 4 and 5: none; one, which shares the fourth place
    scores = np.array([[first], [second]], np.float32)
    found = experiment.recall(workload, lambda: iter([scores[:1], scores[1:]]))
    np.testing.assert_allclose(found, [[1 / 4], [2 / 4]])  # an equal score does not help


def test_the_agent_is_asked_as_it_is_deployed(weights):
    workload = random_workload(8, (150, 200))
    scores = np.concatenate(list(experiment.by_agent(workload, weights)))
    # sums may be ordered otherwise where a chunk ends
    np.testing.assert_allclose(scores, streamed(weights, workload).above_logits[:, :-1], rtol=0, atol=1e-5)


def test_the_command_writes_the_table(tmp_path, weights, capsys):
    save_routing(tmp_path / "kinds.npz", random_workload(3, (40,) * 12))
    folder = save_eviction(tmp_path / "agent", weights, K, {})
    argv = ["--trace", str(tmp_path / "kinds.npz"), "--out", str(tmp_path / "out"), "--scores", str(folder)]
    assert experiment.main(argv) == 0
    rows = json.loads((tmp_path / "out" / "recall.json").read_text())["recall"]
    means = {name: np.array(row)[0].mean() for name, row in rows.items()}
    assert min(means["copy_kernel"], means["affinity"]) > 2 * means["popularity"]  # tokens come in six kinds
    assert "agent" in capsys.readouterr().out
    assert experiment.main([*argv[:-1], str(experiment.SHIPPED)]) == 2
    assert "of another model" in capsys.readouterr().err
