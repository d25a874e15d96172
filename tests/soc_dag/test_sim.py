"""The simulator: hand-worked miniatures, and equality with a plain-Python reference under random decisions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from soc_problems import SMALL_SOC, random_workload, small_spec
from soc_reference import ReferenceSimulator

from schedlab.baselines.soc_dag import RULES
from schedlab.baselines.soc_linear import linear_rule
from schedlab.envs.core.errors import InputError
from schedlab.envs.core.interface import Backend
from schedlab.envs.soc_dag.check import check_durations, check_schedule
from schedlab.envs.soc_dag.metrics import compute_metrics
from schedlab.envs.soc_dag.render import draw_dag, draw_gantt, rgb_array
from schedlab.envs.soc_dag.sim import Simulator
from schedlab.envs.soc_dag.spec import PeKind, Soc, SocDagSpec
from schedlab.envs.soc_dag.state import IDLE, WAIT, resolve_decision
from schedlab.envs.soc_dag.timeline import Timeline
from schedlab.envs.soc_dag.workload import Dag, Workload, noise_draws

CASES = {
    "late": small_spec(),
    "late noise": small_spec(noise="normal", noise_sigma=0.4),
    "levels": small_spec(choose_frequency=True, noise="lognormal", noise_sigma=0.7),
    "push": small_spec(transfers="push", noise="normal", noise_sigma=0.2),
    "ready": small_spec(binding="ready", noise="normal", noise_sigma=0.5),
    "arrival": small_spec(binding="arrival", noise="lognormal", noise_sigma=0.3),
    "whole": small_spec(soc=replace(SMALL_SOC, whole_us=True), binding="ready"),
}


FRUGAL = linear_rule((1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.0, 0.0), "frugal")


def test_random_decisions_meet_circles_of_waiting():
    """The comparison below covers queues that had to be unlocked."""
    unlocked = 0
    for seed in range(12):
        reference = ReferenceSimulator(CASES["arrival"], random_workload(seed), seed)
        rng = np.random.default_rng(seed)
        while not reference.done:
            options = reference.options()
            reference.bind(*options[rng.integers(len(options))])
        unlocked += reference.num_unlocked
    assert unlocked > 10


def test_is_a_backend():
    assert isinstance(Simulator(small_spec()), Backend)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(12))
def test_equals_the_reference_under_random_decisions(case, seed):
    """Every point in time exactly, and before each decision what may be bound; energy to the last digits."""
    spec, workload = CASES[case], random_workload(seed)
    simulator = Simulator(spec)
    simulator.reset(workload, seed)
    reference = ReferenceSimulator(spec, workload, seed)
    rng, decision, steps = np.random.default_rng(seed), simulator.default_decision(), 0
    while not reference.done:
        state, options = simulator.state(), reference.options()
        engine = state.engine[0]
        assert engine["now"] == reference.now
        assert state.ready[: engine["num_ready"]].tolist() == [task.number for task in reference.ready]
        assert engine["num_live"] == len(reference.live)
        assert (engine["num_in_progress"] > 0) == reference.may_wait
        simulator.default_decision()
        if reference.may_wait and rng.random() < 0.25:
            reference.wait()
        else:
            choice = options[rng.integers(len(options))]
            decision.bind[0] = choice
            reference.bind(*choice)
        outcome = simulator.step(decision)
        steps += 1
    assert outcome.done
    assert simulator.state().engine[0]["num_illegal"] == 0
    assert simulator.state().engine[0]["num_unlocked"] == reference.num_unlocked
    timeline = simulator.timeline()
    for name in ("ready_at", "bound_at", "start", "finish", "pe", "level"):
        assert getattr(timeline, name).tolist() == [getattr(task, name) for task in reference.tasks], name
    assert timeline.job_finish.max() == reference.now
    np.testing.assert_allclose(simulator.state().engine[0]["energy"], reference.energy, rtol=1e-12)
    np.testing.assert_allclose(simulator.sim.books[0]["live_us"], reference.live_us, rtol=1e-12)


@pytest.mark.parametrize("rule", [RULES["least_energy"], RULES["slack_reclaiming"], FRUGAL], ids=lambda rule: rule.name)
def test_equals_the_reference_under_rules_that_choose_frequencies(rule):
    """The rule's decisions, levels included, told to the reference: the same levels, times and energy."""
    levels = set()
    for seed in range(6):
        spec, workload = CASES["levels"].replace(noise="none"), random_workload(seed, num_jobs=10)
        simulator, reference = Simulator(spec), ReferenceSimulator(spec, workload, seed)
        simulator.reset(workload, seed)
        rule.reset(simulator.state())
        while not reference.done:
            decision = simulator.default_decision()
            rule.decide(simulator.state(), decision)
            resolve_decision(simulator.state(), decision)
            task, pe, level = decision.bind[0].item()
            default = int(simulator.state().default_level[pe])
            simulator.step(decision)
            if task == WAIT:
                reference.wait()
            else:
                reference.bind(task, pe, level if level >= 0 else default)
        timeline = simulator.timeline()
        for name in ("start", "finish", "pe", "level"):
            assert getattr(timeline, name).tolist() == [getattr(task, name) for task in reference.tasks], name
        np.testing.assert_allclose(simulator.state().engine[0]["energy"], reference.energy, rtol=1e-12)
        levels |= set(zip(SMALL_SOC.kind_of_pe[timeline.pe].tolist(), timeline.level.tolist(), strict=True))
    assert (0, 0) in levels and (rule.name == "least_energy" or (0, 1) in levels)


