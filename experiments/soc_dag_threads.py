"""The commands' side of task graphs on real cores: the `threads` backend in `evaluate`, `deploy` and `calibrate`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..envs.core.errors import InputError
from . import command
from .domain import Deployment, Moved, Served, decision_metrics, serve
from .soc_dag import COMPARED, SocComparison, find_policies, fingerprint

if TYPE_CHECKING:
    from ..envs.soc_dag.workload import Workload
    from ..real_backend.threads_programs import KernelCosts

COST_PASSES = 6
"""Passes of a calibration that stands in for costs."""
WRONG = 1e-9
"""Relative error of a result from which the run is no run."""


class Cores:
    """Pinned threads, of which every run has its own."""

    clock = "wall"

    def __init__(self, tile: int) -> None:
        self.tile = tile

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class ThreadsComparison(SocComparison):
    """A `Comparison` of schedulers of task graphs, on real cores."""

    def serve(self, policy: Any, workload: Workload, seed: int, moved: Moved) -> Served:
        """One run: compiled policies decide in the PEs' threads, others are asked. Its results are checked."""
        from ..real_backend.threads import Executor

        rule = self._rule(policy, workload)
        executor = Executor(self.spec.replace(binding=rule.binding), self.backend.tile)
        try:
            if hasattr(rule, "compiled"):
                executor.reset(workload, seed)
                executor.run(rule)
                timeline, each = executor.timeline(), guarded_seconds(rule)
                seconds = float(timeline.job_finish.max()) * 1e-6
                served = Served(timeline, each, executor.deciding_us * 1e-6, seconds)
            else:
                served = serve(executor, rule, workload, seed)
            residuals = executor.residuals()
        finally:
            executor.close()
        if not (residuals < WRONG).all():
            job = int(residuals.argmax())
            raise RuntimeError(f"job {job} under {policy.name!r}, seed {seed}: relative error {residuals[job]:.1e}")
        return served

    def measure(self, served: Served, policy: Any, workload: Workload) -> tuple[dict[str, float], dict[str, str]]:
        """What `SocComparison` has, and the cost of deciding."""
        from .domain import DECISION_UNITS

        metrics, units = super().measure(served, policy, workload)
        deciding = decision_metrics(served, is_real=True)
        return metrics | deciding, units | {name: DECISION_UNITS[name] for name in deciding}

    def about(self, policy: Any, workload: Workload, seed: int, out: Path) -> dict[str, Any]:
        """As `SocComparison`; executions and transfers took what they took."""
        found = super().about(policy, workload, seed, out)
        found["spec"]["soc"] |= {"bandwidth": (), "latency_us": ()}
        return found | {"is_measured": True}


def guarded_seconds(rule: Any) -> np.ndarray:
    """CPU seconds of each decision of a guarded policy's last run; none of a policy without a guard."""
    from ..real_backend.threads_guard import CompiledGuard

    if not isinstance(rule, CompiledGuard):
        return np.zeros(0)
    before = len(rule.decision_cpu_s)
    rule.collect()
    return np.array(rule.decision_cpu_s[before:])


def cores_of(args: Any) -> dict[str, int]:
    """PEs of each kind. Raises InputError."""
    counts = {kind: count for kind, count in (("big", args.big), ("little", args.little)) if count}
    if not counts or min(args.big, args.little) < 0:
        raise InputError(f"{args.big} big and {args.little} little PEs", remedy="Give at least one")
    return counts


