"""Task graphs by the rules of the literature: examples, random graphs, tiled factorisations, agents' tool calls."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..core.errors import InputError
from .spec import PeKind, Soc, uniform_soc
from .workload import Dag, Stream

TOPCUOGLU_US = (
    (14, 16, 9),
    (13, 19, 18),
    (11, 13, 19),
    (13, 8, 17),
    (12, 13, 10),
    (13, 16, 9),
    (7, 15, 11),
    (5, 11, 14),
    (18, 12, 20),
    (21, 7, 16),
)
TOPCUOGLU_EDGES = {
    (0, 1): 18,
    (0, 2): 12,
    (0, 3): 9,
    (0, 4): 11,
    (0, 5): 14,
    (1, 7): 19,
    (1, 8): 16,
    (2, 6): 23,
    (3, 7): 27,
    (3, 8): 23,
    (4, 8): 13,
    (5, 7): 15,
    (6, 9): 17,
    (7, 9): 11,
    (8, 9): 13,
}


def topcuoglu() -> tuple[Soc, Dag]:
    """The ten tasks on three PEs with which HEFT and CPOP were explained (TPDS 2002, figure 2): HEFT 80, CPOP 86."""
    dag = Dag.from_arrays(
        "topcuoglu",
        TOPCUOGLU_US,
        list(TOPCUOGLU_EDGES),
        list(TOPCUOGLU_EDGES.values()),
        source="Topcuoglu, Hariri, Wu, TPDS 2002, figure 2",
    )
    return uniform_soc(3, name="topcuoglu"), dag


# -------------------------------------------------------------------------------------------------- random graphs


def random_layered(
    num_tasks: int,
    num_kinds: int,
    *,
    ccr: float = 1.0,
    heterogeneity: float = 1.0,
    shape: float = 1.0,
    degree: float = 3.0,
    mean_us: float = 10.0,
    seed: int | np.random.Generator = 0,
) -> Dag:
    """A random graph in layers, as in the HEFT paper (TPDS 2002, section 5.1), for a SoC of links with bandwidth 1.

    Layers hold `shape` sqrt(n) tasks on average. Every task beyond the first layer has a predecessor in the layer
    before it, and `degree` of them on average in any layer before. A task's mean time is uniform in (0, 2 `mean_us`),
    its time on a kind of PE uniform within a factor 1 +- `heterogeneity` / 2 of that; an edge's transfer is uniform in
    (0, 2 `ccr` `mean_us`).
    """
    checks = (("num_tasks", num_tasks, 1), ("num_kinds", num_kinds, 1), ("ccr", ccr, 0), ("degree", degree, 1))
    for name, value, least in checks:
        if not least <= value < math.inf:
            raise InputError(f"{name} is {value}", remedy=f"Give at least {least}")
    if not 0 <= heterogeneity <= 2 or not shape > 0 or not mean_us > 0:
        raise InputError(
            f"heterogeneity {heterogeneity}, shape {shape}, mean_us {mean_us}",
            remedy="Give a heterogeneity in [0, 2], a positive shape and a positive mean_us",
        )
    rng = np.random.default_rng(seed)
    depth = max(round(math.sqrt(num_tasks) / shape), 1)
    layer = np.sort(
        np.concatenate([np.arange(min(depth, num_tasks)), rng.integers(0, depth, max(num_tasks - depth, 0))])
    )
    edges = []
    for task in range(num_tasks):
        earlier = np.flatnonzero(layer < layer[task])
        if len(earlier) == 0:
            continue
        parents = {int(rng.choice(np.flatnonzero(layer == layer[task] - 1)))}
        parents |= set(rng.choice(earlier, min(rng.poisson(degree - 1), len(earlier)), replace=False).tolist())
        edges += [(parent, task) for parent in sorted(parents)]
    means = rng.uniform(0, 2 * mean_us, num_tasks)
    times = means[:, None] * rng.uniform(1 - heterogeneity / 2, 1 + heterogeneity / 2, (num_tasks, num_kinds))
    return Dag.from_arrays(
        f"layered-{num_tasks}",
        times,
        edges,
        rng.uniform(0, 2 * ccr * mean_us, len(edges)),
        source=f"generated: {num_tasks} tasks, CCR {ccr:g}, heterogeneity {heterogeneity:g}",
    )


def random_stream(
    num_dags: int = 64,
    *,
    num_tasks: tuple[int, int] = (20, 50),
    num_pes: int = 4,
    ccr: float = 1.0,
    gap_us: float = 0.0,
    num_jobs: int = 1,
    slack: float = math.inf,
    seed: int = 0,
) -> tuple[Soc, Stream]:
    """Random layered graphs of `num_tasks` (least, most) tasks; a draw has `num_jobs` of them, 1 for single graphs."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(num_tasks[0], num_tasks[1] + 1, num_dags)
    dags = tuple(random_layered(int(size), num_pes, ccr=ccr, seed=rng) for size in sizes)
    soc = uniform_soc(num_pes)
    name = f"layered-{num_tasks[0]}-{num_tasks[1]}x{num_pes}"
    source = f"generated, seed {seed}: {num_dags} layered graphs, CCR {ccr:g}"
    return soc, Stream(name, soc.kind_names, dags, gap_us, num_jobs, slack=slack, source=source)


