"""Run a real backend under a policy, guarded: a policy that fails falls back to the backend's own default.

Beside the policy stand simple rules on the same inputs, and what its decisions cost. `--backend` says which domain it
is; each has options of its own, which `schedlab deploy --backend NAME --help` lists.

Examples:

  schedlab deploy agent --backend hf --workload azure_conv
  schedlab deploy runs/mine --load 1.5 --window 100 --seeds 3 --out results/deploy
  schedlab deploy srpt --cost-model cost.json
  schedlab deploy agent --backend experts --cache 0.25
  schedlab deploy late_rank --backend threads --workload cholesky_8
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from . import command
from .domain import BACKENDS, Deployment, domain_module, pick
from .evaluate import Evaluation, check_output, show

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Args:
    """Arguments of `schedlab deploy` in every domain."""

    policy: Annotated[str, tyro.conf.Positional]
    """Folder of a checkpoint or of a training run, `agent` (the shipped one), or the name of a rule."""
    seeds: int = 1
    """Number of paired seeds: each draws the inputs."""
    seed: int = 0
    """The first of them."""
    time_budget: float | None = 1.0
    """Wall seconds for one decision; a policy that takes longer is not asked again in that run."""
    out: Path | None = None
    """Folder for results.csv and schedules/. Without it nothing is kept."""
    resume: bool = False
    """Go on with the results that are in --out."""
    data_dir: Path | None = None
    """Folder with trace files. Default: $SCHEDLAB_DATA, then the download cache."""


def run_deployment(deployment: Deployment, seeds: Sequence[int], out: Path, resume: bool = False) -> pd.DataFrame:
    """Serve the inputs of every seed under the guarded policy and the rules that it is compared with."""
    evaluation = Evaluation(deployment.comparison, out, resume, deployment.fingerprints)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # failures are counted and printed by `show_deployment`
        return evaluation.run(deployment.policies, seeds)


def show_deployment(deployment: Deployment, rows: pd.DataFrame) -> None:
    """Print the comparison, the cost of a decision and the fallbacks."""
    guard = deployment.guard
    show(rows, deployment.comparison.columns)
    mine = rows[rows["policy"] == guard.name].groupby("metric")["value"].mean()
    report = guard.report()
    p50, p99 = (report[f"decision_cpu_p{p}_s"] * 1e6 for p in (50, 99))
    failures = {kind: int(report[f"failures_{kind}"]) for kind in ("raised", "invalid", "timeout")}
    print(
        f"{guard.name}: {int(report['decisions'])} decisions; one takes {p50:.0f} us (P50), {p99:.0f} us (P99) of CPU; "
        f"guard included, deciding takes {mine['decision_share']:.2%} of the backend's time"
    )
    counts = ", ".join(f"{number} {kind}" for kind, number in failures.items())
    print(f"fallbacks to {guard.default_name}: {sum(failures.values())} ({counts})")


def deploy(args: Any) -> int:
    """Run `schedlab deploy` for the backend's arguments."""
    domain = domain_module(BACKENDS[args.backend])
    check_output(domain, args)
    deployment = domain.open_deployment(args)
    command.say(deployment.comparison.source)
    with tempfile.TemporaryDirectory() as scratch:
        seeds = range(args.seed, args.seed + args.seeds)
        rows = run_deployment(deployment, seeds, args.out or Path(scratch), args.resume)
        show_deployment(deployment, rows)
    deployment.comparison.backend.close()
    return 0


def args_for(argv: Sequence[str]) -> type:
    """The arguments of the backend that is named."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--backend", nargs="?", default="hf")
    backend = parser.parse_known_args(argv)[0].backend
    return domain_module(BACKENDS[pick([str(backend)], list(BACKENDS))]).DeployArgs


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(args_for, deploy, argv, "deploy", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
