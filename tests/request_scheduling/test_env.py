"""`schedlab/RequestScheduling-v0`: the pointer problem over the simulated engine."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from miniatures import ONE_SECOND, assert_same_run, serve, tiny_spec, tiny_workload
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import schedlab.envs  # noqa: F401
from schedlab.agents.compiled import pack_weights
from schedlab.agents.networks import PointerNetwork
from schedlab.agents.request_scheduling import CompiledPolicy, TablePolicy
from schedlab.baselines.request_scheduling import RULES
from schedlab.envs.core.errors import InputError
from schedlab.envs.core.sb3 import SB3VecEnv
from schedlab.envs.request_scheduling.env import RequestSchedulingEnv, RequestSchedulingVectorEnv, Task
from schedlab.envs.request_scheduling.generate import generate
from schedlab.envs.request_scheduling.metrics import compute_metrics
from schedlab.envs.request_scheduling.sim import Simulator
from schedlab.envs.request_scheduling.spec import TWO_CLASSES, EngineSpec, RequestSchedulingSpec
from schedlab.envs.request_scheduling.state import MEMORY, WAITING, State, empty_state, note_arrival
from schedlab.envs.request_scheduling.table import (
    CANDIDATE_FEATURES,
    CONTEXT_FEATURES,
    NUM_CANDIDATE,
    NUM_CONTEXT,
    OVERDUE_EVERY,
    PICKED_CONTEXT,
    Problem,
    Table,
    write_observation,
)

IDS = sorted(i for i in gym.registry if i.startswith("schedlab/"))
CONVERSATION = generate("azure_conv", 300, seed=0).at_rate(6.0)
SPEC = RequestSchedulingSpec(EngineSpec(kv_blocks=1500), slo_classes=TWO_CLASSES, objective="slo_goodput")
TIGHT = RequestSchedulingSpec(EngineSpec(kv_blocks=700), num_candidates=20)


def bursts(spec: RequestSchedulingSpec = TIGHT, seed: int = 0) -> Task:
    """Requests in bursts, more of them than the table has rows, and too little memory for them."""
    rng = np.random.default_rng(seed)
    workload = generate("azure_conv", 90, seed=seed)
    arrivals = np.sort(rng.integers(0, 4, 90) * 20.0)
    return Task(
        spec,
        type(workload).from_arrays(
            "bursts",
            arrivals - arrivals[0],
            np.minimum(workload.prompt_tokens, 3000),
            np.minimum(workload.output_tokens, 300),
            slo_class=np.zeros(90, int) if len(spec.slo_classes) == 1 else rng.integers(0, 2, 90),
        ),
    )


def shared_prefixes() -> Task:
    rng = np.random.default_rng(3)
    prefixes = ["".join(rng.choice(list("ab"), rng.integers(0, 6))) for _ in range(60)]
    prompts = [16 * len(p) + int(rng.integers(1, 60)) for p in prefixes]
    workload = tiny_workload(
        np.sort(rng.uniform(0, 3, 60)), prompts, rng.integers(1, 80, 60), prefixes=prefixes, block_tokens=16
    )
    engine = EngineSpec(kv_blocks=40, max_batch_tokens=256, max_running=32, prefix_cache=True)
    return Task(RequestSchedulingSpec(engine, prefill_choices=(0, 32, 64, 256), num_candidates=16), workload)


def squeeze() -> Task:
    """Six requests grow by a block at the same time, again and again, and there are seven: three victims at once."""
    return Task(
        tiny_spec(kv_blocks=7, max_batch_tokens=32, max_running=6, num_candidates=16),
        tiny_workload([0] * 8, [4] * 8, [12] * 8),
    )


CASES = {
    "squeeze": squeeze,
    "conversation": lambda: Task(SPEC, CONVERSATION.window(0, 80).with_classes(TWO_CLASSES)),
    "bursts": bursts,
    "prefixes": shared_prefixes,
    "tiny": lambda: Task(tiny_spec(kv_blocks=6), tiny_workload([0, 0, 1, 2, 9], [4, 9, 3, 12, 5], [5, 3, 9, 1, 7])),
}


def legal_play(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random legal row for each env."""
    return np.where(mask, rng.random(mask.shape), -1).argmax(1)


