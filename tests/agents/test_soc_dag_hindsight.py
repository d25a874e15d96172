"""The rolling horizon with the future known: possible schedules, never worse than the rule that plays it."""

from __future__ import annotations

import numpy as np
import pytest
from untrained import untrained_agent

from schedlab.agents.soc_dag import PointerScheduling, see
from schedlab.agents.soc_dag_hindsight import RULES_OWN, HindsightScheduling, play_known, race_of
from schedlab.baselines.soc_dag import RULES
from schedlab.envs.core.errors import InputError
from schedlab.envs.soc_dag.check import check_schedule
from schedlab.envs.soc_dag.env import loss_of
from schedlab.envs.soc_dag.generate import random_stream
from schedlab.envs.soc_dag.sim import Simulator
from schedlab.envs.soc_dag.spec import PeKind, Soc, SocDagSpec

SRPT, NUM_JOBS = RULES["late_srpt"], 6
PLAIN, STREAM = random_stream(6, num_tasks=(8, 14), num_jobs=NUM_JOBS, gap_us=20.0)
SOC = Soc(
    PLAIN.name,
    tuple(PeKind(kind.name, kind.count, power_w=((2.0,),), idle_w=0.1) for kind in PLAIN.kinds),
    PLAIN.bandwidth,
    PLAIN.latency_us,
)
NOISY = SocDagSpec(SOC, transfers="push", noise="lognormal", noise_sigma=0.5)


@pytest.fixture(scope="module")
def agent() -> PointerScheduling:
    return untrained_agent()


def run(policy, spec: SocDagSpec, seed: int) -> float:
    workload = STREAM.draw(np.random.default_rng(seed)).with_deadlines(SOC, 2.0)
    simulator = Simulator(spec)
    simulator.reset(workload, seed)
    policy.run(simulator)
    assert check_schedule(simulator.timeline(), workload, spec) == []
    return float(loss_of(simulator.sim))


@pytest.mark.parametrize("objective", ["latency", "deadline", "edp"])
@pytest.mark.parametrize("transfers", ["pull", "push"])
def test_played_by_a_rule_it_ends_as_the_rule_does(agent, objective, transfers):
    """With noise, from every state that the rule comes to: its own choice played on is the rest of its run."""
    spec = NOISY.replace(objective=objective, transfers=transfers)
    workload = STREAM.draw(np.random.default_rng(3)).with_deadlines(SOC, 2.0)
    end, simulator = run(SRPT, spec, 3), Simulator(spec)
    simulator.reset(workload, 3)
    state, sim = simulator.state(), simulator.sim
    desk, race = agent.desk_for(state), race_of(simulator, spec.num_candidates)
    memory, decision, done, steps = SRPT.new_memory(state), simulator.default_decision(), False, 0
    SRPT.reset(state)
    while not done:
        see(state, desk, simulator.default_decision())
        more = NUM_JOBS - int(state.engine[0]["num_arrived"])
        loss = play_known(sim, race, desk.table, RULES_OWN, more, SRPT.decide_kernel, SRPT.param_array, memory)
        assert loss == pytest.approx(end, rel=1e-4, abs=1e-4)  # the weight of ties
        SRPT.decide(state, simulator.default_decision())
        done, steps = simulator.step(decision).done, steps + 1
    assert steps > 60 and loss_of(sim) == end


@pytest.mark.parametrize("objective", ["latency", "deadline", "edp"])
def test_it_is_never_worse_than_its_rule_and_mostly_better(agent, objective):
    """All that will come is played out, the rule's choice too: what is taken is never worse than the rule's run."""
    spec, losses = NOISY.replace(objective=objective), []
    for seed in range(8):
        known = HindsightScheduling("known", agent, SRPT, horizon_jobs=NUM_JOBS)
        assert known.is_oracle
        losses.append((run(known, spec, seed), run(SRPT, spec, seed)))
    known_loss, rule_loss = np.array(losses).T
    assert (known_loss <= rule_loss * (1 + 1e-9) + 1e-4).all()
    assert known_loss.mean() < 0.97 * rule_loss.mean()


def test_what_cannot_be_is_refused(agent):
    with pytest.raises(InputError, match="-1 jobs, 6 rows"):
        HindsightScheduling("known", agent, SRPT, horizon_jobs=-1)
    simulator = Simulator(NOISY.replace(binding="ready"))
    simulator.reset(STREAM.draw(np.random.default_rng(0)))
    with pytest.raises(InputError, match="bound late"):
        HindsightScheduling("known", agent, SRPT).run(simulator)
