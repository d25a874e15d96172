"""The SoC, simulated: numba kernels over plain arrays. `state.py` says what binding, fetching and executing mean.

`Sim` holds one run: what a scheduler may see (`state`), and what it may not (arrivals to come, the noise of every
execution, when running tasks will be finished). Kernels change it in place. A PE has at most one event to come: the
begin of an execution, when the last data are there, or its end. At one point in time, ends and begins come first, in
the order of the PEs, then arrivals; then the scheduler is asked.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.errors import InputError
from ..core.interface import Outcome
from ..core.kernel import UNCOUNTED, njit, njit_borrowed, njit_inlined
from .library import Library, build_library, transfer_us
from .rule import Rule
from .spec import BINDINGS, NOISES, OBJECTIVES, SocDagSpec
from .state import (
    AT_ARRIVAL,
    BOUND,
    BUSY,
    FETCHING,
    FINISHED,
    IDLE,
    READY,
    RUNNING,
    WAIT,
    WAITING,
    Decision,
    State,
    can_bind,
    data_from,
    empty_decision,
    empty_state,
    nominal_us,
    reset_decision,
    resolve_decision,
)
from .timeline import Timeline
from .workload import Workload, noise_draws

NO_NOISE, NORMAL, LOGNORMAL, RECORDED = 0, 1, 2, 3
"""Values of `books["noise"]`, in the order of `spec.NOISES`; RECORDED: `Sim.draws` holds the durations themselves."""

ARRIVAL_DTYPE = np.dtype([("at", "f8"), ("deadline", "f8"), ("graph", "i8")], align=True)

BOOKS_DTYPE = np.dtype(
    [
        ("live_us", "f8"),  # integral of the number of live jobs over time: in the end the sum of latencies
        ("noise_sigma", "f8"),
        ("noise", "i8"),  # NO_NOISE, NORMAL, LOGNORMAL or RECORDED
        ("whole", "i8"),  # 1 if transfers are rounded down to whole us
        ("num_jobs", "i8"),
        ("next_job", "i8"),  # the next to arrive
        ("powered", "i8"),  # 1 if some PE draws power
        ("done", "i8"),
    ],
    align=True,
)

KIND_DTYPE = np.dtype(
    [("idle_w", "f8"), ("watts", "f8"), ("first_pe", "i8"), ("count", "i8"), ("active", "i8")], align=True
)
"""PEs of one kind: watts when idle, each; watts drawn by all of them now; which they are; how many execute."""


class Sim(NamedTuple):
    """One simulated run. N tasks, J jobs, P PEs of K kinds, L operating points."""

    state: State
    library: Library
    arrivals: np.ndarray  # (J,) ARRIVAL_DTYPE, the future
    draws: np.ndarray  # (N,) float64 standard normals, one an execution, or what it takes
    latency: np.ndarray  # (P, P) float64 us
    bandwidth: np.ndarray  # (P, P) float64
    kinds: np.ndarray  # (K,) KIND_DTYPE
    power: np.ndarray  # (K, L, C) float64 watts of a kind by operating point and number of active PEs less one
    next_at: np.ndarray  # (P,) float64 the next event of each PE; inf: none
    next_task: np.ndarray  # (N,) int64 the task behind a bound one in its queue, -1: none
    tail: np.ndarray  # (P,) int64 the last task of each queue
    data_at: np.ndarray  # (N,) float64 when the data of a bound task are there, as far as predecessors are finished
    books: np.ndarray  # (1,) BOOKS_DTYPE


# ---------------------------------------------------------------------------------------------------- executing


@njit_inlined
def duration_us(nominal: float, draw: float, noise: int, sigma: float) -> float:
    """How long an execution takes; see `spec.NOISES`."""
    if noise == NORMAL:
        return max(np.rint(nominal + sigma * nominal * draw), 1.0)
    if noise == LOGNORMAL:
        return nominal * np.exp(sigma * draw - 0.5 * sigma * sigma)
    if noise == RECORDED:
        return draw
    return nominal


@njit_inlined
def set_active(sim: Sim, kind: int, change: int) -> None:
    """One more, or one less, PE of a kind executes: work out what the kind draws."""
    row = sim.kinds[kind]
    row.active += change
    if sim.books[0].powered:
        watts = row.idle_w * (row.count - row.active)
        pes, tasks, power = sim.state.pes, sim.state.tasks, sim.power
        for pe in range(row.first_pe, row.first_pe + row.count):
            if pes[pe].status == BUSY:
                watts += power[kind, tasks[pes[pe].task].level, row.active - 1] / row.active
        sim.state.engine[0].watts += watts - row.watts
        row.watts = watts


@njit_inlined
def begin(sim: Sim, pe: int) -> None:
    """The first of a PE's queue has come to its turn, or its last predecessor is finished: fetch, or execute."""
    state, engine = sim.state, sim.state.engine[0]
    row = state.pes[pe]
    task = row.task
    if state.tasks[task].num_missing > 0:
        sim.next_at[pe] = np.inf
        return
    if sim.next_at[pe] == np.inf:
        engine.num_in_progress += 1
    if sim.data_at[task] > engine.now:
        sim.next_at[pe] = sim.data_at[task]
        row.expected_end = sim.data_at[task] + nominal_us(state, task, pe, state.tasks[task].level)
    else:
        execute(sim, pe)


