"""The graph network as a scheduler of task graphs, and its training on labelled schedules.

It sees what the env's graph observation shows: the same kernels write both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..envs.core.kernel import njit
from ..envs.soc_dag.graph import NUM_EDGE, NUM_EDGE_TYPES, NUM_NODE, GraphArrays, empty_graph, write_graph
from ..envs.soc_dag.sim import Simulator
from ..envs.soc_dag.spec import SocDagSpec
from ..envs.soc_dag.state import Decision, State
from ..envs.soc_dag.table import NUM_CANDIDATE, NUM_CONTEXT, Table, choose, empty_table, open_table, write_observation
from .gnn import GRAPH_KEYS, GraphPointerNetwork, GraphShape
from .soc_dag_train import Instance

SHAPE = GraphShape(NUM_CONTEXT, NUM_CANDIDATE, NUM_NODE, NUM_EDGE, NUM_EDGE_TYPES)
"""Columns of the env's observation."""


@njit(cache=True)
def look(state: State, table: Table, context, candidates, mask, graph: GraphArrays) -> bool:
    """Write the observation with its graph; False where there is no choice but row 1."""
    open_table(state, table)
    if table.head[0].num_rows <= 2 and state.engine[0].num_in_progress == 0:
        return False
    write_observation(state, table, context, candidates, mask)
    write_graph(state, table, graph)
    return True


class GraphView:
    """Where the graph observation of a State is written."""

    def __init__(self, spec: SocDagSpec, state: State) -> None:
        rows, p = spec.num_candidates, len(state.pes)
        num_nodes = p + spec.graph_tasks
        self.table = empty_table(rows, p, len(state.jobs), len(state.tasks), num_nodes)
        self.rows = {
            "context": np.zeros(NUM_CONTEXT, np.float32),
            "candidates": np.zeros((rows, NUM_CANDIDATE), np.float32),
            "action_mask": np.zeros(rows, np.bool_),
        }
        self.graph = empty_graph(num_nodes, spec.graph_edges, rows)
        self.arrays = self.rows | self.graph._asdict()
        """All of them, by the names of the env's observation."""

    def look(self, state: State) -> bool:
        """Write what `state` shows; False where there is no choice but row 1."""
        return bool(look(*self._look_arguments(state)))

    def _look_arguments(self, state: State) -> tuple[Any, ...]:
        return (state, self.table, *self.rows.values(), self.graph)


class GraphScheduling:
    """A graph network, greedy, without torch-geometric. Implements `Policy`; for single graphs, not for speed.

    Args:
        name: shown in results.
        network: a `GraphPointerNetwork` for `SHAPE`.
        spec: says how many rows, nodes and edges are shown.
    """

    is_oracle = False
    binding = "late"

    def __init__(self, name: str, network: GraphPointerNetwork, spec: SocDagSpec) -> None:
        self.name, self.network, self.spec = name, network.eval(), spec
        self._view: GraphView | None = None

    def reset(self, state: State) -> None:
        """Make room for a State of this size."""
        self._view = GraphView(self.spec, state)

    def decide(self, state: State, decision: Decision) -> None:
        """Write the decision for `state` into `decision`."""
        if self._view is None:
            self.reset(state)
        assert self._view is not None
        row = 1
        if self._view.look(state):
            with torch.no_grad():
                logits, _ = self.network({name: torch.from_numpy(a)[None] for name, a in self._view.arrays.items()})
            row = int(logits[0].argmax())
        choose(self._view.table, decision, row)

    def run(self, simulator: Simulator) -> None:
        """Serve the simulator's whole workload."""
        self.reset(simulator.state())
        while not simulator.step(self._decided(simulator)).done:
            pass

    def _decided(self, simulator: Simulator) -> Decision:
        decision = simulator.default_decision()
        self.decide(simulator.state(), decision)
        return decision


def graph_states(instance: Instance, actions: np.ndarray) -> dict[str, Tensor]:
    """The graph observations of a schedule, and the rows it chose (`labels`), from the actions of its log."""
    simulator = Simulator(instance.spec.replace(binding="late"))
    simulator.reset(instance.workload, instance.seed)
    view, seen = GraphView(instance.spec, simulator.state()), []
    done, taken = False, iter(actions)
    while not done:
        decision, row = simulator.default_decision(), 1
        if view.look(simulator.state()):
            seen.append({name: array.copy() for name, array in view.arrays.items()})
            row = int(next(taken))
        choose(view.table, decision, row)
        done = simulator.step(decision).done
    stacked = {name: torch.from_numpy(np.stack([one[name] for one in seen])) for name in GRAPH_KEYS}
    return stacked | {"labels": torch.from_numpy(np.asarray(actions, np.int64))}


def fit_graph(
    network: GraphPointerNetwork,
    states: Mapping[str, Tensor],
    *,
    passes: int,
    lr: float = 2e-3,
    minibatch: int = 256,
    seed: int = 0,
) -> list[float]:
    """Imitate labelled states (`graph_states`, joined); the mean cross-entropy of each pass."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, eps=1e-5)
    generator, losses = torch.Generator().manual_seed(seed), []
    for index in range(passes):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1.0 - 0.95 * index / max(passes - 1, 1))
        total = 0.0
        for batch in torch.randperm(len(states["labels"]), generator=generator).split(minibatch):
            logits, _ = network({name: states[name][batch] for name in GRAPH_KEYS})
            loss = F.cross_entropy(logits, states["labels"][batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            total += float(loss.detach()) * len(batch)
        losses.append(total / len(states["labels"]))
    return losses


def join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The states of many schedules as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
