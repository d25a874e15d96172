"""Learned schedulers of task graphs: the compiled pointer, sampling, labelling, checkpoints."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from untrained import untrained_agent, untrained_network

from schedlab.agents.checkpoint import save_checkpoint
from schedlab.agents.networks import PointerNetwork
from schedlab.agents.soc_dag import (
    ENV_ID,
    PointerScheduling,
    empty_desk,
    empty_log,
    load_pointer,
    log_rule,
    sample_best,
    sampled_plans,
)
from schedlab.agents.soc_dag_train import BestOfSamples, Instance, label
from schedlab.baselines.soc_dag import RULES
from schedlab.baselines.soc_static import heft, plan_of_order, plan_rule
from schedlab.envs.core.errors import InputError
from schedlab.envs.soc_dag.check import check_schedule
from schedlab.envs.soc_dag.env import SocDagVectorEnv
from schedlab.envs.soc_dag.generate import random_layered, random_stream
from schedlab.envs.soc_dag.library import Graph
from schedlab.envs.soc_dag.sim import Simulator, start
from schedlab.envs.soc_dag.spec import Soc, SocDagSpec, uniform_soc
from schedlab.envs.soc_dag.state import empty_decision
from schedlab.envs.soc_dag.table import FEATURE_VERSION, NUM_CANDIDATE, NUM_CONTEXT
from schedlab.envs.soc_dag.workload import Dag, Workload

SOC, STREAM = random_stream(6, num_tasks=(8, 14), num_jobs=5, gap_us=20.0)
SPEC = SocDagSpec(SOC, transfers="push")
DAG = random_layered(14, 4, seed=3)
ALONE = SocDagSpec(uniform_soc(4), transfers="push", objective="makespan")


@pytest.fixture(scope="module")
def network() -> PointerNetwork:
    return untrained_network()


@pytest.fixture(scope="module")
def agent() -> PointerScheduling:
    return untrained_agent()


def single(dag=DAG) -> Workload:
    return Workload.from_arrays("one", uniform_soc(4).kind_names, [dag])


def test_compiled_decisions_are_those_of_the_network_in_the_env(network, agent):
    """Torch on the env's observations, the policy stepped from Python, and its compiled run: one schedule."""
    env = SocDagVectorEnv(1, spec=SPEC, workload=STREAM, graph=False, debug=True)
    obs, _ = env.reset(seed=4)
    workload, seed = env.episode()
    done = False
    while not done:
        with torch.no_grad():
            logits, _ = network(*(torch.as_tensor(obs[key]) for key in ("context", "candidates", "action_mask")))
        done = bool(env._step_envs(logits.argmax(1).numpy())[1][0])
        obs = env.observation()
    finish = env.batch.tasks[0]["finish"][: workload.num_tasks]
    stepped, run = Simulator(SPEC), Simulator(SPEC)
    for simulator in (stepped, run):
        simulator.reset(workload, seed)
    agent.reset(stepped.state())
    done = False
    while not done:
        decision = stepped.default_decision()
        agent.decide(stepped.state(), decision)
        done = stepped.step(decision).done
    agent.run(run)
    np.testing.assert_array_equal(stepped.timeline().finish, run.timeline().finish)
    np.testing.assert_allclose(run.timeline().finish, finish)
    assert check_schedule(run.timeline(), workload, SPEC) == []


def test_sampling_is_reproducible_and_keeps_the_best(agent):
    simulator = Simulator(ALONE)
    simulator.reset(single())
    sim = simulator.sim
    desk, log = agent.desk_for(sim.state), empty_log(200, 64)
    losses, again = np.zeros(16), np.zeros(16)
    best = sample_best(sim, agent.weights, desk, log, empty_decision(), 16, 1.0, 5, losses)
    assert (
        losses[best] == losses.min() == pytest.approx(simulator.timeline().job_finish[0] / sim.state.engine[0]["unit"])
    )
    assert len(np.unique(losses)) > 4
    assert check_schedule(simulator.timeline(), single(), ALONE) == []
    assert sample_best(sim, agent.weights, desk, log, empty_decision(), 16, 1.0, 5, again) == best
    np.testing.assert_array_equal(losses, again)
    agent.run(_fresh := _simulator(ALONE, single()))
    assert losses[0] == pytest.approx(float(_fresh.sim.state.engine[0]["now"] / sim.state.engine[0]["unit"]))


def _simulator(spec: SocDagSpec, workload: Workload) -> Simulator:
    simulator = Simulator(spec)
    simulator.reset(workload)
    return simulator


