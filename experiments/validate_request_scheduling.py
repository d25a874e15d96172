"""Re-check a run of request scheduling from its schedule alone: the invariants of an engine, and every metric.

Plain Python loops over single tokens, sharing no code with the simulator or the metrics, so that an error there shows
here.
"""

from __future__ import annotations

import itertools
import math
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..envs.core.errors import InputError
from .validate import RELATIVE_TOLERANCE, TIME_TOLERANCE_S, Checked

REQUEST_ARRAYS = (
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "slo_class",
    "ttft_slo_s",
    "tpot_slo_s",
    "slo_weight",
    "refused",
    "preemptions",
)
ITERATION_ARRAYS = (
    "iteration_start_s",
    "iteration_end_s",
    "prefill_tokens",
    "decode_requests",
    "kv_blocks_used",
)


def load_schedule(path: str | PathLike[str]) -> dict[str, list]:
    """The arrays of a saved timeline as lists of plain numbers. Raises InputError for a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as data:
            lists = {name: data[name].tolist() for name in (*REQUEST_ARRAYS, *ITERATION_ARRAYS, "segments")}
    except Exception as error:  # a damaged archive raises anything from KeyError to zlib.error
        raise InputError(
            f"not a schedule ({error!r})", file=path, remedy="Evaluate this run again, its schedule is damaged"
        ) from error
    for names in (REQUEST_ARRAYS, ITERATION_ARRAYS):
        lengths = {name: len(lists[name]) for name in names}
        if len(set(lengths.values())) != 1:
            raise InputError(
                f"arrays differ in length: {lengths}",
                file=path,
                remedy="Evaluate this run again, its schedule is damaged",
            )
    return lists


def check_schedule(schedule: dict[str, list], about: dict[str, Any]) -> list[tuple[str, str]]:
    """The invariants of a run.

    Args:
        schedule: of `load_schedule`.
        about: the run's description: `kv_blocks`, `spec` (`RequestSchedulingSpec.to_dict()`), `run`; what is missing
            is not checked.

    Returns:
        (invariant, what is wrong) for each that is broken, the first offender of each.
    """
    wrong: dict[str, str] = {}

    def require(is_right: bool, check: str, message: str) -> None:
        if not is_right:
            wrong.setdefault(check, message)

    start_s, end_s = schedule["iteration_start_s"], schedule["iteration_end_s"]
    num_requests, num_iterations = len(schedule["arrival_s"]), len(end_s)
    is_simulated = about.get("run", {}).get("backend") == "sim"
    engine = about.get("spec", {}).get("engine", {})
    block_tokens = engine.get("block_tokens")
    has_prefix_cache = engine.get("prefix_cache")  # None: not known

    # iterations: one after another
    for i in range(num_iterations):
        require(
            math.isfinite(start_s[i]) and math.isfinite(end_s[i]) and start_s[i] <= end_s[i],
            "iteration times",
            f"iteration {i} runs from {start_s[i]} s to {end_s[i]} s",
        )
        if i > 0:
            require(
                end_s[i - 1] <= start_s[i] + TIME_TOLERANCE_S,
                "iterations overlap",
                f"iteration {i} starts at {start_s[i]} s, before the one before it ends at {end_s[i - 1]} s",
            )

    # segments: expand to the iteration of every token
    token_iterations: list[list[int]] = [[] for _ in range(num_requests)]
    for segment in schedule["segments"]:
        request, first, num_tokens = segment
        in_range = 0 <= request < num_requests and first >= 0 and num_tokens >= 1
        if not in_range or first + num_tokens > num_iterations:
            require(
                False, "segment range", f"segment {segment} of {num_requests} requests, {num_iterations} iterations"
            )
            continue
        for iteration in range(first, first + num_tokens):
            previous = token_iterations[request][-1] if token_iterations[request] else -1
            require(
                iteration > previous,
                "one token an iteration",
                f"request {request} yields at iteration {iteration} after iteration {previous}",
            )
            token_iterations[request].append(iteration)

    # requests: exactly their tokens, none before arrival
    tokens_emitted = [0] * num_iterations
    must_complete = [0] * num_iterations  # tokens that can only be the end of a prefill
    blocks_needed = [0] * num_iterations
    num_started, prompt_total, recompute_total = 0, 0, 0
    for request in range(num_requests):
        iterations = token_iterations[request]
        prompt, arrival = schedule["prompt_tokens"][request], schedule["arrival_s"][request]
        expected = 0 if schedule["refused"][request] else schedule["output_tokens"][request]
        require(
            len(iterations) == expected,
            "tokens of a request",
            f"request {request} yields {len(iterations)} tokens, expected {expected}",
        )
        require(schedule["preemptions"][request] >= 0, "preemptions", f"request {request} has a negative number")
        if not iterations:
            continue
        num_started += 1
        prompt_total += prompt
        require(
            end_s[iterations[0]] > arrival,
            "first token after arrival",
            f"request {request} arrives at {arrival} s, its first token is at {end_s[iterations[0]]} s",
        )
        if is_simulated:
            require(
                start_s[iterations[0]] >= arrival - TIME_TOLERANCE_S,
                "start after arrival",
                f"request {request} arrives at {arrival} s, it runs in the iteration from {start_s[iterations[0]]} s",
            )
        num_skips = 0
        for k, iteration in enumerate(iterations):
            tokens_emitted[iteration] += 1
            if block_tokens:
                blocks_needed[iteration] += -(-(prompt + k) // block_tokens)
            if k == 0:
                must_complete[iteration] += 1
            elif iteration > iterations[k - 1] + 1:
                num_skips += 1
                if is_simulated:  # only preemption makes a simulated request skip an iteration
                    must_complete[iteration] += 1
                    recompute_total += prompt + k
        if is_simulated:
            require(
                num_skips <= schedule["preemptions"][request],
                "preemptions",
                f"request {request} pauses {num_skips} times with {schedule['preemptions'][request]} preemptions",
            )

    # work of the iterations agrees with the tokens
    num_completions = 0
    kv_blocks = about.get("kv_blocks")
    cost = about.get("spec", {}).get("cost", {}).get("coefficients_s")
    for i in range(num_iterations):
        prefill, decodes, used = (schedule[name][i] for name in ITERATION_ARRAYS[2:])
        completions = tokens_emitted[i] - decodes
        num_completions += completions
        require(min(prefill, decodes, used) >= 0, "iteration counts", f"iteration {i} has a negative count")
        require(
            must_complete[i] <= completions <= prefill,
            "tokens of an iteration",
            f"iteration {i} yields {tokens_emitted[i]} tokens from {decodes} decodes and {prefill} prefill tokens, "
            f"{must_complete[i]} of them at the end of a prefill",
        )
        if kv_blocks is not None:
            require(used <= kv_blocks, "kv blocks", f"iteration {i} uses {used} of {kv_blocks} blocks")
        if is_simulated and has_prefix_cache is False:
            require(
                blocks_needed[i] <= used,
                "kv blocks",
                f"iteration {i} uses {used} blocks, the contexts of its tokens fill {blocks_needed[i]}",
            )
        if "max_batch_tokens" in engine:
            require(
                prefill + decodes <= engine["max_batch_tokens"],
                "batch tokens",
                f"iteration {i} has {prefill + decodes} tokens, the engine takes {engine['max_batch_tokens']}",
            )
        if is_simulated and cost:
            least_s = (cost[0] + cost[1] * prefill + cost[2] * decodes) * (1 - RELATIVE_TOLERANCE) - TIME_TOLERANCE_S
            require(
                end_s[i] - start_s[i] >= least_s,
                "iteration cost",
                f"iteration {i} takes {end_s[i] - start_s[i]} s, its cost model says at least {least_s} s",
            )

    # every prompt is computed, once for each time that it is lost
    num_preemptions = sum(schedule["preemptions"])
    require(
        num_completions <= num_started + num_preemptions,
        "prefills",
        f"{num_completions} prefills end, for {num_started} requests and {num_preemptions} preemptions",
    )
    prefill_total = sum(schedule["prefill_tokens"])
    if has_prefix_cache is False:
        require(
            prefill_total >= prompt_total + recompute_total,
            "prefill tokens",
            f"{prefill_total} prefill tokens for prompts of {prompt_total} and at least {recompute_total} to recompute",
        )
        if is_simulated and num_preemptions == 0:
            require(
                prefill_total == prompt_total,
                "prefill tokens",
                f"{prefill_total} prefill tokens for prompts of {prompt_total} without any preemption",
            )
    return list(wrong.items())


def recompute(schedule: dict[str, list], kv_blocks: int | None = None) -> dict[str, tuple[float, str]]:
    """Every metric of a schedule from its single tokens: metric -> (value, unit).

    Segments must lie within the run (the invariant "segment range" of `check_schedule`).
    """
    start_s, end_s = schedule["iteration_start_s"], schedule["iteration_end_s"]
    num_requests = len(schedule["arrival_s"])
    token_s: list[list[float]] = [[] for _ in range(num_requests)]
    for request, first, num_tokens in schedule["segments"]:
        for iteration in range(first, first + num_tokens):
            token_s[request].append(end_s[iteration])

    e2e, ttft, tbt, tpot = [], [], [], []
    weight_of_class: dict[int, float] = {}
    met_of_class: dict[int, float] = {}
    num_served, num_tokens_out, latest_s = 0, 0, -math.inf
    for request in range(num_requests):
        weight, slo_class = schedule["slo_weight"][request], schedule["slo_class"][request]
        weight_of_class[slo_class] = weight_of_class.get(slo_class, 0.0) + weight
        met_of_class.setdefault(slo_class, 0.0)
        times, arrival = token_s[request], schedule["arrival_s"][request]
        if schedule["refused"][request] or not times:
            continue
        num_served += 1
        num_tokens_out += len(times)
        latest_s = max(latest_s, times[-1])
        e2e.append(times[-1] - arrival)
        ttft.append(times[0] - arrival)
        for earlier, later in itertools.pairwise(times):
            tbt.append(later - earlier)
        is_met = ttft[-1] <= schedule["ttft_slo_s"][request]
        if len(times) >= 2:
            tpot.append((times[-1] - times[0]) / (len(times) - 1))
            is_met = is_met and tpot[-1] <= schedule["tpot_slo_s"][request]
        if is_met:
            met_of_class[slo_class] += weight

    met, total_weight = sum(met_of_class.values()), sum(weight_of_class.values())
    makespan_s = latest_s - min(schedule["arrival_s"]) if num_served else 0.0

    def rate(amount: float) -> float:
        return amount / makespan_s if makespan_s > 0 else 0.0

    values = {
        "mean_e2e_s": (_mean(e2e), "s"),
        "p50_e2e_s": (_percentile(e2e, 50), "s"),
        "p90_e2e_s": (_percentile(e2e, 90), "s"),
        "p99_e2e_s": (_percentile(e2e, 99), "s"),
        "mean_ttft_s": (_mean(ttft), "s"),
        "p50_ttft_s": (_percentile(ttft, 50), "s"),
        "p90_ttft_s": (_percentile(ttft, 90), "s"),
        "p99_ttft_s": (_percentile(ttft, 99), "s"),
        "max_wait_s": (max(ttft, default=math.nan), "s"),
        "p50_tbt_s": (_percentile(tbt, 50), "s"),
        "p99_tbt_s": (_percentile(tbt, 99), "s"),
        "mean_tpot_s": (_mean(tpot), "s"),
        "p99_tpot_s": (_percentile(tpot, 99), "s"),
        "slo_goodput": (met / total_weight if total_weight > 0 else math.nan, "share"),
        "goodput_rps": (rate(met), "requests/s"),
        "throughput_rps": (rate(num_served), "requests/s"),
        "throughput_tokens_per_s": (rate(num_tokens_out), "tokens/s"),
        "makespan_s": (makespan_s, "s"),
        "preemptions": (float(sum(schedule["preemptions"])), "count"),
        "refused": (float(sum(map(bool, schedule["refused"]))), "count"),
        "iterations": (float(len(end_s)), "count"),
    }
    if kv_blocks is not None:
        busy_s, used_s = 0.0, 0.0
        for start, end, used in zip(start_s, end_s, schedule["kv_blocks_used"], strict=True):
            busy_s += end - start
            used_s += used * (end - start)
        values["kv_use_mean"] = (used_s / (kv_blocks * busy_s) if busy_s > 0 else math.nan, "share")
    if len(weight_of_class) > 1:
        for slo_class, weight in weight_of_class.items():
            share = met_of_class[slo_class] / weight if weight > 0 else math.nan
            values[f"slo_goodput_class{slo_class}"] = (share, "share")
    return values


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between order statistics."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = percent * (len(ordered) - 1) / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def check_run(folder: Path, npz: Path, about: dict[str, Any]) -> Checked:
    """Re-check one run. Raises InputError if its schedule cannot be read."""
    schedule = load_schedule(npz)
    broken = check_schedule(schedule, about)
    checked = Checked([schedule[name] for name in REQUEST_ARRAYS[:4]], broken)
    if not any(check == "segment range" for check, _ in broken):  # tokens outside the run have no time
        checked.values = recompute(schedule, about.get("kv_blocks"))
    return checked
