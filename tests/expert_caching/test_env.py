"""`schedlab/ExpertCaching-v0`: the pointer problem over the simulated cache. Gymnasium's checks run for every id in
`tests/request_scheduling/test_env.py`."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from routing import ODD_COST

import schedlab.envs  # noqa: F401
from schedlab.baselines.expert_caching import RULES, belady, belady_loads
from schedlab.envs.core.errors import InputError
from schedlab.envs.expert_caching.env import ExpertCachingEnv, ExpertCachingVectorEnv, Task
from schedlab.envs.expert_caching.sim import Simulator
from schedlab.envs.expert_caching.spec import ExpertCachingSpec
from schedlab.envs.expert_caching.workload import generate

WORKLOAD = generate(6, num_layers=3, num_experts=12, top_k=2, mean_length=12, seed=4)
EVICTION = ExpertCachingSpec(cache_share=0.34, eviction_only=True, history_tokens=1, num_candidates=6)
CASES = {
    "eviction": EVICTION,
    "bypass": EVICTION.replace(bypass=True),
    "prefetch": ExpertCachingSpec(cost=ODD_COST, cache_share=0.34, max_prefetch=2, history_tokens=1, num_candidates=8),
    "pooled": ExpertCachingSpec(
        cost=ODD_COST,
        cache_share=0.34,
        pooled=True,
        max_prefetch=2,
        prefetch_depth=2,
        history_tokens=1,
        num_candidates=13,
    ),
    "batch": ExpertCachingSpec(
        cost=ODD_COST, cache_share=0.5, num_sequences=3, max_prefetch=1, history_tokens=1, num_candidates=16
    ),
}


def vector_env(name: str, num_envs: int = 1, **changes) -> ExpertCachingVectorEnv:
    return ExpertCachingVectorEnv(num_envs, spec=CASES[name], workload=WORKLOAD, debug=True, **changes)


def legal_play(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.where(mask, rng.random(mask.shape), -1).argmax(1)


@pytest.mark.parametrize("name", CASES)
def test_random_legal_play_finishes_every_episode(name):
    """Masks are never empty, rewards sum to minus the stall (or loads), and rows beyond the live ones are zero."""
    env, rng = vector_env(name), np.random.default_rng(0)
    obs, info = env.reset(seed=0)
    for _ in range(2):
        total, done = 0.0, False
        episode = env.episode()
        while not done:
            assert env.observation_space.contains(obs)
            assert info["action_mask"].any()
            live = int(env.batch.table_head["num_rows"][0, 0])
            assert (obs["candidates"][0, live:] == 0).all()
            assert np.abs(obs["context"]).max() <= 2
            assert np.abs(obs["candidates"]).max() <= 2
            before = env.state().engine[0].copy()
            loss = float(env.batch.loss[0])
            obs, reward, terminated, _, info = env.step(legal_play(info["action_mask"], rng))
            total += float(reward[0])
            done = bool(terminated[0])
        first_loads = 0.0  # what was lost before the first decision is nobody's
        assert before["num_illegal"] == 0
        assert total <= 0
        assert loss >= -total * env.batch.unit[0] * 0.5 - first_loads
        assert episode.num_tokens == WORKLOAD.num_tokens
    assert env.num_illegal_actions == 0


def test_rewards_sum_to_the_loads():
    env, rng = vector_env("eviction"), np.random.default_rng(1)
    _, info = env.reset(seed=0)
    first = float(env.batch.loss[0])
    total, loads, done = 0.0, 0, False
    while not done:
        loads = int(env.state().engine[0]["num_demand_loads"]) + int(env.state().engine[0]["num_missing"])
        _, reward, terminated, _, info = env.step(legal_play(info["action_mask"], rng))
        total, done = total + float(reward[0]), bool(terminated[0])
    assert -total + first >= loads  # the loads of the last decision, and of epochs without one after it
    assert -total + first <= loads + 2 * 3


@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_its_envs(name):
    """Env i of a batch seeded with s is env 0 of a batch seeded with s + i, episode after episode."""
    batch = vector_env(name, 3, episode_tokens=9)
    singles = [vector_env(name, episode_tokens=9) for _ in range(3)]
    obs, info = batch.reset(seed=7)
    for i, env in enumerate(singles):
        env.reset(seed=7 + i)
    rng = np.random.default_rng(0)
    for _ in range(120):
        actions = legal_play(info["action_mask"], rng)
        obs, reward, terminated, _, info = batch.step(actions)
        for i, env in enumerate(singles):
            one, r, t, _, _ = env.step(actions[i : i + 1])
            assert (r[0], t[0]) == (reward[i], terminated[i])
            for key, value in one.items():
                assert np.array_equal(value[0], obs[key][i]), key


@pytest.mark.parametrize("name", CASES)
def test_following_a_rule_is_running_it(name):
    """A teacher's actions lead to the same slots and times as the rule run compiled in the simulator."""
    env, spec = vector_env(name), CASES[name]
    rule = RULES["ema_95"]
    env.reset(seed=0)
    done = False
    while not done:
        final = env.state().engine[0].copy()
        _, _, terminated, _, _ = env.step(env.rule_actions([rule]))
        done = bool(terminated[0])
    simulator = Simulator(spec)
    simulator.reset(WORKLOAD)
    while simulator.state().engine[0]["epoch"] < final["epoch"]:  # the env's last decision epoch
        decision = simulator.default_decision()
        rule.reset(simulator.state())
        rule.decide(simulator.state(), decision)
        simulator.step(decision)
    engine = simulator.state().engine[0]
    for field in ("now_s", "num_hits", "num_demand_loads", "layer", "num_missing"):
        assert engine[field] == final[field], field


