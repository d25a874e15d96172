"""Serve the same requests under several policies and compare them.

Seeds are paired: a seed draws the window of the trace, the length predictions and the SLO classes, the same for every
policy. The table shows the mean over seeds and its 95% bootstrap interval, and marks the best row.

Examples:

  schedlab evaluate request_scheduling --policies fcfs sarathi_512 srpt agent --workload azure_conv --load 1.1
  schedlab evaluate request_scheduling --policies srpt knobs runs/mine --objective goodput --out results/goodput
  schedlab evaluate request_scheduling --policies fcfs srpt --backend hf --window 60 --seeds 3
  schedlab evaluate --validate results/goodput
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from ..envs.core.errors import InputError
from . import command

if TYPE_CHECKING:
    import pandas as pd

    from ..envs.core.interface import Policy
    from ..envs.core.results import RunKey
    from ..envs.request_scheduling.spec import CostModel
    from ..envs.request_scheduling.timeline import Timeline
    from ..envs.request_scheduling.workload import Workload
    from .scenario import Scenario

DOMAIN = "request_scheduling"
CELLS_FILE = "evaluate.json"
"""Beside results.csv: what each cell was, so that a resumed evaluation cannot mix two."""
DECISION_UNITS = {"decision_p50_us": "us", "decision_p99_us": "us", "decision_share": "share"}
"""Metrics of the cost of deciding, CPU time of `Policy.decide`, and their units."""


@dataclass
class Args:
    """Arguments of `schedlab evaluate`."""

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
    seeds: int = 5
    """Number of paired seeds."""
    seed: int = 0
    """The first of them."""
    backend: Literal["sim", "hf"] = "sim"
    """The simulator, or a real model served by transformers' continuous batching (small: see --length-scale)."""
    true_lengths: bool = False
    """Also run every policy with true output lengths for predictions: oracle rows, apart from the others."""
    part: Literal["test", "all"] | None = None
    """Requests after the training part, or all. Default: test for traces that agents are trained on."""
    metrics: tuple[str, ...] = ()
    """Columns to print; all metrics are in results.csv."""
    out: Path | None = None
    """Folder for results.csv and schedules/. Without it the table is printed and nothing is kept."""
    resume: bool = False
    """Go on with the results that are in --out."""
    validate: Path | None = None
    """Evaluate nothing; re-check every figure in this results folder from its schedules."""
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
    data_dir: Path | None = None
    """Folder with trace files. Default: $SCHEDLAB_DATA, then the download cache."""


# --------------------------------------------------------------------------------------------- one run


@dataclass
class Served:
    """What one run left behind."""

    timeline: Timeline
    decision_s: np.ndarray
    """(I,) CPU seconds of each decision of the policy."""
    deciding_s: float
    """CPU seconds of all decisions, with those of a guard around the policy."""
    engine_s: float
    """Seconds of all iterations, on the backend's clock."""


def warm_up(policy: Policy, backend: Any) -> None:
    """Decide once and throw it away, so that compilation is no part of the first decision's time."""
    policy.reset(backend.state())
    policy.decide(backend.state(), backend.default_decision())


def serve(
    backend: Any, policy: Policy, workload: Workload, seed: int = 0, moved: Callable[[float], None] | None = None
) -> Served:
    """Serve a workload under a policy, timing its decisions. The same loop drives simulator and engine.

    Args:
        backend: a `Backend` that also has `timeline()`.
        policy: made for this backend.
        workload: the requests.
        seed: of the backend.
        moved: called now and then with the share of requests that are finished.
    """
    backend.reset(workload, seed)
    state = backend.state()
    engine = state.engine[0]
    warm_up(policy, backend)
    policy.reset(state)
    guarded: list[float] | None = getattr(policy, "decision_cpu_s", None)  # a guard decides in a thread of its own
    before = len(guarded or ())
    decision_s: list[float] = []
    engine_s, done = 0.0, False
    while not done:
        decision, state = backend.default_decision(), backend.state()
        start = time.thread_time()  # not wall time: others may run on this core
        policy.decide(state, decision)
        decision_s.append(time.thread_time() - start)
        outcome = backend.step(decision)
        engine_s += outcome.seconds
        done = outcome.done
        if moved is not None and len(decision_s) % 64 == 0:
            moved(float(engine["num_finished"]) / len(workload))
    inner = guarded[before:] if guarded is not None else decision_s
    deciding_s = sum(decision_s) + (sum(inner) if guarded is not None else 0.0)
    return Served(backend.timeline(), np.array(inner), deciding_s, engine_s)