def state_of(env: RequestSchedulingVectorEnv, e: int = 0) -> State:
    b = env.batch
    return State(b.engine[e], b.requests[e], b.waiting[e], b.running[e])


def table_of(env: RequestSchedulingVectorEnv, e: int = 0) -> Table:
    return Table(*(getattr(env.batch, f"table_{name}")[e] for name in Table._fields))


# ------------------------------------------------------------------------------------------- gymnasium and its ids


@pytest.mark.filterwarnings("ignore:.*A Box observation space")  # features are scaled, but not cut off
@pytest.mark.parametrize("name", IDS)
def test_gymnasium_accepts_the_env(name):
    check_env(gym.make(name).unwrapped)


@pytest.mark.filterwarnings("ignore")  # it would rather have images or normalised actions
@pytest.mark.parametrize("name", IDS)
def test_sb3_accepts_the_env(name):
    sb3_check_env(gym.make(name))


@pytest.mark.parametrize("name", IDS)
def test_vector_entry_point(name):
    env = gym.make_vec(name, num_envs=8, vectorization_mode="vector_entry_point")
    obs, info = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert obs["candidates"].shape[0] == env.num_envs == 8
    obs, reward, terminated, truncated, info = env.step(info["action_mask"].argmax(1))
    assert reward.shape == terminated.shape == truncated.shape == (8,)
    env.close()


@pytest.mark.parametrize("name", IDS)
def test_render(name):
    env = gym.make(name, render_mode="rgb_array")
    env.reset(seed=0)
    env.step(0)
    frame = env.render()
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
    assert frame.std() > 5
    assert gym.make(name).unwrapped.render() is None


def test_sb3_adapter():
    env = SB3VecEnv(RequestSchedulingVectorEnv(2, tasks=[CASES["tiny"]()]))
    env.seed(0)
    env.reset()
    rng, ended = np.random.default_rng(0), 0
    for _ in range(200):
        _, _, dones, infos = env.step(legal_play(env.action_masks(), rng))
        for e in np.flatnonzero(dones):
            ended += 1
            assert infos[e]["terminal_observation"]["context"].sum() == 0
            assert infos[e]["episode"]["r"] < 0
    assert ended > 3


def test_arguments_are_checked():
    tiny, bursty = CASES["tiny"](), CASES["bursts"]()
    with pytest.raises(InputError, match="tasks differ in"):
        RequestSchedulingVectorEnv(1, tasks=[tiny, bursty])
    with pytest.raises(InputError, match="no task given"):
        RequestSchedulingVectorEnv(1, tasks=[])
    with pytest.raises(InputError, match="SLO class 1"):
        RequestSchedulingVectorEnv(1, tasks=[Task(TIGHT, CONVERSATION.with_classes(TWO_CLASSES))])
    with pytest.raises(InputError, match="nothing to decide"):
        RequestSchedulingVectorEnv(tasks=[Task(tiny_spec(kv_blocks=1), tiny_workload([0], [99], [1]))]).reset(seed=0)


# ---------------------------------------------------------------------------------------------------- random play


