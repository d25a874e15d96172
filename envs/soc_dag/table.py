"""The action table of SoC scheduling: which rows can be chosen now, what they look like, what choosing one does.

The same kernels serve the simulated env and a real executor: they read a `State` and write a `Decision`. Row 0 waits;
it is masked when nothing is in progress. The other rows are pairs of a task that may be bound and a PE that may take
it, at each operating point where frequencies may be chosen. Of PEs of one kind on which a task would be finished at the
same time the first one is a row, and so is the first of the tasks of a job that are alike (a stage of a data-parallel
job). If there are more pairs than rows, the tasks of jobs with the least work left are shown.

What the columns say beyond the State is worked out by `look_ahead`: which job would end when, who else wants a PE, and
whom a list scheduler would put where.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.kernel import njit_borrowed, njit_inlined
from .spec import OBJECTIVES
from .state import (
    AT_ARRIVAL,
    AT_READY,
    BOUND,
    BUSY,
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

FEATURE_VERSION = 2
"""Raised whenever the meaning of a column below changes: checkpoints of another version are refused."""

DEADLINE = OBJECTIVES.index("deadline")

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
NUM_CONTEXT, NUM_CANDIDATE, NUM_NODE = len(CONTEXT_FEATURES), len(CANDIDATE_FEATURES), len(NODE_FEATURES)
NUM_EDGE = len(EDGE_FEATURES)

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
        ("num_considered", "i8"),  # tasks that `look_ahead` considers
    ],
    align=True,
)


CONSIDERED = 4
"""Tasks that `look_ahead` considers, in numbers of rows: if more may be bound, only those that have rows."""

FIRST_FINISH, JOB_END, REGRET, LEAST_ENERGY = range(4)
"""Columns of `Table.outlook`: earliest finish on any PE; its job's end through its best PE; how much later that is
through the second best; least energy."""
BEST_PE, BY_FINISH, BY_END, BY_LAXITY, ORDER = range(5)
"""Rows of `Table.planned`: the PE through which its job ends first; the PE on which a list scheduler would begin it now
(-1: on none); the order of a list."""
FREE, PLANNED_FREE, MOST, SECOND, WHO, COMING_AT, COMING_END = range(7)
"""Rows of `Table.of_pes`: when it is free; the same, as planned; the highest `REGRET` of tasks whose best PE it is, the
second highest, and whose the highest is; when the next task that it suits best will be ready (inf: none comes), and the
end of that one's job."""


class Table(NamedTuple):
    """The rows that can be chosen at one decision (K), what is worked out for them, what the graph shows (V nodes)."""

    head: np.ndarray  # (1,) TABLE_DTYPE
    rows: np.ndarray  # (K, 3) int64: task, PE, operating point; row 0 is not used
    shown: np.ndarray  # (V,) int64 task of each node, -1 for PEs
    node_of: np.ndarray  # (N,) int64 node of each task of a live job, -1: not shown
    considered: np.ndarray  # (4K,) int64 tasks
    outlook: np.ndarray  # (4K, 4) float64 of the tasks considered: FIRST_FINISH ...
    planned: np.ndarray  # (5, 4K) int64 of the tasks considered: BEST_PE ...
    of_pes: np.ndarray  # (7, P) float64: FREE ...
    job_end: np.ndarray  # (J,) float64 when each live job would end at best, by what is ready or begun


