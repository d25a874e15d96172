"""Task graphs on real cores, as a `Backend`: a pinned thread for every PE, real kernels on real data.

`Executor` runs the workloads of `envs.soc_dag` whose graphs it knows (`threads_programs`) exactly as
`envs/soc_dag/state.py` defines binding, fetching and executing, and keeps the simulator's books; what differs is time,
which is measured. A task executes from when its data are in its PE's memory until its kernel is done.

There are two ways to decide, as in the simulator. `run(policy)` has the thread that finished a task decide for itself
with the compiled policy: a few us from one task to the next. `step(decision)` leaves it to the caller, for any policy;
the caller's thread is moved to the core that waits for its answer, and that core waits.

Graphs without volumes work on one memory. Where edges carry data every PE has a memory of its own, and a task's tiles
are copied into it when it is bound to another PE than the one that made them.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import psutil

from ..envs.core.blocks import block_of
from ..envs.core.errors import InputError
from ..envs.core.interface import Outcome
from ..envs.core.kernel import entry_point, njit_borrowed
from ..envs.soc_dag.sim import Sim, new_sim, start
from ..envs.soc_dag.spec import SocDagSpec
from ..envs.soc_dag.state import BOUND, Decision, State, empty_decision, reset_decision
from ..envs.soc_dag.timeline import Timeline
from ..envs.soc_dag.workload import Workload
from .threads_calls import call_of
from .threads_cuda import Lane, check_device, check_kernels
from .threads_kernels import BLOCK, compiled_compute, new_store, one_blas_thread
from .threads_machine import (
    BOARD_DTYPE,
    SPINS,
    Machine,
    answer,
    begin_task,
    end_task,
    open_locks,
    serve,
    take,
    wait_for_question,
    wake_all,
)
from .threads_programs import KINDS, is_qr_kernel, program_of

LITTLE_STRIP = 8
"""Columns of a tile that a little PE works on in one call."""
MEMORY_SHARE = 0.5
"""Most of the machine's free memory that a run may take."""
_PR_SET_TIMERSLACK = 29


class Compiled(Protocol):
    """A policy whose decisions need no Python: a `Rule`, or a learned one with a kernel."""

    def compiled(self, state: State, decision: Decision) -> tuple[Callable, tuple]:
        """The compiled function that decides through a run, and its arguments."""


