"""What a scheduler may know and what it may ask for, as numba-friendly record arrays.

The same `State` and `Decision` are filled by the simulator (compiled) and by a real executor (from Python), so a rule
written over them runs unchanged in both. A `State` never holds the future: rows of jobs that have not arrived, and of
their tasks, are zero, and how long a running task really takes is not in it.

A *job* is a graph of tasks; it arrives, and is live until its last task is finished. A task is *bound* to a PE, once
and for good, and waits in that PE's queue; PEs work through their queues in the order of binding, without preemption.
The spec says when tasks may be bound (`engine.binding`):

- LATE: when its predecessors are finished, to a PE that is IDLE (nothing bound to it);
- READY: when its predecessors are finished, to any PE that can run it;
- ARRIVAL: when its job has arrived, to any PE that can run it.

Data move from a finished predecessor to the task as soon as the task is bound (`SocDagSpec.transfers` "pull"): they are
there at max(predecessor's finish, time of binding) + transfer, where the transfer depends on both PEs. With "push" they
are there at predecessor's finish + transfer, whenever the task is bound. Transfers do not slow each other down. The
first task of a queue begins when all its data are there and the PE has finished what was before it; until then the PE
is FETCHING, and waits. How long the execution takes is drawn by the noise (`spec.NOISES`), and seen when it is
finished.

One decision binds one task, or waits. The backend asks for a decision as long as there is a task and a PE that it may
be bound to; after a wait it asks again at the next event (a task finished or a job arrived) that leaves something to
bind. When nothing is in progress, waiting is not allowed: nothing could end it that the scheduler may know of. Then,
and only then, the backend binds by itself: the first of `ready`, to the PE on which it would finish first.

Queues of early bound tasks can wait for each other in a circle. Then the first PE whose queue holds a task with
finished predecessors takes that task first (`engine.num_unlocked` counts this).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.kernel import njit_borrowed, njit_inlined

WAITING, READY, BOUND, RUNNING, FINISHED = 1, 2, 3, 4, 5
"""Values of `tasks["status"]`; 0: its job has not arrived. WAITING: for predecessors. BOUND: in a PE's queue."""

IDLE, FETCHING, BUSY = 0, 1, 2
"""Values of `pes["status"]`: nothing is bound; the first of its queue waits for data or predecessors; executing."""

LATE, AT_READY, AT_ARRIVAL = 0, 1, 2
"""Values of `engine["binding"]`, in the order of `spec.BINDINGS`."""

WAIT = -1
"""Task of a decision that binds nothing now."""

TASK_DTYPE = np.dtype(
    [
        ("rank", "f8"),  # HEFT's upward rank: mean time to the end of the job, us
        ("best", "f8"),  # shortest nominal time on any PE
        ("mean", "f8"),  # mean nominal time over the PEs that can run it
        ("ready_at", "f8"),  # its predecessors were finished
        ("bound_at", "f8"),
        ("start", "f8"),  # its execution began
        ("finish", "f8"),
        ("kinds", "i8"),  # bit (kind % 63) is set if PEs of that kind can run it
        ("first_out", "i8"),  # edges out of it are edges[first_out : first_out + num_out]
        ("num_out", "i4"),
        ("num_missing", "i4"),  # predecessors that are not finished
        ("job", "i4"),
        ("status", "i4"),
        ("pe", "i4"),  # -1: not bound
        ("level", "i4"),  # operating point at which it runs
    ],
    align=True,
)

JOB_DTYPE = np.dtype(
    [
        ("arrival", "f8"),
        ("deadline", "f8"),  # point in time; inf: none
        ("finish", "f8"),
        ("shortest", "f8"),  # its critical path on the fastest PEs, without transfers
        ("work", "f8"),  # sum of the best times of its tasks
        ("work_left", "f8"),  # of those that are not finished
        ("first_task", "i8"),  # its tasks are first_task .. first_task + num_tasks - 1
        ("num_tasks", "i4"),
        ("num_left", "i4"),  # tasks that are not finished
        ("graph", "i4"),  # number of its graph: jobs of one application share it
        ("pad", "i4"),
    ],
    align=True,
)

EDGE_DTYPE = np.dtype([("target", "i8"), ("volume", "f8"), ("moved", "f8")], align=True)
"""A precedence: the task that waits, the data it needs, and the mean us to move them between two PEs."""

