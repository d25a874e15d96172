"""The commands' side of expert caching: its arguments, traces, contenders, and the offloading backend."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from ..envs.core.errors import InputError
from . import command, deploy, evaluate
from .domain import DECISION_UNITS, Deployment, Moved, Served, check_named_once, decision_metrics, serve, weights_digest

if TYPE_CHECKING:
    from ..envs.core.interface import Policy
    from ..envs.expert_caching.spec import CostModel, ExpertCachingSpec
    from ..envs.expert_caching.workload import Workload
    from .expert_traces import Trace

DOMAIN = "expert_caching"
PLOTTED = ("hit_rate", "ready_rate", "tokens_per_s", "loads_per_token")
"""Metrics with a plot of their own in a report."""
AGENT = "agent"
SHIPPED = Path(__file__).resolve().parent.parent / "agents" / "shipped" / DOMAIN
"""Checkpoints that come with the package."""
SIM_TOKENS, ENGINE_TOKENS = 2048, 128
"""Default number of tokens in a run."""
FITTED = ("ridge", "learned_score", "copy_kernel", "affinity_prefetch", "moe_infinity", "expert_flow")
"""Policies that are fitted to the training sequences."""
ORACLES = ("belady", "belady_bypass")
AGENT_PREFETCHES = 2
"""Prefetches that a learned policy may ask for in one epoch; it asks for less where they do not pay."""
ENGINE_COST_TOKENS = 150
"""Tokens of a calibration that stands in for a cost model."""


@dataclass
class EvaluateArgs(evaluate.Args):
    """Arguments of `schedlab evaluate expert_caching`."""

    domain: Annotated[Literal["expert_caching"], tyro.conf.Positional] = "expert_caching"
    """What is scheduled."""
    policies: tuple[str, ...] = ("lru", "lfu", "ema_95", "arc", "belady")
    """Names of rules and oracles, `agent` (the shipped one), or checkpoint folders."""
    workload: str = "moe"
    """Routing: `moe` (of our own small model), a name in the data folder (deepseek_v2_lite), a file, or synthetic."""
    cache: float = 0.25
    """Share of the experts of each layer that fits into the cache."""
    objective: Literal["hit_rate", "tokens_per_s"] = "hit_rate"
    """Replacement alone, or speed: loads take time, and policies may prefetch."""
    window: int | None = None
    """Tokens in a run. Default 2048 on sim, 128 on experts; all of the part if it has fewer."""
    sequences: int = 1
    """Sequences that are decoded together."""
    bypass: bool = False
    """A missing expert may be streamed past the cache."""
    backend: Literal["sim", "experts"] = "sim"
    """The simulator, or a real model whose experts are in a file and are read when they are needed."""
    part: Literal["test", "all"] = "test"
    """Sequences that nothing was fitted to, or all."""
    cost_model: Path | None = None
    """Cost model, as written by `schedlab calibrate experts`. Default: of DeepSeek-V2-Lite on an A100; for the experts
    backend a short measurement."""
    model: Path | None = None
    """experts: folder of `python -m schedlab.experiments.train_moe` or another OLMoE checkpoint. Default: random
    weights in the shape of the trace, which follow its routing."""
    device: str = "cpu"
    """experts: where the model runs."""
    folder: Path | None = None
    """experts: where the file of experts is written, on a disk (not tmpfs). Default: a temporary folder."""


@dataclass
class DeployArgs(deploy.Args):
    """Arguments of `schedlab deploy --backend experts`."""

    backend: Literal["experts"] = "experts"
    """The engine: a Mixture-of-Experts model whose experts are read from a file."""
    workload: str = "moe"
    """Routing: `moe` (of our own small model), a name in the data folder (deepseek_v2_lite), a file, or synthetic."""
    cache: float = 0.25
    """Share of the experts of each layer that fits into the cache."""
    window: int = ENGINE_TOKENS
    """Tokens to decode."""
    time_budget: float | None = None
    """Wall seconds for one decision. Default: no limit, decided in the engine's own thread, as a decision takes less
    than to hand it to another."""
    sequences: int = 1
    """Sequences that are decoded together."""
    bypass: bool = False
    """A missing expert may be streamed past the cache."""
    cost_model: Path | None = None
    """Cost model, as written by `schedlab calibrate experts`. Without it a short one is fitted."""
    model: Path | None = None
    """Folder of `python -m schedlab.experiments.train_moe` or another OLMoE checkpoint. Default: random weights in the
    shape of the trace, which follow its routing."""
    device: str = "cpu"
    """Where the model runs."""
    folder: Path | None = None
    """Where the file of experts is written, on a disk (not tmpfs). Default: a temporary folder."""


COMPARED = ("lru", "ema_95")
"""Rules that agents are shown beside."""


# --------------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True)
class Contender:
    """A policy by name, with the spec under which it runs; made anew for each workload, which oracles must know."""

    name: str
    spec: ExpertCachingSpec
    make: Callable[[Workload], Any]
    source: str = ""
    is_oracle: bool = False

    def at_cost(self, cost: CostModel) -> Contender:
        """The same on another machine."""
        return replace(self, spec=self.spec.replace(cost=cost))


def is_oracle(policy: str) -> bool:
    """True for the name of a policy that was given the future."""
    return policy in ORACLES or policy == "read_me"  # its queue is known only to a model that is pre-gated


def find_contender(name: str, base: ExpertCachingSpec, trace: Trace) -> Contender:
    """The contender of a name or a checkpoint folder, under `base` or what its system needs. Raises InputError."""
    from ..baselines.expert_caching import RULES, belady, system_spec

    if name in RULES:
        rule = RULES[name]
        return Contender(name, system_spec(rule, base, trace.test), lambda workload: rule, rule.source, is_oracle(name))
    if name in ORACLES:
        spec = base.replace(bypass=name == "belady_bypass")
        return Contender(name, spec, lambda workload: belady(workload, spec), "Belady 1966", is_oracle=True)
    if name in FITTED:
        return _fit(name, base, trace)
    folder = shipped_folder(trace) if name == AGENT else Path(name).expanduser()
    if name == AGENT or folder.exists():
        return _learned(name, folder, base)
    close = get_close_matches(name, [*RULES, *ORACLES, *FITTED, AGENT], n=1)
    raise InputError(
        f"no policy and no folder is called {name!r}",
        remedy=(f"Did you mean {close[0]!r}? " if close else "")
        + f"Policies are {', '.join([*RULES, *FITTED, *ORACLES, AGENT])}, or the folder of a checkpoint",
    )


def _fit(name: str, base: ExpertCachingSpec, trace: Trace) -> Contender:
    """A policy fitted to the training sequences."""
    from ..baselines import expert_fitted
    from ..baselines.expert_caching import copy_rule

    training, k = trace.training, trace.training.top_k * base.num_sequences
    ahead = base.replace(max_prefetch=k, eviction_only=False)
    if name == "ridge":
        discount = float(np.interp(base.cache_share, (0.125, 0.25, 0.5, 0.75), (0.6, 0.85, 0.85, 0.95)))
        spec, rule = base, expert_fitted.fit_ridge(training, discount=discount)
    elif name == "learned_score":
        spec, rule = base, expert_fitted.fit_learned_score(training)
    elif name == "copy_kernel":
        spec, rule = base, copy_rule()
    elif name == "affinity_prefetch":
        spec, rule = ahead, expert_fitted.fit_affinity_prefetch(training)
    elif name == "moe_infinity":
        spec, rule = ahead, expert_fitted.fit_moe_infinity(training, num_sequences=base.num_sequences)
    else:
        spec, rule = ahead, expert_fitted.fit_expert_flow(training)
    return Contender(name, spec, lambda workload: rule, f"{rule.source}; fitted to {len(training)} sequences")


def shipped_folder(trace: Trace) -> Path:
    """The shipped checkpoint for the model of a trace. Raises InputError if there is none."""
    import json

    shape = {"num_layers": trace.test.num_layers, "num_experts": trace.test.num_experts, "top_k": trace.test.top_k}
    known = {}
    for config in sorted(SHIPPED.glob("*/config.json")):
        known[config.parent.name] = json.loads(config.read_text()).get("model")
        if known[config.parent.name] == shape:
            return config.parent
    raise InputError(
        f"no shipped agent knows a model of {shape['num_layers']} layers with {shape['num_experts']} experts, top "
        f"{shape['top_k']}; there are {', '.join(known) or 'none'}",
        file=SHIPPED,
        remedy="Train one on a trace of this model: `python -m schedlab.experiments.expert_caching_gap --help`",
    )


def _learned(name: str, folder: Path, base: ExpertCachingSpec) -> Contender:
    """The policy of a checkpoint folder: the learned scores, or a pointer network over them.

    Where time counts, the scores share the slots out among the layers as well: they mean the same in every layer.
    """
    from ..agents.expert_caching import LearnedCaching, load_eviction

    ahead = base if base.eviction_only else base.replace(max_prefetch=AGENT_PREFETCHES)
    folder = checkpoint_folder(folder)
    if is_pointer(folder):
        from ..agents.expert_caching_pointer import load_pointer

        pointer = load_pointer(folder, name=name)
        return Contender(name, ahead, lambda workload: pointer)
    scores = load_eviction(folder, name)
    if base.eviction_only:
        return Contender(name, base, lambda workload: scores)
    policy = LearnedCaching(name, scores.weights, scores.shape[2])
    return Contender(name, ahead.replace(pooled=True), lambda workload: policy)


def checkpoint_folder(folder: Path) -> Path:
    """The checkpoint in a folder: the folder itself, or `final/` of a training run."""
    return folder / "final" if (folder / "final").is_dir() else folder


def is_pointer(folder: Path) -> bool:
    """True for a checkpoint of `schedlab train`, False for one of learned scores, or none."""
    import json

    try:
        return "env_id" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def find_contenders(names: Sequence[str], base: ExpertCachingSpec, trace: Trace) -> list[Contender]:
    """The contenders of these names, in order. Raises InputError."""
    check_named_once(names)
    return [find_contender(name, base, trace) for name in names]


def fingerprint(name: str, trace: Trace) -> str | None:
    """Digest of a checkpoint's weights; None for what is named by code alone."""
    folder = shipped_folder(trace) if name == AGENT else checkpoint_folder(Path(name).expanduser())
    return weights_digest(folder)


