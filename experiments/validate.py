"""Re-check a results folder from scratch: replay every saved schedule and recompute every value in `results.csv`.

Plain Python loops over single tokens, sharing no code with the simulator or the metrics, so that an error there shows
here. After CompilerGym's `validate` (https://arxiv.org/abs/2109.08267, section 4.4).
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from ..envs.core.errors import InputError
from ..envs.core.results import COLUMNS, END_METRIC, SCHEDULES, RunKey

RELATIVE_TOLERANCE = 1e-9
"""Sums in another order differ by rounding, never by more."""
TIME_TOLERANCE_S = 1e-9
"""Slack of the comparisons between clock readings."""

REQUEST_ARRAYS = (
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "slo_class",
    "ttft_slo_s",
    "tpot_slo_s",
    "slo_weight",
    "refused",
    "preemptions",
)
ITERATION_ARRAYS = (
    "iteration_start_s",
    "iteration_end_s",
    "prefill_tokens",
    "decode_requests",
    "kv_blocks_used",
)


@dataclass(frozen=True)
class Mismatch:
    """One thing that is not as it should be."""

    run: str
    """Run id, or the file, that it is about."""
    check: str
    """Name of the metric or the invariant."""
    message: str

    def __str__(self) -> str:
        return f"{self.run}: {self.check}: {self.message}"


@dataclass
class ValidationReport:
    """What `validate_folder` found."""

    folder: Path
    num_runs: int = 0
    num_values: int = 0
    """Values of results.csv that were recomputed."""
    mismatches: list[Mismatch] = field(default_factory=list)
    unchecked: dict[str, int] = field(default_factory=dict)
    """metric -> values that a schedule does not determine (such as the cost of a decision)."""

    @property
    def ok(self) -> bool:
        return not self.mismatches

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.num_runs} runs, {self.num_values} values recomputed"]
        if self.unchecked:
            names = ", ".join(f"{name} ({count})" for name, count in sorted(self.unchecked.items()))
            lines.append(f"not determined by a schedule: {names}")
        lines += [str(mismatch) for mismatch in self.mismatches]
        lines.append("valid" if self.ok else f"NOT VALID: {len(self.mismatches)} mismatches")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- one schedule


def load_schedule(path: str | PathLike[str]) -> dict[str, list]:
    """The arrays of a saved timeline as lists of plain numbers. Raises InputError for a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as data:
            lists = {name: data[name].tolist() for name in (*REQUEST_ARRAYS, *ITERATION_ARRAYS, "segments")}
    except Exception as error:  # a damaged archive raises anything from KeyError to zlib.error
        raise InputError(
            f"not a schedule ({error!r})", file=path, remedy="Evaluate this run again, its schedule is damaged"
        ) from error
    for names in (REQUEST_ARRAYS, ITERATION_ARRAYS):
        lengths = {name: len(lists[name]) for name in names}
        if len(set(lengths.values())) != 1:
            raise InputError(
                f"arrays differ in length: {lengths}",
                file=path,
                remedy="Evaluate this run again, its schedule is damaged",
            )
    return lists


