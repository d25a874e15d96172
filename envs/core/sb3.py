"""A gymnasium `VectorEnv` as a Stable-Baselines3 `VecEnv`.

Import this module by name: `schedlab.envs` itself does not import torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices

Observation = dict[str, np.ndarray]


class ArrayStep(NamedTuple):
    """One step of all environments, as arrays. Observations may be the env's own arrays, valid until the next step."""

    obs: Observation  # after autoreset where an episode ended
    rewards: np.ndarray  # (num_envs,) float32
    terminated: np.ndarray  # (num_envs,) bool
    truncated: np.ndarray  # (num_envs,) bool, False where also terminated
    final_obs: Observation | None  # last observation of the episodes that ended (rows of the others are meaningless)
    episodes: list[dict[str, float]]  # return "r", length "l", wall seconds "t" of each episode that ended


class SB3VecEnv(VecEnv):
    """Adapter from `gymnasium.vector.VectorEnv` with autoreset SAME_STEP to SB3's `VecEnv`.

    - `infos["final_obs"]` becomes `infos[i]["terminal_observation"]`; `TimeLimit.truncated` is set where an episode
      was cut, so that PPO bootstraps its value.
    - Every finished episode is reported as `infos[i]["episode"]`, as SB3's Monitor does; entries of
      `infos["final_info"]` are passed on for the environments that ended.
    - `env_method("action_masks")` returns the rows of one array.
    - `step_arrays` is the same step without a Python object for each environment; fast trainers use it.

    Observations that SB3 receives are copies, because SB3 stores them after the next step.
    """

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode not in (AutoresetMode.SAME_STEP, AutoresetMode.SAME_STEP.value):
            raise ValueError(
                f"{env} declares autoreset_mode {mode!r}; SB3 needs {AutoresetMode.SAME_STEP}. "
                "Build the env in that mode and declare it in `metadata`"
            )
        self.env = env
        self._actions: np.ndarray | None = None
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, np.int64)
        self._start_s = time.time()
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Observation:
        seed = self._seeds[0] if self._seeds else None
        options = self._options[0] if self._options and self._options[0] else None
        obs, _ = self.env.reset(seed=seed, options=options)
        self._reset_seeds()
        self._reset_options()
        self._returns[:] = 0.0
        self._lengths[:] = 0
        return _copy(obs)

    def step_arrays(self, actions: np.ndarray) -> ArrayStep:
        """Step with actions int64 (num_envs,), without building a Python object for each environment."""
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        self._returns += rewards
        self._lengths += 1
        final_obs, episodes = None, []
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            final_obs = _final_obs(infos, obs)
            seconds = round(time.time() - self._start_s, 6)
            episodes = [{"r": float(self._returns[i]), "l": int(self._lengths[i]), "t": seconds} for i in ended]
            self._returns[ended] = 0.0
            self._lengths[ended] = 0
        self._infos, self._ended = infos, ended
        return ArrayStep(obs, np.asarray(rewards, np.float32), terminated, truncated & ~terminated, final_obs, episodes)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Observation, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        assert self._actions is not None, "step_wait() without step_async()"
        step = self.step_arrays(self._actions)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        final_info = self._infos.get("final_info", {})
        for i, episode in zip(self._ended, step.episodes, strict=True):
            infos[i] = {
                **{key: value[i] for key, value in final_info.items() if not key.startswith("_")},
                "terminal_observation": {key: np.copy(value[i]) for key, value in (step.final_obs or {}).items()},
                "TimeLimit.truncated": bool(step.truncated[i]),
                "episode": episode,
            }
        return _copy(step.obs), step.rewards.copy(), step.terminated | step.truncated, infos

    def action_masks(self) -> np.ndarray:
        """Mask of the current states, bool (num_envs, K)."""
        return self.env.action_masks()  # type: ignore[attr-defined]

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the vector env once. A result with a row for each env is split into its rows."""
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return self._rows(result, indices)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        value = getattr(self.env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        if indices is not None and len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"{attr_name!r} belongs to all environments at once. Leave out `indices`")
        setattr(self.env, attr_name, value)

    def has_attr(self, attr_name: str) -> bool:
        return hasattr(self.env, attr_name)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        images: Any = self.env.render()
        return list(images) if images is not None else [None] * self.num_envs

    def close(self) -> None:
        self.env.close()

    def _rows(self, result: Any, indices: VecEnvIndices) -> list[Any]:
        rows: Iterable[int] = self._get_indices(indices)
        if isinstance(result, (np.ndarray, list, tuple)) and len(result) == self.num_envs:
            return [result[i] for i in rows]
        return [result for _ in rows]


def _copy(obs: Observation) -> Observation:
    return {key: np.array(value) for key, value in obs.items()}


def _final_obs(infos: dict[str, Any], obs: Observation) -> Observation:
    """Final observations as a dict of arrays; gymnasium's SyncVectorEnv gives an object array of dicts."""
    final = infos["final_obs"]
    if isinstance(final, dict):
        return final
    stacked = {key: np.zeros_like(value) for key, value in obs.items()}
    for i, single in enumerate(final):
        if single is not None:
            for key, value in single.items():
                stacked[key][i] = value
    return stacked
