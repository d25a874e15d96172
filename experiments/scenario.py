"""What is to be served: requests at a load, on the simulator or on the small real engine, judged by an objective.

On the real engine everything is small: a request of 1,000 tokens becomes one of 1000 / 16, the KV pool and the batch
shrink alike, and SLO limits follow the engine's own speed. Policies are shown the engine in full-size units
(`ScaledPolicy`), so that "a budget of 512 tokens" means there what it means at full size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np

from ..baselines.request_scheduling import RULES
from ..envs.core.errors import InputError
from ..envs.core.interface import Policy
from ..envs.core.kernel import njit
from ..envs.request_scheduling.sim import Simulator
from ..envs.request_scheduling.spec import CostModel, EngineSpec, RequestSchedulingSpec, SloClass
from ..envs.request_scheduling.state import NO_LIMIT, Decision, State, empty_state, reset_decision
from ..envs.request_scheduling.traces import find_workload
from ..envs.request_scheduling.workload import DEFAULT_RANK_CORRELATION, Workload
from .cells import OBJECTIVES, TRACE_CELLS

SIM_REQUESTS, HF_REQUESTS = 2000, 150
"""Default number of requests in a run."""
HF_LENGTH_SCALE = 16
"""Tokens of the trace for one token of the small engine."""
SATURATED_RPS = 1e9
"""A rate at which all requests are there at once."""


# ------------------------------------------------------------------------------------------- units


@dataclass(frozen=True)
class Scale:
    """How a small engine is shown in full-size units."""

    tokens: float
    """Full-size tokens for one token of the engine."""
    seconds: float
    """Engine seconds for one full-size second: the ratio of the capacities."""


@njit(cache=True)
def magnify(state: State, shown: State, tokens: float, seconds: float) -> None:
    """Write the live parts of `state` into `shown`, tokens multiplied and times divided."""
    a, b = state.engine[0], shown.engine[0]
    b.now_s = a.now_s / seconds
    b.last_iteration_s = a.last_iteration_s / seconds
    b.ema_iteration_s = a.ema_iteration_s / seconds
    b.ema_arrival_gap_s = a.ema_arrival_gap_s / seconds
    b.mean_arrival_gap_s = a.mean_arrival_gap_s / seconds
    b.mean_prefill_tokens = a.mean_prefill_tokens * tokens
    b.mean_query_context = a.mean_query_context * tokens**2
    b.mean_decode_steps = a.mean_decode_steps * tokens
    b.mean_decode_context = a.mean_decode_context * tokens**2
    b.iterations = a.iterations
    b.kv_blocks_free = a.kv_blocks_free
    b.kv_blocks_total = a.kv_blocks_total
    b.block_tokens = int(a.block_tokens * tokens)
    b.max_batch_tokens = int(a.max_batch_tokens * tokens)
    b.max_running = a.max_running
    b.num_arrived = a.num_arrived
    b.num_waiting = a.num_waiting
    b.num_running = a.num_running
    b.num_decoding = a.num_decoding
    b.num_finished = a.num_finished
    b.num_preemptions = a.num_preemptions
    b.prefix_cache = a.prefix_cache
    for i in range(a.num_waiting + a.num_running):
        if i < a.num_waiting:
            request = state.waiting[i]
            shown.waiting[i] = request
        else:
            request = state.running[i - a.num_waiting]
            shown.running[i - a.num_waiting] = request
        row, big = state.requests[request], shown.requests[request]
        big.arrival_s = row.arrival_s / seconds
        big.prompt_tokens = int(row.prompt_tokens * tokens)
        big.predicted_output_tokens = row.predicted_output_tokens * tokens
        big.prefill_target = int(row.prefill_target * tokens)
        big.computed_tokens = int(row.computed_tokens * tokens)
        big.generated_tokens = int(row.generated_tokens * tokens)
        big.cached_tokens = int(row.cached_tokens * tokens)
        big.kv_blocks = row.kv_blocks
        big.first_token_s = row.first_token_s / seconds
        big.last_token_s = row.last_token_s / seconds
        big.ttft_slo_s = row.ttft_slo_s / seconds
        big.tpot_slo_s = row.tpot_slo_s / seconds
        big.slo_weight = row.slo_weight
        big.admission = row.admission
        big.slo_class = row.slo_class
        big.priority = row.priority
        big.client = row.client
        big.status = row.status
        big.preemptions = row.preemptions


class ScaledPolicy:
    """Shows a small engine to a policy in full-size units, and its decision to the engine in the engine's."""

    def __init__(self, policy: Policy[State, Decision], scale: Scale) -> None:
        self.policy, self.scale = policy, scale
        self.name, self.is_oracle = policy.name, policy.is_oracle

    def reset(self, state: State) -> None:
        """Start a new run."""
        self._shown = empty_state(len(state.requests))
        self._show(state)
        self.policy.reset(self._shown)

    def decide(self, state: State, decision: Decision) -> None:
        """Write the policy's decision, in the engine's tokens, into `decision`."""
        self._show(state)
        reset_decision(self._shown, decision)
        self.policy.decide(self._shown, decision)
        levers = decision.levers[0]
        for name in ("prefill_tokens", "chunk_tokens"):
            if levers[name] < NO_LIMIT:
                levers[name] = math.ceil(levers[name] / self.scale.tokens)

    def _show(self, state: State) -> None:
        magnify(state, self._shown, float(self.scale.tokens), float(self.scale.seconds))