@pytest.mark.parametrize("case", CASES)
def test_random_legal_play_ends_with_all_served(case):
    task = CASES[case]()
    env = RequestSchedulingVectorEnv(4, tasks=[task], debug=True)
    _, info = env.reset(seed=0)
    assert env.context.shape[1] == len(CONTEXT_FEATURES) and env.candidates.shape[2] == len(CANDIDATE_FEATURES)
    rng, returns, ended, victims = np.random.default_rng(0), np.zeros(4), 0, 0
    largest = np.zeros(2)
    while ended < 4:
        mask = info["action_mask"]
        assert mask.any(1).all()
        rows = env.batch.table_head["num_rows"][:, 0]
        assert not (mask & (np.arange(mask.shape[1]) >= rows[:, None])).any()
        obs, reward, terminated, _, info = env.step(legal_play(mask, rng))
        victims += int(obs["context"][:, -1].sum())
        returns += reward
        assert np.isfinite(obs["context"]).all() and np.isfinite(obs["candidates"]).all()
        largest = np.maximum(largest, [np.abs(obs["context"]).max(), np.abs(obs["candidates"]).max()])
        live = obs["candidates"].any(2)
        assert not (live & (np.arange(live.shape[1]) >= env.batch.table_head["num_rows"])).any()
        # a pick that is offered is a request that waits, a victim one that runs
        for e in np.flatnonzero(~terminated):
            offered = env.batch.table_requests[e, obs["action_mask"][e]]
            status = env.batch.requests[e]["status"][offered[offered >= 0]]
            assert (status == WAITING).all() or obs["context"][e, -1] == 1
        if terminated.any():
            assert not info["final_obs"]["context"][terminated].any()
            assert (info["final_obs"]["action_mask"][terminated].sum(1) == 1).all()
            ended += terminated.sum()
            break
    assert (largest < (8, 5)).all(), largest
    assert case in ("conversation", "tiny") or victims > 0


@pytest.mark.parametrize("objective", ["mean_e2e", "slo_goodput"])
def test_rewards_sum_to_the_objective(objective):
    """Over whole episodes under random play; the engine's books say what really happened."""
    spec = SPEC.replace(objective=objective)
    env = RequestSchedulingVectorEnv(1, tasks=[Task(spec, CONVERSATION.window(0, 60).with_classes(TWO_CLASSES))])
    _, info = env.reset(seed=0)
    rng, total, done = np.random.default_rng(1), 0.0, False
    while not done:
        books, requests = env.batch.books.copy(), env.batch.requests
        total_before = total
        final = copy.deepcopy(requests)
        env_batch = env.batch
        actions = legal_play(info["action_mask"], rng)
        # look at the engine before the autoreset wipes it
        reward, terminated, _ = env._step_envs(actions)
        info = {"action_mask": env.action_mask.copy()}
        total = total_before + reward[0]
        done = bool(terminated[0])
        books, final = env_batch.books[0, 0], env_batch.requests[0]
    latency_s = (final["last_token_s"] - final["arrival_s"]).sum()
    ttft_s = final["first_token_s"] - final["arrival_s"]
    tpot_s = (final["last_token_s"] - final["first_token_s"]) / np.maximum(final["generated_tokens"] - 1, 1)
    met = final["slo_weight"][(ttft_s <= final["ttft_slo_s"]) & (tpot_s <= final["tpot_slo_s"])].sum()
    np.testing.assert_allclose([books["latency_s"], books["slo_met"]], [latency_s, met], rtol=1e-9)
    np.testing.assert_allclose(total, -latency_s / 100 if objective == "mean_e2e" else met / 10, rtol=1e-9)


def test_a_batch_is_its_single_envs():
    """Env i of a batch seeded s and a single env seeded s + i: the same trajectories, episode after episode."""
    tasks = [CASES["bursts"](), bursts(seed=1)]
    arguments = {"tasks": tasks, "episode_requests": 12}
    batch = RequestSchedulingVectorEnv(3, **arguments)
    singles = [RequestSchedulingEnv(**arguments) for _ in range(3)]
    obs, info = batch.reset(seed=40)
    alone = [env.reset(seed=40 + i) for i, env in enumerate(singles)]
    rngs, ended = [np.random.default_rng(i) for i in range(3)], 0
    for _ in range(400):
        for name in obs:
            np.testing.assert_array_equal(obs[name], np.stack([o[name] for o, _ in alone]))
        actions = np.array(
            [legal_play(mask[None], rng)[0] for mask, rng in zip(info["action_mask"], rngs, strict=True)]
        )
        obs, reward, terminated, _, info = batch.step(actions)
        for i, env in enumerate(singles):
            one, one_reward, one_terminated, _, one_info = env.step(actions[i])
            assert (one_reward, one_terminated) == (reward[i], terminated[i])
            if one_terminated:
                ended += 1
                for name in one:
                    np.testing.assert_array_equal(info["final_obs"][name][i], one[name])
                one, one_info = env.reset()
            alone[i] = one, one_info
    assert ended >= 6


