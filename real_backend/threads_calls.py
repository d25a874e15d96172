"""Compiled functions called through pointers, with their arguments in memory.

A thread's loop that takes a rule as an argument must be compiled anew for each rule, and with it everything that it
calls: seconds. Called through a pointer a rule is compiled alone, and the loop once, into the cache on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cfunc, typeof, types
from numba.extending import intrinsic

from ..envs.core.kernel import UNCOUNTED, njit


def _loader(kind: types.Type) -> Callable:
    """A compiled function from an address to the value of that type there."""

    @intrinsic
    def load(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = builder.inttoptr(arguments[0], context.get_value_type(kind).as_pointer())
            return builder.load(place)

        return kind(types.int64), generate

    return load


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


_store: Any = intrinsic(_store_code)
_size_of: Any = intrinsic(_size_code)


@njit(cache=True, **UNCOUNTED)
def _block_size(arguments):
    return _size_of(arguments)


@njit(cache=True, **UNCOUNTED)
def _write(address, arguments):
    _store(address, arguments)


def block_of(arguments: tuple) -> np.ndarray:
    """uint8 block that holds arguments (arrays, NamedTuples of them, numbers), which must be kept as long as it is."""
    block = np.zeros(_block_size(arguments) + 64, np.uint8)
    block = block[-block.ctypes.data % 64 :]
    _write(block.ctypes.data, arguments)
    return block


def call_of(function: Callable, arguments: tuple) -> Any:
    """`function` as a pointer that compiled code may call with the address of a block of such arguments."""
    return _compiled(function, typeof(arguments))


@cache
def _compiled(function: Callable, kind: types.Type) -> Any:
    load = _loader(kind)

    @cfunc(types.void(types.int64), **UNCOUNTED)
    def call(address):
        function(*load(address))

    return call