def test_samples_are_plans(agent):
    """Followed with all tasks bound at once, a sampled schedule ends when it was said to; more samples are no worse."""
    ends = []
    for samples in (1, 8, 64):
        plans = sampled_plans(agent, ALONE.soc, DAG, samples)
        best = min(plans, key=lambda plan: plan.makespan_us)
        plan = plan_of_order(Graph.of(DAG, ALONE.soc), best.pe, best.order)
        follower = _simulator(ALONE.replace(binding="arrival", transfers="pull"), single())
        follower.run(plan_rule("plan", [plan]))
        assert len(plans) == samples
        assert follower.timeline().job_finish[0] <= best.makespan_us + 1e-9
        ends.append(best.makespan_us)
    greedy = _simulator(ALONE, single())
    agent.run(greedy)
    assert greedy.timeline().job_finish[0] == ends[0]
    assert ends[0] >= ends[1] >= ends[2]
    assert ends[2] < ends[0]


def test_a_schedule_of_the_turned_graph_read_from_its_end_is_a_plan(agent):
    """On links that differ by direction: no longer forwards than backwards, and possible by the checker."""
    links = ((0.5, 2.0, 1.0, 4.0), (1.0, 1.0, 3.0, 0.7), (2.0, 0.6, 1.0, 1.0), (1.0, 5.0, 2.0, 0.8))
    soc = replace(uniform_soc(4), bandwidth=links)
    assert soc.turned().bandwidth[0][1] == soc.bandwidth[1][0]
    for seed in range(4):
        dag = random_layered(14, 4, seed=seed)
        again = dag.turned().turned()
        for name in ("times", "edges", "volumes"):
            np.testing.assert_array_equal(getattr(again, name), getattr(dag, name))
        _, drawn = sampled_plans(agent, soc, dag, 2)  # forwards, backwards
        plan = plan_of_order(Graph.of(dag, soc), drawn.pe, drawn.order)
        assert plan.makespan_us <= drawn.makespan_us + 1e-9
        follower = _simulator(single_on(soc).replace(binding="arrival"), one := single_of(dag, soc))
        follower.run(plan_rule("plan", [plan]))
        np.testing.assert_array_equal(follower.timeline().pe, drawn.pe)
        assert follower.timeline().job_finish[0] <= plan.makespan_us + 1e-9
        assert check_schedule(follower.timeline(), one, single_on(soc).replace(binding="arrival")) == []


def single_of(dag: Dag, soc: Soc) -> Workload:
    return Workload.from_arrays("one", soc.kind_names, [dag])


def single_on(soc: Soc) -> SocDagSpec:
    return SocDagSpec(soc, transfers="push", objective="makespan")


@pytest.mark.parametrize("name", ["late_srpt", "late_rank"])
def test_a_logged_rule_is_the_rule(name, agent):
    """What imitation sees of a rule leads to the rule's own schedule."""
    workload = STREAM.draw(np.random.default_rng(2))
    rule, plain, logged = RULES[name], _simulator(SPEC, workload), _simulator(SPEC, workload)
    plain.run(rule)
    state = logged.sim.state
    desk = empty_desk(SPEC.num_candidates, len(state.pes), len(state.jobs), len(state.tasks))
    log = empty_log(4 * workload.num_tasks, SPEC.num_candidates)
    start(logged.sim)
    arguments = (rule.decide_kernel, rule.param_array, rule.new_memory(state), agent.weights)
    log_rule(logged.sim, *arguments, 1.0, 0, desk, log, empty_decision())
    np.testing.assert_array_equal(plain.timeline().finish, logged.timeline().finish)
    count = int(log.written[0])
    assert log.action_mask[np.arange(count), log.actions[:count]].all()
    assert (np.diff(log.loss[:count]) >= 0).all()


def test_a_choice_that_has_no_row_is_no_label(agent):
    """Where the table is too short for what a rule wants the run goes on with it, and nobody learns to wait."""
    rule, workload, waits, written, finish = RULES["late_srpt"], STREAM.draw(np.random.default_rng(2)), [], [], []
    for rows in (64, 3):
        simulator = _simulator(SPEC.replace(num_candidates=rows), workload)
        state, log = simulator.sim.state, empty_log(4 * workload.num_tasks, rows)
        desk = empty_desk(rows, len(state.pes), len(state.jobs), len(state.tasks))
        start(simulator.sim)
        arguments = (rule.decide_kernel, rule.param_array, rule.new_memory(state), agent.weights)
        log_rule(simulator.sim, *arguments, 1.0, 0, desk, log, empty_decision())
        written.append(int(log.written[0]))
        waits.append(int((log.actions[: written[-1]] == 0).sum()))
        finish.append(simulator.timeline().finish)
    np.testing.assert_array_equal(*finish)
    assert waits[0] == waits[1] > 0 and 0.3 * written[0] < written[1] < 0.9 * written[0]


