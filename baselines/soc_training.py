"""Published plans of training steps: pipeline schedules, FSMoE's choice of chunks, sequences on groups by an LP."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import linprog

from ..envs.core.errors import InputError
from ..envs.soc_dag.library import Graph, Plan
from ..envs.soc_dag.spec import Soc
from ..envs.soc_dag.training import MoeCosts, Pipeline, moe_layer
from ..envs.soc_dag.workload import Dag
from .soc_static import plan_of_order

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


# -------------------------------------------------------------------------------------- variable-length sequences


def assign_by_lp(dag: Dag, soc: Soc) -> tuple[Plan, float]:
    """Independent tasks before one last task (`training.sequence_batch`) on unlike PEs: (plan, lower bound in us).

    The linear programme shares tasks out in fractions so that the busiest PE is least busy; at most as many tasks as
    there are PEs are in parts in a basic solution, and go to the PE that they would end on first, longest first
    (Lenstra, Shmoys, Tardos: Approximation algorithms for scheduling unrelated parallel machines, 1990).

    Raises:
        InputError: for a graph with other precedences.
    """
    n, p = dag.num_tasks - 1, soc.num_pes
    if dag.edges.tolist() != [[task, n] for task in range(n)]:
        raise InputError(f"graph {dag.name!r} has other precedences", remedy="Give independent tasks before one last")
    graph = Graph.of(dag, soc)
    times = graph.times[:n]
    able, pairs = np.isfinite(times), np.argwhere(np.isfinite(times))
    whole, busy = np.zeros((n, len(pairs) + 1)), np.zeros((p, len(pairs) + 1))
    whole[pairs[:, 0], np.arange(len(pairs))] = 1.0
    busy[pairs[:, 1], np.arange(len(pairs))] = times[able]
    busy[:, -1] = -1.0
    costs = np.append(np.zeros(len(pairs)), 1.0)
    found = linprog(costs, busy, np.zeros(p), whole, np.ones(n), bounds=(0, None), method="highs-ds")
    if found.status != 0:
        raise RuntimeError(f"the linear programme of {dag.name!r} was not solved: {found.message}")
    shares = np.zeros((n, p))
    shares[able] = found.x[:-1]
    place, split = shares.argmax(1), np.flatnonzero(shares.max(1) < 1.0 - 1e-9)
    load = np.array([times[(place == pe) & (shares.max(1) >= 1.0 - 1e-9), pe].sum() for pe in range(p)])
    for task in sorted(split, key=lambda task: -times[task][able[task]].min()):
        place[task] = int(np.argmin(load + times[task]))
        load[place[task]] += times[task, place[task]]
    last = int(np.argmin(graph.times[n]))
    plan = plan_of_order(graph, np.append(place, last), np.arange(n + 1))
    longest_shortest = float(times.min(1).max())
    return plan, max(float(found.fun), longest_shortest) + float(graph.times[n].min())
