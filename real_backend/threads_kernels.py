"""What a PE of the `threads` backend computes: kernels on tiles that never take Python's global lock.

BLAS and LAPACK are called by address, as SciPy hands them out to Cython (`scipy.linalg.cython_blas`): its Python
functions hold the lock for a whole call. A *big* PE makes one call where a *little* one makes many on narrow strips of
the tile, and so does the same work slower (1.2 to 3 times; `calibrate_threads` measures by how much).

A tile is a b x b matrix of float64 in column-major order, and behind it `BLOCK` x b of a block reflector's triangular
factors, which only QR uses. All tiles, and what PEs need beside them, lie in one array: a kernel gets offsets into it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding
from numba import carray, cfunc, types
from numba.extending import get_cython_function_address, intrinsic

from ..envs.core.kernel import njit_borrowed, njit_inlined

KERNELS = (
    "POTRF",
    "TRSM",
    "SYRK",
    "GEMM",
    "LU",
    "FW",
    "BDIV",
    "BMOD",
    "GEQRT",
    "ORMQR",
    "TSQRT",
    "TSMQR",
    "FFT",
    "FIR",
    "MATMUL",
)
"""Kernels by name; a task's kernel is the first word of its name. The first twelve factorise (`envs.soc_dag.generate`),
the last three transform what comes from their predecessors."""
(POTRF, TRSM, SYRK, GEMM, LU, FW, BDIV, BMOD, GEQRT, ORMQR, TSQRT, TSMQR, FFT, FIR, MATMUL) = range(len(KERNELS))

BLOCK = 16
"""Columns of a block reflector, and of a panel of LU."""
NUM_TAPS = 16
"""Taps of the FIR filter."""
_L, _N, _R, _T, _U = (ord(letter) for letter in "LNRTU")


def _external(module: str, name: str, num_pointers: int) -> Any:
    """A Fortran function of SciPy's BLAS or LAPACK, all of whose arguments are addresses."""
    symbol = f"schedlab_{name}"  # a name of its own: other libraries in this process may hold one called `name`
    binding.add_symbol(symbol, get_cython_function_address(f"scipy.linalg.cython_{module}", name))
    return types.ExternalFunction(symbol, types.void(*[types.intp] * num_pointers))