def test_the_default_decision_finishes_the_work():
    """Waiting always: the backend binds whenever nothing is in progress, so every job is finished."""
    simulator = Simulator(small_spec())
    simulator.reset(random_workload(3))
    while not simulator.step(simulator.default_decision()).done:
        assert simulator.default_decision().bind[0]["task"] == WAIT
    assert np.isfinite(simulator.timeline().finish).all()


# ------------------------------------------------------------------------------------------- worked by hand


def two_pes(**changes) -> SocDagSpec:
    """A `fast` and a `slow` PE; moving a volume of v takes v between them and nothing on one."""
    soc = Soc("two", (PeKind("fast"), PeKind("slow")), bandwidth=((1.0, 1.0), (1.0, 1.0)))
    return SocDagSpec(soc).replace(**changes)


def run(simulator: Simulator, *bindings: tuple[int, int] | None) -> None:
    """Bind (task, PE) one after another; None waits."""
    for binding in bindings:
        decision = simulator.default_decision()
        if binding is not None:
            decision.bind[0] = *binding, -1
        assert not simulator.step(decision).done
    assert simulator.state().engine[0]["num_illegal"] == 0


FORK = Dag.from_arrays("fork", [[2, 4], [3, 5], [4, 6]], [(0, 1), (0, 2)], [1, 2])


def test_late_binding_pays_for_its_data_when_bound():
    """Task 0 on fast until 2, task 1 there from 2 to 5; task 2 is bound to slow at 2: data until 4, runs until 10."""
    for transfers, start in (("pull", 4.0), ("push", 4.0)):
        simulator = Simulator(two_pes(transfers=transfers))
        simulator.reset(Workload.from_arrays("w", ("fast", "slow"), [FORK]))
        run(simulator, (0, 0))
        assert simulator.state().engine[0]["now"] == 2.0
        assert simulator.state().transfer[2].tolist() == ([0.0, 2.0] if transfers == "pull" else [2.0, 4.0])
        run(simulator, (1, 0))
        row = simulator.state().pes[1]
        assert (row["status"], row["task"]) == (IDLE, -1)
        decision = simulator.default_decision()
        decision.bind[0] = 2, 1, -1
        assert simulator.step(decision).done
        assert simulator.timeline().start.tolist() == [0.0, 2.0, start]
        assert simulator.timeline().finish.tolist() == [2.0, 5.0, 10.0]


def test_pushed_data_are_there_before_the_task_is_bound():
    """As above, but task 2 is bound to slow only at 5: pulled data come until 7, pushed ones were there at 4."""
    for transfers, start in (("pull", 7.0), ("push", 5.0)):
        simulator = Simulator(two_pes(transfers=transfers))
        simulator.reset(Workload.from_arrays("w", ("fast", "slow"), [FORK]))
        run(simulator, (0, 0), (1, 0), None)
        assert simulator.state().engine[0]["now"] == 5.0
        decision = simulator.default_decision()
        decision.bind[0] = 2, 1, -1
        simulator.step(decision)
        assert simulator.timeline().start[2] == start