def test_a_rule_labels_what_the_policy_visits(agent):
    """Without samples the policy leads, mostly, and every state gets the row that the rule would choose there."""
    workload, rule = STREAM.draw(np.random.default_rng(2)), RULES["late_srpt"]
    one = label(Instance(SPEC, workload, 0, [rule], 0), agent.weights, 1.0, 3)
    assert np.isnan(one.greedy) and not one.is_own
    plain, count = _simulator(SPEC, workload), len(one.log.actions)
    plain.run(rule)
    latency = plain.timeline().job_finish - plain.timeline().arrival
    assert one.best > latency.sum() / plain.sim.state.engine[0]["unit"]  # an untrained policy led
    assert one.log.action_mask[np.arange(count), one.log.actions].all()
    again = label(Instance(SPEC, workload, 0, [rule], 0), agent.weights, 1.0, 3)
    np.testing.assert_array_equal(one.log.actions, again.log.actions)
    np.testing.assert_array_equal(one.log.candidates, again.log.candidates)
    some = label(Instance(SPEC, workload, 0, [rule], 0, 0.5), agent.weights, 1.0, 3)
    assert some.best == one.best and 0.35 * count < len(some.log.actions) == len(some.returns) < 0.65 * count
    at = np.searchsorted(one.log.loss, some.log.loss)
    np.testing.assert_array_equal(some.returns, one.returns[at])
    assert {row.tobytes() for row in some.log.candidates} < {row.tobytes() for row in one.log.candidates}


def test_labels_are_the_best_there_is(agent):
    """A plan is imitated where it beats the samples, a sample where it beats the plan; returns end at nothing."""
    plan = heft(Graph.of(DAG, ALONE.soc))
    instance = Instance(ALONE, single(), 0, [plan_rule("heft", [plan])], 1)
    of_plan = label(instance, agent.weights, 1.0, 0)
    assert not of_plan.is_own
    assert of_plan.greedy > of_plan.best
    poor = Instance(ALONE, single(), 0, [], 32)
    of_samples = label(poor, agent.weights, 1.0, 0)
    assert of_samples.is_own
    assert of_samples.best < of_samples.greedy
    for one in (of_plan, of_samples):
        assert one.returns[0] == pytest.approx(-one.best, rel=1e-6)
        assert (np.diff(one.returns) >= 0).all()


def test_self_labelling_learns(network, agent):
    """Six rounds with HEFT's plans and its own samples bring an untrained network near what they find."""
    from schedlab.agents.clone import LabelledStates
    from schedlab.agents.policy import PointerPolicy
    from schedlab.agents.self_label import self_label

    def draw(rng, index):
        dag = random_layered(int(rng.integers(8, 15)), 4, seed=rng)
        return Instance(ALONE, single(dag), 0, [plan_rule("heft", [heft(Graph.of(dag, ALONE.soc))])], 8)

    env = SocDagVectorEnv(1, spec=ALONE, workload=single(), graph=False)
    torch.manual_seed(0)
    policy = PointerPolicy(env.single_observation_space, env.single_action_space, lambda _: 1e-3, hidden=16)
    rows: list[dict] = []
    labeller = BestOfSamples(draw, 24)
    states = LabelledStates(4000, env.single_observation_space)
    self_label(policy, labeller, states, rounds=6, passes=4, minibatch=128, progress=rows.append)
    assert [row["label_round"] for row in rows] == list(range(6))
    assert rows[-1]["greedy_over_best"] - 1.0 < 0.3 * (rows[0]["greedy_over_best"] - 1.0)
    assert rows[-1]["agreement"] > rows[0]["agreement"] + 0.1
    first, again = labeller(policy.network, 2), labeller(policy.network, 2)
    assert first[1] == again[1]
    assert all(torch.equal(first[0][name], again[0][name]) for name in first[0])


def test_a_checkpoint_comes_back_as_a_policy(network, agent, tmp_path):
    config = {"env_id": ENV_ID, "spec": SPEC.to_dict(), "feature_version": FEATURE_VERSION}
    save_checkpoint(tmp_path / "agent", network, config, with_onnx=False)
    loaded = load_pointer(tmp_path / "agent")
    assert loaded.name == "agent"
    workload = STREAM.draw(np.random.default_rng(1))
    ends = []
    for policy in (agent, loaded):
        simulator = _simulator(SPEC, workload)
        policy.run(simulator)
        ends.append(simulator.timeline().finish)
    np.testing.assert_array_equal(*ends)
    with pytest.raises(InputError, match="feature_version"):
        save_checkpoint(tmp_path / "old", network, config | {"feature_version": 1}, with_onnx=False)
        load_pointer(tmp_path / "old")
    attention = PointerNetwork(NUM_CONTEXT, NUM_CANDIDATE, "attention", 16)
    save_checkpoint(tmp_path / "attention", attention, config, with_onnx=False)
    with pytest.raises(InputError, match="no compiled kernel"):
        load_pointer(tmp_path / "attention")


def test_logits_that_are_not_finite_raise(network, agent):
    broken = agent.weights._replace(query_b=np.full_like(agent.weights.query_b, np.nan))
    policy, simulator = PointerScheduling("broken", broken, 64), _simulator(SPEC, STREAM.draw(np.random.default_rng(0)))
    with pytest.raises(ValueError, match="not finite"):
        policy.decide(simulator.state(), simulator.default_decision())
    with pytest.raises(ValueError, match="not finite"):
        policy.run(simulator)