class Executor:
    """Pinned threads that run task graphs, as a `Backend`, clock "wall".

    Args:
        spec: the PEs, of kinds "big" (a core), "little" (a core that works on narrow strips) and "gpu" (a CUDA stream,
            and a core to feed it), and when tasks are bound. Its SoC's links are what the policies believe.
        tile: rows and columns of a tile of data.
        cores: cores for the PEs, in order; default: those this process may use. PEs beyond them share (`is_crowded`).
        device: of torch, where PEs of kind "gpu" have their streams.

    Raises:
        InputError: for PEs or a spec that cannot be had, or on a system without what is needed.
    """

    clock = "wall"

    def __init__(
        self, spec: SocDagSpec, tile: int, *, cores: Sequence[int] | None = None, device: str = "cuda"
    ) -> None:
        if not hasattr(os, "sched_setaffinity"):
            raise InputError("threads cannot be pinned on this system", remedy="Use Linux, or the simulator")
        check_spec(spec)
        if not 1 <= tile <= 4096:
            raise InputError(f"tile is {tile}", remedy="Give between 1 and 4096 rows")
        usable = sorted(os.sched_getaffinity(0))
        self.cores = list(usable if cores is None else cores)
        if not self.cores or not set(self.cores) <= set(usable):
            raise InputError(f"cores {self.cores} of {usable}", remedy="Choose cores that this process may use")
        self.spec = self.capacity = spec
        self.tile, self.device = tile, device
        if any(kind.name == "gpu" for kind in spec.soc.kinds):
            check_device(device)
        self._usable = usable
        self._core_of_pe = [self.cores[pe % len(self.cores)] for pe in range(spec.soc.num_pes)]
        self._threads: list[threading.Thread] = []
        self._machine: Machine | None = None
        self._loaded: tuple[Workload, int] | None = None
        self._error: BaseException | None = None

    @property
    def is_crowded(self) -> bool:
        """True if PEs share cores: what is measured then says nothing of PEs that work side by side."""
        return len(set(self.cores)) < self.spec.soc.num_pes

    # --------------------------------------------------------------------------------------------------- Backend

    def reset(self, workload: Workload, seed: int = 0) -> None:
        """Load a workload and go to its first decision; time begins to pass with the first `step`, or with `run`.

        Args:
            workload: the jobs; their graphs must be ones that `program_of` knows.
            seed: draws the matrices and signals.

        Raises:
            InputError: for graphs that mean nothing here, other kinds of PEs, or more data than there is memory.
        """
        self._stop()
        workload.matching(self.spec.soc)
        sim = new_sim(self.spec, workload, seed)
        if self._loaded is None or self._loaded[0] is not workload or self._loaded[1] != seed:
            self._machine, self._loaded = None, None
            self._load(workload, seed)
            self._loaded = (workload, seed)
        self.workload = workload
        self._memories[:] = self._initial
        self._machine = self._new_machine(sim)
        self._error = None
        start(sim)

    def state(self) -> State:
        """The live State."""
        return self._books.sim.state

    def default_decision(self) -> Decision:
        """This backend's Decision, filled with the default (wait)."""
        reset_decision(self._books.decision)
        return self._books.decision

    def step(self, decision: Decision) -> Outcome:
        """Bind or wait, and sleep until something is to be decided again.

        Raises:
            RuntimeError: if a kernel or a thread failed.
        """
        machine = self._books
        engine, board = machine.sim.state.engine[0], machine.board[0]
        if board["done"]:
            return Outcome(0.0, True)
        before = float(engine["now"])
        if decision is not machine.decision:
            machine.decision.bind[:] = decision.bind
        if not self._threads:
            self._start(None)
            self._wait()
        answer(int(board["locks"]))
        self._wait()
        return Outcome((float(engine["now"]) - before) * 1e-6, bool(board["done"]))

    def run(self, policy: Compiled) -> None:
        """Run the workload under a rule or another compiled policy, which decides in the threads of the PEs.

        Raises:
            RuntimeError: if a kernel or a thread failed, or the run has begun already.
        """
        if self._threads:
            raise RuntimeError("the run has begun already: go on with step(), or call reset(workload)")
        if not self._books.board[0]["done"]:
            self._start(policy)
            self._wait()

    def timeline(self) -> Timeline:
        """The record of the run so far."""
        machine = self._books
        state, n = machine.sim.state, self.workload.num_tasks
        tasks, jobs = state.tasks[:n], state.jobs[: len(self.workload)]
        offsets = self.workload.task_offsets
        finished = np.where(tasks["status"] > 0, tasks["finish"], np.inf)
        return Timeline(
            arrival=self.workload.arrival_us.copy(),
            deadline=self.workload.arrival_us + self.workload.deadline_us,
            job_finish=np.where(jobs["num_tasks"] > 0, np.maximum.reduceat(finished, offsets[:-1]), np.inf),
            first_task=offsets,
            ready_at=np.where(tasks["status"] > 0, tasks["ready_at"], np.inf),
            bound_at=np.where(tasks["status"] > 0, tasks["bound_at"], np.inf),
            start=np.where(tasks["status"] > 0, tasks["start"], np.inf),
            finish=finished,
            pe=np.where(tasks["status"] >= BOUND, tasks["pe"], -1).astype(np.int64),
            level=np.where(tasks["status"] >= BOUND, tasks["level"], -1).astype(np.int64),
        )

    def close(self) -> None:
        """End the threads and forget the data."""
        self._stop()
        self._machine, self._loaded = None, None

    # ---------------------------------------------------------------------------------------------- more records

    def tiles(self) -> np.ndarray:
        """float64 (tiles, (tile + BLOCK) * tile): the data of all jobs as they are; where memory is shared, a view."""
        home = self._books.home
        return self._memories[0] if self._copies == 1 else self._memories[np.maximum(home, 0), np.arange(len(home))]

    def residuals(self) -> np.ndarray:
        """float64 (J,): the relative error of each finished job's result (`Program.residual`)."""
        final = self.tiles()
        errors, at = [], 0
        for program in self._programs:
            mine = slice(at, at + program.num_tiles)
            errors.append(program.residual(self._initial[mine], final[mine], self.tile))
            at += program.num_tiles
        return np.array(errors)

    def copy_us(self) -> np.ndarray:
        """float64 (num_tasks,): how long each finished task's PE took to bring its data."""
        return self._books.times[:, 1] - self._books.times[:, 0]

    def kernels(self) -> np.ndarray:
        """int64 (num_tasks,): number of each task's kernel in `threads_kernels.KERNELS`."""
        return self._books.kernel.copy()

    def disturbed_us(self) -> np.ndarray:
        """float64 (P,): of the finished run, how long each PE's core did something else while a task executed there.

        Streams of a device do not tell: 0.
        """
        machine, tasks = self._books, self._books.sim.state.tasks[: self.workload.num_tasks]
        lost = machine.times[:, 2] - machine.times[:, 1] - machine.cpu_us
        return np.bincount(tasks["pe"], np.nan_to_num(np.maximum(lost, 0.0)), self.spec.soc.num_pes)

    @property
    def num_decisions(self) -> int:
        """Decisions of the run so far."""
        return int(self._books.board[0]["num_decisions"])

    @property
    def deciding_us(self) -> float:
        """Time of all of them, from the question to the answer."""
        return float(self._books.board[0]["deciding_us"])

    # ---------------------------------------------------------------------------------------------------- loading

    @property
    def _books(self) -> Machine:
        if self._machine is None:
            raise RuntimeError("no workload loaded: call reset(workload) first")
        return self._machine

    def _load(self, workload: Workload, seed: int) -> None:
        """Make the programs of a workload's jobs, the data they begin with, and memory for them."""
        soc, tile, stride = self.spec.soc, self.tile, (self.tile + BLOCK) * self.tile
        programs = [program_of(dag, tile) for dag in workload.dags]
        for dag, program in zip(workload.dags, programs, strict=True):
            if "gpu" in workload.kind_names:
                check_kernels(program.kernel[np.isfinite(dag.times[:, workload.kind_names.index("gpu")])])
        self._programs = [programs[graph] for graph in workload.dag_of_job]
        num_tiles = sum(program.num_tiles for program in self._programs)
        most = max(int(np.diff(program.first).max()) for program in self._programs)
        self._copies = soc.num_pes if any(dag.volumes.any() for dag in workload.dags) else 1
        num_places = num_tiles + most + 2  # of one memory: behind the tiles, copies of what a task only reads
        needed, free = 8 * stride * (num_places * self._copies + num_tiles), psutil.virtual_memory().available
        if needed > MEMORY_SHARE * free:
            raise InputError(
                f"workload {workload.name!r} needs {needed / 1e9:.1f} GB for its data, {free / 1e9:.1f} GB are free",
                remedy="Give fewer jobs, or a smaller tile",
            )
        self._initial = np.concatenate(
            [program.initial(tile, np.random.default_rng([seed, job])) for job, program in enumerate(self._programs)]
        )
        strips = [LITTLE_STRIP if soc.kinds[kind].name == "little" else tile for kind in soc.kind_of_pe]
        self._store = new_store(self._copies * num_places * stride, most, tile, strips)
        memories = self._store.data[: self._copies * num_places * stride]
        self._memories = memories.reshape(self._copies, num_places, stride)[:, :num_tiles]

    def _new_machine(self, sim: Sim) -> Machine:
        """The arrays of a run on the data that `_load` made."""
        workload, programs, num_pes = self.workload, self._programs, self.spec.soc.num_pes
        bases = np.cumsum([0, *(program.num_tiles for program in programs)])
        kernel = np.concatenate([program.kernel for program in programs])
        num_operands = np.concatenate([np.diff(program.first) for program in programs])
        are_copied = np.repeat(
            [bool(workload.dags[graph].volumes.any()) for graph in workload.dag_of_job], np.diff(workload.task_offsets)
        )
        size = self.tile * np.where(is_qr_kernel(kernel), self.tile + BLOCK, self.tile)
        board = np.zeros(1, BOARD_DTYPE)
        machine = Machine(
            sim=sim,
            decision=empty_decision(),
            board=board,
            store=self._store,
            kernel=kernel,
            first=np.concatenate([[0], np.cumsum(num_operands)]),
            operand=np.concatenate([base + p.operand for base, p in zip(bases[:-1], programs, strict=True)]),
            written=np.concatenate([program.written for program in programs]),
            copied=np.where(are_copied, size, 0),
            home=np.full(bases[-1], -1),
            ready=np.zeros(num_pes, np.int64),
            going=np.zeros(num_pes, np.int64),
            times=np.full((len(kernel), 3), np.nan),
            cpu_us=np.full(len(kernel), np.nan),
            locks=open_locks(num_pes),
            clocks=np.zeros((num_pes + 1, 8), np.int64),
            masks=core_masks([*([core] for core in self._core_of_pe), self._usable]),
        )
        for name in ("locks", "clocks", "masks"):
            board[name] = getattr(machine, name).ctypes.data
        board["spins"] = 0 if self.is_crowded else SPINS
        board["store"] = self._store.at.ctypes.data
        board["failed"], board["tile"], board["num_tiles"] = -1, self.tile, bases[-1]
        board["stride"] = (self.tile + BLOCK) * self.tile
        return machine

    # ---------------------------------------------------------------------------------------------------- threads

    def _start(self, policy: Compiled | None) -> None:
        """Pin the threads to their cores and let time begin. Without a policy the caller is asked."""
        machine, num_pes = self._books, self.spec.soc.num_pes
        board = machine.board[0]
        board["caller"], board["is_asked"] = threading.get_native_id(), policy is None
        kernel, arguments = nobody, (machine.sim.state, machine.decision)
        if policy is not None:
            kernel, arguments = policy.compiled(machine.sim.state, machine.decision)
        block = block_of(arguments)
        board["rule"] = block.ctypes.data
        calls = (compiled_compute(), call_of(kernel, arguments))
        run = entry_point(serve, machine, 0, *calls)
        gpus = [pe for pe, kind in enumerate(self.spec.soc.kind_of_pe) if self.spec.soc.kinds[kind].name == "gpu"]
        widest = self._store.places.shape[1] - 2
        lanes = {pe: Lane(self.device, self._store.data, self.tile, widest) for pe in gpus}
        self._restore = ExitStack()
        self._restore.enter_context(one_blas_thread())
        self._restore.callback(os.sched_setaffinity, int(board["caller"]), os.sched_getaffinity(0))

        def be_thread(number: int) -> None:
            try:
                os.sched_setaffinity(0, {self._core_of_pe[number]} if number < num_pes else self._usable)
                ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # else the announcer oversleeps by 50 us
                if number in lanes:
                    serve_lane(machine, number, lanes[number], calls[1])
                else:
                    run(machine, number, *calls)
            except BaseException as error:  # the caller waits, and must be told
                self._error = error
                board["stop"] = 1
                wake_all(int(board["locks"]), num_pes)

        self._kept = (arguments, block)  # only addresses of them are elsewhere
        self._threads = [threading.Thread(target=be_thread, args=(i,), daemon=True) for i in range(num_pes + 1)]
        for thread in self._threads:
            thread.start()

    def _wait(self) -> None:
        """Sleep until a question is open or the run has ended."""
        board = self._books.board[0]
        try:
            while not wait_for_question(int(board["locks"])):
                pass  # a signal: Python handles it before the next turn
        except BaseException:
            self._stop()
            raise
        if board["stop"]:
            self._stop()
        if self._error is not None:
            raise RuntimeError("a PE's thread failed") from self._error
        if board["failed"] >= 0:
            task = int(board["failed"])
            job = int(np.searchsorted(self.workload.task_offsets, task, side="right")) - 1
            dag = self.workload.dags[self.workload.dag_of_job[job]]
            name = dag.task_names[task - int(self.workload.task_offsets[job])]
            raise RuntimeError(f"the kernel of task {task} ({name} of job {job}, {dag.name}) failed on its data")

    def _stop(self) -> None:
        """End the threads, if there are any: each finishes what it computes."""
        if self._threads:
            board = self._books.board[0]
            board["stop"] = 1
            wake_all(int(board["locks"]), self.spec.soc.num_pes)
            for thread in self._threads:
                thread.join()
            self._threads = []
            self._restore.close()


