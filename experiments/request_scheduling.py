"""The commands' side of request scheduling: its arguments, what is compared, and the real engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from . import command, deploy, evaluate
from .domain import (
    DECISION_UNITS,
    Deployment,
    Moved,
    Served,
    check_named_once,
    decision_metrics,
    serve,
)

if TYPE_CHECKING:
    from ..envs.core.interface import Policy
    from ..envs.request_scheduling.spec import CostModel
    from ..envs.request_scheduling.workload import Workload
    from .scenario import Scenario

DOMAIN = "request_scheduling"
PLOTTED = ("mean_e2e_s", "slo_goodput", "p99_ttft_s", "max_wait_s")
"""Metrics with a plot of their own in a report."""


@dataclass
class EvaluateArgs(evaluate.Args):
    """Arguments of `schedlab evaluate request_scheduling`."""

    domain: Annotated[Literal["request_scheduling"], tyro.conf.Positional] = "request_scheduling"
    """What is scheduled."""
    policies: tuple[str, ...] = ("fcfs", "sarathi_512", "srpt", "hopeless_last")
    """Names of rules, `agent` (the shipped one), `knobs` (searched on training requests), or checkpoint folders."""
    workload: str = "azure_conv"
    """Name of a trace (azure_conv, azure_code, mooncake_synthetic, ..., synthetic) or a trace file."""
    load: float = 1.1
    """Arrival rate as a share of the engine's capacity, which is measured on the very requests that are served."""
    window: int | None = None
    """Requests in a run. Default 2000 on sim, 150 on hf; the whole trace if it is shorter."""
    objective: Literal["mean_e2e", "goodput", "goodput_2class"] = "mean_e2e"
    """What is to be optimised: mean latency, or the share of requests within their SLO (of one class or two)."""
    backend: Literal["sim", "hf"] = "sim"
    """The simulator, or a real model served by transformers' continuous batching (small: see --length-scale)."""
    true_lengths: bool = False
    """Also run every policy with true output lengths for predictions: oracle rows, apart from the others."""
    part: Literal["test", "all"] | None = None
    """Requests after the training part, or all. Default: test for traces that agents are trained on."""
    cost_model: Path | None = None
    """hf: cost model of the engine, as written by `schedlab calibrate hf`. Without it a short one is fitted."""
    length_scale: float = 16
    """hf: tokens of the trace for one token of the small engine."""
    kv_blocks: int | None = None
    """hf: KV blocks of the small engine. Default: the pool of the full-size engine, made small."""
    model: Path | None = None
    """hf: folder of a local model. Default: a small Llama with random weights."""
    device: str = "cpu"
    """hf: where the model runs."""


@dataclass
class DeployArgs(deploy.Args):
    """Arguments of `schedlab deploy --backend hf`."""

    backend: Literal["hf"] = "hf"
    """The engine: Hugging Face transformers' continuous batching."""
    workload: str = "azure_conv"
    """Name of a trace (azure_conv, azure_code, mooncake_synthetic, ..., synthetic) or a trace file."""
    load: float = 1.1
    """Arrival rate as a share of the engine's capacity."""
    window: int = 100
    """Requests to serve."""
    objective: Literal["mean_e2e", "goodput", "goodput_2class"] = "mean_e2e"
    """What the policy is to optimise."""
    cost_model: Path | None = None
    """Cost model of the engine, as written by `schedlab calibrate hf`. Without it a short one is fitted."""
    length_scale: float = 16
    """Tokens of the trace for one token of the small engine."""
    kv_blocks: int | None = None
    """KV blocks of the small engine. Default: the pool of the full-size engine, made small."""
    model: Path | None = None
    """Folder of a local model. Default: a small Llama with random weights."""
    device: str = "cpu"
    """Where the model runs."""


COMPARED = ("fcfs", "sarathi_512")
"""Rules that agents are shown beside."""


# ---------------------------------------------------------------------------------------------- comparison


