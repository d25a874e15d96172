"""What the action table works out beyond the State, against plain Python; and which rows it leaves out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from soc_problems import SMALL_SOC, random_workload, small_spec

from schedlab.baselines.soc_dag import RULES
from schedlab.envs.soc_dag.env import SocDagVectorEnv
from schedlab.envs.soc_dag.generate import spark_job, spark_stream
from schedlab.envs.soc_dag.library import Graph, write_optimistic_costs
from schedlab.envs.soc_dag.look_ahead import (
    BEST_PE,
    BY_END,
    BY_FINISH,
    COMING_AT,
    COMING_END,
    FIRST_FINISH,
    IDLE_SHARE,
    JOB_END,
    LAX_BY_END,
    LAX_BY_FINISH,
    LEAST_ENERGY,
    REGRET,
    WORK_LEFT,
)
from schedlab.envs.soc_dag.spec import SocDagSpec
from schedlab.envs.soc_dag.state import BUSY, IDLE, WAITING, empty_decision
from schedlab.envs.soc_dag.table import (
    CANDIDATE_FEATURES,
    NUM_CANDIDATE,
    NUM_CONTEXT,
    action_of,
    empty_table,
    open_table,
)
from schedlab.envs.soc_dag.workload import Dag, Workload

WORKLOAD = random_workload(5, num_jobs=8)


def test_names_are_columns():
    assert len(CANDIDATE_FEATURES) == NUM_CANDIDATE
    env = SocDagVectorEnv(1, spec=small_spec(), workload=WORKLOAD)
    obs, _ = env.reset(seed=0)
    assert obs["candidates"].shape[2] == NUM_CANDIDATE
    assert obs["context"].shape[1] == NUM_CONTEXT


def test_optimistic_costs_by_hand():
    """A chain of three tasks on two PEs: the best way on, with the mean transfer wherever the PE changes."""
    soc = SMALL_SOC
    times = [[4.0, 1.0, 9.0], [2.0, 7.0, 9.0], [5.0, 1.0, 9.0]]
    graph = Graph.of(Dag.from_arrays("chain", times, [(0, 1), (1, 2)], 0.0), soc)
    costs = np.empty((3, soc.num_pes))
    write_optimistic_costs(graph, costs)
    pairs = [(p, q) for p in range(5) for q in range(5) if p != q]
    mean = sum(graph.latency[p, q] for p, q in pairs) / len(pairs)  # no volume: latency alone
    last = [min(graph.times[2, p], 1.0 + mean) for p in range(5)]
    np.testing.assert_allclose(costs[1], last)
    anywhere = min(last[p] + graph.times[1, p] for p in range(5)) + mean
    np.testing.assert_allclose(costs[0], [min(last[p] + graph.times[1, p], anywhere) for p in range(5)])
    assert not costs[2].any()


@pytest.mark.parametrize("binding", ["late", "ready"])
def test_outlook_and_plans_are_those_of_plain_python(binding):
    spec = small_spec(binding=binding, objective="deadline", noise="normal", noise_sigma=0.3)
    env, rng = SocDagVectorEnv(1, spec=spec, workload=WORKLOAD, debug=True), np.random.default_rng(0)
    _, info = env.reset(seed=0)
    planned = 0
    for _ in range(150):
        planned += check_outlook(env)
        mask = info["action_mask"]
        _, _, _, _, info = env.step(np.where(mask, rng.random(mask.shape), -1).argmax(1))
    assert planned > 100


def check_outlook(env: SocDagVectorEnv) -> int:
    """Compare everything in the table with what follows from the State. Returns the number of tasks planned here."""
    state, batch = env.state(), env.batch
    engine, now = state.engine[0], float(state.engine[0]["now"])
    count = int(batch.outlook_num_considered[0, 0])
    considered = batch.outlook_considered[0, :count].tolist()
    assert considered == state.ready[: engine["num_ready"]].tolist()
    pes, slow = range(engine["num_pes"]), state.levels["slowdown"][np.arange(5), state.default_level]
    free = [
        now if row["status"] == IDLE else max(now, row["expected_end"]) + row["queued"] for row in state.pes[list(pes)]
    ]

    def end(task: int, pe: int, at: float) -> float:
        return max(at, now + state.transfer[task, pe]) + state.times[task, pe] * slow[pe]

    job_end = {int(job): now for job in state.live[: engine["num_live"]]}
    for pe in pes:
        task = int(state.pes[pe]["task"])
        if state.pes[pe]["status"] != IDLE:
            job = int(state.tasks[task]["job"])
            job_end[job] = max(job_end[job], max(now, state.pes[pe]["expected_end"]) + state.ahead[task, pe])
    through = {}
    for i, task in enumerate(considered):
        able = [pe for pe in pes if state.times[task, pe] < math.inf]
        ways = sorted(end(task, pe, free[pe]) + state.ahead[task, pe] for pe in able)
        through[task], job = ways[0], int(state.tasks[task]["job"])
        job_end[job] = max(job_end[job], ways[0])
        of_task = batch.outlook_of_tasks[0, i]
        assert of_task[JOB_END] == ways[0]
        assert of_task[REGRET] == (ways[1] - ways[0] if len(ways) > 1 else 4.0 * engine["unit"])
        assert of_task[FIRST_FINISH] == min(end(task, pe, free[pe]) for pe in able)
        watts = state.levels["watts"][np.arange(5), state.default_level]
        assert of_task[LEAST_ENERGY] == min(state.times[task, pe] * slow[pe] * watts[pe] for pe in able)
        assert of_task[WORK_LEFT] == state.jobs[job]["work_left"]
        best = batch.outlook_planned[0, BEST_PE, i]
        assert end(task, best, free[best]) + state.ahead[task, best] == ways[0]
    assert {job: batch.outlook_job_end[0, job] for job in job_end} == job_end
    check_coming(env, free)
    kinds = state.pes["kind"]
    for pe in pes:
        same = [other for other in pes if kinds[other] == kinds[pe]]
        idle_here = sum(state.pes[other]["status"] == IDLE for other in same)
        assert batch.outlook_of_pes[0, IDLE_SHARE, pe] == idle_here / len(same)
    found = 0
    for which, weight in ((BY_FINISH, 0.0), (BY_END, 1.0), (LAX_BY_FINISH, 0.0), (LAX_BY_END, 1.0)):

        def key(task: int, which: int = which) -> tuple[float, float]:
            job = int(state.tasks[task]["job"])
            laxity = state.jobs[job]["deadline"] - batch.outlook_job_end[0, job]
            by_laxity = which in (LAX_BY_FINISH, LAX_BY_END)
            return (float(laxity if by_laxity else state.jobs[job]["work_left"]), -through[task])

        at, idle = list(free), int(engine["num_idle"])
        for task in sorted(considered, key=key):
            to = min(
                (pe for pe in pes if state.times[task, pe] < math.inf),
                key=lambda pe: end(task, pe, at[pe]) + weight * state.ahead[task, pe],
            )
            here = idle > 0 and state.pes[to]["status"] == IDLE and at[to] == now
            assert batch.outlook_planned[0, which, considered.index(task)] == (to if here else -1)
            at[to] = end(task, to, at[to])
            idle -= here
            found += here
    return found


def check_coming(env: SocDagVectorEnv, free: list[float]) -> None:
    """Compare what is said of tasks that will be ready: of those that a PE suits best, the one whose job ends last."""
    state, batch, now = env.state(), env.batch, float(env.state().engine[0]["now"])
    coming = {pe: (math.inf, 0.0) for pe in range(len(free))}
    for row in state.pes[state.pes["status"] == BUSY]:
        running, at = state.tasks[row["task"]], max(now, float(row["expected_end"]))
        for edge in state.edges[running["first_out"] :][: running["num_out"]]:
            task = int(edge["target"])
            if state.tasks[task]["num_missing"] != 1 or state.tasks[task]["status"] != WAITING:
                continue
            ends = [max(free[to], at) + state.times[task, to] + state.ahead[task, to] for to in coming]
            best = int(np.argmin(ends))
            if ends[best] > coming[best][1]:
                coming[best] = (at, ends[best])
    assert {pe: tuple(batch.outlook_of_pes[0, [COMING_AT, COMING_END], pe]) for pe in coming} == coming


def test_a_coming_task_is_seen_where_it_fits_best():
    """One task runs; its successor suits the idle PE best, and will be ready before a long task there would end."""
    soc = SMALL_SOC
    inf = math.inf
    times = [[4.0, inf, inf], [inf, 2.0, inf], [inf, 30.0, inf], [1.0, inf, inf]]
    dag = Dag.from_arrays("two", times, [(0, 1), (1, 3)])
    env = SocDagVectorEnv(1, spec=SocDagSpec(soc), workload=Workload.from_arrays("two", soc.kind_names, [dag]))
    obs, _ = env.reset(seed=0)
    pe_of = env.batch.table_rows[0, :, 1]
    cpu = next(row for row in range(1, 4) if pe_of[row] == 0)
    obs, *_ = env.step(np.array([cpu]))
    assert env.state().pes[0]["status"] == BUSY
    row = next(row for row in range(1, 4) if env.batch.table_rows[0, row, 0] == 2)
    comes, later = CANDIDATE_FEATURES.index("a task comes before this one ends here that this PE suits best"), 31
    assert obs["candidates"][0, row, comes] == 1.0
    unit = float(env.state().engine[0]["unit"])
    coming, own = 4.0 + 2.0 + env.state().ahead[1, 2], 30.0
    assert obs["candidates"][0, row, later] == pytest.approx((coming - own) / (unit + abs(coming - own)), rel=1e-5)


def test_equal_tasks_of_a_stage_are_one_row():
    """Of tasks that differ in nothing the first is a row, and a rule that wants another is followed through it."""
    soc, stream = spark_stream(4, num_executors=6, num_jobs=3, gap_us=5e6, seed=1)
    env = SocDagVectorEnv(1, spec=SocDagSpec(soc), workload=stream, graph=False, debug=True)
    env.reset(seed=0)
    most = 0
    for _ in range(200):
        state, rows = env.state(), int(env.batch.table_head[0, 0]["num_rows"])
        tasks = env.batch.table_rows[0, 1:rows, 0]
        stages = {(int(state.tasks[t]["job"]), float(state.tasks[t]["rank"])) for t in tasks}
        assert len(stages) == len(tasks)  # one kind of PE: a row a stage
        most = max(most, int(state.engine[0]["num_ready"]) - len(tasks))
        actions = env.rule_actions([RULES["late_srpt"]])
        assert env.action_mask[0, actions[0]]
        env.step(actions)
    assert most > 5


@pytest.mark.parametrize("rows", [8, 20])
def test_too_many_rows_are_cut_by_frequency_first(rows):
    """Every task at the governor's frequencies, if these fit, then others by the work left in the tasks' jobs; a rule
    is followed at the nearest frequency that is there."""
    spec, rng = small_spec(choose_frequency=True, num_candidates=256), np.random.default_rng(0)
    env = SocDagVectorEnv(1, spec=spec, workload=WORKLOAD, graph=False, debug=True)
    env.reset(seed=0)
    state, wanted = env.state(), empty_decision()
    table = empty_table(rows, len(state.pes), len(state.jobs), len(state.tasks))

    def work_left(row: tuple[int, ...]) -> float:
        return float(state.jobs[state.tasks[row[0]]["job"]]["work_left"])

    seen = set()
    for _ in range(150):
        open_table(state, table)
        listed = [tuple(row) for row in env.batch.table_rows[0, 1 : env.batch.table_head[0, 0]["num_rows"]].tolist()]
        shown = [tuple(row) for row in table.rows[1 : table.head[0]["num_rows"]].tolist()]
        governed = [row for row in listed if row[2] == state.default_level[row[1]]]
        if len(listed) < rows:
            assert shown == listed
            seen.add("all")
        elif len(governed) < rows:
            extra = shown[len(governed) :]
            assert shown[: len(governed)] == governed and len(shown) == rows - 1 == len(set(shown))
            others = sorted(work_left(row) for row in set(listed) - set(governed))
            assert [work_left(row) for row in extra] == others[: len(extra)] and set(extra) <= set(listed)
            seen.add("governed")
        else:
            assert set(shown) <= set(governed) and work_left(shown[0]) == min(map(work_left, governed))
            seen.add("some")
        for row in listed:
            wanted.bind[0] = row
            there = [other for other in shown if other[:2] == row[:2]]
            found = action_of(state, table, wanted)
            assert (found > 0) == bool(there)
            if there:
                assert shown[found - 1] == min(there, key=lambda other: abs(other[2] - row[2]))
        env.step(np.where(env.action_mask, rng.random(env.action_mask.shape), -1).argmax(1))
    assert seen == {"all", "governed", "some"}


def test_stages_are_barriers():
    """Every task of a stage needs all of the stages before it; the last stage is behind all others."""
    dag = spark_job(stages=(4, 4), seed=3)
    stage = np.array([int(name.split()[1].split(".")[0]) for name in dag.task_names])
    for a, b in {(int(stage[s]), int(stage[t])) for s, t in dag.edges}:
        between = {(int(s), int(t)) for s, t in dag.edges if stage[s] == a and stage[t] == b}
        assert len(between) == (stage == a).sum() * (stage == b).sum()
        assert a < b
    assert {int(stage[s]) for s, _ in dag.edges} == {0, 1, 2}
    assert all(len(set(dag.times[stage == one, 0])) == 1 for one in range(4))
