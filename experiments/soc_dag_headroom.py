"""How much there is to win in scheduling task graphs, and what the agent makes of it: per cell the best rule, a bound
or a hindsight reference, the agent, and the share of the gap that it closes.

  python -m schedlab.experiments.soc_dag_headroom single     # single graphs: CP-SAT
  python -m schedlab.experiments.soc_dag_headroom noise      # single graphs with lognormal noise: plans in hindsight
  python -m schedlab.experiments.soc_dag_headroom streams    # deadlines, energy-delay, latency: rules in hindsight
  python -m schedlab.experiments.soc_dag_headroom ds3        # DS3's mix at every gap and noise: every metric

Seeds are paired: every policy has the same jobs, arrivals and noise. Intervals are 95% bootstrap intervals over seeds
(single graphs: over graphs). What is measured is kept in `--out`, so that a run that was stopped goes on; what depends
on the agent, in a folder there that is named by its weights, so that a new agent does not cost the rules again.

Single graphs: the reference is CP-SAT's schedule within `--seconds` on one core, begun from the best schedule known,
the agent's among them; so a gap is at least as large as said where the optimum is not proven. With noise: the same with
the durations known before. Streams: on each seed the best of a few rolling horizons with all arrivals and durations
known (`agents/soc_dag_hindsight.py`), played by late SRPT and by the rule of least loss over the very jobs and noise
that it is judged on (`soc_dag_search`), and of that rule itself: these are schedules that are possible, not proven
optima.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from ..agents.soc_dag import SHIPPED, PointerScheduling, load_pointer, sampled_plans
from ..agents.soc_dag_hindsight import HindsightScheduling
from ..agents.soc_dag_rollout import RolloutScheduling
from ..baselines.soc_climb import MOVES, best_climbed, climb_from_static
from ..baselines.soc_dag import RULES
from ..baselines.soc_justify import justified
from ..baselines.soc_linear import linear_rule
from ..baselines.soc_static import STATIC, placement_rule, plan_rule
from ..envs.core.errors import InputError
from ..envs.core.results import atomic_path, bootstrap_ci
from ..envs.soc_dag.catalog import workflow_graphs
from ..envs.soc_dag.generate import cpu_gpu_soc, random_layered, tiled
from ..envs.soc_dag.library import Graph, Plan
from ..envs.soc_dag.metrics import compute_metrics
from ..envs.soc_dag.rule import Rule
from ..envs.soc_dag.sim import Simulator, duration_us
from ..envs.soc_dag.spec import NOISES, Soc, SocDagSpec, uniform_soc
from ..envs.soc_dag.workload import Dag, Workload, noise_draws
from .domain import weights_digest
from .soc_dag_presets import single, single_spec
from .soc_dag_search import StreamCell, rule_loss, search_linear

ONLINE = ("eft", "heft_rt", "min_min", "max_min", "late_fifo", "late_rank", "late_srpt", "late_laxity", "eager_srpt")
"""Rules that streams are run under; the best of them is the bar."""
OF_MIX = ("met", "eft", "etf", "heft_rt", "late_fifo", "late_rank", "late_srpt", "eager_srpt")
"""Rules of the table of DS3's mix."""
JUSTIFIED = "these, justified"
"""The best of the static schedulers' plans, each justified."""
HORIZONS = (6, 12)
"""Jobs to come that are known, in hindsight."""
CLOSED = 0.02
"""A smaller gap says that there is nothing to win: there the agent must only not be worse."""


# ---------------------------------------------------------------------------------------------------- single graphs


def single_graphs(quick: bool) -> dict[str, list[tuple[Soc, Dag]]]:
    """The graphs of every cell; workflows where the data folder has them."""
    count, four = (4 if quick else 20), uniform_soc(4)
    cells: dict[str, list[tuple[Soc, Dag]]] = {}
    for name, ccr in (("random 20-50 x 4", 1.0), ("random, CCR 0.2", 0.2), ("random, CCR 4", 4.0)):
        rng = np.random.default_rng([7, round(10 * ccr)])
        number = count if ccr == 1.0 else count // 2
        cells[name] = [(four, random_layered(int(rng.integers(20, 51)), 4, ccr=ccr, seed=rng)) for _ in range(number)]
    for name in ("cholesky", "lu", "qr"):
        cells[f"{name} T=8"] = [(cpu_gpu_soc(), tiled(name, 8))]
    with contextlib.suppress(InputError):
        cells["workflows (WfCommons)"] = workflow_graphs(1 if quick else 3)
    return cells


