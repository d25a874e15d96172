"""How much there is to win: per cell, the best deployable rule, the same with true lengths, and a hindsight reference.

The hindsight reference knows the whole trace: over the very requests it is judged on, with their true lengths, it
searches every published rule, the knob grid, and the `linear` family by the cross-entropy method. It is a policy that
was run, so it can be reached; it is not a proven optimum.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.progress import track

from ..agents.request_scheduling import CompiledPolicy
from ..baselines.request_scheduling import ORDER_NAMES, RULES, linear, ordered_rule
from ..envs.core.errors import InputError
from ..envs.core.kernel import njit
from ..envs.core.results import atomic_path, bootstrap_ci
from ..envs.request_scheduling.rule import Rule
from ..envs.request_scheduling.sim import Simulator, fast_forward, refresh_waiting, run_iteration, skip_idle
from ..envs.request_scheduling.state import empty_decision, reset_decision
from ..envs.request_scheduling.table import (
    Problem,
    action_of,
    choose,
    empty_table,
    open_table,
    visible_state,
    write_mask,
)
from ..envs.request_scheduling.workload import Workload
from .cells import Cell, all_cells
from .policies import find_policy

KNOB_ORDERS = ("fcfs", "srpt", "residual", "hopeless_last", "hopeless_last_srpt")
KNOB_BUDGETS = (512, 1024, 2048, 8192)
KNOB_CAPS = (48, 64, 96, 256)
SMALL_CAPS = (8, 16, 32)
"""Worth trying, too, where it is not known what the engine does best."""

LINEAR_START = np.array([1.0, 0.5, 0.05, 0.0, 0.2, 1.0, 10.5, 0.0, 0.5, 0.02, 0.2, 0.1, 0.0])
LINEAR_SPREAD = np.array([0.7, 0.7, 0.2, 0.7, 0.3, 2.0, 1.0, 1.5, 0.3, 0.05, 0.3, 0.2, 0.2])


def score(cell: Cell, rule: Rule, workloads: Iterable[Workload], *, on_table: bool = False) -> float:
    """Mean of the cell's metric over workloads, as a gain: higher is better (minus mean E2E seconds, or goodput).

    With `on_table` the rule acts through the action table, as an agent does.
    """
    simulator = Simulator(cell.spec, recording=False)
    gains = []
    for workload in workloads:
        simulator.reset(workload)
        if on_table:
            run_on_table(simulator, rule)
        else:
            simulator.run(rule)
        gains.append(gain_of(cell, simulator))
    return float(np.mean(gains))


def gain_of(cell: Cell, simulator: Simulator) -> float:
    """The cell's metric of a finished run, higher is better."""
    books = simulator.sim.books[0]
    if cell.metric == "slo_goodput":
        return float(books["slo_met"] / simulator.sim.trace["slo_weight"].sum())
    return float(-books["latency_s"] / len(simulator.workload))


