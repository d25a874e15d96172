"""Compiled functions called through pointers, with their arguments in memory.

A thread's loop that takes a rule as an argument must be compiled anew for each rule, and with it everything that it
calls: seconds. Called through a pointer a rule is compiled alone, and the loop once, into the cache on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import cfunc, typeof, types

from ..envs.core.blocks import load
from ..envs.core.kernel import UNCOUNTED


def call_of(function: Callable, arguments: tuple) -> Any:
    """`function` as a pointer that compiled code may call with the address of a block of such arguments."""
    return _compiled(function, typeof(arguments))


@cache
def _compiled(function: Callable, kind: types.Type) -> Any:
    @cfunc(types.void(types.int64), **UNCOUNTED)
    def call(address):
        function(*load(address, kind))

    return call
