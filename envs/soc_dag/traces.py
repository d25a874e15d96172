"""Loaders: DS3 and gym_ds3 systems and jobs, the Standard Task Graph Set, WfCommons workflows.

Every loader raises InputError naming file, value and remedy for what it cannot use: precedences in a circle, tasks that
no PE can run, PEs that nobody described, negative times, graphs that fall apart.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError
from .spec import PeKind, Soc
from .workload import Dag, Stream

DS3_MIX = {
    "DS3/job_WIFI_5TXM.txt": 0.2,
    "DS3/job_WIFI_5RXM.txt": 0.2,
    "DS3/job_LAG.txt": 0.2,
    "DS3/job_SCT.txt": 0.1,
    "DS3/job_SCR.txt": 0.1,
    "DS3/job_TEMP_MIT.txt": 0.2,
}
"""DS3's default mix of jobs, by name in jobs.json, with their shares."""


@dataclass(frozen=True)
class Platform:
    """A system and how long it takes to run which task: what a DS3 `SoC` file holds."""

    soc: Soc
    exec_us: dict[str, dict[str, float]]
    """Kind of PE -> task -> us at the highest frequency."""

    def dag(self, name: str, tasks: Sequence[str], edges: Any, volumes: Any, **about: Any) -> Dag:
        """The graph of named tasks on this system. Raises InputError for tasks that no PE can run."""
        columns = [self.exec_us[kind] for kind in self.soc.kind_names]
        times = [[column.get(task, math.inf) for column in columns] for task in tasks]
        return Dag.from_arrays(name, times, edges, volumes, task_names=tasks, **about)


def data_file(name: str, data_dir: str | PathLike[str] | None = None) -> Path:
    """A file of the folder task_dags/ in `data_dir` or $SCHEDLAB_DATA (or of either itself). Raises InputError."""
    folders = [Path(folder) for folder in (data_dir, os.environ.get("SCHEDLAB_DATA")) if folder]
    for folder in folders:
        for path in (folder / "task_dags" / name, folder / name):
            if path.is_file():
                return path
    looked = ", ".join(map(str, folders)) or "no folder: SCHEDLAB_DATA is not set"
    raise InputError(
        f"no file {name!r} (looked in {looked})",
        remedy="Name the folder that holds task_dags/ in SCHEDLAB_DATA or --data-dir",
    )