# ---------------------------------------------------------------------------------------- scenario


@dataclass(frozen=True)
class Scenario:
    """One cell of a comparison: everything but the policy and the seed."""

    workload: str
    load: float
    objective: str
    requests: int
    part: str
    """ "test": requests after those that policies are trained and tuned on; "all"."""
    pool: Workload
    """The requests of that part, full size."""
    training: Workload
    """The requests before them (of "all": the first half), full size."""
    full_spec: RequestSchedulingSpec
    """Engine and limits at full size, with the cost model of a GPU."""
    spec: RequestSchedulingSpec
    """What is served on: `full_spec`, or the small engine with its measured cost model."""
    scale: Scale | None = None
    """None: served at full size."""

    @property
    def instance(self) -> str:
        """The cell's name in results, beside the workload's."""
        what = f"{self.objective} at load {self.load:g}, {self.requests} requests"
        what += " of the test part" if self.part == "test" else ""
        if self.scale is None:
            return what
        return what + f", lengths / {self.scale.tokens:g}, {self.spec.engine.kv_blocks} KV blocks"

    @property
    def metric(self) -> str:
        """The metric that the objective is about."""
        return "mean_e2e_s" if self.objective == "mean_e2e" else "slo_goodput"

    @cached_property
    def policy_spec(self) -> RequestSchedulingSpec:
        """The engine in the units in which policies see it."""
        return self.spec if self.scale is None else shown_spec(self.spec, self.full_spec, self.scale)

    def show(self, policy: Policy[State, Decision]) -> Policy[State, Decision]:
        """The policy for this engine, made for `policy_spec`."""
        return policy if self.scale is None else ScaledPolicy(policy, self.scale)

    def draw(self, seed: int, load: float | None = None) -> Workload:
        """The requests of a seed: it draws the window of the trace, the length predictions and the SLO classes."""
        pool = self.pool
        begin = int(np.random.default_rng(seed).integers(len(pool) - self.requests + 1))
        window = pool.window(begin, begin + self.requests)
        return self._at_load(window, seed, load or self.load)

    def training_windows(self, count: int = 2, seed: int = 1000) -> list[Workload]:
        """Windows of the training part at the scenario's load, as served, for policies that tune themselves.

        `seed` draws length predictions and classes.
        """
        size = min(max(self.requests, 1000), len(self.training) // count)
        windows = [self.training.window(i * size, (i + 1) * size) for i in range(count)]
        return [self._at_load(window, seed + i, self.load) for i, window in enumerate(windows)]

    def _at_load(self, window: Workload, seed: int, load: float) -> Workload:
        window = window.with_predictor(DEFAULT_RANK_CORRELATION, seed).with_classes(self.spec.slo_classes, seed)
        if self.scale is not None:
            window = window.scale_lengths(1 / self.scale.tokens)
        return window.at_rate(load * saturated(self.spec, window, self.scale).requests_per_s)


def build_scenario(
    workload: str,
    *,
    load: float = 1.1,
    objective: str = "mean_e2e",
    requests: int | None = None,
    cost: CostModel | None = None,
    length_scale: float | None = None,
    kv_blocks: int | None = None,
    part: str | None = None,
    data_dir: str | PathLike[str] | None = None,
) -> Scenario:
    """A scenario on the simulated engine of the workload, or (with `cost`) on the small engine of that cost.

    Args:
        workload: name of a trace, "synthetic" or a trace file.
        load: arrival rate as a share of the capacity measured on the very requests served.
        objective: of `cells.OBJECTIVES`.
        requests: in a run; default `SIM_REQUESTS` or `HF_REQUESTS`, the whole part if that is shorter.
        cost: cost model of the small engine; None for full size.
        length_scale: trace tokens for one token of the small engine.
        kv_blocks: KV pool of the small engine; default the full-size pool, made small.
        part: "test", "all", or None: "test" for the traces on which agents are trained.
        data_dir: where trace files are looked for first.

    Raises:
        InputError: unknown workload or objective, a load or number of requests that makes no sense.
    """
    if not (math.isfinite(load) and load > 0):
        raise InputError(f"load is {load}", remedy="Give a positive share of the engine's capacity, such as 1.1")
    if objective not in OBJECTIVES:
        raise InputError(f"unknown objective {objective!r}", remedy=f"Choose one of {', '.join(OBJECTIVES)}")
    trace = find_workload(workload, data_dir)
    cells = TRACE_CELLS.get(workload)
    part = part or ("test" if cells else "all")
    full = full_size_spec(workload, trace, objective)
    if full.engine.prefix_cache:
        trace = trace.with_block_tokens(full.engine.block_tokens)
    cut = len(trace) // 2
    if cells and cells.num_requests < cut:  # the test part of the cells: agents are trained on what comes before
        cut = len(trace) - cells.num_requests
    if len(trace) < 4:
        raise InputError(f"workload {workload!r} has {len(trace)} requests", remedy="Give a trace of at least 4")
    pool = trace.window(cut) if part == "test" else trace
    default = SIM_REQUESTS if cost is None else HF_REQUESTS
    num_requests = min(default, len(pool)) if requests is None else requests
    if not 2 <= num_requests <= len(pool):
        raise InputError(
            f"a window of {num_requests} requests was asked for, the {part} part of {workload!r} has {len(pool)}",
            remedy=f"Give --window between 2 and {len(pool)}",
        )
    scenario = Scenario(workload, load, objective, num_requests, part, pool, trace.window(0, cut), full, full)
    if cost is None:
        return scenario
    return small(scenario, cost, length_scale or HF_LENGTH_SCALE, kv_blocks)


def full_size_spec(workload: str, trace: Workload, objective: str) -> RequestSchedulingSpec:
    """Engine, cost and limits for a trace: those of the published cells, or the nearest to them."""
    name = workload if workload in TRACE_CELLS else "azure_conv"
    block = trace.hash_block_tokens
    if workload not in TRACE_CELLS and block:
        name = "mooncake_synthetic"
    cells = TRACE_CELLS[name]
    engine = cells.engine
    if block and engine.prefix_cache and block % engine.block_tokens:
        engine = replace(engine, block_tokens=block, kv_blocks=engine.kv_tokens // block)
    return RequestSchedulingSpec(
        engine=engine,
        cost=cells.cost,
        slo_classes=cells.two_classes if objective == "goodput_2class" else cells.one_class,
        objective="mean_e2e" if objective == "mean_e2e" else "slo_goodput",
    )


def small_engine(full: EngineSpec, length_scale: float, kv_blocks: int | None = None) -> EngineSpec:
    """The engine with everything that counts tokens divided by `length_scale`; the KV pool as given, if it is."""
    block = max(round(full.block_tokens / length_scale), 1) if full.prefix_cache else 8
    return replace(
        full,
        block_tokens=block,
        kv_blocks=max(round(full.kv_tokens / length_scale / block), 1) if kv_blocks is None else kv_blocks,
        max_batch_tokens=max(round(full.max_batch_tokens / length_scale), full.max_running),
    )


def small(scenario: Scenario, cost: CostModel, length_scale: float, kv_blocks: int | None = None) -> Scenario:
    """The scenario on the small engine of a measured cost model.

    A TTFT limit is scaled by the ratio of the capacities (seconds a request takes on a saturated engine), a TPOT
    limit by the ratio of the seconds of an iteration, both from a saturated run of the scenario's first requests.
    """
    full = scenario.full_spec
    engine = small_engine(full.engine, length_scale, kv_blocks)
    probe = scenario.pool.window(0, min(300, len(scenario.pool)))
    probe = probe.with_classes(full.slo_classes, 0)
    choices = tuple(min(math.ceil(b / length_scale), engine.max_batch_tokens) for b in full.prefill_choices)
    spec = full.replace(engine=engine, cost=cost, prefill_choices=choices)
    at_full = saturated(full, probe, None)
    at_small = saturated(spec, probe.scale_lengths(1 / length_scale), Scale(length_scale, 1.0))
    seconds = at_full.requests_per_s / at_small.requests_per_s
    iteration = at_small.iteration_s / at_full.iteration_s
    classes = tuple(
        SloClass(c.ttft_s * seconds, c.tpot_s * iteration, c.weight, c.share) for c in scenario.full_spec.slo_classes
    )
    spec = spec.replace(slo_classes=classes, longest_wait_s=full.longest_wait_s * seconds)
    return replace(scenario, spec=spec, scale=Scale(length_scale, seconds))


def shown_spec(spec: RequestSchedulingSpec, full: RequestSchedulingSpec, scale: Scale) -> RequestSchedulingSpec:
    """The small engine's spec in full-size tokens and seconds."""
    k, s = scale.tokens, scale.seconds
    constant, prefill, decode, context, query_context, query_kv, has_prefill = (c / s for c in spec.cost.coefficients_s)
    cost = (constant, prefill / k, decode, context / k, query_context / k**2, query_kv / k**2, has_prefill)
    engine = replace(
        spec.engine,
        block_tokens=int(spec.engine.block_tokens * k),
        max_batch_tokens=int(spec.engine.max_batch_tokens * k),
    )
    return full.replace(
        engine=engine,
        cost=CostModel(f"{spec.cost.name} in full-size units", cost, spec.cost.source),
        slo_classes=tuple(SloClass(c.ttft_s / s, c.tpot_s / s, c.weight, c.share) for c in spec.slo_classes),
    )


@dataclass(frozen=True)
class Saturated:
    """Speed of an engine whose requests are all there at time zero."""

    requests_per_s: float
    iteration_s: float


def saturated(spec: RequestSchedulingSpec, workload: Workload, scale: Scale | None) -> Saturated:
    """Simulate a workload with all requests there at time zero, under Sarathi-2048: what a load of 1 means."""
    simulator = Simulator(spec, recording=False)
    rule: Any = RULES["sarathi_2048"]
    drive(simulator, rule if scale is None else ScaledPolicy(rule, scale), workload.at_rate(SATURATED_RPS))
    engine = simulator.state().engine[0]
    served = int(engine["num_finished"])
    if served == 0:
        raise InputError(
            f"no request of workload {workload.name!r} fits the engine's {spec.engine.kv_tokens} KV tokens",
            remedy="Give a trace of shorter requests",
        )
    return Saturated(served / float(engine["now_s"]), float(engine["now_s"]) / int(engine["iterations"]))


def drive(backend: Any, policy: Policy[State, Decision], workload: Workload, seed: int = 0) -> None:
    """Serve a workload to its end: the loop that simulators and engines share."""
    backend.reset(workload, seed)
    policy.reset(backend.state())
    done = False
    while not done:
        decision = backend.default_decision()
        policy.decide(backend.state(), decision)
        done = backend.step(decision).done
