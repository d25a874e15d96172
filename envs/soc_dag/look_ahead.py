"""What a list scheduler looks at, worked out for the tasks that may be bound now: an `Outlook`.

When would each be finished on every PE, and its job through there; which task needs which PE most; which tasks will
come, and where they fit; whom would a list by remaining work or by laxity put where. The table's columns say it.

A loop over PEs asks no question whose answer a processor must guess: of a minimum both outcomes are worked out, and a
PE that cannot run a task takes infinitely long (measured: 18 against 100 ns for a task on 16 PEs).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.kernel import njit_inlined
from .spec import OBJECTIVES
from .state import BUSY, IDLE, WAITING, State, data_from

DEADLINE = OBJECTIVES.index("deadline")

CONSIDERED = 4
"""Tasks that are considered, in numbers of rows: if more may be bound, only those that have rows."""

FIRST_FINISH, JOB_END, REGRET, LEAST_ENERGY, WORK_LEFT, KEY = range(6)
"""Columns of `Outlook.of_tasks`: earliest finish on any PE; its job's end through its best PE; how much later that is
through the second best; least energy; work left in its job; what the present order sorts by."""
BEST_PE, BY_FINISH, BY_END, LAX_BY_FINISH, LAX_BY_END, ORDER = range(6)
"""Rows of `Outlook.planned`: the PE through which its job ends first; the PE on which a list scheduler would begin it
now (-1: on none), if it goes by remaining work, or by laxity, and gives each task the PE where that, or its job, ends
first; the order of a list."""
FREE, FREE_BY_FINISH, FREE_BY_END, SLOWDOWN, WATTS, IDLE_SHARE, MOST, SECOND, WHO, COMING_AT, COMING_END = range(11)
"""Rows of `Outlook.of_pes`: when it is free; the same, as planned; of its default operating point; the share of its
kind that is idle; the highest `REGRET` of tasks whose best PE it is, the second highest, and whose the highest is; when
the next task that it suits best will be ready (inf: none comes), and the end of that one's job."""


class Outlook(NamedTuple):
    """What is worked out at one decision for the tasks considered (at most M), P PEs and J jobs."""

    num_considered: np.ndarray  # (1,) int64
    considered: np.ndarray  # (M,) int64 tasks
    of_tasks: np.ndarray  # (M, 6) float64 of the tasks considered: FIRST_FINISH ...
    planned: np.ndarray  # (6, M) int64 of the tasks considered: BEST_PE ...
    of_pes: np.ndarray  # (11, P) float64: FREE ...
    job_end: np.ndarray  # (J,) float64 when each live job would end at best, by what is ready or begun


def empty_outlook(num_candidates: int, num_pes: int, num_jobs: int) -> Outlook:
    """An Outlook for a table of K rows."""
    most = CONSIDERED * num_candidates
    return Outlook(
        np.zeros(1, np.int64),
        np.zeros(most, np.int64),
        np.zeros((most, 6)),
        np.zeros((6, most), np.int64),
        np.zeros((11, num_pes)),
        np.zeros(num_jobs),
    )


@njit_inlined
def look_ahead(state: State, rows, num_rows: int, outlook: Outlook) -> None:
    """Fill the Outlook for the present decision, whose table lists `rows` int64 (K, 3)."""
    engine, of_tasks, of_pes, job_end = state.engine[0], outlook.of_tasks, outlook.of_pes, outlook.job_end
    consider(state, rows, num_rows, outlook)
    for i in range(engine.num_live):
        job_end[state.live[i]] = engine.now
    look_at_pes(state, outlook)
    for i in range(outlook.num_considered[0]):
        look_at_task(state, outlook, i)
        job = state.tasks[outlook.considered[i]].job
        job_end[job] = max(job_end[job], of_tasks[i, JOB_END])
        best, regret = outlook.planned[BEST_PE, i], of_tasks[i, REGRET]
        if regret > of_pes[MOST, best]:
            of_pes[SECOND, best] = of_pes[MOST, best]
            of_pes[MOST, best] = regret
            of_pes[WHO, best] = i
        elif regret > of_pes[SECOND, best]:
            of_pes[SECOND, best] = regret
    for pe in range(engine.num_pes):
        if state.pes[pe].status == BUSY:
            look_behind(state, outlook, pe)
    for by_laxity in range(2 if engine.objective == DEADLINE else 1):
        write_order(state, outlook, by_laxity == 1)
        plan_lists(state, outlook, LAX_BY_FINISH if by_laxity else BY_FINISH)