def on_unlike_pes(dag: Dag, num_kinds: int, *, heterogeneity: float = 1.0, seed: int = 0) -> Dag:
    """A graph for one kind of PE (STG, WfCommons) on several: times uniform within 1 +- `heterogeneity` / 2."""
    if dag.times.shape[1] != 1:
        raise InputError(f"graph {dag.name!r} has {dag.times.shape[1]} kinds of PEs already", remedy="Give it as it is")
    factors = np.random.default_rng(seed).uniform(
        1 - heterogeneity / 2, 1 + heterogeneity / 2, (dag.num_tasks, num_kinds)
    )
    source = f"{dag.source}; times on {num_kinds} kinds of PEs generated, heterogeneity {heterogeneity:g}"
    return Dag.from_arrays(
        dag.name, dag.times * factors, dag.edges, dag.volumes, task_names=dag.task_names, source=source
    )


# -------------------------------------------------------------------------------------------- tiled factorisations

READYS_CPU_GPU = {
    "cholesky": {"POTRF": (18, 11), "SYRK": (57, 2), "TRSM": (52, 8), "GEMM": (95, 3)},
    "lu": {"LU": (18, 11), "BMOD": (95, 3), "BDIV": (52, 8), "FW": (52, 8)},
    "qr": {"GEQRT": (4, 3), "TSQRT": (6, 3), "ORMQR": (6, 1), "TSMQR": (10, 1)},
}
"""Time of a tile's kernel on a (CPU, GPU), without a unit: Grinsztajn et al., READYS, Cluster 2021 (its code)."""


def cpu_gpu_soc(num_cpus: int = 2, num_gpus: int = 2) -> Soc:
    """READYS' machine: CPUs and GPUs, transfers free."""
    return Soc(f"{num_cpus}cpu+{num_gpus}gpu", (PeKind("cpu", num_cpus), PeKind("gpu", num_gpus)))