# --------------------------------------------------------------------------------------------- comparison


@dataclass
class ExpertComparison:
    """A `Comparison` of cache policies: tokens of a trace, on the simulator or on a real model."""

    trace: Trace
    spec: ExpertCachingSpec
    """The base of every contender's spec."""
    objective: str
    window: int
    backend: Any
    """`SimulatedModel` or `RealModel`."""
    backend_name: str
    domain: str = field(default=DOMAIN, init=False)

    def __post_init__(self) -> None:
        self.workload, self.source = self.trace.name, self.trace.test.source
        sequences = f", {self.spec.num_sequences} sequences at a time" if self.spec.num_sequences > 1 else ""
        part = "of the held-out sequences" if self.trace.part == "test" else "of all sequences"
        self.instance = f"cache {self.spec.cache_share:g}, {self.objective}, {self.window} tokens {part}{sequences}"
        if self.objective == "hit_rate":
            self.columns: Sequence[str] = ("hit_rate", "ready_rate", "loads_per_token", "gap_closed")
        else:
            self.instance += f", {self.spec.cost.name}"
            self.columns = ("tokens_per_s", "bound_share", "ready_rate", "loads_per_token", "decision_share")

    def draw(self, seed: int) -> Workload:
        """Tokens of the trace."""
        return self.trace.draw(self.window, seed)

    def serve(self, policy: Any, workload: Workload, seed: int, moved: Moved) -> Served:
        """One run of a `Contender`."""
        return self.backend.serve(policy, workload, seed, moved)

    def measure(self, served: Served, policy: Contender, workload: Workload) -> tuple[dict[str, float], dict[str, str]]:
        """Hits, loads and times; the shares of what is possible; and the cost of deciding."""
        from ..envs.expert_caching.metrics import compute_metrics

        timeline: Any = served.timeline
        metrics = compute_metrics(timeline)
        if policy.spec.eviction_only:  # no times
            metrics = {name: value for name, value in metrics.items() if _info()[name][0] not in ("s", "tokens/s")}
        if self.objective == "hit_rate":
            metrics["gap_closed"] = gap_closed(timeline, workload, policy.spec)
        elif self.spec.num_sequences == 1:
            metrics["bound_share"] = max(least_times(workload, self.spec)) / metrics["time_s"]
        metrics |= decision_metrics(served, is_real=self.backend_name != "sim")
        return metrics, {name: DECISION_UNITS.get(name) or metric_info(name)[0] for name in metrics}

    def about(self, policy: Any, workload: Workload, seed: int, out: Path) -> dict[str, Any]:
        """The spec of the contender, and the file of the routing, which is written once for all of them."""
        from ..envs.core.results import SCHEDULES
        from ..envs.expert_caching.workload import save_routing

        digest = hashlib.sha256(np.ascontiguousarray(workload.experts).tobytes()).hexdigest()[:12]
        path = out / SCHEDULES / f"routing_s{seed}_{digest}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_routing(path, workload)
        return {"spec": policy.spec.to_dict(), "routing": path.name, "workload": workload.source}


