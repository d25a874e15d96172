"""Costs of kernels: fitted to executions inside runs, written and read, used by the simulator; and the guard."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest

from schedlab.baselines.soc_dag import RULES
from schedlab.envs.core.errors import InputError
from schedlab.envs.soc_dag.check import check_schedule
from schedlab.envs.soc_dag.sim import Simulator
from schedlab.envs.soc_dag.spec import Soc, SocDagSpec
from schedlab.real_backend.calibrate_threads import (
    FAMILIES,
    Samples,
    ThreadsCalibration,
    check_cores,
    errors_of,
    filled,
    lot_rule,
    predicted_us,
    slowed,
    slowness_of,
    spread_of,
    typical,
)
from schedlab.real_backend.threads import Executor
from schedlab.real_backend.threads_guard import GuardedScheduler
from schedlab.real_backend.threads_kernels import FFT, GEMM, KERNELS
from schedlab.real_backend.threads_programs import (
    FACTOR_KERNELS,
    GRAPHS,
    KernelCosts,
    factorisation,
    find_stream,
    tile_bytes,
    unmeasured_costs,
)

TILE = 16
TIMES = {kernel: (10.0 + i, 20.0 + 2 * i) for i, kernel in enumerate(KERNELS)}
COSTS = KernelCosts(
    TILE, ("big", "little"), TIMES, handoff_us=2.0, copy_bandwidth=1000.0, name="known", source="made up"
)


def made_up(slowness=(1.0, 1.0), noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    kernel, kind = rng.integers(0, len(KERNELS), 4000), rng.integers(0, 2, 4000)
    us = np.array([TIMES[KERNELS[a]][b] * slowness[b] for a, b in zip(kernel, kind, strict=True)])
    us *= np.exp(noise * rng.standard_normal(len(us)))
    return Samples(kernel, kind, us, np.full(len(us), 2.0), np.zeros(len(us)), np.zeros(len(us)))


# ------------------------------------------------------------------------------------------------------- figures


def test_costs_predict_what_they_say():
    samples = made_up()
    np.testing.assert_array_equal(predicted_us(COSTS, samples), samples.us)
    found = errors_of(COSTS, samples)
    assert found["total"] == found["median"] == found["handoff_us"] == 0.0
    assert spread_of(COSTS, samples) == 0.0


def test_a_slower_pe_is_told_from_a_slower_kernel():
    samples = made_up((1.5, 0.8), noise=0.1)
    slowness = slowness_of(COSTS, samples)
    assert slowness == pytest.approx([1.5, 0.8], rel=0.02)
    assert spread_of(COSTS, samples) == pytest.approx(0.1, rel=0.1)
    there = slowed(COSTS, slowness)
    assert there.of("GEMM") == pytest.approx((13.0 * slowness[0] + 2.0, 26.0 * slowness[1] + 2.0))
    only_big = Samples(*(column[samples.kind == 0] for column in samples))
    assert slowness_of(COSTS, only_big)[1] == 1.0


def test_a_run_on_a_busy_machine_is_not_typical():
    assert typical([np.array([1.0, 3.0]), np.array([2.0]), np.array([500.0]), np.array([])]) == 2.0
    assert np.isnan(typical([]))


def test_a_kernel_that_a_kind_never_ran_is_guessed_from_the_others():
    nan = float("nan")
    times = filled(np.array([[10.0, 20.0], [30.0, 90.0], [5.0, nan], [7.0, 14.0]]))
    np.testing.assert_array_equal(times, [[10.0, 20.0], [30.0, 90.0], [5.0, 10.0], [7.0, 14.0]])
    with pytest.raises(InputError, match="PE kind 1 ran nothing"):
        filled(np.array([[10.0, nan]]))


def test_costs_become_graphs_and_machines():
    dag = factorisation("cholesky", 3, COSTS, copies=True)
    gemm = next(i for i, name in enumerate(dag.task_names) if name.startswith("GEMM"))
    assert dag.times[gemm].tolist() == [15.0, 28.0]
    assert dag.volumes.max() == tile_bytes(TILE) == 8 * TILE * TILE
    soc = COSTS.soc({"big": 2, "little": 1})
    assert soc.pe_names == ("big.0", "big.1", "little") and soc.bandwidth[0][1] == 1000.0
    for name in ("cholesky_3", "qr_2", "flow_9", "flows_9", "mix_2"):
        stream = find_stream(name, COSTS, 5.0, 3)
        assert stream.draw(np.random.default_rng(0)).num_tasks > 0
    assert len(GRAPHS) == 4 and set(FAMILIES) == {*FACTOR_KERNELS, "flow", "mix"}


def test_costs_are_written_whole_and_read_back(tmp_path):
    path = tmp_path / "new" / "costs.json"
    COSTS.save(path)
    assert KernelCosts.load(path) == COSTS
    endless = replace(COSTS, copy_bandwidth=math.inf)
    endless.save(path)
    assert KernelCosts.load(path) == endless
    assert [p.name for p in path.parent.iterdir()] == ["costs.json"]


def test_what_are_no_costs(tmp_path):
    path = tmp_path / "costs.json"
    with pytest.raises(InputError, match=r"costs.json: not the costs of kernels.*schedlab calibrate threads"):
        KernelCosts.load(path)
    for change, match in (
        ({"kinds": ["big", "dsp"]}, "Give a positive tile, and of"),
        ({"times_us": {"GEMM": [1.0, -1.0]}}, r"costs of kernel 'GEMM' are \(1.0, -1.0\)"),
        ({"times_us": {"SORT": [1.0, 1.0]}}, "kernel 'SORT'"),
        ({"times_us": [1.0]}, "not the costs of kernels"),
        ({"size": 3}, "not the costs of kernels"),
    ):
        COSTS.save(path)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(InputError, match=match):
            KernelCosts.load(path)
    with pytest.raises(InputError, match="hold no time of kernel FFT"):
        KernelCosts(TILE, ("big",), {"FIR": (1.0,)}).of("FFT")
    with pytest.raises(InputError, match=r"PEs of kinds \['little', 'big'\]"):
        COSTS.soc({"little": 1, "big": 1})
    with pytest.raises(InputError, match=r"no jobs called 'sort_3'.*cholesky_<tiles>"):
        find_stream("sort_3", COSTS)


# ----------------------------------------------------------------------------------------------------- measuring

two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


@two_cores
def test_a_calibration_measures_every_kernel_on_every_kind():
    calibration = ThreadsCalibration({"big": 1, "little": 1}, TILE, families=("cholesky", "flow"), copies=True)
    with pytest.raises(InputError, match="nothing was measured"):
        calibration.fit()
    for _ in range(3):
        calibration.measure_pass()
    costs, report = calibration.fit("mine")
    assert costs.name == "mine" and set(costs.times_us) == {"POTRF", "TRSM", "SYRK", "GEMM", "FFT", "FIR", "MATMUL"}
    assert all(us > 0 for times in costs.times_us.values() for us in times)
    assert costs.handoff_us > 0 and 0 < costs.copy_bandwidth < math.inf
    assert report["fit"]["executions"] == 2 * report["held_out"]["executions"] > 0
    assert json.loads(json.dumps(report)) == report and "held_out" in costs.source

    stream = find_stream("cholesky_6", costs, copies=True)
    simulator = Simulator(SocDagSpec(costs.soc({"big": 1, "little": 1})))
    simulator.reset(stream.draw(np.random.default_rng(0)))
    simulator.run(RULES["late_rank"])
    assert simulator.timeline().finish.max() > 0
    calibration.close()


@two_cores
def test_runs_of_the_calibration_stand_around_another():
    calibration = ThreadsCalibration({"big": 1, "little": 1}, TILE, families=("lu",))
    executor, order = Executor(SocDagSpec(calibration.soc), TILE), []
    workload = find_stream("lu_5", calibration.costs).draw(np.random.default_rng(0))

    def load():
        order.append("load")
        executor.reset(workload)

    def run():
        order.append("run")
        executor.run(RULES["eft"])

    before = calibration.measure_around("lu", executor, load, run)
    assert before == 0 and len(calibration.runs["lu"]) == 2 and calibration.num_disturbed <= 1
    assert order == ["load", "run"] * (1 + calibration.num_repeated)
    assert executor.residuals().max() < 1e-13


def test_pes_that_share_a_core_are_not_measured():
    core = min(os.sched_getaffinity(0))
    with pytest.raises(InputError, match="2 PEs on 1 cores: times would say nothing"):
        check_cores(Executor(SocDagSpec(COSTS.soc({"big": 1, "little": 1})), TILE, cores=[core]))


def test_lots_leave_no_pe_idle():
    simulator = Simulator(SocDagSpec(COSTS.soc({"big": 2, "little": 2})))
    workload = find_stream("cholesky_8", COSTS).draw(np.random.default_rng(0))
    seen = []
    for seed in range(2):
        simulator.reset(workload)
        simulator.run(lot_rule(seed))
        timeline = simulator.timeline()
        assert check_schedule(timeline, workload, simulator.spec) == []
        assert len(np.unique(timeline.pe)) == 4
        seen.append(timeline.pe)
    assert (seen[0] != seen[1]).mean() > 0.4


# --------------------------------------------------------------------------------------------------------- guard


class Broken:
    """A policy that decides like a rule, until it does what it is told to."""

    name, is_oracle, binding = "broken", False, "late"

    def __init__(self, fault, after=3):
        self.fault, self.left, self.rule = fault, after, RULES["eft"]

    def reset(self, state):
        self.rule.reset(state)

    def decide(self, state, decision):
        self.left -= 1
        if self.left < 0:
            return self.fault(state, decision)
        self.rule.decide(state, decision)


def raises(state, decision):
    raise ValueError("no idea")


def asks_for_nonsense(state, decision):
    decision.bind[0] = (10**6, 0, -1)


def scribbles_and_raises(state, decision):
    state.tasks["status"] = 0
    decision.bind[0] = (0, 1, 0)
    raise ValueError("no idea")


@pytest.mark.parametrize(
    ("fault", "kind"), [(raises, "raised"), (asks_for_nonsense, "invalid"), (scribbles_and_raises, "raised")]
)
def test_a_policy_that_fails_is_replaced_by_earliest_finish_time(fault, kind):
    told = []
    guard = GuardedScheduler(Broken(fault), on_failure=lambda *failure: told.append(failure))
    executor = Executor(SocDagSpec(COSTS.soc({"big": 1, "little": 1})), TILE)
    executor.reset(find_stream("cholesky_4", COSTS).draw(np.random.default_rng(0)))
    guard.reset(executor.state())
    done = False
    while not done:
        decision = executor.default_decision()
        guard.decide(executor.state(), decision)
        done = executor.step(decision).done
    timeline, soc = executor.timeline(), executor.spec.soc
    spec = executor.spec.replace(soc=Soc(soc.name, soc.kinds))
    assert check_schedule(timeline, executor.workload, spec, tolerance_us=0.0) == []
    assert executor.residuals().max() < 1e-13
    assert guard.failures[kind] == guard.num_decisions - 3 == len(told) > 0
    assert executor.state().engine[0]["num_illegal"] == 0
    assert guard.report()["decisions"] == guard.num_decisions and guard.default_name == "earliest finish time"


def test_waiting_for_nothing_is_a_failure():
    guard = GuardedScheduler(Broken(lambda state, decision: None, after=0), on_failure=lambda *_: None)
    simulator = Simulator(SocDagSpec(COSTS.soc({"big": 1, "little": 1})))
    simulator.reset(find_stream("cholesky_3", COSTS).draw(np.random.default_rng(0)))
    guard.reset(simulator.state())
    decision = simulator.default_decision()
    guard.decide(simulator.state(), decision)
    assert guard.failures["invalid"] == 1 and decision.bind[0]["task"] == 0 and decision.bind[0]["pe"] == 0


def test_kernels_have_the_numbers_of_their_names():
    assert KERNELS[GEMM] == "GEMM" and KERNELS[FFT] == "FFT"
    assert set(unmeasured_costs(8).times_us) == set(KERNELS)
