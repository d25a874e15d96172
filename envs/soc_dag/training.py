"""Task graphs of training steps: pipelines, Mixture-of-Experts layers, clusters of unlike networks, sequences.

A PE is a pipeline stage, a stream of a GPU, or a group of GPUs; times are from the cost models stated at each function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import InputError
from .spec import PeKind, Soc
from .workload import Dag


@dataclass(frozen=True)
class Pipeline:
    """One step of pipeline-parallel training: m microbatches through v model chunks on each of p stages.

    Virtual stage k = chunk * p + stage runs on PE `stage`. The forward of a microbatch goes up through the virtual
    stages, the backward down. With split backward the gradient of the inputs is what others wait for, and that of the
    weights (`weight`) may run at any time after it (zero bubble, Qi et al., ICLR 2024).
    """

    soc: Soc
    dag: Dag
    forward: np.ndarray  # (v * p, m) int64 task numbers
    backward: np.ndarray  # (v * p, m) int64
    weight: np.ndarray  # (v * p, m) int64; (0, 0) where the backward is not split
    num_stages: int
    num_chunks: int

    @property
    def num_microbatches(self) -> int:
        return self.forward.shape[1]

    @property
    def pe(self) -> np.ndarray:
        """int64 (n,): the PE of each task."""
        return np.isfinite(self.dag.times).argmax(1)

    def bubble_share(self, makespan_us: float) -> float:
        """Share of the stages' time in which they have nothing to do."""
        work = float(np.where(np.isfinite(self.dag.times), self.dag.times, 0.0).sum())
        return 1.0 - work / (self.num_stages * makespan_us)


def pipeline(
    num_stages: int,
    num_microbatches: int,
    *,
    forward_us: float | Sequence[float] = 1.0,
    backward_us: float | Sequence[float] = 2.0,
    weight_us: float | Sequence[float] | None = None,
    num_chunks: int = 1,
    transfer_us: float = 0.0,
    sync_us: float | Sequence[float] = 0.0,
) -> Pipeline:
    """The graph of one step; times are a stage's, for all of its chunks together, one number or one a stage.

    Args:
        num_stages: p.
        num_microbatches: m.
        forward_us: forward of a microbatch.
        backward_us: backward of a microbatch; with `weight_us` its input gradients only.
        weight_us: weight gradients of a microbatch, as tasks of their own; None: within the backward.
        num_chunks: v, model chunks a stage.
        transfer_us: of activations or gradients from stage to stage.
        sync_us: gradient all-reduce at the end, as one more task a stage; 0: none.
    """
    p, m, v = num_stages, num_microbatches, num_chunks
    if min(p, m, v) < 1:
        raise InputError(f"{p} stages, {m} microbatches, {v} chunks", remedy="Give at least one of each")

    def by_stage(us: float | Sequence[float]) -> np.ndarray:
        times = np.broadcast_to(np.asarray(us, np.float64), (p,))
        if not ((times >= 0) & (times < math.inf)).all():
            raise InputError(f"times {times.tolist()} of the stages", remedy="Give non-negative us")
        return times

    kinds = v * p
    micro, k = np.meshgrid(np.arange(m), np.arange(kinds))
    forward = micro * kinds + k
    backward = m * kinds + micro * kinds + (kinds - 1 - k)
    weight = 2 * m * kinds + forward if weight_us is not None else np.zeros((0, 0), np.int64)
    parts = [(forward, by_stage(forward_us)), (backward, by_stage(backward_us))]
    if weight_us is not None:
        parts.append((weight, by_stage(weight_us)))
    times = np.full((len(parts) * m * kinds, p), math.inf)
    names = [""] * len(times)
    for letter, (numbers, us) in zip("FBW", parts, strict=False):
        for virtual in range(kinds):
            times[numbers[virtual], virtual % p] = us[virtual % p] / v
            for i, number in enumerate(numbers[virtual]):
                names[number] = f"{letter}{virtual}.{i}"
    edges, volumes = [], []
    for virtual in range(kinds):
        for i in range(m):
            if virtual > 0:
                edges += [
                    (forward[virtual - 1, i], forward[virtual, i]),
                    (backward[virtual, i], backward[virtual - 1, i]),
                ]
                volumes += [transfer_us, transfer_us]
            if weight_us is not None:
                edges.append((backward[virtual, i], weight[virtual, i]))
                volumes.append(0.0)
    edges += [(forward[-1, i], backward[-1, i]) for i in range(m)]
    volumes += [0.0] * m
    # the backward of a lower virtual stage comes after that of all above it, so after its own forward
    sync = by_stage(sync_us)
    if sync.any():
        last = weight if weight_us is not None else backward
        for stage in range(p):
            times = np.vstack([times, np.where(np.arange(p) == stage, sync[stage], math.inf)])
            names.append(f"sync {stage}")
            numbers = last[stage::p].ravel()
            edges += [(number, len(times) - 1) for number in numbers]
            volumes += [0.0] * len(numbers)
    soc = Soc(f"{p}-stages", tuple(PeKind(f"stage{s}") for s in range(p)), bandwidth=((1.0,) * p,) * p)
    dag = Dag.from_arrays(
        f"pipeline-{p}x{m}" + (f"x{v}" if v > 1 else ""),
        times,
        edges,
        volumes,
        task_names=names,
        source=f"generated: pipeline of {p} stages, {m} microbatches, {v} chunks a stage",
    )
    return Pipeline(soc, dag, forward, backward, weight, p, v)


