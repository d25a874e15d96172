"""The channel reads in the right order, a chunk at a time; records lie in the file as they are computed from."""

import threading

import numpy as np
import pytest
import torch

from schedlab.envs.core.errors import InputError
from schedlab.real_backend.experts_store import (
    PAGE,
    ExpertFile,
    ExpertShape,
    Load,
    LoadChannel,
    chunk_bounds,
    device_bytes_read,
)


class SteppedSlots:
    """`Slots` of three chunks whose reads wait until the test lets one go."""

    chunks = 3

    def __init__(self):
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.reads = []

    def fill(self, buffer, record, chunk):
        self.reads.append((record, chunk))
        self.begun.release()
        self.go.acquire()

    def let(self, count=1):
        """Let reads end, and wait until each following one begins (the last may be the last of all)."""
        for _ in range(count):
            self.go.release()
            self.begun.acquire()


@pytest.fixture
def stepped():
    slots = SteppedSlots()
    channel = LoadChannel(slots)
    yield slots, channel
    slots.go.release(1000)
    channel.close()


def test_demand_overtakes_prefetches_at_the_end_of_a_chunk(stepped):
    slots, channel = stepped
    ahead = [Load(record, record, False) for record in (10, 11, 12)]
    assert channel.submit((), (), ahead) == 0
    slots.begun.acquire()  # 10 is being read
    missing = [Load(record, record, True) for record in (1, 2)]
    assert channel.submit([ahead[2]], missing, ()) == 3  # 12 is late: it comes before what is missing
    _, progress = channel.progress(ahead)
    assert progress == [(1, np.inf), (0, np.inf), (0, np.inf)]
    slots.let(9 + 2)
    done = [load.record for load in channel.finished(3)]
    slots.let(3)
    assert done == [12, 1, 2] and ahead[0].is_ready and not ahead[1].is_ready
    order = [(10, 0)] + [(r, c) for r in (12, 1, 2) for c in range(3)] + [(10, 1), (10, 2)] + [(11, 0), (11, 1)]
    assert slots.reads[: len(order)] == order


def test_a_late_load_that_is_being_read_goes_on_first(stepped):
    slots, channel = stepped
    ahead = [Load(10, 0, False), Load(11, 1, False)]
    channel.submit((), (), ahead)
    slots.begun.acquire()
    slots.let()
    assert channel.submit([ahead[0]], [Load(1, 2, True)], ()) == 2
    slots.let(2)
    assert [load.record for load in channel.finished(1)] == [10]
    assert slots.reads == [(10, 0), (10, 1), (10, 2), (1, 0)]


def test_a_dropped_load_ends_with_its_chunk_and_a_ready_one_is_not_waited_for(stepped):
    slots, channel = stepped
    first, second = Load(10, 0, False), Load(11, 1, False)
    channel.submit((), (), [first, second])
    slots.begun.acquire()
    channel.drop([first])
    slots.let(3)  # all of 11 but the end of its last chunk
    slots.go.release()
    while not second.is_ready:
        pass
    assert slots.reads == [(10, 0), (11, 0), (11, 1), (11, 2)] and not first.is_ready
    assert channel.submit([second], (), ()) == 0


def test_a_held_channel_ends_its_chunk_and_begins_none(stepped):
    slots, channel = stepped
    channel.submit((), [Load(1, 0, True)], ())
    slots.begun.acquire()
    holding = threading.Thread(target=channel.hold)
    holding.start()
    holding.join(0.05)
    assert holding.is_alive()
    slots.go.release()
    holding.join()
    channel.submit((), (), [Load(10, 1, False)])
    assert not slots.begun.acquire(timeout=0.05) and slots.reads == [(1, 0)]
    channel.go_on()
    slots.begun.acquire()
    slots.let(2)
    assert [load.record for load in channel.finished(1)] == [1]


def test_clear_waits_for_the_chunk_under_way(stepped):
    slots, channel = stepped
    channel.submit((), [Load(1, 0, True), Load(2, 1, True)], [Load(10, 2, False)])
    slots.begun.acquire()
    clearing = threading.Thread(target=channel.clear)
    clearing.start()
    clearing.join(0.05)
    assert clearing.is_alive()
    slots.go.release()
    clearing.join()
    assert slots.reads == [(1, 0)]
    assert channel.submit((), [Load(3, 0, True)], ()) == 1
    slots.begun.acquire()
    assert slots.reads[-1] == (3, 0)


@pytest.fixture
def experts():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2 * 40, 24, generator=generator), torch.randn(24, 40, generator=generator)) for _ in range(5)]


def test_records_come_back_in_whole_and_from_the_disk(experts, tmp_path):
    shape = ExpertShape(24, 40, torch.float32)
    assert shape.record_bytes == 12288 and shape.num_weights * 4 == 11520  # three pages, the last one padded
    file = ExpertFile(experts, shape, tmp_path)
    slots = file.open_slots(2, 2 * PAGE)
    assert slots.chunks == 2
    before = device_bytes_read()
    for record in (3, 0, 4, 3):
        for chunk in range(2):
            slots.fill(1, record, chunk)
        for got, expected in zip(slots.weights(1), experts[record], strict=True):
            assert torch.equal(got, expected) and got.is_contiguous() and got.data_ptr() % 64 == 0
    assert device_bytes_read() - before == 4 * 12288  # the third read of record 3 as well
    with pytest.raises(OSError, match="read 0 of 8192 bytes"):
        slots.fill(0, 5, 0)
    file.close()


def test_chunks_are_aligned_and_cover_the_record():
    assert chunk_bounds(5 * PAGE, 2 * PAGE) == [(0, 2 * PAGE), (2 * PAGE, 4 * PAGE), (4 * PAGE, 5 * PAGE)]
    assert chunk_bounds(PAGE, 1 << 20) == [(0, PAGE)]
    with pytest.raises(InputError, match="not a multiple of 4096"):
        chunk_bounds(5 * PAGE, 1000)
