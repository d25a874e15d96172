"""The action table of SoC scheduling: which rows can be chosen now, what they look like, what choosing one does.

The same kernels serve the simulated env and a real executor: they read a `State` and write a `Decision`. Row 0 waits;
it is masked when nothing is in progress. The other rows are pairs of a task that may be bound and a PE that may take
it, at each operating point where frequencies may be chosen. Of PEs of one kind on which a task would be finished at the
same time the first one is a row. If there are more pairs than rows, the tasks of jobs with the least work left are
shown.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.kernel import njit_borrowed, njit_inlined
from .state import (
    AT_ARRIVAL,
    AT_READY,
    BOUND,
    FINISHED,
    IDLE,
    READY,
    RUNNING,
    WAIT,
    WAITING,
    Decision,
    State,
    data_from,
    is_legal,
)

FEATURE_VERSION = 1
"""Raised whenever the meaning of a column below changes: checkpoints of another version are refused."""

CONTEXT_FEATURES = (
    "tasks that may be bound: n / (8 + n)",
    "live jobs: n / (8 + n)",
    "PEs that are idle / PEs",
    "PEs in progress / PEs",
    "work left in live jobs / (PEs * unit): x / (1 + x)",
    "rate of arrivals: unit / (unit + mean gap)",
    "spread of the noise",
    "waiting is allowed",
    "rows in use / rows",
    "until the first busy PE is expected to be free: x / (unit + x)",
    "bound when ready",
    "bound when the job arrives",
    "data move as soon as they are made",
)
CANDIDATE_FEATURES = (
    "is row 0: wait",
    "duration here: x / (unit + x)",
    "until it begins here: x / (unit + x)",
    "slower here than on its fastest PE: 1 - fastest / here",
    "finished later here than on the PE that is expected first, busy ones included: x / (unit + x)",
    "upward rank: x / (unit + x)",
    "upward rank / (upward rank + shortest latency of the job)",
    "work left in the job: x / (unit + x)",
    "work left in the job / its work",
    "age of the job: x / (unit + x)",
    "age of the job / (age + its shortest latency)",
    "the job has a deadline",
    "laxity (deadline less now and rank) / unit, within [-4, 4], / 4",
    "successors: n / (4 + n)",
    "successors that wait for it alone: n / (1 + n)",
    "energy here: x / (unit of power * unit + x)",
    "speed of the operating point, of the highest",
    "the PE is idle",
    "idle PEs of this kind / PEs of this kind",
)
NODE_FEATURES = (
    "is a task",
    "is a PE",
    "task: waits for predecessors",
    "task: ready",
    "task: bound",
    "task: running",
    "task: shortest duration: x / (unit + x)",
    "task: 1 - shortest / mean duration",
    "task: upward rank: x / (unit + x)",
    "task: work left in its job: x / (unit + x)",
    "task: age of its job: x / (unit + x)",
    "task: laxity / unit, within [-4, 4], / 4",
    "task: missing predecessors: n / (1 + n)",
    "task: successors: n / (4 + n)",
    "task: time since its start: x / (unit + x)",
    "PE: idle",
    "PE: until it is expected to be free: x / (unit + x)",
    "PE: power / (power + unit of power)",
)
NUM_CONTEXT, NUM_CANDIDATE, NUM_NODE = len(CONTEXT_FEATURES), len(CANDIDATE_FEATURES), len(NODE_FEATURES)

PRECEDES, MAY_RUN_ON, BOUND_TO = 0, 1, 2
"""Types of edges: task to successor; task to a PE that a row offers it; task to the PE that it is bound to."""
NUM_EDGE_TYPES = 3

TABLE_DTYPE = np.dtype(
    [
        ("num_rows", "i8"),  # rows that are filled, row 0 included
        ("num_filled", "i8"),  # rows of the observation that are filled
        ("num_nodes", "i8"),  # nodes of the graph observation that are filled
        ("num_edges", "i8"),  # edges of it that are filled
        ("num_pointed", "i8"),  # rows whose node is given
    ],
    align=True,
)


class Table(NamedTuple):
    """The rows that can be chosen at one decision (K), and what the graph shows (V nodes)."""

    head: np.ndarray  # (1,) TABLE_DTYPE
    rows: np.ndarray  # (K, 3) int64: task, PE, operating point; row 0 is not used
    shown: np.ndarray  # (V,) int64 task of each node, -1 for PEs
    node_of: np.ndarray  # (N,) int64 node of each task of a live job, -1: not shown


def empty_table(num_candidates: int, num_tasks: int, num_nodes: int = 0) -> Table:
    """A Table for K rows."""
    return Table(
        np.zeros(1, TABLE_DTYPE),
        np.zeros((num_candidates, 3), np.int64),
        np.zeros(num_nodes, np.int64),
        np.full(num_tasks, -1, np.int64),
    )


# ----------------------------------------------------------------------------------------------------- the rows


@njit_inlined
def begin_at(engine, pes, transfer, task: int, pe: int) -> float:
    """When a task is expected to begin on a PE, if bound now."""
    row = pes[pe]
    free = engine.now if row.status == IDLE else max(engine.now, row.expected_end) + row.queued
    return max(free, data_from(engine) + transfer[task, pe])


@njit_borrowed
def open_table(state: State, table: Table) -> None:
    """List the rows of the present decision."""
    engine, ready, jobs, tasks, head = state.engine[0], state.ready, state.jobs, state.tasks, table.head[0]
    head.num_rows = 1
    for i in range(engine.num_ready):
        if not add_rows(state, table, ready[i]):
            break
    else:
        return
    head.num_rows = 1
    last_key, last = -np.inf, -1
    for _ in range(engine.num_ready):  # too many: by the work left in their jobs, then in the order of `ready`
        best_key, best = np.inf, -1
        for i in range(engine.num_ready):
            key = jobs[tasks[ready[i]].job].work_left
            if (key > last_key or (key == last_key and i > last)) and (best < 0 or key < best_key):
                best_key, best = key, i
        if not add_rows(state, table, ready[best]):
            return
        last_key, last = best_key, best


@njit_inlined
def add_rows(state: State, table: Table, task: int) -> bool:
    """List the rows of a task; False if there was no room for all of them."""
    engine, pes, times, transfer, levels = state.engine[0], state.pes, state.times, state.transfer, state.levels
    head, rows = table.head[0], table.rows
    first, late = head.num_rows, engine.binding != AT_READY and engine.binding != AT_ARRIVAL
    for pe in range(engine.num_pes):
        if times[task, pe] == np.inf or (late and pes[pe].status != IDLE):
            continue
        begin, is_new = begin_at(engine, pes, transfer, task, pe), True
        for row in range(first, head.num_rows):
            other = rows[row, 1]
            if pes[other].kind == pes[pe].kind and begin_at(engine, pes, transfer, task, other) == begin:
                is_new = False
                break
        if not is_new:
            continue
        lowest = 0 if engine.num_levels > 1 else state.default_level[pe]
        for level in range(lowest, engine.num_levels if engine.num_levels > 1 else lowest + 1):
            if levels[pe, level].slowdown == np.inf:
                break
            if head.num_rows == len(rows):
                return False
            rows[head.num_rows, 0] = task
            rows[head.num_rows, 1] = pe
            rows[head.num_rows, 2] = level
            head.num_rows += 1
    return True


@njit_borrowed
def choose(table: Table, decision: Decision, row: int) -> None:
    """Write what a row means."""
    bind = decision.bind[0]
    if row == 0:
        bind.task, bind.pe, bind.level = WAIT, -1, -1
    else:
        bind.task, bind.pe, bind.level = table.rows[row, 0], table.rows[row, 1], table.rows[row, 2]


@njit_borrowed
def action_of(state: State, table: Table, wanted: Decision) -> int:
    """The row that does what `wanted` does, or the same on a PE that is as good; else to wait, or the first row."""
    bind, head, rows = wanted.bind[0], table.head[0], table.rows
    may_wait = state.engine[0].num_in_progress > 0
    if bind.task != WAIT and is_legal(state, bind.task, bind.pe, bind.level):
        engine, pes, transfer = state.engine[0], state.pes, state.transfer
        level = bind.level if bind.level >= 0 else state.default_level[bind.pe]
        begin = begin_at(engine, pes, transfer, bind.task, bind.pe)
        for row in range(1, head.num_rows):
            other = rows[row, 1]
            same = rows[row, 0] == bind.task and rows[row, 2] == level and pes[other].kind == pes[bind.pe].kind
            if same and begin_at(engine, pes, transfer, bind.task, other) == begin:
                return row
    return 0 if may_wait else 1


# ----------------------------------------------------------------------------------------------- the observation


@njit_inlined
def saturating(value, unit):
    """value / (unit + value), 0 for nothing."""
    return value / (unit + value) if value > 0.0 else 0.0


@njit_inlined
def laxity_column(deadline, now, rank, unit):
    """Laxity in units, within [-4, 4], / 4; 1 without a deadline."""
    return min(max((deadline - now - rank) / unit, -4.0), 4.0) * 0.25


@njit_inlined
def write_mask(state: State, table: Table, mask) -> None:
    """Legal rows, bool (K,)."""
    for row in range(len(mask)):
        mask[row] = row < table.head[0].num_rows
    mask[0] = state.engine[0].num_in_progress > 0


@njit_inlined
def write_context(state: State, table: Table, context) -> None:
    """The columns of CONTEXT_FEATURES, float32 (C,)."""
    engine, work, first_free = state.engine[0], 0.0, np.inf
    unit = engine.unit
    for i in range(engine.num_live):
        work += state.jobs[state.live[i]].work_left
    for pe in range(engine.num_pes):
        if state.pes[pe].status != IDLE:
            first_free = min(first_free, max(state.pes[pe].expected_end, engine.now))
    context[0] = engine.num_ready / (8.0 + engine.num_ready)
    context[1] = engine.num_live / (8.0 + engine.num_live)
    context[2] = engine.num_idle / engine.num_pes
    context[3] = engine.num_in_progress / engine.num_pes
    context[4] = saturating(work, engine.num_pes * unit)
    context[5] = unit / (unit + engine.mean_gap) if engine.num_arrived > 1 else 0.0
    context[6] = engine.noise_sigma
    context[7] = engine.num_in_progress > 0
    context[8] = table.head[0].num_rows / len(table.rows)
    context[9] = saturating(first_free - engine.now, unit) if first_free < np.inf else 0.0
    context[10] = engine.binding == AT_READY
    context[11] = engine.binding == AT_ARRIVAL
    context[12] = engine.pushed


@njit_inlined
def write_candidates(state: State, table: Table, candidates) -> None:
    """The columns of CANDIDATE_FEATURES, float32 (K, F); rows that were filled before and are not now become zero."""
    engine, pes, jobs, tasks, levels = state.engine[0], state.pes, state.jobs, state.tasks, state.levels
    times, transfer, edges, head, rows = state.times, state.transfer, state.edges, table.head[0], table.rows
    now, unit = engine.now, engine.unit
    candidates[0] = 0.0
    candidates[0, 0] = 1.0
    before, soonest, alone = -1, np.inf, 0
    for row in range(1, head.num_rows):
        number, pe, out = rows[row, 0], rows[row, 1], candidates[row]
        task, level = tasks[number], levels[rows[row, 1], rows[row, 2]]
        job = jobs[task.job]
        if number != before:
            before, soonest, alone = number, np.inf, 0
            for other in range(engine.num_pes):
                if times[number, other] < np.inf:
                    spent = times[number, other] * levels[other, state.default_level[other]].slowdown
                    soonest = min(soonest, begin_at(engine, pes, transfer, number, other) + spent)
            for edge in range(task.first_out, task.first_out + task.num_out):
                alone += tasks[edges[edge].target].num_missing == 1
        idle, count = 0, 0
        for other in range(engine.num_pes):
            if pes[other].kind == pes[pe].kind:
                count += 1
                idle += pes[other].status == IDLE
        spent = times[number, pe] * level.slowdown
        begin = begin_at(engine, pes, transfer, number, pe)
        out[0] = 0.0
        out[1] = saturating(spent, unit)
        out[2] = saturating(begin - now, unit)
        out[3] = 1.0 - task.best / spent if spent > 0.0 else 0.0
        out[4] = saturating(begin + spent - soonest, unit)
        out[5] = saturating(task.rank, unit)
        out[6] = saturating(task.rank, job.shortest)
        out[7] = saturating(job.work_left, unit)
        out[8] = job.work_left / job.work if job.work > 0.0 else 0.0
        out[9] = saturating(now - job.arrival, unit)
        out[10] = saturating(now - job.arrival, job.shortest)
        out[11] = job.deadline < np.inf
        out[12] = laxity_column(job.deadline, now, task.rank, unit)
        out[13] = task.num_out / (4.0 + task.num_out)
        out[14] = alone / (1.0 + alone)
        out[15] = saturating(spent * level.watts, unit * engine.watts_unit)
        out[16] = 1.0 / level.slowdown
        out[17] = pes[pe].status == IDLE
        out[18] = idle / count
    for row in range(head.num_rows, head.num_filled):
        candidates[row] = 0.0
    head.num_filled = head.num_rows


# --------------------------------------------------------------------------------------------------- the graph


@njit_borrowed
def write_graph(state: State, table: Table, nodes, edges, edge_type, edge_mask, candidate_node) -> None:
    """PEs (nodes 0 to P - 1) and unfinished tasks of live jobs, with what joins them.

    Jobs that have rows come first, then the others by arrival; tasks beyond the room for nodes, and edges beyond that
    for edges, are left out. A row's node is its task's, -1 if that is left out.
    """
    engine, head = state.engine[0], table.head[0]
    for pe in range(engine.num_pes):
        write_pe_node(state, pe, nodes[pe])
        table.shown[pe] = -1
    for i in range(engine.num_live):
        job = state.jobs[state.live[i]]
        table.node_of[job.first_task : job.first_task + job.num_tasks] = -1
    num_nodes = engine.num_pes
    before = -1
    for row in range(1, head.num_rows):
        of = state.tasks[table.rows[row, 0]].job
        if of != before and table.node_of[table.rows[row, 0]] < 0:
            num_nodes = show_job(state, table, of, num_nodes, nodes)
        before = of
    for i in range(engine.num_live):
        num_nodes = show_job(state, table, state.live[i], num_nodes, nodes)
    for node in range(num_nodes, head.num_nodes):
        nodes[node] = 0.0
    head.num_nodes = num_nodes
    num_edges = write_edges(state, table, edges, edge_type)
    for edge in range(num_edges, head.num_edges):
        edges[0, edge] = 0
        edges[1, edge] = 0
        edge_type[edge] = 0
        edge_mask[edge] = False
    for edge in range(head.num_edges, num_edges):
        edge_mask[edge] = True
    head.num_edges = num_edges
    for row in range(1, head.num_rows):
        candidate_node[row] = table.node_of[table.rows[row, 0]]
    for row in range(head.num_rows, head.num_pointed):
        candidate_node[row] = -1
    head.num_pointed = head.num_rows


@njit_inlined
def show_job(state: State, table: Table, number: int, num_nodes: int, nodes) -> int:
    """Nodes for the unfinished tasks of a job that have none, as far as there is room. Returns the number of nodes."""
    job = state.jobs[number]
    for task in range(job.first_task, job.first_task + job.num_tasks):
        if num_nodes == len(nodes):
            break
        if state.tasks[task].status != FINISHED and table.node_of[task] < 0:
            table.node_of[task] = num_nodes
            table.shown[num_nodes] = task
            write_task_node(state, task, nodes[num_nodes])
            num_nodes += 1
    return num_nodes


@njit_inlined
def write_task_node(state: State, number: int, out) -> None:
    """The columns of NODE_FEATURES for a task, float32 (Fn,)."""
    engine, task = state.engine[0], state.tasks[number]
    job, unit, now = state.jobs[task.job], engine.unit, engine.now
    out[0] = 1.0
    out[1] = 0.0
    out[2] = task.status == WAITING
    out[3] = task.status == READY
    out[4] = task.status == BOUND
    out[5] = task.status == RUNNING
    out[6] = saturating(task.best, unit)
    out[7] = 1.0 - task.best / task.mean if task.mean > 0.0 else 0.0
    out[8] = saturating(task.rank, unit)
    out[9] = saturating(job.work_left, unit)
    out[10] = saturating(now - job.arrival, unit)
    out[11] = laxity_column(job.deadline, now, task.rank, unit)
    out[12] = task.num_missing / (1.0 + task.num_missing)
    out[13] = task.num_out / (4.0 + task.num_out)
    out[14] = saturating(now - task.start, unit) if task.status == RUNNING else 0.0
    out[15] = 0.0
    out[16] = 0.0
    out[17] = 0.0


@njit_inlined
def write_pe_node(state: State, pe: int, out) -> None:
    """The columns of NODE_FEATURES for a PE, float32 (Fn,)."""
    engine, row = state.engine[0], state.pes[pe]
    watts = state.levels[pe, state.default_level[pe]].watts
    free = engine.now if row.status == IDLE else max(engine.now, row.expected_end) + row.queued
    out[:] = 0.0
    out[1] = 1.0
    out[15] = row.status == IDLE
    out[16] = saturating(free - engine.now, engine.unit)
    out[17] = saturating(watts, engine.watts_unit)


@njit_inlined
def write_edges(state: State, table: Table, edges, edge_type) -> int:
    """Edges among the nodes shown, first those of the rows. Returns their number."""
    tasks, head, room, count = state.tasks, table.head[0], edges.shape[1], 0
    for row in range(1, head.num_rows):
        node = table.node_of[table.rows[row, 0]]
        again = (
            row > 1 and table.rows[row, 0] == table.rows[row - 1, 0] and table.rows[row, 1] == table.rows[row - 1, 1]
        )
        if node >= 0 and not again and count < room:  # a pair has a row for each operating point
            edges[0, count] = node
            edges[1, count] = table.rows[row, 1]
            edge_type[count] = MAY_RUN_ON
            count += 1
    for node in range(state.engine[0].num_pes, head.num_nodes):
        task = tasks[table.shown[node]]
        if task.status >= BOUND and count < room:
            edges[0, count] = node
            edges[1, count] = task.pe
            edge_type[count] = BOUND_TO
            count += 1
        for edge in range(task.first_out, task.first_out + task.num_out):
            target = table.node_of[state.edges[edge].target]
            if target >= 0 and count < room:
                edges[0, count] = node
                edges[1, count] = target
                edge_type[count] = PRECEDES
                count += 1
    return count
