"""Rollouts before a decision: what they play on is what the simulator would do, and nothing of the future is known."""

from __future__ import annotations

import numpy as np
import pytest
from untrained import untrained_agent

from schedlab.agents.compiled import deepsets_logits
from schedlab.agents.soc_dag import PointerScheduling, see
from schedlab.agents.soc_dag_rollout import RolloutScheduling, draw_scenario, new_race, play_on, rank_rows
from schedlab.baselines.soc_dag import RULES
from schedlab.envs.core.errors import InputError
from schedlab.envs.soc_dag.check import check_schedule
from schedlab.envs.soc_dag.env import loss_of
from schedlab.envs.soc_dag.generate import random_stream
from schedlab.envs.soc_dag.sim import Simulator
from schedlab.envs.soc_dag.spec import PeKind, SocDagSpec
from schedlab.envs.soc_dag.table import action_of
from schedlab.envs.soc_dag.workload import Workload, noise_draws

SOC, STREAM = random_stream(6, num_tasks=(8, 14), num_jobs=5, gap_us=20.0)
AT_ONCE = random_stream(6, num_tasks=(8, 14), num_jobs=5, gap_us=0.0)[1]
NOISY = SocDagSpec(SOC, transfers="push", noise="lognormal", noise_sigma=0.5)
SRPT = RULES["late_srpt"]


@pytest.fixture(scope="module")
def agent() -> PointerScheduling:
    return untrained_agent()


@pytest.fixture(scope="module")
def rollouts(agent) -> RolloutScheduling:
    return RolloutScheduling("rollouts", agent, SRPT, scenarios=16)


@pytest.mark.parametrize("objective", ["latency", "makespan", "deadline", "edp"])
@pytest.mark.parametrize("transfers", ["pull", "push"])
def test_without_noise_a_rollout_ends_as_the_run_does(agent, objective, transfers):
    """From every state that the rule comes to, its own choice played on is the rest of its run: the same objective."""
    kinds = tuple(PeKind(kind.name, kind.count, power_w=((2.0,),), idle_w=0.1) for kind in SOC.kinds)
    soc = SOC if objective != "edp" else type(SOC)(SOC.name, kinds, SOC.bandwidth, SOC.latency_us)
    spec = SocDagSpec(soc, transfers=transfers, objective=objective)
    workload = AT_ONCE.draw(np.random.default_rng(1)).with_deadlines(soc, 3.0)
    whole, simulator = Simulator(spec), Simulator(spec)
    for one in (whole, simulator):
        one.reset(workload)
    whole.run(SRPT)
    end, state = loss_of(whole.sim), simulator.state()
    desk, race = agent.desk_for(state), new_race(simulator, spec.num_candidates)
    memory, decision, done, compared = SRPT.new_memory(state), simulator.default_decision(), False, 0
    SRPT.reset(state)
    while not done:
        has_choice = see(state, desk, simulator.default_decision())
        SRPT.decide(state, simulator.default_decision())
        wanted = decision.bind[0]["task"], decision.bind[0]["pe"]
        row = action_of(state, desk.table, decision) if has_choice else -1
        if row == 0 or (row > 0 and tuple(desk.table.rows[row, :2]) == wanted):  # not another one that is as good
            draw_scenario(state, race)
            lived = float(simulator.sim.books[0]["live_us"])
            loss = play_on(state, desk.table, row, race, lived, SRPT.decide_kernel, SRPT.param_array, memory)
            assert loss == pytest.approx(end, rel=1e-9)
            compared += 1
        done = simulator.step(decision).done
    assert compared > 20


def test_rows_are_looked_into_in_the_order_of_their_logits(agent):
    simulator = Simulator(NOISY)
    simulator.reset(AT_ONCE.draw(np.random.default_rng(2)), 3)
    desk, rows = agent.desk_for(simulator.state()), np.zeros(64, np.int64)
    assert see(simulator.state(), desk, simulator.default_decision())
    deepsets_logits(agent.weights, desk.context, desk.candidates, desk.mask, desk.logits)
    live = np.flatnonzero(desk.mask)
    ordered = live[np.argsort(-desk.logits[live])]
    assert len(live) > 5
    for most in (1, 3, 64):
        count = rank_rows(desk, rows, most)
        assert count == min(most, len(live))
        np.testing.assert_array_equal(rows[:count], ordered[:count])


def mean_latency(policy, workload: Workload, seed: int) -> float:
    simulator = Simulator(NOISY)
    simulator.reset(workload, seed)
    policy.run(simulator)
    assert check_schedule(simulator.timeline(), workload, NOISY) == []
    return float((simulator.timeline().job_finish - workload.arrival_us).mean())


def test_a_poor_agent_is_overruled_for_the_better(agent, rollouts):
    pairs = []
    for seed in range(6):
        workload = STREAM.draw(np.random.default_rng(seed))
        pairs.append((mean_latency(rollouts, workload, seed), mean_latency(agent, workload, seed)))
        assert 0 < rollouts.overruled < rollouts.asked
        assert mean_latency(rollouts, workload, seed) == pairs[-1][0]
    better, alone = np.mean(pairs, axis=0)
    assert better < 0.95 * alone


def test_nothing_of_the_future_is_known(rollouts):
    """Other durations of what starts later, and other jobs later: what is bound until then is bound the same way."""
    workload = STREAM.draw(np.random.default_rng(7))
    durations = np.exp(0.5 * noise_draws(workload, 7)) * 5.0
    first = Simulator(NOISY)
    first.reset(workload, durations_us=durations)
    rollouts.run(first)
    before = first.timeline()
    until = float(np.median(before.bound_at))
    later = (before.start >= until) | (before.finish > until)
    changed = np.where(before.start >= until, durations * 3.0, durations)
    changed = np.where(later & (before.start < until), np.maximum(durations, until - before.start) + 9.0, changed)
    arrivals = np.where(workload.arrival_us > until, workload.arrival_us + 50.0, workload.arrival_us)
    other = Workload.from_arrays("other", workload.kind_names, workload.dags, workload.dag_of_job, arrivals)
    second = Simulator(NOISY)
    second.reset(other, durations_us=changed)
    rollouts.run(second)
    after, known = second.timeline(), before.bound_at < until
    assert known.sum() > 10
    np.testing.assert_array_equal(after.bound_at[known], before.bound_at[known])
    np.testing.assert_array_equal(after.pe[known], before.pe[known])
    assert not np.array_equal(after.finish, before.finish)


def test_what_cannot_be_is_refused(agent, rollouts):
    with pytest.raises(InputError, match="1 scenarios"):
        RolloutScheduling("one", agent, SRPT, scenarios=1)
    simulator = Simulator(NOISY.replace(binding="ready"))
    simulator.reset(AT_ONCE.draw(np.random.default_rng(0)))
    with pytest.raises(InputError, match="bound late"):
        rollouts.run(simulator)
