"""Arguments of compiled functions as one block of memory: handed over as an address, not one array after another.

To take a NamedTuple of arrays apart costs three cache lines an array. Where these are cold, as a policy finds them
after a forward pass, that is a third of a decision: 34 us for 52 arrays, 14 through a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numba import typeof, types
from numba.extending import intrinsic

from .kernel import UNCOUNTED, entry_point, njit

CACHE_LINE = 64
"""Bytes."""


def _load_code(typing_context: Any, address: Any, kind: Any) -> Any:
    """The value of the type `kind` that lies at an address."""
    value_type = kind.instance_type

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], context.get_value_type(value_type).as_pointer()))

    return value_type(types.int64, kind), generate


def _store_code(typing_context: Any, address: Any, value: Any) -> Any:
    """Write a value as compiled code has it to an address; of several fields, as one block."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], context.get_value_type(signature.args[1]).as_pointer())
        builder.store(arguments[1], place)
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


def _size_code(typing_context: Any, value: Any) -> Any:
    """Bytes of a value as compiled code has it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        size = context.get_abi_sizeof(context.get_value_type(signature.args[0]))
        return context.get_constant(types.int64, size)

    return types.int64(value), generate


load: Any = intrinsic(_load_code)
"""In compiled code, load(address, type): the arguments that `block_of` wrote there. Nothing is counted or checked."""
_store: Any = intrinsic(_store_code)
_size_of: Any = intrinsic(_size_code)


@njit(cache=True, **UNCOUNTED)
def _block_size(arguments):
    return _size_of(arguments)


@njit(cache=True, **UNCOUNTED)
def _write(address, arguments):
    _store(address, arguments)


def zeros_by_line(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """`np.zeros`, from the start of a cache line on: rows of a line's length lie on one each."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def copies_in_one(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies that lie one after another in one block of memory, each from the start of a cache line on.

    Few pages hold all of it, and no vector of an aligned row crosses two lines: 6 of 120 us of a decision whose
    weights are cold.
    """
    starts = np.cumsum([0] + [-(-array.nbytes // CACHE_LINE) * CACHE_LINE for array in arrays.values()])
    block, copies = zeros_by_line(int(starts[-1]), np.uint8), {}
    for (name, array), start in zip(arrays.items(), starts[:-1], strict=True):
        copies[name] = block[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copies[name][...] = array
    return copies


def block_of(arguments: tuple) -> np.ndarray:
    """uint8 block that holds arguments (arrays, NamedTuples of them, numbers), which must be kept as long as it is."""
    block = zeros_by_line(_block_size(arguments), np.uint8)
    _write(block.ctypes.data, arguments)
    return block


class BoundCall:
    """A kernel `f(address, type, *others)`, bound to arguments that it takes by `load` and that are always the same.

    The arrays are the same, that is: what is in them may change.

    Args:
        kernel: what is called.
        arguments: what lies at the address.
        others: examples of what each call is given beside it: their types are fixed.
    """

    def __init__(self, kernel: Any, arguments: tuple, *others: Any) -> None:
        self.arguments = arguments
        self._block = block_of(arguments)
        self._address, self._type = int(self._block.ctypes.data), typeof(arguments)
        self._call: Callable = entry_point(kernel, self._address, self._type, *others)

    def __call__(self, *others: Any) -> Any:
        return self._call(self._address, self._type, *others)
