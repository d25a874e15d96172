"""Static schedulers: a plan for a whole task graph before it runs. HEFT, lookahead HEFT, CPOP, PEFT, and fixed orders.

Kernels work on `library.Graph`; means are over the PEs that can run a task, and over all pairs of different PEs for
transfers. `plan_rule` makes plans a rule that binds every task when its job arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..envs.core.errors import InputError
from ..envs.core.kernel import entry_point, njit, njit_borrowed
from ..envs.soc_dag.library import (
    Graph,
    Plan,
    link_sums,
    mean_time,
    mean_transfer_us,
    transfer_us,
    write_optimistic_costs,
    write_upward_ranks,
)
from ..envs.soc_dag.rule import Rule
from ..envs.soc_dag.spec import uniform_soc
from ..envs.soc_dag.state import READY, is_legal
from ..envs.soc_dag.workload import Dag

# ------------------------------------------------------------------------------------- a schedule being built


@njit_borrowed
def gap_for(task, after, us, last, before, start, finish):
    """Earliest start of a task of length `us` after `after` on a PE, in gaps too, and the task it stands behind.

    `last` is the PE's last task, `before[t]` the one before t on its PE, -1: none. Walks back from the end as long as
    the gap in front of a task is late enough.
    """
    begin, behind = after if last < 0 else max(after, finish[last]), last
    at = last
    while at >= 0 and start[at] >= after + us:
        previous = before[at]
        candidate = after if previous < 0 else max(after, finish[previous])
        if candidate + us <= start[at]:
            begin, behind = candidate, previous
        at = previous
    return begin, behind


@njit_borrowed
def place(task, to, begin, us, behind, last, before, following, pe, start, finish):
    """Put a task on a PE, behind the task `behind` (-1: first)."""
    pe[task], start[task], finish[task] = to, begin, begin + us
    next_one = -1
    if behind == last[to]:
        last[to] = task
    else:
        next_one = following[behind] if behind >= 0 else first_of(last[to], before)
    before[task], following[task] = behind, next_one
    if behind >= 0:
        following[behind] = task
    if next_one >= 0:
        before[next_one] = task


@njit_borrowed
def take_off(task, last, before, following, pe):
    """Undo `place`."""
    behind, next_one = before[task], following[task]
    if next_one >= 0:
        before[next_one] = behind
    else:
        last[pe[task]] = behind
    if behind >= 0:
        following[behind] = next_one
    pe[task] = -1


@njit_borrowed
def first_of(task, before):
    """The first task of the PE that `task` is on."""
    while before[task] >= 0:
        task = before[task]
    return task


@njit_borrowed
def write_arrivals(graph, task, pe, finish, arrivals):
    """When the data of a task are on each PE, float64 (P,), from its predecessors that are placed."""
    latency, bandwidth, whole = graph.latency, graph.bandwidth, graph.whole[0] != 0
    num_pes = len(arrivals)
    for to in range(num_pes):
        arrivals[to] = 0.0
    for edge in range(graph.in_first[task], graph.in_first[task + 1]):
        source, volume = graph.in_task[edge], graph.in_volume[edge]
        at = pe[source]
        if at >= 0:
            made = finish[source]
            for to in range(num_pes):
                arrivals[to] = max(arrivals[to], made + transfer_us(volume, latency[at, to], bandwidth[at, to], whole))


@njit_borrowed
def place_soonest(graph, task, extra, arrivals, last, before, following, pe, start, finish):
    """Place a task where its finish plus `extra[PE]` is least, in gaps too (insertion). Returns its finish."""
    write_arrivals(graph, task, pe, finish, arrivals)
    least, to, begins, follows = np.inf, -1, 0.0, -1
    for candidate in range(len(arrivals)):
        us = graph.times[task, candidate]
        if us < np.inf and arrivals[candidate] + us + extra[candidate] < least:
            begin, behind = gap_for(task, arrivals[candidate], us, last[candidate], before, start, finish)
            if begin + us + extra[candidate] < least:
                least, to, begins, follows = begin + us + extra[candidate], candidate, begin, behind
    place(task, to, begins, graph.times[task, to], follows, last, before, following, pe, start, finish)
    return finish[task]


@njit_borrowed
def pop_highest(ready, num_ready, priority):
    """Take the ready task of highest priority (lowest number among equals) out of the list."""
    best = 0
    for i in range(1, num_ready):
        a, b = ready[i], ready[best]
        if priority[a] > priority[b] or (priority[a] == priority[b] and a < b):
            best = i
    task = ready[best]
    ready[best] = ready[num_ready - 1]
    return task


# -------------------------------------------------------------------------------------------------- algorithms


@njit(cache=True)
def insertion_kernel(graph, order, own):
    """Tasks in a topological order, each where it finishes first, in gaps too: on the PE own[task], -1: on any.

    order, own int64 (n,).
    """
    n, p = graph.times.shape
    pe, start, finish = np.full(n, -1), np.empty(n), np.empty(n)
    last, before, following, arrivals = np.full(p, -1), np.empty(n, np.int64), np.empty(n, np.int64), np.empty(p)
    extra = np.zeros(p)
    for task in order:
        if own[task] >= 0:
            extra[:] = np.inf
            extra[own[task]] = 0.0
        else:
            extra[:] = 0.0
        place_soonest(graph, task, extra, arrivals, last, before, following, pe, start, finish)
    return pe, start, finish


@njit(cache=True)
def heft_kernel(graph):
    """Tasks by upward rank, each where it finishes first. See `heft`."""
    n = len(graph.times)
    ranks = np.empty(n)
    write_upward_ranks(graph, ranks)
    return insertion_kernel(graph, np.argsort(-ranks, kind="mergesort"), np.full(n, -1))


@njit(cache=True)
def lookahead_kernel(graph):
    """HEFT that tries every PE and looks at its children's finish. See `lookahead_heft`."""
    n, p = graph.times.shape
    ranks, none = np.empty(n), np.zeros(p)
    write_upward_ranks(graph, ranks)
    order = np.argsort(-ranks, kind="mergesort")
    place_of = np.empty(n, np.int64)
    place_of[order] = np.arange(n)
    pe, start, finish = np.full(n, -1), np.empty(n), np.empty(n)
    last, before, following, arrivals = np.full(p, -1), np.empty(n, np.int64), np.empty(n, np.int64), np.empty(p)
    own = np.empty(p)
    for task in order:
        children = graph.out_task[graph.out_first[task] : graph.out_first[task + 1]]
        by_rank = children[np.argsort(place_of[children], kind="mergesort")]
        write_arrivals(graph, task, pe, finish, own)
        least, least_own, chosen = np.inf, np.inf, -1
        for to in range(p):
            us = graph.times[task, to]
            if us == np.inf:
                continue
            begin, behind = gap_for(task, own[to], us, last[to], before, start, finish)
            place(task, to, begin, us, behind, last, before, following, pe, start, finish)
            latest = begin + us
            for child in by_rank:
                latest = max(
                    latest, place_soonest(graph, child, none, arrivals, last, before, following, pe, start, finish)
                )
            for child in by_rank[::-1]:
                take_off(child, last, before, following, pe)
            take_off(task, last, before, following, pe)
            if latest < least or (latest == least and begin + us < least_own):
                least, least_own, chosen = latest, begin + us, to
        us = graph.times[task, chosen]
        begin, behind = gap_for(task, own[chosen], us, last[chosen], before, start, finish)
        place(task, chosen, begin, us, behind, last, before, following, pe, start, finish)
    return pe, start, finish


