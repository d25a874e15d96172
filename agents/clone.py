"""Behaviour cloning with DAgger (Ross, Gordon and Bagnell 2011): the student visits, the teacher labels.

A warm start for PPO from a rule, an exact solver or an oracle: cross-entropy on the masked logits, and a value head
fitted to the returns that were seen, so that PPO does not begin by unlearning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F

from .policy import OBSERVATION_KEYS, PointerPolicy, choose, logits_and_values_at, pointer_sizes

Teacher = Callable[[gym.vector.VectorEnv], np.ndarray]
"""Labels the env's current states: an action int (num_envs,), legal in each."""


@dataclass
class CloneResult:
    """What cloning reached."""

    agreement: float
    """Share of fresh states, visited by the student alone, in which its best row is the teacher's."""
    cross_entropy: float
    """Mean negative log-probability of the teacher's row in those states, nats."""
    labelled: int
    """States that the teacher labelled for training."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """One entry a round; `agreement` there is on the states of the round before training on them."""


class LabelledStates:
    """A ring of the latest labelled states, in arrays allocated once."""

    def __init__(self, capacity: int, observation_space: gym.Space) -> None:
        context_size, candidate_size = pointer_sizes(observation_space)
        assert isinstance(observation_space, gym.spaces.Dict)
        num_candidates = observation_space["action_mask"].shape[0]  # type: ignore[index]
        self.capacity, self.size, self._next = capacity, 0, 0
        self.store = {
            "context": torch.zeros(capacity, context_size),
            "candidates": torch.zeros(capacity, num_candidates, candidate_size),
            "action_mask": torch.zeros(capacity, num_candidates, dtype=torch.bool),
            "labels": torch.zeros(capacity, dtype=torch.int64),
            "returns": torch.zeros(capacity),
        }

    def reserve(self, count: int) -> torch.Tensor:
        """Positions of the `count` oldest entries, to be written now."""
        positions = (torch.arange(count) + self._next) % self.capacity
        self._next = (self._next + count) % self.capacity
        self.size = min(self.size + count, self.capacity)
        return positions


def linear_beta(progress: float) -> float:
    """Share of steps taken by the teacher: all at first, none from half of the run on."""
    return max(0.0, 1.0 - 2.0 * progress)


def student_alone(progress: float) -> float:
    """No step is taken by the teacher, whose states a student that goes on learning has seen."""
    return 0.0


def clone(
    policy: PointerPolicy,
    env: gym.vector.VectorEnv,
    teacher: Teacher,
    *,
    steps: int = 100_000,
    rounds: int = 10,
    beta: Callable[[float], float] = linear_beta,
    capacity: int = 50_000,
    passes: int = 2,
    lr: float = 1e-3,
    minibatch: int = 1024,
    gamma: float = 0.99,
    value_coef: float = 0.5,
    test_steps: int | None = None,
    seed: int = 0,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> CloneResult:
    """Train `policy` to choose as `teacher` does, on states that it will itself visit.

    Args:
        policy: trained in place.
        env: a pointer VectorEnv (SAME_STEP autoreset); it is reset with `seed`.
        teacher: labels the current states of `env`.
        steps: labelled states in all, over all environments.
        rounds: the run is cut into rounds: visit and label, then train on all that is held.
        beta: share of environments that follow the teacher, from progress in [0, 1]; the others sample the student.
        capacity: labelled states held; the oldest are dropped.
        passes: passes over the held states a round.
        lr: Adam's learning rate, falling linearly to a tenth.
        minibatch: states in one gradient step.
        gamma: discount of the returns that the value head is fitted to; 0.99 is PPO's default here.
        value_coef: weight of the value loss (as a share of the variance of the returns); 0 leaves the value head.
        test_steps: fresh states on which the result is measured (default: a tenth of `steps`).
        seed: of the environments, the mixture and the minibatches.
        progress: called after each round with its figures.

    Returns:
        CloneResult with the agreement on fresh states that the student visits alone.
    """
    num_envs = env.num_envs
    round_steps = max(1, steps // (rounds * num_envs))
    if round_steps * num_envs > capacity:
        raise ValueError(
            f"one round labels {round_steps * num_envs} states but capacity is {capacity}. Raise capacity or rounds"
        )
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    states = LabelledStates(capacity, env.single_observation_space)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, eps=1e-5, fused=True)
    obs, _ = env.reset(seed=seed)
    curve = []
    for index in range(rounds):
        done_share = index / max(rounds - 1, 1)
        teacher_share = beta(done_share)
        obs, visited = _visit(policy, env, teacher, obs, round_steps, teacher_share, gamma, rng, generator, states)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1.0 - 0.9 * done_share)
        losses = fit(policy, states, optimizer, passes, minibatch, value_coef, generator)
        curve.append({"round": index, "beta": teacher_share, "labelled": (index + 1) * round_steps * num_envs})
        curve[-1].update(visited | losses)
        if progress is not None:
            progress(curve[-1])

    test_rounds = max(1, (steps // 10 if test_steps is None else test_steps) // num_envs)
    fresh = LabelledStates(test_rounds * num_envs, env.single_observation_space)
    _, tested = _visit(policy, env, teacher, obs, test_rounds, 0.0, gamma, rng, generator, fresh)
    return CloneResult(tested["agreement"], tested["fresh_cross_entropy"], rounds * round_steps * num_envs, curve)


def _visit(
    policy: PointerPolicy,
    env: gym.vector.VectorEnv,
    teacher: Teacher,
    obs: dict[str, np.ndarray],
    num_steps: int,
    teacher_share: float,
    gamma: float,
    rng: np.random.Generator,
    generator: torch.Generator,
    states: LabelledStates,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Step with a mixture of teacher and student, store states, labels and returns; measure the student on the way."""
    num_envs = env.num_envs
    positions = states.reserve(num_steps * num_envs).view(num_steps, num_envs)
    rewards, ended = np.zeros((num_steps, num_envs), np.float32), np.zeros((num_steps, num_envs), bool)
    cut_values = np.zeros((num_steps, num_envs), np.float32)  # value of the last state of a truncated episode
    num_agreed, cross_entropy = 0, 0.0
    for step in range(num_steps):
        labels = torch.as_tensor(np.asarray(teacher(env), np.int64).copy())
        for key in OBSERVATION_KEYS:
            states.store[key][positions[step]] = torch.as_tensor(obs[key], dtype=states.store[key].dtype)
        states.store["labels"][positions[step]] = labels
        with torch.no_grad():
            logits, _ = logits_and_values_at(policy.network, states.store, positions[step])
            logits = logits.cpu()
            sampled, _ = choose(logits, generator=generator)
        num_agreed += int((logits.argmax(1) == labels).sum())
        cross_entropy += float(F.cross_entropy(logits, labels, reduction="sum"))
        follow = rng.random(num_envs) < teacher_share
        obs, reward, terminated, truncated, infos = env.step(np.where(follow, labels.numpy(), sampled.numpy()))
        rewards[step], ended[step] = reward, terminated | truncated
        cut = truncated & ~terminated
        if cut.any():
            cut_values[step][cut] = _values(policy, infos["final_obs"])[cut]
    returns = np.zeros((num_steps, num_envs), np.float32)
    running = _values(policy, obs)
    for step in reversed(range(num_steps)):
        running = rewards[step] + gamma * np.where(ended[step], cut_values[step], running)
        returns[step] = running
    states.store["returns"][positions.flatten()] = torch.from_numpy(returns.ravel())
    count = num_steps * num_envs
    return obs, {"agreement": num_agreed / count, "fresh_cross_entropy": cross_entropy / count}


