"""numba's njit for all kernels of the package, and `njit_borrowed`, for those that only change their caller's arrays.

To take `njit` from here is to have its cache see every source that a kernel depends on (`compile_cache`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit, typeof

from .compile_cache import use_cache_of_sources

__all__ = ["UNCOUNTED", "entry_point", "njit", "njit_borrowed", "njit_inlined"]

use_cache_of_sources()

UNCOUNTED: dict[str, Any] = {"_nrt": False}
"""Options of a kernel that counts no references. One that takes functions cannot be cached: `@njit(**UNCOUNTED)`."""


def njit_borrowed(function: Callable) -> Any:
    """`njit(cache=True)` without reference counting, for kernels that allocate nothing and return no arrays.

    A kernel that takes a NamedTuple of 20 arrays apart counts each of them up and down, atomically, which costs more
    than the work itself where that is a microsecond (measured: 3.0 against 1.3 us for an epoch of expert caching).
    Kernels of this kind may be called from any njit function, and must themselves call only kernels of this kind that
    return arrays or tuples of arrays: what an njit function returns is counted up, and here nobody would count it down.
    numba refuses to compile one that allocates.
    """
    return njit(function, cache=True, **UNCOUNTED)


def njit_inlined(function: Callable) -> Any:
    """`njit_borrowed`, compiled into its callers: for what runs every time, from one place or two.

    To hand over a NamedTuple of 20 arrays is to copy 150 words (measured: 0.65 against 0.87 us for an iteration of
    request scheduling with four such calls less).
    """
    return njit(function, cache=True, forceinline=True, **UNCOUNTED)


def entry_point(kernel: Any, *arguments: Any) -> Callable:
    """The compiled `kernel` for arguments of these types, to be called from Python without looking the types up.

    With the processor's caches cold, as a policy finds them after a forward pass, numba's look-up of NamedTuples with
    40 arrays in all costs as much as a decision (measured: 198 against 110 us). Arguments of other types raise
    TypeError.
    """
    types = tuple(typeof(argument) for argument in arguments)
    kernel.compile(types)
    return kernel.overloads[types].entry_point
