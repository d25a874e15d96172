"""The action table of SoC scheduling: which rows can be chosen now, what they look like, what choosing one does.

The same kernels serve the simulated env and a real executor: they read a `State` and write a `Decision`. Row 0 waits;
it is masked when nothing is in progress. The other rows are pairs of a task that may be bound and a PE that may take
it, at each operating point where frequencies may be chosen. Of PEs of one kind on which a task would be finished at the
same time the first one is a row, and so is the first of the tasks of a job that are alike (a stage of a data-parallel
job). If there are more pairs than rows, the tasks of jobs with the least work left are shown.

What the columns say beyond the State is in the table's `Outlook` (`look_ahead.py`); the graph that an observation may
show beside the rows is written by `graph.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.kernel import njit_borrowed, njit_inlined
from .look_ahead import (
    BEST_PE,
    BY_END,
    BY_FINISH,
    COMING_AT,
    COMING_END,
    DEADLINE,
    FIRST_FINISH,
    FREE,
    IDLE_SHARE,
    JOB_END,
    LAX_BY_FINISH,
    LEAST_ENERGY,
    MOST,
    REGRET,
    SECOND,
    WHO,
    WORK_LEFT,
    Outlook,
    empty_outlook,
    look_ahead,
)
from .state import AT_ARRIVAL, AT_READY, IDLE, LATE, WAIT, Decision, State, data_from, is_legal

FEATURE_VERSION = 2
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
    "asked for: latency",
    "asked for: makespan",
    "asked for: energy",
    "asked for: energy-delay product",
    "asked for: deadlines",
    "frequencies may be chosen",
    "least that a row's job would end later than through its best PE: x / (unit + x)",
    "work left in live jobs / PEs, against the time until the last of them ends: x / (x + y)",
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
    "job ends later through here than through its best PE: x / (unit + x)",
    "the task's slack, its job's end less its own: x / (unit + x)",
    "job ends later through here than it would have to: x / (unit + x)",
    "later through its second best PE, if this is its best: x / (unit + x)",
    "later through its second best PE, for the task considered to which this PE matters most: x / (unit + x)",
    "mean duration against that here: (mean - here) / (mean + here)",
    "tasks considered of jobs with less work left: n / (2 + n)",
    "begins here now if jobs with least work left go first, to where tasks end first",
    "begins here now if jobs with least work left go first, to where jobs end first",
    "begins here now if jobs with least laxity go first, to where tasks end first",
    "job's deadline less its end / unit, within [-4, 4], / 4",
    "a task comes before this one ends here that this PE suits best",
    "its job's end less this one's: x / (unit + |x|)",
    "least energy on any PE against that here: 1 - least / here",
)
NUM_CONTEXT, NUM_CANDIDATE = len(CONTEXT_FEATURES), len(CANDIDATE_FEATURES)

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
    """The rows that can be chosen at one decision (K), what is worked out for them, what the graph shows (V nodes)."""

    head: np.ndarray  # (1,) TABLE_DTYPE
    rows: np.ndarray  # (K, 3) int64: task, PE, operating point; row 0 is not used
    shown: np.ndarray  # (V,) int64 task of each node, -1 for PEs
    node_of: np.ndarray  # (N,) int64 node of each task of a live job, -1: not shown
    outlook: Outlook


def empty_table(num_candidates: int, num_pes: int, num_jobs: int, num_tasks: int, num_nodes: int = 0) -> Table:
    """A Table for K rows."""
    return Table(
        np.zeros(1, TABLE_DTYPE),
        np.zeros((num_candidates, 3), np.int64),
        np.zeros(num_nodes, np.int64),
        np.full(num_tasks, -1, np.int64),
        empty_outlook(num_candidates, num_pes, num_jobs),
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
    """List the rows of the present decision.

    Where they are too many: every task at the governor's frequencies, and what there is room for of the other ones,
    by the work left in the tasks' jobs. Where these are still too many: as many tasks as there is room for, by that.
    """
    engine, head = state.engine[0], table.head[0]
    chosen = engine.num_levels > 1
    if list_ready(state, table, chosen):
        return
    if chosen and list_ready(state, table, False):
        add_levels(state, table)
        return
    head.num_rows = 1
    last_key, last = -np.inf, -1
    for _ in range(engine.num_ready):
        last_key, last = next_in_line(state, state.ready, 0, engine.num_ready, last_key, last)
        if not add_rows(state, table, state.ready[last], False):
            return


@njit_inlined
def next_in_line(state: State, numbers, first: int, end: int, last_key: float, last: int):
    """Of the tasks numbers[first:end], the next one by the work left in its job, then in order: (work, index)."""
    jobs, tasks = state.jobs, state.tasks
    best_key, best = np.inf, -1
    for i in range(first, end):
        key = jobs[tasks[numbers[i]].job].work_left
        if (key > last_key or (key == last_key and i > last)) and (best < 0 or key < best_key):
            best_key, best = key, i
    return best_key, best


@njit_inlined
def add_row(table: Table, task: int, pe: int, level: int) -> bool:
    """List a row; False if there is no room."""
    rows, at = table.rows, table.head[0].num_rows
    if at == len(rows):
        return False
    rows[at, 0], rows[at, 1], rows[at, 2] = task, pe, level
    table.head[0].num_rows = at + 1
    return True


@njit_inlined
def add_levels(state: State, table: Table) -> None:
    """List the rows that there are at other frequencies, too, as long as there is room."""
    levels, rows, last_key, last = state.levels, table.rows, -np.inf, -1
    listed = table.head[0].num_rows
    for _ in range(1, listed):
        last_key, last = next_in_line(state, rows[:, 0], 1, listed, last_key, last)
        pe, taken = rows[last, 1], rows[last, 2]
        for level in range(state.engine[0].num_levels):
            if levels[pe, level].slowdown == np.inf:
                break
            if level == taken:
                continue
            if not add_row(table, rows[last, 0], pe, level):
                return


@njit_inlined
def list_ready(state: State, table: Table, every_level: bool) -> bool:
    """List the rows of all tasks; False if there was no room for them."""
    table.head[0].num_rows = 1
    for i in range(state.engine[0].num_ready):  # noqa: SIM110 - numba knows no generators
        if not add_rows(state, table, state.ready[i], every_level):
            return False
    return True


@njit_inlined
def add_rows(state: State, table: Table, task: int, every_level: bool) -> bool:
    """List the rows of a task, at every level or the governor's; False if there was no room for all of them."""
    engine, pes, times, transfer, levels = state.engine[0], state.pes, state.times, state.transfer, state.levels
    head, rows = table.head[0], table.rows
    first, late = head.num_rows, engine.binding == LATE
    if late and (state.tasks[task].kinds & engine.idle_kinds) == 0:
        return True
    if first > 1 and are_alike(state, rows[first - 1, 0], task):
        return True
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
        lowest = 0 if every_level else state.default_level[pe]
        for level in range(lowest, engine.num_levels if every_level else lowest + 1):
            if levels[pe, level].slowdown == np.inf:
                break
            if not add_row(table, task, pe, level):
                return False
    return True