def empty_table(num_candidates: int, num_pes: int, num_jobs: int, num_tasks: int, num_nodes: int = 0) -> Table:
    """A Table for K rows."""
    most = CONSIDERED * num_candidates
    return Table(
        np.zeros(1, TABLE_DTYPE),
        np.zeros((num_candidates, 3), np.int64),
        np.zeros(num_nodes, np.int64),
        np.full(num_tasks, -1, np.int64),
        np.zeros(most, np.int64),
        np.zeros((most, 4)),
        np.zeros((5, most), np.int64),
        np.zeros((7, num_pes)),
        np.zeros(num_jobs),
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
    """The row that does what `wanted` does, or as good with another task or PE; else to wait, or the first row."""
    bind, head, rows = wanted.bind[0], table.head[0], table.rows
    may_wait = state.engine[0].num_in_progress > 0
    if bind.task != WAIT and is_legal(state, bind.task, bind.pe, bind.level):
        engine, pes, transfer = state.engine[0], state.pes, state.transfer
        level = bind.level if bind.level >= 0 else state.default_level[bind.pe]
        begin = begin_at(engine, pes, transfer, bind.task, bind.pe)
        for row in range(1, head.num_rows):
            other = rows[row, 1]
            same = rows[row, 2] == level and pes[other].kind == pes[bind.pe].kind
            same = same and (rows[row, 0] == bind.task or are_alike(state, rows[row, 0], bind.task))
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
def signed(value, unit):
    """value / (unit + |value|)."""
    return value / (unit + abs(value))


# What is worked out -----------------------------------------------------------------------------------------


@njit_borrowed
def look_ahead(state: State, table: Table) -> None:
    """Fill what the Table holds beside its rows, for the present decision."""
    engine, head, of_pes, job_end = state.engine[0], table.head[0], table.of_pes, table.job_end
    now = engine.now
    consider(state, table)
    for i in range(engine.num_live):
        job_end[state.live[i]] = now
    for pe in range(engine.num_pes):
        row = state.pes[pe]
        of_pes[FREE, pe] = now if row.status == IDLE else max(now, row.expected_end) + row.queued
        of_pes[MOST, pe] = of_pes[SECOND, pe] = 0.0
        of_pes[WHO, pe] = -1.0
        of_pes[COMING_AT, pe] = np.inf
        of_pes[COMING_END, pe] = 0.0
        if row.status != IDLE:
            job = state.tasks[row.task].job
            job_end[job] = max(job_end[job], max(now, row.expected_end) + state.ahead[row.task, pe])
    for i in range(head.num_considered):
        write_outlook(state, table, i)
        job = state.tasks[table.considered[i]].job
        job_end[job] = max(job_end[job], table.outlook[i, JOB_END])
        best, regret = table.planned[BEST_PE, i], table.outlook[i, REGRET]
        if regret > of_pes[MOST, best]:
            of_pes[SECOND, best] = of_pes[MOST, best]
            of_pes[MOST, best] = regret
            of_pes[WHO, best] = i
        elif regret > of_pes[SECOND, best]:
            of_pes[SECOND, best] = regret
    for pe in range(engine.num_pes):
        if state.pes[pe].status == BUSY:
            look_behind(state, table, pe)
    write_order(state, table, False)
    plan_list(state, table, BY_FINISH, 0.0)
    plan_list(state, table, BY_END, 1.0)
    if engine.objective == DEADLINE:
        write_order(state, table, True)
        plan_list(state, table, BY_LAXITY, 0.0)


@njit_inlined
def consider(state: State, table: Table) -> None:
    """List the tasks considered: all that may be bound, or if they are too many those that have rows."""
    head, considered, num_ready = table.head[0], table.considered, state.engine[0].num_ready
    if num_ready <= len(considered):
        for i in range(num_ready):
            considered[i] = state.ready[i]
        head.num_considered = num_ready
        return
    head.num_considered = 0
    for row in range(1, head.num_rows):
        if row == 1 or table.rows[row, 0] != table.rows[row - 1, 0]:
            considered[head.num_considered] = table.rows[row, 0]
            head.num_considered += 1


@njit_inlined
def write_outlook(state: State, table: Table, i: int) -> None:
    """The row of `outlook` and the best PE of one task considered."""
    engine, task = state.engine[0], table.considered[i]
    free, since = table.of_pes[FREE], data_from(engine)
    first, end, second, energy, best = np.inf, np.inf, np.inf, np.inf, -1
    for pe in range(engine.num_pes):
        us = state.times[task, pe]
        if us == np.inf:
            continue
        level = state.levels[pe, state.default_level[pe]]
        spent = us * level.slowdown
        finish = max(free[pe], since + state.transfer[task, pe]) + spent
        through = finish + state.ahead[task, pe]
        first, energy = min(first, finish), min(energy, spent * level.watts)
        if through < end:
            second, end, best = end, through, pe
        else:
            second = min(second, through)
    out = table.outlook[i]
    out[FIRST_FINISH] = first
    out[JOB_END] = end
    out[REGRET] = second - end if second < np.inf else 4.0 * engine.unit  # no other PE can run it
    out[LEAST_ENERGY] = energy
    table.planned[BEST_PE, i] = best


@njit_inlined
def look_behind(state: State, table: Table, pe: int) -> None:
    """Tasks that the one executing on a PE will make ready: which PE suits each best, and when its job would end."""
    engine, tasks, of_pes = state.engine[0], state.tasks, table.of_pes
    running, at = tasks[state.pes[pe].task], max(engine.now, state.pes[pe].expected_end)
    for edge in range(running.first_out, running.first_out + running.num_out):
        number = state.edges[edge].target
        if tasks[number].num_missing != 1 or tasks[number].status != WAITING:
            continue
        best, end = -1, np.inf
        for to in range(engine.num_pes):
            us = state.times[number, to]
            if us < np.inf:
                through = max(of_pes[FREE, to], at) + us + state.ahead[number, to]
                if through < end:
                    best, end = to, through
        if end > of_pes[COMING_END, best]:
            of_pes[COMING_END, best] = end
            of_pes[COMING_AT, best] = at


@njit_inlined
def write_order(state: State, table: Table, by_laxity: bool) -> None:
    """Sort the tasks considered: by the work left in their jobs, or these' laxity, then the most critical first."""
    tasks, jobs, order, count = state.tasks, state.jobs, table.planned[ORDER], table.head[0].num_considered
    for i in range(count):
        one = tasks[table.considered[i]].job
        key = jobs[one].deadline - table.job_end[one] if by_laxity else jobs[one].work_left
        end, at = table.outlook[i, JOB_END], i
        while at > 0:
            other = tasks[table.considered[order[at - 1]]].job
            before = jobs[other].deadline - table.job_end[other] if by_laxity else jobs[other].work_left
            if before < key or (before == key and table.outlook[order[at - 1], JOB_END] >= end):
                break
            order[at] = order[at - 1]
            at -= 1
        order[at] = i


@njit_borrowed
def plan_list(state: State, table: Table, which: int, weight: float) -> None:
    """Give the tasks considered, in `ORDER`, each the PE on which finish plus `weight` times what is ahead is least,
    behind those before it; write where each would begin now."""
    engine, pes, planned, free = state.engine[0], state.pes, table.planned, table.of_pes[PLANNED_FREE]
    now, since, count, idle = engine.now, data_from(engine), table.head[0].num_considered, engine.num_idle
    for pe in range(engine.num_pes):
        free[pe] = table.of_pes[FREE, pe]
    for place in range(count):
        i = planned[ORDER, place]
        planned[which, i] = -1
        if idle == 0:
            continue
        task, to, least, ends = table.considered[i], -1, np.inf, 0.0
        for pe in range(engine.num_pes):
            us = state.times[task, pe]
            if us < np.inf:
                finish = max(free[pe], since + state.transfer[task, pe])
                finish += us * state.levels[pe, state.default_level[pe]].slowdown
                if finish + weight * state.ahead[task, pe] < least:
                    to, least, ends = pe, finish + weight * state.ahead[task, pe], finish
        if pes[to].status == IDLE and free[to] == now:
            planned[which, i] = to
            idle -= 1
        free[to] = ends


# What is written ---------------------------------------------------------------------------------------------


@njit_inlined
def write_context(state: State, table: Table, context) -> None:
    """The columns of CONTEXT_FEATURES, float32 (C,), after `look_ahead`; "least later" is left to the rows."""
    engine, work, first_free, last = state.engine[0], 0.0, np.inf, 0.0
    unit = engine.unit
    for i in range(engine.num_live):
        work += state.jobs[state.live[i]].work_left
        last = max(last, table.job_end[state.live[i]] - engine.now)
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
    look_ahead(state, table)
    write_context(state, table, context)
    write_mask(state, table, mask)
    context[19] = write_candidates(state, table, candidates)


@njit_inlined
def write_candidates(state: State, table: Table, candidates) -> float:
    """The columns of CANDIDATE_FEATURES, float32 (K, F), after `look_ahead`; rows that were filled before and are not
    now become zero. Returns the least "job ends later through here than through its best PE"."""
    engine, pes, jobs, tasks, levels = state.engine[0], state.pes, state.jobs, state.tasks, state.levels
    edges, head, rows, of_pes = state.edges, table.head[0], table.rows, table.of_pes
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
            i = (i + 1) % head.num_considered  # mostly in the same order
            while table.considered[i] != number:
                i = (i + 1) % head.num_considered
            for edge in range(task.first_out, task.first_out + task.num_out):
                alone += tasks[edges[edge].target].num_missing == 1
            for other in range(head.num_considered):
                earlier += jobs[tasks[table.considered[other]].job].work_left < job.work_left
        outlook = table.outlook[i]
        idle, count = 0, 0
        for other in range(engine.num_pes):
            if pes[other].kind == pes[pe].kind:
                count += 1
                idle += pes[other].status == IDLE
        spent = state.times[number, pe] * level.slowdown
        begin = max(of_pes[FREE, pe], data_from(engine) + state.transfer[number, pe])
        through, end = begin + spent + state.ahead[number, pe], table.job_end[task.job]
        energy = spent * level.watts
        later = max(through - outlook[JOB_END], 0.0)
        least_later = min(least_later, later)
        out[0] = 0.0
        out[1] = saturating(spent, unit)
        out[2] = saturating(begin - now, unit)
        out[3] = 1.0 - task.best / spent if spent > 0.0 else 0.0
        out[4] = saturating(begin + spent - outlook[FIRST_FINISH], unit)
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
        out[18] = idle / count
        out[19] = saturating(later, unit)
        out[20] = saturating(end - outlook[JOB_END], unit)
        out[21] = saturating(through - end, unit)
        is_best = same_place(state, table, number, pe, table.planned[BEST_PE, i])
        out[22] = saturating(outlook[REGRET], unit) if is_best else 0.0
        out[23] = saturating(of_pes[SECOND, pe] if of_pes[WHO, pe] == i else of_pes[MOST, pe], unit)
        out[24] = (task.mean - spent) / (task.mean + spent) if spent > 0.0 else 1.0
        out[25] = earlier / (2.0 + earlier)
        out[26] = same_place(state, table, number, pe, table.planned[BY_FINISH, i])
        out[27] = same_place(state, table, number, pe, table.planned[BY_END, i])
        out[28] = engine.objective == DEADLINE and same_place(state, table, number, pe, table.planned[BY_LAXITY, i])
        out[29] = laxity_column(job.deadline, 0.0, end, unit)
        comes = of_pes[COMING_AT, pe] < begin + spent
        out[30] = comes
        out[31] = signed(of_pes[COMING_END, pe] - through, unit) if comes else 0.0
        least = outlook[LEAST_ENERGY]
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
    free, since = table.of_pes[FREE], data_from(state.engine[0])
    return state.pes[other].kind == state.pes[pe].kind and (
        max(free[pe], since + state.transfer[task, pe]) == max(free[other], since + state.transfer[task, other])
    )


# --------------------------------------------------------------------------------------------------- the graph


@njit_borrowed
def write_graph(
    state: State,
    table: Table,
    nodes,
    edges,
    edge_type,
    edge_mask,
    candidate_node,
    edge_features,
    node_group,
    candidate_place,
) -> None:
    """PEs (nodes 0 to P - 1) and unfinished tasks of live jobs, with what joins them.

    Jobs that have rows come first, then the others by arrival; tasks beyond the room for nodes, and edges beyond that
    for edges, are left out. A row's node is its task's, -1 if that is left out; its place is its PE's.
    """
    engine, head = state.engine[0], table.head[0]
    for pe in range(engine.num_pes):
        write_pe_node(state, pe, nodes[pe])
        table.shown[pe] = -1
        node_group[pe] = -1
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
    group, of = -1, -1
    for node in range(engine.num_pes, num_nodes):
        if state.tasks[table.shown[node]].job != of:
            group, of = group + 1, state.tasks[table.shown[node]].job
        node_group[node] = group
    for node in range(num_nodes, head.num_nodes):
        nodes[node] = 0.0
        node_group[node] = -1
    head.num_nodes = num_nodes
    num_edges = write_edges(state, table, edges, edge_type, edge_features)
    for edge in range(num_edges, head.num_edges):
        edges[0, edge] = 0
        edges[1, edge] = 0
        edge_type[edge] = 0
        edge_features[edge] = 0.0
        edge_mask[edge] = False
    for edge in range(head.num_edges, num_edges):
        edge_mask[edge] = True
    head.num_edges = num_edges
    for row in range(1, head.num_rows):
        candidate_node[row] = table.node_of[table.rows[row, 0]]
        candidate_place[row] = table.rows[row, 1]
    for row in range(head.num_rows, head.num_pointed):
        candidate_node[row] = -1
        candidate_place[row] = -1
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
def write_edges(state: State, table: Table, edges, edge_type, edge_features) -> int:
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
            write_placed(state, table, table.rows[row, 0], table.rows[row, 1], edge_features[count])
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
            target = table.node_of[state.edges[edge].target]
            if target >= 0 and count < room:
                edges[0, count] = node
                edges[1, count] = target
                edge_type[count] = PRECEDES
                edge_features[count] = 0.0
                edge_features[count, 0] = saturating(state.edges[edge].moved, state.engine[0].unit)
                count += 1
    return count


@njit_inlined
def write_placed(state: State, table: Table, task: int, pe: int, out) -> None:
    """The columns of EDGE_FEATURES for a task and a PE, float32 (Fe,)."""
    engine = state.engine[0]
    level = state.tasks[task].level if state.tasks[task].level >= 0 else state.default_level[pe]
    begin = max(table.of_pes[FREE, pe], data_from(engine) + state.transfer[task, pe])
    out[0] = 0.0
    out[1] = saturating(state.times[task, pe] * state.levels[pe, level].slowdown, engine.unit)
    out[2] = saturating(begin - engine.now, engine.unit) if state.tasks[task].status <= READY else 0.0
    out[3] = saturating(state.ahead[task, pe], engine.unit)
