"""The compiled side of the `threads` backend: what its threads do with locks, clocks, data and the books of a run.

One thread belongs to each PE, pinned to its core, and one announces arrivals. None of them holds Python's global lock.
The books are the simulator's (`envs.soc_dag.sim`), kept by the same kernels under one lock; only *when* things happen
is measured. A thread that has finished a task books that, and then decides itself what comes next, with the compiled
rule, on the core that has become free: nothing is handed over. Where the policy is not compiled it asks the caller's
thread, which is moved to that core for it, and waits.

A PE without work looks for some for a while, and then sleeps: to be woken takes longer than most decisions. PEs that
share a core do not look: they would keep each other from working.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from numba import types

from ..envs.core.kernel import UNCOUNTED, njit, njit_borrowed, njit_inlined
from ..envs.soc_dag.sim import Sim, arrive, bind, execute, finish, unlock
from ..envs.soc_dag.state import FETCHING, WAIT, Decision, can_bind, reset_decision, resolve_decision
from .threads_kernels import Store

GRID = 1024
"""Times are multiples of 1 / GRID us: sums and differences of such numbers are exact."""
SPINS = 200_000
"""Times that a thread looks, for 10 to 20 ns each, before it goes to sleep."""
SLOT = 64
"""Bytes of a lock or semaphore: a line of the cache."""
LOCK, QUESTION, ANSWER, GO = 0, 1, 2, 3
"""Slots: the lock of the books; the caller is asked; has answered; PE i may begin (GO + i)."""

BOARD_DTYPE = np.dtype(
    [
        ("origin_ns", "i8"),  # of the clock, at time 0 of the run
        ("locks", "i8"),  # address of slot 0
        ("clocks", "i8"),  # address of `Machine.clocks`
        ("masks", "i8"),  # address of `Machine.masks`
        ("store", "i8"),  # address of `Store.at`
        ("rule", "i8"),  # address of a rule's arguments
        ("caller", "i8"),  # thread that is asked
        ("spins", "i8"),  # `SPINS`, or 0 if PEs share cores
        ("is_asked", "i8"),  # 1: the caller decides, 0: a compiled rule
        ("stop", "i8"),  # 1: threads are to end
        ("done", "i8"),  # 1: all jobs are finished
        ("failed", "i8"),  # a task whose kernel failed, -1: none
        ("tile", "i8"),
        ("stride", "i8"),  # float64 of a tile and the factors behind it
        ("num_tiles", "i8"),  # of all jobs
        ("num_decisions", "i8"),
        ("deciding_us", "f8"),  # under the lock, from the question to the answer
    ]
)


def _libc(name: str, *arguments: Any) -> Any:
    """A function of the C library that returns an int, by the types of its arguments."""
    return types.ExternalFunction(name, types.int32(*arguments))


_lock_try = _libc("pthread_mutex_trylock", types.intp)
_lock_end = _libc("pthread_mutex_unlock", types.intp)
_sem_post = _libc("sem_post", types.intp)
_sem_wait = _libc("sem_wait", types.intp)
_sem_try = _libc("sem_trywait", types.intp)
_yield = _libc("sched_yield")
_sleep = _libc("usleep", types.uint32)
_gettime = _libc("clock_gettime", types.int32, types.intp)
_move = _libc("sched_setaffinity", types.int32, types.intp, types.intp)
MONOTONIC, THREAD_CPU = 1, 3
"""Clocks of the C library: the time, and how long the calling thread has had a core."""


class Machine(NamedTuple):
    """A run on P PEs: N tasks on tiles, m operands in all."""

    sim: Sim
    decision: Decision
    board: np.ndarray  # (1,) BOARD_DTYPE
    store: Store
    kernel: np.ndarray  # (N,) int64
    first: np.ndarray  # (N + 1,) int64 operands of task i are first[i] : first[i + 1]
    operand: np.ndarray  # (m,) int64 tiles
    written: np.ndarray  # (m,) bool
    copied: np.ndarray  # (N,) int64 float64 of a tile that a task copies from another PE's memory; 0: memory is shared
    home: np.ndarray  # (tiles,) int64 PE in whose memory a tile is up to date; -1: in all
    ready: np.ndarray  # (P,) int64 1 when a PE's thread waits for its first task
    going: np.ndarray  # (P,) int64 1 from when a PE may begin its first task until that is finished
    times: np.ndarray  # (N, 3) float64 us: a task's PE begins to copy its data, to execute, has finished
    cpu_us: np.ndarray  # (N,) float64 of its core while a task executes; less than the time: others had the core
    locks: np.ndarray  # ((GO + P) * SLOT,) uint8
    clocks: np.ndarray  # (P + 1, 8) int64 where threads read the time, the last row the announcer's
    masks: np.ndarray  # (P + 1, 128) uint8 cores of each PE; of all that the caller may use


def open_locks(num_pes: int) -> np.ndarray:
    """New locks and semaphores."""
    libc = ctypes.CDLL(None, use_errno=True)
    slots = np.zeros((GO + num_pes + 1) * SLOT, np.uint8)
    slots = slots[-slots.ctypes.data % SLOT :][: (GO + num_pes) * SLOT]  # one slot, one line of the cache
    address = ctypes.c_void_p(slots.ctypes.data + LOCK * SLOT)
    failed = libc.pthread_mutex_init(address, None)
    for slot in (QUESTION, ANSWER, *range(GO, GO + num_pes)):
        failed |= libc.sem_init(ctypes.c_void_p(slots.ctypes.data + slot * SLOT), 0, 0)
    if failed:
        raise OSError("cannot make a lock")
    return slots


# ------------------------------------------------------------------------------------------- locks and the clock


@njit_inlined
def lock(machine: Machine) -> None:
    """Wait for the books."""
    address, spins = machine.board[0].locks, machine.board[0].spins
    while _lock_try(address) != 0:
        spins -= 1
        if spins < 0:
            _yield()


@njit_inlined
def end_lock(machine: Machine) -> None:
    """Leave the books to others."""
    _lock_end(machine.board[0].locks)


@njit_inlined
def read_ns(kind: int, clock, address: int) -> int:
    """ns that a clock of the C library shows, by way of `clock`, int64 (2,) at this address."""
    _gettime(kind, address)
    return clock[0] * 1_000_000_000 + clock[1]


@njit_inlined
def read_us(machine: Machine, thread: int) -> float:
    """us since the run began. A thread has a row of `clocks` for itself: that of its PE, or P."""
    board = machine.board[0]
    ns = read_ns(MONOTONIC, machine.clocks[thread], board.clocks + 64 * thread) - board.origin_ns
    return np.floor(ns * (GRID / 1000.0)) / GRID


@njit_inlined
def read_cpu_us(machine: Machine, thread: int) -> float:
    """us that the calling thread has had its core."""
    return read_ns(THREAD_CPU, machine.clocks[thread], machine.board[0].clocks + 64 * thread) * 1e-3


@njit_inlined
def let_pass(sim: Sim, at: float) -> None:
    """It is `at` now, unless it is later already: threads come to the books in another order than they read clocks."""
    engine = sim.state.engine[0]
    span = max(at - engine.now, 0.0)
    engine.energy += engine.watts * span
    sim.books[0].live_us += engine.num_live * span
    engine.now += span


# ------------------------------------------------------------------------------------------------- data, kernels


@njit_borrowed
def fetch(machine: Machine, pe: int, task: int) -> None:
    """Say where a task's operands lie in a PE's memory, and bring those there that are in another's.

    What is only read is copied anew for each task, as the simulator has it; what is written moves.
    """
    board, store = machine.board[0], machine.store
    stride, size = board.stride, machine.copied[task]
    memory = pe * (board.num_tiles + store.places.shape[1]) * stride
    for slot in range(machine.first[task + 1] - machine.first[task]):
        tile = machine.operand[machine.first[task] + slot]
        is_written = machine.written[machine.first[task] + slot]
        home = machine.home[tile]
        if size == 0:
            store.places[pe, slot] = tile * stride
            continue
        place = memory + (tile if is_written else board.num_tiles + slot) * stride
        if home >= 0 and home != pe:
            source = home * (board.num_tiles + store.places.shape[1]) * stride + tile * stride
            for i in range(size):
                store.data[place + i] = store.data[source + i]
        else:
            place = memory + tile * stride
        store.places[pe, slot] = place
        if is_written:
            machine.home[tile] = pe


# -------------------------------------------------------------------------------------------- books and decisions


@njit_borrowed
def send(machine: Machine) -> None:
    """Let PEs begin whose first task has come to its turn."""
    for pe in range(machine.sim.state.engine[0].num_pes):
        if machine.sim.next_at[pe] < np.inf and machine.going[pe] == 0:
            machine.going[pe] = 1
            _sem_post(machine.board[0].locks + (GO + pe) * SLOT)


@njit_borrowed
def wake_all(locks: int, num_pes: int) -> None:
    """Wake whoever waits: PEs for work, the caller for a question, a thread for its answer."""
    for slot in range(GO + num_pes):
        if slot != LOCK:
            _sem_post(locks + slot * SLOT)


@njit_inlined
def end_run(machine: Machine) -> None:
    """Tell all threads, and the caller, that there is nothing more to do."""
    machine.board[0].stop = 1
    wake_all(machine.board[0].locks, machine.sim.state.engine[0].num_pes)


@njit_borrowed
def ask(machine: Machine, thread: int) -> None:
    """Have the caller fill in the decision, on this thread's core."""
    board = machine.board[0]
    _move(board.caller, machine.masks.shape[1], board.masks + machine.masks.shape[1] * thread)
    _sem_post(board.locks + QUESTION * SLOT)
    while _sem_wait(board.locks + ANSWER * SLOT) != 0:
        pass