def measure(served: Served, kv_blocks: int, *, is_real: bool) -> tuple[dict[str, float], dict[str, str]]:
    """(metric -> value, metric -> unit) of a run."""
    from ..envs.request_scheduling.metrics import compute_metrics, metric_info

    metrics = compute_metrics(served.timeline, kv_blocks)
    units = {name: metric_info(name)[0] for name in metrics}
    if len(served.decision_s):  # a policy that failed each time decided nothing
        p50, p99 = np.percentile(served.decision_s, [50, 99]) * 1e6
        metrics |= {"decision_p50_us": float(p50), "decision_p99_us": float(p99)}
    if is_real:
        metrics["decision_share"] = served.deciding_s / served.engine_s
    return metrics, units | {name: unit for name, unit in DECISION_UNITS.items() if name in metrics}


# ------------------------------------------------------------------------------------------ many runs


@dataclass
class Evaluation:
    """Runs of several policies in one scenario, written to a results folder as they end."""

    scenario: Scenario
    backend: Any
    backend_name: str
    out: Path
    resume: bool = False
    fingerprints: dict[str, str | None] = field(default_factory=dict)
    """policy -> digest of its weights."""

    def __post_init__(self) -> None:
        from ..envs.core.results import ResultsFile

        self.file = ResultsFile(self.out / "results.csv", resume=self.resume)
        if self.file.dropped:
            command.say(f"dropped {self.file.dropped} from {self.file.path}")
        self._check_cell()

    def key(self, policy: str, seed: int) -> RunKey:
        """The run of a policy and a seed."""
        from ..envs.core.results import RunKey

        s = self.scenario
        return RunKey(DOMAIN, s.workload, s.instance, policy, self.backend_name, self.backend.clock, seed)

    def run(self, policies: Sequence[Policy], seeds: Sequence[int], *, true_lengths: bool = False) -> pd.DataFrame:
        """Run what is not in the file yet; the rows of this evaluation's runs."""
        from .policies import WITH_TRUE_LENGTHS

        names = [policy.name for policy in policies]
        if true_lengths:
            names += [name + WITH_TRUE_LENGTHS for name in names]
        done = self.file.done_runs()
        todo = [(seed, i) for seed in seeds for i in range(len(names)) if self.key(names[i], seed) not in done]
        with command.progress("evaluating", max(len(todo), 1)) as bar:
            drawn: dict[int, Workload] = {}
            for count, (seed, i) in enumerate(todo):
                bar(count, f"{names[i]}, seed {seed}")
                if seed not in drawn:
                    drawn = {seed: self.scenario.draw(seed)}
                workload = drawn[seed] if i < len(policies) else drawn[seed].with_true_lengths()

                def moved(share: float, count: int = count) -> None:
                    bar(count + share)

                self._run_one(policies[i % len(policies)], names[i], workload, seed, moved)
        return self.rows(names, seeds)

    def _run_one(
        self, policy: Policy, name: str, workload: Workload, seed: int, moved: Callable[[float], None]
    ) -> None:
        from ..envs.core.results import save_schedule

        served = serve(self.backend, policy, workload, seed, moved)
        kv_blocks = self.scenario.spec.engine.kv_blocks
        metrics, units = measure(served, kv_blocks, is_real=self.backend_name != "sim")
        key = self.key(name, seed)
        source = getattr(policy, "source", "")
        about = {"kv_blocks": kv_blocks, "spec": self.scenario.spec.to_dict(), "workload": workload.source}
        save_schedule(
            self.out, key, served.timeline, **about, policy=source, weights=self.fingerprints.get(policy.name)
        )
        self.file.append(key, metrics, units)

    def rows(self, policies: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
        """Rows of these runs, in the order of the policies."""
        import pandas as pd

        frame = self.file.read()
        key = self.key("x", 0)
        mine = frame[
            (frame["workload"] == key.workload)
            & (frame["instance"] == key.instance)
            & (frame["backend"] == key.backend)
            & (frame["clock"] == key.clock)
            & frame["seed"].isin(list(seeds))
        ]
        return pd.concat([mine[mine["policy"] == name] for name in policies], ignore_index=True)

    def _check_cell(self) -> None:
        """Refuse to mix runs of unlike engines, or of a checkpoint that has changed, under one name."""
        from ..envs.core.results import atomic_path

        path = self.out / CELLS_FILE
        cells = read_cells(self.out)
        name = cell_name(self.scenario, self.backend_name)
        spec = json.loads(json.dumps(self.scenario.spec.to_dict()))
        cell = cells.setdefault(name, {"spec": spec, "weights": {}})
        if cell["spec"] != spec:
            changed = [key for key in spec if cell["spec"].get(key) != spec[key]]
            raise InputError(
                f"the runs there are of another engine: {', '.join(changed)} differ",
                file=path,
                remedy="Choose another folder with --out",
            )
        for policy, digest in self.fingerprints.items():
            if digest != cell["weights"].get(policy, digest):
                raise InputError(
                    f"the runs of {policy!r} there are of other weights",
                    file=path,
                    remedy="Choose another folder with --out",
                )
            cell["weights"][policy] = digest
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(cells, indent=1) + "\n")