def test_update_of_the_observation_equals_writing_it():
    picks = victims = 0
    for case in CASES.values():
        task = case()
        env = RequestSchedulingVectorEnv(1, tasks=[task])
        _, info = env.reset(seed=0)
        rng, problem, done = np.random.default_rng(2), Problem.of(task.spec), False
        while not done:
            before = env.observation()["context"][0].copy()
            action = legal_play(info["action_mask"], rng)
            obs, _, terminated, _, info = env.step(action)
            done = terminated[0]
            head = env.batch.table_head[0, 0]
            if done or head["num_picked"] + env.batch.levers[0, 0]["num_preempt"] == 0:
                continue
            picks += head["num_picked"] > 0
            changed = set(np.flatnonzero(before != obs["context"][0]))
            assert changed <= {*PICKED_CONTEXT}
            victims += head["victim"] > 0
            context, candidates = np.full_like(obs["context"][0], 9), np.full_like(obs["candidates"][0], 9)
            write_observation(state_of(env), problem, table_of(env), context, candidates)
            np.testing.assert_array_equal(obs["context"][0], context)
            np.testing.assert_array_equal(obs["candidates"][0], candidates)
    assert picks > 100 and victims > 0


def test_observations_hold_no_future():
    """True lengths beyond what was generated, and requests still to come, change nothing that is seen."""
    rng, workload, half, least = np.random.default_rng(0), bursts().workload, 45, 60
    tasks = []
    for _ in range(2):  # the first half ends at the same lengths, the others at least do not end before 60 tokens
        outputs = workload.output_tokens.copy()
        outputs[half:] = rng.integers(least + 1, 300, len(outputs) - half)
        changed = type(workload).from_arrays(
            "other answers",
            workload.arrival_s,
            workload.prompt_tokens,
            outputs,
            predicted_output_tokens=workload.predicted_output_tokens,
        )
        tasks.append(Task(TIGHT, changed))
    envs = [RequestSchedulingVectorEnv(1, tasks=[t]) for t in tasks]
    seen = [env.reset(seed=0) for env in envs]
    steps = 0
    while True:
        (obs, info), (other_obs, _) = seen
        if max(env.batch.requests[0]["generated_tokens"][half:].max() for env in envs) >= least:
            break
        for name in obs:
            np.testing.assert_array_equal(obs[name], other_obs[name])
        action = legal_play(info["action_mask"], np.random.default_rng(steps))
        seen = [(step[0], step[4]) for step in (env.step(action) for env in envs)]
        steps += 1
    assert steps > 100


# ------------------------------------------------------------------------------------- the same meaning everywhere


def run_env(task: Task, choose) -> np.ndarray:
    """The requests at the end of one episode; `choose(env)` gives the actions."""
    env = RequestSchedulingVectorEnv(1, tasks=[task], debug=True)
    env.reset(seed=0)
    done = False
    while not done:
        actions = env._legal(choose(env))
        _, terminated, _ = env._step_envs(actions)
        done = bool(terminated[0])
    return env.batch.requests[0].copy()


@pytest.mark.parametrize("case", ["conversation", "bursts", "tiny"])
def test_following_fcfs_is_fcfs(case):
    task = CASES[case]()
    followed = run_env(task, lambda env: env.rule_actions([RULES["fcfs"]]))
    simulator = Simulator(task.spec)
    simulator.reset(task.workload)
    simulator.run(RULES["fcfs"])
    np.testing.assert_array_equal(followed["last_token_s"], simulator.sim.state.requests["last_token_s"])
    np.testing.assert_array_equal(followed["preemptions"], simulator.sim.state.requests["preemptions"])