@njit(cache=True)
def cpop_kernel(graph):
    """Tasks by upward plus downward rank; those of the critical path share a PE. See `cpop`."""
    n, p = graph.times.shape
    up, down = np.empty(n), np.zeros(n)
    write_upward_ranks(graph, up)
    sums = link_sums(graph.latency, graph.bandwidth)
    for task in range(n):
        for edge in range(graph.in_first[task], graph.in_first[task + 1]):
            source = graph.in_task[edge]
            moved = mean_transfer_us(graph, graph.in_volume[edge], sums)
            down[task] = max(down[task], down[source] + mean_time(graph.times[source]) + moved)
    priority = up + down
    on_path = np.zeros(n, np.bool_)
    at = -1
    for task in range(n):
        is_entry = graph.in_first[task] == graph.in_first[task + 1]
        if is_entry and (at < 0 or priority[task] > priority[at]):
            at = task
    path_us = np.zeros(p)
    while at >= 0:
        on_path[at] = True
        path_us += graph.times[at]
        along = -1
        for edge in range(graph.out_first[at], graph.out_first[at + 1]):
            target = graph.out_task[edge]
            if along < 0 or priority[target] > priority[along]:
                along = target
        at = along
    path_pe = np.argmin(path_us)  # inf where it cannot run all of them
    share_pe = path_us[path_pe] < np.inf
    pe, start, finish = np.full(n, -1), np.empty(n), np.empty(n)
    last, before, following, arrivals = np.full(p, -1), np.empty(n, np.int64), np.empty(n, np.int64), np.empty(p)
    none, only_path = np.zeros(p), np.full(p, np.inf)
    only_path[path_pe] = 0.0
    ready, num_ready, missing = np.empty(n, np.int64), 0, np.diff(graph.in_first)
    for task in range(n):
        if missing[task] == 0:
            ready[num_ready] = task
            num_ready += 1
    while num_ready > 0:
        task = pop_highest(ready, num_ready, priority)
        num_ready -= 1
        extra = only_path if on_path[task] and share_pe else none
        place_soonest(graph, task, extra, arrivals, last, before, following, pe, start, finish)
        for edge in range(graph.out_first[task], graph.out_first[task + 1]):
            target = graph.out_task[edge]
            missing[target] -= 1
            if missing[target] == 0:
                ready[num_ready] = target
                num_ready += 1
    return pe, start, finish


