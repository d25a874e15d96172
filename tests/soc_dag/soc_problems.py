"""Small problems that tests share."""

from __future__ import annotations

import numpy as np

from schedlab.envs.soc_dag.spec import PeKind, Soc, SocDagSpec
from schedlab.envs.soc_dag.workload import Dag, Workload

SMALL_SOC = Soc(
    "small",
    (
        PeKind("cpu", 2, (500.0, 1000.0), ((0.2, 0.3), (0.6, 1.0)), idle_w=0.05),
        PeKind("gpu", 1, (800.0,), ((2.0,),)),
        PeKind("dsp", 2, (250.0, 500.0, 750.0), ((0.1, 0.2), (0.2, 0.4), (0.5, 0.9)), default_level=1),
    ),
    bandwidth=((4.0, 2.0, 1.0), (2.0, 8.0, 2.0), (1.0, 2.0, 3.0)),
    latency_us=((0.0, 1.0, 0.5), (1.0, 0.0, 1.0), (0.5, 1.0, 0.0)),
    self_bandwidth=50.0,
)


def random_dag(
    rng: np.random.Generator, num_tasks: int, kinds: int = 3, density: float = 0.3, whole: bool = True
) -> Dag:
    """A graph with random precedences; some tasks cannot run on some kinds."""
    times = rng.integers(0 if whole else 1, 20, (num_tasks, kinds)).astype(float)
    times += 0.0 if whole else rng.random((num_tasks, kinds))
    times[rng.random((num_tasks, kinds)) < 0.25] = np.inf
    times[:, 0] = np.where(np.isinf(times).all(1), 5.0, times[:, 0])
    pairs = [(a, b) for b in range(num_tasks) for a in range(b) if rng.random() < density]
    volumes = rng.integers(0, 30, len(pairs))
    return Dag.from_arrays(f"random-{num_tasks}", times, pairs, volumes)


def random_workload(seed: int, num_jobs: int = 6, kinds: tuple[str, ...] = SMALL_SOC.kind_names) -> Workload:
    rng = np.random.default_rng(seed)
    dags = [random_dag(rng, int(rng.integers(1, 9)), len(kinds), whole=bool(seed % 2)) for _ in range(3)]
    arrivals = np.sort(rng.integers(0, 60, num_jobs))
    return Workload.from_arrays(
        f"random-{seed}", kinds, dags, rng.integers(0, 3, num_jobs), arrivals, rng.integers(5, 90, num_jobs)
    )


def small_spec(**changes) -> SocDagSpec:
    return SocDagSpec(SMALL_SOC).replace(**changes)
