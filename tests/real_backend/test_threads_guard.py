"""The guard around policies that decide compiled, in the threads of the PEs: no task is lost, every failure counted."""

from __future__ import annotations

import numpy as np
import pytest

from schedlab.agents.soc_dag import PointerScheduling, load_pointer
from schedlab.baselines.soc_dag import RULES
from schedlab.envs.core.errors import InputError
from schedlab.envs.core.kernel import njit_borrowed
from schedlab.envs.soc_dag.check import check_schedule
from schedlab.envs.soc_dag.rule import Rule
from schedlab.envs.soc_dag.sim import Simulator
from schedlab.envs.soc_dag.spec import Soc, SocDagSpec
from schedlab.real_backend.threads import Executor
from schedlab.real_backend.threads_guard import CompiledGuard
from schedlab.real_backend.threads_programs import find_stream, unmeasured_costs

TILE = 32
COSTS = unmeasured_costs(TILE)
SOC = COSTS.soc({"big": 1, "little": 1})
JOBS = find_stream("cholesky_4", COSTS, num_jobs=3).draw(np.random.default_rng(0))


@njit_borrowed
def asks_for_nonsense(state, params, memory, decision):
    decision.bind[0].task = 10**6


@njit_borrowed
def waits_always(state, params, memory, decision):
    pass


@njit_borrowed
def thinks_too_long(state, params, memory, decision):
    for _ in range(3_000_000):
        memory[0] = np.sqrt(memory[0] + 2.0)
    decision.bind[0].task = state.ready[0]
    decision.bind[0].pe = 0


def run(policy, **kwargs):
    """Run the jobs on the cores under the guarded policy, and check them. Returns the guard and its report."""
    guard, executor = CompiledGuard(policy, **kwargs), Executor(SocDagSpec(SOC, binding=policy.binding), TILE)
    executor.reset(JOBS)
    executor.run(guard)
    timeline, spec = executor.timeline(), executor.spec.replace(soc=Soc(SOC.name, SOC.kinds))
    assert np.isfinite(timeline.finish).all() and executor.state().engine[0]["num_illegal"] == 0
    assert check_schedule(timeline, JOBS, spec, tolerance_us=0.0) == []
    assert executor.residuals().max() < 1e-13
    report = guard.report()
    assert report["decisions"] == executor.num_decisions
    executor.close()
    return guard, report


def failures(report):
    return tuple(report[f"failures_{kind}"] for kind in ("raised", "invalid", "timeout"))


@pytest.mark.parametrize("policy", [load_pointer(), RULES["late_srpt"], RULES["heft_rt"]], ids=lambda p: p.name)
def test_a_sound_policy_is_left_alone(policy):
    guard, report = run(policy)
    assert failures(report) == (0, 0, 0)
    assert len(guard.decision_wall_s) == len(guard.decision_cpu_s) == report["decisions"] >= JOBS.num_tasks
    assert 0 < report["decision_wall_p50_s"] <= report["decision_wall_p99_s"] < 1.0


def test_weights_that_give_nan_lose_no_task():
    """Every decision with a choice becomes the default, and is counted; the next run is counted on top."""
    sound = load_pointer()
    weights = [np.array(array) for array in sound.weights]
    weights[0].flat[0] = np.nan
    broken = PointerScheduling("broken", type(sound.weights)(*weights), sound.num_candidates)
    guard, report = run(broken)
    raised, invalid, late = failures(report)
    assert raised > JOBS.num_tasks // 2 and (invalid, late) == (0, 0)
    simulator = Simulator(SocDagSpec(SOC))
    simulator.reset(JOBS)
    kernel, arguments = guard.compiled(simulator.state(), simulator.default_decision())
    kernel(*arguments)
    bind = arguments[1].bind[0]
    assert bind["task"] == simulator.state().ready[0] and bind["pe"] >= 0
    assert failures(guard.report()) == (raised + 1, 0, 0)


@pytest.mark.parametrize("kernel", [asks_for_nonsense, waits_always])
def test_what_cannot_be_carried_out_becomes_the_default(kernel):
    _, report = run(Rule("broken", kernel))
    raised, invalid, late = failures(report)
    # waiting is a decision while something runs; when nothing does, it would last for ever
    assert invalid == report["decisions"] if kernel is asks_for_nonsense else 0 < invalid < report["decisions"]
    assert (raised, late) == (0, 0)


def test_a_policy_that_takes_too_long_is_not_asked_again():
    guard, report = run(Rule("slow", thinks_too_long, memory_size=1), time_budget_s=1e-3)
    assert failures(report) == (0, 0, 1)
    assert len(guard.decision_wall_s) == 1 and guard.decision_wall_s[0] > 1e-3
    assert report["decisions"] >= JOBS.num_tasks


@pytest.mark.parametrize("budget", [0.0, -1.0, float("inf")])
def test_budgets_are_checked(budget):
    with pytest.raises(InputError, match="time_budget_s"):
        CompiledGuard(RULES["eft"], budget)