def tiled(
    factorisation: str, tiles: int, kernels: dict[str, tuple[float, ...]] | None = None, volume: float = 0.0
) -> Dag:
    """The graph of a tiled "cholesky", "lu" or "qr" of `tiles` x `tiles` tiles.

    Precedences follow from the tiles that the kernels read and write, in the order of the sequential algorithm (Buttari
    et al., Parallel Computing 2009); every edge carries `volume` a tile. `kernels`: times of each kernel on the kinds
    of PEs, default READYS' for CPU and GPU.
    """
    program = tile_program(factorisation, tiles)
    table = kernels or READYS_CPU_GPU[factorisation]
    last_writer: dict = {}
    readers: dict = {}
    edges: dict[tuple[int, int], float] = {}
    names, times = [], []
    for task, (kernel, reads, writes) in enumerate(program):
        if kernel not in table:
            raise InputError(f"no time for kernel {kernel}", remedy=f"Give times of {', '.join(READYS_CPU_GPU)}")
        names.append(f"{kernel} {','.join(map(str, writes[0]))}")
        times.append(table[kernel])
        for tile in {*reads, *writes}:
            if tile in last_writer:
                edges[last_writer[tile], task] = edges.get((last_writer[tile], task), 0.0) + volume
        for tile in writes:
            for reader in readers.pop(tile, []):
                if reader != task:
                    edges.setdefault((reader, task), 0.0)
            last_writer[tile] = task
        for tile in reads:
            readers.setdefault(tile, []).append(task)
    return Dag.from_arrays(
        f"{factorisation}-{tiles}",
        times,
        list(edges),
        list(edges.values()),
        task_names=names,
        source=f"tiled {factorisation}, {tiles} x {tiles} tiles" + ("" if kernels else ", READYS' times"),
    )


def tile_program(factorisation: str, tiles: int) -> list[tuple[str, list, list]]:
    """Kernels of a tiled "cholesky", "lu" or "qr" in the order of the sequential algorithm: name, tiles that are read
    only, tiles that are written. Raises InputError."""
    programs: dict[str, Callable[[int], list[tuple[str, list, list]]]] = {
        "cholesky": _cholesky,
        "lu": _lu,
        "qr": _qr,
    }
    if factorisation not in programs or tiles < 1:
        raise InputError(
            f"{factorisation!r} of {tiles} tiles", remedy=f"Choose one of {', '.join(programs)}, and at least one tile"
        )
    return programs[factorisation](tiles)


def _cholesky(tiles: int) -> list[tuple[str, list, list]]:
    """Kernels of a tiled Cholesky: name, tiles read, tiles written."""
    program: list[tuple[str, list, list]] = []
    for k in range(tiles):
        program.append(("POTRF", [], [(k, k)]))
        program += [("TRSM", [(k, k)], [(i, k)]) for i in range(k + 1, tiles)]
        for i in range(k + 1, tiles):
            program.append(("SYRK", [(i, k)], [(i, i)]))
            program += [("GEMM", [(i, k), (j, k)], [(i, j)]) for j in range(k + 1, i)]
    return program


def _lu(tiles: int) -> list[tuple[str, list, list]]:
    """Kernels of a tiled LU without pivoting."""
    program: list[tuple[str, list, list]] = []
    for k in range(tiles):
        program.append(("LU", [], [(k, k)]))
        program += [("FW", [(k, k)], [(k, j)]) for j in range(k + 1, tiles)]
        program += [("BDIV", [(k, k)], [(i, k)]) for i in range(k + 1, tiles)]
        for i in range(k + 1, tiles):
            program += [("BMOD", [(i, k), (k, j)], [(i, j)]) for j in range(k + 1, tiles)]
    return program


def _qr(tiles: int) -> list[tuple[str, list, list]]:
    """Kernels of a tiled QR with a flat tree; a reflector is kept beside the tile it is from (`V`)."""
    program: list[tuple[str, list, list]] = []
    for k in range(tiles):
        program.append(("GEQRT", [], [(k, k), ("V", k, k)]))
        program += [("ORMQR", [("V", k, k)], [(k, j)]) for j in range(k + 1, tiles)]
        for i in range(k + 1, tiles):
            program.append(("TSQRT", [], [(k, k), (i, k)]))
            program += [("TSMQR", [(i, k)], [(k, j), (i, j)]) for j in range(k + 1, tiles)]
    return program


# ------------------------------------------------------------------------------------------------ data-parallel jobs