def plans_of(agent: PointerScheduling, soc: Soc, dag: Dag, samples: int) -> dict[str, Plan]:
    """The plans of the static schedulers and of the agent, and the best of each's, justified; with climbing, too.

    `agent` is greedy, from the beginning, as it stands; `agent_2` greedy from the beginning and from the end.
    """
    graph, greedy = Graph.of(dag, soc), sampled_plans(agent, soc, dag, 2)
    drawn = justified(graph, sampled_plans(agent, soc, dag, samples))
    plans = {name: scheduler(graph) for name, scheduler in STATIC.items()}
    return plans | {
        JUSTIFIED: best_climbed(graph, justified(graph, plans.values()), 0),
        f"climb_{samples}": climb_from_static(graph, samples),
        "agent": greedy[0],
        "agent_2": best_climbed(graph, justified(graph, greedy), 0),
        f"agent_{samples}": best_climbed(graph, drawn, 0),
        f"agent_{samples}_climb": best_climbed(graph, drawn, MOVES),
    }


def measure_single(agent: PointerScheduling, soc: Soc, dag: Dag, seconds: float, samples: int) -> dict[str, Any]:
    """Makespans on one graph, and CP-SAT's bound."""
    from ..baselines.cp_sat.soc_dag import solve

    plans = plans_of(agent, soc, dag, samples)
    hint = min(plans.values(), key=lambda plan: plan.makespan_us)
    found = solve(dag, soc, seconds=seconds, resolution_us=0.1, num_workers=1, hint=hint)
    makespans = {name: plan.makespan_us for name, plan in plans.items()}
    return {"tasks": dag.num_tasks, "makespan": makespans, "cp_sat": found.plan.makespan_us, "bound": found.bound_us}


