"""The executor of task graphs: right numbers and possible schedules under every policy, and what it refuses."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from schedlab.agents.soc_dag import load_pointer
from schedlab.baselines.soc_dag import RULES
from schedlab.baselines.soc_static import STATIC, plan_rule
from schedlab.envs.core.errors import InputError
from schedlab.envs.core.interface import Backend
from schedlab.envs.soc_dag.check import check_schedule
from schedlab.envs.soc_dag.library import Graph
from schedlab.envs.soc_dag.metrics import compute_metrics
from schedlab.envs.soc_dag.spec import PeKind, Soc, SocDagSpec
from schedlab.envs.soc_dag.workload import Dag, Workload
from schedlab.real_backend.threads import Executor, core_masks
from schedlab.real_backend.threads_cuda import DEVICE_KERNELS, Lane
from schedlab.real_backend.threads_kernels import KERNELS, compiled_compute, new_store
from schedlab.real_backend.threads_programs import factorisation, find_stream, flow, unmeasured_costs
from schedlab.real_backend.threads_replay import could_begin_at, replay

TILE = 32
COSTS = unmeasured_costs(TILE)
SOC = COSTS.soc({"big": 1, "little": 1})
SPEC = SocDagSpec(SOC)
GRAPHS = ("cholesky_4", "lu_4", "qr_3", "flow_24")


def jobs(name="cholesky_4", num_jobs=1, gap_us=0.0, copies=False, seed=0):
    return find_stream(name, COSTS, gap_us, num_jobs, copies=copies).draw(np.random.default_rng(seed))


def executed(workload, rule, *, soc=SOC, seed=0, **kwargs):
    executor = Executor(SocDagSpec(soc, binding=rule.binding), TILE, **kwargs)
    executor.reset(workload, seed)
    executor.run(rule)
    return executor


def stepped(executor, rule):
    """Run under a rule that is asked from here; the sum of the steps' seconds."""
    rule.reset(executor.state())
    seconds, done = 0.0, False
    while not done:
        decision = executor.default_decision()
        rule.decide(executor.state(), decision)
        outcome = executor.step(decision)
        seconds, done = seconds + outcome.seconds, outcome.done
    return seconds


def check(executor):
    """The record is possible, the numbers are right, and the simulator ends at the same time when told what took what.

    Returns the timeline.
    """
    timeline, workload, soc = executor.timeline(), executor.workload, executor.spec.soc
    spec = executor.spec.replace(soc=Soc(soc.name, soc.kinds))
    assert check_schedule(timeline, workload, spec, tolerance_us=0.0) == []
    assert executor.residuals().max() < 1e-13
    again = replay(timeline, workload, soc)
    np.testing.assert_array_equal(again.finish, timeline.finish)
    np.testing.assert_array_equal(again.pe, timeline.pe)
    assert (could_begin_at(timeline, workload) <= timeline.start).all()
    return timeline


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("copies", [False, True])
def test_numbers_are_right_and_schedules_possible(graph, copies):
    workload = jobs(graph, copies=copies)
    for name in ("eft", "late_rank"):
        check(executed(workload, RULES[name]))


@pytest.mark.parametrize("name", ["met", "olb", "etf", "min_min", "heft_rt", "late_fifo", "late_srpt", "heft", "peft"])
def test_every_policy_computes_the_same(name):
    workload = jobs("cholesky_5")
    if name in RULES:
        rule = RULES[name]
    else:
        rule = plan_rule(name, [STATIC[name](Graph.of(dag, SOC)) for dag in workload.dags])
    timeline = check(executed(workload, rule))
    assert compute_metrics(timeline, workload, SOC)["makespan"] == timeline.finish.max()


def test_results_do_not_depend_on_the_schedule():
    """Factors of two unlike schedules agree, on big PEs to the bit: the same kernels in the same order."""
    factors = []
    both, little, big = {"big": 1, "little": 1}, {"little": 2}, {"big": 2}
    for counts, name in ((both, "eft"), (little, "met"), (big, "olb"), (big, "met")):
        costs = unmeasured_costs(TILE, tuple(counts))
        workload = Workload.from_arrays("lu", costs.kinds, [factorisation("lu", 5, costs)])
        factors.append(executed(workload, RULES[name], soc=costs.soc(counts)).tiles().copy())
    np.testing.assert_array_equal(factors[2], factors[3])
    for other in factors[1:]:
        np.testing.assert_allclose(other, factors[0], rtol=0, atol=1e-11 * np.abs(factors[0]).max())


