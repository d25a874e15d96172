"""The adapter from gymnasium's VectorEnv to SB3's VecEnv."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

from schedlab.envs.core.sb3 import SB3VecEnv
from schedlab.envs.core.vector_env import PointerVectorEnv


class Counter(PointerVectorEnv):
    """Observation: the step count. Env i ends after i + 2 steps: even ones terminate, odd ones are truncated."""

    def __init__(self, num_envs=3):
        super().__init__(num_envs, context=1, rows=4, columns=1)
        self.steps = np.zeros(num_envs, np.int64)
        self.first = np.zeros(num_envs)

    def _write(self):
        self.context[:, 0] = self.steps + self.first
        self.candidates[:, :, 0] = self.steps[:, None]
        self.action_mask[:] = np.arange(4)[None] <= self.steps[:, None] % 4

    def _reset_envs(self, which):
        self.steps[which] = 0
        self.first[which] = [100 * self._rngs[i].integers(1, 100) for i in which]
        self._write()

    def _step_envs(self, actions):
        self.steps += 1
        self._write()
        ended = self.steps >= np.arange(self.num_envs) + 2
        even = np.arange(self.num_envs) % 2 == 0
        return actions + 1.0, ended & even, ended & ~even


def test_terminal_observation_and_episode():
    env = SB3VecEnv(Counter())
    env.seed(0)
    first = env.reset()["context"][:, 0].copy()
    zeros = np.zeros(3, np.int64)
    _, rewards, dones, infos = env.step(zeros)
    assert not dones.any()
    assert infos == [{}, {}, {}]
    assert rewards.dtype == np.float32
    obs, _, dones, infos = env.step(np.array([1, 0, 1]))
    assert dones.tolist() == [True, False, False]
    assert infos[0]["terminal_observation"]["context"][0] == first[0] + 2
    assert infos[0]["terminal_observation"]["action_mask"].tolist() == [True, True, True, False]
    assert infos[0]["TimeLimit.truncated"] is False
    assert (infos[0]["episode"]["r"], infos[0]["episode"]["l"]) == (3.0, 2)
    assert obs["context"][0, 0] % 100 == 0  # already the next episode
    assert infos[1] == {}
    _, _, dones, infos = env.step(zeros)
    assert dones.tolist() == [False, True, False]
    assert infos[1]["TimeLimit.truncated"] is True
    assert (infos[1]["episode"]["r"], infos[1]["episode"]["l"]) == (3.0, 3)


def test_observations_are_copies():
    env = SB3VecEnv(Counter())
    first = env.reset()
    kept = {key: value.copy() for key, value in first.items()}
    env.step(np.zeros(3, np.int64))
    for key in kept:
        np.testing.assert_array_equal(first[key], kept[key])


def test_masks():
    env = SB3VecEnv(Counter())
    env.reset()
    env.step(np.zeros(3, np.int64))
    assert is_masking_supported(env)
    np.testing.assert_array_equal(get_action_masks(env), env.action_masks())
    np.testing.assert_array_equal(env.env_method("action_masks", indices=[2])[0], [True, True, False, False])
    assert env.env_method("action_masks", indices=1)[0].dtype == bool


def test_seed_reaches_the_envs_once():
    def contexts(seed):
        env = SB3VecEnv(Counter())
        env.seed(seed)
        return env.reset()["context"][:, 0], env.reset()["context"][:, 0]

    a, b = contexts(7), contexts(7)
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])
    assert (a[0] != a[1]).any()
    np.testing.assert_array_equal(contexts(8)[0][:2], a[0][1:])  # env i of seed s is env 0 of seed s + i


def test_attributes():
    env = SB3VecEnv(Counter())
    assert env.get_attr("debug") == [False, False, False]
    env.set_attr("debug", True)
    assert env.env.debug
    with pytest.raises(ValueError, match="indices"):
        env.set_attr("debug", False, indices=[0])
    assert env.has_attr("action_masks")
    assert not env.has_attr("nothing")
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 3


def test_array_step_equals_object_step():
    arrays, objects = SB3VecEnv(Counter()), SB3VecEnv(Counter())
    for env in (arrays, objects):
        env.seed(1)
        env.reset()
    for step in range(6):
        actions = np.full(3, step % 2)
        actions[:] = np.minimum(actions, arrays.env.steps % 4)
        a = arrays.step_arrays(actions)
        obs, rewards, dones, infos = objects.step(actions)
        np.testing.assert_array_equal(a.rewards, rewards)
        np.testing.assert_array_equal(a.terminated | a.truncated, dones)
        for key in obs:
            np.testing.assert_array_equal(a.obs[key], obs[key])
        assert [e["r"] for e in a.episodes] == [i["episode"]["r"] for i in infos if i]


def test_gymnasiums_own_vector_env():
    """SyncVectorEnv packs final observations as an object array."""

    class Single(gym.Env):
        observation_space = spaces.Dict(context=spaces.Box(0, 9, (1,), np.float32))
        action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            self.steps = 0
            return {"context": np.zeros(1, np.float32)}, {}

        def step(self, action):
            self.steps += 1
            return {"context": np.full(1, self.steps, np.float32)}, 1.0, False, self.steps == 2, {"is_success": True}

    env = SB3VecEnv(gym.vector.SyncVectorEnv([Single, Single], autoreset_mode=AutoresetMode.SAME_STEP))
    env.reset()
    env.step(np.zeros(2, np.int64))
    _, _, dones, infos = env.step(np.zeros(2, np.int64))
    assert dones.all()
    assert infos[1]["terminal_observation"]["context"] == 2.0
    assert infos[1]["TimeLimit.truncated"]
    assert infos[1]["is_success"]
    with pytest.raises(ValueError, match="NEXT_STEP"):
        SB3VecEnv(gym.vector.SyncVectorEnv([Single]))


def test_envs_import_without_torch():
    import subprocess
    import sys

    code = "import sys, schedlab.envs, schedlab.envs.core; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
