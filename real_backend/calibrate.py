"""Fit the simulator's cost model to a real engine, and say how well it fits schedules it has not seen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..envs.core.errors import InputError
from ..envs.request_scheduling.spec import COST_FEATURES, CostModel, EngineSpec
from ..envs.request_scheduling.state import NO_LIMIT, Decision, State
from ..envs.request_scheduling.workload import Workload
from .hf import HFEngine
from .machine import describe, versions

Run = tuple[np.ndarray, np.ndarray]
"""Features (I, 7) and seconds (I,) of the iterations of one run."""

MAX_RUN_ITERATIONS = 60
"""A run is cut here: many short runs cover more settings than a few long ones."""
MIN_SERVED = 4
"""Least requests of a run of those that will be served."""
MAX_SERVED_ITERATIONS = 180
"""Runs of the requests that will be served are cut here: only late iterations decode without any prefill."""


class Calibration:
    """Measurements of an engine under random schedules, taken in passes, and the cost model fitted to them.

    Runs are bursts served under random schedules: every second run redraws its levers now and then, the others hold
    one setting, as a fixed rule would. Of four runs two are of random requests, of very unlike lengths, and two of
    `requests`, if given: a linear model is right on average over what it is fitted to, and iterations that only decode
    are rare among the former. Each third run is held out of the fit. The seconds are
    the engine's own (`HFEngine.clock`): preparation, forward pass, sampling, update and our scheduling, without the
    policy. A pass repeats all runs, and an iteration's seconds are the mean of its repeats: a machine whose speed
    drifts is measured well by passes far apart, with whatever is compared to the model run in between.

    Args:
        engine: a real engine; its workload is lost at each pass.
        num_iterations: different iterations to measure, at least. 600 take about half a minute of one CPU thread a
            pass with the default model.
        requests: requests like those that will be served, in the engine's tokens, at least `MIN_SERVED` of them.

    Raises InputError if too few iterations were asked for, or too few requests given.
    """

    def __init__(
        self, engine: HFEngine, seed: int = 0, *, num_iterations: int = 600, requests: Workload | None = None
    ) -> None:
        if num_iterations < 60:
            raise InputError(
                f"num_iterations is {num_iterations}",
                remedy="Measure at least 60 iterations, once; 600, twice, give a stable fit",
            )
        if requests is not None and len(requests) < MIN_SERVED:
            raise InputError(
                f"{len(requests)} requests to calibrate with", remedy=f"Give at least {MIN_SERVED}, or none at all"
            )
        self.engine, self.seed, self.num_iterations, self.requests = engine, seed, num_iterations, requests
        self.passes: list[list[Run]] = []

    def measure_pass(self) -> None:
        """Measure all runs once more; the first pass says how many there are."""
        for _ in self.measure_runs():
            pass

    def measure_runs(self) -> Iterator[None]:
        """`measure_pass` in steps of one run, for whoever measures something else in between."""
        runs: list[Run] = []
        wanted = len(self.passes[0]) if self.passes else 6
        while len(runs) < wanted or (not self.passes and sum(len(s) for _, s in runs) < self.num_iterations):
            runs.append(_measure_run(self.engine, self.seed, len(runs), self.requests))
            yield
        self.passes.append(runs)

    def fit(self, name: str | None = None) -> tuple[CostModel, dict[str, Any]]:
        """The cost model of this name (default "hf-<device>"), fitted as `fit_cost` says, and a report.

        The report holds, for the fit and for held-out runs: iterations, median and P90 of the relative error of an
        iteration, the relative error of the total time and the worst of a single run; the repeat noise (the same
        figures, of one pass against the mean of all); and feature ranges, machine, versions.
        """
        engine, passes = self.engine, self.passes
        indices = range(len(passes[0]))
        means = [(passes[0][i][0], np.mean([one_pass[i][1] for one_pass in passes], axis=0)) for i in indices]
        held_out = [run for i, run in enumerate(means) if i % 3 == 2]
        fitted = [run for i, run in enumerate(means) if i % 3 != 2]
        coefficients = fit_cost(np.concatenate([f for f, _ in fitted]), np.concatenate([s for _, s in fitted]))
        report = {
            "clock": engine.clock,
            "seed": self.seed,
            "runs": len(means),
            "repeats": len(passes),
            "features": list(COST_FEATURES),
            "fit": errors([f @ coefficients for f, _ in fitted], [s for _, s in fitted]),
            "held_out": errors([f @ coefficients for f, _ in held_out], [s for _, s in held_out]),
            "repeat_noise": errors([s for _, s in passes[-1]], [s for _, s in means]),
            "feature_ranges": _ranges(np.concatenate([f for f, _ in means])),
            "iteration_s": np.percentile(np.concatenate([s for _, s in means]), [0, 50, 100]).tolist(),
            "engine": {field: getattr(engine.capacity, field) for field in EngineSpec.__dataclass_fields__},
            "model": _model(engine),
            "machine": describe(engine.model.device),
            "versions": versions(),
        }
        kind = engine.model.device.type
        model = CostModel(name or f"hf-{kind}", tuple(coefficients.tolist()), _source(report))
        return model, report


def _source(report: dict[str, Any]) -> str:
    machine, versions, held_out = report["machine"], report["versions"], report["held_out"]
    return (
        f"{report['runs']} runs of HFEngine on {machine['device_name']}, clock {report['clock']}, "
        f"transformers {versions['transformers']}, torch {versions['torch']}; held out: median error "
        f"{held_out['median']:.1%}, P90 {held_out['p90']:.1%}, total {held_out['total']:+.1%}"
    )


def fit_cost(features: np.ndarray, seconds: np.ndarray, num_rounds: int = 8) -> np.ndarray:
    """Non-negative coefficients (F,) that minimise the relative error of `features` (I, F) @ c against `seconds` (I,).

    Dividing by the measured seconds would favour iterations that happened to be fast; dividing by the prediction of
    the round before does not.
    """
    from scipy.optimize import nnls

    scale = np.maximum(np.abs(features).max(axis=0), 1e-300)
    weights = 1 / seconds
    coefficients = np.zeros(features.shape[1])
    for _ in range(num_rounds):
        coefficients = nnls(features / scale * weights[:, None], seconds * weights)[0]
        predicted = features / scale @ coefficients
        weights = 1 / np.maximum(predicted, 0.1 * np.median(seconds))
    return coefficients / scale


def errors(predicted: list[np.ndarray], seconds: list[np.ndarray]) -> dict[str, float]:
    """Relative errors of predicted against measured seconds, an array a run: of iterations, the total, whole runs."""
    relative = np.abs(np.concatenate(predicted) / np.concatenate(seconds) - 1)
    totals = np.array([p.sum() / s.sum() - 1 for p, s in zip(predicted, seconds, strict=True)])
    return {
        "iterations": len(relative),
        "seconds": float(sum(s.sum() for s in seconds)),
        "median": float(np.median(relative)),
        "p90": float(np.percentile(relative, 90)),
        "total": float(sum(p.sum() for p in predicted) / sum(s.sum() for s in seconds) - 1),
        "worst_run_total": float(totals[np.abs(totals).argmax()]),
    }


def write_calibration(path: str | os.PathLike[str], model: CostModel, report: dict[str, Any]) -> None:
    """Write the JSON that `CostModel.load` reads, with the report beside the coefficients; all of it or nothing."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "name": model.name,
        "coefficients_s": list(model.coefficients_s),
        "source": model.source,
        "report": report,
    }
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def random_burst(rng: np.random.Generator, spec: EngineSpec, max_positions: int) -> Workload:
    """Requests that arrive at once, of very unlike lengths, up to a third of what the engine can hold."""
    most = max(2, int(min(spec.kv_tokens // 3, 4 * spec.max_batch_tokens, max_positions // 2)))
    num_requests = int(rng.integers(max(2, spec.max_running // 2), 2 * spec.max_running + 1))
    longest = max(2, int(most * rng.uniform(0.05, 1)))
    prompts = np.exp(rng.uniform(np.log(longest / 20 + 1), np.log(longest), num_requests)).astype(np.int64)
    outputs = np.exp(rng.uniform(0, np.log(min(64, most)), num_requests)).astype(np.int64)
    return Workload.from_arrays("burst", np.zeros(num_requests), prompts, outputs, predicted_output_tokens=outputs)


def draw_levers(rng: np.random.Generator, decision: Decision, spec: EngineSpec) -> None:
    """Random levers within the engine's limits."""
    levers = decision.levers[0]
    fraction = np.exp(rng.uniform(np.log(8 / max(spec.max_batch_tokens, 9)), 0))
    levers["prefill_tokens"] = max(1, int(fraction * spec.max_batch_tokens)) * (rng.random() > 0.1)
    levers["chunk_tokens"] = NO_LIMIT if rng.random() < 0.5 else rng.integers(8, max(9, spec.max_batch_tokens))
    levers["max_running"] = rng.integers(1, spec.max_running + 1) if rng.random() < 0.6 else spec.max_running
    levers["whole_prompts"] = rng.random() < 0.2


def served_burst(rng: np.random.Generator, spec: EngineSpec, requests: Workload) -> Workload:
    """Some of `requests` in a row, all at once: few, or more than can run together."""
    most = min(len(requests), 2 * spec.max_running)
    num_requests = int(np.exp(rng.uniform(np.log(MIN_SERVED), np.log(most))))
    begin = int(rng.integers(len(requests) - num_requests + 1))
    window = requests.window(begin, begin + num_requests)
    return replace(window, arrival_s=np.zeros(num_requests), slo_class=np.zeros(num_requests, np.int32))


def _measure_run(engine: HFEngine, seed: int, index: int, requests: Workload | None = None) -> Run:
    """The first iterations of run number `index`: the same schedule at each call, whatever the clock says."""
    spec, rng = engine.capacity, np.random.default_rng([seed, index])
    redraw = index % 2 == 0
    if requests is None or index % 4 < 2:
        burst, most_iterations = random_burst(rng, spec, engine.max_positions), MAX_RUN_ITERATIONS
    else:
        burst, most_iterations = served_burst(rng, spec, requests), MAX_SERVED_ITERATIONS
    engine.reset(burst, seed=int(rng.integers(1 << 31)))
    levers = engine.default_decision().levers.copy()
    steps_left = 0
    for _ in range(most_iterations):
        decision = engine.default_decision()
        if steps_left == 0:
            draw_levers(rng, decision, spec)
            levers = decision.levers.copy()
            steps_left = int(rng.integers(1, 9)) if redraw else -1
        decision.levers[:] = levers
        if redraw:
            _shuffle_requests(rng, engine.state(), decision)
        steps_left -= 1
        if engine.step(decision).done:
            break
    timeline = engine.timeline()
    return engine.features(), timeline.iteration_end_s - timeline.iteration_start_s


def _shuffle_requests(rng: np.random.Generator, state: State, decision: Decision) -> None:
    """Admit in random order; now and then preempt somebody."""
    engine = state.engine[0]
    waiting, running = state.waiting[: engine["num_waiting"]], state.running[: engine["num_running"]]
    decision.order[: len(waiting)] = rng.permutation(waiting)
    decision.levers["num_order"] = len(waiting)
    if len(running) and rng.random() < 0.03:
        decision.preempt[0] = rng.choice(running)
        decision.levers["num_preempt"] = 1


def _ranges(features: np.ndarray) -> dict[str, list[float]]:
    low, high = features.min(axis=0), features.max(axis=0)
    return {name: [float(a), float(b)] for name, a, b in zip(COST_FEATURES, low, high, strict=True)}


def _model(engine: HFEngine) -> dict[str, Any]:
    config = engine.model.config
    return {
        "type": config.model_type,
        "parameters": sum(p.numel() for p in engine.model.parameters()),
        "dtype": str(engine.model.dtype),
    }
