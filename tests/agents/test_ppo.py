"""FastMaskablePPO is MaskablePPO."""

import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure

from schedlab.agents.policy import PointerPolicy
from schedlab.agents.ppo import FastMaskablePPO, PointerRolloutBuffer
from schedlab.envs.core.sb3 import SB3VecEnv

COMMON = {"n_steps": 24, "batch_size": 64, "n_epochs": 3, "ent_coef": 0.01, "seed": 3, "device": "cpu"}


def one_update(algorithm, env, **kwargs):
    model = algorithm(PointerPolicy, SB3VecEnv(env), **{**COMMON, "learning_rate": 1e-3, **kwargs})
    model.set_logger(configure(None, []))
    records = []
    dump = model.logger.dump
    model.logger.dump = lambda step=0: (records.append(dict(model.logger.name_to_value)), dump(step))
    model.learn(24 * env.num_envs * 2)
    records.append(dict(model.logger.name_to_value))
    return model, records


@pytest.mark.parametrize("encoder", ["deepsets", "attention"])
@pytest.mark.parametrize(
    "options", [{}, {"clip_range_vf": 0.1, "target_kl": 1e-5}, {"batch_size": None, "normalize_advantage": False}]
)
def test_equals_maskable_ppo(make_env, encoder, options):
    kwargs = {**options, "policy_kwargs": {"encoder": encoder, "hidden": 16}}
    slow, slow_logs = one_update(MaskablePPO, make_env(seed=5), **kwargs)
    fast, fast_logs = one_update(FastMaskablePPO, make_env(seed=5), **kwargs)

    steps, envs = slow.n_steps, slow.n_envs
    for name in ("actions", "values", "log_probs", "advantages", "returns"):
        by_env = getattr(slow.rollout_buffer, name).reshape(envs, steps).T
        np.testing.assert_allclose(fast.rollout_buffer.arrays[name], by_env, rtol=1e-4, atol=1e-5, err_msg=name)
    assert "train/approx_kl" in slow_logs[1]
    for slow_log, fast_log in zip(slow_logs, fast_logs, strict=True):
        for name in ("entropy_loss", "policy_gradient_loss", "value_loss", "approx_kl", "clip_fraction", "loss"):
            if f"train/{name}" in slow_log:
                np.testing.assert_allclose(
                    fast_log[f"train/{name}"], slow_log[f"train/{name}"], rtol=1e-4, atol=1e-6, err_msg=name
                )
    for (name, a), b in zip(slow.policy.named_parameters(), fast.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert slow._n_updates == fast._n_updates == (2 if "target_kl" in options else 6)  # stopped early, or not
    assert [e["r"] for e in slow.ep_info_buffer] == pytest.approx([e["r"] for e in fast.ep_info_buffer])


def test_gae_by_hand():
    from gymnasium import spaces

    space = spaces.Dict(
        context=spaces.Box(-1, 1, (1,)), candidates=spaces.Box(-1, 1, (2, 1)), action_mask=spaces.MultiBinary(2)
    )
    buffer = PointerRolloutBuffer(3, space, spaces.Discrete(2), gamma=0.5, gae_lambda=0.5, n_envs=1)
    buffer.arrays["rewards"][:, 0] = [1.0, 2.0, 4.0]
    buffer.arrays["values"][:, 0] = [0.0, 1.0, 2.0]
    buffer.arrays["episode_starts"][:, 0] = [1.0, 0.0, 1.0]  # the second step ended an episode
    buffer.compute_returns_and_advantage(np.array([8.0], np.float32), np.array([False]))
    # step 2: 4 + .5*8 - 2 = 6;  step 1 (last of its episode): 2 - 1 = 1;  step 0: 1 + .5*1 - 0 + .25*1 = 1.75
    np.testing.assert_allclose(buffer.arrays["advantages"][:, 0], [1.75, 1.0, 6.0])
    np.testing.assert_allclose(buffer.returns[:, 0], [1.75, 2.0, 8.0])


def test_learns_the_toy(make_env):
    model = FastMaskablePPO(
        PointerPolicy, SB3VecEnv(make_env(32)), learning_rate=1e-3, n_steps=32, batch_size=256, gamma=0.0, seed=0
    )
    before = evaluate_policy(model, SB3VecEnv(make_env(16, seed=99)), 64)[0]
    model.learn(60_000)
    after = evaluate_policy(model, SB3VecEnv(make_env(16, seed=99)), 64)[0]
    assert before < 8.0
    assert after > 9.6
    shares = model.profile.summary()
    assert shares["decisions_per_s"] > 0
    assert shares["env"] + shares["forward"] + shares["update"] + shares["other"] == pytest.approx(1.0)


def test_kl_to_reference_holds_the_policy_back(make_env):
    def drift(kl_coef):
        model = FastMaskablePPO(PointerPolicy, SB3VecEnv(make_env(32)), learning_rate=3e-3, gamma=0.0, seed=0)
        model.set_reference(model.policy, kl_coef)
        obs = model.env.reset()
        start = model.policy.get_distribution(model.policy.obs_to_tensor(obs)[0]).distribution.logits.detach()
        model.learn(8192)
        end = model.policy.get_distribution(model.policy.obs_to_tensor(obs)[0]).distribution.logits.detach()
        return (end.exp() * (end - start)).nansum(1).mean().item()

    assert 0.0 <= drift(100.0) < 0.1 * drift(0.0)


def test_reference_without_coefficient_is_refused(make_env):
    with pytest.raises(ValueError, match="no reference"):
        FastMaskablePPO(PointerPolicy, SB3VecEnv(make_env()), kl_coef=0.1)


def test_callback_stops_training(make_env):
    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 5

    model = FastMaskablePPO(PointerPolicy, SB3VecEnv(make_env()), n_steps=16)
    model.learn(10_000, callback=Stop())
    assert model.num_timesteps == 5 * 8


def test_other_wrappers_are_refused(make_env):
    from stable_baselines3.common.vec_env import VecMonitor

    model = FastMaskablePPO(PointerPolicy, VecMonitor(SB3VecEnv(make_env())), n_steps=16)
    with pytest.raises(ValueError, match="SB3VecEnv"):
        model.learn(100)


def test_sb3_can_save_and_load_it(make_env, tmp_path):
    model = FastMaskablePPO(PointerPolicy, SB3VecEnv(make_env()), n_steps=16, policy_kwargs={"hidden": 8}, seed=0)
    model.set_reference(model.policy, 0.1)
    model.learn(128)
    model.save(tmp_path / "model")
    loaded = FastMaskablePPO.load(tmp_path / "model", SB3VecEnv(make_env()), device="cpu")
    obs = loaded.env.reset()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    loaded.learn(128, reset_num_timesteps=False)
    assert loaded.num_timesteps == 256


def test_predicts_for_any_number_of_candidates(make_env):
    model = FastMaskablePPO(PointerPolicy, SB3VecEnv(make_env(num_candidates=6)), n_steps=16)
    env = make_env(num_candidates=30)
    actions, _ = model.predict(env.reset(seed=1)[0], deterministic=True)
    assert env.action_masks()[np.arange(8), actions].all()
    single = {key: value[0] for key, value in env.obs.items()}
    assert model.predict(single, deterministic=True)[0] == actions[0]
