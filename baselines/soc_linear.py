"""A family of late list schedulers with searched weights: what a hindsight search looks through.

`linear` is the kernel `late` of `baselines/soc_dag.py` with an order by a weighted sum of what is known of a task and
its job, and a choice of PE that weighs energy against finish. Late SRPT, late rank, late FIFO and least laxity are
members.
"""

from __future__ import annotations

import numpy as np

from ..envs.core.kernel import njit_borrowed
from ..envs.soc_dag.rule import Rule
from ..envs.soc_dag.state import IDLE, data_from

PARAMS = (
    "work left in the job",
    "upward rank",
    "age of the job",
    "shortest duration",
    "laxity, within [-4, 4] units",
    "the job cannot meet its deadline any more",
    "work of the whole job",
    "energy against finish, in the choice of PE",
    "what is ahead against finish, in the choice of PE",
    "laxity below which a job cannot meet its deadline, in upward ranks",
)
"""What the weights are of, in units of `engine.unit`; the last is a threshold."""

LATE_SRPT = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""Weights that make it late SRPT."""


@njit_borrowed
def linear(state, params, memory, decision):
    """Ready tasks by the least weighted sum take the PE of least weighted finish, and wait for it while it is busy.

    Where frequencies may be chosen, they take the PE and operating point of least weighted finish.

    params: see `PARAMS`. memory: when each PE is free, as planned (P), then the keys of the ready tasks.
    """
    engine, tasks, jobs, bind = state.engine[0], state.tasks, state.jobs, decision.bind[0]
    pes, times, transfer, levels, default = state.pes, state.times, state.transfer, state.levels, state.default_level
    num_pes, num_ready, now, since, unit = engine.num_pes, engine.num_ready, engine.now, data_from(engine), engine.unit
    per_watt = params[7] / engine.watts_unit if engine.watts_unit > 0.0 else 0.0
    free, keys = memory[:num_pes], memory[num_pes:]
    for pe in range(num_pes):
        free[pe] = now if pes[pe].status == IDLE else max(now, pes[pe].expected_end) + pes[pe].queued
    for i in range(num_ready):
        task = tasks[state.ready[i]]
        job = jobs[task.job]
        laxity, key = job.deadline - now, 0.0
        if laxity < np.inf:
            key = params[4] * min(max((laxity - task.rank) / unit, -4.0), 4.0)
            key += params[5] if laxity < params[9] * task.rank else 0.0
        key += (params[0] * job.work_left - params[1] * task.rank - params[2] * (now - job.arrival)) / unit
        keys[i] = key + (params[3] * task.best + params[6] * job.work) / unit
    for _ in range(num_ready):
        first = -1
        for i in range(num_ready):
            if not np.isnan(keys[i]) and (first < 0 or keys[i] < keys[first]):
                first = i
        keys[first] = np.nan
        number, to, at_level, least, ends = state.ready[first], -1, -1, np.inf, np.inf
        for pe in range(num_pes):
            if times[number, pe] == np.inf:
                continue
            lowest = 0 if engine.num_levels > 1 else default[pe]
            for level in range(lowest, engine.num_levels if engine.num_levels > 1 else lowest + 1):
                if levels[pe, level].slowdown == np.inf:
                    break
                spent = times[number, pe] * levels[pe, level].slowdown
                end = max(free[pe], since + transfer[number, pe]) + spent
                value = end + per_watt * levels[pe, level].watts * spent + params[8] * state.ahead[number, pe]
                if value < least:
                    to, at_level, least, ends = pe, level, value, end
        if pes[to].status == IDLE and free[to] == now:
            bind.task, bind.pe, bind.level = number, to, at_level
            return
        free[to] = ends


def linear_rule(params: tuple[float, ...] | np.ndarray = LATE_SRPT, name: str = "linear") -> Rule:
    """A rule of the family, bound late."""
    return Rule(name, linear, np.asarray(params, np.float64), memory_per_task=1, memory_per_pe=1)