@njit_inlined
def are_alike(state: State, one: int, other: int) -> bool:
    """True if two tasks that may be bound differ in nothing but their number, and perhaps in where they are queued."""
    a, b = state.tasks[one], state.tasks[other]
    if a.job != b.job or a.rank != b.rank or a.num_out != b.num_out or a.status != b.status:
        return False
    for pe in range(state.engine[0].num_pes):
        if state.times[one, pe] != state.times[other, pe] or state.transfer[one, pe] != state.transfer[other, pe]:
            return False
    for i in range(a.num_out):
        x, y = state.edges[a.first_out + i], state.edges[b.first_out + i]
        if x.target != y.target or x.volume != y.volume:
            return False
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
    """The row that does what `wanted` does, or as good with another task or PE, at the nearest level; -1: none does."""
    bind, head, rows = wanted.bind[0], table.head[0], table.rows
    if bind.task == WAIT or not is_legal(state, bind.task, bind.pe, bind.level):
        return 0 if state.engine[0].num_in_progress > 0 else -1
    pes, transfer = state.pes, state.transfer
    level = bind.level if bind.level >= 0 else state.default_level[bind.pe]
    begin, nearest, found = begin_at(state.engine[0], pes, transfer, bind.task, bind.pe), np.inf, -1
    for row in range(1, head.num_rows):
        other, off = rows[row, 1], abs(rows[row, 2] - level)
        same = off < nearest and pes[other].kind == pes[bind.pe].kind
        same = same and (rows[row, 0] == bind.task or are_alike(state, rows[row, 0], bind.task))
        if same and begin_at(state.engine[0], pes, transfer, bind.task, other) == begin:
            nearest, found = off, row
    return found


# ----------------------------------------------------------------------------------------------- the observation


@njit_inlined
def saturating(value, unit):
    """value / (unit + value), 0 for nothing and less."""
    value = max(value, 0.0)  # and not a branch: it is as often nothing as not
    return value / (unit + value) if unit + value > 0.0 else 0.0


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
def signed(value, unit):
    """value / (unit + |value|)."""
    return value / (unit + abs(value))


@njit_inlined
def write_context(state: State, table: Table, context) -> None:
    """The columns of CONTEXT_FEATURES, float32 (C,), after `look_ahead`; "least later" is left to the rows."""
    engine, work, first_free, last = state.engine[0], 0.0, np.inf, 0.0
    unit = engine.unit
    for i in range(engine.num_live):
        work += state.jobs[state.live[i]].work_left
        last = max(last, table.outlook.job_end[state.live[i]] - engine.now)
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
    for objective in range(5):
        context[13 + objective] = engine.objective == objective
    context[18] = engine.num_levels > 1
    context[19] = 0.0
    context[20] = saturating(work, engine.num_pes * last) if last > 0.0 else 0.0


