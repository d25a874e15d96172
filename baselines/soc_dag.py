"""The field's online schedulers for task graphs on unlike PEs, as rules over `State`: compiled or on a real executor.

`RULES` maps names to rules. The kernel `listed` takes the ready tasks in an order and gives each the PE of its choice:
bound at once (binding "ready") these are the heuristics of the literature (MET, MCT, OLB, min-min) and of DS3 (EFT,
ETF, HEFT_RT). The kernel `late` binds to idle PEs only, and lets a task wait for a busy PE that would still finish it
first. `reclaiming` binds as `late`, and slows tasks down whose jobs have time: where no frequency may be chosen
(`SocDagSpec.choose_frequency`) the two are one, and race to idle.
"""

from __future__ import annotations

import numpy as np

from ..envs.core.kernel import njit_borrowed, njit_inlined
from ..envs.soc_dag.rule import Rule
from ..envs.soc_dag.spec import SocDagSpec
from ..envs.soc_dag.state import FETCHING, IDLE, LATE, WAIT, data_from, free_at, nominal_us

ARRIVED, RANK, REMAINING, SHORTEST, SOONEST, LAST, START, LAXITY, LONGEST = range(9)
"""Orders: as they became ready; highest upward rank; least work left in the job; shortest best time; earliest and
latest finish on the PE of choice; earliest begin there; least laxity (deadline less rank); longest mean time."""

FINISH, FASTEST, FREE, BEGIN, ENERGY, COMPUTED = range(6)
"""Choices of PE: earliest finish; shortest execution; earliest free; earliest begin; least energy; earliest finish if
data were everywhere at once."""


@njit_inlined
def static_key(order, task, job):
    """What the orders that look at tasks and jobs alone sort by, lowest first."""
    if order == RANK:
        return -task.rank
    if order == REMAINING:
        return job.work_left
    if order == SHORTEST:
        return task.best
    if order == LAXITY:
        return job.deadline - task.rank
    if order == LONGEST:
        return -task.mean
    return 0.0


@njit_inlined
def computed_by(state, pe):
    """When a PE would be done with all that is bound to it, were there no transfers, and nothing overdue."""
    row, now = state.pes[pe], state.engine[0].now
    if row.status == IDLE:
        return now
    if row.status == FETCHING:
        return now + nominal_us(state, row.task, pe, state.tasks[row.task].level) + row.queued
    return max(now, row.expected_end + row.queued)


@njit_borrowed
def listed(state, params, memory, decision):
    """The first of the ready tasks in an order, to its PE of choice among those that may take it now.

    params: order, choice. Expectations are nominal times; ties go to the task that was ready first and to the lower PE.
    """
    engine, tasks, jobs, bind = state.engine[0], state.tasks, state.jobs, decision.bind[0]
    order, choice = int(params[0]), int(params[1])
    pes, times, transfer, levels = state.pes, state.times, state.transfer, state.levels
    now, since, idle_only, lowest = engine.now, data_from(engine), engine.binding == LATE, np.inf
    all_levels = choice == ENERGY and engine.num_levels > 1
    for i in range(engine.num_ready):
        number = state.ready[i]
        task = tasks[number]
        if idle_only and (task.kinds & engine.idle_kinds) == 0:
            continue
        to, at_level, least, tied, begins, ends = -1, -1, np.inf, np.inf, np.inf, np.inf
        for pe in range(engine.num_pes):
            us = times[number, pe]
            idle = pes[pe].status == IDLE
            if us == np.inf or (idle_only and not idle):
                continue
            free = now if idle else max(now, pes[pe].expected_end) + pes[pe].queued
            begin = max(free, since + transfer[number, pe])
            first = 0 if all_levels else state.default_level[pe]
            for level in range(first, engine.num_levels if all_levels else first + 1):
                if levels[pe, level].slowdown == np.inf:
                    break
                spent = us * levels[pe, level].slowdown
                value = begin + spent
                if choice == FASTEST:
                    value = spent
                elif choice == FREE:
                    value = free
                elif choice == BEGIN:
                    value = begin
                elif choice == COMPUTED:
                    value = computed_by(state, pe) + spent
                elif choice == ENERGY:
                    value = spent * levels[pe, level].watts
                if value < least or (value == least and begin + spent < tied):
                    to, at_level, least, tied, begins, ends = pe, level, value, begin + spent, begin, begin + spent
        if to < 0:
            continue
        key = static_key(order, task, jobs[task.job])
        if order == SOONEST:
            key = ends
        elif order == LAST:
            key = -ends
        elif order == START:
            key = begins
        if bind.task < 0 or key < lowest:
            lowest = key
            bind.task, bind.pe, bind.level = number, to, at_level
            if order == ARRIVED:
                return