def test_the_teacher_may_be_an_oracle():
    env = vector_env("eviction", episode_tokens=40)
    env.reset(seed=3)
    for _ in range(2):
        episode = env.episode()
        rule, done = belady(episode, EVICTION), False
        while not done:
            loads = env.state().engine[0]["num_demand_loads"] + env.state().engine[0]["num_missing"]
            _, _, terminated, _, _ = env.step(env.rule_actions([rule]))
            done = bool(terminated[0])
        fewest = belady_loads(episode, EVICTION.slots_of(3, 12, 2)).sum()
        assert fewest - 6 <= loads <= fewest  # epochs after the last decision load no more than free slots take


def test_tasks_of_one_env_share_shapes():
    other = generate(3, num_layers=2, num_experts=12, top_k=2)
    with pytest.raises(InputError, match="tasks differ in"):
        ExpertCachingVectorEnv(tasks=[Task(EVICTION, WORKLOAD), Task(EVICTION, other)])
    with pytest.raises(InputError, match="no task"):
        ExpertCachingVectorEnv(tasks=[])
    tasks = [Task(EVICTION.replace(cache_share=share, warm_start=True), WORKLOAD) for share in (0.25, 0.5)]
    env = ExpertCachingVectorEnv(4, tasks=tasks, episode_tokens=8)
    env.reset(seed=0)
    seen, rng = set(), np.random.default_rng(0)
    for _ in range(300):
        seen |= set(env.task_index.tolist())
        for n, task in enumerate(env.task_index):
            held = env.state(n).slots["expert"][: int(env.state(n).engine[0]["num_slots"])]
            assert (held >= 0).all()  # warm
            assert len(held) == (9, 18)[task]
        env.step(legal_play(env.action_mask, rng))
    assert seen == {0, 1}


def test_an_env_without_decisions_is_refused():
    env = ExpertCachingVectorEnv(spec=EVICTION.replace(cache_share=1.0), workload=WORKLOAD)
    with pytest.raises(InputError, match="nothing to decide"):
        env.reset(seed=0)


def test_the_single_env_and_its_picture():
    env = ExpertCachingEnv(spec=CASES["prefetch"], workload=WORKLOAD, render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 4


@pytest.mark.parametrize("name", ["eviction", "prefetch", "pooled"])
def test_the_graph_tells_what_the_rows_tell(name):
    """A row's node has the row's columns; edges leave needed experts, for those that follow them most often."""
    env, rng = vector_env(name, 2, graph=True, episode_tokens=20), np.random.default_rng(0)
    obs, info = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    for _ in range(150):
        for n in range(2):
            engine, live = env.state(n).engine[0], env.batch.table_head["num_rows"][n, 0]
            inside = np.flatnonzero(obs["candidate_node"][n] >= 0)
            assert ((inside > 0) & (inside < live)).all()
            assert len(inside) == live - 1 or name == "pooled"
            assert np.array_equal(obs["nodes"][n][obs["candidate_node"][n][inside]], obs["candidates"][n][inside])
            needed = env.state(n).needed[: engine["num_needed"]]
            source, target = obs["edges"][n][:, obs["edge_mask"][n]]
            assert set(source.tolist()) == set(needed.tolist())
            for kind, table in enumerate((env.affinity.same_layer, env.affinity.next_layer)):
                for e in needed:
                    ends = target[(source == e) & (obs["edge_type"][n][obs["edge_mask"][n]] == kind)] % 12
                    if kind == 0 or name != "eviction":
                        assert set(ends.tolist()) == set(np.argsort(-table[engine["layer"], e], kind="stable")[:4])
        obs, _, _, _, info = env.step(legal_play(info["action_mask"], rng))
    assert env.observation_space.contains(obs)


def test_the_id_is_registered():
    env = gym.make("schedlab/ExpertCaching-v0")
    obs, info = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    obs, *_ = env.step(int(info["action_mask"].argmax()))
    assert env.observation_space.contains(obs)
