"""What the tasks of a graph compute: from `envs.soc_dag` graphs to kernels on tiles, and whether the result is right.

Tiled factorisations (`tiled`) and flows (`flow`: layered graphs of FFT, FIR and MATMUL) are graphs with a meaning; the
graph of a factorisation is known by its tasks, those of a flow by names that begin with a kernel.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..envs.core.errors import InputError
from ..envs.core.results import atomic_path
from ..envs.soc_dag.generate import random_layered, tile_program, tiled
from ..envs.soc_dag.spec import PeKind, Soc
from ..envs.soc_dag.workload import Dag, Stream
from .threads_kernels import BLOCK, GEQRT, KERNELS, NUM_TAPS, TSMQR, new_tables

FLOW_KERNELS = ("FFT", "FIR", "MATMUL")
FACTOR_KERNELS = {
    "cholesky": ("POTRF", "TRSM", "SYRK", "GEMM"),
    "lu": ("LU", "FW", "BDIV", "BMOD"),
    "qr": ("GEQRT", "ORMQR", "TSQRT", "TSMQR"),
}
NUM_PROBES = 8
"""Random columns that a factorisation's product is applied to, to see whether it is the matrix."""
KINDS = ("big", "little", "gpu")
"""Kinds of PEs: a core, a core that works on narrow strips, a CUDA stream."""


@dataclass(frozen=True)
class KernelCosts:
    """What kernels take on each kind of PE: what the simulator has to know of a machine."""

    tile: int
    """Rows and columns of a tile."""
    kinds: tuple[str, ...]
    times_us: Mapping[str, tuple[float, ...]]
    """Kernel -> us of an execution on each of the kinds, while the other PEs work, too."""
    handoff_us: float = 0.0
    """From the moment when a task's PE is free and its predecessors are finished until it executes."""
    copy_bandwidth: float = math.inf
    """Bytes a us from one PE's memory to another's."""
    name: str = "unmeasured"
    source: str = ""
    report: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.tile < 1 or not self.kinds or not set(self.kinds) <= set(KINDS):
            raise InputError(
                f"costs of tiles of {self.tile} on {self.kinds}", remedy=f"Give a positive tile, and of {KINDS}"
            )
        for kernel, times in self.times_us.items():
            if kernel not in KERNELS or len(times) != len(self.kinds) or not all(us > 0 for us in times):
                raise InputError(
                    f"costs of kernel {kernel!r} are {times}",
                    remedy=f"Give a positive us for each of {self.kinds}, inf where it cannot run; kernels are "
                    + ", ".join(KERNELS),
                )

    def of(self, kernel: str) -> tuple[float, ...]:
        """us of a task from when it can begin to its end, on each kind. Raises InputError."""
        if kernel not in self.times_us:
            raise InputError(
                f"costs {self.name!r} hold no time of kernel {kernel}", remedy="Calibrate with graphs that use it"
            )
        return tuple(us + self.handoff_us for us in self.times_us[kernel])

    def soc(self, counts: Mapping[str, int]) -> Soc:
        """The machine with so many PEs of each kind. Raises InputError for kinds without costs."""
        unknown = [kind for kind in counts if kind not in self.kinds]
        if unknown or list(counts) != [kind for kind in self.kinds if kind in counts]:
            raise InputError(
                f"PEs of kinds {list(counts)}, costs are of {self.kinds}", remedy="Choose of these, in this order"
            )
        size = range(len(counts))
        return Soc(
            "+".join(f"{count}{kind}" for kind, count in counts.items()),
            tuple(PeKind(kind, count) for kind, count in counts.items()),
            bandwidth=tuple(tuple(self.copy_bandwidth for _ in size) for _ in size),
            source=self.source,
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the JSON that `load` reads; all of it or nothing."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        with atomic_path(path) as temporary:
            temporary.write_text(text)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> KernelCosts:
        """Read what `save` wrote. Raises InputError."""
        try:
            content = json.loads(Path(path).read_text())
            content["kinds"] = tuple(content["kinds"])
            content["times_us"] = {kernel: tuple(times) for kernel, times in content["times_us"].items()}
            return cls(**content)
        except InputError as error:
            raise InputError(error.problem, remedy=error.remedy, file=path) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"not the costs of kernels ({error})", file=path, remedy="Write one with `schedlab calibrate threads`"
            ) from error


