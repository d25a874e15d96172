"""`schedlab/SocDag-v0`: the pointer problem over the simulated SoC. Gymnasium's checks run for every id in
`tests/request_scheduling/test_env.py`."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from soc_problems import SMALL_SOC, random_dag, random_workload, small_spec

import schedlab.envs  # noqa: F401
from schedlab.baselines.soc_dag import RULES
from schedlab.baselines.soc_static import heft, plan_rule
from schedlab.envs.core.errors import InputError
from schedlab.envs.soc_dag.env import SocDagEnv, SocDagVectorEnv, Task
from schedlab.envs.soc_dag.generate import random_stream
from schedlab.envs.soc_dag.graph import BOUND_TO, MAY_RUN_ON, PRECEDES
from schedlab.envs.soc_dag.library import Graph
from schedlab.envs.soc_dag.sim import Simulator
from schedlab.envs.soc_dag.spec import PeKind, Soc, SocDagSpec
from schedlab.envs.soc_dag.state import BOUND, FINISHED, IDLE
from schedlab.envs.soc_dag.workload import Stream, Workload

WORKLOAD = random_workload(5, num_jobs=8)
CASES = {
    "late": small_spec(num_candidates=32, noise="normal", noise_sigma=0.3),
    "crowded": small_spec(num_candidates=4, graph_tasks=6, graph_edges=9),
    "levels": small_spec(choose_frequency=True, objective="energy", noise="lognormal", noise_sigma=0.5),
    "ready": small_spec(binding="ready", objective="edp"),
    "arrival": small_spec(binding="arrival", objective="makespan", transfers="push"),
    "deadline": small_spec(objective="deadline"),
}


def vector_env(name: str, num_envs: int = 1, **changes) -> SocDagVectorEnv:
    return SocDagVectorEnv(num_envs, spec=CASES[name], workload=WORKLOAD, debug=True, **changes)


def legal_play(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.where(mask, rng.random(mask.shape), -1).argmax(1)


@pytest.mark.parametrize("name", CASES)
def test_random_legal_play_finishes_every_episode(name):
    """Masks are never empty, observations stay in their space and scale, rewards add up to the objective."""
    env, rng = vector_env(name), np.random.default_rng(0)
    obs, info = env.reset(seed=0)
    for _ in range(3):
        total, done, first = 0.0, False, float(env.batch.loss[0])
        while not done:
            assert env.observation_space.contains(obs)
            assert info["action_mask"].any()
            live = int(env.batch.table_head["num_rows"][0, 0])
            assert not obs["candidates"][0, live:].any()
            assert not info["action_mask"][0, live:].any()
            assert max(np.abs(obs[key]).max() for key in ("context", "candidates", "nodes")) <= 1.0
            action = legal_play(info["action_mask"], rng)
            reward, terminated, _ = env._step_envs(action)  # without the autoreset, to see how it ends
            total, done = total + float(reward[0]), bool(terminated[0])
            obs, info = env.observation(), {"action_mask": env.action_mask.copy()}
        engine, books = env.batch.engine[0, 0], env.batch.books[0, 0]
        jobs, unit = env.batch.jobs[0], float(engine["unit"])
        latency = float((jobs["finish"] - jobs["arrival"]).sum())
        energy = float(engine["energy"] / (unit * engine["watts_unit"]))
        expected = {
            "latency": latency / unit,
            "makespan": jobs["finish"].max() / unit,
            "energy": energy,
            "edp": energy * latency / (unit * len(WORKLOAD)),
            "deadline": (jobs["finish"] > jobs["deadline"]).sum(),
        }[CASES[name].objective]
        assert first - total == pytest.approx(expected, rel=1e-9)
        assert books["live_us"] == pytest.approx(latency)
        assert engine["num_illegal"] == 0
        assert (env.batch.tasks[0]["status"][: WORKLOAD.num_tasks] == FINISHED).all()
        env._reset_envs(np.array([0]))
        obs, info = env.observation(), {"action_mask": env.action_mask.copy()}


@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_its_envs(name):
    """Env i of a batch seeded with s is env 0 of a batch seeded with s + i, episode after episode."""
    batch = vector_env(name, 3, episode_jobs=3)
    singles = [vector_env(name, episode_jobs=3) for _ in range(3)]
    obs, info = batch.reset(seed=7)
    for i, env in enumerate(singles):
        env.reset(seed=7 + i)
    rng, ended = np.random.default_rng(0), 0
    for _ in range(80):
        actions = legal_play(info["action_mask"], rng)
        obs, reward, terminated, _, info = batch.step(actions)
        ended += terminated.sum()
        for i, env in enumerate(singles):
            one, r, t, _, _ = env.step(actions[i : i + 1])
            assert (r[0], t[0]) == (reward[i], terminated[i])
            for key, value in one.items():
                assert np.array_equal(value[0], obs[key][i]), key
    assert ended > 3


@pytest.mark.parametrize("rule", ["late_srpt", "late_rank", "eager_srpt", "eft"])
@pytest.mark.parametrize("name", ["late", "ready"])
def test_following_a_rule_is_running_it(name, rule):
    """A teacher's actions lead to the same schedule as the rule run compiled in the simulator."""
    env = vector_env(name)
    env.reset(seed=3)
    workload, seed = env.episode()
    done = False
    while not done:
        actions = env.rule_actions([RULES[rule]])
        assert env.action_mask[0, actions[0]]
        done = bool(env._step_envs(actions)[1][0])
    simulator = Simulator(CASES[name])
    simulator.reset(workload, seed)
    simulator.run(RULES[rule])
    tasks = env.batch.tasks[0][: workload.num_tasks]
    timeline = simulator.timeline()
    # where two PEs of a kind are as good, the table has one of them: times agree, PEs up to their kind
    np.testing.assert_array_equal(tasks["finish"], timeline.finish)
    kind = SMALL_SOC.kind_of_pe
    np.testing.assert_array_equal(kind[tasks["pe"]], kind[timeline.pe])


