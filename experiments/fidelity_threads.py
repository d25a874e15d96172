"""Is the simulator right about task graphs on real cores? The same jobs under the same policies, in both.

Tiled factorisations and flows of FFT, FIR and MATMUL run on pinned threads, single graphs and mixes of jobs that are
all there at the start, under each policy, in repeated passes. Compared is the mean latency of the jobs: of a single
graph its makespan. The costs of kernels come from other graphs of the same kernels, under another rule
(`calibrate_threads`).

The speed of a shared machine changes by tens of percent within a second, and differently on each core. So a run of the
calibration stands before every run, and what the calibration's runs around it took, over what they take on average, is
how much slower each PE was: by so much each run is corrected, to the machine's average speed. Plans are made once, with
the costs of the first passes, and followed on both sides.

The simulator draws what executions take from the costs and their spread; its latency is the mean of several draws.
Shown are its error beside the spread of the real runs, and, over the policies of a workload, whether both rank them
alike. Every real run is checked: its schedule task by task, its numbers against what was to be computed, and whether
the simulator, given its decisions and what its executions took, ends at the very same moment.

Examples:

  schedlab fidelity threads --json threads.json
  schedlab fidelity threads --graphs cholesky_8@256 flow_40@64 --policies eft late_rank heft met etf --repeats 5
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..envs.core.errors import InputError
from . import command
from .fidelity import ranks

if TYPE_CHECKING:
    from ..envs.soc_dag.rule import Rule
    from ..envs.soc_dag.timeline import Timeline
    from ..envs.soc_dag.workload import Workload
    from ..real_backend.calibrate_threads import Samples, ThreadsCalibration
    from ..real_backend.threads import Executor
    from ..real_backend.threads_programs import KernelCosts

POLICIES = ("met", "olb", "eft", "etf", "heft_rt", "late_fifo", "late_rank", "late_srpt", "heft", "peft")
GRAPHS = (
    "cholesky_8@192",
    "lu_6@192",
    "qr_6@128",
    "mix_3x12@128",
    "cholesky_12@96",
    "lu_8@96",
    "flow_60@64",
    "mix_4x12@64",
)
"""Jobs, their number, and a size of tile: the first four have tasks of 0.25 ms and more, the others of 40 to 200 us."""
LONG_US = 250.0
"""Mean execution from which tasks of a graph are called long."""
FIRST_PASSES = 6
"""Passes of the calibration before anything is planned."""
DRAWS = 16
"""Simulated runs of each cell."""


@dataclass
class Args:
    """Arguments of `schedlab fidelity threads`."""

    graphs: tuple[str, ...] = GRAPHS
    """cholesky_<n>, lu_<n>, qr_<n> (tiles in a row), flow_<tasks> or mix_<n> (jobs of all these), x<jobs> if there is
    more than one, then @<rows of a tile>."""
    policies: tuple[str, ...] = POLICIES
    """Names of rules, or of static schedulers, whose plans are followed."""
    repeats: int = 12
    """Real runs of each policy on each graph."""
    big: int = 1
    """PEs that are a core."""
    little: int = 1
    """PEs that are a core which works on narrow strips."""
    copies: bool = False
    """PEs have memories of their own, and data are copied between them."""
    json: Path | None = None
    """File for all figures."""
    seed: int = 0
    """Of data, lots and draws."""


@dataclass
class Run:
    """One real run of a cell."""

    latency_us: float
    task_us: float
    """Mean execution."""
    before: int
    """Number of the calibration's run directly before it; the next one is directly behind it."""
    samples: Samples


@dataclass
class Cell:
    """One policy on one graph."""

    graph: str
    workload: Workload
    rule: Rule
    executor: Executor
    calibration: ThreadsCalibration
    runs: list[Run] = field(default_factory=list)
    residual: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def family(self) -> str:
        """What the graph computes, of `calibrate_threads.FAMILIES`."""
        return find_graph(self.graph)[0].partition("_")[0]


def find_graph(name: str) -> tuple[str, int, int]:
    """(name of the graphs, number of jobs, rows of a tile) of a workload. Raises InputError."""
    found = re.fullmatch(r"((?:cholesky|lu|qr|flow|mix)_\d+)(?:x(\d+))?@(\d+)", name)
    if not found:
        raise InputError(
            f"no workload is called {name!r}",
            remedy="Give a name, jobs if more than one, and rows of a tile, as in cholesky_8@256 or mix_4x12@64",
        )
    return found[1], int(found[2] or 1), int(found[3])