def read_json(path: str | PathLike[str]) -> Any:
    """The content of a JSON file. Raises InputError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"not JSON ({error.msg})", file=path, line=error.lineno, remedy="Repair or re-download the file"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", file=path, remedy="Check the path and the file") from error


def pick(data: Any, name: str, file: str | PathLike[str]) -> Any:
    """data[name], or what the InputError says is there."""
    if not isinstance(data, dict) or name not in data:
        there = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise InputError(f"has no entry {name!r}", file=file, remedy=f"Choose one of: {there}")
    return data[name]


# ---------------------------------------------------------------------------------------------------------- DS3


def load_platform(path: str | PathLike[str], name: str) -> Platform:
    """One system of a socs.json: entry -> `pes` (name, capacity, opp, power_profile, exec_us), `comm_band`.

    PEs without any task (memories, caches) are left out. As in DS3, pairs of PEs that comm_band leaves out have
    bandwidth 1 and transfers take whole microseconds. gym_ds3 gives no bandwidth on one PE: nothing is paid there.
    Power between the profiled frequencies is interpolated in V^2 f.
    """
    entry = pick(read_json(path), name, path)
    try:
        rows = [pe for pe in entry["pes"] if pe["exec_us"]]
        band = {(int(a), int(b)): float(value) for a, b, value in entry["comm_band"]}
        self_band = math.inf if entry.get("comm_band_self") is None else float(entry["comm_band_self"])
        kinds = tuple(pe_kind(pe) for pe in rows)
        exec_us = {pe["name"]: {task: float(us) for task, us in pe["exec_us"].items()} for pe in rows}
        ids = [int(pe["id"]) for pe in rows]
        described = {int(pe["id"]) for pe in entry["pes"]}
    except InputError as error:
        raise InputError(f"entry {name!r}: {error.problem}", file=path, remedy=error.remedy) from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"entry {name!r} is no system ({error!r})", file=path, remedy="Give pes and comm_band as in DS3"
        ) from error
    unknown = [pair for pair in band if not set(pair) <= described]
    if unknown:
        raise InputError(
            f"entry {name!r}: comm_band names the unknown PE {max(unknown[0])}",
            file=path,
            remedy=f"Name PEs of {sorted(described)}",
        )
    for kind, tasks in exec_us.items():
        for task, us in tasks.items():
            if not 0 <= us < math.inf:
                raise InputError(
                    f"entry {name!r}: task {task!r} takes {us} us on {kind}", file=path, remedy="Give non-negative us"
                )
    matrix = [[band.get((a, b), band.get((b, a), 1.0)) for b in ids] for a in ids]
    # a link of bandwidth 0 is one that is not there; nothing in these files runs over one
    bandwidth = tuple(tuple(value if value > 0 else math.inf for value in row) for row in matrix)
    soc = Soc(name, kinds, bandwidth, (), self_band, whole_us=True, source=f"{Path(path).name}: {name}")
    return Platform(soc, exec_us)


def pe_kind(pe: dict) -> PeKind:
    """The PeKind of one entry of `pes`."""
    count, points = int(pe["capacity"]), [(float(mhz), float(mv)) for mhz, mv in pe["opp"]] or [(1000.0, 1000.0)]
    if count < 1 or any(mhz <= 0 or mv <= 0 for mhz, mv in points):
        raise InputError(
            f"PE {pe['name']!r}: capacity {count}, operating points {points}", remedy="Give positive numbers"
        )
    points.sort()
    profile = {float(mhz): [float(w) for w in watts] for mhz, watts in pe.get("power_profile", {}).items()}
    power: tuple[tuple[float, ...], ...] = ()
    if profile:
        volts = dict(points)
        known = sorted(mhz for mhz in profile if mhz in volts)
        drive = [0.0, *(volts[mhz] ** 2 * mhz for mhz in known)]
        watts = np.array([[0.0] * count, *(profile[mhz][:count] for mhz in known)])
        power = tuple(
            tuple(float(np.interp(volts[mhz] ** 2 * mhz, drive, watts[:, n])) for n in range(count))
            for mhz, _ in points
        )
    default = {"powersave": 0}.get(pe.get("dvfs_mode", "performance"), -1)
    return PeKind(pe["name"], count, tuple(mhz for mhz, _ in points), power, default_level=default)


def load_jobs(path: str | PathLike[str], name: str, platform: Platform) -> tuple[Dag, ...]:
    """The graphs of one entry of a jobs.json: a list of `name`, `tasks` (id, name), `edges` (from, to, volume)."""
    dags = []
    for job in pick(read_json(path), name, path):
        try:
            tasks = sorted(job["tasks"], key=lambda task: task["id"])
            places = {int(task["id"]): place for place, task in enumerate(tasks)}
            names = [str(task["name"]) for task in tasks]
            edges = [(int(a), int(b)) for a, b, _ in job["edges"]]
            volumes = [float(volume) for _, _, volume in job["edges"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"entry {name!r} is no list of jobs ({error!r})",
                file=path,
                remedy="Give name, tasks and edges as in DS3",
            ) from error
        for task in {task for edge in edges for task in edge} - set(places):
            raise InputError(
                f"job {job['name']!r}: edge to the unknown task {task}", file=path, remedy="Name its tasks"
            )
        pairs = [(places[a], places[b]) for a, b in edges]
        about = {"connected": True, "source": f"{Path(path).name}: {name}", "file": path}
        dags.append(platform.dag(job["name"], names, pairs, volumes, **about))
    return tuple(dags)


def ds3_platform(name: str = "DS3/SoC.MULTIPLE_BAL.txt", data_dir: str | PathLike[str] | None = None) -> Platform:
    """A system of DS3 or gym_ds3 from the data folder's socs.json."""
    return load_platform(data_file("socs.json", data_dir), name)


def ds3_stream(
    gap_us: float,
    num_jobs: int,
    *,
    soc: str = "DS3/SoC.MULTIPLE_BAL.txt",
    mix: dict[str, float] | None = None,
    slack: float = math.inf,
    data_dir: str | PathLike[str] | None = None,
) -> tuple[Soc, Stream]:
    """DS3's mix of wireless and radar jobs (or another) arriving every `gap_us` on average (its `scale`)."""
    platform, jobs = ds3_platform(soc, data_dir), data_file("jobs.json", data_dir)
    shares = DS3_MIX if mix is None else mix
    dags, weights = [], []
    for name, share in shares.items():
        for dag in (found := load_jobs(jobs, name, platform)):
            dags.append(dag)
            weights.append(share / len(found))
    source = f"{platform.soc.source}, {len(dags)} jobs of jobs.json"
    stream = Stream(
        f"ds3-{gap_us:g}", platform.soc.kind_names, tuple(dags), gap_us, num_jobs, tuple(weights), slack, source
    )
    return platform.soc, stream


# ------------------------------------------------------------------------------------- task graphs with one time


