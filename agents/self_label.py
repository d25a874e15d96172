"""Self-labelling (Corsini et al., NeurIPS 2024): sample many solutions, imitate the best, again and again.

What is sampled, and what counts as best, is the domain's: it gives a `Labeller`. The rest is imitation, as in
`clone.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .clone import LabelledStates, fit
from .networks import PointerNetwork
from .policy import PointerPolicy, logits_and_values_at

Labeller = Callable[[PointerNetwork, int], tuple[dict[str, Tensor], dict[str, float]]]
"""labeller(network, round): states worth imitating, found with the network as it is (tensors named as in
`clone.LabelledStates.store`), and figures about them. The same round draws the same instances."""


def self_label(
    policy: PointerPolicy,
    labeller: Labeller,
    states: LabelledStates,
    *,
    rounds: int,
    first_round: int = 0,
    passes: int = 2,
    lr: float = 2e-3,
    minibatch: int = 512,
    value_coef: float = 0.1,
    seed: int = 0,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> None:
    """Train `policy` in place on what `labeller` finds.

    Args:
        policy: samples the solutions, and learns from the best of them.
        labeller: see `Labeller`.
        states: a ring of the latest labelled states; how many rounds it holds is for its capacity to say.
        rounds: each labels, and passes over all that is held.
        first_round: where a run that was interrupted goes on.
        passes: passes over the held states a round.
        lr: Adam's learning rate, falling linearly to a twentieth.
        minibatch: states in one gradient step.
        value_coef: weight of the value loss, as in `clone`.
        seed: of the minibatches.
        progress: called after each round with its figures; `agreement` there is on the new states, before training.
    """
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, eps=1e-5, fused=True)
    for index in range(first_round, rounds):
        fresh, figures = labeller(policy.network, index)
        count = len(fresh["labels"])
        positions = states.reserve(count)
        for name, tensor in fresh.items():
            states.store[name][positions] = tensor
        agreed = 0
        with torch.no_grad():
            for batch in positions.split(4096):
                logits, _ = logits_and_values_at(policy.network, states.store, batch)
                agreed += int((logits.argmax(1).cpu() == states.store["labels"][batch]).sum())
        for group in optimizer.param_groups:
            group["lr"] = lr * (1.0 - 0.95 * index / max(rounds - 1, 1))
        generator = torch.Generator().manual_seed(seed + index)
        losses = fit(policy, states, optimizer, passes, minibatch, value_coef, generator)
        if progress is not None:
            progress({"label_round": index, "states": count, "agreement": agreed / count} | figures | losses)