def fit(
    policy: PointerPolicy,
    states: LabelledStates,
    optimizer: torch.optim.Optimizer,
    passes: int,
    minibatch: int,
    value_coef: float,
    generator: torch.Generator,
) -> dict[str, float]:
    """Cross-entropy and value regression over the held states; mean losses."""
    device = policy.device
    returns = states.store["returns"][: states.size]
    # Returns may be of any size: measured in their own variance they cannot drown the imitation.
    scale = value_coef / float(returns.var(correction=0).clamp(min=1e-6))
    totals, num_batches = np.zeros(2), 0
    for _ in range(passes):
        for batch in torch.randperm(states.size, generator=generator).split(minibatch):
            logits, values = logits_and_values_at(policy.network, states.store, batch)
            imitation = F.cross_entropy(logits, states.store["labels"][batch].to(device))
            value_loss = F.mse_loss(values, returns[batch].to(device))
            optimizer.zero_grad()
            (imitation + scale * value_loss).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            totals += imitation.item(), value_loss.item()
            num_batches += 1
    imitation_mean, value_mean = (float(total) for total in totals / num_batches)
    return {"cross_entropy": imitation_mean, "value_loss": value_mean}


def _values(policy: PointerPolicy, obs: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return policy.predict_values(policy.obs_to_tensor(obs)[0]).squeeze(1).cpu().numpy()