@njit_inlined
def consider(state: State, rows, num_rows: int, outlook: Outlook) -> None:
    """List the tasks considered: all that may be bound, or if they are too many those that have rows."""
    considered, num_ready = outlook.considered, state.engine[0].num_ready
    if num_ready <= len(considered):
        for i in range(num_ready):
            considered[i] = state.ready[i]
        outlook.num_considered[0] = num_ready
        return
    count = 0
    for row in range(1, num_rows):
        if row == 1 or rows[row, 0] != rows[row - 1, 0]:
            considered[count] = rows[row, 0]
            count += 1
    outlook.num_considered[0] = count


@njit_inlined
def look_at_pes(state: State, outlook: Outlook) -> None:
    """What is known of every PE by itself, and when jobs would end by what is bound first in the PEs' queues."""
    engine, pes, of_pes, job_end = state.engine[0], state.pes, outlook.of_pes, outlook.job_end
    now, first, num_idle = engine.now, 0, 0
    for pe in range(engine.num_pes):
        row, level = pes[pe], state.levels[pe, state.default_level[pe]]
        of_pes[FREE, pe] = now if row.status == IDLE else max(now, row.expected_end) + row.queued
        of_pes[SLOWDOWN, pe] = level.slowdown
        of_pes[WATTS, pe] = level.watts
        of_pes[MOST, pe] = of_pes[SECOND, pe] = 0.0
        of_pes[WHO, pe] = -1.0
        of_pes[COMING_AT, pe] = np.inf
        of_pes[COMING_END, pe] = 0.0
        if row.status != IDLE:
            job = state.tasks[row.task].job
            job_end[job] = max(job_end[job], max(now, row.expected_end) + state.ahead[row.task, pe])
        num_idle += row.status == IDLE
        if pe + 1 == engine.num_pes or pes[pe + 1].kind != row.kind:  # PEs are numbered through the kinds
            for one in range(first, pe + 1):
                of_pes[IDLE_SHARE, one] = num_idle / (pe + 1 - first)
            first, num_idle = pe + 1, 0


@njit_inlined
def look_at_task(state: State, outlook: Outlook, i: int) -> None:
    """The row of `of_tasks` and the best PE of one task considered."""
    task, of_pes, since = outlook.considered[i], outlook.of_pes, data_from(state.engine[0])
    first, end, second, energy, best = np.inf, np.inf, np.inf, np.inf, -1
    for pe in range(state.engine[0].num_pes):
        us = state.times[task, pe]
        spent = us * of_pes[SLOWDOWN, pe]
        finish = max(of_pes[FREE, pe], since + state.transfer[task, pe]) + spent
        through = finish + state.ahead[task, pe]
        first = min(first, finish)
        energy = min(energy, spent * of_pes[WATTS, pe] if us < np.inf else np.inf)
        second = min(second, max(end, through))
        best = pe if through < end else best
        end = min(end, through)
    out = outlook.of_tasks[i]
    out[FIRST_FINISH] = first
    out[JOB_END] = end
    out[REGRET] = second - end if second < np.inf else 4.0 * state.engine[0].unit  # no other PE can run it
    out[LEAST_ENERGY] = energy
    out[WORK_LEFT] = state.jobs[state.tasks[task].job].work_left
    outlook.planned[BEST_PE, i] = best


