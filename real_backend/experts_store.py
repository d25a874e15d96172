"""Experts outside the cache, the slots of the cache, and the channel that reads the ones into the others.

On a CPU experts live in a file, one contiguous record each, and are read with O_DIRECT: through the page cache a
missing expert would come from memory, and nothing would be cached that was not in memory anyway. With CUDA they live in
pinned memory of the host and are copied on a stream of their own (the pipeline of Mixtral-offloading, arXiv 2312.17238,
with slots that are allocated once).

`Slots` are the memory that experts are computed from; `LoadChannel` fills them, in chunks, from a thread of its own.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from ..envs.core.errors import InputError

PAGE = 4096
"""Alignment of O_DIRECT: of file offsets, lengths and memory addresses."""

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs")


class ExpertShape:
    """Where the three matrices of an expert stand in its record: w1, w3, w2, then zeros up to a multiple of PAGE."""

    def __init__(self, hidden: int, intermediate: int, dtype: Any) -> None:
        self.hidden, self.intermediate, self.dtype = hidden, intermediate, dtype
        self.num_weights = 3 * hidden * intermediate
        self.record_bytes = -(-self.num_weights * dtype.itemsize // PAGE) * PAGE

    def views(self, record: Any) -> tuple[Any, Any]:
        """(w1 over w3 (2 I, H), w2 (H, I)) as views of one record, a flat tensor."""
        border = 2 * self.hidden * self.intermediate
        gate_up = record[:border].view(2 * self.intermediate, self.hidden)
        return gate_up, record[border : self.num_weights].view(self.hidden, self.intermediate)

    def pack(self, gate_up: Any, down: Any, record: Any) -> None:
        """Write one expert's matrices into a record."""
        to_gate_up, to_down = self.views(record)
        to_gate_up.copy_(gate_up)
        to_down.copy_(down)


class Slots(Protocol):
    """Buffers for experts, filled a chunk at a time by the channel's thread, read by the computing thread."""

    chunks: int
    """Chunks of a record."""

    def fill(self, buffer: int, record: int, chunk: int) -> None:
        """Read one chunk of a record; it may return before the chunk is there."""

    def weights(self, buffer: int) -> tuple[Any, Any]:
        """The matrices in a buffer (`ExpertShape.views`), once they are all there."""

    def used(self, buffer: int) -> None:
        """The computation that was asked for last reads this buffer: it may be overwritten after that."""

    def sync(self) -> None:
        """Wait for everything that `fill` began."""

    def close(self) -> None:
        """Release the memory."""


def chunk_bounds(record_bytes: int, chunk_bytes: int) -> list[tuple[int, int]]:
    """First and last byte of each chunk of a record. Raises InputError if chunks are not aligned."""
    if chunk_bytes % PAGE:
        raise InputError(
            f"chunk_bytes is {chunk_bytes}, not a multiple of {PAGE}", remedy="Set CostModel.chunk_bytes to one"
        )
    return [(start, min(start + chunk_bytes, record_bytes)) for start in range(0, record_bytes, chunk_bytes)]


# ------------------------------------------------------------------------------------------------ disk and CPU


def file_system_of(path: str | PathLike[str]) -> str:
    """Type of the file system that holds `path`, "unknown" where the system does not tell (Linux: mountinfo)."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    for line in lines:
        mount, _, system = line.partition(" - ")
        if mount.split()[2] == number:
            return system.split()[0]
    return "unknown"


def device_bytes_read() -> int:
    """Bytes that this process has had read from a storage device (`read_bytes` of /proc/self/io)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "read_bytes":
            return int(value)
    raise OSError("/proc/self/io has no read_bytes")