def knob_rules(max_batch_tokens: int = KNOB_BUDGETS[-1], caps: Sequence[int] = KNOB_CAPS) -> list[Rule]:
    """The grid of the knob search: order x token budget (in shares of the largest batch) x most running."""
    budgets = [max(budget * max_batch_tokens // KNOB_BUDGETS[-1], 1) for budget in KNOB_BUDGETS]
    return [
        ordered_rule(
            f"knobs({order},{budget},{cap})", ORDER_NAMES.index(order), token_budget=budget, max_running=cap, ageing=0.0
        )
        for order, budget, cap in itertools.product(KNOB_ORDERS, budgets, caps)
    ]


def best_of(cell: Cell, rules: Sequence[Rule], workloads: Sequence[Workload]) -> tuple[Rule, float]:
    """The rule with the highest gain."""
    scores = [score(cell, rule, workloads) for rule in rules]
    best = int(np.argmax(scores))
    return rules[best], scores[best]


def linear_rule(params: np.ndarray, name: str = "linear") -> Rule:
    """A rule of the `linear` family."""
    return Rule(name, linear, tuple(float(p) for p in params), memory_per_request=1)


def search_linear(
    cell: Cell,
    workloads: Sequence[Workload],
    *,
    seed: int = 0,
    generations: int = 12,
    population: int = 24,
    elite: int = 6,
    start: np.ndarray | None = None,
    on_table: bool = False,
    report: Callable[[int, float], None] | None = None,
) -> tuple[np.ndarray, float]:
    """Cross-entropy search for the best `linear` parameters on these workloads. Returns (params, gain)."""
    rng = np.random.default_rng(seed)
    mean, spread = (LINEAR_START if start is None else start).copy(), LINEAR_SPREAD.copy()
    if cell.lower_is_better:  # no limit to meet: nobody is hopeless
        mean[4], spread[4] = -1e6, 0.0
    best, best_gain = mean.copy(), -np.inf
    for generation in range(generations):
        samples = mean + spread * rng.standard_normal((population, len(mean)))
        samples[0], samples[1] = mean, best
        samples[:, [0, 1, 7, 9, 10, 11]] = np.abs(samples[:, [0, 1, 7, 9, 10, 11]])
        gains = np.array([score(cell, linear_rule(sample), workloads, on_table=on_table) for sample in samples])
        order = np.argsort(-gains)[:elite]
        if gains[order[0]] > best_gain:
            best, best_gain = samples[order[0]].copy(), float(gains[order[0]])
        mean = 0.3 * mean + 0.7 * samples[order].mean(0)
        spread = 0.3 * spread + 0.7 * samples[order].std(0) + 0.02 * LINEAR_SPREAD
        if report:
            report(generation, best_gain)
    return best, best_gain


def hindsight(cell: Cell, workload: Workload, *, seed: int = 0, generations: int = 6) -> tuple[Rule, bool, float]:
    """The best policy found with the whole trace known. Returns (rule, acts on the table, gain)."""
    known = [workload.with_true_lengths()]
    slow = ("static_batching", "fastserve")  # and never near the front
    published = [rule for name, rule in RULES.items() if name not in slow]
    rule, gain = best_of(cell, [*knob_rules(), *published], known)
    found = [(rule, False, gain)]
    for on_table in (False, True):
        start = None if len(found) == 1 else np.array(found[-1][0].params)
        params, gain = search_linear(
            cell,
            known,
            seed=seed,
            generations=generations if start is None else 3,
            population=16,
            start=start,
            on_table=on_table,
        )
        found.append((linear_rule(params, "hindsight"), on_table, gain))
    return max(found, key=lambda entry: entry[2])


@njit
def _run_on_table(sim, problem, table, mask, engine, waiting, decide, params, memory, wanted, decision):
    while skip_idle(sim):
        if fast_forward(sim) > 0:
            continue
        refresh_waiting(sim)
        if not open_table(sim.state, problem, table, decision):
            reset_decision(sim.state, decision)
            run_iteration(sim, decision)
            continue
        reset_decision(sim.state, wanted)
        decide(visible_state(sim.state, table, engine, waiting), params, memory, wanted)
        picks = 0
        while True:
            write_mask(sim.state, problem, table, mask)
            action = action_of(sim.state, problem, table, mask, wanted, picks)
            if choose(sim.state, problem, table, decision, action):
                break
            picks = table.head[0].num_picked
        run_iteration(sim, decision)


def run_on_table(simulator: Simulator, rule: Rule) -> None:
    """Serve the workload as an agent would that imitates `rule` perfectly: by choosing rows of the action table."""
    spec, n = simulator.spec, len(simulator.workload)
    _run_on_table(
        simulator.sim,
        Problem.of(spec),
        empty_table(spec.num_candidates),
        np.zeros(spec.num_candidates, np.bool_),
        np.zeros_like(simulator.sim.state.engine),
        np.zeros_like(simulator.sim.state.waiting),
        rule.decide_kernel,
        rule.param_array,
        rule.new_memory(n),
        empty_decision(n),
        empty_decision(n),
    )


NUM_SEEDS = 5


READ_PREDICTIONS = ("sjf", "srpt", "srpt_preemptive", "learning_to_rank")
"""Rules that do better, or at least differ, with true lengths."""


def measure_cell(cell: Cell, num_seeds: int = NUM_SEEDS, num_finalists: int = 3) -> dict[str, Any]:
    """Everything the headroom table says of one cell but the agent: rules, knob search, true lengths, hindsight.

    Every rule is run on the first seed; the best of them, and the winner of the knob search on training requests, on
    all seeds. The bar is the best of these by what it reached on the test requests themselves.
    """
    tests = [cell.test_workload(seed) for seed in range(num_seeds)]
    known = [test.with_true_lengths() for test in tests]
    first = {name: score(cell, rule, tests[:1]) for name, rule in RULES.items()}
    knobs, _ = best_of(cell, knob_rules(), cell.train_workloads()[:2])
    finalists = [RULES[name] for name in sorted(first, key=first.__getitem__)[-num_finalists:]] + [knobs]
    rules = {rule.name: [score(cell, rule, [test]) for test in tests] for rule in finalists}
    informed = [RULES[name] for name in READ_PREDICTIONS] + [knobs, *finalists[:-1]]
    with_truth = {rule.name: [score(cell, rule, [test]) for test in known] for rule in informed}
    rule, on_table, _ = hindsight(cell, tests[0])
    best_truth = max(with_truth, key=lambda name: float(np.mean(with_truth[name])))
    return {
        "cell": cell.name,
        "first_seed": first,
        "rules": rules,
        "best_rule": max(rules, key=lambda name: float(np.mean(rules[name]))),
        "true_lengths_rule": best_truth,
        "true_lengths": with_truth[best_truth],
        "hindsight_rule": rule.name,
        "hindsight_params": list(rule.params),
        "hindsight_on_table": on_table,
        "hindsight": [score(cell, rule, [test], on_table=on_table) for test in known],
    }


def measure_agent(cell: Cell, policy: CompiledPolicy, num_seeds: int = NUM_SEEDS) -> dict[str, Any]:
    """Gains of a learned policy on the cell's test requests, and the longest wait for a first token, in seconds."""
    simulator = Simulator(cell.spec, recording=False)
    gains, waits = [], []
    for seed in range(num_seeds):
        simulator.reset(cell.test_workload(seed))
        policy.run(simulator)
        gains.append(gain_of(cell, simulator))
        waits.append(_longest_wait_s(simulator))
    return {"gains": gains, "longest_wait_s": max(waits)}


def _longest_wait_s(simulator: Simulator) -> float:
    requests = simulator.sim.state.requests
    return float(np.nanmax(requests["first_token_s"] - requests["arrival_s"]))


def table_rows(folder: Path, cells: Sequence[Cell], agent: str | None) -> list[dict[str, Any]]:
    """One row a cell of what is in `folder`, with the agent (name or checkpoint) if given. Gains as metrics."""
    rows = []
    for cell in track(cells, description="agent"):
        path = folder / f"{cell.name.replace('/', '_')}.json"
        if not path.exists():
            continue
        measured = json.loads(path.read_text())
        sign = -1.0 if cell.lower_is_better else 1.0
        best = np.array(measured["rules"][measured["best_rule"]])
        bound = np.array(measured["hindsight"])
        gap = float(bound.mean() - best.mean())
        row = {
            "cell": cell.name,
            "best rule": measured["best_rule"],
            "rule": sign * best.mean(),
            "true lengths": sign * np.mean(measured["true_lengths"]),
            "hindsight": sign * bound.mean(),
            "gap_percent": 100.0 * gap / abs(best.mean()),
        }
        if agent is not None:
            policy = find_policy(agent, cell.spec)
            if not isinstance(policy, CompiledPolicy):
                raise InputError(f"{agent!r} is not a compiled agent", remedy="Give `agent` or a deepsets checkpoint")
            got = measure_agent(cell, policy, len(best))
            gains = np.array(got["gains"])
            low, high = bootstrap_ci((gains - best) / max(gap, 1e-9))
            row |= {
                "agent": sign * gains.mean(),
                "agent_percent": 100.0 * (gains.mean() - best.mean()) / abs(best.mean()),
                "share": (gains.mean() - best.mean()) / max(gap, 1e-9),
                "share_low": low,
                "share_high": high,
                "longest_wait_s": got["longest_wait_s"],
            }
        rows.append(row)
    return rows


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown. In cells with a gap of at most 2% (closed), the share says nothing and is left out."""
    lines = [
        "| cell | best deployable rule | its value | true lengths | hindsight | gap | agent | against the rule "
        "| share of the gap closed | longest wait |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        text = (
            f"| {row['cell']} | {row['best rule']} | {row['rule']:.3f} | {row['true lengths']:.3f} "
            f"| {row['hindsight']:.3f} | {row['gap_percent']:.1f}%"
        )
        if "agent" in row:
            share = f"{row['share']:.2f} [{row['share_low']:.2f}, {row['share_high']:.2f}]"
            text += (
                f" | {row['agent']:.3f} | {row['agent_percent']:+.1f}% "
                f"| {share if row['gap_percent'] > CLOSED_PERCENT else 'closed'} | {row['longest_wait_s']:.0f} s"
            )
        lines.append(text + " |")
    return "\n".join(lines)


CLOSED_PERCENT = 2.0
"""Cells with a smaller gap are closed: there an agent must only not be worse."""


@dataclass(frozen=True)
class Config:
    """Measure the headroom of every cell, and what an agent makes of it; resumes where it stopped."""

    out: Path = Path("results/headroom")
    """Folder of one JSON file a cell, and of the table."""
    only: str = ""
    """Only cells whose name contains this."""
    agent: str | None = None
    """`agent` (the shipped one) or a checkpoint folder, to be put beside."""
    measure: bool = True
    """Measure what is missing; else only print what is there."""


def main(config: Config) -> None:
    """Write what is missing, then print the table and write it as Markdown and CSV."""
    config.out.mkdir(parents=True, exist_ok=True)
    cells = [cell for cell in all_cells() if config.only in cell.name]
    for cell in track(cells, description="headroom") if config.measure else ():
        path = config.out / f"{cell.name.replace('/', '_')}.json"
        if not path.exists():
            text = json.dumps(measure_cell(cell), indent=1)
            with atomic_path(path) as temporary:
                temporary.write_text(text)
    rows = table_rows(config.out, cells, config.agent)
    table = as_markdown(rows)
    print(table)
    with atomic_path(config.out / "table.md") as temporary:
        temporary.write_text(table + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