@njit(cache=True)
def peft_kernel(graph):
    """Ready tasks by mean optimistic cost, each where finish plus optimistic cost is least. See `peft`."""
    n, p = graph.times.shape
    costs = np.empty((n, p))
    write_optimistic_costs(graph, costs)
    priority = np.zeros(n)
    for task in range(n):
        able = 0
        for to in range(p):
            if graph.times[task, to] < np.inf:
                priority[task] += costs[task, to]
                able += 1
        priority[task] /= able
    pe, start, finish = np.full(n, -1), np.empty(n), np.empty(n)
    last, before, following, arrivals = np.full(p, -1), np.empty(n, np.int64), np.empty(n, np.int64), np.empty(p)
    ready, num_ready, missing = np.empty(n, np.int64), 0, np.diff(graph.in_first)
    for task in range(n):
        if missing[task] == 0:
            ready[num_ready] = task
            num_ready += 1
    while num_ready > 0:
        task = pop_highest(ready, num_ready, priority)
        num_ready -= 1
        place_soonest(graph, task, costs[task], arrivals, last, before, following, pe, start, finish)
        for edge in range(graph.out_first[task], graph.out_first[task + 1]):
            target = graph.out_task[edge]
            missing[target] -= 1
            if missing[target] == 0:
                ready[num_ready] = target
                num_ready += 1
    return pe, start, finish


@njit(cache=True)
def order_kernel(graph, to, order):
    """Every task on its given PE as early as the order there and its data allow; PE -1 where they contradict."""
    n, p = graph.times.shape
    pe, start, finish = np.full(n, -1), np.empty(n), np.empty(n)
    free, arrivals = np.zeros(p), np.empty(p)
    queue_first = np.full(p, -1)
    behind, tail = np.full(n, -1), np.full(p, -1)
    for task in order:
        if tail[to[task]] < 0:
            queue_first[to[task]] = task
        else:
            behind[tail[to[task]]] = task
        tail[to[task]] = task
    missing, moved = np.diff(graph.in_first), True
    while moved:
        moved = False
        for at in range(p):
            task = queue_first[at]
            while task >= 0 and missing[task] == 0:
                write_arrivals(graph, task, pe, finish, arrivals)
                pe[task] = at
                start[task] = max(free[at], arrivals[at])
                finish[task] = start[task] + graph.times[task, at]
                free[at] = finish[task]
                for edge in range(graph.out_first[task], graph.out_first[task + 1]):
                    missing[graph.out_task[edge]] -= 1
                task = queue_first[at] = behind[task]
                moved = True
    return pe, start, finish