def test_a_step_asks_the_caller_and_restores_it():
    before = os.sched_getaffinity(0)
    executor = Executor(SPEC, TILE)
    assert isinstance(executor, Backend)
    executor.reset(jobs("qr_3"))
    assert executor.state().engine[0]["now"] == 0.0 and executor.state().engine[0]["num_ready"] == 1
    seconds = stepped(executor, RULES["eft"])
    timeline = check(executor)
    assert seconds * 1e6 == pytest.approx(timeline.finish.max(), rel=1e-6)
    assert os.sched_getaffinity(0) == before
    assert executor.step(executor.default_decision()).done
    assert executor.num_decisions >= executor.workload.num_tasks and executor.deciding_us > 0
    assert executor.disturbed_us().shape == (2,) and (executor.disturbed_us() >= 0).all()


@pytest.mark.parametrize("binding", ["late", "ready", "arrival"])
@pytest.mark.parametrize("how", ["run", "step"])
def test_streams_arrive_by_the_clock(binding, how):
    workload = jobs("mix_2", num_jobs=8, gap_us=700.0, seed=1)
    executor = Executor(SPEC.replace(binding=binding), TILE)
    executor.reset(workload)
    if how == "run":
        executor.run(RULES["eft"])
    else:
        stepped(executor, RULES["eft"])
    timeline = check(executor)
    first = timeline.first_task[:-1]
    assert (timeline.start[first] >= workload.arrival_us).all()
    assert timeline.finish.max() >= workload.arrival_us[-1]


def test_a_policy_that_only_waits_is_served_by_the_default():
    executor = Executor(SPEC, TILE)
    executor.reset(jobs("cholesky_3"))
    while not executor.step(executor.default_decision()).done:
        pass
    timeline = check(executor)
    order = np.argsort(timeline.start)
    assert (timeline.start[order[1:]] >= timeline.finish[order[:-1]]).all()  # one task at a time


def test_illegal_decisions_are_counted_and_do_no_harm():
    executor = Executor(SPEC, TILE)
    executor.reset(jobs("cholesky_3"))
    done = False
    while not done:
        decision = executor.default_decision()
        decision.bind[0] = (99, 7, 3)
        done = executor.step(decision).done
    check(executor)
    assert executor.state().engine[0]["num_illegal"] > 0


def test_a_run_may_be_given_up():
    executor = Executor(SPEC, TILE)
    for _ in range(3):
        executor.reset(jobs("cholesky_4"))
        decision = executor.default_decision()
        RULES["eft"].reset(executor.state())
        RULES["eft"].decide(executor.state(), decision)
        assert not executor.step(decision).done
        with pytest.raises(RuntimeError, match="has begun already"):
            executor.run(RULES["eft"])
    executor.reset(jobs("cholesky_4"))
    executor.run(RULES["eft"])
    check(executor)
    executor.close()
    with pytest.raises(RuntimeError, match="call reset"):
        executor.state()


def test_more_pes_than_cores_still_compute():
    soc = COSTS.soc({"big": 2, "little": 3})
    executor = executed(jobs("cholesky_5"), RULES["late_rank"], soc=soc, cores=[min(os.sched_getaffinity(0))])
    assert executor.is_crowded
    check(executor)
    roomy = Executor(SocDagSpec(COSTS.soc({"big": 1})), TILE)
    assert not roomy.is_crowded


def test_data_move_only_where_they_must():
    """On one PE with memories of their own nothing is copied; on two, what the other made."""
    workload = jobs("flow_24", copies=True)
    alone = executed(workload, plan_rule("alone", [one_pe_plan(workload.dags[0])]))
    check(alone)
    both = executed(workload, RULES["olb"])
    timeline = check(both)
    dag = workload.dags[0]
    crossing = {int(b) for a, b in dag.edges if timeline.pe[a] != timeline.pe[b]}
    assert crossing and (both.copy_us()[sorted(crossing)] > 0).all()
    assert len(set(alone.timeline().pe.tolist())) == 1


