"""Measure a real backend and fit the simulator's cost model to it.

hf: bursts of requests, random ones and some of the trace's training part, are run under random schedules; the seconds
of an iteration are fitted by a non-negative linear model in its tokens and contexts. experts: single experts and reads
are timed, and training sequences decoded. threads: graphs of kernels are run on pinned threads, and the kernels timed
there. The file holds the coefficients, the error on what was held out, machine and
versions.

Examples:

  schedlab calibrate hf --out cost.json
  schedlab calibrate hf --iterations 600 --repeats 2 --model path/to/a/model --device cuda --out cost.json
  schedlab evaluate request_scheduling --backend hf --cost-model cost.json
  schedlab calibrate experts --workload moe --out experts.json
  schedlab calibrate threads --tile 128 --out threads.json
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..envs.core.errors import InputError
from . import command
from .domain import pick

if TYPE_CHECKING:
    from ..real_backend.calibrate import Calibration


@dataclass
class HfArgs:
    """Arguments of `schedlab calibrate hf`."""

    backend: Annotated[Literal["hf"], tyro.conf.Positional] = "hf"
    """The engine: Hugging Face transformers' continuous batching."""
    out: Path | None = None
    """File for the cost model (JSON). Without it the model is only printed."""
    iterations: int = 600
    """Different iterations to measure."""
    repeats: int = 2
    """Passes over all of them; two or more tell the noise of the machine."""
    workload: str = "azure_conv"
    """Trace whose engine, made small, is measured, with random requests and with some of its training part."""
    length_scale: float = 16
    """Tokens of the trace for one token of the small engine."""
    model: Path | None = None
    """Folder of a local model. Default: a small Llama with random weights."""
    device: str = "cpu"
    """Where the model runs."""
    seed: int = 0
    """Of the random schedules."""
    data_dir: Path | None = None
    """Folder with trace files. Default: $SCHEDLAB_DATA, then the download cache."""


@dataclass
class ExpertsArgs:
    """Arguments of `schedlab calibrate experts`."""

    backend: Annotated[Literal["experts"], tyro.conf.Positional] = "experts"
    """The engine: a Mixture-of-Experts model whose experts are read from a file."""
    out: Path | None = None
    """File for the cost model (JSON). Without it the model is only printed."""
    tokens: int = 60
    """Tokens of a run."""
    repeats: int = 3
    """Passes over all runs."""
    workload: str = "moe"
    """Routing trace whose training sequences are decoded, in the shape of whose model experts are made."""
    sequences: tuple[int, ...] = (1,)
    """Sequences that are decoded together: a run for each number."""
    model: Path | None = None
    """Folder of an OLMoE checkpoint. Default: random weights in the shape of the trace, which follow its routing."""
    device: str = "cpu"
    """Where the model runs."""
    folder: Path | None = None
    """Where the file of experts is written, on a disk (not tmpfs). Default: a temporary folder."""
    seed: int = 0
    """Of the schedules."""
    data_dir: Path | None = None
    """Folder with trace files. Default: $SCHEDLAB_DATA."""


@dataclass
class ThreadsArgs:
    """Arguments of `schedlab calibrate threads`."""

    backend: Annotated[Literal["threads"], tyro.conf.Positional] = "threads"
    """The engine: pinned threads with real kernels."""
    out: Path | None = None
    """File for the costs of kernels (JSON). Without it they are only printed."""
    tile: int = 128
    """Rows of a tile of data."""
    big: int = 1
    """PEs that are a core."""
    little: int = 1
    """PEs that are a core which works on narrow strips."""
    copies: bool = False
    """PEs have memories of their own, and data are copied between them."""
    repeats: int = 12
    """Runs of each graph; each third is held out."""
    seed: int = 0
    """Of the schedules and the data."""


def measure_pass(calibration: Calibration, label: str = "calibrating") -> None:
    """`Calibration.measure_pass` with a progress bar that counts the engine's iterations."""
    engine: Any = calibration.engine
    with command.progress(label, calibration.num_iterations) as bar:
        count, step = 0, engine.step

        def counted(decision: Any) -> Any:
            nonlocal count
            count += 1
            bar(min(count, calibration.num_iterations))
            return step(decision)

        engine.step = counted  # this engine's method only, for as long as it is calibrated
        try:
            calibration.measure_pass()
        finally:
            del engine.step