# --------------------------------------------------------------------------------------------- unlike networks


@dataclass(frozen=True)
class Group:
    """Nodes with one kind of network that form a pipeline stage (Holmes: data parallelism inside, pipeline across)."""

    network: str
    """One of `NETWORK_GBPS`."""
    num_nodes: int
    speed: float = 1.0
    """Compute of a node, relative to the others."""


NETWORK_GBPS = {"infiniband": 200.0, "roce": 200.0, "ethernet": 25.0}
"""Bandwidth of a node's network, Gbit/s, as in Holmes (arXiv 2312.03549)."""


def layers_by_speed(num_layers: int, speeds: Sequence[float]) -> list[int]:
    """Layers of each stage in proportion to its speed, at least one each, by largest remainder (after Holmes)."""
    if num_layers < len(speeds) or min(speeds) <= 0:
        raise InputError(
            f"{num_layers} layers for stages of speeds {list(speeds)}",
            remedy="Give a layer a stage, and positive speeds",
        )
    exact = np.array(speeds) / sum(speeds) * num_layers
    layers = np.maximum(np.floor(exact).astype(int), 1)
    while layers.sum() != num_layers:
        sign = 1 if layers.sum() < num_layers else -1
        lacking = np.where((layers > 1) | (sign > 0), sign * (exact - layers), -math.inf)
        layers[lacking.argmax()] += sign
    return layers.tolist()


def holmes(
    groups: Sequence[Group],
    num_microbatches: int,
    *,
    num_layers: int = 36,
    layer_us: float = 2000.0,
    layer_bytes: float = 2.2e8,
    activation_bytes: float = 2.5e7,
    in_proportion: bool = True,
) -> Pipeline:
    """A step on clusters of unlike networks: a pipeline stage a group, layers in proportion to speed or in equal parts.

    A layer's forward takes `layer_us` on one node of speed 1 and is shared by the group's nodes, its backward twice
    that. At the end a group all-reduces its gradients over its own network: 2 (d - 1) / d of the bytes through each
    node. Activations cross groups over Ethernet. Times are assumptions, bandwidths the paper's.
    """
    for group in groups:
        if group.network not in NETWORK_GBPS or group.num_nodes < 1 or group.speed <= 0:
            raise InputError(
                f"group {group}", remedy=f"Choose a network of {', '.join(NETWORK_GBPS)}, nodes and a speed"
            )
    speeds = [group.speed * group.num_nodes for group in groups]
    layers = layers_by_speed(num_layers, speeds if in_proportion else [1.0] * len(groups))
    forward = [count * layer_us / speed for count, speed in zip(layers, speeds, strict=True)]
    sync = []
    for group, count in zip(groups, layers, strict=True):
        bytes_per_us = NETWORK_GBPS[group.network] / 8 * 1e3
        sync.append(2 * (group.num_nodes - 1) / group.num_nodes * count * layer_bytes / bytes_per_us)
    return pipeline(
        len(groups),
        num_microbatches,
        forward_us=forward,
        backward_us=[2 * us for us in forward],
        transfer_us=activation_bytes / (NETWORK_GBPS["ethernet"] / 8 * 1e3),
        sync_us=sync,
    )


# ------------------------------------------------------------------------------------------------------ FSMoE


@dataclass(frozen=True)
class MoeCosts:
    """Costs alpha + beta n of the operations of a Mixture-of-Experts layer, (alpha us, beta us over the whole layer).

    Beta is what the operation takes for all data of the layer; a chunk of 1 / r of the data takes alpha + beta / r.
    """

    all_to_all: tuple[float, float]
    """Between nodes: dispatch, and combine."""
    all_gather: tuple[float, float]
    """Within a node: before the experts."""
    reduce_scatter: tuple[float, float]
    """Within a node: after the experts."""
    experts: tuple[float, float]
    """Matrix products of the experts."""
    all_reduce: tuple[float, float] = (0.0, 0.0)
    """Between nodes, of gradients, in the backward: any time in the layer."""


