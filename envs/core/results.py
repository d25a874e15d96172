"""Results as tidy rows in one CSV file, the intervals around them, and the table that is printed.

One *run* is one (domain, workload, instance, policy, backend, clock, seed). Its rows, one a metric, are appended as
a unit and closed by an `END_METRIC` row that counts them, so a run whose writing was cut short is recognised from the
file alone and dropped on resume. Beside the file, `schedules/<run id>.npz` and `.json` hold what is needed to recompute
every value from scratch.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from .errors import InputError

if TYPE_CHECKING:  # pandas and rich take longer to import than all of envs
    import pandas as pd
    from rich.console import Console

COLUMNS = ("domain", "workload", "instance", "policy", "backend", "clock", "seed", "metric", "value", "unit")
"""Columns of a results file, in order."""
RUN_COLUMNS = COLUMNS[:7]
END_METRIC = "num_metrics"
"""Metric name of the row that closes a run; its value is the number of rows of the run before it."""
SCHEDULES = "schedules"
"""Name of the folder beside `results.csv` that holds the schedules."""


@dataclass(frozen=True, order=True)
class RunKey:
    """What tells one run from another."""

    domain: str
    workload: str
    instance: str
    policy: str
    backend: str
    clock: str
    seed: int

    def __post_init__(self) -> None:
        for name in RUN_COLUMNS[:-1]:
            value = getattr(self, name)
            if not isinstance(value, str) or not value or value != value.strip() or not value.isprintable():
                raise InputError(f"run key {name} is {value!r}", remedy="Give a non-empty string of one line")
        object.__setattr__(self, "seed", int(self.seed))

    @classmethod
    def parse(cls, fields: Sequence[str]) -> RunKey:
        """The run of the first seven fields of a row. Raises ValueError if there are more or fewer."""
        domain, workload, instance, policy, backend, clock, seed = fields
        return cls(domain, workload, instance, policy, backend, clock, int(seed))

    @property
    def run_id(self) -> str:
        """File name of the run's schedule: readable parts, and a digest of the whole key that keeps it unique."""
        parts = [self.workload, self.instance, self.policy, self.backend]
        # A policy or workload may be a path: its end is the telling part.
        readable = [re.sub(r"[^A-Za-z0-9.+=]+", "-", part)[-40:].strip("-.") or "x" for part in parts]
        digest = hashlib.sha256("\n".join(map(str, asdict(self).values())).encode()).hexdigest()[:8]
        return "_".join([*readable, f"s{self.seed}", digest])


class SavesItself(Protocol):
    """A schedule record, such as a domain's `Timeline`."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write an .npz."""


