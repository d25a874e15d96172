"""Fit the expert-caching simulator's cost model to a real engine, and compare the times of the two.

Experts are timed alone, in slots that the caches of the CPU have forgotten. What a layer takes beside its experts and
its stall (attention, gate, books, decision) is fitted to runs of the engine. A load's time is the one at which the
model's stalls add up to the measured ones, so that what it costs to wake a thread and to compute beside it is in it;
reads of several sizes say how much of it is latency. Wall seconds are what they are: calibrate on a quiet machine.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..envs.core.errors import InputError
from ..envs.core.interface import Backend, Policy
from ..envs.expert_caching.sim import Simulator
from ..envs.expert_caching.spec import CostModel, ExpertCachingSpec
from ..envs.expert_caching.timeline import Timeline
from ..envs.expert_caching.workload import Workload, interleave
from .calibrate import _cpu_name, _version, fit_cost
from .experts import ExpertEngine, OffloadedModel, unmeasured_cost
from .experts_model import expert_output
from .experts_store import PAGE

CACHE_SHARES = (0.25, 0.5, 1.0)
WARM_UP_EPOCHS = 100
"""Epochs of a run that are not measured: torch and the caches of the CPU warm up."""
READS = 40
"""Reads of each size."""
ROWS = (1, 2, 4, 8)
"""Tokens that one expert is computed for."""


class Epochs(NamedTuple):
    """What the epochs of one or more runs took. All arrays float64 (I,)."""

    gate_s: np.ndarray  # from the end of a layer to the answer of the next gate
    is_step: np.ndarray  # 1 if a step ended between
    next_tokens: np.ndarray  # tokens at that gate
    compute_s: np.ndarray  # from there to the end of the next layer, without the stall: decision and experts
    used: np.ndarray  # needed experts
    uses: np.ndarray  # (token, expert) pairs
    misses: np.ndarray  # needed experts that were loaded on demand
    stall_s: np.ndarray


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


def calibrate_experts(
    model: OffloadedModel,
    workload: Workload,
    *,
    tokens: int = 600,
    num_sequences: Sequence[int] = (1, 4),
    chunk_bytes: int = 1 << 20,
    routing: str = "gate",
    seed: int = 0,
    name: str | None = None,
) -> tuple[CostModel, dict[str, Any]]:
    """Measure a model under LRU on demand, at several sizes of cache and batch, and fit `CostModel`: (model, report).

    Args:
        model: the model.
        workload: what it serves.
        tokens: served in each of the runs, 3 for each size of batch.
        num_sequences: sizes of batch. One alone cannot tell a token's cost from a layer's; its own times are right
            all the same.
        chunk_bytes: of the loads.
        routing: of the engine (`ExpertEngine`).
        seed: of the records that are read.
        name: of the cost model; default "experts-<device>".

    Every second epoch is held out. The report holds the mean seconds of layers and stalls and the errors of the fit in
    both halves, percentiles 10, 50 and 90 of reads and of experts, machine and versions. How well runs of other
    policies are predicted is for `compare` to say. Raises InputError if there is too little to measure.
    """
    if tokens * workload.num_layers < 3 * WARM_UP_EPOCHS:
        raise InputError(
            f"{tokens} tokens are too few to measure", remedy="Measure at least 100; 600 give a stable fit"
        )
    base = replace(unmeasured_cost(model), chunk_bytes=chunk_bytes)
    runs = []
    for batch in num_sequences:
        for share in CACHE_SHARES:
            spec = ExpertCachingSpec(base, cache_share=share, num_sequences=batch, warm_start=share == 1)
            if spec_fits(spec, workload):
                batches = interleave(workload.lengths, batch)[: tokens // batch]
                runs.append(_measure_run(model, spec, workload, batches, routing))
    epochs = Epochs(*(np.concatenate(columns) for columns in zip(*runs, strict=True)))
    fitted, held_out = (Epochs(*(column[i::2] for column in epochs)) for i in (0, 1))
    reads = time_reads(model, base.chunk_bytes, seed)
    computations = time_experts(model)
    cost = fit_times(fitted, base, computations, reads)
    machine = _machine(model)
    report: dict[str, Any] = {
        "fit": errors_of(cost, fitted),
        "held_out": errors_of(cost, held_out),
        "read_s": {size: np.percentile(seconds, [10, 50, 90]).tolist() for size, seconds in reads.items()},
        "expert_s": {rows: np.percentile(seconds, [10, 50, 90]).tolist() for rows, seconds in computations.items()},
        "num_sequences": list(num_sequences),
        "tokens": tokens,
        "workload": workload.name,
        "model": {
            "layers": model.gated.num_layers,
            "experts": model.gated.num_experts,
            "top_k": model.gated.top_k,
            "expert_bytes": model.expert_bytes,
        },
        "machine": machine,
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in ("torch", "transformers", "numpy", "scipy")},
    }
    source = f"{len(runs)} runs of ExpertEngine on {machine['device']}, torch {_version('torch')}; "
    source += "error of means, held out: " + ", ".join(
        f"{part} {figures['mean']:+.1%}" for part, figures in report["held_out"].items()
    )
    return replace(cost, name=name or f"experts-{model.device.type}", source=source), report


def spec_fits(spec: ExpertCachingSpec, workload: Workload) -> bool:
    """True if the cache of `spec` holds what one layer of the workload may need."""
    try:
        spec.slots_of(workload.num_layers, workload.num_experts, workload.top_k)
    except InputError:
        return False
    return True


def _measure_run(
    model: OffloadedModel, spec: ExpertCachingSpec, workload: Workload, batches: np.ndarray, routing: str
) -> Epochs:
    engine = ExpertEngine(model, spec, routing=routing)
    try:
        engine.reset(workload, batches=batches)
        serve(engine)
        return epochs_of(engine.timeline(), workload.top_k)
    finally:
        engine.close()


def epochs_of(timeline: Timeline, top_k: int) -> Epochs:
    """The epochs of a run without prefetches, but for the first ones and the last."""
    rows = slice(WARM_UP_EPOCHS, len(timeline.start_s) - 1)
    tokens = np.repeat((timeline.batches >= 0).sum(axis=1), timeline.num_layers)
    columns = (
        np.append(timeline.start_s[1:] - timeline.end_s[:-1], np.nan),
        (np.arange(len(tokens)) + 1) % timeline.num_layers == 0,
        np.append(tokens[1:], 0),
        timeline.end_s - timeline.start_s - timeline.stall_s,
        timeline.used,
        tokens * top_k,
        timeline.used - timeline.ready,
        timeline.stall_s,
    )
    return Epochs(*(np.asarray(column, np.float64)[rows] for column in columns))


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
    beside_s = epochs.gate_s + epochs.compute_s - _experts_s(cost, epochs)
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
    computed_s = expert_s * (epochs.used - epochs.misses)
    for i in range(1, int(epochs.misses.max(initial=0)) + 1):
        computed_s = np.where(i <= epochs.misses, np.maximum(computed_s, i * load_s) + expert_s, computed_s)
    return np.maximum(computed_s - expert_s * epochs.used, 0.0)


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
    """For layers without their stall, and for stalls: mean seconds, error of the mean, median error of an epoch."""
    gate_s = cost.attention_s + cost.attention_token_s * epochs.next_tokens + cost.step_s * epochs.is_step
    everywhere, missing = np.ones(len(epochs.used), bool), epochs.misses > 0
    stall_s = modelled_stall(epochs, cost, cost.load_s)
    figures = {}
    for part, predicted, measured, some in (
        ("layer", gate_s + _experts_s(cost, epochs), epochs.gate_s + epochs.compute_s, everywhere),
        ("stall", stall_s, epochs.stall_s, missing),
    ):
        figures[part] = {
            "seconds": float(measured.mean()),
            "mean": float(predicted.sum() / measured.sum() - 1),
            "median": float(np.median(np.abs(predicted[some] / measured[some] - 1))),
        }
    return figures


def compare(
    model: OffloadedModel,
    workload: Workload,
    cost: CostModel,
    policies: Sequence[Policy | None],
    specs: Sequence[ExpertCachingSpec],
    *,
    routing: str = "gate",
    num_repeats: int = 1,
) -> list[dict[str, Any]]:
    """Run policies (None: LRU on demand) with several specs on the engine and on the simulator: a row for each pair.

    A row: policy, cache_share, max_prefetch, bypass, num_sequences, measured_s (mean of the repeats), simulated_s,
    error = simulated / measured - 1. Passes over all pairs are repeated, so that a machine that slows down for a while
    does not favour any.
    """
    measured: dict[tuple[int, int], list[float]] = {}
    rows = []
    for _ in range(num_repeats):
        for i, spec in enumerate(specs):
            engine = ExpertEngine(model, spec.replace(cost=cost), routing=routing)
            try:
                for j, policy in enumerate(policies):
                    engine.reset(workload)
                    measured.setdefault((i, j), []).append(serve(engine, policy))
            finally:
                engine.close()
    for (i, j), seconds in measured.items():
        spec, policy = specs[i].replace(cost=cost), policies[j]
        simulator = Simulator(spec, recording=False)
        simulator.reset(workload)
        simulated_s = serve(simulator, policy)
        rows.append(
            {
                "policy": policy.name if policy is not None else "lru",
                "cache_share": spec.cache_share,
                "max_prefetch": spec.max_prefetch,
                "bypass": spec.bypass,
                "num_sequences": spec.num_sequences,
                "measured_s": float(np.mean(seconds)),
                "simulated_s": simulated_s,
                "error": simulated_s / float(np.mean(seconds)) - 1,
            }
        )
    return rows


def write_cost(path: str | os.PathLike[str], cost: CostModel, report: dict[str, Any]) -> None:
    """Write the JSON that `CostModel.load` reads, with the report beside the times; all of it or nothing."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(asdict(cost) | {"report": report}, indent=2) + "\n")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _machine(model: OffloadedModel) -> dict[str, Any]:
    import torch

    is_cpu = model.device.type == "cpu"
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": _cpu_name() if is_cpu else torch.cuda.get_device_name(model.device),
    }