_dgemm = _external("blas", "dgemm", 13)
_dtrsm = _external("blas", "dtrsm", 11)
_dsyrk = _external("blas", "dsyrk", 10)
_dpotrf = _external("lapack", "dpotrf", 5)
_dgeqrt = _external("lapack", "dgeqrt", 9)
_dgemqrt = _external("lapack", "dgemqrt", 14)
_dtpqrt = _external("lapack", "dtpqrt", 12)
_dtpmqrt = _external("lapack", "dtpmqrt", 17)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep OpenBLAS from starting threads of its own: a PE is one core. Another BLAS is left as it is."""
    import scipy.linalg.cython_blas

    library = ctypes.CDLL(scipy.linalg.cython_blas.__file__)  # finds the symbols of what it is linked with, too
    try:
        get_number, set_number = library.scipy_openblas_get_num_threads, library.scipy_openblas_set_num_threads
    except AttributeError:
        yield
        return
    before = get_number()
    set_number(1)
    try:
        yield
    finally:
        set_number(before)


class Store(NamedTuple):
    """The memory of P PEs, and where they leave the arguments of a Fortran call."""

    data: np.ndarray  # (n,) float64: tiles, then what PEs need beside them
    ints: np.ndarray  # (P, 16) int32
    reals: np.ndarray  # (P, 8) float64
    letters: np.ndarray  # (128,) uint8: letter c stands at c
    places: np.ndarray  # (P, W + 2) int64 offsets of a task's operands, then of a tile and of a block to work in
    strip: np.ndarray  # (P,) int64 columns (or rows) of a tile that one call works on
    at: np.ndarray  # (9,) int64 addresses of the arrays above in their order; lengths n, P, W + 2 of theirs
    tables: int  # offset of `new_tables`


def new_store(num_data: int, num_operands: int, tile: int, strip: Sequence[int]) -> Store:
    """Memory for `num_data` float64, and room behind them for every PE to work in.

    `strip` has an entry for each PE: big ones take the whole `tile` at once.
    """
    num_pes, own, tables = len(strip), (tile + 3 * BLOCK) * tile, new_tables(tile)
    data = np.concatenate([np.zeros(num_data + num_pes * own), tables])
    ints, reals = np.zeros((num_pes, 16), np.int32), np.zeros((num_pes, 8))
    letters = np.arange(128, dtype=np.uint8)
    places = np.zeros((num_pes, num_operands + 2), np.int64)
    places[:, -2] = num_data + own * np.arange(num_pes)
    places[:, -1] = places[:, -2] + (tile + BLOCK) * tile
    arrays = (data, ints, reals, letters, places, np.array(strip, np.int64))
    at = np.array([*(array.ctypes.data for array in arrays), len(data), *places.shape], np.int64)
    return Store(*arrays, at, len(data) - len(tables))


def new_tables(tile: int) -> np.ndarray:
    """Constants of FFT (cos and -sin of 2 pi k / n, n = tile^2 / 2 points), FIR and MATMUL, one after another."""
    rng = np.random.default_rng(tile)
    angle = 2 * np.pi * np.arange(tile * tile // 4) / (tile * tile // 2)
    taps, weights = rng.standard_normal(NUM_TAPS), rng.standard_normal((tile, tile))
    return np.concatenate([np.cos(angle), -np.sin(angle), taps / np.linalg.norm(taps), weights.ravel() / np.sqrt(tile)])


# ------------------------------------------------------------------------------------------------- Fortran calls


@njit_inlined
def data_at(store: Store, offset: int) -> int:
    """Address of an offset."""
    return store.at[0] + 8 * offset


@njit_inlined
def int_at(store: Store, pe: int, slot: int, value: int) -> int:
    """Address of an integer argument."""
    store.ints[pe, slot] = value
    return store.at[1] + 4 * (pe * store.ints.shape[1] + slot)


@njit_inlined
def real_at(store: Store, pe: int, slot: int, value: float) -> int:
    """Address of a float64 argument."""
    store.reals[pe, slot] = value
    return store.at[2] + 8 * (pe * store.reals.shape[1] + slot)


@njit_inlined
def letter_at(store: Store, letter: int) -> int:
    """Address of a letter."""
    return store.at[3] + letter


@njit_borrowed
def gemm(store, pe, left, right, m, n, k, alpha, a, b, c, ld):
    """C (m x n) += alpha op(A) op(B), with inner dimension k; `left` and `right` are N or T; all have `ld` rows."""
    rows = int_at(store, pe, 3, ld)
    one = real_at(store, pe, 1, 1.0)
    _dgemm(
        letter_at(store, left),
        letter_at(store, right),
        int_at(store, pe, 0, m),
        int_at(store, pe, 1, n),
        int_at(store, pe, 2, k),
        real_at(store, pe, 0, alpha),
        data_at(store, a),
        rows,
        data_at(store, b),
        rows,
        one,
        data_at(store, c),
        rows,
    )


@njit_borrowed
def trsm(store, pe, side, half, turned, unit, m, n, a, b, ld):
    """B (m x n) := op(A)^-1 B (side L) or B op(A)^-1 (side R); A is the lower or upper `half`, L or U."""
    rows = int_at(store, pe, 3, ld)
    _dtrsm(
        letter_at(store, side),
        letter_at(store, half),
        letter_at(store, turned),
        letter_at(store, unit),
        int_at(store, pe, 0, m),
        int_at(store, pe, 1, n),
        real_at(store, pe, 0, 1.0),
        data_at(store, a),
        rows,
        data_at(store, b),
        rows,
    )


@njit_borrowed
def syrk(store, pe, n, k, a, c, ld):
    """Lower half of C (n x n) -= A A^T, A n x k."""
    rows = int_at(store, pe, 3, ld)
    _dsyrk(
        letter_at(store, _L),
        letter_at(store, _N),
        int_at(store, pe, 0, n),
        int_at(store, pe, 1, k),
        real_at(store, pe, 0, -1.0),
        data_at(store, a),
        rows,
        real_at(store, pe, 1, 1.0),
        data_at(store, c),
        rows,
    )


@njit_borrowed
def potrf(store, pe, n, a, ld):
    """Cholesky factor of A (n x n) into its lower half. False: A is not positive definite."""
    _dpotrf(
        letter_at(store, _L),
        int_at(store, pe, 0, n),
        data_at(store, a),
        int_at(store, pe, 3, ld),
        int_at(store, pe, 4, 0),
    )
    return store.ints[pe, 4] == 0


@njit_borrowed
def geqrt(store, pe, m, n, a, t, ld):
    """QR of A (m x n), in blocks of `BLOCK` columns: R above, reflectors below the diagonal, their factors into T."""
    _dgeqrt(
        int_at(store, pe, 0, m),
        int_at(store, pe, 1, n),
        int_at(store, pe, 2, min(BLOCK, n)),
        data_at(store, a),
        int_at(store, pe, 3, ld),
        data_at(store, t),
        int_at(store, pe, 4, BLOCK),
        data_at(store, store.places[pe, -1]),
        int_at(store, pe, 5, 0),
    )


@njit_borrowed
def gemqrt(store, pe, m, n, k, v, t, c, ld):
    """C (m x n) := Q^T C, with Q by k reflectors V and their factors T."""
    _dgemqrt(
        letter_at(store, _L),
        letter_at(store, _T),
        int_at(store, pe, 0, m),
        int_at(store, pe, 1, n),
        int_at(store, pe, 2, k),
        int_at(store, pe, 4, min(BLOCK, k)),
        data_at(store, v),
        int_at(store, pe, 3, ld),
        data_at(store, t),
        int_at(store, pe, 5, BLOCK),
        data_at(store, c),
        int_at(store, pe, 3, ld),
        data_at(store, store.places[pe, -1]),
        int_at(store, pe, 6, 0),
    )


@njit_borrowed
def tpqrt(store, pe, m, n, a, b, t, ld):
    """QR of the upper triangle A (n x n) on top of B (m x n): R into A, reflectors into B, their factors into T."""
    _dtpqrt(
        int_at(store, pe, 0, m),
        int_at(store, pe, 1, n),
        int_at(store, pe, 2, 0),
        int_at(store, pe, 4, min(BLOCK, n)),
        data_at(store, a),
        int_at(store, pe, 3, ld),
        data_at(store, b),
        int_at(store, pe, 3, ld),
        data_at(store, t),
        int_at(store, pe, 5, BLOCK),
        data_at(store, store.places[pe, -1]),
        int_at(store, pe, 6, 0),
    )


@njit_borrowed
def tpmqrt(store, pe, m, n, k, v, t, a, b, ld):
    """A (k x n) on top of B (m x n) := Q^T of that, with Q by k reflectors V as `tpqrt` leaves them."""
    _dtpmqrt(
        letter_at(store, _L),
        letter_at(store, _T),
        int_at(store, pe, 0, m),
        int_at(store, pe, 1, n),
        int_at(store, pe, 2, k),
        int_at(store, pe, 7, 0),
        int_at(store, pe, 4, min(BLOCK, k)),
        data_at(store, v),
        int_at(store, pe, 3, ld),
        data_at(store, t),
        int_at(store, pe, 5, BLOCK),
        data_at(store, a),
        int_at(store, pe, 3, ld),
        data_at(store, b),
        int_at(store, pe, 3, ld),
        data_at(store, store.places[pe, -1]),
        int_at(store, pe, 6, 0),
    )


# -------------------------------------------------------------------------------------------------- tile kernels


def compute(at: int, tables: int, pe: int, kernel: int, num_operands: int, tile: int) -> bool:
    """Run a kernel on the tiles at `Store.places[pe]`, what it reads before what it writes. False: it failed.

    `at` is the address of `Store.at`.
    """
    a = carray(pointer(at), 9, np.int64)
    num_pes, width = a[7], a[8]
    store = Store(
        carray(pointer(a[0]), a[6], np.float64),
        carray(pointer(a[1]), (num_pes, 16), np.int32),
        carray(pointer(a[2]), (num_pes, 8), np.float64),
        carray(pointer(a[3]), 128, np.uint8),
        carray(pointer(a[4]), (num_pes, width), np.int64),
        carray(pointer(a[5]), num_pes, np.int64),
        a,
        tables,
    )
    if kernel <= GEMM:
        return cholesky_kernel(store, pe, kernel, tile)
    if kernel <= BMOD:
        return lu_kernel(store, pe, kernel, tile)
    if kernel <= TSMQR:
        return qr_kernel(store, pe, kernel, tile)
    return flow_kernel(store, pe, kernel, num_operands, tile)


@cache
def compiled_compute() -> Any:
    """`compute` behind a pointer, so that the kernels are compiled once, and not into every rule's threads."""
    signature = types.boolean(*[types.int64] * 6)
    return cfunc(signature, cache=True)(compute)


