"""The contract of `PointerVectorEnv`, on a toy that needs no simulator."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from schedlab.envs.core.vector_env import PointerEnv, PointerVectorEnv

ROWS = 5


class Countdown(PointerVectorEnv):
    """An episode draws n from 2..4 and lasts n steps; only rows below the steps left are legal. Reward: the row."""

    def __init__(self, num_envs: int = 1, **kwargs) -> None:
        super().__init__(num_envs, context=2, rows=ROWS, columns=1, **kwargs)
        self.left = np.zeros(num_envs, np.int64)
        self.drawn = np.zeros(num_envs)

    def _reset_envs(self, which: np.ndarray) -> None:
        for e in which:
            self.left[e] = self._rngs[e].integers(2, 5)
            self.drawn[e] = self._rngs[e].random()
        self._write()

    def _step_envs(self, actions):
        self.left -= 1
        self._write()
        return actions.astype(float), self.left == 0, np.zeros(self.num_envs, bool)

    def _write(self) -> None:
        self.context[:, 0], self.context[:, 1] = self.left, self.drawn
        self.candidates[:, :, 0] = np.arange(ROWS) < self.left[:, None]
        self.action_mask[:] = np.arange(ROWS) < np.maximum(self.left, 1)[:, None]


def test_spaces():
    env = Countdown(3)
    obs, info = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert env.single_action_space == gym.spaces.Discrete(ROWS)
    assert env.action_space.shape == (3,)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    np.testing.assert_array_equal(info["action_mask"], obs["action_mask"])
    np.testing.assert_array_equal(env.action_masks(), obs["action_mask"])


def test_autoreset_in_the_same_step():
    env = Countdown(2)
    env.reset(seed=0)
    lengths, episodes = env.left.copy(), 0
    for step in range(1, 12):
        obs, reward, terminated, truncated, info = env.step(np.zeros(2, np.int64))
        assert not truncated.any() and (reward == 0).all()
        np.testing.assert_array_equal(terminated, step == lengths)
        if terminated.any():
            episodes += terminated.sum()
            np.testing.assert_array_equal(info["_final_obs"], terminated)
            np.testing.assert_array_equal(info["_final_info"], terminated)
            final = info["final_obs"]
            assert (final["context"][terminated, 0] == 0).all()  # the last observation of the episode that ended
            np.testing.assert_array_equal(info["final_info"]["action_mask"], final["action_mask"])
            assert (obs["context"][terminated, 0] >= 2).all()  # the first of the next
            lengths[terminated] += env.left[terminated]
        else:
            assert "final_obs" not in info
        np.testing.assert_array_equal(info["action_mask"], obs["action_mask"])
    assert episodes >= 4


def test_env_i_depends_on_its_seed_alone():
    together = Countdown(4)
    first, _ = together.reset(seed=10)
    streams = [[first["context"][i].copy()] for i in range(4)]
    for _ in range(20):
        obs, *_ = together.step(np.zeros(4, np.int64))
        for i in range(4):
            streams[i].append(obs["context"][i].copy())
    for i in range(4):
        single = PointerEnv(Countdown())
        obs, _ = single.reset(seed=10 + i)
        seen = [obs["context"]]
        for _ in range(20):
            obs, _, terminated, _, _ = single.step(0)
            if terminated:
                obs, _ = single.reset()
            seen.append(obs["context"])
        np.testing.assert_array_equal(seen, streams[i])


def test_seeds():
    env = Countdown(3)
    one = env.reset(seed=5)[0]["context"]
    np.testing.assert_array_equal(env.reset(seed=[5, 6, 7])[0]["context"], one)
    assert (env.reset()[0]["context"][:, 1] != one[:, 1]).all()  # the streams go on
    np.testing.assert_array_equal(env.reset(seed=5)[0]["context"], one)
    with pytest.raises(ValueError, match="2 seeds given for 3 envs"):
        env.reset(seed=[1, 2])


def test_observations_are_copies():
    env = Countdown()
    obs, info = env.reset(seed=0)
    before = {name: array.copy() for name, array in obs.items()} | {"info": info["action_mask"].copy()}
    env.step(np.zeros(1, np.int64))
    for name, array in obs.items():
        np.testing.assert_array_equal(array, before[name])
    np.testing.assert_array_equal(info["action_mask"], before["info"])


@pytest.mark.parametrize("action", [4, ROWS, -1])
def test_illegal_actions_raise_in_debug_mode(action):
    env = Countdown(2, debug=True)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=rf"action {action} of env 1 is masked; legal rows are \[0, 1"):
        env.step(np.array([0, action]))


@pytest.mark.parametrize("action", [4, ROWS, -1])
def test_illegal_actions_are_counted_otherwise(action):
    env, legal = Countdown(2), Countdown(2)
    env.reset(seed=0)
    legal.reset(seed=0)
    obs, reward, _, _, info = env.step(np.array([1, action]))
    expected, _, _, _, legal_info = legal.step(np.array([1, 0]))  # the first legal row
    assert info["illegal_action"].tolist() == [False, True] and "illegal_action" not in legal_info
    np.testing.assert_array_equal(reward, [1, 0])
    np.testing.assert_array_equal(obs["context"], expected["context"])
    assert (env.num_illegal_actions, legal.num_illegal_actions) == (1, 0)
    single = PointerEnv(Countdown())
    single.reset(seed=0)
    assert single.step(action)[4]["illegal_action"] is True


def test_wrong_shapes_are_told():
    env = Countdown(2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions have shape \(3,\), expected \(2,\)"):
        env.step(np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="with one env, got 2"):
        PointerEnv(Countdown(2))


def test_single_env_does_not_reset_itself():
    env = PointerEnv(Countdown())
    obs, info = env.reset(seed=3)
    assert info["action_mask"].shape == (ROWS,) and env.action_masks().dtype == bool
    assert "autoreset_mode" not in env.metadata
    for _ in range(int(obs["context"][0])):
        obs, reward, terminated, truncated, info = env.step(0)
    assert terminated is True and truncated is False and isinstance(reward, float)
    assert obs["context"][0] == 0
