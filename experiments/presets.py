"""Training presets: each says what is learned, from which requests, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..baselines.request_scheduling import RULES
from ..envs.request_scheduling.env import RequestSchedulingVectorEnv, Task
from ..envs.request_scheduling.table import FEATURE_VERSION
from .policies import ENV_ID
from .scenario import build_scenario

if TYPE_CHECKING:
    from ..agents.clone import Teacher
    from ..agents.train import Evaluate, MakeEnv, TrainConfig

DataDir = str | PathLike[str] | None


@dataclass(frozen=True)
class Recipe:
    """What `agents.train.train` needs."""

    config: TrainConfig
    make_env: MakeEnv
    teacher: Teacher | None = None
    evaluate: Evaluate | None = None
    card: str = ""


@dataclass(frozen=True)
class Preset:
    """A named way to train."""

    summary: str
    build: Callable[[int, DataDir], Recipe]
    """build(seed, data_dir)"""


def tiny(seed: int, data_dir: DataDir) -> Recipe:
    """Imitate SRPT on the training part of azure_conv, then a little PPO: to see that everything works."""
    from ..agents.train import TrainConfig

    scenario = build_scenario("azure_conv", load=1.0, requests=2000, data_dir=data_dir)
    windows = scenario.training_windows(2)
    tasks = [Task(scenario.spec, window.scale_time(1 / load)) for load in (0.9, 1.1, 1.3) for window in windows]
    source = tasks[0].workload.source
    rules = [RULES["srpt"]] * len(tasks)

    def make_env(num_envs: int, seed: int) -> RequestSchedulingVectorEnv:
        env = RequestSchedulingVectorEnv(num_envs, tasks=tasks, episode_requests=500)
        env.reset(seed=seed)
        return env

    def teacher(env: Any) -> Any:
        return env.rule_actions(rules)

    config = TrainConfig(
        env_id=ENV_ID,
        spec=tasks[0].spec.to_dict(),
        feature_version=FEATURE_VERSION,
        seed=seed,
        total_steps=32_768,
        num_envs=32,
        n_steps=128,
        batch_size=2048,
        n_epochs=2,
        learning_rate=1e-4,
        gamma=0.999,
        kl_coef=0.05,
        clone_steps=60_000,
        clone_rounds=10,
        checkpoint_every=16_384,
    )
    card = (
        "# A small request scheduler\n\nCloned from SRPT by predicted length, then a little PPO for mean latency, at "
        f"loads 0.9, 1.1 and 1.3.\n\nRequests: {source}.\n\nMade to show the way, not to win.\n"
    )
    return Recipe(config, make_env, teacher, None, card)


PRESETS: dict[str, Preset] = {
    "request_scheduling/tiny": Preset("a minute: imitate SRPT on azure_conv, then a little PPO for mean latency", tiny),
}
"""Presets by name."""
