"""Serve a trace on a real engine under a policy, guarded: a policy that fails falls back to the engine's own order.

Beside the policy stand `fcfs` and `sarathi_512` on the same requests, and what its decisions cost.

Examples:

  schedlab deploy agent --backend hf --workload azure_conv
  schedlab deploy runs/mine --load 1.5 --window 100 --seeds 3 --out results/deploy
  schedlab deploy srpt --cost-model cost.json
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..envs.core.errors import InputError
from . import command
from .evaluate import Evaluation, check_output, find_policies, measured_cost, open_engine, show

if TYPE_CHECKING:
    import pandas as pd

    from ..envs.request_scheduling.spec import CostModel
    from ..real_backend.guard import GuardedPolicy

COMPARED = ("fcfs", "sarathi_512")
"""Rules that every deployment is shown beside."""


@dataclass
class Args:
    """Arguments of `schedlab deploy`."""

    policy: Annotated[str, tyro.conf.Positional]
    """Folder of a checkpoint or of a training run, `agent` (the shipped one), or the name of a rule."""
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
    seeds: int = 1
    """Number of paired seeds: each draws a window, length predictions and SLO classes."""
    seed: int = 0
    """The first of them."""
    time_budget: float = 1.0
    """Wall seconds for one decision; a policy that takes longer is not asked again in that run."""
    out: Path | None = None
    """Folder for results.csv and schedules/. Without it nothing is kept."""
    resume: bool = False
    """Go on with the results that are in --out."""
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
    data_dir: Path | None = None
    """Folder with trace files. Default: $SCHEDLAB_DATA, then the download cache."""


@dataclass
class Deployment:
    """What a deployment showed."""

    rows: pd.DataFrame
    guard: GuardedPolicy
    metric: str


def deploy_on(engine: Any, cost: CostModel, args: Args, out: Path) -> Deployment:
    """Serve the requests under the guarded policy and the rules that it is compared with."""
    from ..real_backend.guard import GuardedPolicy
    from .policies import fingerprint
    from .scenario import build_scenario

    scenario = build_scenario(
        args.workload,
        load=args.load,
        objective=args.objective,
        requests=args.window,
        cost=cost,
        length_scale=args.length_scale,
        kv_blocks=args.kv_blocks,
        data_dir=args.data_dir,
    )
    engine.slo_classes = scenario.spec.slo_classes
    policy = find_policies([args.policy], scenario)[0]
    compared = find_policies([name for name in COMPARED if name != args.policy], scenario)
    guard = GuardedPolicy(policy, args.time_budget, on_failure=lambda *_: None)
    evaluation = Evaluation(scenario, engine, args.backend, out, args.resume, {args.policy: fingerprint(args.policy)})
    seeds = range(args.seed, args.seed + args.seeds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # failures are counted and printed below
        rows = evaluation.run([guard, *compared], seeds)
    return Deployment(rows, guard, scenario.metric)


def show_deployment(deployment: Deployment) -> None:
    """Print the comparison, the cost of a decision and the fallbacks."""
    rows, guard = deployment.rows, deployment.guard
    show(rows, deployment.metric)
    mine = rows[rows["policy"] == guard.name].groupby("metric")["value"].mean()
    report = guard.report()
    p50, p99 = (report[f"decision_cpu_p{p}_s"] * 1e6 for p in (50, 99))
    failures = {kind: int(report[f"failures_{kind}"]) for kind in ("raised", "invalid", "timeout")}
    print(
        f"{guard.name}: {int(report['decisions'])} decisions; one takes {p50:.0f} us (P50), {p99:.0f} us (P99) of CPU; "
        f"guard included, deciding takes {mine['decision_share']:.2%} of the iterations' time"
    )
    print(f"fallbacks to fcfs: {sum(failures.values())} ({', '.join(f'{n} {k}' for k, n in failures.items())})")


def deploy(args: Args) -> int:
    """Run `schedlab deploy`."""
    from .policies import KNOBS, find_policy
    from .scenario import build_scenario

    if args.seeds < 1:
        raise InputError(f"--seeds is {args.seeds}", remedy="Give at least 1")
    check_output(args.out, args.resume)
    plain = build_scenario(args.workload, load=args.load, requests=args.window, data_dir=args.data_dir)
    if args.policy != KNOBS:
        find_policy(args.policy, plain.policy_spec)  # a wrong name is told before an engine is started
    command.say(plain.pool.source)
    engine = open_engine(args.length_scale, args.model, args.device, args.workload, args.data_dir, args.kv_blocks)
    cost = measured_cost(engine, args.cost_model, seed=args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        deployment = deploy_on(engine, cost, args, args.out or Path(scratch))
        show_deployment(deployment)
    engine.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(Args, deploy, argv, "deploy", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