@njit_inlined
def execute(sim: Sim, pe: int) -> None:
    """Begin the execution of the first of a PE's queue."""
    state, books = sim.state, sim.books[0]
    row, now = state.pes[pe], state.engine[0].now
    task = state.tasks[row.task]
    nominal = nominal_us(state, row.task, pe, task.level)
    task.status = RUNNING
    task.start = now
    row.status = BUSY
    row.expected_end = now + nominal
    sim.next_at[pe] = now + duration_us(nominal, sim.draws[row.task], books.noise, books.noise_sigma)
    set_active(sim, row.kind, 1)


@njit_inlined
def finish(sim: Sim, pe: int) -> None:
    """End the execution on a PE: release the task's successors, close its job if it was the last, go on."""
    state, engine = sim.state, sim.state.engine[0]
    row = state.pes[pe]
    finished = row.task
    task, job = state.tasks[finished], state.jobs[state.tasks[finished].job]
    task.status = FINISHED
    task.finish = engine.now
    row.active += engine.now - task.start
    job.num_left -= 1
    job.work_left -= task.best
    if job.num_left == 0:
        close_job(state, task.job)
    release_successors(sim, finished, pe)
    following = sim.next_task[finished]
    row.task = following
    row.status = IDLE if following < 0 else FETCHING
    set_active(sim, row.kind, -1)
    sim.next_at[pe] = np.inf
    engine.num_in_progress -= 1
    if following < 0:
        row.queued = 0.0
        engine.num_idle += 1
        engine.idle_kinds |= np.int64(1) << (row.kind % 63)
    else:
        nominal = nominal_us(state, following, pe, state.tasks[following].level)
        row.num_queued -= 1
        row.queued = row.queued - nominal if row.num_queued > 0 else 0.0
        row.expected_end = engine.now + nominal
        begin(sim, pe)


@njit_inlined
def close_job(state: State, finished: int) -> None:
    """Take a job whose last task is finished off the list of live ones."""
    engine, live = state.engine[0], state.live
    job = state.jobs[finished]
    job.finish = engine.now
    job.work_left = 0.0
    engine.num_finished += 1
    engine.num_late += engine.now > job.deadline
    at = 0
    while live[at] != finished:
        at += 1
    engine.num_live -= 1
    for i in range(at, engine.num_live):
        live[i] = live[i + 1]


@njit_inlined
def release_successors(sim: Sim, finished: int, pe: int) -> None:
    """Tell the successors of a task finished on `pe`: where they are bound the data start to move."""
    state, engine, whole = sim.state, sim.state.engine[0], sim.books[0].whole != 0
    tasks, edges, transfer = state.tasks, state.edges, state.transfer
    task, made = tasks[finished], engine.now if engine.pushed else 0.0
    for i in range(task.first_out, task.first_out + task.num_out):
        target, volume = edges[i].target, edges[i].volume
        successor = tasks[target]
        successor.num_missing -= 1
        if successor.status == BOUND:
            to = successor.pe
            arrives = engine.now + transfer_us(volume, sim.latency[pe, to], sim.bandwidth[pe, to], whole)
            sim.data_at[target] = max(sim.data_at[target], arrives)
            if successor.num_missing == 0:
                successor.ready_at = engine.now
                if state.pes[to].task == target:
                    begin(sim, to)
            continue
        for to in range(engine.num_pes):
            us = transfer_us(volume, sim.latency[pe, to], sim.bandwidth[pe, to], whole)
            transfer[target, to] = max(transfer[target, to], made + us)
        if successor.num_missing == 0:
            successor.status = READY
            successor.ready_at = engine.now
            if engine.binding != AT_ARRIVAL:
                state.ready[engine.num_ready] = target
                engine.num_ready += 1


