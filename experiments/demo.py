"""Train, evaluate, deploy and report in small: a few minutes on two cores.

A small agent learns by imitation and a little PPO; it and the shipped agent are compared with the field's schedulers
in the simulator and then on a real model served by transformers; the results become one HTML page.

Example:

  schedlab demo --out results/demo
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..envs.core.errors import InputError
from . import command

RULES = ("fcfs", "sarathi_512", "srpt", "hopeless_last")
ON_THE_ENGINE = ("fcfs", "sarathi_512", "srpt")
ENGINE_LOAD = 2.0
"""So few requests queue only when they come fast."""
MARK = "demo"
"""File that marks a folder as the demo's own, to be replaced by the next one."""


@dataclass
class Args:
    """Arguments of `schedlab demo`."""

    out: Path = Path("results/demo")
    """Folder for everything that the demo writes; an older demo there is replaced."""
    quick: bool = False
    """Hardly any training and few requests: to see that it works."""
    seed: int = 0
    """Of everything."""
    data_dir: Path | None = None
    """Folder with trace files. Default: $SCHEDLAB_DATA, then the download cache."""


def fresh_folder(out: Path) -> None:
    """Make the folder; empty it if it is an older demo's. Raises InputError if it is somebody else's."""
    import shutil

    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise InputError("is not empty, and not the demo's", file=out, remedy="Choose another folder with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text("This folder belongs to `schedlab demo`, which replaces it.\n")


def demo(args: Args) -> int:
    """Run `schedlab demo`."""
    from ..envs.request_scheduling.sim import Simulator
    from . import deploy, train
    from .evaluate import Evaluation, show
    from .policies import AGENT, SHIPPED, fingerprint
    from .report import write_report
    from .request_scheduling import (
        DeployArgs,
        RequestComparison,
        find_policies,
        measured_cost,
        open_deployment,
        open_engine,
    )
    from .scenario import HF_LENGTH_SCALE, build_scenario

    start = time.perf_counter()

    def step(text: str) -> None:
        command.say(f"[{time.perf_counter() - start:4.0f} s] {text}")

    fresh_folder(args.out)
    workload, data_dir = "azure_conv", args.data_dir
    requests, on_engine, num_seeds = (60, 10, 1) if args.quick else (1000, 80, 3)
    scenario = build_scenario(workload, load=1.3, requests=requests, data_dir=data_dir)
    step(f"requests: {scenario.pool.source}")

    step("training a small agent: it imitates SRPT, then improves by PPO")
    steps, clone_steps = (1, 3200) if args.quick else (16_384, 40_000)
    trained = train.train_preset(
        train.Args("request_scheduling/tiny", args.out / "agent", steps, clone_steps, False, args.seed, data_dir)
    )
    mine = str(trained.final)
    step(f"trained: it chooses as its teacher in {trained.agreement or 0:.0%} of the states it meets")
    agents = [mine, AGENT] if SHIPPED.is_dir() else [mine]
    if AGENT not in agents:
        step("there is no shipped agent in this installation: the small one stands alone")

    step("in the simulator (Llama-2-7B on an A100)")
    prints = {name: fingerprint(name) for name in agents}
    comparison = RequestComparison(scenario, Simulator(scenario.spec), "sim")
    simulated = Evaluation(comparison, args.out, True, prints)
    seeds = range(args.seed, args.seed + num_seeds)
    rows = simulated.run(find_policies([*RULES, *agents], scenario), seeds)
    show(rows, comparison.columns)

    step("starting a real engine (a small Llama in transformers' continuous batching) and measuring its speed")
    engine: Any = open_engine(HF_LENGTH_SCALE, None, "cpu", workload, data_dir)
    cost = measured_cost(
        engine, None, scenario.training.scale_lengths(1 / HF_LENGTH_SCALE), seed=args.seed, num_iterations=60
    )
    small = build_scenario(workload, load=ENGINE_LOAD, requests=on_engine, cost=cost, data_dir=data_dir)
    engine.slo_classes = small.spec.slo_classes
    step("the same comparison on the engine")
    comparison = RequestComparison(small, engine, "hf")
    real = Evaluation(comparison, args.out, True, prints)
    show(real.run(find_policies([*ON_THE_ENGINE, *agents], small), [args.seed]), comparison.columns)

    step("deploying the agent, guarded: if it failed, the engine would fall back to its own order")
    wanted = DeployArgs(agents[-1], load=ENGINE_LOAD, window=on_engine, data_dir=data_dir)
    deployment = open_deployment(wanted, engine, cost)
    deploy.show_deployment(deployment, deploy.run_deployment(deployment, [args.seed], args.out / "deployed"))
    engine.close()

    page = write_report(args.out, title="schedlab: a demonstration")
    step("done")
    print(f"report: {page}")
    print(f"re-check every figure: schedlab evaluate --validate {args.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(Args, demo, argv, "demo", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
