"""Fit the costs of kernels (`KernelCosts`) to a real executor, inside runs of task graphs.

What a kernel takes depends on what the other PEs do to caches and memory meanwhile, so kernels are not timed alone:
graphs of all of them run under a rule that gives any ready task to any idle PE, by lot, which keeps all PEs busy and
shows every kernel on every kind. Wall seconds are what they are: calibrate on a quiet machine, or between the runs that
are to be predicted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..envs.core.errors import InputError
from ..envs.core.kernel import njit_borrowed
from ..envs.soc_dag.rule import Rule
from ..envs.soc_dag.spec import SocDagSpec
from ..envs.soc_dag.state import IDLE
from ..envs.soc_dag.workload import Workload
from .machine import cpu_name, versions
from .threads import LITTLE_STRIP, Executor
from .threads_kernels import KERNELS
from .threads_programs import FACTOR_KERNELS, KernelCosts, factorisation, flow, unmeasured_costs
from .threads_replay import could_begin_at

FARTHEST = 0.01
"""Share of the executions farthest from their cost that their spread leaves out."""
FAMILIES = (*FACTOR_KERNELS, "flow", "mix")
"""What the jobs that are measured compute: factorisations, flows of FFT, FIR and MATMUL, and all of them at once."""
DISTURBED = 0.02
"""A run in which a PE's core did something else for more than this share of the time is done again."""
MOST_TRIES = 4
"""Tries after which a disturbed one is taken as it is."""


class Samples(NamedTuple):
    """What the executions of some runs took. All arrays (n,)."""

    kernel: np.ndarray  # int64
    kind: np.ndarray  # int64 of its PE
    us: np.ndarray  # float64 of the kernel alone
    handoff_us: np.ndarray  # float64 from when it could begin until its PE began to bring its data
    copy_us: np.ndarray  # float64 of bringing them
    copied: np.ndarray  # float64 largest number of bytes from one other PE's task; 0: nothing to bring