# ------------------------------------------------------------------------------------------------ binding, waiting


@njit_inlined
def bind(sim: Sim, bound: int, pe: int, level: int) -> None:
    """Put a task at the end of a PE's queue. Level -1: the PE's default operating point."""
    state, engine = sim.state, sim.state.engine[0]
    row, task, ready = state.pes[pe], state.tasks[bound], state.ready
    at = 0
    while ready[at] != bound:
        at += 1
    engine.num_ready -= 1
    for i in range(at, engine.num_ready):
        ready[i] = ready[i + 1]
    task.status = BOUND
    task.pe = pe
    task.level = level if level >= 0 else state.default_level[pe]
    task.bound_at = engine.now
    engine.num_bound += 1
    sim.data_at[bound] = data_from(engine) + state.transfer[bound, pe]
    sim.next_task[bound] = -1
    nominal = nominal_us(state, bound, pe, task.level)
    if row.status == IDLE:
        row.task = bound
        row.status = FETCHING
        row.expected_end = engine.now + nominal
        engine.num_idle -= 1
        refresh_idle_kind(state, row.kind)
        begin(sim, pe)
    else:
        sim.next_task[sim.tail[pe]] = bound
        row.num_queued += 1
        row.queued += nominal
    sim.tail[pe] = bound


@njit_inlined
def refresh_idle_kind(state: State, kind: int) -> None:
    """Work out the bit of `idle_kinds` that belongs to a kind of which a PE is no longer idle."""
    engine, pes = state.engine[0], state.pes
    bit = np.int64(1) << (kind % 63)
    engine.idle_kinds &= ~bit
    for pe in range(engine.num_pes):
        if pes[pe].status == IDLE and pes[pe].kind % 63 == kind % 63:
            engine.idle_kinds |= bit
            return


@njit_borrowed
def unlock(sim: Sim) -> None:
    """Queues wait for each other: the first PE whose queue holds a task with finished predecessors takes it first."""
    state, engine = sim.state, sim.state.engine[0]
    engine.num_unlocked += 1
    for pe in range(engine.num_pes):
        row = state.pes[pe]
        before, task = row.task, sim.next_task[row.task] if row.status != IDLE else -1
        while task >= 0:
            if state.tasks[task].num_missing == 0:
                sim.next_task[before] = sim.next_task[task]
                if sim.tail[pe] == task:
                    sim.tail[pe] = before
                sim.next_task[task] = row.task
                row.queued += nominal_us(state, row.task, pe, state.tasks[row.task].level)
                row.queued -= nominal_us(state, task, pe, state.tasks[task].level)
                row.task = task
                row.expected_end = engine.now + nominal_us(state, task, pe, state.tasks[task].level)
                begin(sim, pe)
                return
            before, task = task, sim.next_task[task]


