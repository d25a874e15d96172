"""Does a cache policy pay in tokens per second, and is the simulator right about it? The same tokens on both.

A Mixture-of-Experts model whose experts lie in a file (CPU, O_DIRECT) or in pinned memory (CUDA) decodes windows of a
routing trace, held out of training, under each policy and size of cache. A few policies at a time, LRU on demand always
among them, each with a cache of its own, take turns of a few tokens: a slow second of the machine hits no one alone,
and a slice of the window is compared with the same slice under LRU. Whoever is not on turn stands still, with its clock
and its channel. A run of the calibration takes turns with them, so that it meets the same machine. The clock is the
wall's: waiting for reads is what is measured.

Beside tokens per second the tables show the ratio to LRU on demand, with the 95% interval of a bootstrap over slices,
and the bound that no policy of this cache can beat: max(compute, Belady's loads x load time). The simulator serves the
same windows with the cost model of the calibration's run at this size of cache, in which none of these policies and
none of these tokens took part, plus the measured time of each policy's decisions.

Examples:

  python -m schedlab.experiments.fidelity_experts --json experts.json
  python -m schedlab.experiments.fidelity_experts --policies ema_95 agent --cache-shares 0.25 --repeats 2 --tokens 40
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..envs.core.errors import InputError
from . import command

if TYPE_CHECKING:
    from ..envs.expert_caching.spec import CostModel, ExpertCachingSpec
    from ..envs.expert_caching.timeline import Timeline
    from ..envs.expert_caching.workload import Workload
    from ..real_backend.calibrate_experts import ExpertCalibration
    from ..real_backend.experts import ExpertEngine, OffloadedModel
    from .expert_caching import Contender
    from .expert_traces import Trace

POLICIES = (
    "lru",
    "ema_95",
    "ridge",
    "learned_score",
    "copy_kernel",
    "mixtral_offloading",
    "fate",
    "moe_infinity",
    "affinity_prefetch",
    "agent_on_demand",
    "agent",
    "belady",
)
ON_DEMAND = "lru"
"""What the others are compared with."""
EVICTING_AGENT = "agent_on_demand"
CALIBRATION_TOKENS = 60
"""At least; as many as a window has, if that is more."""
RESAMPLES = 2000
"""Of the bootstrap."""


@dataclass
class Args:
    """Arguments of `schedlab fidelity experts`."""

    policies: tuple[str, ...] = POLICIES
    """Rules and oracles by name, `agent` (the shipped one), `agent_on_demand` (without its prefetches), or checkpoint
    folders. `lru` is always there."""
    cache_shares: tuple[float, ...] = (0.25, 0.5)
    """Sizes of cache, in shares of the experts."""
    workload: str = "deepseek_v2_lite"
    """Name of a routing trace or a trace file."""
    tokens: int = 100
    """Tokens of a window."""
    repeats: int = 5
    """Windows."""
    turn_tokens: int = 5
    """Tokens that a policy serves before the next one's turn."""
    together: int = 4
    """Policies that take turns, LRU included, beside the calibration: each needs the memory of its cache."""
    prefetches: int = 1
    """Prefetches that published systems may ask for in a layer (best of 1, 2, 3 and k on training sequences)."""
    json: Path | None = None
    """File for all figures."""
    cost_model: Path | None = None
    """Cost model of the engine, as written by `schedlab calibrate experts`. Without it one is measured meanwhile."""
    model: Path | None = None
    """Folder of an OLMoE that recorded the trace. Default: random weights that follow the trace."""
    device: str = "cpu"
    """Where the model runs."""
    folder: Path | None = None
    """Folder on a disk for the file of experts. Default: the folder for temporary files."""
    seed: int = 0
    """Draws the windows."""
    data_dir: Path | None = None
    """Folder with traces. Default: $SCHEDLAB_DATA."""


# ---------------------------------------------------------------------------------------------- who takes part


def line_up(names: Sequence[str], spec: ExpertCachingSpec, trace: Trace, prefetches: int) -> list[Contender]:
    """The contenders of these names, LRU on demand first. Raises InputError.

    Published systems ask for up to k prefetches a layer, which keeps a channel that is nearly always busy from the
    loads on demand: here they get at most `prefetches`. Agents know themselves what pays.
    """
    from .expert_caching import AGENT, find_contender

    contenders = []
    for name in dict.fromkeys((ON_DEMAND, *names)):
        found = find_contender(AGENT if name == EVICTING_AGENT else name, spec, trace)
        most = found.spec.max_prefetch
        if name == EVICTING_AGENT:
            most = 0
        elif name != AGENT and not Path(name).is_dir():
            most = min(most, prefetches)
        contenders.append(replace(found, name=name, spec=found.spec.replace(max_prefetch=most)))
    return contenders