@dataclass
class RequestComparison:
    """A `Comparison` of request schedulers: a scenario, on the simulator or on an engine."""

    scenario: Scenario
    backend: Any
    backend_name: str
    domain: str = field(default=DOMAIN, init=False)

    def __post_init__(self) -> None:
        self.workload, self.instance = self.scenario.workload, self.scenario.instance
        self.spec: Any = self.scenario.spec
        self.source = self.scenario.pool.source
        other = "slo_goodput" if self.scenario.metric == "mean_e2e_s" else "mean_e2e_s"
        self.columns: Sequence[str] = (
            self.scenario.metric,
            other,
            "p99_ttft_s",
            "max_wait_s",
            "decision_p99_us",
            "decision_share",
        )

    def draw(self, seed: int) -> Workload:
        """The window of the trace with its length predictions and SLO classes."""
        return self.scenario.draw(seed)

    def serve(self, policy: Policy, workload: Workload, seed: int, moved: Moved) -> Served:
        """One run; a policy `WithTrueLengths` is given them."""
        if is_oracle(policy.name):
            workload = workload.with_true_lengths()

        def finished(state: Any) -> float:
            return float(state.engine[0]["num_finished"]) / len(workload)

        return serve(self.backend, policy, workload, seed, moved, finished)

    def measure(self, served: Served, policy: Any, workload: Any) -> tuple[dict[str, float], dict[str, str]]:
        """Latencies, goodput, and the cost of deciding."""
        from ..envs.request_scheduling.metrics import compute_metrics

        timeline: Any = served.timeline
        metrics = compute_metrics(timeline, self.spec.engine.kv_blocks)
        units = {name: metric_info(name)[0] for name in metrics}
        metrics |= decision_metrics(served, is_real=self.backend_name != "sim")
        return metrics, units | {name: unit for name, unit in DECISION_UNITS.items() if name in metrics}

    def about(self, policy: Policy, workload: Workload, seed: int, out: Path) -> dict[str, Any]:
        """Blocks, spec, and what the requests are."""
        return {
            "kv_blocks": self.spec.engine.kv_blocks,
            "spec": self.spec.to_dict(),
            "workload": (workload.with_true_lengths() if is_oracle(policy.name) else workload).source,
        }


class WithTrueLengths:
    """The same policy under the name of an oracle; `RequestComparison.serve` gives it true lengths."""

    is_oracle = True

    def __init__(self, policy: Policy) -> None:
        from .policies import WITH_TRUE_LENGTHS

        self.policy, self.name = policy, policy.name + WITH_TRUE_LENGTHS
        self.source = getattr(policy, "source", "")
        self.reset, self.decide = policy.reset, policy.decide


def is_oracle(policy: str) -> bool:
    """True for the name of a policy that was given the future."""
    from .policies import is_oracle

    return is_oracle(policy)


def metric_info(name: str) -> tuple[str, bool | None]:
    """(unit, lower is better) of a metric. Raises InputError."""
    from ..envs.request_scheduling.metrics import metric_info

    return metric_info(name)


def draw_run(timeline_path: Path, about: dict[str, Any]) -> Any:
    """A picture of a saved run."""
    from ..envs.request_scheduling.render import draw_timeline
    from ..envs.request_scheduling.timeline import Timeline

    return draw_timeline(Timeline.load(timeline_path), about["kv_blocks"])


# ------------------------------------------------------------------------------------------------ opening


def find_policies(names: Sequence[str], scenario: Scenario) -> list[Policy]:
    """The policies of these names, for the scenario's engine. Raises InputError.

    Rules are shown a small engine in full-size units, in which their knobs are published; what was learned or
    searched sees the engine as it is.
    """
    from .policies import KNOBS, find_policy, is_published

    check_named_once(names)
    policies = []
    for name in sorted(names, key=lambda name: name == KNOBS):  # the search takes longest: errors come before it
        training = scenario.training_windows() if name == KNOBS else ()
        spec = scenario.policy_spec if is_published(name) else scenario.spec
        policy = find_policy(name, spec, metric=scenario.metric, training=training)
        policies.append(scenario.show(policy) if is_published(name) else policy)
    return sorted(policies, key=lambda policy: list(names).index(policy.name))


def check_names(names: Sequence[str], scenario: Scenario) -> None:
    """Raise InputError for a wrong name, before an engine is started."""
    from .policies import KNOBS, find_policy

    for name in names:
        if name != KNOBS:
            find_policy(name, scenario.policy_spec)