@njit_inlined
def arrive(sim: Sim, arrived: int) -> None:
    """A job arrives: copy its graph from the library."""
    state, engine, library = sim.state, sim.state.engine[0], sim.library
    arrival = sim.arrivals[arrived]
    graph = library.dags[arrival.graph]
    first, first_edge = engine.num_tasks, engine.num_edges
    job = state.jobs[arrived]
    job.arrival = arrival.at
    job.deadline = arrival.at + arrival.deadline
    job.finish = np.inf
    job.shortest = graph.shortest
    job.work = graph.best_work
    job.work_left = graph.best_work
    job.first_task = first
    job.num_tasks = graph.num_tasks
    job.num_left = graph.num_tasks
    job.graph = arrival.graph
    for i in range(graph.num_edges):
        state.edges[first_edge + i].target = first + library.targets[graph.first_edge + i]
        state.edges[first_edge + i].volume = library.volumes[graph.first_edge + i]
        state.edges[first_edge + i].moved = library.moved[graph.first_edge + i]
    for i in range(graph.num_tasks):
        node, task = library.nodes[graph.first_task + i], state.tasks[first + i]
        task.rank = node.rank
        task.best = node.best
        task.mean = node.mean
        task.kinds = node.kinds
        task.first_out = first_edge + node.first_out - graph.first_edge
        task.num_out = node.num_out
        task.num_missing = node.num_in
        task.job = arrived
        task.pe = -1
        task.level = -1
        task.status = READY if node.num_in == 0 else WAITING
        task.ready_at = arrival.at if node.num_in == 0 else np.inf
        task.bound_at = np.inf
        task.start = np.inf
        task.finish = np.inf
        for pe in range(engine.num_pes):
            state.times[first + i, pe] = library.times[graph.first_task + i, pe]
            state.ahead[first + i, pe] = library.ahead[graph.first_task + i, pe]
            state.transfer[first + i, pe] = 0.0
        if node.num_in == 0 or engine.binding == AT_ARRIVAL:
            state.ready[engine.num_ready] = first + i
            engine.num_ready += 1
    if arrived > 0:
        gap = arrival.at - state.jobs[arrived - 1].arrival
        engine.mean_gap = gap if arrived == 1 else 0.9 * engine.mean_gap + 0.1 * gap
    state.live[engine.num_live] = arrived
    engine.num_live += 1
    engine.num_arrived += 1
    engine.num_tasks += graph.num_tasks
    engine.num_edges += graph.num_edges


@njit_inlined
def next_event(sim: Sim) -> float:
    """Time of the next event; inf: there is none."""
    books, at = sim.books[0], np.inf
    if books.next_job < books.num_jobs:
        at = sim.arrivals[books.next_job].at
    for pe in range(sim.state.engine[0].num_pes):
        at = min(at, sim.next_at[pe])
    return at


@njit_borrowed
def advance(sim: Sim) -> None:
    """Let time pass until the next event that leaves something to bind, or the end of the last job."""
    state, books, next_at = sim.state, sim.books[0], sim.next_at
    engine = state.engine[0]
    while True:
        if engine.num_in_progress == 0 and engine.num_live > 0 and engine.num_ready == 0:
            unlock(sim)
        at = next_event(sim)
        engine.energy += engine.watts * (at - engine.now)
        books.live_us += engine.num_live * (at - engine.now)
        engine.now = at
        for pe in range(engine.num_pes):
            if next_at[pe] <= at:
                if state.pes[pe].status == BUSY:
                    finish(sim, pe)
                else:
                    execute(sim, pe)
        while books.next_job < books.num_jobs and sim.arrivals[books.next_job].at <= at:
            arrive(sim, books.next_job)
            books.next_job += 1
        if engine.num_finished == books.num_jobs:
            books.done = 1
            return
        # what takes no time is finished before anybody is asked
        if can_bind(state) and not (engine.num_in_progress > 0 and next_event(sim) <= at):
            return


@njit_borrowed
def run_decision(sim: Sim, decision: Decision) -> None:
    """Carry a decision out and go on to the next one."""
    resolve_decision(sim.state, decision)
    choice = decision.bind[0]
    if choice.task != WAIT:
        bind(sim, choice.task, choice.pe, choice.level)
        if can_bind(sim.state):
            return
    advance(sim)


@njit(**UNCOUNTED)
def run_rule(sim: Sim, decide, params, memory, decision: Decision) -> None:
    """Run to the end under a compiled rule `decide(state, params, memory, decision)`."""
    while not sim.books[0].done:
        reset_decision(decision)
        decide(sim.state, params, memory, decision)
        run_decision(sim, decision)