def test_rules_of_unlike_kernels_are_followed_side_by_side():
    tasks = [Task(SPEC, CONVERSATION.window(a, a + 80).with_classes(TWO_CLASSES)) for a in (0, 80)]
    rules = [RULES["vtc"], RULES["hopeless_last"]]
    env = RequestSchedulingVectorEnv(8, tasks=tasks)
    env.reset(seed=1)
    assert set(env.task_index) == {0, 1}
    alone = [RequestSchedulingVectorEnv(8, tasks=tasks) for _ in rules]
    for other in alone:
        other.reset(seed=1)
    for _ in range(50):
        actions = env.rule_actions(rules)
        apart = [other.rule_actions([rule, rule]) for other, rule in zip(alone, rules, strict=True)]
        np.testing.assert_array_equal(actions, np.where(env.task_index == 0, apart[0], apart[1]))
        for e in (env, *alone):
            e.step(actions)


def test_following_a_rule_with_memory_starts_every_episode_afresh():
    task = Task(
        tiny_spec(kv_blocks=40, max_running=1),
        tiny_workload([0] * 6, [4] * 6, [1] * 6, client=[0, 0, 0, 1, 1, 1]),
    )
    env = RequestSchedulingVectorEnv(1, tasks=[task])
    env.reset(seed=0)
    env.rule_actions([RULES["fcfs"]])  # a rule that remembers less than the next one
    episodes, picked = [], []
    while len(episodes) < 3:
        action = env.rule_actions([RULES["vtc"]])
        request = env.batch.table_requests[0, action[0]]
        picked += [int(request)] if request >= 0 else []
        if env.step(action)[2][0]:
            episodes.append(picked)
            picked = []
    assert episodes[0] == episodes[1] == episodes[2]
    assert [r for r in episodes[0] if r in (0, 3)][:2] == [0, 3]  # one of each client


@pytest.mark.parametrize("case", CASES)
def test_the_compiled_policy_is_the_network(case):
    """Stepped from Python, compiled over the whole run, and through torch's network: the same choices."""
    task = CASES[case]()
    torch.manual_seed(0)
    network = PointerNetwork(NUM_CONTEXT, NUM_CANDIDATE, hidden=16, late_context=PICKED_CONTEXT)
    torch.nn.init.orthogonal_(network.head.query.weight, 3.0)
    weights, served = pack_weights(network, task.spec.num_candidates), []

    def act(obs: dict[str, np.ndarray]) -> int:
        with torch.no_grad():
            batch = (torch.as_tensor(obs[name][None]) for name in ("context", "candidates", "action_mask"))
            return int(network(*batch)[0].argmax())

    compiled = CompiledPolicy("compiled", weights, task.spec)
    for policy in (compiled, TablePolicy("torch", act, task.spec), None, compiled):
        simulator = Simulator(task.spec)
        simulator.reset(task.workload)
        if policy is None:
            compiled.run(simulator)
        else:
            serve(simulator, policy)
        served.append(simulator.sim.state.requests.tobytes())
    assert len(set(served)) == 1


@pytest.mark.parametrize("case", CASES)
def test_table_policy_and_env_make_the_same_choices(case):
    """A fixed, arbitrary scorer of rows: as a `Policy` over the simulator, and through the env."""
    task = CASES[case]()
    weights = np.random.default_rng(7).normal(size=len(CANDIDATE_FEATURES)).astype(np.float32)
    other = np.random.default_rng(8).normal(size=len(CONTEXT_FEATURES)).astype(np.float32)

    def act(obs: dict[str, np.ndarray]) -> int:
        scores = np.sin(3 * (obs["candidates"] @ weights) + obs["context"] @ other)
        return int(np.where(obs["action_mask"], scores, -np.inf).argmax())

    def choose(env: RequestSchedulingVectorEnv) -> np.ndarray:
        return np.array([act({name: array[0] for name, array in env.observation().items()})])

    through_env = run_env(task, choose)
    simulator = Simulator(task.spec)
    simulator.reset(task.workload)
    serve(simulator, TablePolicy("arbitrary", act, task.spec))
    assert through_env.tobytes() == simulator.sim.state.requests.tobytes()


