"""Speeds of simulators, environments, trainer and decisions, beside the field's.

Everything is measured in CPU seconds of one process, after compilation, and the best of several repeats is given:
on a shared machine the others say more about the neighbours.

Examples:

  schedlab bench
  schedlab bench request_scheduling --json bench.json
  schedlab bench expert_caching --quick
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import tyro

from . import command
from .domain import DOMAINS


@dataclass
class Args:
    """Arguments of `schedlab bench`."""

    domain: Annotated[Literal["all", "request_scheduling", "expert_caching", "soc_dag"], tyro.conf.Positional] = "all"
    """What is scheduled."""
    json: Path | None = None
    """File for the rows."""
    repeats: int = 5
    """Each speed is the best of so many repeats."""
    quick: bool = False
    """Short lists and few repeats: to see that it works, not how fast."""
    seed: int = 0
    """Of length predictions, weights and environments."""
    data_dir: Path | None = None
    """Folder with trace files. Default: $SCHEDLAB_DATA, then the download cache."""


@dataclass(frozen=True)
class Row:
    """One figure beside its reference; `ratio` above 1 is better than the reference."""

    name: str
    value: float
    unit: str
    reference: str
    reference_value: float
    ratio: float
    detail: str


def faster(name: str, value: float, unit: str, reference: str, reference_value: float, detail: str) -> Row:
    """A row in which more is better."""
    return Row(name, value, unit, reference, reference_value, value / reference_value, detail)


def shorter(name: str, value: float, unit: str, reference: str, reference_value: float, detail: str) -> Row:
    """A row in which less is better."""
    return Row(name, value, unit, reference, reference_value, reference_value / value, detail)


def best_cpu_s(work: Callable[[], None], repeats: int) -> float:
    """CPU seconds of the fastest of some repeats."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


# ----------------------------------------------------------------------------------------------- command


def bench(args: Args) -> int:
    """Run `schedlab bench`."""
    from rich.table import Table

    from ..envs.core.errors import InputError
    from ..envs.core.results import atomic_path

    if args.repeats < 1:
        raise InputError(f"--repeats is {args.repeats}", remedy="Give at least 1")
    names = list(DOMAINS) if args.domain == "all" else [args.domain]
    modules = {name: import_module(f".bench_{name}", __package__) for name in names}
    num_rows = sum(module.NUM_ROWS for module in modules.values())
    found: list[Row] = []
    with command.progress("measuring", num_rows) as bar:
        for name, module in modules.items():
            for row in module.rows(args):
                found.append(replace(row, name=f"{name}/{row.name}"))
                bar(min(len(found), num_rows), row.name)
    table = Table("name", "value", "unit", "reference", "ratio", "how")
    for row in found:
        table.add_row(
            row.name if args.domain == "all" else row.name.partition("/")[2],
            f"{row.value:,.4g}" if row.value < 1000 else f"{row.value:,.0f}",
            row.unit,
            f"{row.reference} {row.reference_value:,.0f}",
            f"{row.ratio:.3g}",
            row.detail,
        )
    command.console().print(table)
    if args.json is not None:
        with atomic_path(args.json) as path:
            path.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
        command.say(f"wrote {args.json}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(Args, bench, argv, "bench", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
