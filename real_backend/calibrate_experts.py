"""Fit the expert-caching simulator's cost model to a real engine.

Experts are timed alone, in slots that the caches of the CPU have forgotten. What a layer takes beside its experts, its
decision and its stall (attention, gate, books) is fitted to runs of the engine. A load's time is the one at which the
model's stalls add up to the measured ones, so that what it costs to wake a thread and to compute beside it is in it;
reads of several sizes say how much of it is latency. Decisions are the policy's own: `with_decisions` puts them in.
Wall seconds are what they are: calibrate on a quiet machine, or in turns with the runs that are to be predicted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np

from ..envs.core.errors import InputError
from ..envs.core.interface import Backend, Policy
from ..envs.core.results import atomic_path
from ..envs.expert_caching.spec import CostModel, ExpertCachingSpec
from ..envs.expert_caching.timeline import Timeline
from ..envs.expert_caching.workload import Workload, interleave
from .calibrate import fit_cost
from .experts import CHUNK_BYTES, ExpertEngine, OffloadedModel, unmeasured_cost
from .experts_model import expert_output
from .experts_store import PAGE
from .machine import describe, versions

CACHE_SHARES = (0.25, 0.5)
WARM_UP_EPOCHS = 100
"""Epochs of a run that are not measured: torch and the caches of the CPU warm up."""
READS = 40
"""Reads of each size in a pass."""
ROWS = (1, 2, 4, 8)
"""Tokens that one expert is computed for."""


class Epochs(NamedTuple):
    """What the epochs of one or more runs took. All arrays float64 (I,)."""

    gate_s: np.ndarray  # from the end of a layer to the answer of the next gate
    is_step: np.ndarray  # 1 if a step ended between
    next_tokens: np.ndarray  # tokens at that gate
    decision_s: np.ndarray  # the next decision
    compute_s: np.ndarray  # from there to the end of the next layer, without stall: the experts
    used: np.ndarray  # needed experts
    uses: np.ndarray  # (token, expert) pairs
    misses: np.ndarray  # needed experts that were loaded on demand
    stall_s: np.ndarray

    @property
    def layer_s(self) -> np.ndarray:
        """All but decision and stall."""
        return self.gate_s + self.compute_s


def serve(backend: Backend, policy: Policy | None = None) -> float:
    """Run the loaded workload to its end under a policy (None: the backend's default). Returns its seconds."""
    seconds, done = 0.0, False
    if policy is not None:
        policy.reset(backend.state())
    while not done:
        decision = backend.default_decision()
        if policy is not None:
            policy.decide(backend.state(), decision)
        outcome = backend.step(decision)
        seconds, done = seconds + outcome.seconds, outcome.done
    return seconds


def with_decisions(cost: CostModel, decision_s: float) -> CostModel:
    """The cost model of a policy whose decision takes `decision_s` on average.

    What is missing is being loaded meanwhile: where something is, a decision delays nothing but what it takes longer
    than the first load.
    """
    return replace(cost, decision_s=decision_s)


class ExpertCalibration:
    """Measurements of an offloaded model under LRU on demand, taken in passes, and the cost model fitted to them.

    A run serves the first tokens of a workload with one size of cache and of batch; a pass makes every run once, and
    times reads and experts alone. A pass repeats what the first one did, load by load, and an epoch's seconds are the
    mean of its repeats. Where a machine's speed drifts, a run may also be served a few tokens at a time, in turns with
    whatever is to be predicted (`open_run`, `book_run`, `time_alone`).

    Args:
        model: what is measured.
        workload: what it serves; not what will be predicted.
        routing: of the engine (`ExpertEngine`).
        tokens: served in each run.
        num_sequences: sizes of batch. One alone cannot tell a token's cost from a layer's; its own times are right
            all the same.
        cache_shares: sizes of cache; those that cannot hold what a layer may need are left out.
        chunk_bytes: of the loads.
        seed: of the records that are read.

    Raises InputError if there is too little to measure.
    """

    def __init__(
        self,
        model: OffloadedModel,
        workload: Workload,
        *,
        routing: str = "gate",
        tokens: int = 200,
        num_sequences: Sequence[int] = (1,),
        cache_shares: Sequence[float] = CACHE_SHARES,
        chunk_bytes: int = CHUNK_BYTES,
        seed: int = 0,
    ) -> None:
        tokens = min(tokens, workload.num_tokens)
        least = -(-4 * WARM_UP_EPOCHS * max(num_sequences) // workload.num_layers)
        if tokens < least:
            raise InputError(
                f"{tokens} tokens are too few to measure",
                remedy=f"Measure at least {least} tokens of {workload.num_layers} layers; a thousand layers fit well",
            )
        self.model, self.workload, self.routing, self.tokens, self.seed = model, workload, routing, tokens, seed
        self.base = replace(unmeasured_cost(model), chunk_bytes=chunk_bytes)
        specs = [
            ExpertCachingSpec(self.base, cache_share=share, num_sequences=batch, warm_start=True)
            for batch in num_sequences
            for share in cache_shares
        ]
        self.specs = [spec for spec in specs if spec_fits(spec, workload)]
        if not self.specs:
            raise InputError(
                f"no cache of {cache_shares} holds what a layer may need at once",
                remedy="Give larger cache_shares, or a smaller num_sequences",
            )
        self.repeats: list[list[Epochs]] = [[] for _ in self.specs]
        """Of each run, what it took each time."""
        self.computations: dict[int, list[float]] = {}
        """Tokens -> seconds of an expert computed for so many (`time_experts`)."""
        self.reads: dict[int, list[float]] = {}
        """Bytes -> seconds of reads of that size (`time_reads`)."""

    @property
    def num_runs(self) -> int:
        """Runs of a pass."""
        return len(self.specs)

    def measure_pass(self) -> None:
        """Measure all runs once more."""
        for _ in self.measure_runs():
            pass

    def measure_runs(self) -> Iterator[None]:
        """`measure_pass` in steps of one run."""
        for run in range(self.num_runs):
            engine = self.open_run(run)
            try:
                serve(engine)
                self.book_run(run, engine)
            finally:
                engine.close()
            yield
        self.time_alone()

    def open_run(self, run: int) -> ExpertEngine:
        """An engine at the start of a run, for the caller to serve without a policy, and to close."""
        spec = self.specs[run]
        batches = interleave(self.workload.lengths, spec.num_sequences)[: self.tokens // spec.num_sequences]
        engine = ExpertEngine(self.model, spec, routing=self.routing)
        engine.reset(self.workload, self.seed, batches=batches)
        return engine

    def book_run(self, run: int, engine: ExpertEngine) -> None:
        """Take note of a run that was served to its end."""
        self.repeats[run].append(epochs_of(engine.timeline(), self.workload.top_k, engine.decision_s))

    def time_alone(self) -> None:
        """Time reads and experts once more, with nothing else to do."""
        reads = time_reads(self.model, self.base.chunk_bytes, self.seed + sum(map(len, self.repeats)))
        for pool, samples in ((self.reads, reads), (self.computations, time_experts(self.model))):
            for place, seconds in samples.items():
                pool.setdefault(place, []).extend(seconds)

    def fit(self, name: str | None = None, runs: Sequence[int] | None = None) -> tuple[CostModel, dict[str, Any]]:
        """The cost model of this name (default "experts-<device>") and of these runs (default: all), and a report.

        The report holds the mean seconds of layers, stalls and both, and the errors (`errors_of`) of a fit to the first
        half of each run, in that half and in the second one, which it has not seen; the cost model is of both halves.
        Also the noise of the repeats (the same figures of the whole time, of the last repeats against the mean of all);
        percentiles 10, 50 and 90 of reads and of experts; model, machine, versions.
        """
        chosen = range(self.num_runs) if runs is None else runs
        repeats = [self.repeats[run] for run in chosen]
        if not (all(repeats) and self.reads):
            raise InputError("nothing was measured", remedy="Call measure_pass first")
        means = [mean_of(of_run) for of_run in repeats]
        whole, fitted, held_out = joined(means), *(joined([half_of(mean, half) for mean in means]) for half in (0, 1))
        cost, half_cost = (fit_times(part, self.base, self.computations, self.reads) for part in (whole, fitted))
        gated, last = self.model.gated, joined([of_run[-1] for of_run in repeats])
        noise = _errors(last.layer_s + last.stall_s, whole.layer_s + whole.stall_s)
        num_repeats, specs = min(map(len, repeats)), [self.specs[run] for run in chosen]
        report: dict[str, Any] = {
            "clock": ExpertEngine.clock,
            "workload": self.workload.name,
            "tokens": self.tokens,
            "runs": [{"cache_share": spec.cache_share, "num_sequences": spec.num_sequences} for spec in specs],
            "repeats": num_repeats,
            "seed": self.seed,
            "fit": errors_of(half_cost, fitted),
            "held_out": errors_of(half_cost, held_out),
            "repeat_noise": noise,
            "read_s": {size: np.percentile(seconds, [10, 50, 90]).tolist() for size, seconds in self.reads.items()},
            "expert_s": {
                rows: np.percentile(seconds, [10, 50, 90]).tolist() for rows, seconds in self.computations.items()
            },
            "model": {
                "layers": gated.num_layers,
                "experts": gated.num_experts,
                "top_k": gated.top_k,
                "expert_bytes": self.model.expert_bytes,
            },
            "machine": describe(self.model.device),
            "versions": versions(),
        }
        source = (
            f"{len(specs)} runs of ExpertEngine on {report['machine']['device_name']}, {num_repeats} times, "
            f"torch {report['versions']['torch']}; held out, error of means: "
            + ", ".join(f"{part} {figures['mean']:+.1%}" for part, figures in report["held_out"].items())
        )
        return replace(cost, name=name or f"experts-{self.model.device.type}", source=source), report


def spec_fits(spec: ExpertCachingSpec, workload: Workload) -> bool:
    """True if the cache of `spec` holds what one layer of the workload may need."""
    try:
        spec.slots_of(workload.num_layers, workload.num_experts, workload.top_k)
    except InputError:
        return False
    return True


def epochs_of(timeline: Timeline, top_k: int, decision_s: np.ndarray | float = 0.0) -> Epochs:
    """The epochs of a run without prefetches, but for the first ones and the last.

    `decision_s` (I,) is what each decision took.
    """
    rows = slice(WARM_UP_EPOCHS, len(timeline.start_s) - 1)
    tokens = np.repeat((timeline.batches >= 0).sum(axis=1), timeline.num_layers)
    columns = (
        np.append(timeline.start_s[1:] - timeline.end_s[:-1], np.nan),
        (np.arange(len(tokens)) + 1) % timeline.num_layers == 0,
        np.append(tokens[1:], 0),
        np.broadcast_to(decision_s, len(tokens)),
        timeline.end_s - timeline.start_s - timeline.stall_s - decision_s,
        timeline.used,
        tokens * top_k,
        timeline.used - timeline.ready,
        timeline.stall_s,
    )
    return Epochs(*(np.asarray(column, np.float64)[rows] for column in columns))


def mean_of(repeats: Sequence[Epochs]) -> Epochs:
    """The same epochs, measured several times."""
    return Epochs(*(np.mean(columns, axis=0) for columns in zip(*repeats, strict=True)))


def joined(runs: Sequence[Epochs]) -> Epochs:
    """The epochs of several runs, one after the other."""
    return Epochs(*(np.concatenate(columns) for columns in zip(*runs, strict=True)))


def half_of(run: Epochs, half: int) -> Epochs:
    """The first (0) or second (1) half of the epochs of a run."""
    middle = len(run.used) // 2
    return Epochs(*(column[:middle] if half == 0 else column[middle:] for column in run))


def fit_times(
    epochs: Epochs, base: CostModel, computations: dict[int, list[float]], reads: dict[int, list[float]]
) -> CostModel:
    """`base` with its times fitted to what was measured.

    Args:
        epochs: of runs on demand.
        base: sizes, and how much is read at once.
        computations: tokens -> seconds of an expert computed for so many (`time_experts`).
        reads: bytes -> seconds of reads of that size (`time_reads`).
    """
    expert_s, expert_token_s = fit_line(computations)
    cost = replace(base, expert_s=expert_s, expert_token_s=expert_token_s)
    beside_s = epochs.layer_s - _experts_s(cost, epochs)
    columns = np.column_stack([np.ones(len(beside_s)), epochs.next_tokens, epochs.is_step])
    attention_s, attention_token_s, step_s = fit_cost(columns, np.maximum(beside_s, 1e-9)).tolist()
    cost = replace(cost, attention_s=attention_s, attention_token_s=attention_token_s, step_s=step_s)
    load_s = fit_load(epochs, cost)
    _, byte_s = fit_line(reads)
    bandwidth = 1 / min(byte_s, load_s / cost.expert_bytes) if byte_s > 0 else cost.expert_bytes / load_s
    latency_s = (load_s - cost.expert_bytes / bandwidth) / cost.chunks
    return replace(cost, bandwidth=bandwidth, chunk_latency_s=max(latency_s, 0.0))


def fit_line(samples: dict[int, list[float]]) -> tuple[float, float]:
    """(at zero, slope), neither negative, of the line through the medians of the samples at each place."""
    places = np.array(list(samples), np.float64)
    medians = np.array([np.median(values) for values in samples.values()])
    intercept, slope = fit_cost(np.column_stack([np.ones(len(places)), places]), medians)
    return float(intercept), float(slope)


def _experts_s(cost: CostModel, epochs: Epochs) -> np.ndarray:
    return cost.expert_s * epochs.used + cost.expert_token_s * epochs.uses


def modelled_stall(epochs: Epochs, cost: CostModel, load_s: float) -> np.ndarray:
    """(I,) seconds that the simulator says the layers stall, if each load takes `load_s` and no prefetch is about.

    Each expert of a layer is taken to be used by as many tokens as the layer's mean.
    """
    expert_s = _experts_s(cost, epochs) / epochs.used
    computed_s = epochs.decision_s + expert_s * (epochs.used - epochs.misses)
    for i in range(1, int(epochs.misses.max(initial=0)) + 1):
        computed_s = np.where(i <= epochs.misses, np.maximum(computed_s, i * load_s) + expert_s, computed_s)
    return np.maximum(computed_s - epochs.decision_s - expert_s * epochs.used, 0.0)


def fit_load(epochs: Epochs, cost: CostModel) -> float:
    """Seconds of a load with which the modelled stalls add up to the measured ones (bisection)."""
    if not epochs.misses.any():
        raise InputError("no expert was ever missing", remedy="Calibrate on more tokens, or with a smaller cache")
    low, high = 0.0, float(epochs.stall_s.sum() / epochs.misses.sum() + 10 * cost.expert_s + cost.expert_token_s)
    while modelled_stall(epochs, cost, high).sum() < epochs.stall_s.sum():
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        is_short = modelled_stall(epochs, cost, middle).sum() < epochs.stall_s.sum()
        low, high = (middle, high) if is_short else (low, middle)
    return high


def time_reads(model: OffloadedModel, chunk_bytes: int, seed: int) -> dict[int, list[float]]:
    """Bytes -> seconds of reads of that size into a slot, with nothing else to do: of whole records and parts."""
    rng, record_bytes = np.random.default_rng(seed), model.expert_bytes
    sizes = sorted({max(PAGE, record_bytes * part // 4 // PAGE * PAGE) for part in (1, 2, 3, 4)})
    seconds: dict[int, list[float]] = {}
    for size in [size for size in sizes if size <= chunk_bytes]:
        slots = model.store.open_slots(1, size)
        seconds[size] = []
        for record in rng.integers(model.store.num_records, size=READS):
            start = time.perf_counter()
            slots.fill(0, int(record), 0)
            slots.sync()
            seconds[size].append(time.perf_counter() - start)
        slots.close()
    return seconds


def time_experts(model: OffloadedModel, num_buffers: int = 64) -> dict[int, list[float]]:
    """Tokens -> seconds of computing one expert for so many, each time another one of `num_buffers`."""
    import torch

    slots = model.store.open_slots(num_buffers, model.expert_bytes)
    for buffer in range(num_buffers):
        slots.fill(buffer, buffer % model.store.num_records, 0)
    slots.sync()
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    with torch.inference_mode():
        for buffer in range(num_buffers):
            for rows in ROWS:
                inputs = torch.ones(rows, model.shape.hidden, dtype=model.shape.dtype, device=model.device)
                weights = slots.weights((buffer * len(ROWS) + rows) % num_buffers)
                start = time.perf_counter()
                output = expert_output(weights, inputs, inputs[:, :1])
                output[0, 0].item()  # until it is computed, on a GPU as well
                seconds[rows].append(time.perf_counter() - start)
    slots.close()
    return seconds


def errors_of(cost: CostModel, epochs: Epochs) -> dict[str, dict[str, float]]:
    """For layers without their stall, for stalls, and for both: mean seconds and the errors of the cost model."""
    gate_s = cost.attention_s + cost.attention_token_s * epochs.next_tokens + cost.step_s * epochs.is_step
    layer_s, stall_s = gate_s + _experts_s(cost, epochs), modelled_stall(epochs, cost, cost.load_s)
    return {
        "layer": _errors(layer_s, epochs.layer_s),
        "stall": _errors(stall_s, epochs.stall_s, epochs.misses > 0),
        "time": _errors(layer_s + stall_s, epochs.layer_s + epochs.stall_s),
    }


def _errors(predicted: np.ndarray, measured: np.ndarray, some: np.ndarray | slice = slice(None)) -> dict[str, float]:
    """Mean measured seconds, relative error of the mean, median relative error of `some` epochs."""
    return {
        "seconds": float(measured.mean()),
        "mean": float(predicted.sum() / measured.sum() - 1),
        "median": float(np.median(np.abs(predicted[some] / measured[some] - 1))),
    }


def write_cost(path: str | os.PathLike[str], cost: CostModel, report: dict[str, Any]) -> None:
    """Write the JSON that `CostModel.load` reads, with the report beside the times; all of it or nothing."""
    text = json.dumps(asdict(cost) | {"report": report}, indent=2) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)
