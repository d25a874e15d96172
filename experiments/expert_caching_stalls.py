"""Stalls in the simulator: how fast an offloaded model decodes under each policy, at two cost models and cache sizes.

DeepSeek-V2-Lite routing, held-out sequences in disjoint parts, each served from a cold cache; the same parts for every
policy. Rows: LRU on demand; LRU with prefetch by affinity, of the k likeliest experts or the likeliest one; the
published systems that run on a trace without gate guesses and token ids; the learned score on demand; the same with
prefetch; with prefetch and bypass, by a rule of three knobs; the same with slots that all layers share; a trained
pointer policy, where `--pointer` names a run of `schedlab train expert_caching/agent`; Belady, and the bound
max(compute, Belady's loads one after the other).

Intervals are of the mean over parts (Student's t), of the stall saved against LRU on the same part.

Examples:

  python -m schedlab.experiments.expert_caching_stalls --out results/expert_caching_stalls
  python -m schedlab.experiments.expert_caching_stalls --tune --scores my_scores
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..agents.expert_caching import SHIPPED, LearnedCaching, load_eviction
from ..baselines.expert_caching import RULES, belady, system_spec
from ..baselines.expert_fitted import fit_affinity_prefetch, fit_moe_infinity
from ..envs.core.errors import InputError
from ..envs.core.results import atomic_path
from ..envs.expert_caching.rule import Rule
from ..envs.expert_caching.sim import Simulator
from ..envs.expert_caching.spec import ExpertCachingSpec
from ..envs.expert_caching.workload import Workload
from . import command
from .expert_caching import least_times
from .expert_caching_presets import SETTINGS, Setting, advised_tasks, tune
from .expert_traces import find_trace


@dataclass
class Args:
    """Arguments of the experiment."""

    out: Path = Path("results/expert_caching_stalls")
    """Folder of results.json."""
    parts: int = 5
    """Disjoint parts of the held-out sequences."""
    tokens: int = 1000
    """Tokens of each part."""
    scores: Path = SHIPPED
    """Checkpoint of the learned scores."""
    pointer: Path | None = None
    """Run folder of a trained pointer policy; its best/ is taken, by stalls on training sequences."""
    tune: bool = False
    """Only print the knobs of least stall on training sequences, in every setting (those of `SETTINGS`)."""
    data_dir: Path | None = None
    """Folder with routing traces. Default: $SCHEDLAB_DATA, then the download cache."""


Entry = tuple[str, ExpertCachingSpec, Callable[[Workload], Any]]
"""Name of a row, its spec, and the policy for a part."""


def always(policy: Any) -> Callable[[Workload], Any]:
    """The same policy for every part."""
    return lambda part: policy


def fitted(train: Workload) -> dict[str, Rule]:
    """The prefetchers that are fitted to training sequences."""
    affinity = fit_affinity_prefetch(train)
    one = np.concatenate([[1.0], affinity.param_array[1:]])
    return {
        "affinity_prefetch": affinity,
        "affinity_prefetch_1": replace(affinity, params=one, name="affinity_prefetch_1"),
        "moe_infinity": fit_moe_infinity(train),
    }


def entries(setting: Setting, args: Args, train: Workload, prefetchers: dict[str, Rule]) -> list[Entry]:
    """The rows of the table in one setting."""
    base = setting.spec.replace(bypass=False, max_prefetch=0)
    streamed, eviction = base.replace(bypass=True), load_eviction(args.scores, "learned")
    weights, k, ahead = eviction.weights, eviction.shape[2], setting.spec.max_prefetch
    rows: list[Entry] = [("lru", base, always(RULES["lru"]))]
    for name, most in (("affinity_prefetch", k), ("affinity_prefetch_1", 1), ("moe_infinity", ahead)):
        rows.append((name, base.replace(max_prefetch=most), always(prefetchers[name])))
    for name in ("arc", "least_stale", "sliding_window", "se_moe_ring"):
        rows.append((name, system_spec(RULES[name], base, train), always(RULES[name])))
    rows += [
        ("learned", base, lambda part: eviction),
        (
            "learned_prefetch",
            base.replace(max_prefetch=ahead),
            lambda part: LearnedCaching("learned_prefetch", weights, k, setting.knobs),
        ),
        (
            "learned_prefetch_bypass",
            setting.spec,
            lambda part: LearnedCaching("learned_prefetch_bypass", weights, k, setting.knobs),
        ),
        (
            "learned_pooled",
            setting.spec.replace(pooled=True),
            lambda part: LearnedCaching("learned_pooled", weights, k, setting.knobs),
        ),
    ]
    if args.pointer is not None:
        from ..agents.expert_caching_pointer import load_pointer

        pointer = load_pointer(args.pointer / "best", args.scores, "pointer", setting.knobs)
        rows.append(("pointer", setting.spec, lambda part: pointer))
    rows += [
        ("belady", base, lambda part: belady(part, base)),
        ("belady_bypass", streamed, lambda part: belady(part, streamed)),
    ]
    return rows


def serve(spec: ExpertCachingSpec, policy: Any, part: Workload) -> dict[str, float]:
    """Stall, time and loads of one run, and CPU-microseconds an epoch, simulator included."""
    simulator = Simulator(spec, recording=False)
    simulator.reset(part)
    begun_s = time.process_time()
    policy.run(simulator)
    spent_s, engine = time.process_time() - begun_s, simulator.state().engine[0]
    return {
        "stall_s": float(simulator.sim.books[0]["total_stall_s"]),
        "time_s": float(engine["now_s"]),
        "demand_loads": int(engine["num_demand_loads"]),
        "prefetch_loads": int(engine["num_prefetch_loads"]),
        "bypassed": int(engine["num_bypassed"]),
        "epoch_us": 1e6 * spent_s / (part.num_tokens * part.num_layers),
    }


def parts_of(workload: Workload, count: int, tokens: int) -> list[Workload]:
    """Disjoint parts by whole sequences, the last sequence of each cut."""
    parts = workload.split(*[1 / count] * count, seed=1)
    shortest = min(part.num_tokens for part in parts)
    if shortest < tokens:
        raise InputError(
            f"{count} parts of {tokens} tokens, the shortest part has {shortest}", remedy="Give fewer tokens or parts"
        )
    return [part.head(tokens).with_prior(workload.prior) for part in parts]


def measure(args: Args) -> dict[str, Any]:
    """Run every row in every setting and return what results.json holds. Raises InputError."""
    if args.parts < 2:
        raise InputError(f"{args.parts} parts give no interval", remedy="Give at least 2")
    trace = find_trace("deepseek_v2_lite", args.data_dir)
    train, test = trace.training, trace.test
    parts = parts_of(test, args.parts, args.tokens)
    prefetchers, cells = fitted(train), {}
    for setting in SETTINGS:
        runs = {}
        for name, spec, policy_for in entries(setting, args, train, prefetchers):
            command.say(f"{setting.name}: {name}")
            runs[name] = [serve(spec, policy_for(part), part) for part in parts]
        cells[setting.name] = {"bound_s": [max(least_times(part, setting.spec)) for part in parts], "rows": runs}
    return {"parts": args.parts, "tokens": args.tokens, "trace": test.source, "cells": cells}


def saved(runs: Sequence[dict], lru: Sequence[dict]) -> tuple[float, float]:
    """Percent of LRU's stall that is saved: mean over parts, and half the 95% interval."""
    shares = 100.0 * (1.0 - np.array([run["stall_s"] for run in runs]) / np.array([run["stall_s"] for run in lru]))
    return float(shares.mean()), float(stats.t.ppf(0.975, len(shares) - 1) * stats.sem(shares))


