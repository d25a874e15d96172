"""Policy gradient with the mean of a group as baseline: many sampled runs of one instance under the same noise.

What a run does better than the others of its group is its advantage, for all of its decisions (Kool, van Hoof and
Welling: Buy 4 REINFORCE samples, get a baseline for free, 2019; GRPO, arXiv 2402.03300). Where noise decides most of a
return, the best of a group is the luckiest one and should not be imitated (`self_label`), and a learned value knows too
little to be a baseline; but runs that share their noise differ by decisions alone.

What is played is the domain's: it gives a `Player`. Elsewhere the policy stays as it is: a KL term on states that are
not played.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .networks import PointerNetwork
from .policy import PointerPolicy, logits_and_values_at

Player = Callable[[PointerNetwork, int], tuple[dict[str, Tensor], dict[str, float]]]
"""player(network, round): states of sampled runs ("context", "candidates", "action_mask", "actions", and "advantages"
float32), and figures about them. The same round plays the same instances."""

LARGEST_ADVANTAGE = 4.0
"""In standard deviations; longer tails are cut."""


def group_gradient(
    policy: PointerPolicy,
    player: Player,
    kept: dict[str, Tensor],
    reference: PointerNetwork,
    *,
    rounds: int,
    first_round: int = 0,
    lr: float = 3e-4,
    kl_coef: float = 1.0,
    minibatch: int = 2048,
    max_grad_norm: float = 0.5,
    seed: int = 0,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> None:
    """Train `policy` in place on runs that it plays itself.

    Args:
        policy: plays, and learns from the runs that did better than the others of their group.
        player: see `Player`.
        kept: states in which the policy is to choose as `reference` does ("context", "candidates", "action_mask").
        reference: the policy at the start.
        rounds: each plays, and passes once over what was played.
        first_round: where a run that was interrupted goes on.
        lr: Adam's learning rate.
        kl_coef: weight of KL(reference || policy) in the kept states.
        minibatch: played states in one gradient step; a quarter as many of the kept ones go with them.
        max_grad_norm: gradients are cut to it.
        seed: of the minibatches.
        progress: called after each round with its figures.
    """
    network = policy.network
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, eps=1e-5, fused=True)
    with torch.no_grad():
        everywhere = torch.arange(len(kept["context"])).split(minibatch)
        wanted = torch.cat([log_probabilities(reference, kept, rows) for rows in everywhere])
    for index in range(first_round, rounds):
        played, figures = player(network, index)
        advantages = played["advantages"] / played["advantages"].std().clamp_min(1e-8)
        advantages = advantages.clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)
        generator = torch.Generator().manual_seed(seed + index)
        divergence, steps = 0.0, 0
        for batch in torch.randperm(len(advantages), generator=generator).split(minibatch):
            optimizer.zero_grad()
            chosen = log_probabilities(network, played, batch).gather(1, played["actions"][batch, None])[:, 0]
            (-advantages[batch] * chosen).mean().backward()
            rows = torch.randint(len(wanted), (minibatch // 4,), generator=generator)
            kl = F.kl_div(log_probabilities(network, kept, rows), wanted[rows], reduction="batchmean", log_target=True)
            (kl_coef * kl).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
            optimizer.step()
            divergence, steps = divergence + float(kl.detach()), steps + 1
        if progress is not None:
            progress({"group_round": index, "states": len(advantages), "kl_kept": divergence / steps} | figures)


def log_probabilities(network: PointerNetwork, states: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Of every candidate in some of the states, float32 (B, K)."""
    logits, _ = logits_and_values_at(network, states, rows)
    return F.log_softmax(logits, 1)
