"""Train an agent by a preset, into a folder that `evaluate` and `deploy` take as a policy.

The folder holds the resolved configuration, the learning curve (curve.csv, TensorBoard), checkpoints, and the result
in final/. A run that was killed goes on with --resume.

Examples:

  schedlab train request_scheduling/tiny --out runs/tiny
  schedlab train request_scheduling/tiny --out runs/tiny --resume
  schedlab evaluate request_scheduling --policies fcfs srpt runs/tiny
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..envs.core.errors import InputError
from . import command
from .domain import domain_module

if TYPE_CHECKING:
    from ..agents.train import TrainResult


@dataclass
class Args:
    """Arguments of `schedlab train`."""

    preset: Annotated[str, tyro.conf.Positional] = ""
    """Name of a preset; without one they are listed."""
    out: Path | None = None
    """Run folder. Default: runs/<preset>."""
    steps: int | None = None
    """Decisions of PPO; default: the preset's. 0: imitation only."""
    clone_steps: int | None = None
    """States labelled by the teacher; default: the preset's."""
    resume: bool = False
    """Go on with the run that is in --out."""
    seed: int = 0
    """Of weights, environments and minibatches."""
    data_dir: Path | None = None
    """Folder with trace files. Default: $SCHEDLAB_DATA, then the download cache."""


def train_preset(args: Args) -> TrainResult:
    """Train by `args.preset`. Raises InputError."""
    from .presets import PRESETS

    if args.preset not in PRESETS:
        raise InputError(f"no preset is called {args.preset!r}", remedy=f"Choose one of {', '.join(PRESETS)}")
    from ..agents.train import train

    recipe = PRESETS[args.preset].build(args.seed, args.data_dir)
    changes: dict[str, Any] = {"total_steps": args.steps, "clone_steps": args.clone_steps}
    config = replace(recipe.config, **{name: value for name, value in changes.items() if value is not None})
    out = args.out or Path("runs") / args.preset.replace("/", "_")
    clone = config.clone_steps if recipe.teacher is not None else 0
    rounds = config.label_rounds + config.group_rounds
    with command.progress(f"training {args.preset}", max(config.total_steps + clone + rounds, 1)) as bar:

        def moved(row: dict[str, float]) -> None:
            if "labelled" in row:
                bar(row["labelled"], f"imitating, agreement {row['agreement']:.2f}")
            elif "label_round" in row:
                bar(clone + row["label_round"] + 1, f"self-labelling, agreement {row['agreement']:.2f}")
            elif "group_round" in row:
                done = clone + config.label_rounds + row["group_round"] + 1
                bar(done, f"policy gradient over groups, divergence elsewhere {row['kl_kept']:.4f}")
            else:
                done = clone + rounds + row["decisions"]
                bar(done, f"PPO, return {row.get('return_mean', float('nan')):.1f}")

        return train(
            config,
            recipe.make_env,
            out,
            teacher=recipe.teacher,
            labeller=recipe.labeller,
            player=recipe.player,
            keeper=recipe.keeper,
            evaluate=recipe.evaluate,
            resume=args.resume,
            card=recipe.card,
            progress=moved,
        )


def run_train(args: Args) -> int:
    """Run `schedlab train`."""
    from .presets import PRESETS

    if not args.preset:
        for name, preset in PRESETS.items():
            print(f"{name}  {preset.summary}")
        return 0
    result = train_preset(args)
    agreed = "" if result.agreement is None else f"; after imitation it chose as its teacher in {result.agreement:.0%}"
    print(f"{result.final}: {result.decisions} decisions of PPO{agreed}")
    domain = args.preset.partition("/")[0]
    rules = " ".join(domain_module(domain).COMPARED)
    command.say(f"compare it: schedlab evaluate {domain} --policies {rules} {result.final}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(Args, run_train, argv, "train", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