_EXTRA = {"gap_closed": ("share", False), "bound_share": ("share", False)}


def _info() -> dict[str, tuple[str, bool | None]]:
    from ..envs.expert_caching.metrics import METRICS

    return METRICS | _EXTRA


def metric_info(name: str) -> tuple[str, bool | None]:
    """(unit, lower is better) of a metric.

    Beside those of `envs.expert_caching.metrics`: `gap_closed`, of the loads by which Belady's rule beats LRU, the
    share that a policy without prefetch saves; `bound_share`, the least time that any policy can take (`least_times`)
    over the time taken. Raises InputError.
    """
    if name not in _info():
        raise InputError(f"unknown metric {name!r}", remedy=f"Choose one of {', '.join(_info())}")
    return _info()[name]


def gap_closed(timeline: Any, workload: Workload, spec: ExpertCachingSpec) -> float:
    """(LRU's loads - loads) / (LRU's loads - Belady's); nan for policies that load ahead, or without a gap."""
    from ..envs.expert_caching.timeline import PREFETCH

    if (timeline.loads["kind"] == PREFETCH).any() or spec.bypass:
        return float("nan")
    lru, best = reference_loads(workload, spec)
    return (lru - len(timeline.loads)) / (lru - best) if lru > best else float("nan")


@lru_cache(maxsize=8)  # a workload equals itself only; all policies of a comparison ask for the same few
def reference_loads(workload: Workload, spec: ExpertCachingSpec) -> tuple[int, int]:
    """Loads of LRU, and of Belady's rule (with bypass where the spec allows it), on demand."""
    from ..baselines.expert_caching import RULES

    plain = spec.replace(max_prefetch=0)
    return demand_loads(workload, plain, RULES["lru"]), fewest_loads(workload, plain)