def spark_job(
    *, stages: tuple[int, int] = (2, 10), mean_tasks: float = 8.0, mean_us: float = 2e6, seed: int | np.random.Generator
) -> Dag:
    """A query of a data-parallel engine: stages of equal tasks, each of which needs all of the stages before it.

    In the shape of Decima's TPC-H jobs (Mao et al., SIGCOMM 2019, section 7): `stages` (least, most) stages in a random
    tree towards the last one, exponentially many tasks in a stage (at most 40), and lognormal stage times (sigma 1).
    The sizes are assumptions: Decima's traces are not in the data at hand. Tasks run on one kind of PE, an executor;
    moving one between jobs costs nothing here.
    """
    rng = np.random.default_rng(seed)
    count = int(rng.integers(stages[0], stages[1] + 1))
    widths = np.minimum(rng.geometric(1.0 / mean_tasks, count), 40)
    first = np.concatenate([[0], np.cumsum(widths)])
    stage_us = mean_us * rng.lognormal(-0.5, 1.0, count)
    edges = []
    for stage in range(count - 1):
        after = int(rng.integers(stage + 1, min(stage + 4, count)))
        edges += [(a, b) for a in range(*first[stage : stage + 2]) for b in range(*first[after : after + 2])]
    names = [f"stage {stage}.{task}" for stage in range(count) for task in range(widths[stage])]
    return Dag.from_arrays(
        f"spark-{count}",
        np.repeat(stage_us, widths)[:, None],
        edges,
        task_names=names,
        source=f"generated: {count} stages of equal tasks",
    )


def spark_stream(
    num_dags: int = 22,
    *,
    num_executors: int = 10,
    gap_us: float = 25e6,
    num_jobs: int = 50,
    slack: float = math.inf,
    seed: int = 0,
) -> tuple[Soc, Stream]:
    """Data-parallel jobs on equal executors, as many queries as TPC-H has by default. See `spark_job`."""
    rng = np.random.default_rng(seed)
    dags = tuple(spark_job(seed=rng) for _ in range(num_dags))
    soc = Soc(f"{num_executors} executors", (PeKind("executor", num_executors),))
    source = f"generated, seed {seed}: {num_dags} jobs of stages of equal tasks"
    return soc, Stream("spark", soc.kind_names, dags, gap_us, num_jobs, slack=slack, source=source)


# ----------------------------------------------------------------------------------------------------- tool calls


def tool_calls(
    *, rounds: int = 2, calls: int = 6, call_us: float = 4e5, think_us: float = 2e6, seed: int | np.random.Generator = 0
) -> tuple[Soc, Dag]:
    """An agent that divides, calls tools in parallel, and aggregates: on two model replicas and four tool workers.

    In each round the model thinks, 1 to 2 `calls` - 1 calls run (lognormal, sigma 1), and the model aggregates. No
    trace of such calls is public in the data at hand: the sizes are assumptions, the shape is divide-then-aggregate's.
    """
    rng = np.random.default_rng(seed)
    soc = Soc("agents", (PeKind("model", 2), PeKind("tool", 4)))
    names: list[str] = []
    before: list[int] = []
    times, edges = [], []
    for turn in range(rounds):
        think = len(names)
        names.append(f"think {turn}")
        times.append((think_us * rng.lognormal(-0.125, 0.5), math.inf))
        edges += [(task, think) for task in before]
        before = []
        for call in range(int(rng.integers(1, 2 * calls))):
            edges.append((think, len(names)))
            before.append(len(names))
            names.append(f"call {turn}.{call}")
            times.append((math.inf, call_us * rng.lognormal(-0.5, 1.0)))
    edges += [(task, len(names)) for task in before]
    names.append("answer")
    times.append((think_us * rng.lognormal(-0.125, 0.5), math.inf))
    return soc, Dag.from_arrays(
        f"tool-calls-{rounds}x{calls}",
        times,
        edges,
        task_names=names,
        source="generated: divide, call tools, aggregate",
    )
