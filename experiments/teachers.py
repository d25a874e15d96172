"""The teachers of the shipped agent: per cell, a `linear` rule found by search on training requests alone.

The agent imitates them all at once. It is not told the cell: it must see from the state what kind of traffic, load and
objective it serves, and then do what the searched rule of such a cell would do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import tyro
from rich.progress import track

from ..envs.core.results import atomic_path
from ..envs.request_scheduling.rule import Rule
from .cells import OBJECTIVES, TRACES, Cell
from .headroom import linear_rule, search_linear

FILE = "request_scheduling_teachers.json"
LOAD_ORDER = (1.1, 1.3, 0.9, 0.7)
"""The first is searched at length, the others start from what it found."""


@dataclass(frozen=True)
class Config:
    """Search the teachers of every cell; resumes where it stopped."""

    out: Path = Path("results") / FILE
    """File of all teachers; the shipped ones stand beside this module."""
    only: str = ""
    """Only traces and objectives whose "trace/objective" contains this."""
    seed: int = 0


def load_teachers(path: Path | None = None) -> dict[str, Rule]:
    """Teacher of each cell by name: those shipped, or those in a file that `main` wrote."""
    text = path.read_text() if path else (files(__package__) / FILE).read_text()
    return {name: linear_rule(np.array(entry["params"]), name) for name, entry in json.loads(text).items()}


def main(config: Config) -> None:
    """Search what is missing in `config.out`."""
    found: dict[str, dict] = json.loads(config.out.read_text()) if config.out.exists() else {}
    families = [(t, o) for t in TRACES for o in OBJECTIVES if config.only in f"{t}/{o}"]
    for trace, objective in track(families, description="teachers"):
        start: np.ndarray | None = None
        for load in LOAD_ORDER:
            cell = Cell(trace, load, objective)
            if cell.name not in found:
                params, gain = search_linear(
                    cell, cell.train_workloads(), seed=config.seed, generations=10 if start is None else 5, start=start
                )
                found[cell.name] = {"params": [round(float(p), 4) for p in params], "train_gain": round(gain, 4)}
                with atomic_path(config.out) as temporary:
                    temporary.write_text(json.dumps(found, indent=1))
            start = np.array(found[cell.name]["params"]) if start is None else start


if __name__ == "__main__":
    main(tyro.cli(Config))