THREAD = {"nogil": True} | UNCOUNTED
"""Options of what is called from a thread of its own."""


@njit(cache=True, **THREAD)
def take(machine: Machine, pe: int) -> int:
    """Wait for a PE's next task, and bring its data to the PE's memory; -1: the run is over."""
    board = machine.board[0]
    address, spins = board.locks + (GO + pe) * SLOT, board.spins
    while _sem_try(address) != 0:
        spins -= 1
        if spins < 0 and _sem_wait(address) == 0:
            break
    if board.stop:
        return -1
    task = machine.sim.state.pes[pe].task
    machine.times[task, 0] = read_us(machine, pe)
    fetch(machine, pe, task)
    return task


@njit(cache=True, **THREAD)
def begin_task(machine: Machine, pe: int, task: int) -> None:
    """A task's data are there, and it executes."""
    machine.times[task, 1] = read_us(machine, pe)
    if machine.sim.state.pes[pe].status == FETCHING:
        lock(machine)
        let_pass(machine.sim, machine.times[task, 1])
        execute(machine.sim, pe)
        end_lock(machine)


@njit(cache=True, **THREAD)
def end_task(machine: Machine, pe: int, task: int, fine: bool, decide) -> None:
    """A PE has finished a task: book it, and decide what comes next. Not `fine`: its kernel failed, the run ends."""
    machine.times[task, 2] = read_us(machine, pe)
    lock(machine)
    if fine:
        settle(machine, pe, task)
        decide_all(machine, pe, decide)
    else:
        machine.board[0].failed = task
        end_run(machine)
    end_lock(machine)