# ------------------------------------------------------------------------------------------------- the load offered


def test_means_over_arrivals_forget():
    """A plain mean over the first MEMORY arrivals; after a change, two thirds of the new value MEMORY later."""
    count = 2 * MEMORY + 1
    state = empty_state(count)
    for i in range(count):
        row = state.requests[i]
        row["arrival_s"] = i if i <= MEMORY else MEMORY + 3 * (i - MEMORY)
        row["prompt_tokens"], row["cached_tokens"], row["status"] = 30 if i < MEMORY else 120, 10, WAITING
        row["predicted_output_tokens"] = 4.0
        note_arrival(state, i)
        if i == MEMORY - 1:
            assert state.engine[0]["mean_prefill_tokens"] == pytest.approx(20)
            assert state.engine[0]["mean_query_context"] == pytest.approx(20 * (10 + 30) / 2)
            assert state.engine[0]["mean_decode_context"] == pytest.approx(4 * (30 + 2))
            assert state.engine[0]["mean_arrival_gap_s"] == pytest.approx(1)
    assert state.engine[0]["mean_decode_steps"] == pytest.approx(4)
    assert state.engine[0]["mean_arrival_gap_s"] == pytest.approx(3 - 2 / np.e, rel=0.01)
    assert state.engine[0]["mean_prefill_tokens"] == pytest.approx(110 - 90 / np.e, rel=0.01)


@pytest.mark.parametrize("load", [0.6, 0.9, 1.1, 1.5])
def test_the_load_is_observed(load):
    """The feature that says what load is offered against the load that was set, by a measured capacity."""
    spec, workload = RequestSchedulingSpec(), generate("azure_conv", 400, seed=0).at_rate(1e9)
    place = CONTEXT_FEATURES.index("log(load offered: by the last 500 arrivals), in [-1, 1]")
    simulator = Simulator(spec)
    simulator.reset(workload)
    simulator.run(RULES["sarathi_2048"])
    capacity = len(workload) / simulator.state().engine[0]["now_s"]
    observed: list[float] = []

    def default(obs: dict[str, np.ndarray]) -> int:
        observed.append(float(obs["context"][place]))
        return 0 if obs["action_mask"][0] else int(np.flatnonzero(obs["action_mask"])[-1])

    simulator.reset(workload.at_rate(load * capacity))
    serve(simulator, TablePolicy("default", default, spec))
    assert np.exp(observed[-1]) == pytest.approx(load, rel=0.1)


def test_columns_of_a_waiting_request():
    """A long prompt that has waited for 12 of the 60 seconds allowed, and a short one that has just come."""
    spec = RequestSchedulingSpec(EngineSpec(kv_blocks=10_000), num_candidates=16, longest_wait_s=60.0)
    simulator = Simulator(spec)
    simulator.reset(tiny_workload([0.0, 0.0, 0.0], [9, 32768, 90], [1, 1, 1]))
    state, seen = simulator.state(), []
    state.engine[0]["now_s"], state.requests["arrival_s"][2] = 12.0, 12.0
    policy = TablePolicy("looks", lambda obs: seen.append(obs["candidates"].copy()) or 0, spec)
    policy.decide(state, simulator.default_decision())
    column = {name: i for i, name in enumerate(CANDIDATE_FEATURES)}
    for request, residual, waited_s in ((1, 32768, 12.0), (2, 90, 0.0)):
        row = seen[0][list(policy.table.requests).index(request)]
        assert row[column["residual prompt tokens / 4096 (at most 4)"]] == pytest.approx(min(residual / 4096, 4))
        assert row[column["residual prompt tokens / 65536 (at most 4)"]] == pytest.approx(residual / 65536)
        assert row[column["log1p(residual prompt tokens) / 12"]] == pytest.approx(np.log1p(residual) / 12)
        assert row[column["waited seconds, log1p, / 6"]] == pytest.approx(np.log1p(waited_s) / 6)
        assert row[column["waited seconds / longest wait allowed (at most 2)"]] == pytest.approx(waited_s / 60)
        assert row[column["rank by work among the waiting, in [0, 1]"]] == (1.0 if request == 1 else 0.5)