@njit_borrowed
def start(sim: Sim) -> None:
    """Go to the first decision. The caller has filled arrivals, draws, links, kinds, operating points and limits."""
    state, engine, books = sim.state, sim.state.engine[0], sim.books[0]
    engine.now = 0.0
    engine.energy = 0.0
    engine.watts = 0.0
    engine.mean_gap = 0.0
    engine.num_arrived = 0
    engine.num_tasks = 0
    engine.num_edges = 0
    engine.num_live = 0
    engine.num_ready = 0
    engine.num_in_progress = 0
    engine.num_idle = engine.num_pes
    engine.num_finished = 0
    engine.num_late = 0
    engine.num_bound = 0
    engine.num_illegal = 0
    engine.num_unlocked = 0
    engine.idle_kinds = 0
    books.live_us = 0.0
    books.next_job = 0
    books.done = 0
    for i in range(len(state.jobs)):
        state.jobs[i].num_tasks = 0
        state.jobs[i].num_left = 0
    for i in range(len(state.tasks)):
        state.tasks[i].status = 0
    for pe in range(engine.num_pes):
        row = state.pes[pe]
        row.expected_end = 0.0
        row.queued = 0.0
        row.active = 0.0
        row.task = -1
        row.num_queued = 0
        row.status = IDLE
        engine.idle_kinds |= np.int64(1) << (row.kind % 63)
        sim.next_at[pe] = np.inf
    for kind in range(len(sim.kinds)):
        sim.kinds[kind].active = 0
        sim.kinds[kind].watts = 0.0
        if sim.kinds[kind].count > 0:
            set_active(sim, kind, 0)
    advance(sim)


# -------------------------------------------------------------------------------------------------- the backend


class Simulator:
    """The simulated SoC as a `Backend`, clock "model".

    Args:
        spec: the SoC, when tasks are bound, how durations vary.
    """

    clock = "model"

    def __init__(self, spec: SocDagSpec) -> None:
        self.spec = spec
        self.capacity = spec
        self._sim: Sim | None = None

    def reset(self, workload: Workload, seed: int = 0, *, durations_us: np.ndarray | None = None) -> None:
        """Load a workload and go to the first decision.

        Args:
            workload: the jobs.
            seed: draws the noise (`workload.noise_draws`).
            durations_us: (num_tasks,) what each execution takes, instead of noise: to replay a recorded run.
        """
        self.workload = workload.matching(self.spec.soc)
        self._sim = new_sim(self.spec, workload, seed)
        if durations_us is not None:
            durations = np.array(durations_us, np.float64)
            if durations.shape != (workload.num_tasks,) or not ((durations >= 0) & np.isfinite(durations)).all():
                raise InputError(
                    f"durations_us of shape {durations.shape} for {workload.num_tasks} tasks",
                    remedy="Give finite, non-negative us for every task",
                )
            self._sim = self._sim._replace(draws=durations)
            self._sim.books[0]["noise"] = RECORDED
        self._decision = empty_decision()
        start(self._sim)

    @property
    def sim(self) -> Sim:
        """The arrays of the simulation."""
        if self._sim is None:
            raise RuntimeError("no workload loaded: call reset(workload) first")
        return self._sim

    def state(self) -> State:
        """The live State."""
        return self.sim.state

    def default_decision(self) -> Decision:
        """This backend's Decision, filled with the default (wait)."""
        reset_decision(self._decision)
        return self._decision

    def step(self, decision: Decision) -> Outcome:
        """Bind or wait, and go on to the next decision."""
        sim = self.sim
        if sim.books[0]["done"]:
            return Outcome(0.0, True)
        before = float(sim.state.engine[0]["now"])
        run_decision(sim, decision)
        return Outcome((float(sim.state.engine[0]["now"]) - before) * 1e-6, bool(sim.books[0]["done"]))

    def run(self, rule: Rule) -> None:
        """Run the rest of the workload under a compiled rule."""
        memory = rule.new_memory(self.sim.state)
        run_rule(self.sim, rule.decide_kernel, rule.param_array, memory, self._decision)

    def timeline(self) -> Timeline:
        """The record of the run so far."""
        state = self.sim.state
        tasks, jobs = state.tasks[: self.workload.num_tasks], state.jobs[: len(self.workload)]
        return Timeline(
            arrival=self.workload.arrival_us.copy(),
            deadline=self.workload.arrival_us + self.workload.deadline_us,
            job_finish=np.where(jobs["num_tasks"] > 0, jobs["finish"], np.inf),
            first_task=self.workload.task_offsets,
            **{name: np.where(tasks["status"] > 0, tasks[name], np.inf) for name in ("ready_at", "bound_at", "start")},
            finish=np.where(tasks["status"] > 0, tasks["finish"], np.inf),
            pe=np.where(tasks["status"] >= BOUND, tasks["pe"], -1).astype(np.int64),
            level=np.where(tasks["status"] >= BOUND, tasks["level"], -1).astype(np.int64),
        )

    def close(self) -> None:
        self._sim = None