@contextlib.contextmanager
def atomic_path(path: str | PathLike[str]) -> Iterator[Path]:
    """A temporary path with the same suffix; renamed to `path` when the block succeeds, removed when it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: str | PathLike[str]) -> Iterator[Path]:
    """An empty temporary folder; it takes the place of `folder` when the block succeeds, is removed when it fails."""
    folder = Path(folder)
    temporary, replaced = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not folder.exists():  # the new one could not take its place
            os.rename(replaced, folder)
        shutil.rmtree(replaced, ignore_errors=True)


def schedule_paths(folder: str | PathLike[str], key: RunKey) -> tuple[Path, Path]:
    """The .npz and .json of a run within a results folder."""
    stem = Path(folder) / SCHEDULES / key.run_id
    return stem.with_name(stem.name + ".npz"), stem.with_name(stem.name + ".json")


def save_schedule(folder: str | PathLike[str], key: RunKey, schedule: SavesItself, **about: Any) -> None:
    """Write the schedule of a run and its description, to be called before the run's rows are appended.

    Args:
        folder: the results folder, the one that holds `results.csv`.
        key: the run.
        schedule: the record; its `save(path)` writes the .npz.
        about: JSON-able facts that a re-check needs: `spec` (the domain's `spec.to_dict()`) and, for request
            scheduling, `kv_blocks` (int, blocks in the pool).
    """
    npz, description = schedule_paths(folder, key)
    with atomic_path(npz) as path:
        schedule.save(path)
    with atomic_path(description) as path:
        path.write_text(json.dumps({"run": asdict(key), **about}, indent=1) + "\n")


class ResultsFile:
    """A results file that grows by whole runs and survives being killed at any byte.

    Opening an existing file drops the last run if it is incomplete.

    Args:
        path: the CSV file; its folder is made on the first append.
        resume: go on with an existing file. If False, a file that already holds rows is an InputError.
    """

    def __init__(self, path: str | PathLike[str], *, resume: bool = True) -> None:
        self.path = Path(path)
        self.dropped: str | None = None
        """What the opening dropped, for a message to the user; None if the file was whole."""
        if not resume and self.path.exists() and self.path.stat().st_size > 0:
            raise InputError(
                "results file already holds rows",
                file=self.path,
                remedy="Pass --resume to go on with it, or choose another folder with --out",
            )
        self._done: dict[RunKey, None] = {}
        if self.path.exists():
            self._recover()

    def done_runs(self) -> set[RunKey]:
        """The runs that are in the file as a whole."""
        return set(self._done)

    def append(self, key: RunKey, metrics: Mapping[str, float], units: Mapping[str, str]) -> None:
        """Append all rows of one run in one write.

        Args:
            key: the run; a run that is already there is an InputError.
            metrics: metric -> value; nan is allowed and means "not defined for this run".
            units: metric -> unit, for every metric.
        """
        if key in self._done:
            raise InputError(f"run {key} is already there", file=self.path, remedy="Skip the runs of done_runs()")
        if not metrics or END_METRIC in metrics:
            raise InputError(f"metrics are {sorted(metrics)}", remedy=f"Give at least one, none named {END_METRIC!r}")
        without_unit = [name for name in metrics if name not in units]
        if without_unit:
            raise InputError(f"metrics {without_unit} have no unit", remedy="Name the unit of every metric")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        is_new = not self.path.exists() or self.path.stat().st_size == 0
        if is_new:
            writer.writerow(COLUMNS)
        run = tuple(asdict(key).values())
        for name, value in metrics.items():
            writer.writerow((*run, name, repr(float(value)), units[name]))
        writer.writerow((*run, END_METRIC, len(metrics), "count"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
        self._done[key] = None

    def read(self) -> pd.DataFrame:
        """The rows of the whole runs (`read_results`)."""
        return read_results(self.path)

    def _recover(self) -> None:
        """Find the whole runs; truncate after the last of them."""
        data = self.path.read_bytes()
        lines = data.splitlines(keepends=True)
        header = (",".join(COLUMNS) + "\n").encode()
        if lines and lines[0] != header:
            if header.startswith(data):
                self._truncate(0, "an unfinished header")
                return
            raise InputError(
                f"columns are {lines[0].decode(errors='replace').strip()!r}",
                file=self.path,
                line=1,
                remedy=f"Expected {header.decode().strip()!r}; choose another folder with --out",
            )
        whole, position, run, num_rows = 0, 0, None, 0
        for number, line in enumerate(lines, start=1):
            position += len(line)
            if number == 1:
                whole = position
                continue
            if not line.endswith(b"\n"):
                break
            key, metric, value = _parse_row(line, self.path, number)
            if run is not None and key != run:
                raise InputError(
                    f"the run before this line has no closing {END_METRIC!r} row",
                    file=self.path,
                    line=number,
                    remedy="Delete the rows of that run and evaluate again with --resume",
                )
            if metric != END_METRIC:
                run, num_rows = key, num_rows + 1
            elif int(value) != num_rows:
                raise InputError(
                    f"the run has {num_rows} rows and its {END_METRIC!r} row says {value}",
                    file=self.path,
                    line=number,
                    remedy="Delete the rows of that run and evaluate again with --resume",
                )
            elif key in self._done:
                raise InputError(f"run {key} is there twice", file=self.path, line=number, remedy="Delete one of them")
            else:
                self._done[key] = None
                whole, run, num_rows = position, None, 0
        if whole < len(data):
            self._truncate(whole, f"an unfinished run of {num_rows} rows" + (f" ({run.run_id})" if run else ""))

    def _truncate(self, size: int, what: str) -> None:
        os.truncate(self.path, size)
        self.dropped = what


def _parse_row(line: bytes, path: Path, number: int) -> tuple[RunKey, str, str]:
    """Run, metric and value text of one line. Raises InputError."""
    try:
        (fields,) = csv.reader([line.decode()])
        *run, metric, value, _ = fields
        float(value)
        return RunKey.parse(run), metric, value
    except (ValueError, csv.Error) as error:
        raise InputError(
            f"not a results row ({error})",
            file=path,
            line=number,
            remedy=f"Expected the {len(COLUMNS)} columns {','.join(COLUMNS)}; restore or delete the line",
        ) from error


def read_results(path: str | PathLike[str]) -> pd.DataFrame:
    """The rows of a results file without the closing rows. Columns as `COLUMNS`; value float64, seed int64.

    Raises InputError for a file that is missing or has other columns.
    """
    import pandas as pd

    text = dict.fromkeys(set(COLUMNS) - {"seed", "value"}, str)
    try:
        # Names may read "nan" or "None": only an empty value is missing.
        frame = pd.read_csv(path, dtype=text, keep_default_na=False, na_values={"value": ["nan", ""]})
        frame = frame.astype({"seed": np.int64, "value": np.float64})
        missing = [name for name in COLUMNS if name not in frame.columns]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"not a results file ({error})", file=path, remedy="Write one with `schedlab evaluate`"
        ) from error
    if missing:
        raise InputError(f"columns {missing} are missing", file=path, remedy="Write one with `schedlab evaluate`")
    return frame[frame["metric"] != END_METRIC].reset_index(drop=True)


def bootstrap_ci(
    values: Sequence[float] | np.ndarray, level: float = 0.95, num: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979).

    The same `seed` and number of values resample the same positions, so intervals of policies over the same list of
    seeds are paired.

    Args:
        values: (n,) one value a seed; nan entries are left out.
        level: probability that the interval should hold.
        num: resamples.
        seed: of the resampling.

    Returns:
        (low, high) in the unit of the values; (nan, nan) for fewer than two values, which say nothing of spread.
    """
    sample = np.asarray(values, dtype=np.float64)
    sample = sample[~np.isnan(sample)]
    if len(sample) < 2:
        return float("nan"), float("nan")
    picks = np.random.default_rng(seed).integers(0, len(sample), size=(num, len(sample)))
    tail = (1 - level) / 2
    low, high = np.quantile(sample[picks].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


class PairedDifference(NamedTuple):
    """Mean of (policy - reference) over pairs, with its bootstrap interval."""

    mean: float
    low: float
    high: float
    num_pairs: int


def paired_difference(
    frame: pd.DataFrame,
    policy: str,
    reference: str,
    metric: str,
    *,
    relative: bool = False,
    level: float = 0.95,
    num: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Difference of two policies in one metric, over the runs that both have.

    Runs are paired when all of domain, workload, instance, backend, clock and seed agree; filter `frame` to one cell
    first unless the mean over cells is meant. An interval that excludes zero is a difference.

    Args:
        frame: rows as `read_results` gives them.
        policy: minuend.
        reference: subtrahend.
        metric: the metric.
        relative: divide each difference by the reference's value.
        level: probability that the interval should hold.
        num: resamples.
        seed: of the resampling.

    Raises:
        InputError: if no run is shared.
    """
    pair = [name for name in RUN_COLUMNS if name != "policy"]
    rows = frame[frame["metric"] == metric].set_index(pair)["value"]
    chosen = frame.loc[frame["metric"] == metric, "policy"].to_numpy()
    joined = rows[chosen == policy].to_frame("policy").join(rows[chosen == reference].rename("reference"), how="inner")
    joined = joined.dropna().sort_index()
    if joined.empty:
        raise InputError(
            f"no run of {metric!r} is shared by {policy!r} and {reference!r}",
            remedy=f"Evaluate both on the same seeds; there are policies {sorted(frame['policy'].unique())}",
        )
    difference = (joined["policy"] - joined["reference"]).to_numpy()
    if relative:
        difference = difference / joined["reference"].to_numpy()
    low, high = bootstrap_ci(difference, level, num, seed)
    return PairedDifference(float(difference.mean()), low, high, len(difference))


CELL_COLUMNS = ("domain", "workload", "instance", "backend", "clock")
"""What a table of policies is about: policies are compared within one cell."""


def summary_table(frame: pd.DataFrame, level: float = 0.95, num: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Mean over seeds and its bootstrap interval per (cell, policy, metric), in the order of the rows.

    Returns:
        Columns: `CELL_COLUMNS`, policy, metric, unit, mean, low, high (nan with one seed), num_seeds.
    """
    import pandas as pd

    keys = [*CELL_COLUMNS, "policy", "metric", "unit"]
    rows = []
    for key, group in frame.groupby(keys, sort=False):
        values = group.sort_values("seed")["value"].to_numpy()
        values = values[~np.isnan(values)]
        mean = float(values.mean()) if len(values) else float("nan")
        rows.append((*key, mean, *bootstrap_ci(values, level, num, seed), len(values)))
    return pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "num_seeds"])


def best_policies(
    cell: pd.DataFrame, lower_is_better: Mapping[str, bool | None], oracles: Collection[str] = ()
) -> dict[str, set[str]]:
    """metric -> the non-oracle policies with the best mean (more than one when equal) in one cell of a summary.

    Metrics that are absent from `lower_is_better`, or None there, have no better side and get no entry.
    """
    best: dict[str, set[str]] = {}
    contenders = cell[~cell["policy"].isin(list(oracles)) & cell["mean"].notna()]
    for metric, group in contenders.groupby("metric", sort=False):
        is_lower = lower_is_better.get(str(metric))
        if is_lower is not None:
            goal = group["mean"].min() if is_lower else group["mean"].max()
            best[str(metric)] = set(group.loc[group["mean"] == goal, "policy"])
    return best


def format_value(value: float) -> str:
    """Four significant digits, without an exponent where a reader can do without."""
    if np.isnan(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = 0 if value == 0 or abs(value) >= 1000 else 3 - int(np.floor(np.log10(abs(value))))
        return f"{value:.{digits}f}"
    return f"{value:.3g}"


def print_summary(
    summary: pd.DataFrame,
    lower_is_better: Mapping[str, bool | None],
    *,
    metrics: Sequence[str] | None = None,
    oracles: Collection[str] = (),
    console: Console | None = None,
) -> None:
    """Print one table a cell: policies in rows, metrics in columns, the best non-oracle row of each metric marked *.

    Args:
        summary: of `summary_table`.
        lower_is_better: metric -> direction; None or absent: no mark.
        metrics: columns to print, in order; default all that the summary has.
        oracles: policies that were given the future; they stand below a line and are never marked.
        console: where to print; default the terminal.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    for cell_key, cell in summary.groupby(list(CELL_COLUMNS), sort=False):
        names = [name for name in (metrics or cell["metric"].unique()) if (cell["metric"] == name).any()]
        _, workload, instance, backend, clock = map(str, cell_key)
        seeds = cell["num_seeds"].max()
        title = f"{workload}, {instance} on {backend} ({clock} clock), {seeds} seed{'s' if seeds != 1 else ''}"
        table = Table(title=escape(title), title_justify="left")
        table.add_column("policy")
        for name in names:
            unit = cell.loc[cell["metric"] == name, "unit"].iloc[0]
            arrow = {True: " ↓", False: " ↑", None: ""}[lower_is_better.get(name)]
            table.add_column(Text(f"{name}{arrow}\n[{unit}]"), justify="right")
        best = best_policies(cell, lower_is_better, oracles)
        indexed = cell.set_index(["policy", "metric"])
        policies = list(cell["policy"].unique())
        plain = [policy for policy in policies if policy not in oracles]
        for policy in plain + [policy for policy in policies if policy in oracles]:
            is_oracle = policy in oracles
            cells = []
            for name in names:
                if (policy, name) not in indexed.index:
                    cells.append(Text("-"))
                    continue
                row = indexed.loc[(policy, name)]
                text = format_value(row["mean"])
                if not np.isnan(row["low"]):
                    text += f" [{format_value(row['low'])}, {format_value(row['high'])}]"
                is_best = policy in best.get(name, ())
                cells.append(Text(text + (" *" if is_best else "  "), style="bold green" if is_best else ""))
            label = Text(policy + (" (oracle)" if is_oracle else ""))
            table.add_row(label, *cells, style="dim" if is_oracle else None)
            if plain and policy == plain[-1]:
                table.add_section()
        console.print(table)
