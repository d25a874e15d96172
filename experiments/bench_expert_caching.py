"""The rows of `schedlab bench expert_caching`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from . import command
from .bench import Args, Row, best_cpu_s, faster, shorter

if TYPE_CHECKING:
    from ..envs.expert_caching.workload import Workload

OBSERVED_GOAL, RULES_GOAL, BELADY_GOAL_S = 300e3, 3e6, 10.0
SIZE = dict(num_layers=26, num_experts=64, top_k=6)
"""Of DeepSeek-V2-Lite."""
BELADY_TOKENS = 150_000
CACHE_SHARE = 0.25
NUM_ROWS = 6
"""How many there are, for the progress bar."""


def env_rows(workload: Workload, num_envs: int, steps: int, repeats: int) -> Iterator[Row]:
    """Decisions of the vector env, with its observations, and with the typed graph as well; a decision is an action."""
    from ..envs.expert_caching.env import ExpertCachingVectorEnv, Task
    from ..envs.expert_caching.spec import ExpertCachingSpec

    for graph in (False, True):
        spec = ExpertCachingSpec(cache_share=CACHE_SHARE, history_tokens=1, eviction_only=True)
        env = ExpertCachingVectorEnv(num_envs, tasks=[Task(spec, workload)], graph=graph)
        _, info = env.reset(seed=0)
        actions = info["action_mask"].argmax(1)
        seconds = []
        for _ in range(repeats + 1):  # the first compiles
            spent = 0.0
            for _ in range(steps):
                start = time.process_time()
                *_, info = env.step(actions)
                spent += time.process_time() - start
                actions = info["action_mask"].argmax(1)
            seconds.append(spent)
        env.close()
        per_s = num_envs * steps / min(seconds[1:])
        seen = "typed-graph observations" if graph else "observations"
        detail = f"{num_envs} envs with {seen}, cache {CACHE_SHARE:g}, best of {repeats}, the policy's time left out"
        name = "decisions_per_cpu_s_obs" + ("/graph" if graph else "")
        yield faster(name, per_s, "1/s", "goal", OBSERVED_GOAL, detail)


def rule_rows(workload: Workload, repeats: int) -> Iterator[Row]:
    """Decisions of rules compiled into the simulator; a decision is a victim for a missing expert."""
    from ..baselines.expert_caching import RULES
    from ..envs.expert_caching.sim import Simulator
    from ..envs.expert_caching.spec import ExpertCachingSpec

    for rule, eviction_only in (("lru", True), ("ema_95", True), ("lru", False)):
        spec = ExpertCachingSpec(cache_share=CACHE_SHARE, history_tokens=1, eviction_only=eviction_only)
        simulator = Simulator(spec, recording=False)

        def work(simulator: Simulator = simulator, rule: str = rule) -> None:
            simulator.reset(workload)
            simulator.run(RULES[rule])

        work()
        seconds = best_cpu_s(work, repeats)
        decisions = int(simulator.state().engine[0]["num_demand_loads"])
        epochs = workload.num_tokens * workload.num_layers
        detail = (
            f"{rule}, {'loads take no time' if eviction_only else 'with times'}, {decisions / epochs:.2f} decisions an "
            f"epoch, {epochs / seconds:,.0f} epochs/s, best of {repeats}"
        )
        is_fixed = rule == "lru" and eviction_only
        name = "decisions_per_cpu_s_rules" + ("" if is_fixed else f"/{rule}{'' if eviction_only else '_timed'}")
        yield faster(name, decisions / seconds, "1/s", "goal", RULES_GOAL, detail)


def belady_rows(workload: Workload, repeats: int) -> Iterator[Row]:
    """Belady's loads of a long trace, all layers."""
    from ..baselines.expert_caching import belady_loads

    slots = (round(CACHE_SHARE * workload.num_experts),) * workload.num_layers
    belady_loads(workload.head(64), slots)

    def work() -> None:
        belady_loads(workload, slots)

    seconds = best_cpu_s(work, repeats)
    detail = f"{workload.num_tokens} tokens, {workload.num_layers} layers, cache {CACHE_SHARE:g}, best of {repeats}"
    yield shorter("belady_s_150k_tokens", seconds, "s", "goal", BELADY_GOAL_S, detail)


def rows(args: Args) -> Iterator[Row]:
    """All rows, as they are measured."""
    from ..envs.core.errors import InputError
    from ..envs.expert_caching.workload import find_routing, generate

    quick = args.quick
    try:
        trace = find_routing("deepseek_v2_lite", args.data_dir)
    except InputError:
        trace = generate(64, seed=args.seed, **SIZE)
    command.say(trace.source)
    repeats = 1 if quick else args.repeats
    some = trace.head(300 if quick else 4000)
    yield from env_rows(some, 8 if quick else 256, 20 if quick else 200, repeats)
    yield from rule_rows(some, repeats)
    long = np.arange(3000 if quick else BELADY_TOKENS) % trace.num_tokens
    yield from belady_rows(trace.take(long, np.array([len(long)])), repeats)