def test_a_plan_can_teach_late_binding():
    """HEFT's plan of a single graph, followed in the env with pushed data, takes as long as planned."""
    soc, stream = random_stream(4, num_tasks=(15, 25), seed=2)
    spec = SocDagSpec(soc, transfers="push", objective="makespan", num_candidates=128)
    env = SocDagVectorEnv(1, spec=spec, workload=stream, graph=False, debug=True)
    rule = plan_rule("heft", [heft(Graph.of(dag, soc)) for dag in stream.dags])
    for seed in range(6):
        env.reset(seed=seed)
        workload, _ = env.episode()
        done = False
        while not done:
            done = bool(env._step_envs(env.rule_actions([rule]))[1][0])
        planned = heft(Graph.of(workload.dags[workload.dag_of_job[0]], soc))
        np.testing.assert_allclose(env.batch.tasks[0][: workload.num_tasks]["finish"], planned.finish, rtol=1e-12)


@pytest.mark.parametrize("name", ["late", "crowded", "arrival"])
def test_the_graph_tells_what_the_state_tells(name):
    """Nodes are the PEs and unfinished tasks of live jobs, edges their precedences, offers and bindings."""
    env, rng = vector_env(name, 2), np.random.default_rng(0)
    obs, info = env.reset(seed=0)
    complete = 0
    for _ in range(60):
        for b in range(2):
            state, shown = env.state(b), env.batch.table_shown[b]
            count, p = int(env.batch.table_head[b, 0]["num_nodes"]), SMALL_SOC.num_pes
            nodes, mask = obs["nodes"][b], obs["edge_mask"][b]
            live = set(state.live[: state.engine[0]["num_live"]].tolist())
            unfinished = [
                t
                for t in range(state.engine[0]["num_tasks"])
                if state.tasks[t]["job"] in live and state.tasks[t]["status"] != FINISHED
            ]
            assert sorted(shown[p:count]) == unfinished or (
                count == len(nodes) and set(shown[p:count]) < set(unfinished)
            )
            assert not nodes[count:].any()
            np.testing.assert_array_equal(nodes[:count, 1], np.arange(count) < p)
            np.testing.assert_array_equal(nodes[:p, 15], state.pes["status"] == IDLE)
            rows = env.batch.table_rows[b, : env.batch.table_head[b, 0]["num_rows"]]
            found = {kind: set() for kind in (PRECEDES, MAY_RUN_ON, BOUND_TO)}
            group = obs["node_group"][b]
            assert (group[:p] == -1).all() and (group[count:] == -1).all()
            jobs = [int(state.tasks[t]["job"]) for t in shown[p:count]]
            assert len({*zip(jobs, group[p:count].tolist(), strict=True)}) == len(set(jobs)) == group.max() + 1
            unit = float(state.engine[0]["unit"])
            for edge in np.flatnonzero(mask):
                source, target = obs["edges"][b, :, edge]
                kind = int(obs["edge_type"][b, edge])
                found[kind].add((int(shown[source]), int(shown[target] if kind == PRECEDES else target)))
                task, told = int(shown[source]), obs["edge_features"][b, edge]
                if kind == PRECEDES:
                    after = state.edges[state.tasks[task]["first_out"] :][: state.tasks[task]["num_out"]]
                    moved = float(after["moved"][after["target"] == shown[target]][0])
                    assert told[0] == pytest.approx(moved / (unit + moved)) and not told[1:].any()
                else:
                    ahead = float(state.ahead[task, target])
                    assert told[3] == pytest.approx(ahead / (unit + ahead)) and told[0] == 0.0
            if count == p + len(unfinished) and mask.sum() < len(mask):
                complete += 1
                assert found[MAY_RUN_ON] == {(int(t), int(pe)) for t, pe, _ in rows[1:]}
                assert found[BOUND_TO] == {
                    (t, int(state.tasks[t]["pe"])) for t in unfinished if state.tasks[t]["status"] >= BOUND
                }
                assert found[PRECEDES] == {
                    (t, int(edge["target"]))
                    for t in unfinished
                    for edge in state.edges[state.tasks[t]["first_out"] :][: state.tasks[t]["num_out"]]
                }
            for row, node in enumerate(obs["candidate_node"][b]):
                if node >= 0:
                    assert shown[node] == rows[row, 0]
                    assert obs["candidate_place"][b, row] == rows[row, 1]
            assert not obs["edge_features"][b][~mask].any()
        obs, _, _, _, info = env.step(legal_play(info["action_mask"], rng))
    assert complete > (20 if name != "crowded" else 0)


