"""The commands' side of scheduling task graphs on a SoC: its arguments, streams of jobs, and contenders."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from ..envs.core.errors import InputError
from . import deploy, evaluate
from .domain import Deployment, Moved, Served, check_named_once, weights_digest

if TYPE_CHECKING:
    from ..agents.soc_dag_rollout import RolloutScheduling
    from ..envs.soc_dag.library import Plan
    from ..envs.soc_dag.spec import Soc, SocDagSpec
    from ..envs.soc_dag.workload import Dag, Stream, Workload

DOMAIN = "soc_dag"
PLOTTED = ("mean_latency", "makespan", "energy", "deadline_misses")
"""Metrics with a plot of their own in a report."""
OBJECTIVES = {
    "latency": "mean_latency",
    "makespan": "makespan",
    "energy": "energy",
    "edp": "edp",
    "deadline": "deadline_misses",
}
"""Objective -> its metric."""
COMPARED = ("heft_rt", "late_srpt")
"""Rules that agents are shown beside."""
AGENT = r"agent(?:_([1-9]\d*)(_climb)?)?"
"""The shipped agent: deciding online, or planning by the best of so many schedules, with local search from each."""
ROLLOUT = r"agent_rollout_([1-9]\d*)"
"""The shipped agent, its likeliest rows played on under so many draws of the durations before each decision."""
HINDSIGHT = "hindsight"
"""An oracle: the shipped agent's likeliest rows and late SRPT's choice, played on as the future will be."""
CLIMB = r"climb_([1-9]\d*)"
"""Local search from the plans of the static schedulers, so many times."""


@dataclass
class StreamArgs:
    """How jobs arrive, and the PEs of the `threads` backend."""

    gap: float = 0.0
    """Mean us between arrivals (DS3's scale); 0: all jobs are there at the start."""
    window: int = 1
    """Jobs in a run."""
    deadline_slack: float = 3.0
    """For the objective deadline: when a job is due, in its shortest possible latencies after its arrival."""
    big: int = 1
    """threads: PEs that are a core."""
    little: int = 1
    """threads: PEs that are a core which works on narrow strips."""
    tile: int = 128
    """threads: rows of a tile of data."""
    copies: bool = False
    """threads: PEs have memories of their own, and data are copied between them."""
    cost_model: Path | None = None
    """threads: what kernels take, as written by `schedlab calibrate threads`. Default: a short measurement."""


@dataclass
class EvaluateArgs(StreamArgs, evaluate.Args):
    """Arguments of `schedlab evaluate soc_dag`."""

    domain: Annotated[Literal["soc_dag"], tyro.conf.Positional] = "soc_dag"
    """What is scheduled."""
    policies: tuple[str, ...] = ("eft", "heft_rt", "late_rank", "late_srpt")
    """Names of rules, or of static schedulers (heft, lookahead_heft, cpop, peft), whose plans are followed; `agent`
    (the shipped one), agent_<n> (plans by the best of n of its schedules), agent_rollout_<n> (tries its likeliest rows
    out under n draws of the durations, at every decision), hindsight (tries them out in the future that will be: an
    oracle), or the folder of a checkpoint."""
    workload: str = "random"
    """random (layered graphs of 20-50 tasks on 4 PEs), cholesky_8, lu_8, qr_8 (tiles; 2 CPUs and 2 GPUs), pipeline_4x8
    (stages, microbatches), ds3 and gym_ds3 (from the data folder), tools_2, a .stg graph, or a WfCommons .json."""
    objective: Literal["latency", "makespan", "energy", "edp", "deadline"] = "latency"
    """What the first column shows."""
    noise: float = 0.0
    """Relative spread of the durations: normal as in DS3 for ds3, lognormal else; the same draws for every policy."""
    transfers: Literal["pull", "push"] | None = None
    """Data move when their consumer is bound (pull), or as soon as they are made, wherever they may be needed (push).
    Default: push for ds3 and gym_ds3, whose own simulators do so, else pull."""
    choose_frequency: bool = False
    """Every decision may choose the frequency at which a task runs; else all run at their PE's default one."""
    backend: Literal["sim", "threads"] = "sim"
    """The simulator, or pinned threads with real kernels. threads: workloads are cholesky_8, lu_6, qr_6, flow_40 (FFT,
    FIR and MATMUL), flows_40, mix_6."""


@dataclass
class DeployArgs(StreamArgs, deploy.Args):
    """Arguments of `schedlab deploy --backend threads`."""

    backend: Literal["threads"] = "threads"
    """The engine: pinned threads with real kernels."""
    workload: str = "cholesky_8"
    """cholesky_8, lu_6, qr_6, flow_40 (FFT, FIR and MATMUL), flows_40 (six of these), mix_6 (all of them)."""
    objective: Literal["latency", "makespan", "deadline"] = "makespan"
    """What the first column shows."""
    time_budget: float | None = None
    """Wall seconds for one decision; after a longer one the default decides. Default: no limit."""


@dataclass
class SocComparison:
    """A `Comparison` of schedulers of task graphs, in the simulator."""

    workload: str
    soc: Soc
    stream: Stream
    spec: SocDagSpec
    backend: Any
    backend_name: str = "sim"
    domain: str = field(default=DOMAIN, init=False)

    def __post_init__(self) -> None:
        self._planned: Workload | None = None
        self._rules: dict[str, Any] = {}
        arrivals = f"every {self.stream.gap_us:g} us" if self.stream.gap_us else "at once"
        noise = f", {self.spec.noise} noise {self.spec.noise_sigma:g}" if self.spec.noise_sigma else ""
        jobs = f"{self.stream.num_jobs} jobs {arrivals}" if self.stream.num_jobs > 1 else "1 job"
        chosen = ", frequencies chosen" if self.spec.choose_frequency else ""
        slack = f" slack {self.stream.slack:g}" if self.spec.objective == "deadline" else ""
        self.instance = f"{jobs} on {self.soc.name}{noise}, {self.spec.transfers}, {self.spec.objective}{slack}{chosen}"
        self.source = self.stream.source
        first = OBJECTIVES[self.spec.objective]
        others = ("mean_latency", "p95_latency", "mean_slowdown", "makespan", "energy", "deadline_misses")
        self.columns: Sequence[str] = (first, *(name for name in others if name != first))

    @property
    def is_powered(self) -> bool:
        """True if the SoC says what its PEs draw."""
        return any(kind.power_w or kind.idle_w for kind in self.soc.kinds)

    def draw(self, seed: int) -> Workload:
        """Jobs and arrivals of a seed; the noise is drawn by it, too."""
        return self.stream.draw(np.random.default_rng(seed))

    def serve(self, policy: Any, workload: Workload, seed: int, moved: Moved) -> Served:
        """One run, compiled, under the binding that the rule is published with."""
        from ..envs.soc_dag.sim import Simulator

        rule = self._rule(policy, workload)
        simulator = Simulator(self.spec.replace(binding=rule.binding))
        simulator.reset(workload, seed)
        rule.run(simulator)
        return Served(simulator.timeline())

    def _rule(self, policy: Any, workload: Workload) -> Any:
        """`rule_of` the policy, planned once for each workload."""
        if self._planned is not workload:
            self._planned, self._rules = workload, {}
        if policy.name not in self._rules:
            self._rules[policy.name] = rule_of(policy, workload, self.spec)
        return self._rules[policy.name]

    def measure(self, served: Served, policy: Any, workload: Workload) -> tuple[dict[str, float], dict[str, str]]:
        """Latencies, makespan, energy, deadlines."""
        from ..envs.soc_dag.metrics import compute_metrics

        timeline: Any = served.timeline
        metrics = compute_metrics(timeline, workload, self.soc)
        left_out = [] if self.is_powered else ["energy", "edp"]
        left_out += ["deadline_misses"] if np.isnan(metrics["deadline_misses"]) else []
        metrics = {name: value for name, value in metrics.items() if name not in left_out}
        return metrics, {name: metric_info(name)[0] for name in metrics}

    def about(self, policy: Any, workload: Workload, seed: int, out: Path) -> dict[str, Any]:
        """The spec with the rule's binding, and the graphs of the jobs."""
        rule = self._rule(policy, workload)
        return {
            "spec": self.spec.replace(binding=rule.binding).to_dict(),
            "seed": seed,
            "kind_names": list(workload.kind_names),
            "dags": [
                {"name": d.name, "times": d.times.tolist(), "edges": d.edges.tolist(), "volumes": d.volumes.tolist()}
                for d in workload.dags
            ],
            "dag_of_job": workload.dag_of_job.tolist(),
            "arrival_us": workload.arrival_us.tolist(),
            "deadline_us": [None if np.isinf(due) else due for due in workload.deadline_us.tolist()],
            "workload": workload.source,
        }


class _Model:
    """Stands for the simulators, of which every run has its own."""

    clock = "model"

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Planner:
    """A static scheduler, or an agent that plans: its rule follows the plan of every graph of a workload."""

    name: str
    plan: Callable[[Dag, SocDagSpec], Plan]
    source: str = ""
    is_oracle: bool = False


def rule_of(policy: Any, workload: Workload, spec: SocDagSpec) -> Any:
    """The policy itself, or the rule that follows a planner's plans: of several jobs only where tasks run, for jobs
    that keep to a planned order as well would wait for each other."""
    from ..baselines.soc_static import placement_rule, plan_rule

    if not isinstance(policy, Planner):
        return policy
    plans = [policy.plan(dag, spec) for dag in workload.dags]
    follow = plan_rule if len(workload) == 1 else placement_rule
    return follow(policy.name, plans, policy.source)


def static_planner(name: str) -> Planner:
    """A static scheduler as a planner."""
    from ..baselines.soc_static import STATIC
    from ..envs.soc_dag.library import Graph

    def plan(dag: Dag, spec: SocDagSpec) -> Plan:
        return STATIC[name](Graph.of(dag, spec.soc))

    return Planner(name, plan, (STATIC[name].__doc__ or "").splitlines()[0])


def sampling_planner(name: str, samples: int, is_climbed: bool) -> Planner:
    """The shipped agent, planning every graph by the best of its schedules, justified, and climbed from if wanted.

    Raises InputError.
    """
    from ..agents.soc_dag import load_pointer, sampled_plans
    from ..baselines.soc_climb import MOVES, best_climbed
    from ..baselines.soc_justify import justified
    from ..envs.soc_dag.library import Graph

    agent, moves = load_pointer(), MOVES if is_climbed else 0

    def plan(dag: Dag, spec: SocDagSpec) -> Plan:
        graph = Graph.of(dag, spec.soc)
        return best_climbed(graph, justified(graph, sampled_plans(agent, spec.soc, dag, samples)), moves)

    climbed = f" and climbed by {moves} moves" if moves else ""
    return Planner(name, plan, f"best of {samples} schedules of the shipped agent, each justified{climbed}")


def rollout_scheduler(name: str, scenarios: int) -> RolloutScheduling:
    """The shipped agent with rollouts of late SRPT. Raises InputError."""
    from ..agents.soc_dag import load_pointer
    from ..agents.soc_dag_rollout import RolloutScheduling
    from ..baselines.soc_dag import RULES

    return RolloutScheduling(name, load_pointer(), RULES["late_srpt"], scenarios)


def climbing_planner(name: str, starts: int) -> Planner:
    """The best of `starts` climbs from the justified plans of the static schedulers."""
    from ..baselines.soc_climb import climb_from_static
    from ..envs.soc_dag.library import Graph

    def plan(dag: Dag, spec: SocDagSpec) -> Plan:
        return climb_from_static(Graph.of(dag, spec.soc), starts)

    return Planner(name, plan, f"best of {starts} climbs from the justified plans of the static schedulers")


def checkpoint_of(name: str) -> Path | None:
    """The checkpoint folder that a name means: the shipped one, the folder itself, or its final/; else None."""
    from ..agents.soc_dag import SHIPPED

    folder = SHIPPED if re.fullmatch(f"{AGENT}|{ROLLOUT}|{HINDSIGHT}", name) else Path(name).expanduser()
    found = [one for one in (folder, folder / "final") if (one / "policy.safetensors").exists()]
    return found[0] if found else folder if folder.is_dir() else None


def fingerprint(name: str) -> str | None:
    """Digest of a checkpoint's weights; None for what is named by code alone."""
    folder = checkpoint_of(name)
    return weights_digest(folder) if folder else None


def find_policies(names: Sequence[str]) -> list[Any]:
    """The rules, planners and agents of these names. Raises InputError."""
    from ..agents.soc_dag import load_pointer
    from ..agents.soc_dag_hindsight import HindsightScheduling
    from ..baselines.soc_dag import RULES
    from ..baselines.soc_static import STATIC

    check_named_once(names)
    found: list[Any] = []
    for name in names:
        if name in RULES:
            found.append(RULES[name])
        elif name in STATIC:
            found.append(static_planner(name))
        elif climbing := re.fullmatch(CLIMB, name):
            found.append(climbing_planner(name, int(climbing[1])))
        elif (planning := re.fullmatch(AGENT, name)) and planning[1]:
            found.append(sampling_planner(name, int(planning[1]), bool(planning[2])))
        elif rolling := re.fullmatch(ROLLOUT, name):
            found.append(rollout_scheduler(name, int(rolling[1])))
        elif name == HINDSIGHT:
            found.append(HindsightScheduling(name, load_pointer(), RULES["late_srpt"]))
        elif (folder := checkpoint_of(name)) is not None:
            found.append(load_pointer(folder, name))
        else:
            close = get_close_matches(name, [*RULES, *STATIC], n=1)
            raise InputError(
                f"no policy is called {name!r}",
                remedy=(f"Did you mean {close[0]!r}? " if close else "")
                + f"Policies are {', '.join([*RULES, *STATIC])}, climb_<starts>, agent, agent_<samples>, "
                "agent_<samples>_climb, agent_rollout_<draws>, hindsight, or a checkpoint folder",
            )
    return found


def open_comparison(args: EvaluateArgs) -> tuple[SocComparison, list[Any], dict[str, str | None]]:
    """The comparison and its policies. Raises InputError."""
    from ..envs.soc_dag.catalog import find_stream
    from ..envs.soc_dag.spec import SocDagSpec

    if args.backend == "threads":
        from . import soc_dag_threads

        return soc_dag_threads.open_comparison(args)
    policies = find_policies(args.policies)
    slack = args.deadline_slack if args.objective == "deadline" else float("inf")
    soc, stream = find_stream(args.workload, args.gap, args.window, slack=slack, data_dir=args.data_dir)
    is_ds3 = args.workload in ("ds3", "gym_ds3")
    spec = SocDagSpec(
        soc,
        transfers=args.transfers or ("push" if is_ds3 else "pull"),
        noise="none" if args.noise == 0 else "normal" if is_ds3 else "lognormal",
        noise_sigma=args.noise,
        choose_frequency=args.choose_frequency,
        objective=args.objective,
    )
    comparison = SocComparison(args.workload, soc, stream, spec, _Model())
    if args.objective in ("energy", "edp") and not comparison.is_powered:
        raise InputError(f"SoC {soc.name!r} does not say what its PEs draw", remedy="Choose another objective, or ds3")
    return comparison, policies, {name: fingerprint(name) for name in args.policies}


def open_deployment(args: DeployArgs) -> Deployment:
    """The guarded policy on real cores, with the rules that it is compared with. Raises InputError."""
    from . import soc_dag_threads

    return soc_dag_threads.open_deployment(args)


def is_oracle(policy: str) -> bool:
    """True for the name of a policy that was given the future."""
    return policy == HINDSIGHT


def metric_info(name: str) -> tuple[str, bool | None]:
    """(unit, lower is better) of a metric. Raises InputError."""
    from ..envs.soc_dag.metrics import metric_info

    return metric_info(name)


def draw_run(timeline_path: Path, about: dict[str, Any]) -> Any:
    """A Gantt chart of a saved run."""
    from ..envs.soc_dag.render import draw_gantt
    from ..envs.soc_dag.spec import SocDagSpec
    from ..envs.soc_dag.timeline import Timeline

    spec = SocDagSpec.from_dict(about["spec"])
    return draw_gantt(Timeline.load(timeline_path), workload_of(about), spec.soc)


def workload_of(about: dict[str, Any]) -> Workload:
    """The jobs that a saved run's description holds. Raises InputError."""
    from ..envs.soc_dag.workload import Dag, Workload

    dags = [Dag.from_arrays(d["name"], d["times"], d["edges"], d["volumes"]) for d in about["dags"]]
    deadlines = [np.inf if due is None else due for due in about["deadline_us"]]
    return Workload.from_arrays(
        "saved",
        about["kind_names"],
        dags,
        about["dag_of_job"],
        about["arrival_us"],
        deadlines,
        source=about["workload"],
    )
