"""Policies by name: the field's rules, the shipped agent, checkpoints, and rules with searched knobs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..baselines.request_scheduling import FCFS, ORDER_NAMES, RULES, ordered_rule
from ..envs.core.errors import InputError
from ..envs.core.interface import Policy
from ..envs.request_scheduling.spec import RequestSchedulingSpec
from ..envs.request_scheduling.state import Decision, State
from ..envs.request_scheduling.table import FEATURE_VERSION, NUM_CANDIDATE, NUM_CONTEXT
from ..envs.request_scheduling.workload import Workload
from .domain import weights_digest

if TYPE_CHECKING:
    from ..envs.request_scheduling.rule import Rule

ENV_ID = "schedlab/RequestScheduling-v0"
SHIPPED = Path(__file__).resolve().parent.parent / "agents" / "shipped" / "request_scheduling"
"""Checkpoint of the agent that comes with the package."""
AGENT, KNOBS = "agent", "knobs"
WITH_TRUE_LENGTHS = " with true lengths"
"""End of the name of a policy that was given true output lengths: its results are an oracle's."""

_SARATHI = re.compile(r"sarathi_(\d+)")
_FIXED_KNOBS = re.compile(r"knobs\((\w+),(\d+),(\d+)\)")


def policy_names() -> str:
    """What may be given as a policy, as text."""
    return (
        f"{', '.join(RULES)}, sarathi_<budget>, {KNOBS} (searched), knobs(<order>,<budget>,<running>), {AGENT} "
        "(the shipped one), or the folder of a checkpoint"
    )


def is_oracle(policy: str) -> bool:
    """True for the name of a policy that was given the future."""
    return policy.endswith(WITH_TRUE_LENGTHS)


def is_published(policy: str) -> bool:
    """True for the name of a rule with knobs as given; False for what was learned, or searched, for an engine."""
    return policy in RULES or bool(_SARATHI.fullmatch(policy) or _FIXED_KNOBS.fullmatch(policy))


def find_policy(
    name_or_path: str,
    spec: RequestSchedulingSpec,
    *,
    metric: str = "mean_e2e_s",
    training: Sequence[Workload] = (),
) -> Policy[State, Decision]:
    """The policy of a name or a checkpoint folder.

    Args:
        name_or_path: see `policy_names`.
        spec: of the engine, in the units in which the policy will see it.
        metric: what `knobs` are searched for, "mean_e2e_s" or "slo_goodput".
        training: requests on which `knobs` are searched.

    Raises:
        InputError: unknown name; a checkpoint that is missing, broken, or for another env or feature version; a
            token budget larger than the engine's; `knobs` without training requests.
    """
    rule: Any = None  # a Rule is frozen, and so no Policy to a type checker
    if name_or_path in RULES:
        rule = RULES[name_or_path]
    elif match := _SARATHI.fullmatch(name_or_path):
        rule = ordered_rule(name_or_path, FCFS, token_budget=_budget(name_or_path, int(match[1]), spec))
    elif match := _FIXED_KNOBS.fullmatch(name_or_path):
        rule = _fixed_knobs(name_or_path, match, spec)
    elif name_or_path == KNOBS:
        rule = search_knobs(spec, metric, training)
    if rule is not None:
        return rule
    if name_or_path == AGENT:
        if not SHIPPED.is_dir():
            raise InputError(
                "this installation has no shipped agent for request_scheduling",
                file=SHIPPED,
                remedy="Train one with `schedlab train request_scheduling/tiny` and give its folder",
            )
        return load_agent(AGENT, SHIPPED, spec)
    folder = Path(name_or_path).expanduser()
    if folder.exists():
        return load_agent(name_or_path, folder, spec)
    close = get_close_matches(name_or_path, [*RULES, KNOBS, AGENT], n=1)
    raise InputError(
        f"no policy and no folder is called {name_or_path!r}",
        remedy=(f"Did you mean {close[0]!r}? " if close else "") + f"Policies are {policy_names()}",
    )


