"""What a graph network gains over the DeepSets pointer on single task graphs, and what it costs.

  python -m schedlab.experiments.soc_dag_encoders

Both imitate the same schedules, the best of 64 that the shipped agent draws of random graphs, with the same number of
gradient steps. Printed: agreement and cross-entropy on schedules of other graphs, makespan of the greedy policy against
the best static plan, CPU time of a training step and of a decision, for the graph network with torch-geometric and
without.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from ..agents.compiled import pack_weights
from ..agents.gnn import GRAPH_KEYS, GraphPointerNetwork, PygPointerNetwork
from ..agents.networks import PointerNetwork
from ..agents.soc_dag import PointerScheduling, load_pointer
from ..agents.soc_dag_graph import SHAPE, GraphScheduling, fit_graph, graph_states, join
from ..agents.soc_dag_train import Instance, label
from ..envs.soc_dag.generate import random_layered
from ..envs.soc_dag.sim import Simulator
from ..envs.soc_dag.spec import uniform_soc
from .soc_dag_headroom import interval, row, rule_line
from .soc_dag_presets import best_static, single, single_spec


@dataclass(frozen=True)
class Config:
    """Compare the encoders."""

    graphs: int = 300
    """Graphs to imitate on."""
    passes: int = 8
    """Over their states."""
    hidden: int = 32
    """Width of both networks."""
    layers: int = 2
    """Of the graph network."""
    seed: int = 0
    """Of graphs and weights."""


class FlatPointer(torch.nn.Module):
    """The DeepSets pointer on the same observations: it leaves the graph aside."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.network = PointerNetwork(SHAPE.context, SHAPE.candidate, hidden=hidden)

    def forward(self, obs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network(obs["context"], obs["candidates"], obs["action_mask"].bool())


def instances(count: int, seed: int) -> list[Instance]:
    """Random graphs of 20 to 50 tasks on 4 PEs."""
    rng, four = (
        np.random.default_rng(
            [seed, 0x6E],
        ),
        uniform_soc(4),
    )
    spec = single_spec(four).replace(graph_tasks=52, graph_edges=256)
    dags = [random_layered(int(rng.integers(20, 51)), 4, seed=rng) for _ in range(count)]
    return [Instance(spec, single(dag, four), 0, (), 64) for dag in dags]


def labelled(graphs: Sequence[Instance]) -> dict[str, torch.Tensor]:
    """Graph observations along the best of 64 schedules of each."""
    weights = load_pointer().weights
    return join([graph_states(one, label(one, weights, 1.0, i).log.actions) for i, one in enumerate(graphs)])


def cpu_ms(work: Callable[[], object], repeats: int) -> float:
    """Mean CPU time of a call, after one to warm up."""
    work()
    start = time.process_time()
    for _ in range(repeats):
        work()
    return 1e3 * (time.process_time() - start) / repeats


def judged(network: Any, states: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Agreement and cross-entropy."""
    with torch.no_grad():
        parts = torch.arange(len(states["labels"])).split(512)
        logits = torch.cat([network({name: states[name][part] for name in GRAPH_KEYS})[0] for part in parts])
    agreed = (logits.argmax(1) == states["labels"]).float().mean()
    return float(agreed), float(F.cross_entropy(logits, states["labels"]))


def ratios(policy: Any, graphs: Sequence[Instance]) -> np.ndarray:
    """Makespan over that of the best static plan."""
    found = []
    for one in graphs:
        simulator = Simulator(one.spec)
        simulator.reset(one.workload)
        policy.run(simulator)
        end = float(simulator.timeline().job_finish[0])
        found.append(end / best_static(one.workload.dags[0], one.spec.soc).makespan_us)
    return np.array(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Train both, print the table."""
    args = tyro.cli(Config, args=argv, description=__doc__)
    torch.set_num_threads(1)
    train, test = labelled(instances(args.graphs, args.seed)), instances(40, args.seed + 1)
    held_out, spec = labelled(test), test[0].spec
    print(f"{len(train['labels'])} states to learn from, {len(held_out['labels'])} to be judged by\n")
    batch = {name: train[name][:256] for name in (*GRAPH_KEYS, "labels")}
    print(row("encoder", "agreement", "cross-entropy", "greedy / best static", "step of 256, ms", "decision, ms"))
    print(rule_line(6))
    torch.manual_seed(args.seed)
    flat = FlatPointer(args.hidden)
    fit_graph(flat, train, passes=args.passes, seed=args.seed)
    weights = pack_weights(flat.network, spec.num_candidates)
    pointer = PointerScheduling("deepsets", weights, spec.num_candidates)
    torch.manual_seed(args.seed)
    trained = PygPointerNetwork(SHAPE, args.hidden, args.layers)
    fit_graph(trained, train, passes=args.passes, seed=args.seed)
    twin = GraphPointerNetwork(SHAPE, args.hidden, args.layers)
    twin.load_state_dict(trained.state_dict())
    one = {name: train[name][:1] for name in GRAPH_KEYS}
    for name, network, policy in (
        ("DeepSets", flat, pointer),
        ("GINE, torch-geometric", trained, GraphScheduling("gnn", trained, spec)),
        ("GINE, padded twin", twin, GraphScheduling("twin", twin, spec)),
    ):
        shares = judged(network, held_out)
        greedy = interval(ratios(policy, test), "{:.3f}")
        decide_ms = cpu_ms(lambda network=network: network(one), 50)  # type: ignore[misc]
        step_ms = cpu_ms(lambda network=network: fit_graph(network, batch, passes=1), 5)  # type: ignore[misc]
        print(row(name, f"{shares[0]:.3f}", f"{shares[1]:.3f}", greedy, f"{step_ms:.1f}", f"{decide_ms:.2f}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
