"""The teachers of the shipped agent: per cell, a rule found by search on training requests alone.

The agent imitates them all at once. It is not told the cell: it must see from the state what kind of traffic, load and
objective it serves, and then do what the searched rule of such a cell would do. A teacher acts through the action
table, as the agent will, so that is how it is chosen: among the `linear` rule that the cross-entropy search found, the
one found for the load searched first, and the best of the knob grid, whichever does best there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.progress import track

from ..baselines.request_scheduling import linear, ordered
from ..envs.core.results import atomic_path
from ..envs.request_scheduling.rule import Rule
from .cells import OBJECTIVES, TRACES, Cell
from .engine_cells import ENGINE_LOADS, ENGINE_TRACES, KV_BLOCKS, EngineCell
from .headroom import KNOB_CAPS, LINEAR_START, SMALL_CAPS, knob_rules, linear_rule, score, search_linear

FILE = "request_scheduling_teachers.json"
LOAD_ORDER = (1.1, 1.3, 0.9, 0.7)
"""The first is searched at length, the others start from what it found."""
TOLERANCE = 0.01
"""A family shares the teacher of its first load where that costs less than this share of the gain: an agent that must
guess the load imitates one rule better than two that are nearly as good."""
KERNELS = {"linear": linear, "ordered": ordered}


@dataclass(frozen=True)
class Config:
    """Search the teachers of every cell; resumes where it stopped."""

    out: Path = Path("results") / FILE
    """File of all teachers; the shipped ones stand beside this module."""
    only: str = ""
    """Only families with a cell whose name contains this."""
    seed: int = 0


def load_teachers(path: Path | None = None) -> dict[str, Rule]:
    """Teacher of each cell by name: those shipped, or those in a file that `main` wrote."""
    text = path.read_text() if path else (files(__package__) / FILE).read_text()
    return {name: _rule(name, entry) for name, entry in json.loads(text).items()}


def _rule(name: str, entry: dict[str, Any]) -> Rule:
    return Rule(name, KERNELS[entry["kernel"]], tuple(entry["params"]), memory_per_request=1)


def families() -> list[list[Any]]:
    """Cells that differ in load alone, the first of each the one to be searched at length."""
    full_size = [[Cell(trace, load, objective) for load in LOAD_ORDER] for trace in TRACES for objective in OBJECTIVES]
    engine = [
        [EngineCell(trace, load, objective, kv_blocks) for load in ENGINE_LOADS]
        for kv_blocks in KV_BLOCKS
        for trace in ENGINE_TRACES
        for objective in OBJECTIVES
    ]
    return full_size + engine


def choose_teacher(cell: Any, searched: Sequence[np.ndarray], num_knobs: int = 4) -> dict[str, Any]:
    """The best of the searched `linear` rules and the knob grid's best, all on the table, on training requests."""
    workloads = cell.train_workloads()
    caps = SMALL_CAPS + KNOB_CAPS if isinstance(cell, EngineCell) else KNOB_CAPS
    knobs = knob_rules(cell.spec.engine.max_batch_tokens, caps)
    directly = [score(cell, rule, workloads[-1:]) for rule in knobs]
    finalists = [linear_rule(params) for params in searched] + [knobs[i] for i in np.argsort(directly)[-num_knobs:]]
    gains = [score(cell, rule, workloads, on_table=True) for rule in finalists]
    best = int(np.argmax(gains))
    return {
        "kernel": "linear" if best < len(searched) else "ordered",
        "params": [round(float(p), 4) if np.isfinite(p) else float(p) for p in finalists[best].params],
        "train_gain": round(gains[best], 4),
    }


def search_family(cells: Sequence[Any], seed: int, found: dict[str, Any], save: Any) -> None:
    """Search what is missing in `found`, and save after each cell."""
    start: np.ndarray | None = None
    for cell in cells:
        if cell.name not in found:
            first = cell.search_start(LINEAR_START) if isinstance(cell, EngineCell) else LINEAR_START
            searched, _ = search_linear(
                cell,
                cell.train_workloads(),
                seed=seed,
                generations=10 if start is None else 5,
                start=first if start is None else start,
                on_table=isinstance(cell, EngineCell),
            )
            candidates = [searched] if start is None else [searched, start]
            found[cell.name] = choose_teacher(cell, candidates) | {"searched": [round(float(p), 4) for p in searched]}
            save()
        start = np.array(found[cell.name]["searched"]) if start is None else start


def share_first(cells: Sequence[Any], found: dict[str, Any]) -> None:
    """Give the teacher of the first cell to the others where it is nearly as good there, on training requests."""
    first = found[cells[0].name]
    for cell in cells[1:]:
        entry, workloads = found[cell.name], cell.train_workloads()
        gain = score(cell, _rule(cells[0].name, first), workloads, on_table=True)
        if gain > entry["train_gain"] - TOLERANCE * abs(entry["train_gain"]):
            entry |= {"kernel": first["kernel"], "params": first["params"], "train_gain": round(gain, 4)}


def main(config: Config) -> None:
    """Search what is missing in `config.out`."""
    found: dict[str, Any] = json.loads(config.out.read_text()) if config.out.exists() else {}

    def save() -> None:
        with atomic_path(config.out) as temporary:
            temporary.write_text(json.dumps(found, indent=1))

    wanted = [cells for cells in families() if any(config.only in cell.name for cell in cells)]
    for cells in track(wanted, description="teachers"):
        search_family(cells, config.seed, found, save)
        share_first(cells, found)
        save()


if __name__ == "__main__":
    main(tyro.cli(Config))