def cell_name(scenario: Scenario, backend: str) -> str:
    """Name of a cell in `CELLS_FILE`."""
    return f"{scenario.workload}: {scenario.instance} on {backend}"


def read_cells(out: Path) -> dict[str, Any]:
    """What `CELLS_FILE` of a results folder holds; nothing if there is none."""
    path = out / CELLS_FILE
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise InputError(
            f"not readable as JSON ({error})", file=path, remedy="Choose another folder with --out"
        ) from error


def show(frame: pd.DataFrame, metric: str, metrics: Sequence[str] = (), *, title: str = "") -> None:
    """Print the table of the runs in `frame`, the objective's metric first."""
    from ..envs.core.results import print_summary, summary_table
    from .policies import is_oracle

    other = "slo_goodput" if metric == "mean_e2e_s" else "mean_e2e_s"
    columns = tuple(metrics) or (metric, other, "p99_ttft_s", "max_wait_s", "decision_p99_us", "decision_share")
    oracles = [name for name in frame["policy"].unique() if is_oracle(name)]
    console = command.console()
    if title:
        console.print(title)
    print_summary(summary_table(frame), directions(frame), metrics=columns, oracles=oracles, console=console)


def directions(frame: pd.DataFrame) -> dict[str, bool | None]:
    """metric -> lower is better, for the metrics in `frame`."""
    from ..envs.request_scheduling.metrics import metric_info

    names = frame["metric"].unique()
    return {name: None if name in DECISION_UNITS else metric_info(name)[1] for name in names}


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


def measured_cost(engine: Any, path: Path | None, *, seed: int = 0, num_iterations: int = 120) -> CostModel:
    """The cost model in `path`, or one fitted now in a short calibration."""
    from ..envs.request_scheduling.spec import CostModel
    from ..real_backend.calibrate import Calibration
    from .calibrate import measure_pass

    if path is not None:
        return CostModel.load(path)
    calibration = Calibration(engine, seed, num_iterations=num_iterations)
    measure_pass(calibration)
    model, report = calibration.fit()
    command.say(
        f"no --cost-model given: fitted one to {report['fit']['iterations']} iterations (held-out median error "
        f"{report['held_out']['median']:.0%}, total {report['held_out']['total']:+.1%})"
    )
    return model


# ----------------------------------------------------------------------------------------------- command


