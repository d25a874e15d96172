"""What the commands need of a domain: a module of its name here, and the `Comparison` that it opens.

The module of a domain holds `EvaluateArgs` and `open_comparison(args)`, `DeployArgs` and `open_deployment(args)`, names
of rules that agents are `COMPARED` with, and `metric_info`, `is_oracle` and `draw_run` for tables and pages. Everything
else is written once, for all of them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..envs.core.errors import InputError

if TYPE_CHECKING:
    from ..envs.core.interface import Policy
    from ..envs.core.results import SavesItself

DOMAINS = {
    "request_scheduling": "which requests enter the next iteration of an LLM serving engine",
    "expert_caching": "which experts of a Mixture-of-Experts model to evict, bypass, prefetch",
    "soc_dag": "which task of which job on which processing element of a SoC",
}
"""Domain -> what is decided."""
BACKENDS = {"hf": "request_scheduling", "experts": "expert_caching", "threads": "soc_dag"}
"""Real backend -> its domain."""
DECISION_UNITS = {"decision_p50_us": "us", "decision_p99_us": "us", "decision_share": "share"}
"""Metrics of the cost of deciding, CPU time of `Policy.decide`, and their units."""

Moved = Callable[[float], None]
"""Is told the share of a run that is done, now and then."""


def domain_module(name: str) -> Any:
    """The module of a domain."""
    return import_module(f".{name}", __package__)


def pick(argv: Sequence[str], choices: Sequence[str]) -> str:
    """The one of `choices` that the arguments begin with; the first if they begin with an option, or are none.

    Raises InputError if they begin with anything else.
    """
    if not argv or argv[0].startswith("-"):
        return choices[0]
    if argv[0] not in choices:
        raise InputError(f"{argv[0]!r} is none of {', '.join(choices)}", remedy="Begin with one of them")
    return argv[0]


@dataclass
class Served:
    """What one run left behind."""

    timeline: SavesItself
    decision_s: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(I,) CPU seconds of each decision of the policy; empty if it ran compiled with the simulator."""
    deciding_s: float = 0.0
    """CPU seconds of all decisions, with those of a guard around the policy."""
    engine_s: float = 0.0
    """Seconds of all steps, on the backend's clock."""


class Comparison(Protocol):
    """Everything but the policy and the seed: what policies are compared on, and where they run."""

    domain: str
    workload: str
    instance: str
    """The comparison's name in results, beside the workload's."""
    backend: Any
    backend_name: str
    columns: Sequence[str]
    """Metrics to print, the objective's first."""
    spec: Any
    """What is served on: a record with `to_dict()`."""
    source: str
    """Where the inputs are from."""

    def draw(self, seed: int) -> Any:
        """The inputs of a seed, the same for every policy."""

    def serve(self, policy: Policy, workload: Any, seed: int, moved: Moved) -> Served:
        """One run."""

    def measure(self, served: Served, policy: Any, workload: Any) -> tuple[dict[str, float], dict[str, str]]:
        """(metric -> value, metric -> unit) of a run."""

    def about(self, policy: Policy, workload: Any, seed: int, out: Path) -> dict[str, Any]:
        """What a re-check of the run needs beside its timeline, as JSON; files it names are written to `out`."""


@dataclass
class Deployment:
    """A guarded policy on a real backend, and the rules that it is shown beside."""

    comparison: Comparison
    guard: Any
    """The policy inside its guard (`real_backend.guard`), which counts decisions and failures."""
    policies: Sequence[Any]
    """What is run, the guarded policy first."""
    fingerprints: dict[str, str | None]


def serve(
    backend: Any,
    policy: Policy,
    workload: Any,
    seed: int = 0,
    moved: Moved | None = None,
    finished: Callable[[Any], float] | None = None,
) -> Served:
    """Serve a workload under a policy, timing its decisions. The same loop drives simulator and engine.

    Args:
        backend: a `Backend` that also has `timeline()`.
        policy: made for this backend.
        workload: what is to be served.
        seed: of the backend.
        moved: called now and then with what `finished` says of the state.
        finished: share of the workload that is done.
    """
    backend.reset(workload, seed)
    state = backend.state()
    policy.reset(state)  # once to warm up, so that compilation is no part of the first decision's time
    policy.decide(state, backend.default_decision())
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
        if moved is not None and finished is not None and len(decision_s) % 64 == 0:
            moved(finished(state))
    inner = guarded[before:] if guarded is not None else decision_s
    deciding_s = sum(decision_s) + (sum(inner) if guarded is not None else 0.0)
    return Served(backend.timeline(), np.array(inner), deciding_s, engine_s)


def weights_digest(folder: Path) -> str | None:
    """Digest of the weights in a checkpoint folder; None if there are none."""
    weights = folder / "policy.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16] if weights.is_file() else None


def decision_metrics(served: Served, *, is_real: bool) -> dict[str, float]:
    """The metrics of `DECISION_UNITS`: none of a policy that failed each time, and so decided nothing."""
    metrics: dict[str, float] = {}
    if len(served.decision_s):
        p50, p99 = np.percentile(served.decision_s, [50, 99]) * 1e6
        metrics |= {"decision_p50_us": float(p50), "decision_p99_us": float(p99)}
    if is_real:
        metrics["decision_share"] = served.deciding_s / served.engine_s
    return metrics


def check_named_once(names: Sequence[str]) -> None:
    """Raise InputError unless there are policies, each named once."""
    if not names:
        raise InputError("no policy given", remedy="Name at least one after --policies")
    double = {name for name in names if list(names).count(name) > 1}
    if double:
        raise InputError(f"policies {sorted(double)} are named twice", remedy="Name each once")
