"""Arguments in a block of memory are the arguments."""

import numpy as np

from schedlab.envs.core.blocks import BoundCall, block_of, copies_in_one, load, zeros_by_line
from schedlab.envs.core.kernel import UNCOUNTED, njit


@njit(cache=True, **UNCOUNTED)
def _weigh(address, kind, factor):
    (numbers, table), out = load(address, kind)
    out[0] = 0.0
    for i in range(table.shape[0]):
        for j in range(table.shape[1]):
            out[0] += factor * numbers[i] * table[i, j]
    return table.shape[1]


def test_a_bound_call_sees_what_its_arrays_hold_now():
    numbers, table, out = np.arange(3.0), np.arange(12).reshape(3, 4), np.zeros(1)
    call = BoundCall(_weigh, ((numbers, table), out), 1.0)
    assert call(0.5) == 4 and out[0] == 0.5 * (numbers @ table.sum(1))
    numbers[:] = [4.0, 0.0, 1.0]
    table[2] = 7
    assert call(2.0) == 4 and out[0] == 2.0 * (numbers @ table.sum(1))


def test_other_arguments_are_another_block():
    """Of other sizes, or of other types: each call keeps its own."""
    calls, expected = [], []
    for rows, dtype in ((1, np.int64), (5, np.int64), (2, np.int32)):
        table, out = np.full((rows, rows), 2, dtype), np.zeros(1)
        calls.append(BoundCall(_weigh, ((np.ones(rows), table), out), 1.0))
        expected.append(2.0 * rows * rows)
    assert [call(1.0) for call in calls] == [1, 5, 2]
    assert [call.arguments[-1][0] for call in calls] == expected


def test_blocks_begin_at_a_cache_line():
    for size in range(1, 40):
        assert block_of((np.zeros(size), size)).ctypes.data % 64 == 0


def test_rows_of_a_line_lie_on_one():
    for shape in (1, 7, (3, 5), (0, 4)):
        zeros = zeros_by_line(shape, np.dtype([("a", "f8", 7), ("b", "i4", 2)]))
        assert zeros.shape == np.zeros(shape).shape
        assert zeros.size == 0 or zeros.ctypes.data % 64 == 0  # numpy does not move the pointer of an empty slice
        assert not zeros["a"].any() and zeros.flags.writeable


def test_copies_lie_together():
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(5, 3)).astype(np.float32), "flag": np.ones(7, np.int8), "b": rng.normal(size=9)}
    copies = copies_in_one(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(copies[name], array)
        assert copies[name].dtype == array.dtype and copies[name].flags.c_contiguous
    assert [copy.ctypes.data - copies["w"].ctypes.data for copy in copies.values()] == [0, 64, 128]
    copies["flag"][:] = 0
    assert arrays["flag"].all() and (copies["b"] == arrays["b"]).all()