def measured_costs(args: Any, counts: Mapping[str, int]) -> KernelCosts:
    """The costs of the arguments: from their file, or measured now."""
    from ..real_backend.calibrate_threads import ThreadsCalibration
    from ..real_backend.threads_programs import KernelCosts

    if args.cost_model is not None:
        costs = KernelCosts.load(args.cost_model)
        if costs.tile != args.tile:
            raise InputError(
                f"costs are of tiles of {costs.tile}, not {args.tile}",
                file=args.cost_model,
                remedy=f"Give --tile {costs.tile}, or calibrate for {args.tile}",
            )
        return costs
    if sum(counts.values()) > len(os.sched_getaffinity(0)):
        raise InputError(
            f"{sum(counts.values())} PEs on {len(os.sched_getaffinity(0))} cores cannot be measured",
            remedy="Give the costs of another machine with --cost-model, or fewer PEs",
        )
    calibration = ThreadsCalibration(counts, args.tile, copies=args.copies, seed=args.seed)
    with command.progress("calibrating", COST_PASSES, is_still=True) as bar:
        for count in range(COST_PASSES):
            calibration.measure_pass()
            bar(count + 1)
    costs, report = calibration.fit()
    calibration.close()
    command.say(f"no --cost-model given: measured one (held-out executions {report['held_out']['total']:+.1%})")
    return costs


def open_threads(args: Any, objective: str) -> ThreadsComparison:
    """The comparison of the arguments on real cores. Raises InputError."""
    from ..envs.soc_dag.spec import SocDagSpec
    from ..real_backend.threads import Executor
    from ..real_backend.threads_programs import find_stream, unmeasured_costs

    counts, slack = cores_of(args), args.deadline_slack if objective == "deadline" else float("inf")
    if objective in ("energy", "edp"):
        raise InputError("cores do not say what they draw", remedy="Choose another objective")

    def stream_of(costs: KernelCosts) -> Any:
        return find_stream(args.workload, costs, args.gap, args.window, slack=slack, copies=args.copies)

    nothing = unmeasured_costs(args.tile, tuple(counts))
    first = Executor(SocDagSpec(nothing.soc(counts)), args.tile)  # what is wrong is told before anything is measured
    first.reset(stream_of(nothing).draw(np.random.default_rng(args.seed)))
    if first.is_crowded:
        command.say(f"{sum(counts.values())} PEs share {len(first.cores)} cores: times say little of such a machine")
    first.close()
    costs = measured_costs(args, counts)
    spec = SocDagSpec(costs.soc(counts), objective=objective)
    return ThreadsComparison(args.workload, spec.soc, stream_of(costs), spec, Cores(args.tile), "threads")


def find_online(names: Sequence[str]) -> list[Any]:
    """`find_policies`, but for those that need a simulator. Raises InputError."""
    found = find_policies(names)
    for policy in found:
        if not (hasattr(policy, "decide") or hasattr(policy, "plan")):
            raise InputError(f"policy {policy.name!r} runs in the simulator only", remedy="Choose agent")
    return found


def open_comparison(args: Any) -> tuple[ThreadsComparison, list[Any], dict[str, str | None]]:
    """The comparison, its policies, and digests of their weights. Raises InputError."""
    if args.noise:
        raise InputError(f"--noise is {args.noise}", remedy="Leave it out: the machine makes its own")
    if args.choose_frequency:
        raise InputError("cores do not change their frequency here", remedy="Leave --choose-frequency out")
    policies = find_online(args.policies)
    return open_threads(args, args.objective), policies, {name: fingerprint(name) for name in args.policies}


def open_deployment(args: Any) -> Deployment:
    """The guarded policy on real cores, with the rules that it is compared with. Raises InputError."""
    from ..real_backend.threads_guard import CompiledGuard, GuardedScheduler
    from .soc_dag import Planner, rule_of

    policy, *others = find_online(list(dict.fromkeys((args.policy, *COMPARED))))
    comparison = open_threads(args, args.objective)
    if isinstance(policy, Planner):
        policy = rule_of(policy, comparison.draw(args.seed), comparison.spec)
    guard: Any = (
        CompiledGuard(policy, args.time_budget)
        if hasattr(policy, "compiled")
        else GuardedScheduler(policy, args.time_budget, on_failure=lambda *_: None)
    )
    return Deployment(comparison, guard, [guard, *others], {args.policy: fingerprint(args.policy)})