PE_DTYPE = np.dtype(
    [
        ("expected_end", "f8"),  # of the first of its queue, by nominal times; in the past: it is overdue
        ("queued", "f8"),  # nominal times of the tasks behind it
        ("active", "f8"),  # us that it executed, the present task not included
        ("task", "i8"),  # first of its queue, -1: none
        ("num_queued", "i4"),  # tasks behind it
        ("kind", "i4"),
        ("status", "i4"),
        ("pad", "i4"),
    ],
    align=True,
)

LEVEL_DTYPE = np.dtype([("slowdown", "f8"), ("watts", "f8")], align=True)
"""An operating point of a PE: its times are `slowdown` times those of the tables (inf: no such point); it draws `watts`
when all PEs of its kind execute."""

ENGINE_DTYPE = np.dtype(
    [
        ("now", "f8"),
        ("energy", "f8"),  # so far, uJ
        ("watts", "f8"),  # drawn now
        ("mean_gap", "f8"),  # exponential mean of the gaps between arrivals, decay 0.9
        ("unit", "f8"),  # mean `shortest` of the applications: what times are measured by
        ("watts_unit", "f8"),  # mean of the PEs' watts at their default operating points: what power is measured by
        ("noise_sigma", "f8"),  # spread of the noise, 0: none
        ("pushed", "i8"),  # 1 if data move as soon as they are made; 0: when their consumer is bound
        ("binding", "i8"),  # LATE, AT_READY or AT_ARRIVAL
        ("objective", "i8"),  # what is asked for: number in `spec.OBJECTIVES`
        ("num_pes", "i8"),  # P; arrays may be wider
        ("num_levels", "i8"),  # operating points that may be chosen between; 1: the PE's default one only
        ("num_arrived", "i8"),  # rows of `jobs` that are filled
        ("num_tasks", "i8"),  # rows of `tasks` that are filled
        ("num_edges", "i8"),  # rows of `edges` that are filled
        ("num_live", "i8"),  # live length of `live`
        ("num_ready", "i8"),  # live length of `ready`
        ("num_in_progress", "i8"),  # PEs that are FETCHING or BUSY and will go on by themselves
        ("num_idle", "i8"),
        ("idle_kinds", "i8"),  # bit (kind % 63) is set if a PE of that kind is IDLE
        ("num_finished", "i8"),  # jobs
        ("num_late", "i8"),  # jobs that were finished after their deadline
        ("num_bound", "i8"),  # tasks
        ("num_illegal", "i8"),  # decisions that `resolve_decision` had to replace
        ("num_unlocked", "i8"),  # times that queues waited for each other in a circle
    ],
    align=True,
)

DECISION_DTYPE = np.dtype([("task", "i8"), ("pe", "i8"), ("level", "i8")], align=True)


class State(NamedTuple):
    """What a scheduler may know now. Tasks and jobs are numbered in order of arrival."""

    engine: np.ndarray  # (1,) ENGINE_DTYPE
    pes: np.ndarray  # (P,) PE_DTYPE
    jobs: np.ndarray  # (J,) JOB_DTYPE
    tasks: np.ndarray  # (N,) TASK_DTYPE
    times: np.ndarray  # (N, P) float64 nominal us of a task on a PE at its highest frequency; inf: cannot run
    transfer: np.ndarray  # (N, P) float64 us to bring the data of its finished predecessors to a PE; see `data_from`
    edges: np.ndarray  # (E,) EDGE_DTYPE by source
    ready: np.ndarray  # (N,) int64 tasks that may be bound, in the order in which they became so; num_ready are live
    live: np.ndarray  # (J,) int64 jobs that are not finished, in order of arrival; num_live are live
    levels: np.ndarray  # (P, L) LEVEL_DTYPE
    default_level: np.ndarray  # (P,) int64
    ahead: np.ndarray  # (N, P) float64 us from a task's end on a PE to the end of its job, with nobody in the way


class Decision(NamedTuple):
    """Bind one task, or wait. `reset_decision` gives the default: wait."""

    bind: np.ndarray  # (1,) DECISION_DTYPE; task WAIT: nothing; level -1: the PE's default


def empty_state(num_pes: int, num_jobs: int, num_tasks: int, num_edges: int, num_levels: int) -> State:
    """A zeroed State with room for that many."""
    n, p = max(num_tasks, 1), num_pes
    return State(
        np.zeros(1, ENGINE_DTYPE),
        np.zeros(p, PE_DTYPE),
        np.zeros(num_jobs, JOB_DTYPE),
        np.zeros(n, TASK_DTYPE),
        np.zeros((n, p)),
        np.zeros((n, p)),
        np.zeros(max(num_edges, 1), EDGE_DTYPE),
        np.zeros(n, np.int64),
        np.zeros(num_jobs, np.int64),
        np.ones((p, num_levels), LEVEL_DTYPE),
        np.zeros(p, np.int64),
        np.zeros((n, p)),
    )