def open_comparison(args: EvaluateArgs) -> tuple[RequestComparison, list[Policy], dict[str, str | None]]:
    """The comparison, its policies, and digests of their weights. Raises InputError."""
    from ..envs.request_scheduling.sim import Simulator
    from .policies import KNOBS, fingerprint
    from .scenario import build_scenario

    part = args.part or ("test" if KNOBS in args.policies else None)
    wanted: dict[str, Any] = dict(
        load=args.load, objective=args.objective, requests=args.window, part=part, data_dir=args.data_dir
    )
    scenario = build_scenario(args.workload, **wanted)
    check_names(args.policies, scenario)
    if args.backend == "sim":
        backend: Any = Simulator(scenario.spec)
    else:
        backend = open_engine(args.length_scale, args.model, args.device, args.workload, args.data_dir, args.kv_blocks)
        training = scenario.training.scale_lengths(1 / args.length_scale)
        cost = known_cost(args) or measured_cost(backend, args.cost_model, training, seed=args.seed)
        wanted |= dict(length_scale=args.length_scale, kv_blocks=args.kv_blocks)
        scenario = build_scenario(args.workload, **wanted, cost=cost)
        backend.slo_classes = scenario.spec.slo_classes
    policies = find_policies(args.policies, scenario)
    if args.true_lengths:
        policies += [WithTrueLengths(policy) for policy in policies]
    prints = {name: fingerprint(name) for name in args.policies}
    return RequestComparison(scenario, backend, args.backend), policies, prints


def open_deployment(args: DeployArgs, engine: Any = None, cost: CostModel | None = None) -> Deployment:
    """The guarded policy on the engine, with the rules that it is compared with. Raises InputError.

    Args:
        args: what is deployed, and on what.
        engine: one that is open already; else one is opened.
        cost: its cost model; else that of `args.cost_model`, or one is fitted.
    """
    from ..real_backend.guard import GuardedPolicy
    from .policies import fingerprint
    from .scenario import build_scenario

    wanted: dict[str, Any] = dict(
        load=args.load, objective=args.objective, requests=args.window, data_dir=args.data_dir
    )
    plain = build_scenario(args.workload, **wanted)
    check_names([args.policy], plain)
    if engine is None:
        engine = open_engine(args.length_scale, args.model, args.device, args.workload, args.data_dir, args.kv_blocks)
    if cost is None:
        training = plain.training.scale_lengths(1 / args.length_scale)
        cost = measured_cost(engine, args.cost_model, training, seed=args.seed)
    scenario = build_scenario(
        args.workload, **wanted, cost=cost, length_scale=args.length_scale, kv_blocks=args.kv_blocks
    )
    engine.slo_classes = scenario.spec.slo_classes
    guard = GuardedPolicy(find_policies([args.policy], scenario)[0], args.time_budget, on_failure=lambda *_: None)
    return Deployment(
        comparison=RequestComparison(scenario, engine, args.backend),
        guard=guard,
        policies=[guard, *find_policies([name for name in COMPARED if name != args.policy], scenario)],
        fingerprints={args.policy: fingerprint(args.policy)},
    )


# ----------------------------------------------------------------------------------------- the real engine


def open_engine(
    length_scale: float,
    model: Path | None,
    device: str,
    workload: str,
    data_dir: Path | None,
    kv_blocks: int | None = None,
) -> Any:
    """The small real engine for a workload, its SLO classes still to be set."""
    from ..envs.request_scheduling.traces import find_workload
    from ..real_backend.hf import HFEngine
    from .scenario import full_size_spec, small_engine

    full = full_size_spec(workload, find_workload(workload, data_dir), "mean_e2e")
    return HFEngine(small_engine(full.engine, length_scale, kv_blocks), model, device)


def measured_cost(
    engine: Any, path: Path | None, requests: Workload, *, seed: int = 0, num_iterations: int = 120
) -> CostModel:
    """The cost model in `path`, or one fitted now in a short calibration with requests like those to be served."""
    from ..envs.request_scheduling.spec import CostModel
    from ..real_backend.calibrate import Calibration
    from .calibrate import measure_pass

    if path is not None:
        return CostModel.load(path)
    calibration = Calibration(engine, seed, num_iterations=num_iterations, requests=requests)
    measure_pass(calibration)
    model, report = calibration.fit()
    command.say(
        f"no --cost-model given: fitted one to {report['fit']['iterations']} iterations (held-out median error "
        f"{report['held_out']['median']:.0%}, total {report['held_out']['total']:+.1%})"
    )
    return model


def known_cost(args: EvaluateArgs) -> CostModel | None:
    """The cost model with which the runs in --out were made, if they are resumed and none is named."""
    if not (args.resume and args.out and args.cost_model is None):
        return None
    from ..envs.request_scheduling.spec import RequestSchedulingSpec

    cells = evaluate.read_cells(args.out)
    costs = [RequestSchedulingSpec.from_dict(c["spec"]).cost for name, c in cells.items() if name.endswith(" on hf")]
    return costs[-1] if costs else None