def checkpoint_folder(folder: Path) -> Path:
    """The checkpoint in a folder: the folder itself, or `final/` or `best/` of a training run."""
    for candidate in (folder, folder / "final", folder / "best"):
        if (candidate / "policy.safetensors").exists():
            return candidate
    return folder


def load_agent(name: str, folder: Path, spec: RequestSchedulingSpec) -> Policy[State, Decision]:
    """The policy of a checkpoint: compiled if its network has a compiled twin, by ONNX Runtime otherwise."""
    from ..agents.checkpoint import load_checkpoint
    from ..agents.compiled import pack_weights
    from ..agents.request_scheduling import CompiledPolicy, TablePolicy

    checkpoint = load_checkpoint(
        checkpoint_folder(folder),
        env_id=ENV_ID,
        feature_version=FEATURE_VERSION,
        context_size=NUM_CONTEXT,
        candidate_size=NUM_CANDIDATE,
    )
    if checkpoint.network.config["encoder"] == "deepsets":
        return CompiledPolicy(name, pack_weights(checkpoint.network, spec.num_candidates), spec)
    from ..agents.export import OnnxPolicy

    onnx = OnnxPolicy(checkpoint.onnx_path)
    return TablePolicy(name, lambda obs: onnx(obs["context"], obs["candidates"], obs["action_mask"]), spec)


def fingerprint(name_or_path: str) -> str | None:
    """Digest of a checkpoint's weights; None for what is named by code alone."""
    folder = SHIPPED if name_or_path == AGENT else Path(name_or_path).expanduser()
    return None if name_or_path in RULES else weights_digest(checkpoint_folder(folder))


@dataclass(frozen=True)
class _Cell:
    """What `headroom.score` reads of a cell."""

    spec: RequestSchedulingSpec
    metric: str


def search_knobs(spec: RequestSchedulingSpec, metric: str, workloads: Sequence[Workload]) -> Rule:
    """The best fixed order, token budget and most running requests for these workloads, named `knobs`."""
    from dataclasses import replace

    from .command import progress, say
    from .headroom import KNOB_CAPS, SMALL_CAPS, knob_rules, score

    if not workloads:
        raise InputError("`knobs` needs requests to search on", remedy="Name another policy, or a longer trace")
    cell: Any = _Cell(spec, metric)
    rules = knob_rules(spec.engine.max_batch_tokens, SMALL_CAPS + KNOB_CAPS)
    gains = []
    with progress("searching knobs", len(rules)) as bar:
        for i, rule in enumerate(rules):
            gains.append(score(cell, rule, workloads))
            bar(i + 1)
    best = rules[max(range(len(rules)), key=gains.__getitem__)]
    say(f"knobs: {best.name} is the best of {len(rules)} on {len(workloads)} training windows")
    return replace(best, name=KNOBS, source=f"{best.name}, searched on {sum(map(len, workloads))} training requests")


def _budget(name: str, tokens: int, spec: RequestSchedulingSpec) -> int:
    most = spec.engine.max_batch_tokens
    if not 1 <= tokens <= most:
        raise InputError(
            f"policy {name!r} has a budget of {tokens} tokens, the engine takes 1 to {most} an iteration",
            remedy=f"Give a budget of at most {most}",
        )
    return tokens


def _fixed_knobs(name: str, match: re.Match[str], spec: RequestSchedulingSpec) -> Rule:
    order, budget, running = match[1], int(match[2]), int(match[3])
    if order not in ORDER_NAMES:
        raise InputError(f"policy {name!r} names order {order!r}", remedy=f"Orders are {', '.join(ORDER_NAMES)}")
    if not 1 <= running <= spec.engine.max_running:
        raise InputError(
            f"policy {name!r} lets {running} requests run, the engine 1 to {spec.engine.max_running}",
            remedy=f"Give at most {spec.engine.max_running}",
        )
    return ordered_rule(name, ORDER_NAMES.index(order), token_budget=_budget(name, budget, spec), max_running=running)