def new_sim(spec: SocDagSpec, workload: Workload, seed: int) -> Sim:
    """Allocate the simulation of one workload; `start` begins it."""
    library = build_library(workload.dags, spec.soc)
    edges = int(library.dags["num_edges"][workload.dag_of_job].sum())
    num_levels = max(len(kind.frequencies_mhz) for kind in spec.soc.kinds)
    state = empty_state(spec.soc.num_pes, len(workload), workload.num_tasks, edges, num_levels)
    p, n = spec.soc.num_pes, len(state.tasks)
    latency, bandwidth = spec.soc.links()
    widest = max(kind.count for kind in spec.soc.kinds)
    sim = Sim(
        state=state,
        library=library,
        arrivals=arrival_rows(workload),
        draws=noise_draws(workload, seed),
        latency=latency,
        bandwidth=bandwidth,
        kinds=np.zeros(len(spec.soc.kinds), KIND_DTYPE),
        power=np.zeros((len(spec.soc.kinds), num_levels, widest)),
        next_at=np.full(p, np.inf),
        next_task=np.full(n, -1, np.int64),
        tail=np.full(p, -1, np.int64),
        data_at=np.zeros(n),
        books=np.zeros(1, BOOKS_DTYPE),
    )
    configure(sim, spec, library.dags["shortest"].mean())
    sim.books[0]["num_jobs"] = len(workload)
    return sim


def arrival_rows(workload: Workload) -> np.ndarray:
    """(J,) ARRIVAL_DTYPE."""
    rows = np.zeros(len(workload), ARRIVAL_DTYPE)
    rows["at"], rows["deadline"] = workload.arrival_us, workload.deadline_us
    rows["graph"] = workload.dag_of_job
    return rows


def configure(sim: Sim, spec: SocDagSpec, unit: float) -> None:
    """Write an SoC's PEs, operating points and power, and the spec's limits, into arrays at least as large."""
    soc, state, books = spec.soc, sim.state, sim.books[0]
    engine = state.engine[0]
    engine["num_pes"], engine["unit"] = soc.num_pes, max(float(unit), 1e-9)
    engine["pushed"] = spec.transfers == "push"
    engine["binding"], engine["noise_sigma"] = BINDINGS.index(spec.binding), spec.noise_sigma
    engine["objective"] = OBJECTIVES.index(spec.objective)
    engine["num_levels"] = max(len(kind.frequencies_mhz) for kind in soc.kinds) if spec.choose_frequency else 1
    books["noise"], books["noise_sigma"] = NOISES.index(spec.noise), spec.noise_sigma
    books["whole"] = soc.whole_us
    books["powered"] = any(kind.power_w or kind.idle_w for kind in soc.kinds)
    sim.power[:] = 0.0
    sim.kinds[:] = np.zeros(1, KIND_DTYPE)[0]
    state.levels["slowdown"], state.levels["watts"] = np.inf, 0.0
    first_pe = 0
    for index, kind in enumerate(soc.kinds):
        pes, levels = slice(first_pe, first_pe + kind.count), len(kind.frequencies_mhz)
        state.pes["kind"][pes] = index
        state.default_level[pes] = range(levels)[kind.default_level]
        state.levels["slowdown"][pes, :levels] = kind.frequencies_mhz[-1] / np.array(kind.frequencies_mhz)
        if kind.power_w:
            sim.power[index, :levels, : kind.count] = kind.power_w
            state.levels["watts"][pes, :levels] = sim.power[index, :levels, kind.count - 1] / kind.count
        sim.kinds[index]["first_pe"], sim.kinds[index]["count"] = first_pe, kind.count
        sim.kinds[index]["idle_w"] = kind.idle_w
        first_pe += kind.count
    every_pe = np.arange(soc.num_pes)
    engine["watts_unit"] = state.levels["watts"][every_pe, state.default_level[every_pe]].mean()