def test_observations_hold_no_future():
    """Jobs still to come and the noise of what runs change nothing that is seen."""
    half = 4
    changed = Workload.from_arrays(
        "other jobs to come",
        WORKLOAD.kind_names,
        WORKLOAD.dags,
        np.concatenate([WORKLOAD.dag_of_job[:half], 2 - WORKLOAD.dag_of_job[half:]]),
        np.concatenate([WORKLOAD.arrival_us[:half], WORKLOAD.arrival_us[half:] + 30]),
        WORKLOAD.deadline_us,
    )
    envs = [SocDagVectorEnv(1, spec=CASES["late"], workload=w) for w in (WORKLOAD, changed)]
    seen = [env.reset(seed=0) for env in envs]
    env, steps = envs[0], 0
    while env.batch.engine[0, 0]["now"] < WORKLOAD.arrival_us[half] and not env.batch.books[0, 0]["done"]:
        for name in seen[0][0]:
            np.testing.assert_array_equal(seen[0][0][name], seen[1][0][name])
        state = env.state()
        assert not state.jobs[state.engine[0]["num_arrived"] :]["num_tasks"].any()
        assert not state.tasks[state.engine[0]["num_tasks"] :]["status"].any()
        action = legal_play(seen[0][1]["action_mask"], np.random.default_rng(steps))
        seen = [(step[0], step[4]) for step in (env.step(action) for env in envs)]
        steps += 1
    assert steps > 5


def test_tasks_of_unlike_socs_share_an_env():
    """A batch may hold SoCs with other PEs; each behaves as it does alone."""
    other = Soc("other", (PeKind("a", 7), PeKind("b", 2)), bandwidth=((3.0, 1.0), (1.0, 3.0)))
    rng = np.random.default_rng(1)
    stream = Stream("other", ("a", "b"), tuple(random_dag(rng, 12, 2) for _ in range(3)), 10.0, 5)
    tasks = [Task(small_spec(), WORKLOAD), Task(small_spec(soc=other), stream)]
    env = SocDagVectorEnv(4, tasks=tasks, debug=True)
    env.reset(seed=0)
    seen = set()
    for _ in range(3):
        for b in range(4):
            env._reset_envs(np.array([b]))
            task, (workload, seed) = tasks[env.task_index[b]], env.episode(b)
            seen.add(int(env.task_index[b]))
            done = False
            while not done:
                actions = env.action_mask.argmax(1)  # the others wait or take their first row
                actions[b] = env.rule_actions([RULES["late_srpt"]] * 4)[b]
                done = bool(env._step_envs(actions)[1][b])
                env._reset_envs(np.flatnonzero(env._done & (np.arange(4) != b)))
            simulator = Simulator(task.spec)
            simulator.reset(workload, seed)
            simulator.run(RULES["late_srpt"])
            finish = env.batch.tasks[b]["finish"][: workload.num_tasks]
            np.testing.assert_array_equal(finish, simulator.timeline().finish)
    assert seen == {0, 1}


def test_arguments_are_checked():
    with pytest.raises(InputError, match="no task"):
        SocDagVectorEnv(tasks=[])
    with pytest.raises(InputError, match="without a spec"):
        SocDagVectorEnv(workload=WORKLOAD)
    with pytest.raises(InputError, match="tasks differ in"):
        SocDagVectorEnv(tasks=[Task(CASES["late"], WORKLOAD), Task(CASES["crowded"], WORKLOAD)])
    with pytest.raises(InputError, match="Load the jobs for this SoC"):
        SocDagVectorEnv(spec=small_spec(soc=Soc("x", (PeKind("x"),))), workload=WORKLOAD)
    chain = Soc("one", (PeKind("p"),))
    with pytest.raises(InputError, match="nothing to decide"):
        SocDagVectorEnv(
            spec=SocDagSpec(chain),
            workload=Workload.from_arrays("c", ("p",), [random_dag(np.random.default_rng(0), 1, 1)]),
        ).reset(seed=0)


def test_the_single_env_and_its_picture():
    env = SocDagEnv(spec=CASES["late"], workload=WORKLOAD, render_mode="rgb_array")
    _, info = env.reset(seed=0)
    for _ in range(12):
        _, _, _, _, info = env.step(int(info["action_mask"].nonzero()[0][-1]))
    picture = env.render()
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 4


def test_the_id_is_registered():
    env = gym.make("schedlab/SocDag-v0")
    obs, info = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    obs, *_ = env.step(int(info["action_mask"].argmax()))
    assert env.observation_space.contains(obs)
