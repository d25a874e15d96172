"""The teachers of the shipped agent: per cell, a rule found by search on training requests alone.

The agent imitates them all at once. It is not told the cell: it must see from the state what kind of traffic, load and
objective it serves, and then do what the searched rule of such a cell would do. A teacher acts through the action
table, as the agent will, so that is how it is chosen: among the `linear` rule that the cross-entropy search found, the
one found for the load searched first, and the best of the knob grid, whichever does best there.

Mooncake's prompts are long and its memory never binds: there a rule of another family, `paced`, teaches all loads, with
one class of service. (With two, at overload, it costs 20% of the goodput of training requests.)
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

from ..baselines.request_scheduling import RESIDUAL, linear, ordered, ordered_rule, predicted_remaining, residual_prompt
from ..envs.core.kernel import njit
from ..envs.core.results import atomic_path
from ..envs.request_scheduling.rule import Rule, pick_smallest
from .cells import OBJECTIVES, TRACES, Cell
from .engine_cells import ENGINE_LOADS, ENGINE_TRACES, KV_BLOCKS, EngineCell
from .headroom import KNOB_CAPS, LINEAR_START, SMALL_CAPS, knob_rules, linear_rule, score, search_linear

FILE = "request_scheduling_teachers.json"
LOAD_ORDER = (1.1, 1.3, 0.9, 0.7)
"""The first is searched at length, the others start from what it found."""
TOLERANCE = 0.01
"""A family shares the teacher of its first load where that costs less than this share of the gain: an agent that must
guess the load imitates one rule better than two that are nearly as good."""
PACED_FAMILIES = (("mooncake_synthetic", "mean_e2e"), ("mooncake_synthetic", "goodput"))
"""Trace and objective."""
PACED_START = np.array([0.2, 0.0, 0.16, 0.0, 9.2, 0.18, 1.0, 0.0, 64.0])
PACED_SPREAD = np.array([0.3, 0.03, 0.02, 0.03, 0.25, 0.07, 0.7, 0.6, 0.0])


@njit
def paced(state, params, memory, decision):
    """Least prefill first, those that cannot meet their limit last, with a token budget that follows the queue.

    A small budget keeps decodes fast while few wait, a large one spends less on the constant of an iteration. Who is
    hopeless is told with the seconds of the own prefill, which for long prompts are most of a limit.

    params: 0 weight of the predicted output; 1 tokens of credit (in 1,000) per TTFT limit waited; 2 seconds of prefill
    of 1,000 tokens; 3 margin before the limit, in limits (-1e6: nobody is hopeless); 4 log2 of the token budget, 5 what
    it gains when the queue doubles, 6 log2 of the queue where that begins; 7 budget given back per decoding request;
    8 most running requests.
    """
    engine, levers = state.engine[0], decision.levers[0]
    growth = max(np.log2(1.0 + engine.num_waiting) - params[6], 0.0)
    budget = 2.0 ** (params[4] + params[5] * growth) - params[7] * engine.num_decoding
    levers.prefill_tokens = int(min(max(budget, 64.0), 1e9))
    levers.max_running = int(params[8])
    levers.admit_rest = 0
    keys = memory[: engine.num_waiting]
    for i in range(engine.num_waiting):
        row = state.requests[state.waiting[i]]
        thousands, waited_s = 1e-3 * residual_prompt(row), engine.now_s - row.arrival_s
        late = waited_s + params[2] * thousands > (1.0 - params[3]) * row.ttft_slo_s
        keys[i] = thousands + params[0] * 1e-3 * predicted_remaining(row) - params[1] * waited_s / row.ttft_slo_s
        keys[i] += 1e6 if late and row.generated_tokens == 0 else 0.0
    pick_smallest(state, keys, decision, levers.prefill_tokens)


KERNELS = {"linear": linear, "ordered": ordered, "paced": paced}


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
    return _entry("linear" if best < len(searched) else "ordered", finalists[best], gains[best])


def _entry(kernel: str, rule: Rule, gain: float) -> dict[str, Any]:
    params = [round(float(p), 4) if np.isfinite(p) else float(p) for p in rule.params]
    return {"kernel": kernel, "params": params, "train_gain": round(gain, 4)}


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


def search_paced(
    cells: Sequence[Any], seed: int, generations: int = 3, population: int = 10, elite: int = 4
) -> tuple[Rule, float]:
    """Cross-entropy search for the `paced` rule that serves all loads of a family. Returns (rule, what it is worth).

    Its worth is the gain over residual SJF with a budget of 512, as a share of that, on the table and also with other
    output lengths: the mean, and the least over the windows of a load at a third of the weight. A schedule is chaotic:
    a rule that is good on average only is not to be trusted with requests to come.
    """
    rng = np.random.default_rng(seed)
    workloads = {cell.name: [*cell.train_workloads(), *cell.train_workloads(1)] for cell in cells}
    plain = ordered_rule("residual", RESIDUAL, token_budget=512, max_running=48, ageing=0.0)

    def gains(rule: Rule) -> np.ndarray:
        return np.array([[score(c, rule, [w], on_table=True) for w in workloads[c.name]] for c in cells])

    bar = gains(plain)

    def worth(params: np.ndarray) -> float:
        shares = (gains(Rule("paced", paced, tuple(params), memory_per_request=1)) - bar) / np.abs(bar)
        return float(shares.mean() + 0.3 * shares.min(1).mean())

    mean, spread = PACED_START.copy(), PACED_SPREAD.copy()
    if cells[0].lower_is_better:  # no limit to meet: nobody is hopeless
        mean[3], spread[3] = -1e6, 0.0
    best, most = mean, -np.inf
    for _ in range(generations):
        samples = mean + spread * rng.standard_normal((population, len(mean)))
        samples[0], samples[1] = mean, best
        samples[:, [0, 2, 5, 7]] = np.abs(samples[:, [0, 2, 5, 7]])
        worths = np.array([worth(sample) for sample in samples])
        order = np.argsort(-worths)[:elite]
        if worths[order[0]] > most:
            best, most = samples[order[0]].copy(), worths[order[0]]
        mean = 0.3 * mean + 0.7 * samples[order].mean(0)
        spread = 0.4 * spread + 0.6 * samples[order].std(0)
    return Rule("paced", paced, tuple(float(p) for p in best), memory_per_request=1), float(most)


def main(config: Config) -> None:
    """Search what is missing in `config.out`."""
    found: dict[str, Any] = json.loads(config.out.read_text()) if config.out.exists() else {}

    def save() -> None:
        with atomic_path(config.out) as temporary:
            temporary.write_text(json.dumps(found, indent=1))

    wanted = [cells for cells in families() if any(config.only in cell.name for cell in cells)]
    for cells in track(wanted, description="teachers"):
        if isinstance(cells[0], Cell) and (cells[0].trace, cells[0].objective) in PACED_FAMILIES:
            rule, _ = search_paced(cells, config.seed)
            for cell in cells:
                found[cell.name] = _entry("paced", rule, score(cell, rule, cell.train_workloads(), on_table=True))
        else:
            search_family(cells, config.seed, found, save)
            share_first(cells, found)
        save()


if __name__ == "__main__":
    main(tyro.cli(Config))
