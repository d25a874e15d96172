"""A pointer problem that is learned in seconds: point at the live row with the best hidden linear score."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode


class ToyPointerEnv(gym.vector.VectorEnv):
    """Reward 1 for the best row, less in proportion to its rank.

    STATE: `candidates` float32 (K, F) uniform in [-1, 1], of which a random number of rows is live;
    `context` float32 (C,): the sign of its first number flips the hidden score.
    Episodes last `horizon` steps: odd environments are truncated there, even ones terminate.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(self, num_envs: int = 8, num_candidates: int = 6, num_features: int = 3, horizon: int = 10):
        self.num_envs, self.horizon = num_envs, horizon
        k, f, c = num_candidates, num_features, 2
        self.shape = (k, f, c)
        self.single_observation_space = spaces.Dict(
            {
                "context": spaces.Box(-1, 1, (c,), np.float32),
                "candidates": spaces.Box(-1, 1, (k, f), np.float32),
                "action_mask": spaces.MultiBinary(k),
            }
        )
        self.single_action_space = spaces.Discrete(k)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.score = np.linspace(1.0, -0.5, f)
        self.obs = {
            "context": np.zeros((num_envs, c), np.float32),
            "candidates": np.zeros((num_envs, k, f), np.float32),
            "action_mask": np.zeros((num_envs, k), bool),
        }
        self.steps = np.zeros(num_envs, np.int64)

    def _draw(self, rows):
        k, f, c = self.shape
        for i in rows:
            rng = self.rngs[i]
            live = rng.integers(2, k + 1)
            self.obs["context"][i] = rng.uniform(-1, 1, c)
            self.obs["candidates"][i] = 0.0
            self.obs["candidates"][i, :live] = rng.uniform(-1, 1, (live, f))
            self.obs["action_mask"][i] = np.arange(k) < live

    def action_masks(self):
        return self.obs["action_mask"]

    def scores(self):
        scores = self.obs["candidates"] @ self.score * np.sign(self.obs["context"][:, :1])
        return np.where(self.obs["action_mask"], scores, -np.inf)

    def reset(self, *, seed=None, options=None):
        if seed is not None or not hasattr(self, "rngs"):
            self.rngs = [np.random.default_rng((seed or 0) + i) for i in range(self.num_envs)]
        self.steps[:] = 0
        self._draw(range(self.num_envs))
        return self.obs, {"action_mask": self.action_masks()}

    def step(self, actions):
        scores = self.scores()
        chosen = scores[np.arange(self.num_envs), actions]
        assert np.isfinite(chosen).all(), "a masked row was chosen"
        better = (scores > chosen[:, None]).sum(1)
        rewards = (1.0 - better / self.obs["action_mask"].sum(1)).astype(np.float32)
        self.steps += 1
        ended = self.steps >= self.horizon
        odd = np.arange(self.num_envs) % 2 == 1
        self._draw(np.flatnonzero(~ended))
        infos = {}
        if ended.any():
            self._draw(np.flatnonzero(ended))
            infos = {"final_obs": {k: v.copy() for k, v in self.obs.items()}, "_final_obs": ended}
            self._draw(np.flatnonzero(ended))
            self.steps[ended] = 0
        infos["action_mask"] = self.action_masks()
        return self.obs, rewards, ended & ~odd, ended & odd, infos


def teacher(env):
    """The best action of every environment, int64 (num_envs,)."""
    return env.scores().argmax(1)
