"""Re-check a results folder from scratch: replay every saved schedule and recompute every value in `results.csv`.

How a run is re-checked is the domain's: `validate_<domain>.py`, which shares no code with its simulator or its metrics,
so that an error there shows here. After CompilerGym's `validate` (https://arxiv.org/abs/2109.08267, section 4.4).
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import tyro

from ..envs.core.errors import InputError
from ..envs.core.results import COLUMNS, END_METRIC, RunKey, schedule_paths
from .domain import DOMAINS

RELATIVE_TOLERANCE = 1e-9
"""Sums in another order differ by rounding, never by more."""
TIME_TOLERANCE_S = 1e-9
"""Slack of the comparisons between clock readings."""


@dataclass
class Checked:
    """What a domain's `check_run(folder, npz, about)` found in one run."""

    inputs: list
    """What was served: equal for policies that are compared."""
    broken: list[tuple[str, str]]
    """(invariant, what is wrong)."""
    values: dict[str, tuple[float, str]] | None = None
    """metric -> (value, unit), recomputed; None if the schedule is too broken for that."""


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

    if key.domain not in DOMAINS:
        mismatch("domain", f"no checker for the schedules of {key.domain!r}")
        return
    npz, description = schedule_paths(folder, key)
    try:
        about = _load_description(description)
        checked = import_module(f".validate_{key.domain}", __package__).check_run(folder, npz, about)
    except InputError as error:
        mismatch("schedule", str(error))
        return
    if about["run"] != {name: getattr(key, name) for name in COLUMNS[:7]}:
        mismatch("run key", f"the description says {about['run']}")

    cell = (key.domain, key.workload, key.instance, key.backend, key.seed)
    first_run, first_inputs = served.setdefault(cell, (run_id, checked.inputs))
    if checked.inputs != first_inputs:
        mismatch("same inputs", f"the inputs are not those of {first_run}, to which it is compared")
    for check, message in checked.broken:
        mismatch(check, message)
    expected = checked.values
    if expected is None:
        return
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
