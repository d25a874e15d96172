"""Jobs by name: a system and the source of its jobs, as commands and benchmarks ask for them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from os import PathLike

from ..core.errors import InputError
from .generate import cpu_gpu_soc, on_unlike_pes, random_stream, spark_stream, tiled, tool_calls, topcuoglu
from .spec import Soc, uniform_soc
from .traces import data_file, ds3_stream, load_stg, load_wfformat
from .training import Group, MoeCosts, Pipeline, holmes, moe_layer, pipeline, sequence_batch
from .workload import Dag, Stream

HOLMES_GROUPS = (Group("infiniband", 4), Group("roce", 4), Group("ethernet", 4))
"""A cluster with one kind of network a stage, four nodes each."""
MOE_COSTS = MoeCosts(
    all_to_all=(30.0, 400.0),
    all_gather=(20.0, 150.0),
    reduce_scatter=(20.0, 150.0),
    experts=(25.0, 600.0),
    all_reduce=(30.0, 300.0),
)
"""A layer in which communication and experts take about as long; the numbers are assumptions."""


def pipeline_graph(step: Pipeline) -> tuple[Soc, Dag]:
    """A pipeline's SoC and graph."""
    return step.soc, step.dag


GYM_DS3_MIX = {f"gym_ds3/job_Top{i if i > 1 else ''}.txt": 0.1 for i in range(1, 11)}
"""The ten graphs of gym_ds3, by name in jobs.json, in equal shares."""

GRAPHS: dict[str, Callable[..., tuple[Soc, Dag]]] = {
    r"topcuoglu": topcuoglu,
    r"(cholesky|lu|qr)_(\d+)": lambda name, tiles: (cpu_gpu_soc(), tiled(name, int(tiles))),
    r"pipeline_(\d+)x(\d+)": lambda p, m: pipeline_graph(pipeline(int(p), int(m))),
    r"holmes_(\d+)": lambda m: pipeline_graph(holmes(HOLMES_GROUPS, int(m))),
    r"moe_(\d+)": lambda chunks: moe_layer(MOE_COSTS, int(chunks), all_reduce_parts=2),
    r"sequences_(\d+)": lambda n: sequence_batch(int(n)),
    r"tools_(\d+)": lambda n: tool_calls(rounds=int(n)),
}
"""Pattern of a name -> the graph that all jobs run, from the pattern's groups."""

NAMES = (
    "random (layered graphs of 20-50 tasks on 4 PEs), random_LEAST-MOSTxPES, ds3, gym_ds3 (both from the data folder), "
    "spark_<executors> (stages of equal tasks), "
    "cholesky_<tiles>, lu_<tiles>, qr_<tiles> (2 CPUs and 2 GPUs), pipeline_<stages>x<microbatches>, "
    "holmes_<microbatches>, moe_<chunks>, sequences_<number>, tools_<rounds>, topcuoglu, "
    "or a .stg or WfCommons .json file (on 4 unlike PEs)"
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


WORKFLOWS = (
    "1000genome-chameleon-2ch-100k-001",
    "helloworld-forkjoin-10-chameleon",
    "srasearch-chameleon-10a-001",
)
"""Workflows of WfCommons in the data folder."""


def workflow_graphs(
    num_draws: int = 1, *, num_pes: int = 4, bandwidth: float = 1e3, data_dir: str | PathLike[str] | None = None
) -> list[tuple[Soc, Dag]]:
    """The workflows of the data folder on unlike PEs, as single graphs. Raises InputError.

    Run times and files are as measured; how unlike the PEs are is drawn, `num_draws` times for each workflow.

    Args:
        num_draws: graphs of each workflow.
        num_pes: of the machine.
        bandwidth: between any two PEs, bytes a us (1e3: 1 GB/s).
        data_dir: the folder that holds task_dags/; default $SCHEDLAB_DATA.
    """
    soc, found = uniform_soc(num_pes, bandwidth=bandwidth), []
    for name in WORKFLOWS:
        dag = load_wfformat(data_file(f"wfinstances/{name}.json", data_dir))
        found += [(soc, on_unlike_pes(dag, num_pes, seed=draw)) for draw in range(num_draws)]
    return found


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