def find_policies(names: Sequence[str], scenario: Scenario) -> list[Policy]:
    """The policies of these names, for the scenario's engine. Raises InputError.

    Rules are shown a small engine in full-size units, in which their knobs are published; what was learned or
    searched sees the engine as it is.
    """
    from .policies import KNOBS, find_policy, is_published

    if not names:
        raise InputError("no policy given", remedy="Name at least one after --policies")
    double = {name for name in names if list(names).count(name) > 1}
    if double:
        raise InputError(f"policies {sorted(double)} are named twice", remedy="Name each once")
    policies = []
    for name in sorted(names, key=lambda name: name == KNOBS):  # the search takes longest: errors come before it
        training = scenario.training_windows() if name == KNOBS else ()
        spec = scenario.policy_spec if is_published(name) else scenario.spec
        policy = find_policy(name, spec, metric=scenario.metric, training=training)
        policies.append(scenario.show(policy) if is_published(name) else policy)
    return sorted(policies, key=lambda policy: list(names).index(policy.name))


def evaluate(args: Args) -> int:
    """Run `schedlab evaluate`."""
    from ..envs.request_scheduling.sim import Simulator
    from .policies import KNOBS, find_policy, fingerprint
    from .scenario import build_scenario

    if args.validate is not None:
        return validate(args.validate)
    if args.seeds < 1:
        raise InputError(f"--seeds is {args.seeds}", remedy="Give at least 1")
    check_output(args.out, args.resume, args.metrics)
    part = args.part or ("test" if KNOBS in args.policies else None)
    wanted: dict[str, Any] = dict(
        load=args.load, objective=args.objective, requests=args.window, part=part, data_dir=args.data_dir
    )
    plain = build_scenario(args.workload, **wanted)
    for name in args.policies:  # a wrong name is told before an engine is started
        if name != KNOBS:
            find_policy(name, plain.policy_spec)
    if args.backend == "sim":
        scenario = plain
        backend: Any = Simulator(scenario.spec)
    else:
        backend = open_engine(args.length_scale, args.model, args.device, args.workload, args.data_dir, args.kv_blocks)
        cost = known_cost(args) or measured_cost(backend, args.cost_model, seed=args.seed)
        wanted |= dict(length_scale=args.length_scale, kv_blocks=args.kv_blocks)
        scenario = build_scenario(args.workload, **wanted, cost=cost)
        backend.slo_classes = scenario.spec.slo_classes
    command.say(scenario.pool.source)
    policies = find_policies(args.policies, scenario)
    seeds = range(args.seed, args.seed + args.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        prints = {name: fingerprint(name) for name in args.policies}
        evaluation = Evaluation(scenario, backend, args.backend, out, args.resume, prints)
        frame = evaluation.run(policies, seeds, true_lengths=args.true_lengths)
        show(frame, scenario.metric, args.metrics)
    backend.close()
    if args.out:
        command.say(f"wrote {args.out / 'results.csv'}; re-check with `schedlab evaluate --validate {args.out}`")
    return 0


def check_output(out: Path | None, resume: bool, metrics: Sequence[str] = ()) -> None:
    """What can be wrong with the output, told before anything is run. Raises InputError."""
    from ..envs.core.results import ResultsFile
    from ..envs.request_scheduling.metrics import metric_info

    for name in metrics:
        if name not in DECISION_UNITS:
            metric_info(name)
    if out is not None:
        ResultsFile(out / "results.csv", resume=resume)
        read_cells(out)


def known_cost(args: Args) -> CostModel | None:
    """The cost model with which the runs in --out were made, if they are resumed and none is named."""
    if not (args.resume and args.out and args.cost_model is None):
        return None
    from ..envs.request_scheduling.spec import RequestSchedulingSpec

    costs = [RequestSchedulingSpec.from_dict(cell["spec"]).cost for name, cell in read_cells(args.out).items()
             if name.endswith(" on hf")]  # fmt: skip
    return costs[-1] if costs else None


def validate(folder: Path) -> int:
    """Re-check a results folder; exit status 1 if anything does not agree."""
    from .validate import validate_folder

    report = validate_folder(folder, progress=True)
    print(report)
    return 0 if report.ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return command.run(Args, evaluate, argv, "evaluate", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