@njit_borrowed
def write_observation(state: State, table: Table, context, candidates, mask) -> None:
    """All that a policy sees of the rows: context float32 (C,), candidates float32 (K, F), mask bool (K,)."""
    look_ahead(state, table.rows, table.head[0].num_rows, table.outlook)
    write_context(state, table, context)
    write_mask(state, table, mask)
    context[19] = write_candidates(state, table, candidates)


@njit_inlined
def write_candidates(state: State, table: Table, candidates) -> float:
    """The columns of CANDIDATE_FEATURES, float32 (K, F), after `look_ahead`; rows that were filled before and are not
    now become zero. Returns the least "job ends later through here than through its best PE"."""
    engine, pes, jobs, tasks, levels = state.engine[0], state.pes, state.jobs, state.tasks, state.levels
    edges, head, rows, outlook = state.edges, table.head[0], table.rows, table.outlook
    of_pes, of_tasks, planned, num_considered = (
        outlook.of_pes,
        outlook.of_tasks,
        outlook.planned,
        outlook.num_considered[0],
    )
    now, unit, least_later = engine.now, engine.unit, np.inf
    candidates[0] = 0.0
    candidates[0, 0] = 1.0
    before, alone, i, earlier = -1, 0, -1, 0
    for row in range(1, head.num_rows):
        number, pe, out = rows[row, 0], rows[row, 1], candidates[row]
        task, level = tasks[number], levels[rows[row, 1], rows[row, 2]]
        job = jobs[task.job]
        if number != before:
            before, alone, earlier = number, 0, 0
            i = i + 1 if i + 1 < num_considered else 0  # mostly in the same order
            while outlook.considered[i] != number:
                i = i + 1 if i + 1 < num_considered else 0
            for edge in range(task.first_out, task.first_out + task.num_out):
                alone += tasks[edges[edge].target].num_missing == 1
            for other in range(num_considered):
                earlier += of_tasks[other, WORK_LEFT] < job.work_left
        ahead = of_tasks[i]
        spent = state.times[number, pe] * level.slowdown
        begin = max(of_pes[FREE, pe], data_from(engine) + state.transfer[number, pe])
        through, end = begin + spent + state.ahead[number, pe], outlook.job_end[task.job]
        energy = spent * level.watts
        later = max(through - ahead[JOB_END], 0.0)
        least_later = min(least_later, later)
        out[0] = 0.0
        out[1] = saturating(spent, unit)
        out[2] = saturating(begin - now, unit)
        out[3] = 1.0 - task.best / spent if spent > 0.0 else 0.0
        out[4] = saturating(begin + spent - ahead[FIRST_FINISH], unit)
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
        out[15] = saturating(energy, unit * engine.watts_unit)
        out[16] = 1.0 / level.slowdown
        out[17] = pes[pe].status == IDLE
        out[18] = of_pes[IDLE_SHARE, pe]
        out[19] = saturating(later, unit)
        out[20] = saturating(end - ahead[JOB_END], unit)
        out[21] = saturating(through - end, unit)
        is_best = same_place(state, table, number, pe, planned[BEST_PE, i])
        out[22] = saturating(ahead[REGRET], unit) if is_best else 0.0
        out[23] = saturating(of_pes[SECOND, pe] if of_pes[WHO, pe] == i else of_pes[MOST, pe], unit)
        out[24] = (task.mean - spent) / (task.mean + spent) if spent > 0.0 else 1.0
        out[25] = earlier / (2.0 + earlier)
        out[26] = same_place(state, table, number, pe, planned[BY_FINISH, i])
        out[27] = same_place(state, table, number, pe, planned[BY_END, i])
        out[28] = engine.objective == DEADLINE and same_place(state, table, number, pe, planned[LAX_BY_FINISH, i])
        out[29] = laxity_column(job.deadline, 0.0, end, unit)
        comes = of_pes[COMING_AT, pe] < begin + spent
        out[30] = comes
        out[31] = signed(of_pes[COMING_END, pe] - through, unit) if comes else 0.0
        least = ahead[LEAST_ENERGY]
        out[32] = 1.0 - least / energy if energy > least else 0.0
    for row in range(head.num_rows, head.num_filled):
        candidates[row] = 0.0
    head.num_filled = head.num_rows
    return saturating(least_later, unit) if least_later < np.inf else 1.0


@njit_inlined
def same_place(state: State, table: Table, task: int, pe: int, other: int) -> bool:
    """True if `other` (-1: none) is this PE, or one of its kind on which the task would begin at the same time."""
    if other < 0 or other == pe:
        return other == pe
    free, since = table.outlook.of_pes[FREE], data_from(state.engine[0])
    return state.pes[other].kind == state.pes[pe].kind and (
        max(free[pe], since + state.transfer[task, pe]) == max(free[other], since + state.transfer[task, other])
    )
