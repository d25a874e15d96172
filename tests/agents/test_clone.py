"""Cloning reaches the teacher, and fits the values of what it saw."""

import numpy as np
import pytest
import torch
from toy import ToyPointerEnv, teacher

from schedlab.agents.clone import clone, linear_beta
from schedlab.agents.policy import PointerPolicy


def student(env, **kwargs):
    torch.manual_seed(0)
    return PointerPolicy(env.single_observation_space, env.single_action_space, lambda _: 1e-3, **kwargs)


def test_student_agrees_with_the_teacher():
    env = ToyPointerEnv(32)
    policy = student(env, hidden=32)
    seen = []
    result = clone(
        policy, env, teacher, steps=20_000, rounds=8, passes=3, lr=3e-3, minibatch=256, gamma=0.5, progress=seen.append
    )
    assert result.agreement > 0.9
    assert result.labelled == 8 * (20_000 // (8 * 32)) * 32
    assert [row["beta"] for row in seen] == [linear_beta(i / 7) for i in range(8)]
    assert seen[-1]["agreement"] > seen[0]["agreement"] + 0.3
    # a good student gets about 1 a step, hence 1 / (1 - gamma) = 2 with truncations at the tenth step bootstrapped
    obs, _ = env.reset(seed=5)
    with torch.no_grad():
        values = policy.predict_values(policy.obs_to_tensor(obs)[0])
    assert values.mean().item() == pytest.approx(1.95, abs=0.2)


def test_same_seed_same_student():
    def run():
        env = ToyPointerEnv(8)
        policy = student(env, hidden=8)
        clone(policy, env, teacher, steps=512, rounds=2, seed=4)
        return torch.cat([p.flatten() for p in policy.parameters()])

    torch.testing.assert_close(run(), run(), rtol=0, atol=0)


def test_ring_holds_the_latest():
    env = ToyPointerEnv(8)
    result = clone(student(env, hidden=8), env, teacher, steps=1600, rounds=10, capacity=200)
    assert np.isfinite(result.cross_entropy)
    with pytest.raises(ValueError, match="capacity is 100"):
        clone(student(env, hidden=8), env, teacher, steps=1600, rounds=10, capacity=100)


def test_value_head_can_be_left_alone():
    env = ToyPointerEnv(8)
    policy = student(env, hidden=8)
    before = policy.network.value.weight.clone()
    clone(policy, env, teacher, steps=512, rounds=2, value_coef=0.0)
    torch.testing.assert_close(policy.network.value.weight, before)
