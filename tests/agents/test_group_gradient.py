"""Policy gradient over groups: what did better than its group gets likelier, and elsewhere nothing changes."""

from __future__ import annotations

import copy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from schedlab.agents.group_gradient import group_gradient, log_probabilities
from schedlab.agents.policy import PointerPolicy
from schedlab.agents.soc_dag_train import GroupsOfRuns, Instance
from schedlab.agents.train import train
from schedlab.envs.core.errors import InputError
from schedlab.envs.soc_dag.generate import random_layered
from schedlab.envs.soc_dag.spec import SocDagSpec, uniform_soc
from schedlab.envs.soc_dag.workload import Workload
from schedlab.experiments.presets import PRESETS

ROWS, CONTEXT, CANDIDATE = 4, 2, 3


@pytest.fixture
def policy() -> PointerPolicy:
    torch.manual_seed(0)
    boxes = {"context": (CONTEXT,), "candidates": (ROWS, CANDIDATE)}
    space = gym.spaces.Dict(
        {name: gym.spaces.Box(-np.inf, np.inf, shape, np.float32) for name, shape in boxes.items()}
        | {"action_mask": gym.spaces.MultiBinary(ROWS)}
    )
    return PointerPolicy(space, gym.spaces.Discrete(ROWS), lambda _: 1e-3, hidden=16)


def states(count: int, seed: int, noisy: float) -> dict[str, torch.Tensor]:
    """Random rows of which the last is masked; the context says whether they are noisy."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, ROWS, dtype=torch.bool)
    mask[:, -1] = False
    candidates = torch.rand(count, ROWS, CANDIDATE, generator=generator)
    return {"context": torch.full((count, CONTEXT), noisy), "candidates": candidates, "action_mask": mask}


def play(network, index: int):
    """A run is one decision, and 512 of them are a group; the return is the first number of the chosen row."""
    played, everywhere = states(512, index, 1.0), torch.arange(512)
    generator = torch.Generator().manual_seed(index)
    chances = log_probabilities(network, played, everywhere).detach().exp()
    played["actions"] = torch.multinomial(chances, 1, generator=generator)[:, 0]
    gains = played["candidates"][everywhere, played["actions"], 0]
    played["advantages"] = gains - gains.mean()
    return played, {"gain": float(gains.mean())}


def test_better_rows_get_likelier_and_kept_states_stay(policy):
    kept, reference, rows = states(256, 99, 0.0), copy.deepcopy(policy.network), []
    everywhere = torch.arange(256)
    before = log_probabilities(reference, kept, everywhere).detach()
    group_gradient(policy, play, kept, reference, rounds=60, lr=3e-3, kl_coef=3.0, minibatch=256, progress=rows.append)
    gains = [row["gain"] for row in rows]
    assert [row["group_round"] for row in rows] == list(range(60))
    assert np.mean(gains[:5]) == pytest.approx(0.5, abs=0.06)
    assert np.mean(gains[-5:]) > 0.6  # the best of three is 0.75 on average
    after = log_probabilities(policy.network, kept, everywhere).detach()
    assert (before.exp() * (before - after)).sum(1).mean() < 0.02
    assert float(after[:, -1].exp().max()) == 0.0


def noisy_instance(rng: np.random.Generator, index: int) -> Instance:
    soc, dag = uniform_soc(3), random_layered(12, 3, seed=rng)
    spec = SocDagSpec(soc, transfers="push", objective="makespan", noise="lognormal", noise_sigma=0.8)
    return Instance(spec, Workload.from_arrays("one", soc.kind_names, [dag]), int(rng.integers(100)), [], 6)


def test_advantages_are_those_of_a_group_and_the_same_round_plays_the_same():
    recipe = PRESETS["soc_dag/tiny"].build(0, None)
    env = recipe.make_env(1, 0)
    torch.manual_seed(1)
    policy = PointerPolicy(env.single_observation_space, env.single_action_space, lambda _: 1e-3, hidden=16)
    player = GroupsOfRuns(noisy_instance, 1, share=1.0)
    (first, figures), (again, _), (other, _) = (player(policy.network, index) for index in (2, 2, 3))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert len(first["actions"]) != len(other["actions"]) or not torch.equal(first["actions"], other["actions"])
    assert bool(first["action_mask"].gather(1, first["actions"][:, None]).all())
    of_runs = torch.unique_consecutive(first["advantages"])
    assert len(of_runs) == 6
    assert float(of_runs.sum()) == pytest.approx(0.0, abs=1e-5)
    assert figures["spread"] == pytest.approx(float(of_runs.std(correction=0)), rel=1e-4)


def test_without_a_player_there_are_no_groups(tmp_path):
    recipe = PRESETS["soc_dag/tiny"].build(0, None)
    config = replace(recipe.config, group_rounds=2)
    with pytest.raises(InputError, match="player, keeper or labeller"):
        train(config, recipe.make_env, tmp_path / "run", labeller=recipe.labeller)