@lru_cache(maxsize=8)
def fewest_loads(workload: Workload, spec: ExpertCachingSpec) -> int:
    """Loads of Belady's rule (with bypass where the spec allows it), on demand."""
    from ..baselines.expert_caching import belady

    plain = spec.replace(max_prefetch=0)
    return demand_loads(workload, plain, belady(workload, plain))


def demand_loads(workload: Workload, spec: ExpertCachingSpec, policy: Any) -> int:
    """Loads on demand of a rule or a learned policy, compiled, in the simulator."""
    from ..envs.expert_caching.sim import Simulator

    simulator = Simulator(spec, recording=False)
    simulator.reset(workload)
    policy.run(simulator)
    return int(simulator.state().engine[0]["num_demand_loads"])


def least_times(workload: Workload, spec: ExpertCachingSpec) -> tuple[float, float]:
    """Seconds of computing, and of Belady's loads one after another: no policy is faster than the longer of the two.

    One sequence at a time. With prefetch, loads stay at least Belady's (with bypass where the spec allows it), and a
    channel reads one at a time. Belady's rule has all slots for all layers, so the bound is one of pooled caches and of
    caches of each layer alike. The clock starts when the first gate answers.
    """
    cost, layers, tokens = spec.cost, workload.num_layers, workload.num_tokens
    gate_s = cost.attention_s + cost.attention_token_s
    experts_s = workload.top_k * (cost.expert_s + cost.expert_token_s)
    compute_s = tokens * layers * (gate_s + experts_s) - gate_s + (tokens - 1) * cost.step_s
    return compute_s, fewest_loads(workload, spec.replace(pooled=True)) * cost.load_s


def draw_run(timeline_path: Path, about: dict[str, Any]) -> Any:
    """A picture of a saved run; None for one without times."""
    from ..envs.expert_caching.render import draw_timeline
    from ..envs.expert_caching.timeline import Timeline

    return None if about["spec"]["eviction_only"] else draw_timeline(Timeline.load(timeline_path))


# ------------------------------------------------------------------------------------------------ backends


class SimulatedModel:
    """Runs each contender compiled, in a simulator with its own spec."""

    clock = "model"

    def serve(self, contender: Contender, workload: Workload, seed: int, moved: Moved) -> Served:
        """One run."""
        from ..envs.expert_caching.sim import Simulator

        simulator = Simulator(contender.spec)
        simulator.reset(workload)
        contender.make(workload).run(simulator)
        return Served(simulator.timeline())

    def close(self) -> None:
        """Nothing is held."""


class RealModel:
    """Runs each contender on one offloaded model, in an engine with its own spec."""

    clock = "wall"

    def __init__(self, model: Any, routing: str) -> None:
        self.model, self.routing = model, routing

    def serve(self, contender: Contender, workload: Workload, seed: int, moved: Moved) -> Served:
        """One run."""
        from ..envs.expert_caching.workload import interleave
        from ..real_backend.experts import ExpertEngine

        steps = len(interleave(workload.lengths, contender.spec.num_sequences))
        engine = ExpertEngine(self.model, contender.spec, routing=self.routing)
        try:
            policy: Policy = contender.make(workload)
            return serve(engine, policy, workload, seed, moved, lambda state: float(state.engine[0]["step"]) / steps)
        finally:
            engine.close()

    def close(self) -> None:
        """Remove the file of experts."""
        self.model.close()


