"""Training presets: each says what is learned, from which requests, and how."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..baselines.request_scheduling import RULES
from ..envs.request_scheduling.env import RequestSchedulingVectorEnv, Task
from ..envs.request_scheduling.rule import Rule
from ..envs.request_scheduling.sim import Simulator
from ..envs.request_scheduling.table import FEATURE_VERSION, PICKED_CONTEXT
from .cells import Cell, all_cells
from .engine_cells import engine_cells, hf_cpu_cost
from .headroom import gain_of, score
from .policies import ENV_ID
from .scenario import HF_LENGTH_SCALE, build_scenario
from .teachers import load_teachers

if TYPE_CHECKING:
    from ..agents.clone import Teacher
    from ..agents.group_gradient import Player
    from ..agents.self_label import Labeller
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
    labeller: Labeller | None = None
    player: Player | None = None
    keeper: Labeller | None = None


@dataclass(frozen=True)
class Preset:
    """A named way to train."""

    summary: str
    build: Callable[[int, DataDir], Recipe]
    """build(seed, data_dir)"""


def imitation(
    tasks: Sequence[Task], rules: Sequence[Rule], episode_requests: int | None = None
) -> tuple[MakeEnv, Teacher]:
    """An env over these tasks, and the teacher that follows `rules[i]` on task i."""

    def make_env(num_envs: int, seed: int) -> RequestSchedulingVectorEnv:
        env = RequestSchedulingVectorEnv(num_envs, tasks=tasks, episode_requests=episode_requests)
        env.reset(seed=seed)
        return env

    def teacher(env: Any) -> Any:
        return env.rule_actions(rules)

    return make_env, teacher


def tiny(seed: int, data_dir: DataDir) -> Recipe:
    """Imitate SRPT on the training part of azure_conv, at full size and on the small engine, then a little PPO."""
    from ..agents.train import TrainConfig

    srpt = RULES["srpt"]
    small_srpt = srpt.with_params(srpt.params[0], srpt.params[1] / HF_LENGTH_SCALE, *srpt.params[2:])
    tasks, rules = [], []
    for cost, rule in ((None, srpt), (hf_cpu_cost(), small_srpt)):
        scenario = build_scenario("azure_conv", load=1.0, requests=2000, cost=cost, data_dir=data_dir)
        for load, window in itertools.product((0.9, 1.1, 1.3), scenario.training_windows(2)):
            tasks.append(Task(scenario.spec, window.scale_time(1 / load)))
            rules.append(rule)
    source = tasks[0].workload.source

    make_env, teacher = imitation(tasks, rules, episode_requests=500)
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


def agent(seed: int, data_dir: DataDir) -> Recipe:
    """The shipped agent: one policy for every trace, load and objective, full size or small, from training requests.

    It imitates 60 searched rules at once (`teachers`), without being told which cell it is in, and then once more with
    rows that do not see what has been picked, which spares the engine their embedding at every further pick. PPO, with
    a KL term to the clone, goes on from there if it is asked for (`--steps 600000`).
    """
    from ..agents.train import TrainConfig

    if data_dir is not None:  # the cells find their traces by this variable alone
        os.environ["SCHEDLAB_DATA"] = str(data_dir)
    cells, teachers = all_cells(), load_teachers()
    trained_on: list[Any] = [*cells, *engine_cells()]
    pairs = [
        (Task(cell.spec, workload), teachers[cell.name])
        for cell in trained_on
        for repetition in range(weight_of(cell))
        for workload in cell.train_workloads(repetition)
    ]
    tasks, rules = [task for task, _ in pairs], [rule for _, rule in pairs]

    make_env, teacher = imitation(tasks, rules)
    config = TrainConfig(
        env_id=ENV_ID,
        spec=tasks[0].spec.to_dict(),
        feature_version=FEATURE_VERSION,
        seed=seed,
        total_steps=0,
        hidden=48,
        late_context=PICKED_CONTEXT,
        num_envs=144,
        n_steps=128,
        batch_size=4096,
        n_epochs=2,
        learning_rate=1e-4,
        gamma=0.999,
        gae_lambda=0.97,
        clip_range=0.1,
        kl_coef=0.1,
        target_kl=0.02,
        clone_steps=2_400_000,
        clone_rounds=48,
        clone_passes=1,
        clone_capacity=300_000,
        clone_lr=2e-3,
        late_steps=2_400_000,
        checkpoint_every=200_000,
    )
    evaluate = score_against([cell for cell in cells if cell.load == 1.1], teachers, num_requests=1000)
    card = (
        "# The shipped request scheduler\n\nOne policy for every objective and load, on Azure conversation, Azure code "
        "and Mooncake traffic, on a simulated A100 and on the small CPU engine that `deploy` runs. Cloned from rules "
        "searched per cell on training requests (`experiments/teachers.py`).\n"
    )
    return Recipe(config, make_env, teacher, evaluate, card)


def weight_of(cell: Any) -> int:
    """How often a cell's tasks stand in the list, each time drawn anew (`train_workloads`).

    Orders by latency are the finest to imitate, and shared prefixes the least alike from training to test requests.
    """
    return (2 if cell.objective == "mean_e2e" else 1) * (3 if cell.trace == "mooncake_synthetic" else 1)


def score_against(cells: Sequence[Cell], rules: dict[str, Rule], num_requests: int) -> Evaluate:
    """Measures a policy on training requests: its gain over the cells' rules in percent, and the mean as `score`."""
    from ..agents.compiled import pack_weights
    from ..agents.request_scheduling import CompiledPolicy

    workloads = {cell: cell.train_workloads()[-1].window(0, num_requests) for cell in cells}
    reference = {cell: score(cell, rules[cell.name], [workloads[cell]], on_table=True) for cell in cells}

    def evaluate(policy: Any) -> dict[str, float]:
        weights, gains = pack_weights(policy.network), {}
        for cell in cells:
            simulator = Simulator(cell.spec, recording=False)
            simulator.reset(workloads[cell])
            CompiledPolicy("agent", weights, cell.spec).run(simulator)
            gains[cell.name] = 100.0 * (gain_of(cell, simulator) - reference[cell]) / abs(reference[cell])
        return {"score": sum(gains.values()) / len(gains), **gains}

    return evaluate


def of_domain(domain: str, name: str) -> Callable[[int, DataDir], Recipe]:
    """A preset of the module `<domain>_presets`, which is imported when it is needed."""

    def build(seed: int, data_dir: DataDir) -> Recipe:
        module = import_module(f".{domain}_presets", __package__)
        recipe: Recipe = getattr(module, name)(seed, data_dir)
        return recipe

    return build


PRESETS: dict[str, Preset] = {
    "request_scheduling/agent": Preset("the shipped agent: every trace, load and objective; half an hour", agent),
    "request_scheduling/tiny": Preset("a minute: imitate SRPT on azure_conv, then a little PPO for mean latency", tiny),
    "expert_caching/agent": Preset(
        "evict, bypass and prefetch by learned scores, PPO on simulated stalls; a quarter of an hour",
        of_domain("expert_caching", "agent"),
    ),
    "expert_caching/tiny": Preset("the same in some minutes: to see how it goes", of_domain("expert_caching", "tiny")),
    "soc_dag/agent": Preset(
        "the shipped agent: single graphs, DS3's mix, data-parallel jobs, by self-labelling; six minutes",
        of_domain("soc_dag", "agent"),
    ),
    "soc_dag/tiny": Preset("a minute: single graphs for makespan, by self-labelling", of_domain("soc_dag", "tiny")),
}
"""Presets by name."""
