"""`PointerPolicy`: the pointer network as a policy of sb3-contrib's MaskablePPO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import MaskableCategorical, MaskableCategoricalDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from .fused import Rows
from .networks import MASKED_LOGIT, PointerNetwork

OBSERVATION_KEYS = ("context", "candidates", "action_mask")


def pointer_sizes(observation_space: spaces.Space) -> tuple[int, int]:
    """(C, F) of an env's observation space. Raises ValueError if it is no pointer problem."""
    if not isinstance(observation_space, spaces.Dict) or any(
        k not in observation_space.spaces for k in OBSERVATION_KEYS
    ):
        raise ValueError(
            f"observation space {observation_space} is no pointer problem: expected a Dict with {OBSERVATION_KEYS}. "
            "Use an env of schedlab.envs, or give yours these keys"
        )
    context, candidates = observation_space["context"].shape, observation_space["candidates"].shape
    assert context is not None and candidates is not None
    return context[0], candidates[1]


class PointerPolicy(MaskableActorCriticPolicy):
    """Actor and critic over a pointer network: `MaskablePPO(PointerPolicy, env, policy_kwargs={"hidden": 64})`.

    The observation's own `action_mask` always holds; `action_masks`, where given, narrows it further. Distributions
    are built without argument validation, which costs more than the sampling. Any number of candidates is accepted.

    Args:
        encoder: "deepsets" or "attention".
        hidden: width of the layers.
        clip: logits lie in [-clip, clip].
        late_context: columns of the context that the rows do not see (`networks.DeepSetsEncoder`).
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        encoder: str = "deepsets",
        hidden: int = 64,
        clip: float = 10.0,
        late_context: Sequence[int] = (),
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        context_size, candidate_size = pointer_sizes(observation_space)
        self.network_config: dict[str, Any] = {
            "encoder": encoder,
            "hidden": hidden,
            "clip": clip,
            "late_context": tuple(late_context),
        }
        self._network_sizes = (context_size, candidate_size)
        if optimizer_kwargs is None:
            # eps as in SB3; one fused pass instead of a dozen small operations for each of the small tensors.
            optimizer_kwargs = {"eps": 1e-5, "fused": True} if optimizer_class is torch.optim.Adam else {}
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            ortho_init=False,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        self.network = PointerNetwork(*self._network_sizes, **self.network_config)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
            **self.network_config,
        }

    def logits_and_values(
        self, obs: Mapping[str, Tensor], action_masks: Tensor | np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits float32 (B, K), `MASKED_LOGIT` where the mask is False, and values float32 (B,)."""
        mask = obs["action_mask"].bool()
        if self.network.takes_rows:
            rows = Rows.gather(obs["candidates"].float(), mask)
            logits, values = self.network.forward_rows(obs["context"].float(), rows, mask.shape[1])
        else:
            logits, values = self.network(obs["context"].float(), obs["candidates"].float(), mask)
        if action_masks is not None:
            allowed = torch.as_tensor(action_masks, dtype=torch.bool, device=logits.device).reshape(logits.shape)
            logits = torch.where(allowed, logits, MASKED_LOGIT)
        return logits, values

    def forward(
        self,
        obs: Mapping[str, Tensor],
        deterministic: bool = False,
        action_masks: Tensor | np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Actions int64 (B,), values (B, 1) and log-probabilities (B,)."""
        logits, values = self.logits_and_values(obs, action_masks)
        actions, log_prob = choose(logits, deterministic)
        return actions, values.unsqueeze(-1), log_prob

    def evaluate_actions(
        self, obs: Mapping[str, Tensor], actions: Tensor, action_masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values (B, 1), log-probabilities (B,) of `actions` and entropies (B,)."""
        logits, values = self.logits_and_values(obs, action_masks)
        log_probs = torch.log_softmax(logits, dim=1)
        log_prob = log_probs.gather(1, actions.unsqueeze(1)).squeeze(1)
        return values.unsqueeze(-1), log_prob, entropy(logits, log_probs)

    def get_distribution(
        self, obs: Mapping[str, Tensor], action_masks: Tensor | np.ndarray | None = None
    ) -> MaskableCategoricalDistribution:
        logits, _ = self.logits_and_values(obs, action_masks)
        distribution = MaskableCategoricalDistribution(logits.shape[1])
        distribution.distribution = MaskableCategorical(
            logits=logits, validate_args=False, masks=logits > 0.5 * MASKED_LOGIT
        )
        return distribution

    def predict_values(self, obs: Mapping[str, Tensor]) -> Tensor:
        return self.logits_and_values(obs)[1].unsqueeze(-1)

    def _predict(
        self,
        observation: Mapping[str, Tensor],
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> Tensor:
        return choose(self.logits_and_values(observation, action_masks)[0], deterministic)[0]

    def obs_to_tensor(self, observation: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], bool]:
        """As in SB3, but for any number of candidates and without copying what is not used."""
        is_batched = np.ndim(observation["context"]) == 2
        tensors = {key: torch.as_tensor(observation[key], device=self.device) for key in OBSERVATION_KEYS}
        return (tensors if is_batched else {k: t.unsqueeze(0) for k, t in tensors.items()}), is_batched


def logits_and_values_at(
    network: PointerNetwork, store: Mapping[str, Tensor], positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and values (B,) of the observations at `positions` int64 (B,) of a store on the CPU.

    The store holds `context` (M, C), `candidates` (M, K, F) and `action_mask` (M, K); only live rows are gathered if
    the network can do with them.
    """
    device = network.value.weight.device
    mask, context = store["action_mask"].index_select(0, positions), store["context"].index_select(0, positions)
    num_candidates = mask.shape[1]
    if not network.takes_rows:
        candidates = store["candidates"].index_select(0, positions)
        return network(context.to(device), candidates.to(device), mask.to(device))
    slots = mask.flatten().nonzero().flatten()
    where = positions.index_select(0, slots // num_candidates) * num_candidates + slots % num_candidates
    rows = Rows.at(store["candidates"].flatten(0, 1), where, slots, mask)
    return network.forward_rows(context, rows, num_candidates)


def choose(
    logits: Tensor, deterministic: bool = False, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Actions int64 (B,) and their log-probabilities (B,): sampled, or the first of the best."""
    log_probs = torch.log_softmax(logits, dim=1)
    if deterministic:
        actions = logits.argmax(1)
    else:
        actions = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=generator).squeeze(1)
    return actions, log_probs.gather(1, actions.unsqueeze(1)).squeeze(1)


def entropy(logits: Tensor, log_probs: Tensor) -> Tensor:
    """Entropy (B,) of masked logits and their log-probabilities (B, K); masked rows have probability exactly 0.

    `log_probs.exp()` would do, but is six times slower: torch's exp takes a slow path where the result underflows.
    """
    return -(torch.softmax(logits, dim=1) * log_probs).sum(1)