def empty_decision() -> Decision:
    """A Decision that waits."""
    decision = Decision(np.zeros(1, DECISION_DTYPE))
    reset_decision(decision)
    return decision


@njit_borrowed
def reset_decision(decision: Decision) -> None:
    """Fill `decision` with the default: wait."""
    bind = decision.bind[0]
    bind.task = WAIT
    bind.pe = -1
    bind.level = -1


@njit_inlined
def free_at(state: State, pe: int) -> float:
    """When a PE is expected to have finished all that is bound to it."""
    row, now = state.pes[pe], state.engine[0].now
    return now if row.status == IDLE else max(now, row.expected_end) + row.queued


@njit_inlined
def data_from(engine) -> float:
    """What `transfer` is counted from: the data of a task are on a PE at data_from + transfer[task, pe] if bound now.

    The present, or with pushed data the origin of time: then `transfer` holds points in time, also past ones.
    """
    return 0.0 if engine.pushed else engine.now


@njit_inlined
def nominal_us(state: State, task: int, pe: int, level: int) -> float:
    """Expected duration of a task on a PE, inf if it cannot run there. Level -1: the PE's default."""
    return state.times[task, pe] * state.levels[pe, level if level >= 0 else state.default_level[pe]].slowdown


@njit_borrowed
def finish_estimate(state: State, task: int, pe: int) -> float:
    """When a task would be finished if bound to a PE now, expected by nominal times; inf if it cannot run there."""
    us = state.times[task, pe]
    if us == np.inf:
        return np.inf
    begin = max(free_at(state, pe), data_from(state.engine[0]) + state.transfer[task, pe])
    return begin + us * state.levels[pe, state.default_level[pe]].slowdown


@njit_inlined
def can_bind(state: State) -> bool:
    """True if there is a task and a PE that it may be bound to."""
    engine, tasks, pes, times = state.engine[0], state.tasks, state.pes, state.times
    if engine.binding != LATE:
        return engine.num_ready > 0
    if engine.num_idle == 0:
        return False
    for i in range(engine.num_ready):
        task = state.ready[i]
        if tasks[task].kinds & engine.idle_kinds:  # kinds share bits if there are more than 63 of them
            for pe in range(engine.num_pes):
                if pes[pe].status == IDLE and times[task, pe] < np.inf:
                    return True
    return False


@njit_inlined
def is_legal(state: State, task: int, pe: int, level: int) -> bool:
    """True if the task may be bound to the PE at that operating point now."""
    engine = state.engine[0]
    if not (0 <= task < engine.num_tasks and 0 <= pe < engine.num_pes and -1 <= level < state.levels.shape[1]):
        return False
    status = state.tasks[task].status
    if status != READY and not (status == WAITING and engine.binding == AT_ARRIVAL):
        return False
    if (
        level >= 0
        and level != state.default_level[pe]
        and (engine.num_levels == 1 or state.levels[pe, level].slowdown == np.inf)
    ):
        return False
    return state.times[task, pe] < np.inf and (engine.binding != LATE or state.pes[pe].status == IDLE)


@njit_inlined
def resolve_decision(state: State, decision: Decision) -> None:
    """Make the decision legal: an illegal binding becomes a wait, a wait that nothing could end the default binding."""
    engine, bind = state.engine[0], decision.bind[0]
    if bind.task != WAIT and not is_legal(state, bind.task, bind.pe, bind.level):
        engine.num_illegal += 1
        bind.task = WAIT
    if bind.task == WAIT and engine.num_in_progress == 0:
        bind_first(state, decision)


@njit_borrowed
def bind_first(state: State, decision: Decision) -> None:
    """The first of `ready` that may be bound to some PE now, to the one on which it would finish first."""
    bind = decision.bind[0]
    for i in range(state.engine[0].num_ready):
        task, best = state.ready[i], np.inf
        for pe in range(state.engine[0].num_pes):
            if is_legal(state, task, pe, -1) and finish_estimate(state, task, pe) < best:
                best = finish_estimate(state, task, pe)
                bind.task, bind.pe, bind.level = task, pe, -1
        if bind.task != WAIT:
            return