def calibrate_hf(args: HfArgs) -> int:
    """Run `schedlab calibrate hf`."""
    from ..envs.request_scheduling.spec import COST_FEATURES
    from ..real_backend.calibrate import Calibration, write_calibration
    from .request_scheduling import open_engine
    from .scenario import build_scenario

    if args.repeats < 1:
        raise InputError(f"repeats is {args.repeats}", remedy="Measure at least once")
    training = build_scenario(args.workload, data_dir=args.data_dir).training.scale_lengths(1 / args.length_scale)
    engine = open_engine(args.length_scale, args.model, args.device, args.workload, args.data_dir)
    calibration = Calibration(engine, args.seed, num_iterations=args.iterations, requests=training)
    for repeat in range(args.repeats):
        measure_pass(calibration, f"calibrating, pass {repeat + 1} of {args.repeats}")
    model, report = calibration.fit()
    engine.close()
    if args.out is not None:
        write_calibration(args.out, model, report)
    print(f"{model.name}, clock {report['clock']}: seconds of an iteration =")
    for name, coefficient in zip(COST_FEATURES, model.coefficients_s, strict=True):
        print(f"  {coefficient:.4g} x {name}")
    print(f"{'':14}{'iterations':>12}{'median':>9}{'P90':>9}{'total':>9}{'worst run':>11}")
    for name in ("fit", "held_out", "repeat_noise"):
        e = report[name]
        print(
            f"{name:14}{e['iterations']:>12}{e['median']:>9.1%}{e['p90']:>9.1%}{e['total']:>+9.1%}"
            f"{e['worst_run_total']:>+11.1%}"
        )
    if args.out is not None:
        command.say(f"wrote {args.out}")
    return 0


def calibrate_experts(args: ExpertsArgs) -> int:
    """Run `schedlab calibrate experts`."""
    from ..real_backend.calibrate_experts import ExpertCalibration, write_cost
    from .expert_caching import open_model
    from .expert_traces import find_trace

    if args.repeats < 1:
        raise InputError(f"repeats is {args.repeats}", remedy="Measure at least once")
    training = find_trace(args.workload, args.data_dir).training
    backend = open_model(training, args)
    calibration = ExpertCalibration(
        backend.model,
        training,
        routing=backend.routing,
        tokens=args.tokens,
        num_sequences=args.sequences,
        seed=args.seed,
    )
    with command.progress("calibrating", args.repeats * calibration.num_runs) as bar:
        count = 0
        for repeat in range(args.repeats):
            for _ in calibration.measure_runs():
                count += 1
                bar(count, f"calibrating, pass {repeat + 1} of {args.repeats}")
    cost, report = calibration.fit()
    backend.close()
    if args.out is not None:
        write_cost(args.out, cost, report)
    print(f"{cost.name}: {cost.source}")
    for name in ("attention_s", "attention_token_s", "expert_s", "expert_token_s", "step_s", "load_s"):
        print(f"  {name:<18}{getattr(cost, name):.4g}")
    print(f"{'':22}{'seconds':>11}{'mean':>9}{'median':>9}")
    for part, name in itertools.product(("fit", "held_out"), ("layer", "stall", "time")):
        e = report[part][name]
        print(f"{part:12}{name:10}{e['seconds']:>11.3g}{e['mean']:>+9.1%}{e['median']:>9.1%}")
    if args.out is not None:
        command.say(f"wrote {args.out}")
    return 0


def calibrate_threads(args: ThreadsArgs) -> int:
    """Run `schedlab calibrate threads`."""
    from ..real_backend.calibrate_threads import ThreadsCalibration
    from .soc_dag_threads import cores_of

    if args.repeats < 1:
        raise InputError(f"repeats is {args.repeats}", remedy="Measure at least once")
    calibration = ThreadsCalibration(cores_of(args), args.tile, copies=args.copies, seed=args.seed)
    with command.progress("calibrating", args.repeats, is_still=True) as bar:
        for repeat in range(args.repeats):
            calibration.measure_pass()
            bar(repeat + 1)
    costs, report = calibration.fit()
    calibration.close()
    if args.out is not None:
        costs.save(args.out)
    print(f"{costs.name}: {costs.source}")
    for kernel, times in costs.times_us.items():
        print(f"  {kernel:<8}" + "".join(f"{us:>10.1f} us {kind}" for kind, us in zip(costs.kinds, times, strict=True)))
    print(f"  hand-over {costs.handoff_us:.1f} us; copies {costs.copy_bandwidth:.0f} bytes/us")
    print(f"{'':12}{'executions':>12}{'total':>9}{'median':>9}{'hand-over, us':>16}")
    for part in ("fit", "held_out"):
        if part in report:
            e = report[part]
            print(f"{part:12}{e['executions']:>12}{e['total']:>+9.1%}{e['median']:>9.1%}{e['handoff_us']:>+16.1f}")
    print(f"other processes took cores: {report['repeated']} runs repeated, {report['disturbed']} left as they were")
    if args.out is not None:
        command.say(f"wrote {args.out}")
    return 0


ARGS: dict[str, type] = {"hf": HfArgs, "experts": ExpertsArgs, "threads": ThreadsArgs}


def calibrate(args: HfArgs | ExpertsArgs | ThreadsArgs) -> int:
    """Run `schedlab calibrate`."""
    if isinstance(args, HfArgs):
        return calibrate_hf(args)
    return calibrate_experts(args) if isinstance(args, ExpertsArgs) else calibrate_threads(args)


def args_for(argv: Sequence[str]) -> type:
    """The arguments of the backend that is named first."""
    return ARGS[pick(argv, list(ARGS))]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(args_for, calibrate, argv, "calibrate", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