def test_queues_keep_the_order_of_binding():
    """Bound when the job arrives: task 2 stands before task 1 on fast, so task 1 waits until 6."""
    simulator = Simulator(two_pes(binding="arrival"))
    simulator.reset(Workload.from_arrays("w", ("fast", "slow"), [FORK]))
    run(simulator, (0, 0), (2, 0))
    assert simulator.state().pes[0]["num_queued"] == 1
    decision = simulator.default_decision()
    decision.bind[0] = 1, 0, -1
    assert simulator.step(decision).done
    assert simulator.timeline().finish.tolist() == [2.0, 9.0, 6.0]


def test_queues_that_wait_for_each_other_are_unlocked():
    """On fast stands 1 before 2, on slow 3 before 0; 0 -> 1 and 2 -> 3: fast takes task 2 first, and all goes on."""
    dag = Dag.from_arrays("ring", [[1, 1]] * 4, [(0, 1), (2, 3)])
    simulator = Simulator(two_pes(binding="arrival"))
    simulator.reset(Workload.from_arrays("w", ("fast", "slow"), [dag]))
    run(simulator, (1, 0), (2, 0), (3, 1))
    decision = simulator.default_decision()
    decision.bind[0] = 0, 1, -1
    assert simulator.step(decision).done
    assert simulator.state().engine[0]["num_unlocked"] == 1
    assert simulator.timeline().start.tolist() == [2.0, 3.0, 0.0, 1.0]


def test_power_by_active_pes_and_frequency():
    """Two tasks of 10 us on a cluster: alone 1 W, together 1.5 W; at half the frequency 20 us and 0.2 W less."""
    kind = PeKind("core", 2, (500.0, 1000.0), ((0.8, 1.3), (1.0, 1.5)), idle_w=0.1)
    spec = SocDagSpec(Soc("cluster", (kind,)), choose_frequency=True)
    simulator = Simulator(spec)
    simulator.reset(Workload.from_arrays("w", ("core",), [Dag.from_arrays("pair", [[10], [10]])]))
    decision = simulator.default_decision()
    decision.bind[0] = 0, 0, 1
    simulator.step(decision)
    decision.bind[0] = 1, 1, 0
    assert simulator.step(decision).done
    # 0 - 10: the mean of 1.5 and 1.3 W; 10 - 20: 0.8 W, and one core idles
    expected = 10 * 1.4 + 10 * (0.8 + 0.1)
    assert simulator.state().engine[0]["energy"] == pytest.approx(expected)
    timeline, workload = simulator.timeline(), simulator.workload
    assert compute_metrics(timeline, workload, spec.soc)["energy"] == pytest.approx(expected)


def test_illegal_decisions_are_counted_and_wait():
    simulator = Simulator(two_pes())
    simulator.reset(Workload.from_arrays("w", ("fast", "slow"), [FORK]))
    run(simulator, (0, 0))
    for illegal in ((0, 0), (1, 2), (9, 0), (1, 0, 3)):
        decision = simulator.default_decision()
        decision.bind[0] = (*illegal, -1)[:3]
        resolve_decision(simulator.state(), decision)
        assert decision.bind[0]["task"] != illegal[0] or decision.bind[0]["pe"] != illegal[1] or len(illegal) == 3
    assert simulator.state().engine[0]["num_illegal"] == 4


def test_noise_belongs_to_the_execution():
    """Whatever the policy does, a task's draw is its own: durations over nominal times agree between policies."""
    spec, workload = small_spec(noise="lognormal", noise_sigma=0.5), random_workload(4, num_jobs=20)
    shares = []
    for rule in (RULES["late_srpt"], RULES["met"]):
        simulator = Simulator(spec)
        simulator.reset(workload, seed=9)
        simulator.run(rule)
        timeline, times = simulator.timeline(), simulator.state().times
        slowdown = simulator.state().levels["slowdown"][timeline.pe, timeline.level]
        nominal = times[np.arange(workload.num_tasks), timeline.pe] * slowdown
        shares.append((timeline.finish - timeline.start) / nominal)
    np.testing.assert_allclose(shares[0], shares[1], rtol=1e-9)
    assert shares[0].std() > 0.1
    longer = random_workload(4, num_jobs=40)
    np.testing.assert_array_equal(noise_draws(longer, 9)[:30], noise_draws(workload, 9)[:30])


