"""A PE of the `threads` backend that is a CUDA stream: the same kernels by torch, on tiles brought to the device.

A task's tiles go to the device before it executes and back to host memory when it has, as with an accelerator that
works on the memory of its host. `device="cpu"` runs the same code without a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..envs.core.errors import InputError
from .threads_kernels import (
    BDIV,
    BMOD,
    FFT,
    FIR,
    FW,
    GEMM,
    KERNELS,
    LU,
    MATMUL,
    NUM_TAPS,
    POTRF,
    SYRK,
    TRSM,
    new_tables,
)

DEVICE_KERNELS = (POTRF, TRSM, SYRK, GEMM, LU, FW, BDIV, BMOD, FFT, FIR, MATMUL)
"""Kernels that torch has: the reflectors of QR are LAPACK's."""


class Lane:
    """Runs the kernels of one PE on a stream of its own.

    Args:
        device: of torch, with an index if need be.
        data: float64 (n,) host memory of the tiles.
        tile: rows of a tile.
        num_operands: most operands of a task.

    Raises InputError if there is no such device.
    """

    def __init__(self, device: str, data: np.ndarray, tile: int, num_operands: int) -> None:
        import torch

        check_device(device)
        self._torch, self._device = torch, torch.device(device)
        is_cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if is_cuda else None
        self._host = torch.from_numpy(data)
        shape = (num_operands, tile, tile)
        self._staging = torch.empty(shape, dtype=torch.float64, pin_memory=is_cuda)
        self._tiles = torch.empty(shape, dtype=torch.float64, device=self._device)
        tables = torch.from_numpy(new_tables(tile)).to(self._device)
        self._taps = tables[tile * tile // 2 :][:NUM_TAPS]
        self._weights = tables[tile * tile // 2 + NUM_TAPS :].reshape(tile, tile)

    def load(self, offsets: np.ndarray) -> None:
        """Bring the tiles at these offsets of host memory to the device."""
        self._copy(offsets, is_load=True)

    def store(self, offsets: np.ndarray, written: np.ndarray) -> None:
        """Bring the tiles that were written back to host memory."""
        self._copy(offsets, is_load=False, some=np.flatnonzero(written))

    def compute(self, kernel: int, num_operands: int) -> bool:
        """Run a kernel on the tiles that were loaded, what it reads before what it writes. False: it failed."""
        with self._on_stream():
            return bool(self._run(kernel, self._tiles[:num_operands]))

    def _copy(self, offsets: np.ndarray, *, is_load: bool, some: np.ndarray | None = None) -> None:
        size = self._staging[0].numel()
        with self._on_stream():
            for i in range(len(offsets)) if some is None else some.tolist():
                host = self._host[int(offsets[i]) : int(offsets[i]) + size].view_as(self._staging[i])
                if is_load:
                    self._staging[i].copy_(host)
                    self._tiles[i].copy_(self._staging[i], non_blocking=True)
                else:
                    self._staging[i].copy_(self._tiles[i])
                    host.copy_(self._staging[i])
            self._wait()

    def _on_stream(self) -> Any:
        return self._torch.cuda.stream(self._stream)  # of None: nothing

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _run(self, kernel: int, tiles: Any) -> Any:
        """The kernels of `threads_kernels` on tensors [tile, column, row]; whether all went well."""
        torch = self._torch
        solve = torch.linalg.solve_triangular
        a, b, c = (tiles[min(i, len(tiles) - 1)].mT for i in range(3))  # as matrices
        if kernel == POTRF:
            factor, info = torch.linalg.cholesky_ex(torch.tril(a) + torch.tril(a, -1).mT)
            a.copy_(factor)
            return info == 0
        if kernel == TRSM:
            b.copy_(solve(torch.tril(a).mT, b, upper=True, left=False))
        elif kernel == SYRK:
            b.sub_(a @ a.mT)
        elif kernel == GEMM:
            c.sub_(a @ b.mT)
        elif kernel == LU:
            a.copy_(self._lu(a))
            return (a.diagonal().abs() > 0).all()
        elif kernel == FW:
            b.copy_(solve(torch.tril(a), b, upper=False, unitriangular=True))
        elif kernel == BDIV:
            b.copy_(solve(torch.triu(a), b, upper=True, left=False))
        elif kernel == BMOD:
            c.sub_(a @ b)
        else:
            self._flow(kernel, tiles)
        return True

    def _lu(self, a: Any) -> Any:
        """LU without pivoting: cuSOLVER's; torch has none on a CPU."""
        if a.is_cuda:
            return self._torch.linalg.lu_factor_ex(a, pivot=False).LU
        a = a.clone()
        for k in range(len(a) - 1):
            a[k + 1 :, k] /= a[k, k].clone()
            a[k + 1 :, k + 1 :] -= a[k + 1 :, k, None] * a[k, None, k + 1 :]
        return a

    def _flow(self, kernel: int, tiles: Any) -> None:
        """FFT, FIR or MATMUL of the sources' shares, into the last tile."""
        torch, n = self._torch, len(tiles[0])
        num_sources = max(len(tiles) - 1, 1)
        bounds = [r * n // num_sources for r in range(num_sources + 1)]
        x = torch.cat([tiles[r][bounds[r] : bounds[r + 1]] for r in range(num_sources)])
        flat, half = x.reshape(-1), n * n // 2
        if kernel == FFT:
            points = torch.fft.fft(torch.complex(flat[:half], flat[half:]), norm="ortho")
            y = torch.cat([points.real, points.imag])
        elif kernel == FIR:
            shifted = torch.stack([flat.roll(k) for k in range(NUM_TAPS)])
            y = self._taps @ shifted
        else:
            y = x @ self._weights
        tiles[-1].copy_(y.reshape(n, n))


def check_kernels(kernels: np.ndarray) -> None:
    """Raise InputError unless a lane has all of these kernels."""
    missing = sorted({KERNELS[kernel] for kernel in kernels} - {KERNELS[kernel] for kernel in DEVICE_KERNELS})
    if missing:
        raise InputError(
            f"PEs of kind gpu cannot run {', '.join(missing)}", remedy="Give these tasks an infinite time there"
        )


def check_device(device: str) -> None:
    """Raise InputError if torch has no such device."""
    import torch

    try:
        kind = torch.device(device).type
        found = kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())
    except RuntimeError:
        found = False
    if not found:
        raise InputError(
            f"device {device!r} is not available", remedy='Use PEs of kind big and little, or device="cpu"'
        )