# ------------------------------------------------------------------------------------------------ measurement


@dataclass
class Cell:
    """What one contender did on the engine; `seconds` of each window, of each slice of it."""

    contender: Contender
    seconds: list[np.ndarray] = field(default_factory=list)
    deciding_s: list[float] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)

    @property
    def decision_s(self) -> float:
        """Mean seconds of a decision."""
        return sum(self.deciding_s) / sum(len(timeline.start_s) for timeline in self.timelines)


def groups_of(contenders: Sequence[Contender], together: int) -> list[list[Cell]]:
    """Cells of at most `together` contenders each, in order, the first contender in every group."""
    first, others = contenders[0], contenders[1:]
    chunks = [others[i : i + together - 1] for i in range(0, len(others), together - 1)] or [[]]
    return [[Cell(one) for one in (first, *chunk)] for chunk in chunks]


def measure(
    model: OffloadedModel,
    routing: str,
    groups: Sequence[Sequence[Cell]],
    windows: Sequence[Workload],
    turn_tokens: int,
    calibration: ExpertCalibration | None = None,
    moved: Callable[[float, str], None] = lambda done, what: None,
) -> None:
    """Serve each window under each contender, the calibration's run of the same size of cache among them.

    Args:
        model: what computes.
        routing: of the engine.
        groups: who takes turns with whom, and where it is booked.
        windows: what is served.
        turn_tokens: of a turn.
        calibration: gets a repeat of a run with each group and window; None: nothing is calibrated.
        moved: called with the number of runs that are done, and what comes next.
    """
    num_done = 0
    for number, window in enumerate(windows):
        for group in groups:
            moved(num_done, f"window {number + 1}, {', '.join(cell.contender.name for cell in group)}")
            serve_in_turns(model, routing, group, window, turn_tokens, calibration)
            num_done += len(group)