# -------------------------------------------------------------------------------------------- check and metrics


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", ["late_srpt", "eft", "late_laxity", "least_energy", "slack_reclaiming"])
def test_the_checker_accepts_what_the_simulator_does(case, rule):
    spec = CASES[case]
    for seed in range(3):
        workload = random_workload(seed, num_jobs=15)
        simulator = Simulator(spec)
        simulator.reset(workload, seed)
        simulator.run(RULES[rule])
        timeline = simulator.timeline()
        assert check_schedule(timeline, workload, spec) == []
        assert check_durations(timeline, workload, spec, seed) == []
        metrics, engine = compute_metrics(timeline, workload, spec.soc), simulator.state().engine[0]
        assert metrics["energy"] == pytest.approx(engine["energy"], rel=1e-9)
        assert metrics["mean_latency"] * len(workload) == pytest.approx(simulator.sim.books[0]["live_us"])
        assert metrics["deadline_misses"] * len(workload) == pytest.approx(engine["num_late"])
        assert metrics["utilisation"] * engine["now"] * spec.soc.num_pes == pytest.approx(
            simulator.state().pes["active"].sum()
        )


def test_the_checker_finds_what_is_wrong():
    spec, workload = small_spec(), random_workload(1, num_jobs=10)
    simulator = Simulator(spec)
    simulator.reset(workload)
    simulator.run(RULES["late_srpt"])
    timeline = simulator.timeline()
    task = int(np.flatnonzero(timeline.ready_at > timeline.arrival[0] + 20)[0])

    def changed(name: str, value: float) -> Timeline:
        array = getattr(timeline, name).copy()
        array[task] = value
        return replace(timeline, **{name: array})

    wrong = {
        "before": changed("start", timeline.start[task] - 19.5),
        "bound": changed("bound_at", timeline.start[task] + 1),
        "cannot run": changed("pe", 99),
        "operating point": changed("level", 7),
        "finished at": replace(timeline, job_finish=timeline.job_finish + 1),
    }
    for name, broken in wrong.items():
        assert check_schedule(broken, workload, spec), name
    assert check_durations(changed("finish", timeline.finish[task] + 1), workload, spec, 0)
    both = np.where(timeline.pe == 1, 0, timeline.pe)  # two cores' tasks on one
    assert any("runs task" in problem for problem in check_schedule(replace(timeline, pe=both), workload, spec))


def test_a_recorded_run_is_replayed():
    """Durations taken from a noisy run, and the same rule: the same schedule. Other durations are refused."""
    spec, workload = small_spec(noise="lognormal", noise_sigma=0.6, binding="ready"), random_workload(8, num_jobs=12)
    simulator = Simulator(spec)
    simulator.reset(workload, 3)
    simulator.run(RULES["eft"])
    recorded = simulator.timeline()
    replay = Simulator(spec.replace(noise="none"))
    replay.reset(workload, durations_us=recorded.finish - recorded.start)
    replay.run(RULES["eft"])
    np.testing.assert_allclose(replay.timeline().finish, recorded.finish, rtol=1e-12)
    np.testing.assert_array_equal(replay.timeline().pe, recorded.pe)
    for wrong in (np.ones(3), np.full(workload.num_tasks, -1.0), np.full(workload.num_tasks, np.inf)):
        with pytest.raises(InputError, match="durations_us"):
            replay.reset(workload, durations_us=wrong)


def test_a_timeline_is_kept(tmp_path):
    simulator = Simulator(small_spec())
    simulator.reset(random_workload(2))
    simulator.run(RULES["eft"])
    timeline = simulator.timeline()
    timeline.save(tmp_path / "run.npz")
    again = Timeline.load(tmp_path / "run.npz")
    for name in timeline.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(timeline, name), getattr(again, name))


def test_pictures():
    workload = random_workload(2).with_deadlines(SMALL_SOC, 2.0)
    simulator = Simulator(small_spec())
    simulator.reset(workload)
    simulator.run(RULES["eft"])
    for figure in (draw_gantt(simulator.timeline(), workload, SMALL_SOC), draw_dag(workload.dags[0])):
        picture = rgb_array(figure)
        assert picture.shape[2] == 3 and picture.std() > 5