def single_table(agent: PointerScheduling, args: Config) -> str:
    """Mean gap to CP-SAT of every scheduler, and the share of the best rule's gap that the agent closes."""
    own = ("agent", "agent_2", f"agent_{args.samples}", f"agent_{args.samples}_climb")
    names = [*STATIC, JUSTIFIED, f"climb_{args.samples}", *own]
    shown = (*names, "CP-SAT over its bound", "best rule", *(f"share, {name}" for name in own))
    lines = [row("graphs", "n", *shown), rule_line(len(shown) + 2)]
    for cell, graphs in single_graphs(args.quick).items():
        rows = [
            kept(
                args.own / f"plans {cell} {i}.json",
                lambda soc=soc, dag=dag: measure_single(agent, soc, dag, args.seconds, args.samples),  # type: ignore[misc]
            )
            for i, (soc, dag) in enumerate(graphs)
        ]
        cp_sat = np.array([one["cp_sat"] for one in rows])
        gaps = {name: np.array([one["makespan"][name] for one in rows]) / cp_sat - 1.0 for name in names}
        proven = cp_sat / np.array([one["bound"] for one in rows]) - 1.0
        best = min(STATIC, key=lambda name: float(gaps[name].mean()))
        shares = [share(gaps[best], gaps[name], np.zeros(len(rows))) for name in own]
        lines.append(
            row(cell, len(rows), *(percent(gaps[name]) for name in names), f"{100 * proven.mean():.1f}%", best, *shares)
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- with noise


def noisy_runs(quick: bool) -> dict[str, tuple[Soc, Dag, float]]:
    """The graphs of every cell and the spread of their durations."""
    names = ("cholesky",) if quick else ("cholesky", "lu", "qr")
    return {f"{name} T=8, sigma 1": (cpu_gpu_soc(), tiled(name, 8), 1.0) for name in names}


def makespans(spec: SocDagSpec, policy: Rule | PointerScheduling, workload: Workload, seeds: int) -> list[float]:
    """Of one job under the noise of the seeds 0, 1, ..."""
    simulator, ends = Simulator(spec.replace(binding=policy.binding)), []
    for seed in range(seeds):
        simulator.reset(workload, seed)
        policy.run(simulator)
        ends.append(float(simulator.sim.state.engine[0]["now"]))
    return ends


def in_hindsight(agent: PointerScheduling, spec: SocDagSpec, dag: Dag, seed: int, seconds: float) -> float:
    """CP-SAT's makespan with the noise of a seed known: its draw belongs to the task, wherever it runs."""
    from ..baselines.cp_sat.soc_dag import solve

    draws = noise_draws(single(dag, spec.soc), seed)
    noise = NOISES.index(spec.noise)
    times = [
        [duration_us(us, draw, noise, spec.noise_sigma) if us < math.inf else math.inf for us in us_of_kinds]
        for us_of_kinds, draw in zip(dag.times, draws, strict=True)
    ]
    known = Dag.from_arrays(dag.name, times, dag.edges, dag.volumes)
    plans = plans_of(agent, spec.soc, known, 64)
    hint = min(plans.values(), key=lambda plan: plan.makespan_us)
    return solve(known, spec.soc, seconds=seconds, resolution_us=0.1, num_workers=1, hint=hint).plan.makespan_us


def measure_noise(agent: PointerScheduling, soc: Soc, dag: Dag, sigma: float, args: Config) -> dict[str, Any]:
    """Makespans under every policy and seed, and in hindsight for some seeds."""
    spec, workload = single_spec(soc, sigma), single(dag, soc)
    policies: dict[str, Rule | PointerScheduling] = {name: RULES[name] for name in ("eft", "late_rank", "min_min")}
    policies |= {name: plan_rule(name, [STATIC[name](Graph.of(dag, soc))]) for name in ("heft", "peft")}
    policies["agent"] = agent
    seeds, known = (20, 2) if args.quick else (1000, 16)
    return {
        "makespan": {name: makespans(spec, policy, workload, seeds) for name, policy in policies.items()},
        "hindsight": [in_hindsight(agent, spec, dag, seed, args.seconds) for seed in range(known)],
    }


def noise_table(agent: PointerScheduling, args: Config) -> str:
    """Mean makespans, and the share of the gap to hindsight, whose size is that of the seeds it was worked out for.

    Of many seeds, for one execution in 1,000 takes over 13 times its nominal time, and doubles the makespan if it runs
    on a slow PE: the agent's mean over 200 seeds of LU is 0.97 or 1.01 of late rank's, by the seeds.
    """
    names = ["heft", "peft", "eft", "min_min", "late_rank", "agent"]
    lines = [row("graph", *names, "agent / best rule", "hindsight / best rule", "share"), rule_line(len(names) + 4)]
    for cell, (soc, dag, sigma) in noisy_runs(args.quick).items():
        got = kept(
            args.own / f"noise {cell}.json",
            lambda soc=soc, dag=dag, sigma=sigma: measure_noise(agent, soc, dag, sigma, args),  # type: ignore[misc]
        )
        ends = {name: np.array(values) for name, values in got["makespan"].items()}
        best = min((name for name in names if name != "agent"), key=lambda name: float(ends[name].mean()))
        ratio = ends["agent"].mean() / ends[best].mean()
        low, high = (1.0 + end for end in bootstrap_ci((ends["agent"] - ends[best]) / ends[best].mean()))
        known = np.array(got["hindsight"])
        first = ends[best][: len(known)]
        gap = (1.0 - known.mean() / first.mean()) * ends[best].mean()
        lines.append(
            row(
                cell,
                *(interval(ends[name], "{:.1f}") for name in names),
                f"{ratio:.3f} [{low:.3f}, {high:.3f}] of {best}",
                f"{known.mean() / first.mean():.3f} ({len(known)} seeds)",
                share(ends[best], ends["agent"], ends[best] - gap),
            )
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- streams


def stream_cells(quick: bool) -> list[StreamCell]:
    """Where streams are measured."""
    cells = [StreamCell("ds3", "deadline", gap, slack=3.0) for gap in (100.0, 60.0, 50.0, 40.0)]
    cells += [StreamCell("ds3", "edp", gap) for gap in (200.0, 100.0, 60.0, 50.0, 40.0)]
    cells += [StreamCell("ds3", "latency", gap) for gap in (200.0, 100.0, 60.0, 50.0, 40.0)]
    cells += [StreamCell("spark", "latency", gap) for gap in (40e6, 25e6)]
    return cells[:1] + cells[-1:] if quick else cells


def agent_loss(agent: Any, spec: SocDagSpec, workloads: Sequence[Workload]) -> list[float]:
    """As `rule_loss`, of the agent, or of one that looks ahead, with the seeds 0, 1, ..."""
    from ..envs.soc_dag.env import loss_of

    simulator, losses = Simulator(spec), []
    for seed, workload in enumerate(workloads):
        simulator.reset(workload, seed)
        agent.run(simulator)
        losses.append(float(loss_of(simulator.sim)) / len(workload))
    return losses


def stream_runs(cell: StreamCell, args: Config) -> tuple[SocDagSpec, list[Workload]]:
    """The setting of a cell and its jobs on each seed."""
    soc, stream = cell.stream(40 if args.quick else 500 if cell.jobs == "ds3" else 100)
    seeds = range(2 if args.quick else args.seeds)
    return cell.spec(soc), [stream.draw(np.random.default_rng(seed)) for seed in seeds]


def measure_stream(cell: StreamCell, args: Config) -> dict[str, Any]:
    """Losses per job of every rule on each seed, and of the rule found in hindsight for each."""
    spec, workloads = stream_runs(cell, args)
    seeds = range(len(workloads))
    losses = {name: rule_loss(spec, RULES[name], workloads, seeds) for name in ONLINE}
    weights, _ = search_linear(spec, workloads, list(seeds), generations=2 if args.quick else 8)
    found = rule_loss(spec, linear_rule(weights), workloads, seeds)
    return {"loss": losses, "hindsight": found, "weights": weights.tolist()}


def measure_own(agent: PointerScheduling, cell: StreamCell, weights: Sequence[float], args: Config) -> dict[str, Any]:
    """Losses per job on each seed of the agent, of its rollouts, and of what it and rules find if the future is known.

    `weights` are those of the rule found in hindsight.
    """
    spec, workloads = stream_runs(cell, args)
    rollouts = RolloutScheduling("agent_rollout", agent, RULES["late_srpt"], args.rollouts)
    known = [
        agent_loss(HindsightScheduling("hindsight", agent, rule, horizon), spec, workloads)
        for rule in (RULES["late_srpt"], linear_rule(np.array(weights)))
        for horizon in HORIZONS
    ]
    return {
        "agent": agent_loss(agent, spec, workloads),
        "rollouts": agent_loss(rollouts, spec, workloads),
        "known": np.min(known, axis=0).tolist(),
    }


def stream_table(agent: PointerScheduling, args: Config) -> str:
    """Per cell the best rule, what was possible, the agent alone and with rollouts.

    Losses are those of the env's reward, per job.
    """
    rolled = f"agent_rollout_{args.rollouts}"
    heads = ("jobs", "best rule", "its loss", "searched", "hindsight", "gap")
    lines = [row(*heads, "agent", "against the rule", "share", rolled, "against the rule", "share"), rule_line(12)]
    for cell in stream_cells(args.quick):
        name = f"stream {cell.name}.json"
        got = kept(args.out / name, lambda cell=cell: measure_stream(cell, args))  # type: ignore[misc]
        weights = got["weights"]
        own = kept(
            args.own / f"with {args.rollouts} rollouts, {name}",
            lambda cell=cell, weights=weights: measure_own(agent, cell, weights, args),  # type: ignore[misc]
        )
        losses, searched = {name: np.array(values) for name, values in got["loss"].items()}, np.array(got["hindsight"])
        known = np.minimum(searched, own["known"])
        best = min(ONLINE, key=lambda name: float(losses[name].mean()))
        bar = float(losses[best].mean()) or 1.0  # nobody is late in a short run
        cells = [cell.name, best, interval(losses[best], "{:.4g}"), f"{searched.mean():.4g}", f"{known.mean():.4g}"]
        cells.append(f"{100 * (losses[best].mean() - known.mean()) / bar:.1f}%")
        for mine in (np.array(own["agent"]), np.array(own["rollouts"])):
            low, high = bootstrap_ci((mine - losses[best]) / bar)
            cells += [
                interval(mine, "{:.4g}"),
                f"{100 * (mine - losses[best]).mean() / bar:+.1f}% [{100 * low:+.1f}, {100 * high:+.1f}]",
                share(losses[best], mine, known),
            ]
        lines.append(row(*cells))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ DS3's mix


def measure_mix(cell: StreamCell, policies: Sequence[str], agent: PointerScheduling, args: Config) -> dict[str, Any]:
    """Metrics of policies on each seed; who is late by three times the shortest latency is told to nobody."""
    soc, stream = cell.stream(60 if args.quick else args.jobs)
    spec, found = cell.spec(soc), {name: [] for name in policies}  # type: ignore[var-annotated]
    places = placement_rule("heft", [STATIC["heft"](Graph.of(dag, soc)) for dag in stream.dags])
    for seed in range(2 if args.quick else args.seeds):
        workload = stream.draw(np.random.default_rng(seed))
        for name, metrics in found.items():
            policy: Rule | PointerScheduling = agent if name == "agent" else places if name == "heft" else RULES[name]
            simulator = Simulator(spec.replace(binding=policy.binding))
            simulator.reset(workload, seed)
            policy.run(simulator)
            due = workload.arrival_us + workload.with_deadlines(soc, 3.0).deadline_us
            metrics.append(compute_metrics(replace(simulator.timeline(), deadline=due), workload, soc))
    return found


def mix_table(agent: PointerScheduling, args: Config) -> str:
    """Every metric of every policy at every gap and noise."""
    columns = ("mean_latency", "p95_latency", "mean_slowdown", "energy", "deadline_misses")
    lines = [row("gap", "noise", "policy", *columns), rule_line(len(columns) + 3)]
    for gap_us in (200.0, 50.0) if args.quick else (200.0, 100.0, 60.0, 50.0, 40.0):
        for sigma in (0.2,) if args.quick else (0.0, 0.2, 0.5):
            cell = StreamCell("ds3", "latency", gap_us, sigma, transfers=args.transfers)
            name = f"mix {gap_us:g} {sigma:g}{', pushed' if args.transfers == 'push' else ''}.json"
            got = {
                policy: runs
                for folder, policies in ((args.out, (*OF_MIX, "heft")), (args.own, ("agent",)))
                for policy, runs in kept(
                    folder / name,
                    lambda cell=cell, policies=policies: measure_mix(cell, policies, agent, args),  # type: ignore[misc]
                ).items()
            }
            for policy, runs in got.items():
                values = [interval(np.array([one[column] for one in runs]), "{:.4g}") for column in columns]
                lines.append(row(f"{gap_us:g}", f"{sigma:g}", policy, *values))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- printing


def share(rule: np.ndarray, agent: np.ndarray, bound: np.ndarray) -> str:
    """Share of the gap between rule and bound that the agent closes, with its interval; "closed" where it is small."""
    gap = float((rule - bound).mean())
    scale = float(bound.mean()) if bound.any() else 1.0
    if gap <= CLOSED * abs(scale):
        return "closed"
    closed = (rule - agent) / gap
    if len(closed) == 1:
        return f"{closed[0]:.2f}"
    low, high = bootstrap_ci(closed)
    return f"{closed.mean():.2f} [{low:.2f}, {high:.2f}]"


def interval(values: np.ndarray, form: str) -> str:
    """Mean and 95% bootstrap interval."""
    low, high = bootstrap_ci(values)
    return f"{form.format(values.mean())} [{form.format(low)}, {form.format(high)}]"


def percent(values: np.ndarray) -> str:
    """Mean and interval of relative gaps, in percent."""
    if len(values) == 1:
        return f"{100 * values[0]:.1f}%"
    return interval(100 * values, "{:.1f}") + "%"


def row(*cells: Any) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def rule_line(columns: int) -> str:
    """The line under the head of a Markdown table."""
    return "|" + "---|" * columns


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in the file, else what `measure` returns, which is written there."""
    if not path.exists():
        text = json.dumps(measure())
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(text)
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Config:
    """Measure a table, or what is missing of it, and print it as Markdown."""

    table: tyro.conf.Positional[Literal["single", "noise", "streams", "ds3"]]
    """Which one."""
    out: Path = Path("results/soc_dag_headroom")
    """Folder of what was measured."""
    agent: Path = SHIPPED
    """Checkpoint folder of the agent."""
    seconds: float = 10.0
    """CP-SAT's wall time for each graph."""
    samples: int = 64
    """Schedules of which the agent takes the best."""
    seeds: int = 5
    """Runs of a stream."""
    rollouts: int = 16
    """Draws of the durations before each decision of the agent that looks ahead, in the table streams."""
    jobs: int = 2000
    """Jobs in a run of DS3's mix."""
    transfers: Literal["pull", "push"] = "push"
    """When data move in the table ds3: as soon as they are made, as in DS3, or as their consumer is bound."""
    quick: bool = False
    """A few seconds a table: to see that it works."""

    @property
    def own(self) -> Path:
        """Folder of what depends on the agent."""
        return self.out / f"agent-{weights_digest(self.agent)}"


TABLES = {"single": single_table, "noise": noise_table, "streams": stream_table, "ds3": mix_table}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = tyro.cli(Config, args=argv, description=__doc__)
    print(TABLES[args.table](load_pointer(args.agent, "agent"), args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