@njit_inlined
def decide_all(machine: Machine, thread: int, decide) -> None:
    """After an event, under the lock: decide as long as there is something to bind, and send PEs to work."""
    sim, board = machine.sim, machine.board[0]
    engine = sim.state.engine[0]
    while can_bind(sim.state) and board.stop == 0:
        let_pass(sim, read_us(machine, thread))
        asked_at = engine.now
        if board.is_asked:
            ask(machine, thread)
        else:
            reset_decision(machine.decision)
            decide(board.rule)
        let_pass(sim, read_us(machine, thread))
        board.num_decisions += 1
        board.deciding_us += engine.now - asked_at
        resolve_decision(sim.state, machine.decision)
        choice = machine.decision.bind[0]
        if choice.task == WAIT or board.stop:
            break
        bind(sim, choice.task, choice.pe, choice.level)
        send(machine)
    if engine.num_in_progress == 0 and engine.num_live > 0 and engine.num_ready == 0:
        unlock(sim)
    send(machine)


@njit_inlined
def settle(machine: Machine, pe: int, task: int) -> None:
    """A PE has finished a task: book it, under the lock."""
    sim = machine.sim
    let_pass(sim, machine.times[task, 2])
    finish(sim, pe)
    row = sim.state.tasks[task]
    row.start = machine.times[task, 1]
    row.finish = machine.times[task, 2]
    machine.going[pe] = 0
    if sim.state.engine[0].num_finished == sim.books[0].num_jobs:
        machine.board[0].done = 1
        end_run(machine)


