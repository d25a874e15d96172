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
from typing import TYPE_CHECKING, Any

import numpy as np

from ..agents.expert_caching import SHIPPED as SHIPPED_SCORES
from ..agents.expert_caching import Knobs, advice_for, advice_rule, load_eviction
from ..envs.expert_caching.advice import run_with_advice
from ..envs.expert_caching.affinity import Affinity
from ..envs.expert_caching.env import ExpertCachingVectorEnv, Task
from ..envs.expert_caching.sim import Simulator
from ..envs.expert_caching.spec import DEEPSEEK_V2_LITE_A100, CostModel, ExpertCachingSpec
from ..envs.expert_caching.table import FEATURE_VERSION
from ..envs.expert_caching.workload import Workload
from .expert_traces import find_trace

if TYPE_CHECKING:
    from ..agents.policy import PointerPolicy
    from ..agents.train import Evaluate
    from .presets import Recipe

DataDir = str | PathLike[str] | None

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


@dataclass(frozen=True)
class Setting:
    """A cost model, a cache size, and the knobs that were tuned for them on training sequences."""

    name: str
    cost: CostModel
    cache_share: float
    knobs: Knobs

    @property
    def spec(self) -> ExpertCachingSpec:
        """Bypass is allowed, and two prefetches an epoch; 16 rows hold all that is worth choosing from."""
        return ExpertCachingSpec(
            cost=self.cost,
            cache_share=self.cache_share,
            bypass=True,
            max_prefetch=2,
            history_tokens=1,
            num_candidates=17,
        )


SETTINGS = tuple(
    Setting(f"{name}_{round(100 * share)}", cost, share, knobs)
    for name, cost, share, knobs in (
        ("pcie4", DEEPSEEK_V2_LITE_A100, 0.25, Knobs(-0.05, 0.15, 0.2)),
        ("pcie4", DEEPSEEK_V2_LITE_A100, 0.5, Knobs(-0.05, 0.15, 0.2)),
        ("disk", DEEPSEEK_V2_LITE_DISK, 0.25, Knobs(-0.05, 0.15, 0.2)),
        ("disk", DEEPSEEK_V2_LITE_DISK, 0.5, Knobs(0.0, 0.3, 0.2)),
    )
)
"""Where the agent is trained and measured; knobs from `tune`."""


def advised_tasks(workload: Workload, settings: Sequence[Setting]) -> list[Task]:
    """One task a setting; advice is computed once for every cache size."""
    weights = load_eviction(SHIPPED_SCORES).weights
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
    grid = itertools.product((-1.0, -0.05, 0.0), (0.05, 0.15, 0.3), (0.1, 0.2, 0.3, 0.5))
    return min((Knobs(*knobs) for knobs in grid), key=lambda knobs: stall_of(setting, task, knobs))


def build(seed: int, data_dir: DataDir, tokens: int, **changes: Any) -> Recipe:
    """Imitate the tuned rules on some training tokens in every setting, then PPO."""
    from ..agents.train import TrainConfig
    from .presets import Recipe

    train = find_trace("deepseek_v2_lite", data_dir).training
    drawn, validation = train.split(0.8, 0.2, seed=seed)
    tasks = advised_tasks(drawn.head(tokens), SETTINGS)
    rules = [advice_rule(setting.knobs) for setting in SETTINGS]

    def make_env(num_envs: int, env_seed: int) -> ExpertCachingVectorEnv:
        affinity = Affinity.unknown(train.num_layers, train.num_experts)
        env = ExpertCachingVectorEnv(num_envs, tasks=tasks, episode_tokens=256, affinity=affinity)
        env.reset(seed=env_seed)
        return env

    def teacher(env: Any) -> np.ndarray:
        return env.rule_actions([rules[index] for index in env.task_index])

    config = TrainConfig(
        env_id="schedlab/ExpertCaching-v0",
        spec=tasks[0].spec.to_dict(),
        feature_version=FEATURE_VERSION,
        seed=seed,
        hidden=32,
        gamma=0.995,
        gae_lambda=0.97,
        clip_range=0.1,
        target_kl=0.02,
        learning_rate=1e-4,
        **changes,
    )
    evaluate = score_on(advised_tasks(validation.head(1000), SETTINGS))
    card = (
        "# An expert cache\n\nA pointer network over the learned scores: cloned from a rule with tuned knobs, then PPO "
        f"on simulated stalls, at {', '.join(setting.name for setting in SETTINGS)}.\n\nRouting: {train.source}.\n"
    )
    return Recipe(config, make_env, teacher, evaluate, card)


def score_on(tasks: Sequence[Task], num_envs: int = 16, episode_tokens: int = 48) -> Evaluate:
    """Measures a policy on tasks with advice: percent of the rules' stall that it saves, and the mean as `score`."""
    from ..agents.compiled import deepsets_batch, pack_weights

    unknown = Affinity.unknown(*tasks[0].workload.prior.shape)
    envs = [
        ExpertCachingVectorEnv(num_envs, tasks=[task], episode_tokens=episode_tokens, affinity=unknown)
        for task in tasks
    ]
    rules = [[advice_rule(setting.knobs)] * num_envs for setting in SETTINGS]
    of_rules = [lost(env, partial(env.rule_actions, of_env)) for env, of_env in zip(envs, rules, strict=True)]

    def evaluate(policy: PointerPolicy) -> dict[str, float]:
        weights, saved = pack_weights(policy.network), {}
        logits, values = np.zeros(envs[0].action_mask.shape, np.float32), np.zeros(num_envs, np.float32)
        for setting, env, of_rule in zip(SETTINGS, envs, of_rules, strict=True):

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
    """A minute: the way to an agent, not one."""
    return build(
        seed,
        data_dir,
        tokens=1500,
        num_envs=32,
        n_steps=128,
        batch_size=2048,
        n_epochs=2,
        kl_coef=0.05,
        clone_steps=60_000,
        clone_rounds=8,
        total_steps=32_768,
        checkpoint_every=16_384,
    )


def agent(seed: int, data_dir: DataDir) -> Recipe:
    """The agent for stalls: about a quarter of an hour."""
    return build(
        seed,
        data_dir,
        tokens=12_000,
        num_envs=64,
        n_steps=256,
        batch_size=4096,
        n_epochs=2,
        kl_coef=0.05,
        clone_steps=800_000,
        clone_rounds=16,
        clone_passes=1,
        clone_capacity=200_000,
        clone_lr=2e-3,
        total_steps=1_500_000,
        checkpoint_every=250_000,
    )