@njit_inlined
def look_behind(state: State, outlook: Outlook, pe: int) -> None:
    """Tasks that the one executing on a PE will make ready: which PE suits each best, and when its job would end."""
    engine, tasks, of_pes = state.engine[0], state.tasks, outlook.of_pes
    running, at = tasks[state.pes[pe].task], max(engine.now, state.pes[pe].expected_end)
    for edge in range(running.first_out, running.first_out + running.num_out):
        number = state.edges[edge].target
        if tasks[number].num_missing != 1 or tasks[number].status != WAITING:
            continue
        best, end = -1, np.inf
        for to in range(engine.num_pes):
            through = max(of_pes[FREE, to], at) + state.times[number, to] + state.ahead[number, to]
            best = to if through < end else best
            end = min(end, through)
        if end > of_pes[COMING_END, best]:
            of_pes[COMING_END, best] = end
            of_pes[COMING_AT, best] = at


@njit_inlined
def write_order(state: State, outlook: Outlook, by_laxity: bool) -> None:
    """Sort the tasks considered: by the work left in their jobs, or these' laxity, then the most critical first."""
    of_tasks, order = outlook.of_tasks, outlook.planned[ORDER]
    for i in range(outlook.num_considered[0]):
        job = state.tasks[outlook.considered[i]].job
        key = state.jobs[job].deadline - outlook.job_end[job] if by_laxity else of_tasks[i, WORK_LEFT]
        of_tasks[i, KEY] = key
        end, at = of_tasks[i, JOB_END], i
        while at > 0:
            before = of_tasks[order[at - 1], KEY]
            if before < key or (before == key and of_tasks[order[at - 1], JOB_END] >= end):
                break
            order[at] = order[at - 1]
            at -= 1
        order[at] = i


@njit_inlined
def plan_lists(state: State, outlook: Outlook, which: int) -> None:
    """Give the tasks considered, in `ORDER`, each the PE on which it, or (a second list) its job, is finished first,
    behind those before it; write where each would begin now into the rows `which` and `which` + 1 of `planned`.

    The two lists are made side by side: what one waits for takes the other no longer.
    """
    engine, pes, planned, of_pes = state.engine[0], state.pes, outlook.planned, outlook.of_pes
    since, now, count, able = data_from(engine), engine.now, outlook.num_considered[0], 0
    idle_by_finish = idle_by_end = engine.num_idle
    for pe in range(engine.num_pes):
        of_pes[FREE_BY_FINISH, pe] = of_pes[FREE_BY_END, pe] = of_pes[FREE, pe]
    for i in range(count):
        planned[which, i] = planned[which + 1, i] = -1
        able += (state.tasks[outlook.considered[i]].kinds & engine.idle_kinds) != 0
    for place in range(count):
        if able == 0:  # none of those behind can begin now
            break
        i = planned[ORDER, place]
        task = outlook.considered[i]
        able -= (state.tasks[task].kinds & engine.idle_kinds) != 0
        by_finish, first, by_end, end = 0, np.inf, 0, np.inf
        for pe in range(engine.num_pes):
            data, spent = since + state.transfer[task, pe], state.times[task, pe] * of_pes[SLOWDOWN, pe]
            finish = max(of_pes[FREE_BY_FINISH, pe], data) + spent
            by_finish = pe if finish < first else by_finish
            first = min(first, finish)
            through = max(of_pes[FREE_BY_END, pe], data) + spent + state.ahead[task, pe]
            by_end = pe if through < end else by_end
            end = min(end, through)
        if idle_by_finish > 0 and pes[by_finish].status == IDLE and of_pes[FREE_BY_FINISH, by_finish] == now:
            planned[which, i] = by_finish
            idle_by_finish -= 1
        if idle_by_end > 0 and pes[by_end].status == IDLE and of_pes[FREE_BY_END, by_end] == now:
            planned[which + 1, i] = by_end
            idle_by_end -= 1
        of_pes[FREE_BY_FINISH, by_finish] = first
        begin = max(of_pes[FREE_BY_END, by_end], since + state.transfer[task, by_end])
        of_pes[FREE_BY_END, by_end] = begin + state.times[task, by_end] * of_pes[SLOWDOWN, by_end]