def one_pe_plan(dag):
    """All tasks of a graph on PE 0, in their order."""
    from schedlab.baselines.soc_static import plan_of_order

    n = dag.num_tasks
    return plan_of_order(Graph.of(dag, SOC), np.zeros(n, np.int64), np.arange(n))


def test_the_same_seed_draws_the_same_data():
    workload = jobs("cholesky_3", num_jobs=2)
    tiles = []
    for seed in (1, 1, 2):
        executor = Executor(SPEC, TILE)
        executor.reset(workload, seed)
        tiles.append(executor.tiles().copy())
    np.testing.assert_array_equal(tiles[0], tiles[1])
    assert not np.array_equal(tiles[0], tiles[2])
    half = len(tiles[0]) // 2
    assert not np.array_equal(tiles[0][:half], tiles[0][half:])  # jobs of one graph have data of their own


def test_a_kernel_that_fails_ends_the_run():
    executor = Executor(SPEC, TILE)
    executor.reset(jobs("cholesky_3"))
    executor.tiles()[:] = -1.0  # not positive definite
    with pytest.raises(RuntimeError, match=r"task 0 \(POTRF 0,0 of job 0, cholesky-3\) failed"):
        executor.run(RULES["eft"])
    executor.reset(jobs("cholesky_3"))
    executor.run(RULES["eft"])
    check(executor)


# ----------------------------------------------------------------------------------------------- what is refused


def refused(match, **changes):
    with pytest.raises(InputError, match=match):
        Executor(SPEC.replace(**changes), TILE)


def test_specs_that_cores_cannot_be():
    refused("has PEs of kind dsp", soc=Soc("phone", (PeKind("big"), PeKind("dsp"))))
    refused("the machine makes its own", noise="normal", noise_sigma=0.1)
    refused("choose_frequency", choose_frequency=True)
    with pytest.raises(InputError, match="tile is 0"):
        Executor(SPEC, 0)
    with pytest.raises(InputError, match="cores that this process may use"):
        Executor(SPEC, TILE, cores=[4095])


def test_graphs_that_mean_nothing_are_refused():
    executor = Executor(SPEC, TILE)

    def load(*dags):
        executor.reset(Workload.from_arrays("given", SOC.kind_names, dags))

    with pytest.raises(InputError, match=r"task 't0' of graph 'own' names no kernel"):
        load(Dag.from_arrays("own", [[1.0, 2.0]]))
    names = ["POTRF 0,0", "TRSM 1,0", "SYRK 1,1", "POTRF 1,1"]
    fake = Dag.from_arrays("cholesky-2", [[1.0, 1.0]] * 4, task_names=names)
    with pytest.raises(InputError, match="has not the tasks and precedences of a tiled cholesky of 2 x 2"):
        load(fake)  # its tasks could run at once
    with pytest.raises(InputError, match="cycle"):
        Dag.from_arrays("own", [[1.0, 1.0]] * 2, [(0, 1), (1, 0)], task_names=["FFT a", "FIR b"])
    with pytest.raises(InputError, match=r"has times on the PE kinds cpu, gpu.*cpu, gpu is unknown"):
        executor.reset(Workload.from_arrays("given", ("cpu", "gpu"), [flow(4, COSTS)]))
    with pytest.raises(InputError, match="power of two"):
        Executor(SPEC, 48).reset(jobs("flow_24"))
    with pytest.raises(InputError, match=r"GB for its data.*fewer jobs"):
        Executor(SPEC, 4096).reset(jobs("cholesky_40"))
    with pytest.raises(RuntimeError, match="call reset"):
        executor.state()  # nothing half loaded


def test_masks_name_their_cores():
    masks = core_masks([[0], [1, 9]])
    assert masks[0, 0] == 1 and masks[1, 0] == 2 and masks[1, 1] == 2 and masks.sum() == 5


# ------------------------------------------------------------------------------------------ streams of a device


