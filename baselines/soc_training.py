"""Published orders of training steps, as plans: pipeline schedules, and FSMoE's choice of chunks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..envs.core.errors import InputError
from ..envs.soc_dag.library import Graph
from ..envs.soc_dag.training import MoeCosts, Pipeline, moe_layer
from .soc_static import Plan, plan_of_order

Order = Callable[[Pipeline, int], list[int]]
"""Tasks of one stage, in the order in which it runs them."""


def gpipe(step: Pipeline, stage: int) -> list[int]:
    """All forwards, then all backwards (Huang et al., NeurIPS 2019)."""
    virtual = range(stage, len(step.forward), step.num_stages)
    forwards = [int(step.forward[k, i]) for k in virtual for i in range(step.num_microbatches)]
    return forwards + [int(step.backward[k, i]) for k in reversed(virtual) for i in range(step.num_microbatches)]


def one_f_one_b(step: Pipeline, stage: int) -> list[int]:
    """As many forwards as stages follow, then a forward and a backward in turn (PipeDream-flush, Megatron-LM)."""
    if step.num_chunks > 1:
        raise InputError(f"1F1B with {step.num_chunks} chunks a stage", remedy="Use the interleaved order")
    forward, backward = step.forward[stage].tolist(), step.backward[stage].tolist()
    return _alternate(forward, backward, min(step.num_stages - 1 - stage, len(forward)))


def interleaved(step: Pipeline, stage: int) -> list[int]:
    """Megatron-LM's interleaved 1F1B (Narayanan et al., SC 2021): p microbatches through a chunk, then the next."""
    p, m, v = step.num_stages, step.num_microbatches, step.num_chunks
    if m % p:
        raise InputError(f"interleaved order of {m} microbatches on {p} stages", remedy=f"Give a multiple of {p}")
    forward, backward = [], []
    for k in range(m * v):
        chunk, micro = k % (p * v) // p, k // (p * v) * p + k % p
        forward.append(int(step.forward[chunk * p + stage, micro]))
        backward.append(int(step.backward[(v - 1 - chunk) * p + stage, micro]))
    warm_up = 2 * (p - stage - 1) + (v - 1) * p if v > 1 else p - stage - 1
    return _alternate(forward, backward, min(warm_up, m * v))


def zero_bubble(step: Pipeline, stage: int) -> list[int]:
    """ZB-H1 (Qi et al., ICLR 2024): 1F1B, with weight gradients `stage` microbatches behind the input gradients."""
    if not step.weight.size or step.num_chunks > 1:
        raise InputError("zero bubble needs a split backward and one chunk", remedy="Make the pipeline with weight_us")
    p, m = step.num_stages, step.num_microbatches
    ahead = p - 1 - stage
    order = step.forward[stage, : min(ahead, m)].tolist()
    for i in range(m):
        order += [*step.forward[stage, i + ahead : i + ahead + 1].tolist(), int(step.backward[stage, i])]
        order += [int(step.weight[stage, i - stage])] if i >= stage else []
    return order + step.weight[stage, max(m - stage, 0) :].tolist()


def _alternate(forward: list[int], backward: list[int], warm_up: int) -> list[int]:
    order = forward[:warm_up]
    for one, other in zip(forward[warm_up:], backward, strict=False):
        order += [one, other]
    return order + backward[len(forward) - warm_up :]


PIPELINE_ORDERS: dict[str, Order] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb_h1": zero_bubble,
}
"""Pipeline schedules by name."""


def pipeline_plan(step: Pipeline, name: str) -> Plan:
    """The plan of a pipeline schedule; a stage's gradient synchronisation comes last. Raises InputError."""
    if name not in PIPELINE_ORDERS:
        raise InputError(f"unknown pipeline schedule {name!r}", remedy=f"Choose one of {', '.join(PIPELINE_ORDERS)}")
    order = [task for stage in range(step.num_stages) for task in PIPELINE_ORDERS[name](step, stage)]
    rest = sorted(set(range(step.dag.num_tasks)) - set(order))  # weight gradients of orders that know none, and syncs
    return plan_of_order(Graph.of(step.dag, step.soc), step.pe, np.array(order + rest))


# ------------------------------------------------------------------------------------------------------ FSMoE


def moe_plan(costs: MoeCosts, chunks: int, all_reduce_parts: int = 0) -> Plan:
    """FSMoE's order of a layer in r chunks (ASPLOS 2025).

    Between nodes: all dispatches, then the parts of the gradient all-reduce while experts compute, then the combines,
    in which every part goes where it delays no combine more than waiting would; within the node gathers come before
    scatters.
    """
    soc, dag = moe_layer(costs, chunks, all_reduce_parts=all_reduce_parts)
    graph = Graph.of(dag, soc)
    pe = np.isfinite(dag.times).argmax(1)
    number = {name: task for task, name in enumerate(dag.task_names)}
    parts = [number[f"all-reduce {i}"] for i in range(all_reduce_parts)]
    inner = [number[f"{name} {c}"] for name in ("gather", "experts", "scatter") for c in range(chunks)]
    dispatch = [number[f"dispatch {c}"] for c in range(chunks)]
    combine = [number[f"combine {c}"] for c in range(chunks)]
    best = None
    for hidden in range(len(parts) + 1):  # parts before the combines; the others after them
        order = [*dispatch, *parts[:hidden], *combine, *parts[hidden:], *inner]
        plan = plan_of_order(graph, pe, np.array(order))
        if best is None or plan.makespan_us < best.makespan_us:
            best = plan
    assert best is not None
    return best


def choose_chunks(costs: MoeCosts, *, max_chunks: int = 16, all_reduce_parts: int = 0) -> tuple[int, Plan]:
    """FSMoE's choice: the number of chunks whose plan is shortest, the smallest among equals."""
    plans = {chunks: moe_plan(costs, chunks, all_reduce_parts) for chunks in range(1, max_chunks + 1)}
    chunks = min(plans, key=lambda c: (plans[c].makespan_us, c))
    return chunks, plans[chunks]
