"""Training presets of expert caching: a pointer network decides eviction, bypass and prefetch on simulated stalls.

It sees the learned scores (`agents/expert_caching.py`) among the columns of the action table, imitates the rule that
decides by these scores with knobs tuned per setting, and goes on by PPO with the stall as its loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..agents.expert_caching import SHIPPED, advice_for
from ..agents.expert_caching_checkpoint import load_weights
from ..agents.expert_caching_rule import Knobs, advice_rule
from ..envs.expert_caching.advice import run_with_advice
from ..envs.expert_caching.affinity import Affinity
from ..envs.expert_caching.env import ExpertCachingVectorEnv, Task
from ..envs.expert_caching.rule import Rule
from ..envs.expert_caching.sim import Simulator
from ..envs.expert_caching.spec import DEEPSEEK_V2_LITE_A100, CostModel, ExpertCachingSpec
from ..envs.expert_caching.table import FEATURE_VERSION
from ..envs.expert_caching.workload import Workload
from .expert_traces import MOE, find_trace

if TYPE_CHECKING:
    from ..agents.policy import PointerPolicy
    from ..agents.train import Evaluate
    from .presets import Recipe

DataDir = str | PathLike[str] | None

NUM_CANDIDATES = 17
"""Rows of the action table: 16 hold all that is worth choosing from."""

DEEPSEEK_V2_LITE_DISK = CostModel(
    name="deepseek-v2-lite-disk",
    attention_s=1.5e-3,
    expert_s=2.02e-3,
    expert_bytes=17_301_504,
    bandwidth=1.07e9,
    source="a small CPU and its disk: 8.8 ms to read 9.4 MB with O_DIRECT, 1.1 ms to compute it, as measured for our "
    "own model, scaled to 17.3 MB",
)
"""DeepSeek-V2-Lite on a machine on which a load takes as long as a layer."""

MOE_DISK = CostModel(
    name="moe-disk",
    attention_s=1.5e-3,
    expert_s=1.1e-3,
    expert_bytes=9_437_184,
    bandwidth=1.07e9,
    source="experts of 9.4 MB on a small CPU and its disk: 8.8 ms to read one with O_DIRECT, 1.1 ms to compute it",
)
"""Our own small model's routing, as if its experts had the size of Qwen3-30B-A3B's."""


@dataclass(frozen=True)
class Setting:
    """A cost model, a cache size, and the knobs that were tuned for them on training sequences."""

    name: str
    cost: CostModel
    cache_share: float
    knobs: Knobs

    @property
    def spec(self) -> ExpertCachingSpec:
        """Bypass is allowed, and two prefetches an epoch."""
        return ExpertCachingSpec(
            cost=self.cost,
            cache_share=self.cache_share,
            bypass=True,
            max_prefetch=2,
            history_tokens=1,
            num_candidates=NUM_CANDIDATES,
        )


SETTINGS = tuple(
    Setting(f"{name}_{round(100 * share)}", cost, share, knobs)
    for name, cost, share, knobs in (
        ("pcie4", DEEPSEEK_V2_LITE_A100, 0.25, Knobs(-0.05, 0.15, 0.2)),
        ("pcie4", DEEPSEEK_V2_LITE_A100, 0.5, Knobs(-0.05, 0.15, 0.2)),
        ("disk", DEEPSEEK_V2_LITE_DISK, 0.25, Knobs(-0.05, 0.5, 0.1)),
        ("disk", DEEPSEEK_V2_LITE_DISK, 0.5, Knobs(-0.05, 0.5, 0.1)),
    )
)
"""Where the agent is trained and measured; knobs from `tune`, on training sequences that the scores had not seen."""

TINY_SETTINGS = tuple(Setting(f"disk_{round(100 * share)}", MOE_DISK, share, Knobs()) for share in (0.25, 0.5))
"""The same for our own model, untuned."""


def advised_tasks(workload: Workload, scores: Path, settings: Sequence[Setting]) -> list[Task]:
    """One task a setting; the advice of a checkpoint of scores is computed once for every cache size."""
    weights, _ = load_weights(scores)
    advice = {share: advice_for(weights, workload, share) for share in {s.cache_share for s in settings}}
    return [Task(setting.spec, workload, advice[setting.cache_share]) for setting in settings]


def stall_of(setting: Setting, task: Task, knobs: Knobs) -> float:
    """Stall in seconds of the rule with these knobs."""
    assert task.advice is not None
    simulator = Simulator(setting.spec, recording=False)
    simulator.reset(task.workload)
    run_with_advice(simulator, advice_rule(knobs), task.advice)
    return float(simulator.sim.books[0]["total_stall_s"])


def tune(setting: Setting, task: Task) -> Knobs:
    """The knobs of least stall on the task: a grid."""
    grid = itertools.product((-1.0, -0.05, 0.0), (0.15, 0.3, 0.5), (0.05, 0.1, 0.2, 0.35))
    return min((Knobs(*knobs) for knobs in grid), key=lambda knobs: stall_of(setting, task, knobs))


def build(seed: int, data_dir: DataDir, trace: str, settings: Sequence[Setting], tokens: int, **sizes: Any) -> Recipe:
    """Imitate the tuned rules on some training tokens of a trace, in every setting, then PPO.

    The network is shown what the rule would do: it has to learn when to do something else. `sizes` are fields of
    TrainConfig that say how much of everything there is.
    """
    from ..agents.train import TrainConfig
    from .presets import Recipe

    train, scores = find_trace(trace, data_dir).training, SHIPPED.parent / trace
    drawn, validation = train.split(0.8, 0.2, seed=seed)
    tasks = advised_tasks(drawn.head(tokens), scores, settings)
    rules = [advice_rule(setting.knobs) for setting in settings]

    def make_env(num_envs: int, env_seed: int) -> ExpertCachingVectorEnv:
        env = pointer_env(num_envs, tasks, rules, episode_tokens=256)
        env.reset(seed=env_seed)
        return env

    def teacher(env: Any) -> np.ndarray:
        return env.rule_actions([rules[index] for index in env.task_index])

    config = TrainConfig(
        env_id="schedlab/ExpertCaching-v0",
        spec={**tasks[0].spec.to_dict(), "scores": trace},
        feature_version=FEATURE_VERSION,
        seed=seed,
        hidden=32,
        clone_rounds=2,
        clone_lr=2e-3,
        n_epochs=2,
        gamma=0.995,
        gae_lambda=0.97,
        clip_range=0.1,
        target_kl=0.02,
        kl_coef=0.01,
        ent_coef=0.002,  # the clone is sure of itself: without it nothing else is ever tried
        learning_rate=1e-4,
        vf_coef=5e-4,  # returns are hundreds of loads: at 0.5 their error is all that the gradient is about
        **sizes,
    )
    evaluate = score_on(advised_tasks(validation.head(2000), scores, settings), settings)
    card = (
        "# An expert cache\n\nA pointer network over the learned scores: cloned from a rule with tuned knobs, then PPO "
        f"on simulated stalls, at {', '.join(setting.name for setting in settings)}.\n\nRouting: {train.source}.\n"
    )
    return Recipe(config, make_env, teacher, evaluate, card)


def pointer_env(
    num_envs: int, tasks: Sequence[Task], rules: Sequence[Rule], episode_tokens: int
) -> ExpertCachingVectorEnv:
    """Envs over tasks with advice. The scores say more than tables of affinities, which are left out."""
    unknown = Affinity.unknown(*tasks[0].workload.prior.shape)
    return ExpertCachingVectorEnv(num_envs, tasks=tasks, episode_tokens=episode_tokens, affinity=unknown, shown=rules)


def score_on(
    tasks: Sequence[Task], settings: Sequence[Setting], num_envs: int = 24, episode_tokens: int = 64
) -> Evaluate:
    """Measures a policy on tasks with advice: percent of the rules' stall that it saves, and the mean as `score`."""
    from ..agents.compiled import deepsets_batch, pack_weights

    rules = [advice_rule(setting.knobs) for setting in settings]
    envs = [pointer_env(num_envs, [task], [rule], episode_tokens) for task, rule in zip(tasks, rules, strict=True)]
    of_rules = [lost(env, partial(env.rule_actions, [rule] * num_envs)) for env, rule in zip(envs, rules, strict=True)]

    def evaluate(policy: PointerPolicy) -> dict[str, float]:
        weights, saved = pack_weights(policy.network), {}
        logits, values = np.zeros(envs[0].action_mask.shape, np.float32), np.zeros(num_envs, np.float32)
        for setting, env, of_rule in zip(settings, envs, of_rules, strict=True):

            def best(env: ExpertCachingVectorEnv = env) -> np.ndarray:
                deepsets_batch(weights, env.context, env.candidates, env.action_mask, logits, values)
                return logits.argmax(1)

            saved[setting.name] = 100.0 * (1.0 - lost(env, best) / of_rule)
        return {"score": sum(saved.values()) / len(saved), **saved}

    return evaluate


def lost(env: ExpertCachingVectorEnv, act: Callable[[], np.ndarray]) -> float:
    """Stall, in loads, over the first episode of every env, which are the same each time."""
    env.reset(seed=0)
    going, total = np.ones(env.num_envs, bool), 0.0
    while going.any():
        _, rewards, terminated, _, _ = env.step(act())
        total -= float(rewards[going].sum())
        going &= ~terminated
    return total


def tiny(seed: int, data_dir: DataDir) -> Recipe:
    """A minute, on the trace that comes with the package: the way to an agent, not one."""
    return build(
        seed,
        data_dir,
        trace=MOE,
        settings=TINY_SETTINGS,
        tokens=1500,
        num_envs=32,
        n_steps=128,
        batch_size=2048,
        clone_steps=20_000,
        total_steps=32_768,
        checkpoint_every=16_384,
    )


def agent(seed: int, data_dir: DataDir) -> Recipe:
    """The agent for stalls: some minutes."""
    return build(
        seed,
        data_dir,
        trace="deepseek_v2_lite",
        settings=SETTINGS,
        tokens=8_000,
        num_envs=64,
        n_steps=256,
        batch_size=4096,
        clone_steps=40_000,
        total_steps=600_000,
        checkpoint_every=100_000,
    )