def base_spec(args: Any, trace: Trace, objective: str) -> ExpertCachingSpec:
    """What the arguments of a command say of the cache, with a cost model if one is named. Raises InputError."""
    from ..envs.expert_caching.spec import CostModel, ExpertCachingSpec

    if args.window is not None and args.window < 1:
        raise InputError(f"--window is {args.window}", remedy="Give a positive number of tokens")
    if args.backend == "experts" and objective == "hit_rate":
        raise InputError("the experts backend measures times", remedy="Give --objective tokens_per_s")
    spec = ExpertCachingSpec(
        cache_share=args.cache,
        num_sequences=args.sequences,
        bypass=args.bypass,
        eviction_only=objective == "hit_rate",
        warm_start=args.backend == "experts",
    )
    spec.slots_of(trace.test.num_layers, trace.test.num_experts, trace.test.top_k)
    return spec if args.cost_model is None else spec.replace(cost=CostModel.load(args.cost_model))


def open_backend(args: Any, trace: Trace, spec: ExpertCachingSpec, objective: str) -> ExpertComparison:
    """The comparison on the simulator or on a real model, whose cost is measured if no model of it is named."""
    is_real = args.backend == "experts"
    backend: Any = SimulatedModel()
    if is_real:
        backend = open_model(trace.test, args)
        if args.cost_model is None:
            spec = spec.replace(cost=measured_cost(backend, trace.training, args.seed))
    window = min(args.window or (ENGINE_TOKENS if is_real else SIM_TOKENS), trace.test.num_tokens)
    return ExpertComparison(trace, spec, objective, window, backend, args.backend)


def open_model(workload: Workload, args: Any) -> RealModel:
    """The offloaded model of the arguments `model`, `device`, `folder`."""
    from ..real_backend import experts

    what = str(args.model) if args.model is not None else "random weights in the shape of the trace"
    command.say(f"writing the experts of a model to disk ({what})")
    return RealModel(*experts.open_model(workload, args.model, device=args.device, folder=args.folder))


def measured_cost(backend: RealModel, workload: Workload, seed: int) -> CostModel:
    """A cost model of the real model, fitted now in a short calibration."""
    from ..real_backend.calibrate_experts import ExpertCalibration

    calibration = ExpertCalibration(
        backend.model, workload, routing=backend.routing, tokens=ENGINE_COST_TOKENS, seed=seed
    )
    with command.progress("calibrating", calibration.num_runs) as bar:
        for count, _ in enumerate(calibration.measure_runs()):
            bar(count + 1)
    cost, report = calibration.fit()
    command.say(f"no --cost-model given: fitted one (held-out time {report['held_out']['time']['mean']:+.1%})")
    return cost


def open_comparison(args: EvaluateArgs) -> tuple[ExpertComparison, list[Contender], dict[str, str | None]]:
    """The comparison, its contenders, and digests of their weights. Raises InputError."""
    from .expert_traces import find_trace

    trace = find_trace(args.workload, args.data_dir, part=args.part)
    spec = base_spec(args, trace, args.objective)
    contenders = find_contenders(args.policies, spec, trace)  # before a model is written: names may be wrong
    prints = {name: fingerprint(name, trace) for name in args.policies}
    comparison = open_backend(args, trace, spec, args.objective)
    return comparison, [contender.at_cost(comparison.spec.cost) for contender in contenders], prints


def open_deployment(args: DeployArgs) -> Deployment:
    """The guarded policy on the real model, with the rules that it is compared with. Raises InputError."""
    from ..real_backend.experts_guard import GuardedCachePolicy
    from .expert_traces import find_trace

    trace = find_trace(args.workload, args.data_dir)
    spec = base_spec(args, trace, "tokens_per_s")
    contender, *others = find_contenders(list(dict.fromkeys((args.policy, *COMPARED))), spec, trace)
    if contender.is_oracle:
        raise InputError(
            f"policy {args.policy!r} needs to know the future", remedy="Deploy another; `evaluate` has rows for oracles"
        )
    comparison = open_backend(args, trace, spec, "tokens_per_s")
    guard = GuardedCachePolicy(contender.make(trace.test), args.time_budget, on_failure=lambda *_: None)
    policies = [replace(contender, make=lambda workload: guard), *others]
    return Deployment(
        comparison=comparison,
        guard=guard,
        policies=[policy.at_cost(comparison.spec.cost) for policy in policies],
        fingerprints={args.policy: fingerprint(args.policy, trace)},
    )