# ------------------------------------------------------------------------------------------------- bounded waiting


def test_the_overdue_gets_its_turn():
    """A policy that always picks the latest arrival: of OVERDUE_EVERY admissions one still goes to the oldest."""
    spec = tiny_spec(kv_blocks=400, max_running=1, num_candidates=64, longest_wait_s=10.0, cost=ONE_SECOND)
    workload = tiny_workload(np.arange(60) * 0.5, [4] * 60, [1] * 60)
    order: list[int] = []

    def latest(env: RequestSchedulingVectorEnv) -> np.ndarray:
        requests = np.where(env.action_mask[0], env.batch.table_requests[0], -1)
        if requests.max() >= 0:
            order.append(int(requests.max()))
            return np.array([requests.argmax()])
        return np.array([np.flatnonzero(env.action_mask[0])[-1]])

    finished = run_env(Task(spec, workload), latest)
    assert sorted(order) == list(range(60))
    served_s = finished["last_token_s"] - 1
    forced = []
    for place, request in enumerate(order):
        now_s = served_s[request]
        waiting = [r for r in order[place:] if workload.arrival_s[r] <= now_s]
        oldest = min(waiting)
        overdue = now_s - workload.arrival_s[oldest] > 10.0
        if place % OVERDUE_EVERY == 0 and overdue:
            forced.append(place)
            assert request == oldest
        else:
            assert request == max(waiting)
    assert len(forced) >= 5


@pytest.mark.parametrize("case", ["bursts", "prefixes"])
def test_nobody_is_picked_in_the_turn_of_the_overdue(case):
    """Random play, with a bound so short that there is always an overdue request: memory is kept free for it."""
    task = CASES[case]()
    task = Task(task.spec.replace(longest_wait_s=0.5), task.workload)
    env = RequestSchedulingVectorEnv(1, tasks=[task])
    _, info = env.reset(seed=0)
    rng, turns, done = np.random.default_rng(0), 0, False
    while not done:
        engine, head = env.batch.engine[0, 0], env.batch.table_head[0, 0]
        admissions = engine["num_finished"] + engine["num_preemptions"] + engine["num_running"] + head["num_picked"]
        requests = env.batch.table_requests[0]
        if not head["victim"] and head["overdue"] >= 0 and admissions % OVERDUE_EVERY == 0:
            waiting = env.batch.waiting[0, : engine["num_waiting"]]
            longest = env.batch.requests[0]["arrival_s"][waiting].min()
            assert env.batch.requests[0]["arrival_s"][head["overdue"]] == longest
            if env.batch.table_open[0][requests == head["overdue"]].any():
                turns += 1
                assert set(requests[info["action_mask"][0] & (requests >= 0)]) <= {head["overdue"]}
        _, _, terminated, _, info = env.step(legal_play(info["action_mask"], rng))
        done = terminated[0]
    assert turns > 5


def test_metrics_of_the_default_row_are_those_of_fcfs():
    """Row 0 launches the engine's default: choosing it always is the engine without a scheduler."""
    task = CASES["bursts"]()
    simulator = Simulator(task.spec)
    simulator.reset(task.workload)

    def default(obs: dict[str, np.ndarray]) -> int:
        return 0 if obs["action_mask"][0] else int(np.flatnonzero(obs["action_mask"])[-1])

    serve(simulator, TablePolicy("default", default, task.spec))
    other = Simulator(task.spec)
    other.reset(task.workload)
    other.run(RULES["fcfs"])
    assert_same_run(simulator.timeline(), other.timeline())
    assert compute_metrics(other.timeline())["preemptions"] > 0
