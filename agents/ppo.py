"""`FastMaskablePPO`: MaskablePPO with the same mathematics and less around it.

Only `collect_rollouts` and `train` differ. What they leave out: dictionaries, copies and Python objects for each
environment and step, distribution objects, and dead candidate rows. On one batch the rollout, the losses and the
parameters after the update equal those of sb3-contrib (tested).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule, explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from ..envs.core.sb3 import SB3VecEnv
from .compiled import deepsets_batch, pack_weights
from .networks import PointerNetwork
from .policy import OBSERVATION_KEYS, PointerPolicy, choose, entropy, logits_and_values_at, pointer_sizes


class PointerRolloutBuffer:
    """One rollout in arrays allocated once; torch tensors and numpy arrays share the memory.

    T steps of N environments. Index T of the observations holds the state after the last step.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        device: torch.device | str = "cpu",
        gae_lambda: float = 0.95,
        gamma: float = 0.99,
        n_envs: int = 1,
    ) -> None:
        steps, num_candidates = buffer_size, int(action_space.n)
        context_size, candidate_size = pointer_sizes(observation_space)
        self.buffer_size, self.n_envs, self.gamma, self.gae_lambda = steps, n_envs, gamma, gae_lambda
        self.device = torch.device(device)
        self.tensors = {
            "context": torch.zeros(steps + 1, n_envs, context_size),
            "candidates": torch.zeros(steps + 1, n_envs, num_candidates, candidate_size),
            "action_mask": torch.zeros(steps + 1, n_envs, num_candidates, dtype=torch.bool),
            "actions": torch.zeros(steps, n_envs, dtype=torch.int64),
            "values": torch.zeros(steps, n_envs),
            "log_probs": torch.zeros(steps, n_envs),
            "advantages": torch.zeros(steps, n_envs),
            "returns": torch.zeros(steps, n_envs),
            "rewards": torch.zeros(steps, n_envs),
            "episode_starts": torch.zeros(steps, n_envs),
        }
        self.arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}

    @property
    def values(self) -> np.ndarray:
        """Values float32 (T, N) of the states, by the policy that acted."""
        return self.arrays["values"]

    @property
    def returns(self) -> np.ndarray:
        """TD(lambda) returns float32 (T, N)."""
        return self.arrays["returns"]

    def reset(self) -> None:
        """Nothing to do: every entry is written again by the next rollout."""

    def put_observation(self, step: int, obs: dict[str, np.ndarray]) -> None:
        for key in OBSERVATION_KEYS:
            self.arrays[key][step] = obs[key]

    def observation(self, step: int) -> dict[str, Tensor]:
        return {key: self.tensors[key][step].to(self.device) for key in OBSERVATION_KEYS}

    def compute_returns_and_advantage(self, last_values: np.ndarray, dones: np.ndarray) -> None:
        """GAE(lambda) (Schulman et al. 2016) and TD(lambda) returns, in the order of operations of SB3."""
        rewards, values, starts = self.arrays["rewards"], self.arrays["values"], self.arrays["episode_starts"]
        advantage = np.zeros(self.n_envs, np.float32)
        for step in reversed(range(self.buffer_size)):
            if step == self.buffer_size - 1:
                next_non_terminal, next_values = 1.0 - dones.astype(np.float32), last_values
            else:
                next_non_terminal, next_values = 1.0 - starts[step + 1], values[step + 1]
            delta = rewards[step] + self.gamma * next_values * next_non_terminal - values[step]
            advantage = delta + self.gamma * self.gae_lambda * next_non_terminal * advantage
            self.arrays["advantages"][step] = advantage
        np.add(self.arrays["advantages"], values, out=self.arrays["returns"])

    def minibatches(self, batch_size: int | None) -> list[Tensor]:
        """Random minibatches of flat positions (step * N + env), drawn as SB3's buffer draws them."""
        size = self.buffer_size * self.n_envs
        order = np.random.permutation(size)  # noqa: NPY002 - SB3 seeds and uses the global generator
        # SB3 numbers transitions environment by environment; our memory runs step by step.
        flat = torch.from_numpy((order % self.buffer_size) * self.n_envs + order // self.buffer_size)
        return list(flat.split(batch_size or size))


@dataclass
class Profile:
    """CPU seconds by activity since `reset`."""

    env_s: float = 0.0
    forward_s: float = 0.0
    update_s: float = 0.0
    decisions: int = 0
    start_s: float = field(default_factory=time.process_time)

    @property
    def total_s(self) -> float:
        return time.process_time() - self.start_s

    @property
    def decisions_per_s(self) -> float:
        return self.decisions / max(self.total_s, 1e-9)

    def summary(self) -> dict[str, float]:
        """Decisions per CPU second and the shares of env, forward, update and the rest."""
        total = max(self.total_s, 1e-9)
        shares = {"env": self.env_s / total, "forward": self.forward_s / total, "update": self.update_s / total}
        return {"decisions_per_s": self.decisions_per_s, **shares, "other": 1.0 - sum(shares.values())}


class FastMaskablePPO(MaskablePPO):
    """MaskablePPO for pointer problems, on a `SB3VecEnv`.

    Arguments are those of MaskablePPO, with defaults that suit many cheap environments. `learning_rate` given as a
    number is constant, as in SB3; the default decays linearly to zero.

    Args:
        reference: a frozen policy that the learned one should stay near, usually the cloned one it started from.
        kl_coef: weight of KL(policy || reference) in the loss; 0 switches the term off.
    """

    policy: PointerPolicy
    rollout_buffer: PointerRolloutBuffer
    _last_obs: dict[str, np.ndarray] | None
    _last_episode_starts: np.ndarray | None

    def __init__(
        self,
        policy: str | type[PointerPolicy],
        env: SB3VecEnv,
        learning_rate: float | Schedule | None = None,
        n_steps: int = 64,
        batch_size: int | None = 2048,
        n_epochs: int = 4,
        *,
        reference: PointerPolicy | None = None,
        kl_coef: float = 0.0,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> None:
        if learning_rate is None:
            learning_rate = LinearSchedule(3e-4, 0.0, 1.0)
        self.profile = Profile()
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            device=device,
            rollout_buffer_class=kwargs.pop("rollout_buffer_class", PointerRolloutBuffer),
            **kwargs,
        )
        self.set_reference(reference, kl_coef)

    def set_reference(self, reference: PointerPolicy | PointerNetwork | None, kl_coef: float) -> None:
        """Keep a frozen copy of `reference`; the loss gains kl_coef * KL(policy || reference)."""
        if kl_coef and reference is None:
            raise ValueError(f"kl_coef is {kl_coef} but no reference is given. Pass reference=policy, or kl_coef=0")
        self.kl_coef = kl_coef
        self.reference: PointerNetwork | None = None
        if reference is not None and kl_coef:
            network = reference.network if isinstance(reference, PointerPolicy) else reference
            self.reference = copy.deepcopy(network).to(self.device).requires_grad_(False)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "reference", "profile"]

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: PointerRolloutBuffer,
        n_rollout_steps: int,
        use_masking: bool = True,
    ) -> bool:
        """Fill the buffer with `n_rollout_steps` of every environment. False if the callback stopped it."""
        if not isinstance(env, SB3VecEnv) or not use_masking or n_rollout_steps != rollout_buffer.buffer_size:
            raise ValueError(
                f"FastMaskablePPO needs a bare SB3VecEnv and masking, got {type(env).__name__}, use_masking="
                f"{use_masking}. Use SB3VecEnv(vector_env), or sb3_contrib.MaskablePPO for other wrappers"
            )
        clock = time.process_time
        self.policy.set_training_mode(False)
        callback.on_rollout_start()
        arrays, profile = rollout_buffer.arrays, self.profile
        assert self._last_obs is not None and self._last_episode_starts is not None
        rollout_buffer.put_observation(0, self._last_obs)
        dones: np.ndarray = self._last_episode_starts
        evaluate = self._actor(rollout_buffer)
        infos: list[dict[str, Any]] = []  # callbacks may look for it; the episodes themselves go to ep_info_buffer

        for step in range(n_rollout_steps):
            t0 = clock()
            with torch.inference_mode():
                actions, log_probs = choose(evaluate(step))
            arrays["actions"][step] = actions.cpu().numpy()
            arrays["log_probs"][step] = log_probs.cpu().numpy()
            arrays["episode_starts"][step] = dones

            t1 = clock()
            result = env.step_arrays(arrays["actions"][step])
            rollout_buffer.put_observation(step + 1, result.obs)
            t2 = clock()
            profile.forward_s += t1 - t0
            profile.env_s += t2 - t1

            arrays["rewards"][step] = result.rewards
            if result.final_obs is not None and result.truncated.any():
                arrays["rewards"][step][result.truncated] += self.gamma * self._values_of(
                    {key: result.final_obs[key][result.truncated] for key in OBSERVATION_KEYS}
                )
            dones = result.terminated | result.truncated
            self.ep_info_buffer.extend(result.episodes)
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False

        self._last_obs = {key: arrays[key][-1] for key in OBSERVATION_KEYS}
        self._last_episode_starts = dones
        t0 = clock()
        last_values = self._values_of(self._last_obs)
        profile.forward_s += clock() - t0
        profile.decisions += n_rollout_steps * env.num_envs
        rollout_buffer.compute_returns_and_advantage(last_values, dones)
        callback.on_rollout_end()
        return True

    def _actor(self, buffer: PointerRolloutBuffer) -> Callable[[int], Tensor]:
        """A function that writes the values of a step of the rollout and returns its logits (N, K)."""
        arrays = buffer.arrays
        if self.policy.network.takes_rows:
            # The batch of one step is too small for torch: the compiled kernel is three times faster.
            weights = pack_weights(self.policy.network, arrays["candidates"].shape[2])
            logits = torch.empty(arrays["candidates"].shape[1:3])

            def run_compiled(step: int) -> Tensor:
                context, candidates, mask = (arrays[key][step] for key in OBSERVATION_KEYS)
                deepsets_batch(weights, context, candidates, mask, logits.numpy(), arrays["values"][step])
                return logits

            return run_compiled

        def run_torch(step: int) -> Tensor:
            logits, values = self.policy.logits_and_values(buffer.observation(step))
            arrays["values"][step] = values.cpu().numpy()
            return logits

        return run_torch

    def _values_of(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """Values float32 (B,) of a batch of observations."""
        with torch.inference_mode():
            tensors = {key: torch.as_tensor(obs[key], device=self.device) for key in OBSERVATION_KEYS}
            return self.policy.logits_and_values(tensors)[1].cpu().numpy()

    def train(self) -> None:
        """Update the policy from the rollout: clipped PPO, as MaskablePPO.train."""
        start_s = time.process_time()
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip_range = self.clip_range(self._current_progress_remaining)
        clip_range_vf = None if self.clip_range_vf is None else self.clip_range_vf(self._current_progress_remaining)
        flat = {name: tensor[: self.n_steps].flatten(0, 1) for name, tensor in self.rollout_buffer.tensors.items()}
        reference_log_probs = self._log_probs(self.reference, flat) if self.reference is not None else None
        parameters = list(self.policy.parameters())

        logs: dict[str, list[float]] = {
            name: [] for name in ("entropy_loss", "policy_gradient_loss", "value_loss", "clip_fraction", "kl_reference")
        }
        approx_kls: list[float] = []
        loss = torch.zeros(())
        continue_training = True
        for epoch in range(self.n_epochs):
            approx_kls = []
            for batch in self.rollout_buffer.minibatches(self.batch_size):
                logits, values = logits_and_values_at(self.policy.network, flat, batch)
                log_probs = torch.log_softmax(logits, dim=1)
                log_prob = log_probs.gather(1, self._take(flat["actions"], batch).unsqueeze(1)).squeeze(1)

                advantages = self._take(flat["advantages"], batch)
                if self.normalize_advantage:
                    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                log_ratio = log_prob - self._take(flat["log_probs"], batch)
                ratio = torch.exp(log_ratio)
                clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
                policy_loss = -torch.min(advantages * ratio, advantages * clipped).mean()

                if clip_range_vf is not None:
                    old_values = self._take(flat["values"], batch)
                    values = old_values + torch.clamp(values - old_values, -clip_range_vf, clip_range_vf)
                value_loss = F.mse_loss(self._take(flat["returns"], batch), values)
                with torch.set_grad_enabled(self.ent_coef != 0):
                    entropy_loss = -entropy(logits, log_probs).mean()
                loss = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss
                if reference_log_probs is not None:
                    distance = log_probs - self._take(reference_log_probs, batch)
                    kl_reference = (torch.softmax(logits, dim=1) * distance).sum(1).mean()
                    loss = loss + self.kl_coef * kl_reference
                    logs["kl_reference"].append(kl_reference.item())

                with torch.no_grad():
                    approx_kl = ((ratio - 1) - log_ratio).mean().item()
                    logs["clip_fraction"].append(((ratio - 1).abs() > clip_range).float().mean().item())
                approx_kls.append(approx_kl)
                logs["policy_gradient_loss"].append(policy_loss.item())
                logs["value_loss"].append(value_loss.item())
                logs["entropy_loss"].append(entropy_loss.item())
                if self.target_kl is not None and approx_kl > 1.5 * self.target_kl:
                    continue_training = False
                    if self.verbose >= 1:
                        print(f"Early stopping at step {epoch} due to reaching max kl: {approx_kl:.2f}")
                    break

                self.policy.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                self.policy.optimizer.step()

            self._n_updates += 1
            if not continue_training:
                break

        self.profile.update_s += time.process_time() - start_s
        buffer = self.rollout_buffer
        for name, values_logged in logs.items():
            if values_logged:
                self.logger.record(f"train/{name}", float(np.mean(values_logged)))
        self.logger.record("train/approx_kl", float(np.mean(approx_kls)))
        self.logger.record("train/loss", loss.item())
        self.logger.record(
            "train/explained_variance", explained_variance(buffer.values.ravel(), buffer.returns.ravel())
        )
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip_range)
        if clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", clip_range_vf)
        for name, value in self.profile.summary().items():
            self.logger.record(f"profile/{name}", value)

    def _take(self, flat: Tensor, batch: Tensor) -> Tensor:
        return flat.index_select(0, batch).to(self.device)

    def _log_probs(self, network: PointerNetwork, flat: dict[str, Tensor]) -> Tensor:
        """Log-probabilities (T * N, K) of the whole rollout under a frozen network."""
        positions = torch.arange(self.n_steps * self.n_envs).split(self.batch_size or 4096)
        with torch.no_grad():  # not inference_mode: the result takes part in a graph
            parts = [torch.log_softmax(logits_and_values_at(network, flat, p)[0], dim=1).cpu() for p in positions]
        return torch.cat(parts)