def serve_in_turns(
    model: OffloadedModel,
    routing: str,
    group: Sequence[Cell],
    window: Workload,
    turn_tokens: int,
    calibration: ExpertCalibration | None = None,
) -> None:
    """One run of each cell, and of the calibration, slice by slice; each slice begins with another one."""
    from ..real_backend.experts import ExpertEngine

    engines: list[ExpertEngine] = []
    policies: list[Any] = [cell.contender.make(window) for cell in group]
    num_tokens = [window.num_tokens] * len(group)
    run = 0
    try:
        for cell, policy in zip(group, policies, strict=True):
            engine = ExpertEngine(model, cell.contender.spec, routing=routing)
            engines.append(engine)
            engine.reset(window)
            policy.reset(engine.state())  # decide once and throw it away: compilation is no part of the run
            policy.decide(engine.state(), engine.default_decision())
            policy.reset(engine.state())
        if calibration is not None:
            run = run_at(calibration, group[0].contender.spec.cache_share)
            engines.append(calibration.open_run(run))
            policies.append(None)
            num_tokens.append(calibration.tokens)
        slices: list[list[float]] = [[] for _ in engines]
        for turn in range(-(-max(num_tokens) // turn_tokens)):
            for i in range(len(engines)):
                at = (i + turn) % len(engines)
                if turn * turn_tokens < num_tokens[at]:
                    engines[at].resume()
                    slices[at].append(serve_slice(engines[at], policies[at], turn_tokens * window.num_layers))
                    engines[at].pause()
        for cell, engine, seconds in zip(group, engines, slices, strict=False):
            cell.seconds.append(np.array(seconds))
            cell.deciding_s.append(float(engine.decision_s.sum()))
            cell.timelines.append(engine.timeline())
        if calibration is not None:
            calibration.book_run(run, engines[-1])
            calibration.time_alone()
    finally:
        for engine in engines:
            engine.close()


def run_at(calibration: ExpertCalibration, cache_share: float) -> int:
    """Number of the calibration's run with a cache of this size."""
    return [spec.cache_share for spec in calibration.specs].index(cache_share)


def serve_slice(engine: ExpertEngine, policy: Any, epochs: int) -> float:
    """Serve some epochs, or what is left, under a policy (None: the backend's default). Returns the seconds."""
    seconds = 0.0
    for _ in range(epochs):
        decision = engine.default_decision()
        if policy is not None:
            policy.decide(engine.state(), decision)
        outcome = engine.step(decision)
        seconds += outcome.seconds
        if outcome.done:
            break
    return seconds


def simulate(contender: Contender, windows: Sequence[Workload], cost: CostModel) -> list[float]:
    """Seconds of each window in the simulator."""
    from ..envs.expert_caching.sim import Simulator
    from ..real_backend.calibrate_experts import serve

    simulator, seconds = Simulator(contender.at_cost(cost).spec, recording=False), []
    for window in windows:
        simulator.reset(window)
        seconds.append(serve(simulator, contender.make(window)))
    return seconds


def bound(spec: ExpertCachingSpec, windows: Sequence[Workload]) -> dict[str, float]:
    """Seconds that the windows take at least, with a cache of this size: sums of `least_times`, and of the longer."""
    from .expert_caching import least_times

    times = np.array([least_times(window, spec) for window in windows])
    compute_s, load_s = times.sum(axis=0).tolist()
    return {"compute_s": compute_s, "load_s": load_s, "seconds": float(times.max(axis=1).sum())}


# ---------------------------------------------------------------------------------------------------- results


def compare(
    groups: Sequence[Sequence[Cell]], windows: Sequence[Workload], cost: CostModel, spec: ExpertCachingSpec
) -> dict[str, Any]:
    """Everything that is shown of one size of cache: {"cache_share", "tokens", "cost", "bound", "rows"}.

    A row: policy, oracle, seconds of each window on the engine and in the simulator, tokens per second (all tokens over
    all seconds), `speedup` over the LRU that it took turns with, its interval, `of_bound` (bound over measured
    seconds), hit_rate, ready_rate, loads_per_token, decision_share and error (simulated over measured - 1). LRU is in
    every group; its row is that of the first.
    """
    tokens = sum(window.num_tokens for window in windows)
    least = bound(spec.replace(cost=cost), windows)
    rows = []
    for i, (on_demand, *others) in enumerate(groups):
        rows += [row_of(cell, on_demand, windows, cost) for cell in ([on_demand, *others] if i == 0 else others)]
    for row in rows:
        row["of_bound"] = least["seconds"] / sum(row["measured_s"])
    return {"cache_share": spec.cache_share, "tokens": tokens, "cost": asdict(cost), "bound": least, "rows": rows}


def row_of(cell: Cell, on_demand: Cell, windows: Sequence[Workload], cost: CostModel) -> dict[str, Any]:
    """The row of a contender, all but what the bound is needed for."""
    from ..envs.expert_caching.metrics import compute_metrics
    from ..real_backend.calibrate_experts import with_decisions

    seconds = [float(slices.sum()) for slices in cell.seconds]
    simulated = simulate(cell.contender, windows, with_decisions(cost, cell.decision_s))
    metrics = [compute_metrics(timeline) for timeline in cell.timelines]
    speedup, interval = ratio_of(np.concatenate(on_demand.seconds), np.concatenate(cell.seconds))
    return {
        "policy": cell.contender.name,
        "oracle": cell.contender.is_oracle,
        "measured_s": seconds,
        "simulated_s": simulated,
        "slices_s": [slices.tolist() for slices in cell.seconds],
        "tokens_per_s": sum(window.num_tokens for window in windows) / sum(seconds),
        "speedup": speedup,
        "speedup_interval": interval,
        "decision_s": cell.decision_s,
        "decision_share": sum(cell.deciding_s) / sum(seconds),
        "error": sum(simulated) / sum(seconds) - 1,
        **{
            name: float(np.mean([m[name] for m in metrics]))
            for name in ("hit_rate", "ready_rate", "loads_per_token", "prefetch_use")
        },
    }


def ratio_of(slower: np.ndarray, faster: np.ndarray) -> tuple[float, list[float]]:
    """Sum over sum, and its 95% interval: a bootstrap over slices (n,), which both served at about the same time."""
    drawn = np.random.default_rng(0).integers(0, len(slower), (RESAMPLES, len(slower)))
    ratios = slower[drawn].sum(axis=1) / faster[drawn].sum(axis=1)
    return float(slower.sum() / faster.sum()), np.percentile(ratios, [2.5, 97.5]).tolist()


def verdict(table: Mapping[str, Any]) -> str:
    """What the agent gains over LRU and over the best other deployable row, and how far the simulator is off."""
    from .expert_caching import AGENT

    rows = {row["policy"]: row for row in table["rows"]}
    error = np.median([abs(row["error"]) for row in table["rows"]])
    text = f"median error of the simulator {error:.1%}"
    others = [row for row in table["rows"] if not row["oracle"] and row["policy"] not in (AGENT, EVICTING_AGENT)]
    if AGENT in rows:
        best = max(others, key=lambda row: row["speedup"])
        over = rows[AGENT]["speedup"] / best["speedup"]
        text = (
            f"agent: {rows[AGENT]['speedup']:.2f}x {ON_DEMAND}, {over:.2f}x {best['policy']} (the best other row), "
            f"{rows[AGENT]['of_bound']:.0%} of the bound; " + text
        )
    return text


def show(table: Mapping[str, Any]) -> None:
    """Print one size of cache."""
    from rich.table import Table

    least = table["bound"]
    title = (
        f"cache of {table['cache_share']:.0%} of the experts; bound {table['tokens'] / least['seconds']:.2f} tokens/s "
        f"= max(compute {least['compute_s']:.1f} s, Belady's loads {least['load_s']:.1f} s)"
    )
    grid = Table(title=title, title_justify="left")
    heads = (
        "tokens/s",
        "x LRU",
        "(95%)",
        "of bound",
        "hit",
        "ready",
        "loads/token",
        "deciding",
        "simulated",
        "error",
    )
    grid.add_column("policy")
    for name in heads:
        grid.add_column(name, justify="right")
    for row in table["rows"]:
        low, high = row["speedup_interval"]
        grid.add_row(
            row["policy"] + (" (oracle)" if row["oracle"] else ""),
            f"{row['tokens_per_s']:.2f}",
            f"{row['speedup']:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{row['of_bound']:.0%}",
            f"{row['hit_rate']:.3f}",
            f"{row['ready_rate']:.3f}",
            f"{row['loads_per_token']:.1f}",
            f"{row['decision_share']:.1%}",
            f"{table['tokens'] / sum(row['simulated_s']):.2f}",
            f"{row['error']:+.1%}",
        )
    console = command.console()
    console.print(grid)
    console.print(verdict(table))


def fidelity(args: Args) -> int:
    """Run `schedlab fidelity experts`."""
    from ..envs.core.results import atomic_path
    from ..envs.expert_caching.spec import CostModel, ExpertCachingSpec
    from ..real_backend.calibrate_experts import ExpertCalibration
    from ..real_backend.experts import open_model
    from .expert_traces import find_trace

    if args.repeats < 1 or not args.cache_shares:
        raise InputError(f"{args.repeats} repeats of {len(args.cache_shares)} caches", remedy="Give at least 1 of each")
    if args.turn_tokens < 1 or args.together < 2:
        raise InputError(
            f"turns of {args.turn_tokens} tokens among {args.together} policies", remedy="Give at least 1 and 2"
        )
    trace = find_trace(args.workload, args.data_dir)
    windows = [trace.draw(args.tokens, args.seed + i) for i in range(args.repeats)]
    specs = [ExpertCachingSpec(cache_share=share, warm_start=True) for share in args.cache_shares]
    line_ups = [line_up(args.policies, spec, trace, args.prefetches) for spec in specs]
    model, routing = open_model(trace.test, args.model, device=args.device, folder=args.folder)

    def new_calibration() -> ExpertCalibration:
        tokens = max(CALIBRATION_TOKENS, args.tokens)
        return ExpertCalibration(model, trace.training, routing=routing, tokens=tokens, cache_shares=args.cache_shares)

    calibration = None
    if args.cost_model is None:
        before, calibration = new_calibration(), new_calibration()
        before.measure_pass()
        cost = before.fit()[0]  # agents weigh a prefetch against the time that there is for it
    else:
        cost = CostModel.load(args.cost_model)
    tables = [groups_of([one.at_cost(cost) for one in contenders], args.together) for contenders in line_ups]
    groups = [group for table in tables for group in table]
    with command.progress("measuring", sum(map(len, groups)) * len(windows)) as bar:
        measure(model, routing, groups, windows, args.turn_tokens, calibration, bar)
    costs, report = [cost] * len(specs), dict[str, Any]()
    if calibration is not None:
        cost, report = calibration.fit()
        costs = [calibration.fit(runs=[run_at(calibration, share)])[0] for share in args.cache_shares]
        command.say(cost.source)
    model.close()
    results = [compare(tables[i], windows, costs[i], spec) for i, spec in enumerate(specs)]
    for result in results:
        show(result)
    if args.json is not None:
        about = {"workload": args.workload, "tokens": args.tokens, "seed": args.seed, "prefetches": args.prefetches}
        content = about | {"cost": asdict(cost), "calibration": report, "tables": results}
        with atomic_path(args.json) as path:
            path.write_text(json.dumps(content, indent=1) + "\n")
        command.say(f"wrote {args.json}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(Args, fidelity, argv, "fidelity experts", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