def workload_of(graph: str, costs: KernelCosts, *, copies: bool, seed: int) -> Workload:
    """The jobs, all there at the start."""
    from ..real_backend.threads_programs import find_stream

    name, num_jobs, _ = find_graph(graph)
    return find_stream(name, costs, num_jobs=num_jobs, copies=copies).draw(np.random.default_rng(seed))


def latency_us(timeline: Timeline) -> float:
    """Mean latency of the jobs."""
    return float((timeline.job_finish - timeline.arrival).mean())


def open_cells(args: Args, calibrations: Mapping[int, ThreadsCalibration], counts: Mapping[str, int]) -> list[Cell]:
    """Every policy on every graph, planned with the calibrations' present costs. Raises InputError."""
    from ..envs.soc_dag.rule import Rule
    from ..envs.soc_dag.spec import SocDagSpec
    from ..real_backend.threads import Executor
    from .soc_dag import find_policies, rule_of

    cells = []
    for graph in args.graphs:
        tile = find_graph(graph)[2]
        costs = calibrations[tile].fit()[0]
        spec = SocDagSpec(costs.soc(counts))
        workload = workload_of(graph, costs, copies=args.copies, seed=args.seed)
        executors: dict[str, Executor] = {}
        for policy in find_policies(args.policies):
            rule = rule_of(policy, workload, spec)
            if not isinstance(rule, Rule):
                raise InputError(f"policy {policy.name!r} is not compiled", remedy="Compare rules and planners")
            if rule.binding not in executors:
                executors[rule.binding] = Executor(spec.replace(binding=rule.binding), tile)
            cells.append(Cell(graph, workload, rule, executors[rule.binding], calibrations[tile]))
    return cells


def run_cell(cell: Cell, seed: int) -> None:
    """A run of the cell between two of the calibration, checked and booked."""
    from ..envs.soc_dag.check import check_schedule
    from ..envs.soc_dag.spec import Soc
    from ..real_backend.calibrate_threads import samples_of
    from ..real_backend.threads_replay import replay

    executor = cell.executor
    before = cell.calibration.measure_around(
        cell.family, executor, lambda: executor.reset(cell.workload, seed), lambda: executor.run(cell.rule)
    )
    timeline, soc = executor.timeline(), executor.spec.soc
    again = replay(timeline, cell.workload, soc)
    if (again.finish != timeline.finish).any():
        cell.problems.append(f"ends at {timeline.finish.max()}, replayed at {again.finish.max()}")
    own = executor.spec.replace(soc=Soc(soc.name, soc.kinds))  # its transfers are what they were
    cell.problems += check_schedule(timeline, cell.workload, own, tolerance_us=0.0)
    cell.residual = max(cell.residual, float(executor.residuals().max()))
    task_us = float((timeline.finish - timeline.start).mean())
    cell.runs.append(Run(latency_us(timeline), task_us, before, samples_of(executor)))


def slowness_around(cell: Cell, run: Run, costs: KernelCosts) -> np.ndarray:
    """float64 (kinds,): how much slower than on average each kind of PE was around a run."""
    from ..real_backend.calibrate_threads import slowness_of

    around = cell.calibration.runs[cell.family][run.before : run.before + 2]
    return np.mean([slowness_of(costs, samples) for samples in around], axis=0)


def simulate(cell: Cell, costs: KernelCosts, spread: float, args: Args, draws: int = DRAWS) -> float:
    """Mean latency, in us, of a cell in the simulator."""
    from ..envs.soc_dag.sim import Simulator

    workload = workload_of(cell.graph, costs, copies=args.copies, seed=args.seed)
    counts = {kind.name: kind.count for kind in cell.executor.spec.soc.kinds}
    spec = cell.executor.spec.replace(soc=costs.soc(counts), noise="lognormal", noise_sigma=spread)
    simulator, latencies = Simulator(spec), []
    for seed in range(draws):
        simulator.reset(workload, seed)
        simulator.run(cell.rule)
        latencies.append(latency_us(simulator.timeline()))
    return float(np.mean(latencies))