class ThreadsCalibration:
    """Measurements of an executor in runs of several graphs, and the costs fitted to them.

    Args:
        counts: PEs of each kind.
        tile: rows and columns of a tile.
        families: of `FAMILIES`, what is measured; default: all but the mix that this size of tile allows.
        copies: PEs have memories of their own.
        seed: of the lots and the data.

    Raises InputError if there are fewer cores than PEs.
    """

    def __init__(
        self,
        counts: Mapping[str, int],
        tile: int,
        *,
        families: Sequence[str] | None = None,
        copies: bool = False,
        seed: int = 0,
    ) -> None:
        self.costs = unmeasured_costs(tile, tuple(counts))
        self.soc, self.seed, self.tile = self.costs.soc(counts), seed, tile
        if families is None:
            families = (*FACTOR_KERNELS, "flow") if tile & (tile - 1) == 0 else tuple(FACTOR_KERNELS)
        side = min(max(round(900 / tile), 4), 12)  # runs of several ms, whatever the tile
        self.workloads = {name: self._jobs(name, side, copies) for name in families}
        # two of each: `measure_around` has both loaded before the first one runs
        self.executors = {name: [Executor(SocDagSpec(self.soc), tile) for _ in range(2)] for name in families}
        check_cores(self.executors[families[0]][0])
        self.runs: dict[str, list[Samples]] = {name: [] for name in families}
        for name in families:  # once unmeasured: code and caches warm up
            self._run(self.executors[name][0], name, load=True)
        self.num_repeated = self.num_disturbed = 0

    def _jobs(self, family: str, side: int, copies: bool) -> Workload:
        """A job of a family, of `side` tiles in a row; of the mix one of each, and smaller."""
        if family == "mix":
            parts, side = (*FACTOR_KERNELS, "flow"), max(side // 2, 3)
        else:
            parts = (family,)
        dags = [
            flow(8 * side, self.costs, copies=copies, seed=self.seed + 1000)
            if part == "flow"
            else factorisation(part, side, self.costs, copies=copies)
            for part in parts
        ]
        return Workload.from_arrays(family, self.costs.kinds, dags)

    def measure_run(self, family: str) -> None:
        """One more run of a family's graph."""
        executor = self.executors[family][0]
        self._measure(lambda: None, [lambda: self._run(executor, family, load=True)])
        self.runs[family].append(samples_of(executor))

    def measure_around(self, family: str, executor: Executor, load: Callable[[], None], run: Callable[[], None]) -> int:
        """A run of a family's graph, directly behind it a run of `executor`, and directly behind that one of the graph.

        `load` and `run` do what the executor needs for it. Returns the number of the first run of the two in `runs`.
        """
        before, after = self.executors[family]

        def load_all() -> None:
            for one in (before, after):
                one.reset(self.workloads[family], self.seed)
            load()

        def run_other() -> Executor:
            run()
            return executor

        self._measure(load_all, [lambda: self._run(before, family), run_other, lambda: self._run(after, family)])
        self.runs[family] += [samples_of(before), samples_of(after)]
        return len(self.runs[family]) - 2

    def _run(self, executor: Executor, family: str, *, load: bool = False) -> Executor:
        if load:
            executor.reset(self.workloads[family], self.seed)
        executor.run(lot_rule(self.seed + len(self.runs[family])))
        return executor

    def _measure(self, load: Callable[[], None], runs: Sequence[Callable[[], Executor]]) -> None:
        """Load, and run one after the other; all of it again if other processes took the PEs' cores meanwhile."""
        for tries in range(1, MOST_TRIES + 1):
            load()
            if not any(is_disturbed(executor) for executor in [run() for run in runs]):
                return
            self.num_repeated += tries < MOST_TRIES
        self.num_disturbed += 1

    def measure_pass(self) -> None:
        """One more run of every graph."""
        for family in self.runs:
            self.measure_run(family)

    def fit(self, name: str | None = None) -> tuple[KernelCosts, dict[str, Any]]:
        """Costs of this name (default "threads"), and a report.

        Each third run is held out. The report holds, for the runs of the fit and those held out, the errors of the
        costs (`errors_of`); the `spread` of executions within a run (standard deviation of the logarithm) and the
        `drift` of the machine's speed from run to run; percentiles 50, 90 and 99 of the hand-over; machine, versions.
        """
        if not all(self.runs.values()):
            raise InputError("nothing was measured", remedy="Call measure_pass first")
        parts = [one for runs in self.runs.values() for i, one in enumerate(runs) if i % 3 != 2]
        fitted = _joined(parts)
        held_out = [one for runs in self.runs.values() for i, one in enumerate(runs) if i % 3 == 2]
        kernels = np.unique(fitted.kernel)
        of_kinds = range(len(self.soc.kinds))
        times = filled(
            np.array(
                [
                    [
                        typical([one.us[(one.kernel == kernel) & (one.kind == kind)] for one in parts])
                        for kind in of_kinds
                    ]
                    for kernel in kernels
                ]
            )
        )
        us_a_byte = typical([one.copy_us[one.copied > 0] / one.copied[one.copied > 0] for one in parts])
        report: dict[str, Any] = {
            "clock": Executor.clock,
            "runs": {name: len(runs) for name, runs in self.runs.items()},
            "repeated": self.num_repeated,
            "disturbed": self.num_disturbed,
            "executions": len(fitted.us),
            "graphs": [dag.name for workload in self.workloads.values() for dag in workload.dags],
            "little_strip": LITTLE_STRIP,
            "handoff_us": np.percentile(fitted.handoff_us, [50, 90, 99]).tolist(),
            "machine": {"cpu": cpu_name(), "cores": sorted(os.sched_getaffinity(0)), "soc": self.soc.name},
            "versions": versions(),
        }
        costs = KernelCosts(
            self.costs.tile,
            self.costs.kinds,
            {KERNELS[kernel]: tuple(row) for kernel, row in zip(kernels, times.tolist(), strict=True)},
            handoff_us=typical([one.handoff_us for one in parts]),
            copy_bandwidth=1.0 / us_a_byte if us_a_byte > 0 else float("inf"),
            name=name or "threads",
        )
        runs = [one for runs in self.runs.values() for one in runs]
        report["spread"] = float(np.median([spread_of(costs, one) for one in runs]))
        report["drift"] = float(np.std([np.log(slowness_of(costs, one)) for one in runs]))
        report["fit"] = errors_of(costs, fitted)
        if held_out:
            report["held_out"] = errors_of(costs, _joined(held_out))
        source = (
            f"{len(runs)} runs on {report['machine']['cpu']}, {self.soc.name}, tiles of {costs.tile}; "
            + ", ".join(f"{part}: total {report[part]['total']:+.1%}" for part in ("fit", "held_out") if part in report)
        )
        return replace(costs, source=source, report=report), report

    def close(self) -> None:
        """Forget the data."""
        for executors in self.executors.values():
            for executor in executors:
                executor.close()


def check_cores(executor: Executor) -> None:
    """Raise InputError if PEs share cores: nothing measured there holds for PEs that work side by side."""
    if executor.is_crowded:
        raise InputError(
            f"{executor.spec.soc.num_pes} PEs on {len(set(executor.cores))} cores: times would say nothing",
            remedy="Measure with at most one PE a core",
        )


def is_disturbed(executor: Executor) -> bool:
    """True if other processes took the PEs' cores during the executor's run."""
    makespan = float(executor.timeline().job_finish.max())
    return bool((executor.disturbed_us() > DISTURBED * makespan).any())


def samples_of(executor: Executor) -> Samples:
    """What the executions of an executor's finished run took."""
    timeline, workload = executor.timeline(), executor.workload
    kinds = executor.spec.soc.kind_of_pe
    copied = np.zeros(len(timeline.pe))
    for job, graph in enumerate(workload.dag_of_job):
        dag, first = workload.dags[graph], int(timeline.first_task[job])
        sources, targets = dag.edges.T + first
        from_others = timeline.pe[sources] != timeline.pe[targets]
        np.maximum.at(copied, targets, np.where(from_others, dag.volumes, 0.0))
    copy_us = executor.copy_us()
    begun = timeline.start - copy_us
    return Samples(
        executor.kernels(),
        kinds[timeline.pe],
        timeline.finish - timeline.start,
        begun - could_begin_at(timeline, workload),
        copy_us,
        copied,
    )


def _joined(runs: list[Samples]) -> Samples:
    return Samples(*(np.concatenate(columns) for columns in zip(*runs, strict=True)))


def typical(samples_of_runs: Sequence[np.ndarray]) -> float:
    """The median over the runs of their means: of a run what disturbs single executions counts, as it does for who
    waits for them; runs on a machine that was busy do not. nan if there are no samples."""
    means = [samples.mean() for samples in samples_of_runs if len(samples)]
    return float(np.median(means)) if means else float("nan")


def filled(times: np.ndarray) -> np.ndarray:
    """float64 (kernels, kinds): times with those that are missing (nan) as another kind's, slower by the median ratio.

    Raises InputError if a kind ran nothing at all.
    """
    full = times.copy()
    for kernel, kind in np.argwhere(np.isnan(times)):
        other = int(np.flatnonzero(~np.isnan(times[kernel]))[0])
        ratios = times[:, kind] / times[:, other]
        if np.isnan(ratios).all():
            raise InputError(f"PE kind {kind} ran nothing", remedy="Measure more runs")
        full[kernel, kind] = times[kernel, other] * np.nanmedian(ratios)
    return full


def predicted_us(costs: KernelCosts, samples: Samples) -> np.ndarray:
    """What the costs say of the executions, without hand-over and copies."""
    table = np.full((len(KERNELS), len(costs.kinds)), np.nan)
    for kernel, times in costs.times_us.items():
        table[KERNELS.index(kernel)] = times
    return table[samples.kernel, samples.kind]


def errors_of(costs: KernelCosts, samples: Samples) -> dict[str, float]:
    """Relative errors: of the sum of all executions, the median of one, and us of hand-over a task (measured less
    cost)."""
    predicted = predicted_us(costs, samples)
    return {
        "executions": len(predicted),
        "total": float(predicted.sum() / samples.us.sum() - 1),
        "median": float(np.median(np.abs(predicted / samples.us - 1))),
        "handoff_us": float(samples.handoff_us.mean() - costs.handoff_us),
    }


def slowness_of(costs: KernelCosts, samples: Samples) -> np.ndarray:
    """float64 (kinds,): executions over their costs, on each kind of PE; 1 where there was none."""
    predicted = predicted_us(costs, samples)
    mine = [samples.kind == kind for kind in range(len(costs.kinds))]
    return np.array([samples.us[some].sum() / predicted[some].sum() if some.any() else 1.0 for some in mine])


def slowed(costs: KernelCosts, slowness: np.ndarray) -> KernelCosts:
    """The costs of a machine that is slower by a factor on each kind of PE."""
    times = {
        kernel: tuple(us * factor for us, factor in zip(times, slowness.tolist(), strict=True))
        for kernel, times in costs.times_us.items()
    }
    return replace(costs, times_us=times)


def spread_of(costs: KernelCosts, samples: Samples) -> float:
    """Standard deviation of the logarithm of an execution over its cost, in one run, without the `FARTHEST`."""
    predicted = predicted_us(slowed(costs, slowness_of(costs, samples)), samples)
    logs = np.sort(np.abs(np.log(samples.us / predicted)))
    return float(np.sqrt(np.mean(logs[: int(len(logs) * (1 - FARTHEST))] ** 2)))


def lot_rule(seed: int) -> Rule:
    """A rule that gives any ready task to any idle PE that can run it, by lot."""
    return Rule("lot", draw_lot, (float(seed),), memory_size=1)


@njit_borrowed
def draw_lot(state, params, memory, decision):
    """memory: the state of a linear congruential generator (Park and Miller, CACM 1988)."""
    engine, bind = state.engine[0], decision.bind[0]
    if memory[0] == 0.0:
        memory[0] = (params[0] * 48271.0 + 11.0) % 2147483646.0 + 1.0
    found = 0
    for i in range(engine.num_ready):
        for pe in range(engine.num_pes):
            if state.pes[pe].status == IDLE and state.times[state.ready[i], pe] < np.inf:
                found += 1
                memory[0] = (memory[0] * 48271.0) % 2147483647.0
                if memory[0] * found < 2147483647.0:  # each of those found so far is the one with equal chances
                    bind.task, bind.pe = state.ready[i], pe