def unmeasured_costs(tile: int, kinds: tuple[str, ...] = KINDS[:2]) -> KernelCosts:
    """Costs that know nothing: every kernel takes 100 us on each kind. To measure with."""
    return KernelCosts(tile, kinds, {kernel: (100.0,) * len(kinds) for kernel in KERNELS})


def tile_bytes(tile: int, *, is_qr: bool = False) -> int:
    """Bytes of a tile, of QR with its reflectors' factors."""
    return 8 * tile * (tile + BLOCK if is_qr else tile)


# ------------------------------------------------------------------------------------------------------- graphs


def factorisation(name: str, tiles: int, costs: KernelCosts, *, copies: bool = False) -> Dag:
    """The graph of a tiled "cholesky", "lu" or "qr" with these costs; with `copies` its edges carry their tiles."""
    kernels = {kernel: costs.of(kernel) for kernel in FACTOR_KERNELS.get(name, ())}
    return tiled(name, tiles, kernels, tile_bytes(costs.tile, is_qr=name == "qr") if copies else 0.0)


def flow(num_tasks: int, costs: KernelCosts, *, copies: bool = False, seed: int = 0) -> Dag:
    """A random layered graph whose tasks are FFT, FIR or MATMUL of what their predecessors made."""
    shape = random_layered(num_tasks, 1, seed=seed)
    kernels = np.random.default_rng([seed, num_tasks]).choice(FLOW_KERNELS, num_tasks)
    volume = tile_bytes(costs.tile) if copies else 0.0
    return Dag.from_arrays(
        f"flow-{num_tasks}-{seed}",
        [costs.of(kernel) for kernel in kernels],
        shape.edges,
        volume,
        task_names=[f"{kernel} {task}" for task, kernel in enumerate(kernels)],
        source=f"generated: a layered graph of {num_tasks} FFT, FIR and MATMUL, seed {seed}",
    )


GRAPHS: dict[str, Callable[..., list[Dag]]] = {
    r"(cholesky|lu|qr)_(\d+)": lambda costs, copies, name, n: [factorisation(name, int(n), costs, copies=copies)],
    r"flow_(\d+)": lambda costs, copies, n: [flow(int(n), costs, copies=copies)],
    r"flows_(\d+)": lambda costs, copies, n: [flow(int(n) + 4 * i, costs, copies=copies, seed=i) for i in range(6)],
    r"mix_(\d+)": lambda costs, copies, n: [
        *(factorisation(name, int(n), costs, copies=copies) for name in FACTOR_KERNELS),
        flow(int(n) ** 2, costs, copies=copies),
    ],
}
"""Pattern of a name -> the graphs that jobs are drawn from."""
NAMES = "cholesky_<tiles>, lu_<tiles>, qr_<tiles>, flow_<tasks>, flows_<tasks> (six graphs), mix_<tiles> (all of them)"


def find_stream(
    name: str,
    costs: KernelCosts,
    gap_us: float = 0.0,
    num_jobs: int = 1,
    *,
    slack: float = math.inf,
    copies: bool = False,
) -> Stream:
    """Jobs that the executor can run, by name (see `NAMES`). Raises InputError.

    Args:
        name: what the jobs run.
        costs: of the kernels, on the kinds of PEs that there will be.
        gap_us: mean time between arrivals; 0: all jobs are there at the start.
        num_jobs: jobs of a workload.
        slack: deadlines, as multiples of a graph's shortest possible latency.
        copies: PEs have memories of their own, and edges carry tiles.
    """
    for pattern, make in GRAPHS.items():
        if found := re.fullmatch(pattern, name):
            dags = tuple(make(costs, copies, *found.groups()))
            source = f"{dags[0].source}, tiles of {costs.tile}, costs {costs.name}" + (", copied" if copies else "")
            return Stream(name, costs.kinds, dags, gap_us, num_jobs, slack=slack, source=source)
    raise InputError(f"the threads backend has no jobs called {name!r}", remedy=f"Give one of: {NAMES}")


