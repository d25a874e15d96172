"""Is the simulator right? The same requests under the same policies, in the simulator and on a real engine.

The simulator runs with a cost model fitted to random schedules of random requests and of the trace's training part:
neither the requests nor the policies here took part. Without `--cost-model` it is measured here, in runs between those
of the comparison: the speed of a shared machine drifts by more than the simulator errs, and both sides must be averaged
over the same drift.
Two patterns of arrival: a burst (all at once: small differences of timing change little) and Poisson. For each metric
the table shows the simulator's relative error beside the standard deviation of the engine's repeats, and, over the
policies, whether both rank them alike: Kendall's tau, and the share of pairs with the same winner where the gap is not
noise.

Examples:

  schedlab fidelity experts --help
  schedlab fidelity threads --help
  schedlab fidelity hf --json fidelity.json
  schedlab fidelity hf --cost-model cost.json --window 60 --repeats 2 --policies fcfs sarathi_512 srpt hopeless_last
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from ..envs.core.errors import InputError
from . import command
from .domain import serve
from .request_scheduling import find_policies, open_engine

if TYPE_CHECKING:
    from ..envs.core.interface import Policy
    from ..envs.request_scheduling.workload import Workload
    from .scenario import Scenario

METRICS = (
    "mean_e2e_s",
    "p50_e2e_s",
    "p90_e2e_s",
    "p99_e2e_s",
    "mean_ttft_s",
    "p99_ttft_s",
    "mean_tpot_s",
    "makespan_s",
)
"""What is compared."""
RANKED = ("mean_e2e_s", "p90_e2e_s", "mean_ttft_s", "p99_ttft_s")
"""Metrics by which policies are ranked."""
POLICIES = (
    "static_batching",
    "orca",
    "fcfs",
    "sarathi_512",
    "sarathi_2048",
    "sjf_prompt",
    "srpt",
    "learning_to_rank",
    "hopeless_last",
    "fastserve",
)


@dataclass
class Args:
    """Arguments of `schedlab fidelity`."""

    backend: Annotated[Literal["hf"], tyro.conf.Positional] = "hf"
    """The engine: Hugging Face transformers' continuous batching."""
    policies: tuple[str, ...] = POLICIES
    """Policies to compare; ranks say little for fewer than eight."""
    workload: str = "azure_conv"
    """Name of a trace or a trace file; requests are from its test part."""
    window: int = 150
    """Requests in a run."""
    load: float = 1.3
    """Load of the Poisson arrivals: near 1 policies are too alike for an engine's noise to rank them."""
    repeats: int = 6
    """Runs of each policy on the engine."""
    json: Path | None = None
    """File for all figures."""
    cost_model: Path | None = None
    """Cost model of the engine, as written by `schedlab calibrate hf`. Without it one is measured in between."""
    length_scale: float = 16
    """Tokens of the trace for one token of the small engine."""
    model: Path | None = None
    """Folder of a local model. Default: a small Llama with random weights."""
    device: str = "cpu"
    """Where the model runs."""
    seed: int = 0
    """Draws the window, the predictions and the arrivals."""
    data_dir: Path | None = None
    """Folder with trace files. Default: $SCHEDLAB_DATA, then the download cache."""


def arrivals(scenario: Scenario, seed: int) -> dict[str, Workload]:
    """The requests of a seed, all at once, and by a Poisson process at the scenario's load."""
    from dataclasses import replace

    workload = scenario.draw(seed)
    gaps = np.random.default_rng(seed).exponential(size=len(workload))
    times = np.concatenate(([0.0], np.cumsum(gaps[1:])))
    rate = len(workload) / float(workload.arrival_s[-1])
    return {
        "burst": replace(workload, arrival_s=np.zeros(len(workload))),
        "poisson": replace(workload, arrival_s=times).at_rate(rate),
    }


def measure(backend: Any, policy: Policy, workload: Workload, seed: int) -> dict[str, float]:
    """The compared metrics of one run."""
    from ..envs.request_scheduling.metrics import compute_metrics

    timeline: Any = serve(backend, policy, workload, seed).timeline
    metrics = compute_metrics(timeline)
    return {name: metrics[name] for name in METRICS}


