"""Jobs by name: a system and the source of its jobs, as commands and benchmarks ask for them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from os import PathLike

from ..core.errors import InputError
from .generate import cpu_gpu_soc, on_unlike_pes, random_stream, spark_stream, tiled, tool_calls, topcuoglu
from .spec import Soc, uniform_soc
from .traces import ds3_stream, load_stg, load_wfformat
from .training import pipeline, sequence_batch
from .workload import Dag, Stream


def pipeline_graph(num_stages: int, num_microbatches: int) -> tuple[Soc, Dag]:
    """A pipeline's SoC and graph."""
    step = pipeline(num_stages, num_microbatches)
    return step.soc, step.dag


GYM_DS3_MIX = {f"gym_ds3/job_Top{i if i > 1 else ''}.txt": 0.1 for i in range(1, 11)}
"""The ten graphs of gym_ds3, by name in jobs.json, in equal shares."""

GRAPHS: dict[str, Callable[..., tuple[Soc, Dag]]] = {
    r"topcuoglu": topcuoglu,
    r"(cholesky|lu|qr)_(\d+)": lambda name, tiles: (cpu_gpu_soc(), tiled(name, int(tiles))),
    r"pipeline_(\d+)x(\d+)": lambda p, m: pipeline_graph(int(p), int(m)),
    r"sequences_(\d+)": lambda n: sequence_batch(int(n)),
    r"tools_(\d+)": lambda n: tool_calls(rounds=int(n)),
}
"""Pattern of a name -> the graph that all jobs run, from the pattern's groups."""

NAMES = (
    "random (layered graphs of 20-50 tasks on 4 PEs), random_LEAST-MOSTxPES, ds3, gym_ds3 (both from the data folder), "
    "spark_<executors> (stages of equal tasks), "
    "cholesky_<tiles>, lu_<tiles>, qr_<tiles> (2 CPUs and 2 GPUs), pipeline_<stages>x<microbatches>, "
    "sequences_<number>, tools_<rounds>, topcuoglu, or a .stg or WfCommons .json file (on 4 unlike PEs)"
)
"""The names of `find_stream`."""


def find_stream(
    name: str | PathLike[str],
    gap_us: float = 0.0,
    num_jobs: int = 1,
    *,
    slack: float = math.inf,
    data_dir: str | PathLike[str] | None = None,
) -> tuple[Soc, Stream]:
    """The SoC and the jobs of a name (see `NAMES`) or file. Raises InputError.

    Args:
        name: what the jobs run.
        gap_us: mean time between arrivals; 0: all jobs are there at the start.
        num_jobs: jobs of a workload.
        slack: deadlines, as multiples of a graph's shortest possible latency.
        data_dir: the folder that holds task_dags/; default $SCHEDLAB_DATA.
    """
    text = str(name)
    if text == "ds3":
        return ds3_stream(gap_us, num_jobs, slack=slack, data_dir=data_dir)
    if text == "gym_ds3":
        soc_name = "gym_ds3/DASH.SoC.Top.txt"
        return ds3_stream(gap_us, num_jobs, soc=soc_name, mix=GYM_DS3_MIX, slack=slack, data_dir=data_dir)
    if found := re.fullmatch(r"random(?:_(\d+)-(\d+)x(\d+))?", text):
        least, most, pes = (int(number) for number in (found[1] or 20, found[2] or 50, found[3] or 4))
        return random_stream(num_tasks=(least, most), num_pes=pes, gap_us=gap_us, num_jobs=num_jobs, slack=slack)
    if found := re.fullmatch(r"spark_(\d+)", text):
        return spark_stream(num_executors=int(found[1]), gap_us=gap_us, num_jobs=num_jobs, slack=slack)
    soc, dag = find_graph(text)
    return soc, Stream(dag.name, soc.kind_names, (dag,), gap_us, num_jobs, slack=slack, source=dag.source)


def find_graph(name: str) -> tuple[Soc, Dag]:
    """The one graph of a name or file, and the SoC it runs on. Raises InputError."""
    if name.endswith(".stg"):
        return uniform_soc(4), on_unlike_pes(load_stg(name), 4)
    if name.endswith(".json"):
        return uniform_soc(4, bandwidth=1e3), on_unlike_pes(load_wfformat(name), 4)  # 1 GB/s
    for pattern, make in GRAPHS.items():
        if found := re.fullmatch(pattern, name):
            return make(*found.groups())
    raise InputError(f"no jobs are called {name!r}", remedy=f"Give one of: {NAMES}")