@cache
def compiled(kernel: Any) -> Callable[[Graph], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A kernel over graphs as `Graph.of` makes them, without numba's look-up of types: it costs more than 10 tasks."""
    smallest = Graph.of(Dag.from_arrays("smallest", [[1.0]]), uniform_soc(1))
    return entry_point(kernel, smallest)


def heft(graph: Graph) -> Plan:
    """Heterogeneous Earliest Finish Time with insertion (Topcuoglu, Hariri, Wu, TPDS 2002)."""
    return Plan(*compiled(heft_kernel)(graph))


def lookahead_heft(graph: Graph) -> Plan:
    """HEFT that gives a task the PE on which its children would finish first (Bittencourt et al., PDP 2010)."""
    return Plan(*compiled(lookahead_kernel)(graph))


def cpop(graph: Graph) -> Plan:
    """Critical Path On a Processor (Topcuoglu, Hariri, Wu, TPDS 2002).

    Where no PE can run the whole critical path, its tasks are placed like the others.
    """
    return Plan(*compiled(cpop_kernel)(graph))


def peft(graph: Graph) -> Plan:
    """Predict Earliest Finish Time (Arabnejad and Barbosa, TPDS 2014)."""
    return Plan(*compiled(peft_kernel)(graph))


STATIC = {"heft": heft, "lookahead_heft": lookahead_heft, "cpop": cpop, "peft": peft}
"""Static schedulers by name: `Graph` -> `Plan`."""


def plan_of_order(graph: Graph, pe: np.ndarray, order: np.ndarray) -> Plan:
    """The plan that runs tasks on given PEs in a given order, int64 (n,) each. Raises InputError.

    Only the order among tasks of one PE matters; it may not contradict the precedences.
    """
    targets = np.ascontiguousarray(pe, np.int64)
    order = np.ascontiguousarray(order, np.int64)
    n, p = graph.times.shape
    if sorted(order.tolist()) != list(range(n)) or len(targets) != n or not 0 <= targets.min() <= targets.max() < p:
        raise InputError(f"no order of {n} tasks on {p} PEs", remedy="Give every task once, and a PE for each")
    able = np.isfinite(graph.times[np.arange(n), targets])
    if not able.all():
        task = int(np.flatnonzero(~able)[0])
        raise InputError(f"task {task} cannot run on PE {targets[task]}", remedy="Give it a PE that can run it")
    plan = Plan(*order_kernel(graph, targets, order))
    if (plan.pe < 0).any():
        raise InputError(
            f"the order and the precedences contradict each other at task {np.flatnonzero(plan.pe < 0)[0]}",
            remedy="Order every PE's tasks so that no circle of waiting arises",
        )
    return plan


# ---------------------------------------------------------------------------------------------- following plans


@njit_borrowed
def follow(state, params, memory, decision):
    """Give tasks the PEs that the plan of their job's graph gives them, and keep its order on every PE.

    Bound when the job arrives: all tasks in the order of their planned start. Bound later: of each PE the next task of
    its plan, when that is ready; PEs whose next task is not wait. Jobs follow each other. params: number of graphs D,
    where the plan of each begins in this array (D), then the plans: task, PE by start, task -1 at the end. memory: for
    each PE the last decision in which it waited.
    """
    engine, tasks, bind = state.engine[0], state.tasks, decision.bind[0]
    memory[0] += 1.0
    waits = memory[1:]
    for i in range(engine.num_live):
        job = state.jobs[state.live[i]]
        at = int(params[1 + job.graph])
        while params[at] >= 0.0:
            number, pe = job.first_task + int(params[at]), int(params[at + 1])
            at += 2
            if tasks[number].status > READY or waits[pe] == memory[0]:
                continue
            if is_legal(state, number, pe, -1):
                bind.task, bind.pe = number, pe
                return
            waits[pe] = memory[0]


@njit_borrowed
def keep_places(state, params, memory, decision):
    """Give every ready task, in the order in which they became ready, the PE that its job's plan gives it.

    params: number of graphs D, where the PEs of each graph's tasks begin in this array (D), then the PEs by task.
    """
    bind = decision.bind[0]
    for i in range(state.engine[0].num_ready):
        number = state.ready[i]
        job = state.jobs[state.tasks[number].job]
        pe = int(params[int(params[1 + job.graph]) + number - job.first_task])
        if is_legal(state, number, pe, -1):
            bind.task, bind.pe = number, pe
            return


def plan_rule(name: str, plans: Sequence[Plan], source: str = "") -> Rule:
    """A rule that follows `plans[g]` for jobs of graph g, as published bound when a job arrives.

    With one job and no noise the run is the plan; with more jobs, each waits behind those before it. Bound late, it is
    the plan too if data move as soon as they are made (`SocDagSpec.transfers` "push").
    """
    rows = [np.append(np.stack([plan.order, plan.pe[plan.order]], 1).ravel(), -1) for plan in plans]
    return Rule(name, follow, packed(rows), memory_size=1, memory_per_pe=1, binding="arrival", source=source)


def placement_rule(name: str, plans: Sequence[Plan], source: str = "") -> Rule:
    """A rule that takes from `plans[g]` the PEs of the tasks only, and binds them as they become ready."""
    return Rule(name, keep_places, packed([plan.pe for plan in plans]), binding="ready", source=source)


def packed(rows: Sequence[np.ndarray]) -> np.ndarray:
    """float64: the number of rows, where each begins in this array, and the rows."""
    begins = 1 + len(rows) + np.cumsum([0, *map(len, rows)])[:-1]
    return np.concatenate([[len(rows)], begins, *rows]).astype(np.float64)