def compare(simulated: Mapping[str, float], measured: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """metric -> simulator, engine (mean of the repeats), relative error, and spread: of one repeat, relative."""
    rows = {}
    for name in METRICS:
        values = np.array([run[name] for run in measured])
        mean = float(values.mean())
        rows[name] = {
            "simulator": simulated[name],
            "engine": mean,
            "error": simulated[name] / mean - 1,
            "spread": float(values.std(ddof=1) / mean) if len(values) > 1 else 0.0,
        }
    return rows


def ranks(rows: Mapping[str, Mapping[str, Mapping[str, float]]], metric: str, repeats: int) -> dict[str, float]:
    """Kendall's tau over the policies, and the share of pairs with the same winner where the gap is not noise.

    A gap is clear of the noise if it exceeds two standard errors of the difference of the engine's means.
    """
    from scipy.stats import kendalltau

    cells = [row[metric] for row in rows.values()]
    tau = kendalltau([c["simulator"] for c in cells], [c["engine"] for c in cells]).statistic
    same = clear = 0
    for a, b in itertools.combinations(cells, 2):
        gap = a["engine"] - b["engine"]
        noise = np.hypot(a["engine"] * a["spread"], b["engine"] * b["spread"]) / np.sqrt(repeats)
        if abs(gap) > 2 * noise:
            clear += 1
            same += (a["simulator"] - b["simulator"]) * gap > 0
    return {"kendall_tau": float(tau), "same_sign": same / clear if clear else float("nan"), "clear_pairs": clear}


def fidelity(args: Args) -> int:
    """Run `schedlab fidelity`."""
    from ..envs.core.results import atomic_path
    from ..envs.request_scheduling.sim import Simulator
    from ..envs.request_scheduling.spec import CostModel
    from ..real_backend.calibrate import Calibration
    from .calibrate import measure_pass
    from .policies import find_policy
    from .scenario import build_scenario

    if args.repeats < 1 or len(args.policies) < 2:
        raise InputError(
            f"{args.repeats} repeats of {len(args.policies)} policies", remedy="Give at least 1 repeat and 2 policies"
        )
    wanted: dict[str, Any] = dict(load=args.load, requests=args.window, part="test", data_dir=args.data_dir)
    plain = build_scenario(args.workload, **wanted)
    for name in args.policies:
        find_policy(name, plain.policy_spec)
    engine = open_engine(args.length_scale, args.model, args.device, args.workload, args.data_dir)
    training = plain.training.scale_lengths(1 / args.length_scale)
    calibration = Calibration(engine, args.seed + 1, num_iterations=1500, requests=training)
    if args.cost_model is None:
        measure_pass(calibration, "first calibration")
        cost = calibration.fit()[0]
    else:
        cost = CostModel.load(args.cost_model)
    scenario = build_scenario(args.workload, **wanted, cost=cost, length_scale=args.length_scale)
    engine.slo_classes = scenario.spec.slo_classes
    policies = find_policies(args.policies, scenario)
    patterns = arrivals(scenario, args.seed)
    command.say(next(iter(patterns.values())).source)

    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    with command.progress("comparing", len(patterns) * len(policies) * args.repeats) as bar:
        count = 0
        measured: dict[tuple[str, str], list[dict[str, float]]] = {}
        for repeat in range(args.repeats):  # in passes over all, so that a slow minute of the machine hits no one alone
            to_calibrate = calibration.measure_runs() if args.cost_model is None else iter(())
            for (pattern, workload), policy in itertools.product(patterns.items(), policies):
                bar(count, f"{pattern} arrivals, {policy.name}, pass {repeat + 1}")
                measured.setdefault((pattern, policy.name), []).append(measure(engine, policy, workload, repeat))
                count += 1
                next(to_calibrate, None)
                next(to_calibrate, None)
            for _ in to_calibrate:
                bar(count, f"calibrating, pass {repeat + 1}")
    if args.cost_model is None:
        cost = calibration.fit()[0]
        command.say(cost.source)
    simulator = Simulator(scenario.spec.replace(cost=cost))
    for pattern, workload in patterns.items():
        found[pattern] = {}
        for policy in policies:
            simulated = measure(simulator, policy, workload, 0)
            found[pattern][policy.name] = compare(simulated, measured[pattern, policy.name])
    engine.close()
    ranking = {
        pattern: {metric: ranks(rows, metric, args.repeats) for metric in RANKED} for pattern, rows in found.items()
    }
    show(found, ranking)
    if args.json is not None:
        about = {
            "workload": scenario.workload,
            "instance": scenario.instance,
            "repeats": args.repeats,
            "spec": simulator.spec.to_dict(),
        }
        with atomic_path(args.json) as path:
            path.write_text(json.dumps(about | {"runs": found, "ranks": ranking}, indent=1) + "\n")
        command.say(f"wrote {args.json}")
    return 0


def show(
    found: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]],
    ranking: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> None:
    """Print, per pattern of arrivals, the errors beside the engine's spread, and the ranks."""
    from rich.table import Table

    console = command.console()
    for pattern, rows in found.items():
        title = f"{pattern} arrivals: error of the simulator (standard deviation of the engine's repeats)"
        table = Table(title=title, title_justify="left")
        table.add_column("policy")
        for name in METRICS:
            table.add_column(name, justify="right")
        for policy, row in rows.items():
            cells = (f"{row[name]['error']:+.1%} ({row[name]['spread']:.1%})" for name in METRICS)
            table.add_row(policy, *cells)
        table.add_section()
        medians = {name: np.median([abs(row[name]["error"]) for row in rows.values()]) for name in METRICS}
        spreads = {name: np.median([row[name]["spread"] for row in rows.values()]) for name in METRICS}
        table.add_row("median", *(f"{medians[name]:.1%} ({spreads[name]:.1%})" for name in METRICS))
        console.print(table)
        for metric, rank in ranking[pattern].items():
            console.print(
                f"  {metric}: Kendall tau {rank['kendall_tau']:.2f} over {len(rows)} policies; same winner in "
                f"{rank['same_sign']:.0%} of {rank['clear_pairs']} pairs whose gap exceeds the noise"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["experts"]:
        from .fidelity_experts import main as fidelity_experts

        return fidelity_experts(given[1:])
    if given[:1] == ["threads"]:
        from .fidelity_threads import main as fidelity_threads

        return fidelity_threads(given[1:])
    return command.run(Args, fidelity, given, "fidelity", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