def load_stg(path: str | PathLike[str]) -> Dag:
    """A graph of the Standard Task Graph Set (Tobita and Kasahara 2002), for one kind of PE, without transfers.

    Lines `task time num_predecessors predecessor...`, after the number of tasks (without the two dummy ones). The time
    unit is taken for a microsecond. `generate.on_unlike_pes` gives it times on several kinds.
    """

    def error(problem: str, line: int) -> InputError:
        return InputError(problem, file=path, line=line, remedy="Lines are: task time num_predecessors predecessor...")

    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as failed:
        raise InputError(f"cannot be read ({failed})", file=path, remedy="Check the path and the file") from failed
    times: list[list[float]] = []
    edges: list[tuple[int, int]] = []
    total = None
    for number, line in enumerate(lines, start=1):
        if line.startswith("#") or not line.strip():
            continue
        try:
            values = [int(value) for value in line.split()]
        except ValueError:
            raise error(f"not integers: {line.strip()[:60]!r}", number) from None
        if total is None:
            total = values[0] + 2
            continue
        if len(values) < 3 or len(values) != 3 + values[2] or values[0] != len(times):
            raise error(f"task {len(times)} expected, with its predecessors, not {line.strip()[:60]!r}", number)
        if values[1] < 0:
            raise error(f"task {values[0]} takes {values[1]}", number)
        times.append([float(values[1])])
        edges += [(before, values[0]) for before in values[3:]]
    if total is None or len(times) != total:
        raise error(f"{len(times)} tasks, not the {total} that the first line announces", len(lines))
    name = Path(path).stem
    return Dag.from_arrays(name, times, edges, connected=True, source=f"Standard Task Graph Set {name}", file=path)


def load_wfformat(path: str | PathLike[str]) -> Dag:
    """A workflow in WfFormat 1.4 or 1.5 (wfcommons.org), for one kind of PE: measured run times, volumes in bytes.

    An edge carries the files that its source writes and its target reads.
    """
    data = read_json(path)
    try:
        workflow = data["workflow"]
        tasks = workflow["specification"]["tasks"]
        seconds = {task["id"]: float(task["runtimeInSeconds"]) for task in workflow["execution"]["tasks"]}
        sizes = {file["id"]: float(file["sizeInBytes"]) for file in workflow["specification"].get("files", [])}
        places = {task["id"]: place for place, task in enumerate(tasks)}
        times = [[seconds[task["id"]] * 1e6] for task in tasks]
        carried: dict[tuple[int, int], float] = defaultdict(float)
        for task in tasks:
            for parent in task["parents"]:
                read = set(task.get("inputFiles", ())) & set(tasks[places[parent]].get("outputFiles", ()))
                carried[places[parent], places[task["id"]]] += sum(sizes.get(file, 0.0) for file in sorted(read))
            for child in task.get("children", ()):
                if task["id"] not in tasks[places[child]]["parents"]:
                    raise InputError(
                        f"{child!r} is a child of {task['id']!r}, which is not its parent",
                        file=path,
                        remedy="Name both",
                    )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"not a workflow in WfFormat 1.4 or later ({error!r})",
            file=path,
            remedy="Give workflow.specification.tasks and workflow.execution.tasks with runtimeInSeconds",
        ) from error
    return Dag.from_arrays(
        Path(path).stem,
        times,
        list(carried),
        list(carried.values()),
        task_names=[task["name"] for task in tasks],
        source=f"WfCommons {Path(path).name}",
        file=path,
    )


# ------------------------------------------------------------------------------------------- measured kernels


def load_kernel_times(path: str | PathLike[str], tile: int) -> dict[str, tuple[float, float]]:
    """Mean us of the kernels of a tiled Cholesky on a (CPU, GPU), for `generate.tiled`.

    A CSV with the columns device, kernel, tile, column, mean_us: rows of a CPU, and of a GPU those whose `column` is
    its own time ("GPU time(us)").
    """
    kernels = {"dpotrf": "POTRF", "dsyrk": "SYRK", "dtrsm": "TRSM", "dgemm": "GEMM"}
    times: dict[str, dict[str, float]] = {name: {} for name in kernels.values()}
    sizes = set()
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for line, row in enumerate(csv.DictReader(file), start=2):
                try:
                    us, size = float(row["mean_us"]), int(row["tile"])
                    kernel, on_gpu = kernels.get(row["kernel"]), row["column"] == "GPU time(us)"
                    is_time = on_gpu or not row["column"].startswith("CPU time")
                except (KeyError, TypeError, ValueError) as error:
                    raise InputError(
                        f"not a kernel's time ({error!r})",
                        file=path,
                        line=line,
                        remedy="Give the columns device, kernel, tile, column, mean_us",
                    ) from error
                if not 0 <= us < math.inf:
                    raise InputError(f"mean_us is {us}", file=path, line=line, remedy="Give non-negative us")
                sizes.add(size)
                if kernel and size == tile and is_time:
                    times[kernel]["gpu" if on_gpu else "cpu"] = us
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", file=path, remedy="Check the path and the file") from error
    if not all(len(both) == 2 for both in times.values()):
        raise InputError(
            f"no times of all kernels on CPU and GPU for tiles of {tile}",
            file=path,
            remedy=f"Choose of {sorted(sizes)}",
        )
    return {name: (both["cpu"], both["gpu"]) for name, both in times.items()}