def operands(kernel, rng):
    """Tiles on which a kernel works: factors where it needs some, else noise."""
    tiles = rng.standard_normal((3, TILE, TILE)) + 0.0
    tiles[0] += 4 * np.sqrt(TILE) * np.eye(TILE)
    if KERNELS[kernel] == "POTRF":
        tiles[0] += tiles[0].T
    return tiles[: {"POTRF": 1, "LU": 1, "GEMM": 3, "BMOD": 3}.get(KERNELS[kernel], 2)]


@pytest.mark.parametrize("kernel", DEVICE_KERNELS, ids=lambda kernel: KERNELS[kernel])
def test_a_lane_computes_what_a_core_does(kernel):
    tiles = operands(kernel, np.random.default_rng(kernel))
    size, num = TILE * TILE, len(tiles)
    store = new_store(num * size, num, TILE, [TILE])
    store.data[: num * size] = tiles.ravel()
    store.places[0, :num] = size * np.arange(num)
    host = store.data.copy()
    lane = Lane("cpu", host, TILE, num)
    lane.load(store.places[0, :num])
    assert lane.compute(kernel, num)
    lane.store(store.places[0, :num], np.arange(num) == num - 1)
    compute = compiled_compute().ctypes
    assert compute(store.at.ctypes.data, store.tables, 0, kernel, num, TILE)
    last = slice((num - 1) * size, num * size)
    ours, theirs = store.data[last].reshape(TILE, TILE).T, host[last].reshape(TILE, TILE).T
    if KERNELS[kernel] in ("POTRF", "SYRK"):
        ours, theirs = np.tril(ours), np.tril(theirs)
    np.testing.assert_allclose(theirs, ours, atol=1e-11)


def test_a_lane_works_among_cores():
    costs = unmeasured_costs(TILE, ("big", "gpu"))
    soc = costs.soc({"big": 1, "gpu": 1})
    for name in ("cholesky_4", "flow_24"):
        workload = find_stream(name, costs).draw(np.random.default_rng(0))
        for rule in (RULES["olb"], RULES["late_rank"]):
            executor = executed(workload, rule, soc=soc, device="cpu")
            timeline = check(executor)
            assert (timeline.pe == 1).any()


def test_a_lane_that_fails_ends_the_run(monkeypatch):
    costs = unmeasured_costs(TILE, ("big", "gpu"))
    executor = Executor(SocDagSpec(costs.soc({"big": 1, "gpu": 1})), TILE, device="cpu")
    executor.reset(find_stream("cholesky_4", costs).draw(np.random.default_rng(0)))
    monkeypatch.setattr(Lane, "load", lambda self, offsets: 1 / 0)
    with pytest.raises(RuntimeError, match="a PE's thread failed") as caught:
        executor.run(RULES["olb"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_what_a_lane_cannot_do():
    costs = unmeasured_costs(TILE, ("big", "gpu"))
    spec = SocDagSpec(costs.soc({"big": 1, "gpu": 1}))
    with pytest.raises(InputError, match="'nonesuch' is not available"):
        Executor(spec, TILE, device="nonesuch")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device 'cuda' is not available"):
            Executor(spec, TILE)
    with pytest.raises(InputError, match="kind gpu cannot run GEQRT, ORMQR, TSMQR, TSQRT"):
        Executor(spec, TILE, device="cpu").reset(find_stream("qr_3", costs).draw(np.random.default_rng(0)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_of_a_gpu():
    costs = unmeasured_costs(256, ("big", "gpu"))
    soc = costs.soc({"big": 1, "gpu": 2})
    for name in ("cholesky_6", "lu_5"):
        executor = Executor(SocDagSpec(soc), 256)
        executor.reset(find_stream(name, costs).draw(np.random.default_rng(0)))
        executor.run(RULES["olb"])
        check(executor)


def test_a_learned_policy_decides_in_the_threads_of_the_pes():
    policy = load_pointer()
    executor = executed(jobs("cholesky_4", 3), policy)
    check(executor)
    assert policy.failures[0] == 0 and executor.state().engine[0]["num_illegal"] == 0
    executor.close()
    policy.weights.query_b[:] = np.nan  # no logit is finite any more: the default binding instead
    executor = executed(jobs("cholesky_4"), policy)
    check(executor)
    assert policy.failures[0] > 0
    executor.close()