# ------------------------------------------------------------------------------------------------------- threads


@njit(cache=True, **THREAD)
def serve(machine: Machine, thread: int, compute, decide) -> None:
    """What a thread does: that of a PE (0 .. P - 1) runs task after task, thread P is the announcer.

    `compute` is `threads_kernels.compiled_compute`, `decide` a rule, called with the address `Board.rule`.
    """
    if thread == len(machine.ready):
        announce(machine, thread, decide)
        return
    board, store = machine.board[0], machine.store
    machine.ready[thread] = 1
    task = take(machine, thread)
    while task >= 0:
        begin_task(machine, thread, task)
        machine.cpu_us[task] = -read_cpu_us(machine, thread)
        num_operands = machine.first[task + 1] - machine.first[task]
        fine = compute(board.store, store.tables, thread, machine.kernel[task], num_operands, board.tile)
        machine.cpu_us[task] += read_cpu_us(machine, thread)
        end_task(machine, thread, task, fine, decide)
        task = take(machine, thread)


@njit_inlined
def announce(machine: Machine, thread: int, decide) -> None:
    """Start the clock when all PEs are there, make the first decisions, and have the jobs arrive."""
    sim, board = machine.sim, machine.board[0]
    while machine.ready.sum() < len(machine.ready) and board.stop == 0:
        _yield()
    board.origin_ns = np.int64((read_us(machine, thread) - sim.state.engine[0].now) * 1000.0)
    while board.stop == 0:
        lock(machine)
        books, now = sim.books[0], read_us(machine, thread)
        while books.next_job < books.num_jobs and sim.arrivals[books.next_job].at <= now:
            let_pass(sim, sim.arrivals[books.next_job].at)
            arrive(sim, books.next_job)
            books.next_job += 1
        decide_all(machine, thread, decide)
        end_lock(machine)
        if books.next_job == books.num_jobs:
            return
        sleep_until(machine, thread, sim.arrivals[books.next_job].at)


@njit_borrowed
def sleep_until(machine: Machine, thread: int, at: float) -> None:
    """Sleep, and look now and then whether the run has been stopped."""
    ahead = at - read_us(machine, thread)
    while ahead > 0.0 and machine.board[0].stop == 0:
        _sleep(np.uint32(min(ahead, 1000.0) + 1.0))
        ahead = at - read_us(machine, thread)


@njit(cache=True, **THREAD)
def wait_for_question(locks: int) -> bool:
    """The caller sleeps until it is asked, or the run has ended. False: it was woken for something else."""
    return _sem_wait(locks + QUESTION * SLOT) == 0


@njit(cache=True, **THREAD)
def answer(locks: int) -> None:
    """The caller has decided."""
    _sem_post(locks + ANSWER * SLOT)
