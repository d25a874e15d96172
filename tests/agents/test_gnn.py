"""The graph network: torch-geometric and the padded twin agree; sizes are no part of it; it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from schedlab.agents.gnn import GRAPH_KEYS, GraphPointerNetwork, PygPointerNetwork
from schedlab.agents.soc_dag_graph import SHAPE, GraphScheduling, fit_graph, graph_states, join
from schedlab.agents.soc_dag_train import Instance
from schedlab.baselines.soc_static import heft, plan_rule
from schedlab.envs.soc_dag.check import check_schedule
from schedlab.envs.soc_dag.env import SocDagVectorEnv
from schedlab.envs.soc_dag.generate import random_layered, random_stream
from schedlab.envs.soc_dag.library import Graph
from schedlab.envs.soc_dag.sim import Simulator
from schedlab.envs.soc_dag.spec import SocDagSpec, uniform_soc
from schedlab.envs.soc_dag.workload import Workload

SOC, STREAM = random_stream(6, num_tasks=(6, 12), num_jobs=4, gap_us=20.0)
SPEC = SocDagSpec(SOC, transfers="push", graph_tasks=48, graph_edges=192)


@pytest.fixture(scope="module")
def observations() -> dict[str, torch.Tensor]:
    """Observations along random play of several envs."""
    env, rng, seen = SocDagVectorEnv(6, spec=SPEC, workload=STREAM, debug=True), np.random.default_rng(0), []
    obs, info = env.reset(seed=0)
    for _ in range(15):
        seen.append({name: obs[name].copy() for name in GRAPH_KEYS})
        mask = info["action_mask"]
        obs, _, _, _, info = env.step(np.where(mask, rng.random(mask.shape), -1).argmax(1))
    return {name: torch.from_numpy(np.concatenate([one[name] for one in seen])) for name in GRAPH_KEYS}


@pytest.fixture(scope="module")
def network() -> GraphPointerNetwork:
    torch.manual_seed(0)
    network = GraphPointerNetwork(SHAPE, hidden=16)
    torch.nn.init.orthogonal_(network.head.query.weight, 2.0)
    return network


def test_the_twin_equals_torch_geometric(network, observations):
    """The same weights, by the same names: logits, values and gradients agree."""
    pytest.importorskip("torch_geometric")
    other = PygPointerNetwork(SHAPE, hidden=16)
    other.load_state_dict(network.state_dict())
    results = []
    for one in (network, other):
        one.zero_grad()
        logits, values = one(observations)
        (torch.log_softmax(logits, 1)[:, 1].sum() + values.sum()).backward()
        results.append((logits.detach(), values.detach(), [p.grad.clone() for p in one.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert results[0][0][observations["action_mask"]].std() > 0.01


def test_neither_padding_nor_order_counts(network, observations):
    """More room for rows, nodes and edges changes nothing; renumbered tasks and rows change only their order."""
    with torch.no_grad():
        logits, values = network(observations)
        wider = {name: tensor.clone() for name, tensor in observations.items()}
        for name, axis, value in (
            *((name, 1, 0) for name in ("candidates", "action_mask", "nodes", "edge_type", "edge_mask")),
            ("edge_features", 1, 0),
            ("edges", 2, 0),
            *((name, 1, -1) for name in ("candidate_node", "candidate_place", "node_group")),
        ):
            shape = list(wider[name].shape)
            shape[axis] = 7
            wider[name] = torch.cat([wider[name], torch.full(shape, value, dtype=wider[name].dtype)], axis)
        padded, padded_values = network(wider)
        torch.testing.assert_close(padded[:, : logits.shape[1]], logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(padded_values, values, rtol=1e-4, atol=1e-4)

        num_nodes, num_rows = observations["nodes"].shape[1], logits.shape[1]
        generator = torch.Generator().manual_seed(0)
        new_place, rows = torch.randperm(num_nodes, generator=generator), torch.randperm(num_rows, generator=generator)
        order = torch.argsort(new_place)
        moved = dict(observations)
        for name in ("nodes", "node_group"):
            moved[name] = observations[name][:, order]
        moved["edges"] = new_place[observations["edges"].long()]
        for name in ("candidate_node", "candidate_place"):
            index = observations[name].long()
            moved[name] = torch.where(index >= 0, new_place[index.clamp(min=0)], -1)[:, rows]
        for name in ("candidates", "action_mask"):
            moved[name] = observations[name][:, rows]
        again, again_values = network(moved)
    torch.testing.assert_close(again, logits[:, rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again_values, values, rtol=1e-4, atol=1e-4)


def test_the_graph_counts(network, observations):
    """Other data on the edges, or other jobs of the nodes, change the logits."""
    live = observations["action_mask"]
    with torch.no_grad():
        logits, _ = network(observations)
        for name in ("edge_features", "node_group", "nodes"):
            changed = observations[name].clone()
            changed[..., -1 if name == "node_group" else 0] = 1
            if name == "node_group":
                changed = torch.where(observations[name] >= 0, 0, observations[name])
            other, _ = network(observations | {name: changed})
            assert (other - logits)[live].abs().max() > 1e-3, name


def test_imitation_of_plans_and_the_policy():
    """Trained on HEFT's schedules it agrees with them more and more, and runs on graphs of any size, on any PEs."""
    rng, parts = np.random.default_rng(0), []
    for _ in range(12):
        soc, dag = uniform_soc(4), random_layered(int(rng.integers(8, 15)), 4, seed=rng)
        spec = SocDagSpec(soc, transfers="push", objective="makespan", graph_tasks=32, graph_edges=128)
        workload = Workload.from_arrays("one", soc.kind_names, [dag])
        instance = Instance(spec, workload, 0, [plan_rule("heft", [heft(Graph.of(dag, soc))])], 1)
        parts.append(graph_states(instance, actions_of(instance)))
    torch.manual_seed(0)
    network = GraphPointerNetwork(SHAPE, hidden=16)
    losses = fit_graph(network, join(parts), passes=8, minibatch=32)
    assert losses[-1] < 0.8 * losses[0]
    soc, dag = uniform_soc(7), random_layered(30, 7, seed=1)
    spec = SocDagSpec(soc, transfers="push", num_candidates=80, graph_tasks=20, graph_edges=50)
    simulator, workload = Simulator(spec), Workload.from_arrays("one", soc.kind_names, [dag])
    simulator.reset(workload)
    GraphScheduling("gnn", network, spec).run(simulator)
    assert check_schedule(simulator.timeline(), workload, spec) == []


def actions_of(instance: Instance) -> np.ndarray:
    """Rows that the instance's rule chooses."""
    from schedlab.agents.compiled import pack_weights
    from schedlab.agents.networks import PointerNetwork
    from schedlab.agents.soc_dag import empty_desk, empty_log, log_rule
    from schedlab.envs.soc_dag.state import empty_decision
    from schedlab.envs.soc_dag.table import NUM_CANDIDATE, NUM_CONTEXT

    simulator = Simulator(instance.spec)
    simulator.reset(instance.workload)
    state, rule = simulator.sim.state, instance.rules[0]
    desk = empty_desk(instance.spec.num_candidates, len(state.pes), len(state.jobs), len(state.tasks))
    log = empty_log(200, instance.spec.num_candidates)
    weights = pack_weights(PointerNetwork(NUM_CONTEXT, NUM_CANDIDATE, hidden=8))
    arguments = (rule.decide_kernel, rule.param_array, rule.new_memory(state), weights)
    log_rule(simulator.sim, *arguments, 1.0, 0, desk, log, empty_decision())
    return log.actions[: int(log.written[0])].copy()