MOE_STREAMS = ("inter-node", "intra-node", "compute")


def moe_layer(costs: MoeCosts, chunks: int, *, all_reduce_parts: int = 0) -> tuple[Soc, Dag]:
    """A Mixture-of-Experts layer in r chunks on three streams (FSMoE, ASPLOS 2025).

    Each chunk is dispatched between nodes, gathered within the node, computed, scattered within the node, and combined
    between nodes; `all_reduce_parts` parts of the gradient all-reduce share the stream between nodes.
    """
    if chunks < 1 or all_reduce_parts < 0:
        raise InputError(
            f"{chunks} chunks, {all_reduce_parts} parts", remedy="Give at least one chunk and no negative part"
        )
    steps = (
        ("dispatch", 0, costs.all_to_all),
        ("gather", 1, costs.all_gather),
        ("experts", 2, costs.experts),
        ("scatter", 1, costs.reduce_scatter),
        ("combine", 0, costs.all_to_all),
    )
    names, times, edges = [], [], []

    def add(name: str, stream: int, us: float) -> None:
        names.append(name)
        times.append([us if s == stream else math.inf for s in range(3)])

    for chunk in range(chunks):
        for place, (name, stream, (alpha, beta)) in enumerate(steps):
            if place > 0:
                edges.append((len(names) - 1, len(names)))
            add(f"{name} {chunk}", stream, alpha + beta / chunks)
    for part in range(all_reduce_parts):
        add(f"all-reduce {part}", 0, costs.all_reduce[0] + costs.all_reduce[1] / all_reduce_parts)
    soc = Soc("three-streams", tuple(PeKind(name) for name in MOE_STREAMS))
    source = f"generated: FSMoE layer in {chunks} chunks"
    return soc, Dag.from_arrays(f"moe-layer-{chunks}", times, edges, task_names=names, source=source)


# ---------------------------------------------------------------------------------------- variable-length sequences


def sequence_batch(
    num_sequences: int,
    *,
    group_sizes: Sequence[int] = (1, 1, 2, 4),
    mean_tokens: float = 4096.0,
    sigma: float = 1.2,
    gpu_tokens: int = 16384,
    token_us: float = 0.5,
    pair_us: float = 2e-5,
    exchange_us: float = 0.05,
    seed: int | np.random.Generator = 0,
) -> tuple[Soc, Dag]:
    """A training step over sequences of very different lengths: which group of GPUs computes which sequence.

    Lengths are lognormal. A group of g GPUs takes (token_us n + pair_us n^2) / g + exchange_us n (g - 1) / g for n
    tokens and has room for g `gpu_tokens`; longer sequences are cut to the largest group's room. A last task (the
    update) waits for all of them. The sizes are assumptions, after data-centric sequence parallelism.
    """
    sizes = np.array(group_sizes, np.float64)
    if num_sequences < 1 or not len(sizes) or sizes.min() < 1:
        raise InputError(f"{num_sequences} sequences on groups {list(group_sizes)}", remedy="Give at least one of each")
    rng = np.random.default_rng(seed)
    tokens = np.ceil(rng.lognormal(math.log(mean_tokens) - sigma**2 / 2, sigma, num_sequences))
    tokens = np.minimum(tokens, sizes.max() * gpu_tokens)[:, None]
    times = (token_us * tokens + pair_us * tokens**2) / sizes + exchange_us * tokens * (sizes - 1) / sizes
    times[tokens > sizes * gpu_tokens] = math.inf
    kinds: dict[int, int] = {}
    for size in group_sizes:
        kinds[size] = kinds.get(size, 0) + 1
    columns = [list(group_sizes).index(size) for size in kinds]
    table = np.vstack([times[:, columns], np.full(len(kinds), 1.0)])
    soc = Soc("gpu-groups", tuple(PeKind(f"{size}gpu", count) for size, count in kinds.items()))
    names = [f"{int(n)} tokens" for n in tokens[:, 0]] + ["update"]
    edges = [(i, num_sequences) for i in range(num_sequences)]
    source = f"generated: {num_sequences} lognormal sequences, sigma {sigma:g}"
    return soc, Dag.from_arrays(f"sequences-{num_sequences}", table, edges, task_names=names, source=source)