@njit_borrowed
def late(state, params, memory, decision):
    """Ready tasks in an order take the PE that would finish them first, also a busy one, and wait for it if they must.

    params: order. Every pass plans all ready tasks anew, each behind those before it, and binds the first that begins
    on an idle PE. memory: when each PE is free, as planned (P); what its times are multiplied by (P);
    the keys of the ready tasks.
    """
    engine, tasks, pes, bind = state.engine[0], state.tasks, state.pes, decision.bind[0]
    num_pes, num_ready, order, since = engine.num_pes, engine.num_ready, int(params[0]), data_from(engine)
    free, slowdown, keys, able = memory[:num_pes], memory[num_pes : 2 * num_pes], memory[2 * num_pes :], 0
    for pe in range(num_pes):
        free[pe] = free_at(state, pe)
        slowdown[pe] = state.levels[pe, state.default_level[pe]].slowdown
    for i in range(num_ready):
        task = tasks[state.ready[i]]
        keys[i] = static_key(order, task, state.jobs[task.job])
        able += (task.kinds & engine.idle_kinds) != 0
    while able > 0:  # none of those behind can begin now
        first = -1
        for i in range(num_ready):
            if not np.isnan(keys[i]) and (first < 0 or keys[i] < keys[first]):
                first = i
        keys[first] = np.nan
        number, to, ends = state.ready[first], 0, np.inf
        able -= (tasks[number].kinds & engine.idle_kinds) != 0
        for pe in range(num_pes):  # without a branch: see `look_ahead.py`
            end = max(free[pe], since + state.transfer[number, pe]) + state.times[number, pe] * slowdown[pe]
            to = pe if end < ends else to
            ends = min(ends, end)
        if pes[to].status == IDLE and free[to] == engine.now:
            bind.task, bind.pe = number, to
            return
        free[to] = ends


@njit_borrowed
def reclaim_slack(state, decision, stretch):
    """Bind at the operating point of least energy that leaves the job in time; at the fastest if none does.

    In time is at the job's deadline, or when `stretch` times its shortest latency have passed since its arrival if that
    is sooner. What is left until then is shared by the task and what is ahead of it, in proportion to their times.
    """
    engine, bind = state.engine[0], decision.bind[0]
    if bind.task == WAIT or engine.num_levels == 1:
        return
    job, us, least = state.jobs[state.tasks[bind.task].job], state.times[bind.task, bind.pe], np.inf
    due = min(job.deadline, job.arrival + stretch * job.shortest)
    begin = max(free_at(state, bind.pe), data_from(engine) + state.transfer[bind.task, bind.pe])
    both = us + state.ahead[bind.task, bind.pe]
    room = (due - begin) * (us / both) if both > 0.0 else 0.0
    for level in range(engine.num_levels):
        point = state.levels[bind.pe, level]
        if point.slowdown == np.inf:
            break
        spent = us * point.slowdown
        if least == np.inf or (spent * point.watts < least and spent <= room):
            bind.level = level
        if spent <= room:
            least = min(least, spent * point.watts)


@njit_borrowed
def reclaiming(state, params, memory, decision):
    """As `late`, with the time that jobs have left turned into lower frequencies. params: order, stretch."""
    late(state, params, memory, decision)
    reclaim_slack(state, decision, params[1])


def listed_rule(name: str, order: int, choice: int, *, binding: str = "ready", source: str = "") -> Rule:
    """A rule of the kernel `listed`."""
    return Rule(name, listed, (order, choice), binding=binding, source=source)


def late_rule(name: str, order: int, source: str = "") -> Rule:
    """A rule of the kernel `late`."""
    return Rule(name, late, (order,), memory_per_task=1, memory_per_pe=2, source=source)


def reclaiming_rule(name: str, order: int, stretch: float, source: str = "") -> Rule:
    """A rule of the kernel `reclaiming`."""
    return Rule(name, reclaiming, (order, stretch), memory_per_task=1, memory_per_pe=2, source=source)


_MAHESWARAN = "Maheswaran et al.: Dynamic mapping of a class of independent tasks, JPDC 1999"
_BRAUN = "Braun et al.: A comparison of eleven static heuristics, JPDC 2001"
_MACK = "Mack et al.: Performant, multi-objective scheduling of highly interleaved task graphs, TPDS 2022"
_ZHU = "Zhu, Melhem, Childers: Scheduling with dynamic voltage/speed adjustment using slack reclamation, TPDS 2003"

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        listed_rule("met", ARRIVED, FASTEST, source=_MAHESWARAN),
        listed_rule("eft", ARRIVED, FINISH, source=f"MCT of {_MAHESWARAN}; EFT of DS3"),
        listed_rule("olb", ARRIVED, FREE, source=_MAHESWARAN),
        listed_rule("etf", START, BEGIN, source="Hwang et al., SIAM J. Computing 1989"),
        listed_rule("stf", SHORTEST, FINISH, source="shortest task first of DS3"),
        listed_rule("min_min", SOONEST, FINISH, source=_BRAUN),
        listed_rule("max_min", LAST, FINISH, source=_BRAUN),
        listed_rule("heft_rt", LONGEST, COMPUTED, source=f"gym_ds3's, but for ties; {_MACK}"),
        late_rule("late_fifo", ARRIVED),
        late_rule("late_rank", RANK),
        late_rule("late_srpt", REMAINING, "Schrage, Operations Research 1968, over the jobs' remaining work"),
        late_rule("late_laxity", LAXITY, "least laxity first: Mok, PhD thesis, MIT 1983"),
        listed_rule("eager_rank", RANK, FINISH, binding="late"),
        listed_rule("eager_srpt", REMAINING, FINISH, binding="late"),
        listed_rule("least_energy", REMAINING, ENERGY),
        reclaiming_rule("slack_reclaiming", REMAINING, 2.0, f"after {_ZHU}"),
    )
}
"""The rules that need neither a plan nor training, by name."""


def system_spec(rule: Rule, spec: SocDagSpec) -> SocDagSpec:
    """The spec under which a rule runs as published: with its binding."""
    return spec.replace(binding=rule.binding)