def check_schedule(schedule: dict[str, list], about: dict[str, Any]) -> list[tuple[str, str]]:
    """The invariants of a run.

    Args:
        schedule: of `load_schedule`.
        about: the run's description: `kv_blocks`, `spec` (`RequestSchedulingSpec.to_dict()`), `run`; what is missing
            is not checked.

    Returns:
        (invariant, what is wrong) for each that is broken, the first offender of each.
    """
    wrong: dict[str, str] = {}

    def require(is_right: bool, check: str, message: str) -> None:
        if not is_right:
            wrong.setdefault(check, message)

    start_s, end_s = schedule["iteration_start_s"], schedule["iteration_end_s"]
    num_requests, num_iterations = len(schedule["arrival_s"]), len(end_s)
    is_simulated = about.get("run", {}).get("backend") == "sim"
    engine = about.get("spec", {}).get("engine", {})
    block_tokens = engine.get("block_tokens")
    has_prefix_cache = engine.get("prefix_cache")  # None: not known

    # iterations: one after another
    for i in range(num_iterations):
        require(
            math.isfinite(start_s[i]) and math.isfinite(end_s[i]) and start_s[i] <= end_s[i],
            "iteration times",
            f"iteration {i} runs from {start_s[i]} s to {end_s[i]} s",
        )
        if i > 0:
            require(
                end_s[i - 1] <= start_s[i] + TIME_TOLERANCE_S,
                "iterations overlap",
                f"iteration {i} starts at {start_s[i]} s, before the one before it ends at {end_s[i - 1]} s",
            )

    # segments: expand to the iteration of every token
    token_iterations: list[list[int]] = [[] for _ in range(num_requests)]
    for segment in schedule["segments"]:
        request, first, num_tokens = segment
        in_range = 0 <= request < num_requests and first >= 0 and num_tokens >= 1
        if not in_range or first + num_tokens > num_iterations:
            require(
                False, "segment range", f"segment {segment} of {num_requests} requests, {num_iterations} iterations"
            )
            continue
        for iteration in range(first, first + num_tokens):
            previous = token_iterations[request][-1] if token_iterations[request] else -1
            require(
                iteration > previous,
                "one token an iteration",
                f"request {request} yields at iteration {iteration} after iteration {previous}",
            )
            token_iterations[request].append(iteration)

    # requests: exactly their tokens, none before arrival
    tokens_emitted = [0] * num_iterations
    must_complete = [0] * num_iterations  # tokens that can only be the end of a prefill
    blocks_needed = [0] * num_iterations
    num_started, prompt_total, recompute_total = 0, 0, 0
    for request in range(num_requests):
        iterations = token_iterations[request]
        prompt, arrival = schedule["prompt_tokens"][request], schedule["arrival_s"][request]
        expected = 0 if schedule["refused"][request] else schedule["output_tokens"][request]
        require(
            len(iterations) == expected,
            "tokens of a request",
            f"request {request} yields {len(iterations)} tokens, expected {expected}",
        )
        require(schedule["preemptions"][request] >= 0, "preemptions", f"request {request} has a negative number")
        if not iterations:
            continue
        num_started += 1
        prompt_total += prompt
        require(
            end_s[iterations[0]] > arrival,
            "first token after arrival",
            f"request {request} arrives at {arrival} s, its first token is at {end_s[iterations[0]]} s",
        )
        if is_simulated:
            require(
                start_s[iterations[0]] >= arrival - TIME_TOLERANCE_S,
                "start after arrival",
                f"request {request} arrives at {arrival} s, it runs in the iteration from {start_s[iterations[0]]} s",
            )
        num_skips = 0
        for k, iteration in enumerate(iterations):
            tokens_emitted[iteration] += 1
            if block_tokens:
                blocks_needed[iteration] += -(-(prompt + k) // block_tokens)
            if k == 0:
                must_complete[iteration] += 1
            elif iteration > iterations[k - 1] + 1:
                num_skips += 1
                if is_simulated:  # only preemption makes a simulated request skip an iteration
                    must_complete[iteration] += 1
                    recompute_total += prompt + k
        if is_simulated:
            require(
                num_skips <= schedule["preemptions"][request],
                "preemptions",
                f"request {request} pauses {num_skips} times with {schedule['preemptions'][request]} preemptions",
            )

    # work of the iterations agrees with the tokens
    num_completions = 0
    kv_blocks = about.get("kv_blocks")
    cost = about.get("spec", {}).get("cost", {}).get("coefficients_s")
    for i in range(num_iterations):
        prefill, decodes, used = (schedule[name][i] for name in ITERATION_ARRAYS[2:])
        completions = tokens_emitted[i] - decodes
        num_completions += completions
        require(min(prefill, decodes, used) >= 0, "iteration counts", f"iteration {i} has a negative count")
        require(
            must_complete[i] <= completions <= prefill,
            "tokens of an iteration",
            f"iteration {i} yields {tokens_emitted[i]} tokens from {decodes} decodes and {prefill} prefill tokens, "
            f"{must_complete[i]} of them at the end of a prefill",
        )
        if kv_blocks is not None:
            require(used <= kv_blocks, "kv blocks", f"iteration {i} uses {used} of {kv_blocks} blocks")
        if is_simulated and has_prefix_cache is False:
            require(
                blocks_needed[i] <= used,
                "kv blocks",
                f"iteration {i} uses {used} blocks, the contexts of its tokens fill {blocks_needed[i]}",
            )
        if "max_batch_tokens" in engine:
            require(
                prefill + decodes <= engine["max_batch_tokens"],
                "batch tokens",
                f"iteration {i} has {prefill + decodes} tokens, the engine takes {engine['max_batch_tokens']}",
            )
        if is_simulated and cost:
            least_s = (cost[0] + cost[1] * prefill + cost[2] * decodes) * (1 - RELATIVE_TOLERANCE) - TIME_TOLERANCE_S
            require(
                end_s[i] - start_s[i] >= least_s,
                "iteration cost",
                f"iteration {i} takes {end_s[i] - start_s[i]} s, its cost model says at least {least_s} s",
            )

    # every prompt is computed, once for each time that it is lost
    num_preemptions = sum(schedule["preemptions"])
    require(
        num_completions <= num_started + num_preemptions,
        "prefills",
        f"{num_completions} prefills end, for {num_started} requests and {num_preemptions} preemptions",
    )
    prefill_total = sum(schedule["prefill_tokens"])
    if has_prefix_cache is False:
        require(
            prefill_total >= prompt_total + recompute_total,
            "prefill tokens",
            f"{prefill_total} prefill tokens for prompts of {prompt_total} and at least {recompute_total} to recompute",
        )
        if is_simulated and num_preemptions == 0:
            require(
                prefill_total == prompt_total,
                "prefill tokens",
                f"{prefill_total} prefill tokens for prompts of {prompt_total} without any preemption",
            )
    return list(wrong.items())


def recompute(schedule: dict[str, list], kv_blocks: int | None = None) -> dict[str, tuple[float, str]]:
    """Every metric of a schedule from its single tokens: metric -> (value, unit).

    Segments must lie within the run (the invariant "segment range" of `check_schedule`).
    """
    start_s, end_s = schedule["iteration_start_s"], schedule["iteration_end_s"]
    num_requests = len(schedule["arrival_s"])
    token_s: list[list[float]] = [[] for _ in range(num_requests)]
    for request, first, num_tokens in schedule["segments"]:
        for iteration in range(first, first + num_tokens):
            token_s[request].append(end_s[iteration])

    e2e, ttft, tbt, tpot = [], [], [], []
    weight_of_class: dict[int, float] = {}
    met_of_class: dict[int, float] = {}
    num_served, num_tokens_out, latest_s = 0, 0, -math.inf
    for request in range(num_requests):
        weight, slo_class = schedule["slo_weight"][request], schedule["slo_class"][request]
        weight_of_class[slo_class] = weight_of_class.get(slo_class, 0.0) + weight
        met_of_class.setdefault(slo_class, 0.0)
        times, arrival = token_s[request], schedule["arrival_s"][request]
        if schedule["refused"][request] or not times:
            continue
        num_served += 1
        num_tokens_out += len(times)
        latest_s = max(latest_s, times[-1])
        e2e.append(times[-1] - arrival)
        ttft.append(times[0] - arrival)
        for earlier, later in itertools.pairwise(times):
            tbt.append(later - earlier)
        is_met = ttft[-1] <= schedule["ttft_slo_s"][request]
        if len(times) >= 2:
            tpot.append((times[-1] - times[0]) / (len(times) - 1))
            is_met = is_met and tpot[-1] <= schedule["tpot_slo_s"][request]
        if is_met:
            met_of_class[slo_class] += weight

    met, total_weight = sum(met_of_class.values()), sum(weight_of_class.values())
    makespan_s = latest_s - min(schedule["arrival_s"]) if num_served else 0.0

    def rate(amount: float) -> float:
        return amount / makespan_s if makespan_s > 0 else 0.0

    values = {
        "mean_e2e_s": (_mean(e2e), "s"),
        "p50_e2e_s": (_percentile(e2e, 50), "s"),
        "p90_e2e_s": (_percentile(e2e, 90), "s"),
        "p99_e2e_s": (_percentile(e2e, 99), "s"),
        "mean_ttft_s": (_mean(ttft), "s"),
        "p50_ttft_s": (_percentile(ttft, 50), "s"),
        "p90_ttft_s": (_percentile(ttft, 90), "s"),
        "p99_ttft_s": (_percentile(ttft, 99), "s"),
        "max_wait_s": (max(ttft, default=math.nan), "s"),
        "p50_tbt_s": (_percentile(tbt, 50), "s"),
        "p99_tbt_s": (_percentile(tbt, 99), "s"),
        "mean_tpot_s": (_mean(tpot), "s"),
        "p99_tpot_s": (_percentile(tpot, 99), "s"),
        "slo_goodput": (met / total_weight if total_weight > 0 else math.nan, "share"),
        "goodput_rps": (rate(met), "requests/s"),
        "throughput_rps": (rate(num_served), "requests/s"),
        "throughput_tokens_per_s": (rate(num_tokens_out), "tokens/s"),
        "makespan_s": (makespan_s, "s"),
        "preemptions": (float(sum(schedule["preemptions"])), "count"),
        "refused": (float(sum(map(bool, schedule["refused"]))), "count"),
        "iterations": (float(len(end_s)), "count"),
    }
    if kv_blocks is not None:
        busy_s, used_s = 0.0, 0.0
        for start, end, used in zip(start_s, end_s, schedule["kv_blocks_used"], strict=True):
            busy_s += end - start
            used_s += used * (end - start)
        values["kv_use_mean"] = (used_s / (kv_blocks * busy_s) if busy_s > 0 else math.nan, "share")
    if len(weight_of_class) > 1:
        for slo_class, weight in weight_of_class.items():
            share = met_of_class[slo_class] / weight if weight > 0 else math.nan
            values[f"slo_goodput_class{slo_class}"] = (share, "share")
    return values


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between order statistics."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = percent * (len(ordered) - 1) / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def is_close(found: float, expected: float) -> bool:
    """Equal up to rounding; nan equals nan."""
    if math.isnan(found) or math.isnan(expected):
        return math.isnan(found) and math.isnan(expected)
    return math.isclose(found, expected, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-12)


# ------------------------------------------------------------------------------------------------ the folder


def validate_folder(path: str | PathLike[str], *, progress: bool = False) -> ValidationReport:
    """Re-check every run of a results folder.

    Checks that each run of `results.csv` is whole and has its schedule, that the schedule keeps the invariants of an
    engine (`check_schedule`), that policies which are compared served the same requests, and that every value is what
    the schedule gives (`recompute`).

    Args:
        path: folder with `results.csv` and `schedules/<run id>.npz` and `.json`.
        progress: show a progress bar.

    Raises:
        InputError: if there is no results file, or it is not one.
    """
    folder = Path(path)
    report = ValidationReport(folder)
    runs = _read_runs(folder / "results.csv", report)
    served: dict[tuple, tuple[str, list]] = {}
    items: Iterable[tuple[RunKey, dict[str, tuple[float, str]]]] = runs.items()
    if progress:
        from rich.progress import track

        items = track(list(runs.items()), description="validating")
    for key, rows in items:
        report.num_runs += 1
        _validate_run(folder, key, rows, report, served)
    return report


def _read_runs(path: Path, report: ValidationReport) -> dict[RunKey, dict[str, tuple[float, str]]]:
    """run -> metric -> (value, unit); incomplete and doubled rows go to the report."""
    runs: dict[RunKey, dict[str, tuple[float, str]]] = {}
    try:
        with open(path, newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if tuple(header) != COLUMNS:
                raise InputError(
                    f"columns are {header}",
                    file=path,
                    line=1,
                    remedy=f"Expected {','.join(COLUMNS)}: is this results.csv?",
                )
            for fields in reader:
                try:
                    *run, metric, value, unit = fields
                    key = RunKey.parse(run)
                    rows = runs.setdefault(key, {})
                    if metric in rows:
                        report.mismatches.append(
                            Mismatch(key.run_id, metric, f"is there twice, line {reader.line_num}")
                        )
                    rows[metric] = (float(value), unit)
                except ValueError as error:
                    raise InputError(
                        f"not a results row ({error})",
                        file=path,
                        line=reader.line_num,
                        remedy="Restore the file, or evaluate again with --resume",
                    ) from error
    except OSError as error:
        raise InputError(
            f"cannot be read ({error})", file=path, remedy="Give the folder of `schedlab evaluate`"
        ) from error
    for key, rows in runs.items():
        count = rows.pop(END_METRIC, None)
        if count is None or count[0] != len(rows):
            said = "no closing row" if count is None else f"a closing row for {count[0]:g}"
            report.mismatches.append(Mismatch(key.run_id, END_METRIC, f"the run has {len(rows)} rows and {said}"))
    return runs


def _validate_run(
    folder: Path,
    key: RunKey,
    rows: dict[str, tuple[float, str]],
    report: ValidationReport,
    served: dict[tuple, tuple[str, list]],
) -> None:
    run_id = key.run_id

    def mismatch(check: str, message: str) -> None:
        report.mismatches.append(Mismatch(run_id, check, message))

    if key.domain != "request_scheduling":
        mismatch("domain", f"no checker for the schedules of {key.domain!r}")
        return
    try:
        schedule = load_schedule(folder / SCHEDULES / f"{run_id}.npz")
        about = _load_description(folder / SCHEDULES / f"{run_id}.json")
    except InputError as error:
        mismatch("schedule", str(error))
        return
    if about["run"] != {name: getattr(key, name) for name in COLUMNS[:7]}:
        mismatch("run key", f"the description says {about['run']}")

    cell = (key.domain, key.workload, key.instance, key.backend, key.seed)
    requests = [schedule[name] for name in REQUEST_ARRAYS[:4]]
    first_run, first_requests = served.setdefault(cell, (run_id, requests))
    if requests != first_requests:
        mismatch("same requests", f"the requests are not those of {first_run}, to which it is compared")

    broken = check_schedule(schedule, about)
    for check, message in broken:
        mismatch(check, message)
    if any(check == "segment range" for check, _ in broken):
        return  # tokens outside the run have no time: nothing can be recomputed

    expected = recompute(schedule, about.get("kv_blocks"))
    for metric, (value, unit) in expected.items():
        if metric not in rows:
            mismatch(metric, f"is missing, expected {value!r}")
            continue
        found, found_unit = rows[metric]
        report.num_values += 1
        if not is_close(found, value):
            mismatch(metric, f"is {found!r}, recomputed {value!r}")
        if found_unit != unit:
            mismatch(metric, f"has unit {found_unit!r}, expected {unit!r}")
    for metric in rows:
        if metric not in expected:
            report.unchecked[metric] = report.unchecked.get(metric, 0) + 1


def _load_description(path: Path) -> dict[str, Any]:
    """The run's .json. Raises InputError."""
    try:
        about = json.loads(path.read_text())
        about["run"]["seed"]
        return about
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"not the description of a run ({error!r})", file=path, remedy="Evaluate this run again"
        ) from error


@dataclass
class Args:
    """Recompute every figure of a results folder from its schedules."""

    folder: tyro.conf.Positional[Path]
    """What `schedlab evaluate --out` wrote: a folder with `results.csv` and `schedules/`."""


def main() -> None:
    """Command line: `python -m schedlab.experiments.validate DIR`. Exit status 1 if anything does not agree."""
    args = tyro.cli(Args)
    try:
        report = validate_folder(args.folder, progress=True)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(report)
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