def table(results: dict[str, Any]) -> str:
    """A block for every setting."""
    lines, tokens = [], results["parts"] * results["tokens"]
    for name, cell in results["cells"].items():
        lines.append(f"{name}: bound {tokens / sum(cell['bound_s']):.2f} tokens/s")
        heads = f"{'stall s':>10}{'saved, %':>16}{'tokens/s':>10}{'x LRU':>7}{'loads a token':>22}{'us':>8}"
        lines.append(f"  {'':24}{heads}")
        lru = cell["rows"]["lru"]
        lru_s = sum(run["time_s"] for run in lru)
        for policy, runs in cell["rows"].items():
            mean, half = saved(runs, lru)
            total = {key: sum(run[key] for run in runs) for key in runs[0]}
            loads = (f"{total[key] / tokens:.1f}" for key in ("demand_loads", "prefetch_loads", "bypassed"))
            lines.append(
                f"  {policy:24}{total['stall_s']:10.1f}{mean:9.1f} +-{half:4.1f}{tokens / total['time_s']:10.2f}"
                f"{lru_s / total['time_s']:7.2f}{' / '.join(loads):>22}{total['epoch_us'] / len(runs):8.1f}"
            )
    return "\n".join(lines)


def print_knobs(args: Args) -> None:
    """The knobs that `SETTINGS` should have. Scores that were fitted to these sequences are too sure of themselves."""
    train = find_trace("deepseek_v2_lite", args.data_dir).training
    for setting, task in zip(SETTINGS, advised_tasks(train.head(args.tokens), args.scores, SETTINGS), strict=True):
        print(f"{setting.name}: {tune(setting, task)}")


def act(args: Args) -> int:
    """Measure, write results.json, print the table. Returns the exit status."""
    if args.tune:
        print_knobs(args)
        return 0
    results = measure(args)
    with atomic_path(args.out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1))
    print(table(results))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    return command.run(Args, act, argv, "expert_caching_stalls", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