def serve_lane(machine: Machine, pe: int, lane: Lane, decide: Any) -> None:
    """What the thread of a PE does that is a stream: as `threads_machine.serve`, with the lane's kernels."""
    machine.ready[pe] = 1
    while (task := take(machine, pe)) >= 0:
        some = slice(int(machine.first[task]), int(machine.first[task + 1]))
        written, fine = machine.written[some], False
        offsets = machine.store.places[pe, : len(written)]
        try:
            lane.load(offsets)
            begin_task(machine, pe, task)
            fine = lane.compute(int(machine.kernel[task]), len(written))
            lane.store(offsets, written)
        finally:  # whatever happened, the others must not wait for this PE
            end_task(machine, pe, task, fine, decide)


@njit_borrowed
def nobody(state, decision):
    """Stands for the policy where the caller decides."""


def check_spec(spec: SocDagSpec) -> None:
    """Raise InputError for what real cores cannot do."""
    unknown = [kind.name for kind in spec.soc.kinds if kind.name not in KINDS]
    if unknown:
        raise InputError(
            f"SoC {spec.soc.name!r} has PEs of kind {', '.join(unknown)}, the threads backend has {', '.join(KINDS)}",
            remedy="Make it with KernelCosts.soc",
        )
    if spec.noise != "none":
        raise InputError(f"noise is {spec.noise!r}", remedy='Give "none": the machine makes its own')
    if spec.choose_frequency:
        raise InputError("cores do not change their frequency here", remedy="Give choose_frequency=False")


def core_masks(cores: Sequence[Collection[int]]) -> np.ndarray:
    """uint8 (len(cores), 128) as sched_setaffinity takes them: bit c % 8 of byte c // 8 allows core c."""
    masks = np.zeros((len(cores), 128), np.uint8)
    for mask, some in zip(masks, cores, strict=True):
        for core in some:
            mask[core // 8] |= 1 << core % 8
    return masks