def compare(cells: Sequence[Cell], args: Args) -> list[dict[str, Any]]:
    """A row for each cell.

    graph, tile, policy, is_long, task_us (mean execution); latency_us as measured, and corrected_us, at the machine's
    average speed; engine (median of these), spread (their standard deviation, relative), simulator, error (simulator
    over engine - 1), run_errors (simulator over each run's, corrected, - 1), own_errors (simulator at the PEs' speeds
    in the run itself over its latency - 1), raw_errors (simulator over latency - 1), residual, problems.
    """
    from ..real_backend.calibrate_threads import slowed, slowness_of

    rows, fits = [], {cell.calibration.tile: cell.calibration.fit() for cell in cells}
    for cell in cells:
        costs, report = fits[cell.calibration.tile]
        nominal = simulate(cell, costs, report["spread"], args)
        corrected, own = [], []
        for run in cell.runs:
            now = slowed(costs, slowness_around(cell, run, costs))
            corrected.append(run.latency_us * nominal / simulate(cell, now, report["spread"], args, DRAWS // 4))
            now = slowed(costs, slowness_of(costs, run.samples))
            own.append(simulate(cell, now, report["spread"], args, DRAWS // 4) / run.latency_us - 1)
        engine, task_us = float(np.median(corrected)), float(np.mean([run.task_us for run in cell.runs]))
        rows.append(
            {
                "graph": cell.graph,
                "tile": cell.calibration.tile,
                "policy": cell.rule.name,
                "is_long": task_us >= LONG_US,
                "task_us": task_us,
                "latency_us": [run.latency_us for run in cell.runs],
                "corrected_us": corrected,
                "engine": engine,
                "spread": float(np.std(corrected, ddof=1) / engine) if len(corrected) > 1 else 0.0,
                "simulator": nominal,
                "error": nominal / engine - 1,
                "run_errors": [nominal / one - 1 for one in corrected],
                "own_errors": own,
                "raw_errors": [nominal / run.latency_us - 1 for run in cell.runs],
                "residual": cell.residual,
                "problems": cell.problems[:3],
            }
        )
    return rows


def verdict(rows: Sequence[Mapping[str, Any]], repeats: int) -> dict[str, Any]:
    """Over all rows: median errors of long and short tasks, ranks by workload, residuals, and what was wrong."""
    from ..real_backend.calibrate_threads import FAMILIES

    found: dict[str, Any] = {}
    for name, is_long in (("long", True), ("short", False)):
        mine = [row for row in rows if row["is_long"] == is_long]
        if mine:
            found[name] = {
                "cells": len(mine),
                "task_us": [min(row["task_us"] for row in mine), max(row["task_us"] for row in mine)],
                "median_error": float(np.median([abs(e) for row in mine for e in row["run_errors"]])),
                "median_own": float(np.median([abs(e) for row in mine for e in row["own_errors"]])),
                "median_raw": float(np.median([abs(e) for row in mine for e in row["raw_errors"]])),
                "median_cell_error": float(np.median([abs(row["error"]) for row in mine])),
                "median_bias": float(np.median([row["error"] for row in mine])),
                "median_spread": float(np.median([row["spread"] for row in mine])),
            }
    found["ranks"] = {}
    for graph in dict.fromkeys(row["graph"] for row in rows):
        by_policy = {row["policy"]: {"latency": row} for row in rows if row["graph"] == graph}
        found["ranks"][graph] = ranks(by_policy, "latency", repeats)
    found["residual"] = {
        kind: max(row["residual"] for row in rows if row["graph"].startswith(kind))
        for kind in FAMILIES
        if any(row["graph"].startswith(kind) for row in rows)
    }
    found["problems"] = [text for row in rows for text in row["problems"]]
    return found


def show(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    """Print the rows by graph, and the verdict."""
    from rich.table import Table

    console = command.console()
    for graph in dict.fromkeys(row["graph"] for row in rows):
        mine = [row for row in rows if row["graph"] == graph]
        tasks = np.mean([row["task_us"] for row in mine])
        rank = found["ranks"][graph]
        grid = Table(
            title=f"{graph}: executions of {tasks:.0f} us on average, residual {max(r['residual'] for r in mine):.1e}; "
            f"Kendall tau {rank['kendall_tau']:.2f}, same winner in {rank['same_sign']:.0%} of {rank['clear_pairs']} "
            "pairs clear of the noise",
            title_justify="left",
        )
        grid.add_column("policy")
        for name in ("measured, us", "corrected, us", "(deviation)", "simulated, us", "error"):
            grid.add_column(name, justify="right")
        for row in sorted(mine, key=lambda row: row["engine"]):
            grid.add_row(
                row["policy"],
                f"{np.median(row['latency_us']):.0f}",
                f"{row['engine']:.0f}",
                f"{row['spread']:.1%}",
                f"{row['simulator']:.0f}",
                f"{row['error']:+.1%}",
            )
        console.print(grid)
    for name in ("long", "short"):
        if name in found:
            f = found[name]
            console.print(
                f"{name} tasks ({f['task_us'][0]:.0f}-{f['task_us'][1]:.0f} us on average), median error of the "
                f"simulator: {f['median_cell_error']:.1%} of a cell (bias {f['median_bias']:+.1%}); of a run "
                f"{f['median_error']:.1%}, whose deviation is {f['median_spread']:.1%}; {f['median_own']:.1%} with the "
                f"PEs' speeds of the run itself, {f['median_raw']:.1%} without any correction"
            )
    residuals = ", ".join(f"{kind} {value:.1e}" for kind, value in found["residual"].items())
    console.print(f"largest residual: {residuals}")
    console.print(f"runs checked and replayed: {sum(len(row['latency_us']) for row in rows)}")
    for text in found["problems"]:
        console.print(f"  wrong: {text}")


def fidelity(args: Args) -> int:
    """Run `schedlab fidelity threads`."""
    from ..envs.core.results import atomic_path
    from ..real_backend.calibrate_threads import ThreadsCalibration
    from .soc_dag import find_policies

    if args.repeats < 1 or not args.graphs:
        raise InputError(f"{args.repeats} repeats of {len(args.graphs)} graphs", remedy="Give at least 1 of each")
    find_policies(args.policies)
    counts = {kind: count for kind, count in (("big", args.big), ("little", args.little)) if count}
    families: dict[int, list[str]] = {}
    for graph in args.graphs:
        name, _, tile = find_graph(graph)
        families.setdefault(tile, []).append(name.partition("_")[0])
    calibrations = {
        tile: ThreadsCalibration(counts, tile, families=tuple(dict.fromkeys(some)), copies=args.copies, seed=1000)
        for tile, some in families.items()
    }
    for calibration in calibrations.values():
        for _ in range(FIRST_PASSES):
            calibration.measure_pass()
    cells = open_cells(args, calibrations, counts)
    for cell in cells:  # once for the compiler
        run_cell(cell, args.seed)
        cell.runs.clear()
    with command.progress("measuring", len(cells) * args.repeats, is_still=True) as bar:
        for repeat in range(args.repeats):
            for i in range(len(cells)):  # each pass begins with another cell
                cell = cells[(i + repeat) % len(cells)]
                bar(repeat * len(cells) + i, f"pass {repeat + 1}, {cell.graph}, {cell.rule.name}")
                run_cell(cell, args.seed)
    reports = {tile: calibration.fit() for tile, calibration in calibrations.items()}
    for costs, report in reports.values():
        command.say(
            f"costs: {costs.source}, hand-over {costs.handoff_us:.1f} us (P50, P90, P99: "
            + ", ".join(f"{us:.1f}" for us in report["handoff_us"])
            + f"), executions of a run spread by {report['spread']:.0%}, the speed of runs by {report['drift']:.0%}; "
            f"{report['repeated']} runs were disturbed and done again, {report['disturbed']} are as they were"
        )
    rows = compare(cells, args)
    found = verdict(rows, args.repeats)
    show(rows, found)
    if args.json is not None:
        fits = {str(tile): report for tile, (_, report) in reports.items()}
        with atomic_path(args.json) as path:
            path.write_text(json.dumps({"rows": rows, "verdict": found, "calibration": fits}, indent=1) + "\n")
        command.say(f"wrote {args.json}")
    return 1 if found["problems"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(Args, fidelity, argv, "fidelity threads", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