def _pointer_code(context, address):
    """An address as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


pointer: Any = intrinsic(_pointer_code)


@njit_borrowed
def cholesky_kernel(store, pe, kernel, tile):
    """POTRF (A), TRSM (L, A), SYRK (A, C) and GEMM (A, B, C) of the lower factor."""
    first, second, third = store.places[pe, 0], store.places[pe, 1], store.places[pe, 2]
    strip = store.strip[pe]
    if kernel == POTRF:
        if strip == tile:
            return potrf(store, pe, tile, first, tile)
        for begin in range(0, tile, BLOCK):
            width = min(BLOCK, tile - begin)
            corner = first + begin * tile + begin
            if not potrf(store, pe, width, corner, tile):
                return False
            rest = tile - begin - width
            below = corner + width
            if rest > 0:
                trsm(store, pe, _R, _L, _T, _N, rest, width, corner, below, tile)
                for at in range(0, rest, strip):
                    n = min(strip, rest - at)
                    target = below + width * tile + at * tile + at
                    gemm(store, pe, _N, _T, rest - at, n, width, -1.0, below + at, below + at, target, tile)
        return True
    for begin in range(0, tile, strip):
        n = min(strip, tile - begin)
        if kernel == TRSM:
            trsm(store, pe, _R, _L, _T, _N, n, tile, first, second + begin, tile)
        elif kernel == SYRK and strip == tile:
            syrk(store, pe, tile, tile, first, second, tile)
        elif kernel == SYRK:
            corner = second + begin * tile + begin
            gemm(store, pe, _N, _T, tile - begin, n, tile, -1.0, first + begin, first + begin, corner, tile)
        else:
            gemm(store, pe, _N, _T, tile, n, tile, -1.0, first, second + begin, third + begin * tile, tile)
    return True


@njit_borrowed
def lu_kernel(store, pe, kernel, tile):
    """LU (A) without pivoting, FW (L, A), BDIV (U, A) and BMOD (A, B, C)."""
    first, second, third = store.places[pe, 0], store.places[pe, 1], store.places[pe, 2]
    strip = store.strip[pe]
    if kernel == LU:
        return lu_tile(store, pe, first, tile)
    for begin in range(0, tile, strip):
        n = min(strip, tile - begin)
        if kernel == FW:
            trsm(store, pe, _L, _L, _N, _U, tile, n, first, second + begin * tile, tile)
        elif kernel == BDIV:
            trsm(store, pe, _R, _U, _N, _N, n, tile, first, second + begin, tile)
        else:
            at = begin * tile
            gemm(store, pe, _N, _N, tile, n, tile, -1.0, first, second + at, third + at, tile)
    return True


@njit_borrowed
def lu_tile(store, pe, first, tile):
    """LU of one tile, in panels of `BLOCK` columns."""
    strip = store.strip[pe]
    for begin in range(0, tile, BLOCK):
        width = min(BLOCK, tile - begin)
        corner = first + begin * tile + begin
        lu_panel(store.data, corner, tile - begin, width, tile)
        rest = tile - begin - width
        for at in range(0, rest, strip):
            n = min(strip, rest - at)
            right = corner + (width + at) * tile
            trsm(store, pe, _L, _L, _N, _U, width, n, corner, right, tile)
            gemm(store, pe, _N, _N, rest, n, width, -1.0, corner + width, right, right + width, tile)
    smallest = np.inf
    for j in range(tile):
        smallest = min(smallest, abs(store.data[first + j * tile + j]))
    return smallest > 0.0


@njit_borrowed
def lu_panel(data, corner, m, n, ld):
    """LU of an m x n panel, column by column."""
    for j in range(n):
        pivot = 1.0 / data[corner + j * ld + j]
        for i in range(j + 1, m):
            data[corner + j * ld + i] *= pivot
        for c in range(j + 1, n):
            factor = data[corner + c * ld + j]
            for i in range(j + 1, m):
                data[corner + c * ld + i] -= factor * data[corner + j * ld + i]


@njit_borrowed
def qr_kernel(store, pe, kernel, tile):
    """GEQRT (A, V), ORMQR (V, C), TSQRT (R, A) and TSMQR (V, C, D)."""
    first, second, third = store.places[pe, 0], store.places[pe, 1], store.places[pe, 2]
    data, size, strip = store.data, tile * tile, store.strip[pe]
    if kernel == GEQRT:
        if strip == tile:
            geqrt(store, pe, tile, tile, first, first + size, tile)
        else:
            narrow_geqrt(store, pe, first, tile)
        for i in range(size + BLOCK * tile):
            data[second + i] = data[first + i]
    elif kernel == TSQRT:
        if strip == tile:
            tpqrt(store, pe, tile, tile, first, second, second + size, tile)
        else:
            narrow_tpqrt(store, pe, first, second, tile)
    else:
        for begin in range(0, tile, strip):
            n, at = min(strip, tile - begin), begin * tile
            if kernel == ORMQR:
                gemqrt(store, pe, tile, n, tile, first, first + size, second + at, tile)
            else:
                tpmqrt(store, pe, tile, n, tile, first, first + size, second + at, third + at, tile)
    return True


@njit_borrowed
def narrow_geqrt(store, pe, first, tile):
    """`geqrt` of a tile, panel by panel, each applied to the columns behind it in strips."""
    for begin in range(0, tile, BLOCK):
        width, strip = min(BLOCK, tile - begin), store.strip[pe]
        corner, factors = first + begin * tile + begin, first + tile * tile + begin * BLOCK
        geqrt(store, pe, tile - begin, width, corner, factors, tile)
        for at in range(begin + width, tile, strip):
            n = min(strip, tile - at)
            gemqrt(store, pe, tile - begin, n, width, corner, factors, first + at * tile + begin, tile)


@njit_borrowed
def narrow_tpqrt(store, pe, first, second, tile):
    """`tpqrt` of two tiles, panel by panel, each applied to the columns behind it in strips."""
    for begin in range(0, tile, BLOCK):
        width, strip = min(BLOCK, tile - begin), store.strip[pe]
        panel, factors = second + begin * tile, second + tile * tile + begin * BLOCK
        tpqrt(store, pe, tile, width, first + begin * tile + begin, panel, factors, tile)
        for at in range(begin + width, tile, strip):
            n = min(strip, tile - at)
            top = first + at * tile + begin
            tpmqrt(store, pe, tile, n, width, panel, factors, top, second + at * tile, tile)


@njit_borrowed
def flow_kernel(store, pe, kernel, num_operands, tile):
    """FFT, FIR or MATMUL of what comes in: of d predecessors each gives its d-th share of the columns, or a first task
    its own tile; the result goes into the last operand."""
    data, size, strip, tables = store.data, tile * tile, store.strip[pe], store.tables
    inside, out = store.places[pe, -2], store.places[pe, num_operands - 1]
    sources = max(num_operands - 1, 1)
    for r in range(sources):
        source = store.places[pe, r]
        for i in range(tile * (r * tile // sources), tile * ((r + 1) * tile // sources)):
            data[inside + i] = data[source + i]
    if kernel == FFT:
        fft(data, inside, out, tables, size // 2, strip == tile)
    elif kernel == FIR:
        fir(data, inside, out, tables + size // 2, size, 1024 if strip == tile else strip)
    else:
        weights = tables + size // 2 + NUM_TAPS
        for i in range(size):
            data[out + i] = 0.0
        for begin in range(0, tile, strip):
            n, at = min(strip, tile - begin), begin * tile
            gemm(store, pe, _N, _N, tile, n, tile, 1.0, weights, inside + at, out + at, tile)
    return True


@njit_borrowed
def fft(data, source, target, table, n, is_big):
    """Unitary FFT of n = 2^odd points, real parts before imaginary ones (Stockham, radix 2); `source` is lost.

    A big PE's inner loop runs along the data, a little one's across them.
    """
    groups, width = n // 2, 1
    while groups >= 1:
        half = groups * width
        if is_big:
            for j in range(groups):
                cos, sin = data[table + j * width], data[table + n // 2 + j * width]
                for k in range(width):
                    butterfly(data, source + j * width + k, target + 2 * j * width + k, half, width, n, cos, sin)
        else:
            for k in range(width):
                for j in range(groups):
                    cos, sin = data[table + j * width], data[table + n // 2 + j * width]
                    butterfly(data, source + j * width + k, target + 2 * j * width + k, half, width, n, cos, sin)
        source, target = target, source
        groups, width = groups // 2, 2 * width
    scale = 1.0 / np.sqrt(n)
    for i in range(2 * n):
        data[source + i] *= scale


@njit_inlined
def butterfly(data, a, b, half, width, n, cos, sin):
    """One step of `fft`: two points at `a` and `half` behind it, to `b` and `width` behind it."""
    re, im = data[a] - data[a + half], data[a + n] - data[a + half + n]
    data[b] = data[a] + data[a + half]
    data[b + n] = data[a + n] + data[a + half + n]
    data[b + width] = re * cos - im * sin
    data[b + width + n] = re * sin + im * cos


@njit_borrowed
def fir(data, source, target, taps, n, strip):
    """Circular convolution of n points with the taps, `strip` points at a time."""
    for begin in range(0, n, strip):
        end = min(begin + strip, n)
        for i in range(begin, end):
            data[target + i] = 0.0
        for k in range(NUM_TAPS):
            tap = data[taps + k]
            for i in range(begin, min(max(k, begin), end)):
                data[target + i] += tap * data[source + i - k + n]
            for i in range(min(max(k, begin), end), end):
                data[target + i] += tap * data[source + i - k]
