"""A recorded run once more, in the simulator: the same tasks on the same PEs in the same order.

An execution takes there what it took: from when its PE was free and its predecessors were finished until its end, so
that handing over, deciding and copying are in it, and waiting for its job to arrive: in the replay all jobs are there
from the start. On the executor's grid of times (`threads_machine.GRID`) it ends at the very same times.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..envs.core.kernel import njit_borrowed
from ..envs.soc_dag.rule import Rule
from ..envs.soc_dag.sim import Simulator
from ..envs.soc_dag.spec import Soc, SocDagSpec
from ..envs.soc_dag.state import READY
from ..envs.soc_dag.timeline import Timeline
from ..envs.soc_dag.workload import Workload


def replay(timeline: Timeline, workload: Workload, soc: Soc) -> Timeline:
    """The simulator's record of a finished run on a machine without links.

    Args:
        timeline: of the run.
        workload: its jobs.
        soc: its PEs; links do not matter.
    """
    spec = SocDagSpec(Soc(soc.name, soc.kinds), binding="ready")
    simulator = Simulator(spec)
    at_once = replace(workload, arrival_us=np.zeros(len(workload)))
    simulator.reset(at_once, durations_us=timeline.finish - free_at(timeline, workload))
    simulator.run(recorded_rule(timeline, soc.num_pes))
    return simulator.timeline()


def free_at(timeline: Timeline, workload: Workload) -> np.ndarray:
    """float64 (num_tasks,) us: when a task's PE was free and its predecessors were finished."""
    at = np.zeros(len(timeline.pe))
    for job, graph in enumerate(workload.dag_of_job):
        sources, targets = workload.dags[graph].edges.T + timeline.first_task[job]
        np.maximum.at(at, targets, timeline.finish[sources])
    for tasks in orders(timeline):
        np.maximum.at(at, tasks[1:], timeline.finish[tasks[:-1]])
    return at


def could_begin_at(timeline: Timeline, workload: Workload) -> np.ndarray:
    """float64 (num_tasks,) us: `free_at`, and the task's job was there."""
    return np.maximum(free_at(timeline, workload), np.repeat(timeline.arrival, np.diff(timeline.first_task)))


def orders(timeline: Timeline, num_pes: int | None = None) -> list[np.ndarray]:
    """The tasks of each PE in the order in which it ran them."""
    by_start = np.argsort(timeline.start, kind="stable")
    pes = range(num_pes if num_pes is not None else int(timeline.pe.max()) + 1)
    return [by_start[timeline.pe[by_start] == pe] for pe in pes]


def recorded_rule(timeline: Timeline, num_pes: int) -> Rule:
    """A rule that gives each PE the tasks of a recorded run, in their order, as they become ready."""
    tasks = orders(timeline, num_pes)
    begins = num_pes + 1 + np.cumsum([0, *map(len, tasks)])
    return Rule("recorded", next_recorded, np.concatenate([begins, *tasks]), memory_per_pe=1, binding="ready")


@njit_borrowed
def next_recorded(state, params, memory, decision):
    """params: where the tasks of each PE begin in this array (P + 1), the tasks. memory: tasks each PE was given."""
    for pe in range(state.engine[0].num_pes):
        at = int(params[pe] + memory[pe])
        if at < int(params[pe + 1]) and state.tasks[int(params[at])].status == READY:
            memory[pe] += 1.0
            decision.bind[0].task = int(params[at])
            decision.bind[0].pe = pe
            return
