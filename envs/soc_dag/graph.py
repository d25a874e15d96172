"""The graph observation of SoC scheduling: PEs and unfinished tasks of live jobs as nodes, and what joins them.

It shows what the action table (`table.py`) has been opened for, and is written after the observation of its rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.kernel import njit_borrowed, njit_inlined
from .look_ahead import FREE
from .state import BOUND, FINISHED, IDLE, READY, RUNNING, WAITING, State, data_from
from .table import Table, laxity_column, saturating

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
EDGE_FEATURES = (
    "precedence: mean us to move its data: x / (unit + x)",
    "task and PE: duration: x / (unit + x)",
    "task and PE: until it begins: x / (unit + x)",
    "task and PE: from its end there to its job's: x / (unit + x)",
)
NUM_NODE, NUM_EDGE = len(NODE_FEATURES), len(EDGE_FEATURES)

PRECEDES, MAY_RUN_ON, BOUND_TO = 0, 1, 2
"""Types of edges: task to successor; task to a PE that a row offers it; task to the PE that it is bound to."""
NUM_EDGE_TYPES = 3


class GraphArrays(NamedTuple):
    """A graph of V nodes and E edges beside K rows, by the names of the env's observation; of many envs with a leading
    axis."""

    nodes: np.ndarray  # (V, Fn) float32, PEs first
    edges: np.ndarray  # (2, E) int32 from node to node
    edge_type: np.ndarray  # (E,) int32 PRECEDES ...
    edge_mask: np.ndarray  # (E,) bool
    candidate_node: np.ndarray  # (K,) int32 node of a row's task, -1: none
    edge_features: np.ndarray  # (E, Fe) float32
    node_group: np.ndarray  # (V,) int32 job of a task, -1 for PEs and unused nodes
    candidate_place: np.ndarray  # (K,) int32 node of a row's PE, -1: none


def empty_graph(num_nodes: int, num_edges: int, num_rows: int) -> GraphArrays:
    """A graph without nodes."""
    return GraphArrays(
        np.zeros((num_nodes, NUM_NODE), np.float32),
        np.zeros((2, num_edges), np.int32),
        np.zeros(num_edges, np.int32),
        np.zeros(num_edges, np.bool_),
        np.full(num_rows, -1, np.int32),
        np.zeros((num_edges, NUM_EDGE), np.float32),
        np.full(num_nodes, -1, np.int32),
        np.full(num_rows, -1, np.int32),
    )


@njit_borrowed
def graph_of(graphs: GraphArrays, b: int) -> GraphArrays:
    """The graph of env b (views)."""
    return GraphArrays(
        graphs.nodes[b],
        graphs.edges[b],
        graphs.edge_type[b],
        graphs.edge_mask[b],
        graphs.candidate_node[b],
        graphs.edge_features[b],
        graphs.node_group[b],
        graphs.candidate_place[b],
    )


@njit_borrowed
def clear_graph(table: Table, graph: GraphArrays) -> None:
    """Show nothing."""
    cut_nodes(table, graph, 0)
    cut_edges(table, graph, 0)
    cut_rows(table, graph, 1)


@njit_inlined
def write_graph(state: State, table: Table, graph: GraphArrays) -> None:
    """PEs (nodes 0 to P - 1) and unfinished tasks of live jobs, with what joins them.

    Jobs that have rows come first, then the others by arrival; tasks beyond the room for nodes, and edges beyond that
    for edges, are left out. A row's node is its task's, -1 if that is left out; its place is its PE's.
    """
    engine, head, tasks, node_of = state.engine[0], table.head[0], state.tasks, table.node_of
    for pe in range(engine.num_pes):
        write_pe_node(state, pe, graph.nodes[pe])
        table.shown[pe] = -1
        graph.node_group[pe] = -1
    for i in range(engine.num_live):
        job = state.jobs[state.live[i]]
        for task in range(job.first_task, job.first_task + job.num_tasks):
            node_of[task] = -1
    num_nodes, group, before = engine.num_pes, 0, -1
    for i in range(1, head.num_rows + engine.num_live):
        has_row = i < head.num_rows
        of = tasks[table.rows[i, 0]].job if has_row else state.live[i - head.num_rows]
        if of == before or (has_row and node_of[table.rows[i, 0]] >= 0):
            continue
        before, shown = of, num_nodes
        num_nodes = show_job(state, table, graph, of, group, num_nodes)
        group += num_nodes > shown
    cut_nodes(table, graph, num_nodes)
    cut_edges(table, graph, write_edges(state, table, graph))
    for row in range(1, head.num_rows):
        graph.candidate_node[row] = node_of[table.rows[row, 0]]
        graph.candidate_place[row] = table.rows[row, 1]
    cut_rows(table, graph, head.num_rows)


@njit_inlined
def cut_nodes(table: Table, graph: GraphArrays, num_nodes: int) -> None:
    """Show so many nodes; those that were shown beyond them become zero."""
    for node in range(num_nodes, table.head[0].num_nodes):
        graph.nodes[node] = 0.0
        graph.node_group[node] = -1
    table.head[0].num_nodes = num_nodes


@njit_inlined
def cut_edges(table: Table, graph: GraphArrays, num_edges: int) -> None:
    """Show so many edges; those that were shown beyond them become zero."""
    head = table.head[0]
    for edge in range(num_edges, head.num_edges):
        graph.edges[0, edge] = 0
        graph.edges[1, edge] = 0
        graph.edge_type[edge] = 0
        graph.edge_features[edge] = 0.0
        graph.edge_mask[edge] = False
    for edge in range(head.num_edges, num_edges):
        graph.edge_mask[edge] = True
    head.num_edges = num_edges


@njit_inlined
def cut_rows(table: Table, graph: GraphArrays, num_rows: int) -> None:
    """Say where so many rows lie, row 0 included; those beyond them lie nowhere."""
    for row in range(num_rows, table.head[0].num_pointed):
        graph.candidate_node[row] = -1
        graph.candidate_place[row] = -1
    table.head[0].num_pointed = num_rows


@njit_inlined
def show_job(state: State, table: Table, graph: GraphArrays, number: int, group: int, num_nodes: int) -> int:
    """Nodes for the unfinished tasks of a job that have none, as far as there is room. Returns the number of nodes."""
    job, room = state.jobs[number], len(graph.nodes)
    now, unit = state.engine[0].now, state.engine[0].unit
    left, age = saturating(job.work_left, unit), saturating(now - job.arrival, unit)
    for task in range(job.first_task, job.first_task + job.num_tasks):
        if num_nodes == room:
            break
        if state.tasks[task].status != FINISHED and table.node_of[task] < 0:
            table.node_of[task] = num_nodes
            table.shown[num_nodes] = task
            graph.node_group[num_nodes] = group
            write_task_node(state, task, left, age, graph.nodes[num_nodes])
            num_nodes += 1
    return num_nodes


@njit_inlined
def write_task_node(state: State, number: int, left: float, age: float, out) -> None:
    """The columns of NODE_FEATURES for a task of a job of which so much is left, and which is so old, float32 (Fn,)."""
    engine, task = state.engine[0], state.tasks[number]
    unit, now, status = engine.unit, engine.now, task.status
    out[0] = 1.0
    out[1] = 0.0
    out[2] = status == WAITING
    out[3] = status == READY
    out[4] = status == BOUND
    out[5] = status == RUNNING
    out[6] = saturating(task.best, unit)
    out[7] = 1.0 - task.best / task.mean if task.mean > 0.0 else 0.0
    out[8] = saturating(task.rank, unit)
    out[9] = left
    out[10] = age
    out[11] = laxity_column(state.jobs[task.job].deadline, now, task.rank, unit)
    out[12] = task.num_missing / (1.0 + task.num_missing)
    out[13] = task.num_out / (4.0 + task.num_out)
    out[14] = saturating(now - task.start, unit)  # begins at inf before it runs
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
def write_edges(state: State, table: Table, graph: GraphArrays) -> int:
    """Edges among the nodes shown, first those of the rows. Returns their number."""
    tasks, rows, node_of, head = state.tasks, table.rows, table.node_of, table.head[0]
    edges, edge_type, edge_features = graph.edges, graph.edge_type, graph.edge_features
    room, unit, count = edges.shape[1], state.engine[0].unit, 0
    for row in range(1, head.num_rows):
        node = node_of[rows[row, 0]]
        again = row > 1 and rows[row, 0] == rows[row - 1, 0] and rows[row, 1] == rows[row - 1, 1]
        if node >= 0 and not again and count < room:  # a pair has a row for each operating point
            edges[0, count] = node
            edges[1, count] = rows[row, 1]
            edge_type[count] = MAY_RUN_ON
            write_placed(state, table, rows[row, 0], rows[row, 1], edge_features[count])
            count += 1
    for node in range(state.engine[0].num_pes, head.num_nodes):
        task = tasks[table.shown[node]]
        if task.status >= BOUND and count < room:
            edges[0, count] = node
            edges[1, count] = task.pe
            edge_type[count] = BOUND_TO
            write_placed(state, table, table.shown[node], task.pe, edge_features[count])
            count += 1
        for edge in range(task.first_out, task.first_out + task.num_out):
            target = node_of[state.edges[edge].target]
            if target >= 0 and count < room:
                edges[0, count] = node
                edges[1, count] = target
                edge_type[count] = PRECEDES
                edge_features[count, 0] = saturating(state.edges[edge].moved, unit)
                edge_features[count, 1] = 0.0
                edge_features[count, 2] = 0.0
                edge_features[count, 3] = 0.0
                count += 1
    return count


@njit_inlined
def write_placed(state: State, table: Table, task: int, pe: int, out) -> None:
    """The columns of EDGE_FEATURES for a task and a PE, float32 (Fe,)."""
    engine = state.engine[0]
    level = state.tasks[task].level if state.tasks[task].level >= 0 else state.default_level[pe]
    begin = max(table.outlook.of_pes[FREE, pe], data_from(engine) + state.transfer[task, pe])
    out[0] = 0.0
    out[1] = saturating(state.times[task, pe] * state.levels[pe, level].slowdown, engine.unit)
    out[2] = saturating(begin - engine.now, engine.unit) if state.tasks[task].status <= READY else 0.0
    out[3] = saturating(state.ahead[task, pe], engine.unit)