class ExpertFile:
    """A file of expert records, read with O_DIRECT. It has no name and vanishes with the process.

    Args:
        experts: (gate_up, down) of every record, in order.
        shape: of a record.
        folder: on a disk; default: the folder for temporary files.

    Raises:
        InputError: if the folder is not on a disk, or cannot be read without the page cache.
    """

    def __init__(
        self, experts: Iterable[tuple[Any, Any]], shape: ExpertShape, folder: str | PathLike[str] | None = None
    ) -> None:
        import torch

        self.shape = shape
        folder = Path(folder or tempfile.gettempdir())
        another = "Give the folder of a disk, for example folder='.'"
        if not folder.is_dir():
            raise InputError("no such folder", file=folder, remedy=another)
        system = file_system_of(folder)
        if system in MEMORY_FILE_SYSTEMS:
            raise InputError(f"is on a {system}, in memory: a miss would read no disk", file=folder, remedy=another)
        if not hasattr(os, "O_DIRECT"):
            raise InputError("this system has no O_DIRECT", file=folder, remedy="Run the backend on Linux, or on CUDA")
        with tempfile.NamedTemporaryFile(dir=folder, prefix="experts-") as file:
            record = torch.zeros(shape.record_bytes // shape.dtype.itemsize, dtype=shape.dtype)
            with torch.inference_mode():
                for gate_up, down in experts:
                    shape.pack(gate_up, down, record)
                    file.write(memoryview(record.numpy()).cast("B"))
            file.flush()
            os.fsync(file.fileno())
            self.num_records = os.fstat(file.fileno()).st_size // shape.record_bytes
            try:
                self._file = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
                os.preadv(self._file, [mmap.mmap(-1, PAGE)], 0)
            except OSError as error:
                raise InputError(f"cannot be read with O_DIRECT ({error})", file=folder, remedy=another) from error

    def read(self, record: int, start: int, memory: memoryview) -> None:
        """Read `len(memory)` bytes of a record, from byte `start` of it."""
        offset = record * self.shape.record_bytes + start
        count = os.preadv(self._file, [memory], offset)
        if count != len(memory):
            raise OSError(f"read {count} of {len(memory)} bytes at {offset} of the expert file")

    def open_slots(self, num_buffers: int, chunk_bytes: int) -> MemorySlots:
        """Memory for `num_buffers` experts, filled from this file."""
        return MemorySlots(self, num_buffers, chunk_bytes)

    def close(self) -> None:
        """Forget the file."""
        os.close(self._file)


class MemorySlots:
    """`Slots` in one anonymous mapping, which the disk writes into and torch computes from: nothing is copied.

    Raises InputError if the memory does not suffice.
    """

    def __init__(self, file: ExpertFile, num_buffers: int, chunk_bytes: int) -> None:
        import psutil
        import torch

        shape = file.shape
        size, available = num_buffers * shape.record_bytes, psutil.virtual_memory().available
        if size > 0.9 * available:
            raise InputError(
                f"{num_buffers} slots of {shape.record_bytes} bytes take {size / 1e9:.2f} GB, {available / 1e9:.2f} GB "
                "of memory are available",
                remedy="Lower cache_share or layer_slots",
            )
        self._file = file
        bounds = chunk_bounds(shape.record_bytes, chunk_bytes)
        self.chunks = len(bounds)
        self._starts = [start for start, _ in bounds]
        self._arena = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._arena.madvise(mmap.MADV_HUGEPAGE)
        memory = memoryview(self._arena)
        self._memory = [
            [memory[i * shape.record_bytes + a : i * shape.record_bytes + b] for a, b in bounds]
            for i in range(num_buffers)
        ]
        words = torch.frombuffer(self._arena, dtype=shape.dtype).view(num_buffers, -1)
        words.zero_()  # fault the pages in now, not at the first load
        self._views = [shape.views(record) for record in words]

    def fill(self, buffer: int, record: int, chunk: int) -> None:
        self._file.read(record, self._starts[chunk], self._memory[buffer][chunk])

    def weights(self, buffer: int) -> tuple[Any, Any]:
        return self._views[buffer]

    def used(self, buffer: int) -> None:
        """Nothing to do: what was asked of a CPU is done."""

    def sync(self) -> None:
        """Nothing to do: `fill` returns when the chunk is there."""

    def close(self) -> None:
        # The mapping goes with the last tensor over it.
        self._views.clear()
        self._memory.clear()


# ------------------------------------------------------------------------------------------------ host and CUDA


class PinnedPool:
    """Expert records in pinned memory of the host, copied to a CUDA device.

    Args:
        experts: (gate_up, down) of every record, in order.
        shape: of a record.
        num_records: how many they are.
        device: where they are computed.

    Raises:
        InputError: if the host has not enough memory.
    """

    def __init__(self, experts: Iterable[tuple[Any, Any]], shape: ExpertShape, num_records: int, device: Any) -> None:
        import psutil
        import torch

        self.shape, self.num_records, self.device = shape, num_records, device
        size, available = num_records * shape.record_bytes, psutil.virtual_memory().available
        if size > 0.9 * available:
            raise InputError(
                f"the experts take {size / 1e9:.1f} GB of pinned memory, {available / 1e9:.1f} GB are available",
                remedy="Use a smaller model",
            )
        words = shape.record_bytes // shape.dtype.itemsize
        self.records = torch.empty((num_records, words), dtype=shape.dtype, pin_memory=True)
        with torch.inference_mode():
            for record, (gate_up, down) in zip(self.records, experts, strict=True):
                shape.pack(gate_up, down, record)

    def open_slots(self, num_buffers: int, chunk_bytes: int) -> DeviceSlots:
        """Device memory for `num_buffers` experts, filled from this pool."""
        return DeviceSlots(self, num_buffers, chunk_bytes)

    def close(self) -> None:
        """Unpin the memory."""
        del self.records


class DeviceSlots:
    """`Slots` on a CUDA device, filled on a stream of their own.

    A chunk is overwritten only after the computation that read the buffer last (`last use`), and computed from only
    after its copy (`ready`). At most two chunks are under way: the bus has the next one at hand, and a load on demand
    still overtakes a prefetch within a chunk or two.
    """

    def __init__(self, pool: PinnedPool, num_buffers: int, chunk_bytes: int) -> None:
        import torch

        shape, device = pool.shape, pool.device
        size, (free, _) = num_buffers * shape.record_bytes, torch.cuda.mem_get_info(device)
        if size > 0.9 * free:
            raise InputError(
                f"{num_buffers} slots of {shape.record_bytes} bytes take {size / 1e9:.2f} GB, {free / 1e9:.2f} GB of "
                "device memory are free",
                remedy="Lower cache_share or layer_slots",
            )
        bounds = chunk_bounds(shape.record_bytes, chunk_bytes)
        self.chunks = len(bounds)
        self._slices = [slice(a // shape.dtype.itemsize, b // shape.dtype.itemsize) for a, b in bounds]
        self._pool = pool
        self._words = torch.empty((num_buffers, pool.records.shape[1]), dtype=shape.dtype, device=device)
        self._views = [shape.views(record) for record in self._words]
        self._stream = torch.cuda.Stream(device)
        self._ready = [torch.cuda.Event() for _ in range(num_buffers)]
        self._last_use = [torch.cuda.Event() for _ in range(num_buffers)]
        self._chunk_done = [torch.cuda.Event() for _ in range(2)]
        self._num_filled = 0

    def fill(self, buffer: int, record: int, chunk: int) -> None:
        import torch

        part, done = self._slices[chunk], self._chunk_done[self._num_filled % 2]
        done.synchronize()  # the chunk before the last one
        with torch.cuda.stream(self._stream):
            if chunk == 0:
                self._stream.wait_event(self._last_use[buffer])
            self._words[buffer, part].copy_(self._pool.records[record, part], non_blocking=True)
            done.record(self._stream)
            if chunk == self.chunks - 1:
                self._ready[buffer].record(self._stream)
        self._num_filled += 1

    def weights(self, buffer: int) -> tuple[Any, Any]:
        # The host waits, not the compute stream: it books the stall, and may find another expert ready meanwhile.
        self._ready[buffer].synchronize()
        return self._views[buffer]

    def used(self, buffer: int) -> None:
        import torch

        self._last_use[buffer].record(torch.cuda.current_stream(self._pool.device))

    def sync(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self.sync()
        self._views.clear()
        del self._words


# ------------------------------------------------------------------------------------------------- the channel


class Load:
    """One expert on its way into a buffer."""

    __slots__ = ("buffer", "is_dropped", "is_urgent", "num_begun", "ready_at", "record")

    def __init__(self, record: int, buffer: int, is_urgent: bool) -> None:
        self.record, self.buffer, self.is_urgent = record, buffer, is_urgent
        self.num_begun = 0
        """Chunks that were begun."""
        self.is_dropped = False
        self.ready_at = float("inf")
        """`time.perf_counter()` when the last chunk was there; inf: it is not."""

    @property
    def is_ready(self) -> bool:
        """True once the expert is there."""
        return self.ready_at < float("inf")


class LoadChannel:
    """Reads loads one chunk at a time on a thread of its own: urgent ones first, each kind in order.

    An urgent load overtakes the others at the next end of a chunk. The computing thread is the only caller.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._wake = threading.Condition()
        self._urgent: deque[Load] = deque()
        self._ahead: deque[Load] = deque()
        self._done: SimpleQueue[Load | None] = SimpleQueue()
        self._is_reading = False
        self._is_held = False
        self._is_closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="expert loads", daemon=True)
        self._thread.start()

    def submit(self, late: Sequence[Load], missing: Sequence[Load], ahead: Sequence[Load]) -> int:
        """Hand over new loads: `missing` are urgent, `ahead` are not; `late` ones become urgent now, before them.

        Returns how many urgent loads `finished` will yield: all but the late ones that are ready already.
        """
        if not (late or missing or ahead):
            return 0
        with self._wake:
            promoted = [load for load in late if not load.is_ready]
            for load in promoted:
                self._ahead.remove(load)
                load.is_urgent = True
            num_before = len(self._urgent)
            self._urgent.extend(promoted)
            self._urgent.extend(missing)
            self._ahead.extend(ahead)
            self._wake.notify()
            return len(self._urgent) - num_before

    def finished(self, count: int) -> Iterator[Load]:
        """The next `count` urgent loads, each as soon as it is there. Raises RuntimeError if reading fails."""
        for _ in range(count):
            load = None if self._error else self._done.get()
            if load is None:
                raise RuntimeError("an expert could not be read") from self._error
            yield load

    def progress(self, loads: Sequence[Load]) -> tuple[float, list[tuple[int, float]]]:
        """`time.perf_counter()`, and (chunks begun, ready_at) of some loads at that instant."""
        with self._wake:
            return time.perf_counter(), [(load.num_begun, load.ready_at) for load in loads]

    def drop(self, loads: Iterable[Load]) -> None:
        """Forget loads that are not urgent. One whose chunk is being read ends with that chunk."""
        with self._wake:
            for load in loads:
                load.is_dropped = True
                if not load.is_ready:
                    self._ahead.remove(load)

    def hold(self) -> None:
        """Read nothing more until `go_on`; returns when the chunk that is being read is there."""
        with self._wake:
            self._is_held = True
            self._wake.wait_for(lambda: not self._is_reading)

    def go_on(self) -> None:
        """End `hold`."""
        with self._wake:
            self._is_held = False
            self._wake.notify_all()

    def clear(self) -> None:
        """Forget all loads, and wait until none is being read."""
        with self._wake:
            self._is_held = False
            for load in (*self._urgent, *self._ahead):
                load.is_dropped = True
            self._urgent.clear()
            self._ahead.clear()
            self._wake.wait_for(lambda: not self._is_reading)
        while not self._done.empty():
            self._done.get()

    def close(self) -> None:
        """End the thread."""
        with self._wake:
            self._is_closing = True
            self._wake.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (load := self._begin_chunk()) is not None:
                self._slots.fill(load.buffer, load.record, load.num_begun - 1)
                self._end_chunk(load)
        except BaseException as error:  # whatever it was, it is told in the thread that waits
            with self._wake:
                self._error = error
                self._is_reading = False
                self._wake.notify_all()
            self._done.put(None)

    def _begin_chunk(self) -> Load | None:
        """The load whose next chunk is to be read now; waits for one. None: the channel closes."""
        with self._wake:
            self._wake.wait_for(lambda: self._is_closing or ((self._urgent or self._ahead) and not self._is_held))
            if self._is_closing:
                return None
            load = (self._urgent or self._ahead)[0]
            load.num_begun += 1
            self._is_reading = True
            return load

    def _end_chunk(self, load: Load) -> None:
        with self._wake:
            self._is_reading = False
            self._wake.notify_all()  # whoever waits for the end of the chunk
            if not load.is_dropped and load.num_begun == self._slots.chunks:
                (self._urgent if load.is_urgent else self._ahead).remove(load)
                load.ready_at = time.perf_counter()
                if load.is_urgent:
                    self._done.put(load)