# ----------------------------------------------------------------------------------------------------- programs


@dataclass(frozen=True, eq=False)
class Program:
    """The kernels of a graph of n tasks and the tiles they work on."""

    kind: str
    """A factorisation, or "flow"."""
    kernel: np.ndarray  # (n,) int64 number in `KERNELS`
    first: np.ndarray  # (n + 1,) int64: operands of task i are first[i] : first[i + 1]
    operand: np.ndarray  # (m,) int64 tiles: those that are only read before those that are written
    written: np.ndarray  # (m,) bool
    num_tiles: int

    def initial(self, tile: int, rng: np.random.Generator) -> np.ndarray:
        """float64 (num_tiles, (tile + BLOCK) * tile): data to begin with."""
        tiles = np.zeros((self.num_tiles, (tile + BLOCK) * tile))
        body = tiles[:, : tile * tile]
        if self.kind == "flow":
            begins = np.flatnonzero(np.diff(self.first) == 1)
            body[begins] = rng.standard_normal((len(begins), tile * tile))
            return tiles
        n = self._side
        matrix = rng.standard_normal((n * tile, n * tile))
        if self.kind == "cholesky":
            matrix = matrix + matrix.T
        if self.kind != "qr":  # no pivots are looked for: dominate
            matrix[np.diag_indices(len(matrix))] += 4.0 * np.sqrt(len(matrix))
        for i in range(n):
            for j in range(n):
                block = matrix[i * tile : (i + 1) * tile, j * tile : (j + 1) * tile]
                body[i * n + j] = block.T.ravel()
        return tiles

    def residual(self, initial: np.ndarray, final: np.ndarray, tile: int) -> float:
        """Relative error of the result: of (L L^T - A) X, (L U - A) X or (R^T R - A^T A) X, X some random columns; of a
        flow against numpy.

        Args:
            initial: as `initial` made it.
            final: the same tiles after all tasks.
            tile: rows of a tile.
        """
        if self.kind == "flow":
            return self._flow_residual(initial, final, tile)
        before, after = self._matrix(initial, tile), self._matrix(final, tile)
        probe = np.random.default_rng(0).standard_normal((len(before), NUM_PROBES))
        upper, expected = np.triu(after), before @ probe
        if self.kind == "cholesky":
            lower = np.tril(after)
            found = lower @ (lower.T @ probe)
        elif self.kind == "lu":
            product = upper @ probe
            found = np.tril(after, -1) @ product + product
        else:
            expected, found = before.T @ expected, upper.T @ (upper @ probe)
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    @property
    def _side(self) -> int:
        """Tiles in a row of a factorisation's matrix; those of QR's reflectors lie behind them."""
        return math.isqrt(self.num_tiles)

    def _matrix(self, tiles: np.ndarray, tile: int) -> np.ndarray:
        n = self._side
        blocks = tiles[: n * n, : tile * tile].reshape(n, n, tile, tile)
        return blocks.transpose(0, 3, 1, 2).reshape(n * tile, n * tile)

    def _flow_residual(self, initial: np.ndarray, final: np.ndarray, tile: int) -> float:
        """Largest relative error of a task's result, all of them computed anew with numpy."""
        size, worst = tile * tile, 0.0
        results: list[np.ndarray] = []
        tables = new_tables(tile)
        taps, weights = tables[size // 2 : size // 2 + NUM_TAPS], tables[size // 2 + NUM_TAPS :].reshape(tile, tile)
        for task in range(len(self.kernel)):
            sources = self.operand[self.first[task] : self.first[task + 1] - 1]
            shares = np.arange(len(sources) + 1) * tile // max(len(sources), 1)
            parts = [results[s][shares[r] : shares[r + 1]] for r, s in enumerate(sources)]
            x = np.concatenate(parts) if parts else initial[task, :size].reshape(tile, tile)
            name, flat = KERNELS[self.kernel[task]], x.ravel()
            if name == "FFT":
                points = np.fft.fft(flat[: size // 2] + 1j * flat[size // 2 :], norm="ortho")
                y = np.concatenate([points.real, points.imag])
            elif name == "FIR":
                y = sum(tap * np.roll(flat, k) for k, tap in enumerate(taps))
            else:
                y = x @ weights
            results.append(np.reshape(y, (tile, tile)))
            error = np.linalg.norm(final[task, :size] - results[task].ravel()) / np.linalg.norm(results[task])
            worst = max(worst, float(error))
        return worst


def program_of(dag: Dag, tile: int) -> Program:
    """What the tasks of a graph compute. Raises InputError for a graph without a meaning here."""
    if found := re.fullmatch(r"(cholesky|lu|qr)-(\d+)", dag.name):
        return _factor_program(dag, found[1], int(found[2]))
    kernels = [name.split()[0] if name.split() else "" for name in dag.task_names]
    for name, kernel in zip(dag.task_names, kernels, strict=True):
        if kernel not in FLOW_KERNELS:
            raise InputError(
                f"task {name!r} of graph {dag.name!r} names no kernel that the threads backend could run",
                remedy=f"Begin its name with one of {', '.join(FLOW_KERNELS)}, or take one of these graphs: {NAMES}",
            )
    if "FFT" in kernels and (tile & (tile - 1) or tile < 2):
        raise InputError(f"tiles of {tile} for an FFT", remedy="Give a power of two")
    before: list[list[int]] = [[] for _ in kernels]
    for source, target in dag.edges.tolist():
        before[target].append(source)
    operands = [[*sources, task] for task, sources in enumerate(before)]
    return _packed("flow", kernels, operands, [1] * len(kernels), dag.num_tasks)


def _factor_program(dag: Dag, name: str, tiles: int) -> Program:
    """The program of a tiled factorisation, if that is what the graph is."""
    steps = tile_program(name, tiles)
    wanted = [f"{kernel} {','.join(map(str, writes[0]))}" for kernel, _, writes in steps]
    needed = {tuple(edge) for edge in tiled(name, tiles).edges.tolist()}
    if list(dag.task_names) != wanted or needed - {tuple(edge) for edge in dag.edges.tolist()}:
        raise InputError(
            f"graph {dag.name!r} has not the tasks and precedences of a tiled {name} of {tiles} x {tiles} tiles",
            remedy="Make it with threads_programs.factorisation, or give it another name",
        )
    places: dict[tuple, int] = {(i, j): i * tiles + j for i in range(tiles) for j in range(tiles)}
    places |= {("V", k, k): tiles * tiles + k for k in range(tiles if name == "qr" else 0)}
    operands = [[places[where] for where in (*reads, *writes)] for _, reads, writes in steps]
    return _packed(name, [step[0] for step in steps], operands, [len(step[2]) for step in steps], len(places))


def _packed(kind: str, kernels: list[str], operands: list[list[int]], num_written: list[int], tiles: int) -> Program:
    sizes = np.array([len(some) for some in operands])
    written = [[False] * (len(some) - n) + [True] * n for some, n in zip(operands, num_written, strict=True)]
    return Program(
        kind,
        np.array([KERNELS.index(kernel) for kernel in kernels]),
        np.concatenate([[0], np.cumsum(sizes)]),
        np.concatenate([np.array(some, np.int64) for some in operands]),
        np.concatenate([np.array(some, bool) for some in written]),
        tiles,
    )


def is_qr_kernel(kernel: np.ndarray) -> np.ndarray:
    """True for kernels whose tiles carry reflectors' factors."""
    return (kernel >= GEQRT) & (kernel <= TSMQR)
