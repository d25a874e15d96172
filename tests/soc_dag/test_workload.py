"""Graphs, workloads, loaders and generators: what they hold, and what they refuse."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from soc_problems import SMALL_SOC, random_workload

from schedlab.baselines.soc_static import heft
from schedlab.envs.core.errors import InputError
from schedlab.envs.soc_dag.catalog import find_stream, workflow_graphs
from schedlab.envs.soc_dag.generate import (
    READYS_CPU_GPU,
    cpu_gpu_soc,
    on_unlike_pes,
    random_layered,
    random_stream,
    tiled,
    tool_calls,
    topcuoglu,
)
from schedlab.envs.soc_dag.library import Graph, build_library, link_sums, mean_transfer_us, write_upward_ranks
from schedlab.envs.soc_dag.spec import PeKind, Soc, SocDagSpec, uniform_soc
from schedlab.envs.soc_dag.traces import (
    data_file,
    ds3_platform,
    ds3_stream,
    load_jobs,
    load_kernel_times,
    load_platform,
    load_stg,
    load_wfformat,
)
from schedlab.envs.soc_dag.training import (
    Group,
    MoeCosts,
    holmes,
    layers_by_speed,
    moe_layer,
    pipeline,
    sequence_batch,
)
from schedlab.envs.soc_dag.workload import Dag, Stream, Workload, num_parts, shortest_us

DATA = Path(os.environ.get("SCHEDLAB_DATA", "nowhere")) / "task_dags"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no task_dags/ in SCHEDLAB_DATA")


# -------------------------------------------------------------------------------------------------------- graphs


def test_tasks_are_put_into_a_topological_order():
    dag = Dag.from_arrays("d", [[3], [2], [1]], [(2, 0), (0, 1)], [5, 6], task_names=["c", "b", "a"])
    assert dag.task_names == ("a", "c", "b")
    assert dag.times[:, 0].tolist() == [1, 3, 2]
    assert dag.edges.tolist() == [[0, 1], [1, 2]]
    assert dag.volumes.tolist() == [5, 6]
    assert shortest_us(dag) == 6
    with pytest.raises(ValueError, match="read-only"):
        dag.times[0] = 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (([[1], [1], [1]], [(0, 1), (1, 2), (2, 1)]), r"cycle: t1 -> t2 -> t1|cycle: t2 -> t1 -> t2"),
        (([[1]], [(0, 0)]), "cycle: t0 -> t0"),
        (([[1, 1], [math.inf, math.inf]],), "no PE can run task 't1'"),
        (([[1, -2]],), "time of task 't0' on PE kind 1 is -2"),
        (([[math.nan]],), "is nan"),
        (([[1], [1]], [(0, 2)]), r"edge \[0, 2\] leaves tasks 0..1"),
        (([[1], [1]], [(0, 1), (0, 1)]), r"edge \[0, 1\] is there twice"),
        (([[1], [1]], [(0, 1)], [-1]), "carries -1"),
        (([[1], [1]], [(0, 1)], [math.inf]), "carries inf"),
        (([],), r"times has shape"),
    ],
)
def test_graphs_that_cannot_be(arguments, problem):
    with pytest.raises(InputError, match=problem):
        Dag.from_arrays("d", *arguments)


def test_graphs_that_fall_apart():
    parts = [[1], [1], [1]], [(0, 2)]
    assert num_parts(3, np.array([(0, 2)])) == 2
    assert Dag.from_arrays("d", *parts).num_tasks == 3
    with pytest.raises(InputError, match="falls into 2 parts"):
        Dag.from_arrays("d", *parts, connected=True)


def test_workloads_that_cannot_be():
    dag = Dag.from_arrays("d", [[1.0, 2.0]])
    for arguments, problem in (
        ((["a"], [dag]), "has times on 2 kinds"),
        ((["a", "b"], []), "there is no graph"),
        ((["a", "b"], [dag], [1]), "dag_of_job names"),
        ((["a", "b"], [dag], [0, 0], [3.0, 1.0]), "not in order"),
        ((["a", "b"], [dag], [0], [math.nan]), "not finite"),
        ((["a", "b"], [dag], [0, 0], [1.0]), "1 arrivals for 2 jobs"),
        ((["a", "b"], [dag], [0], [1.0], [0.0]), "a deadline is 0"),
    ):
        with pytest.raises(InputError, match=problem):
            Workload.from_arrays("w", *arguments)
    with pytest.raises(InputError, match="b is unknown"):
        Workload.from_arrays("w", ["a", "b"], [dag]).matching(Soc("s", (PeKind("a"), PeKind("c"))))
    with pytest.raises(InputError, match="Choose jobs that exist"):
        Workload.from_arrays("w", ["a", "b"], [dag]).window(3, 2)


def test_windows_and_deadlines():
    workload = random_workload(3, num_jobs=10)
    part = workload.window(4, 3)
    assert part.arrival_us[0] == 0 and len(part) == 3
    np.testing.assert_array_equal(part.dag_of_job, workload.dag_of_job[4:7])
    due = workload.with_deadlines(SMALL_SOC, 3.0)
    assert due.deadline_us[0] == 3 * shortest_us(workload.dags[workload.dag_of_job[0]])


def test_streams_draw_their_mix():
    dags = tuple(Dag.from_arrays(f"d{i}", [[i + 1.0]]) for i in range(3))
    stream = Stream("s", ("a",), dags, 20.0, 4000, (0.5, 0.3, 0.2), slack=2.0)
    workload = stream.draw(np.random.default_rng(0))
    assert np.bincount(workload.dag_of_job) / 4000 == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert np.diff(workload.arrival_us).mean() == pytest.approx(20, rel=0.06)
    np.testing.assert_array_equal(workload.deadline_us, 2.0 * (workload.dag_of_job + 1))
    for wrong in ({"num_jobs": 0}, {"gap_us": -1.0}, {"slack": 0.0}, {"weights": (1.0,)}):
        with pytest.raises(InputError):
            Stream(**{"name": "s", "kind_names": ("a",), "dags": dags, "gap_us": 1.0, "num_jobs": 1, **wrong})


# ----------------------------------------------------------------------------------------------------------- spec


def test_systems_that_cannot_be():
    for wrong in (
        {"count": 0},
        {"frequencies_mhz": (200.0, 100.0)},
        {"power_w": ((1.0, 2.0),)},
        {"idle_w": -1.0},
        {"default_level": 3},
    ):
        with pytest.raises(InputError, match="PE kind 'k'"):
            PeKind("k", **wrong)
    kinds = (PeKind("a"), PeKind("b", 2))
    for wrong in (
        {"kinds": ()},
        {"kinds": (PeKind("a"), PeKind("a"))},
        {"bandwidth": ((1.0,),)},
        {"bandwidth": ((1.0, 0.0), (1.0, 1.0))},
        {"latency_us": ((-1.0, 0.0), (0.0, 0.0))},
        {"self_bandwidth": 0.0},
    ):
        with pytest.raises(InputError, match="SoC 's'"):
            Soc(**{"name": "s", "kinds": kinds, **wrong})
    for wrong in ({"binding": "never"}, {"noise": "pink"}, {"noise_sigma": -1.0}, {"num_candidates": 1}):
        with pytest.raises(InputError):
            SocDagSpec(uniform_soc(2), **wrong)


def test_a_spec_survives_json():
    for spec in (SocDagSpec(SMALL_SOC, noise="normal"), SocDagSpec(uniform_soc(3), binding="ready")):
        assert SocDagSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_links_are_by_kind_and_free_on_one_pe():
    latency, bandwidth = SMALL_SOC.links()
    assert latency.shape == bandwidth.shape == (5, 5)
    assert (latency[0, 1], latency[0, 2], latency[0, 0]) == (0.0, 1.0, 0.0)
    assert (bandwidth[0, 1], bandwidth[0, 2], bandwidth[0, 0], bandwidth[3, 4]) == (4.0, 2.0, 50.0, 3.0)
    for whole, us in ((False, 4.5), (True, 4.0)):
        soc = replace(uniform_soc(2, bandwidth=3.0, latency_us=0.5), whole_us=whole)
        graph = Graph.of(Dag.from_arrays("d", [[1, 1]]), soc)
        assert mean_transfer_us(graph, 12.0, link_sums(graph.latency, graph.bandwidth)) == us


# -------------------------------------------------------------------------------------------------------- files


@needs_data
def test_ds3_systems_and_jobs():
    platform = ds3_platform()
    soc = platform.soc
    assert soc.num_pes == 16 and soc.kind_names == ("A7", "A15", "MM", "FFT", "VIT")
    assert platform.exec_us["VIT"] == {"viterbi_decoder": 2.0}
    assert soc.kinds[0].power_w[-1] == (0.39, 0.59, 0.72, 0.81)
    assert soc.kinds[0].power_w[2] == (0.19, 0.29, 0.35, 0.4)
    assert 0 < soc.kinds[0].power_w[0][0] < 0.19 < soc.kinds[0].power_w[3][0] < 0.39
    latency, bandwidth = soc.links()
    assert not latency.any()
    assert (bandwidth[0, 1], bandwidth[0, 10], bandwidth[0, 0]) == (1000.0, 10.0, 10000.0)
    _, stream = ds3_stream(100.0, 50)
    assert [dag.num_tasks for dag in stream.dags] == [27, 34, 7, 8, 8, 10]
    assert stream.weights == (0.2, 0.2, 0.2, 0.1, 0.1, 0.2)
    workload = stream.draw(np.random.default_rng(0))
    assert build_library(workload.dags, soc).times.shape == (94, 16)


@needs_data
def test_gym_ds3_jobs():
    platform = ds3_platform("gym_ds3/DASH.SoC.Top.txt")
    for i in range(1, 11):
        name = "gym_ds3/job_Top.txt" if i == 1 else f"gym_ds3/job_Top{i}.txt"
        (dag,) = load_jobs(data_file("jobs.json"), name, platform)
        assert dag.num_tasks == 10
    # DS3's Top is Topcuoglu's example: through the files the same numbers as in the paper
    platform = ds3_platform("DS3/SoC.Top.txt")
    (dag,) = load_jobs(data_file("jobs.json"), "DS3/job_Top.txt", platform)
    _, example = topcuoglu()
    np.testing.assert_array_equal(dag.times, example.times)
    np.testing.assert_array_equal(dag.edges, example.edges)
    np.testing.assert_array_equal(dag.volumes, example.volumes)


@needs_data
def test_standard_task_graphs_and_workflows():
    for path in sorted((DATA / "stg").iterdir()):
        dag = load_stg(path)
        told = {
            line[1:].split(":")[0].strip(): line.split(":")[1].split()[0]
            for line in path.read_text().splitlines()
            if line.startswith("#") and ":" in line
        }
        assert dag.num_tasks == int(path.name.split("_")[0]) + 2
        assert shortest_us(dag) == float(told["CP Length"])
    for path, tasks, edges in (
        ("helloworld-forkjoin-10-chameleon.json", 10, 16),
        ("srasearch-chameleon-10a-001.json", 22, 0),
    ):
        dag = load_wfformat(DATA / "wfinstances" / path)
        assert dag.num_tasks == tasks
        assert len(dag.edges) == edges or edges == 0
        assert dag.volumes.max() > 0
        assert on_unlike_pes(dag, 4, heterogeneity=1.0).times.shape == (tasks, 4)
    fork = load_wfformat(DATA / "wfinstances" / "helloworld-forkjoin-10-chameleon.json")
    assert fork.times[fork.task_names.index("cpuhog_forkjoin_00000002"), 0] == 107.353e6


def system() -> dict:
    pe = {"id": 0, "name": "A", "capacity": 2, "opp": [[500, 900], [1000, 1000]], "exec_us": {"x": 3.0, "y": 4.0}}
    return {"s": {"pes": [pe], "comm_band": [[0, 0, 10.0]], "comm_band_self": None}}


def jobs() -> dict:
    tasks = [{"id": 0, "name": "x"}, {"id": 1, "name": "y"}]
    return {"j": [{"name": "job", "tasks": tasks, "edges": [[0, 1, 2.0]]}]}


def written(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "data.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_small_systems_and_jobs_load(tmp_path):
    platform = load_platform(written(tmp_path, system()), "s")
    assert platform.soc.kinds == (PeKind("A", 2, (500.0, 1000.0)),)
    (dag,) = load_jobs(written(tmp_path, jobs()), "j", platform)
    assert dag.times.tolist() == [[3.0], [4.0]] and dag.volumes.tolist() == [2.0]


def test_bad_systems_are_refused(tmp_path):
    def refused(change, problem: str) -> None:
        data = system()
        change(data["s"])
        with pytest.raises(InputError, match=problem) as error:
            load_platform(written(tmp_path, data), "s")
        assert "data.json" in str(error.value)

    refused(lambda s: s["comm_band"].append([0, 7, 1.0]), "unknown PE 7")
    refused(lambda s: s["pes"][0]["exec_us"].update(x=-1.0), "task 'x' takes -1.0 us on A")
    refused(lambda s: s["pes"][0].pop("capacity"), "is no system")
    refused(lambda s: s.pop("comm_band"), "is no system")
    refused(lambda s: s["pes"][0].update(capacity=0), "capacity 0")
    with pytest.raises(InputError, match="Choose one of: s"):
        load_platform(written(tmp_path, system()), "other")
    with pytest.raises(InputError, match=r"data.json:1: not JSON"):
        load_platform(written(tmp_path, "{"), "s")
    with pytest.raises(InputError, match="cannot be read"):
        load_platform(tmp_path / "absent.json", "s")


def test_bad_jobs_are_refused(tmp_path):
    platform = load_platform(written(tmp_path, system()), "s")

    def refused(change, problem: str) -> None:
        data = jobs()
        change(data["j"][0])
        with pytest.raises(InputError, match=problem) as error:
            load_jobs(written(tmp_path, data), "j", platform)
        assert "data.json" in str(error.value)

    refused(lambda j: j["edges"].append([1, 0, 1.0]), "cycle")
    refused(lambda j: j["tasks"].append({"id": 2, "name": "z"}), "no PE can run task 'z'")
    refused(lambda j: j["edges"].append([1, 9, 1.0]), "unknown task 9")
    refused(lambda j: j["edges"].clear(), "falls into 2 parts")
    refused(lambda j: j["edges"].append([0, 1]), "no list of jobs")
    refused(lambda j: j["tasks"][0].pop("name"), "no list of jobs")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1\n0 0 0\n1 5 1 0\n2 0 1 1\n", None),
        ("1\n0 0 0\n1 5 1 0\n", "2 tasks, not the 3"),
        ("1\n0 0 0\n1 5 2 0\n2 0 1 1\n", "bad.stg:3: task 1 expected"),
        ("1\n0 0 0\n1 x 1 0\n2 0 1 1\n", "bad.stg:3: not integers"),
        ("1\n0 0 0\n1 -5 1 0\n2 0 1 1\n", "bad.stg:3: task 1 takes -5"),
        ("1\n0 0 0\n1 5 1 2\n2 0 1 1\n", "cycle"),
        ("1\n0 0 0\n1 5 0\n2 0 1 1\n", "falls into 2 parts"),
        ("", "0 tasks, not the None"),
    ],
)
def test_standard_task_graphs_are_checked(tmp_path, text, problem):
    path = tmp_path / "bad.stg"
    path.write_text(text)
    if problem is None:
        assert load_stg(path).times[:, 0].tolist() == [0, 5, 0]
    else:
        with pytest.raises(InputError, match=problem):
            load_stg(path)


def workflow() -> dict:
    tasks = [
        {"name": "a", "id": "a", "parents": [], "children": ["b"], "outputFiles": ["f", "g"]},
        {"name": "b", "id": "b", "parents": ["a"], "children": [], "inputFiles": ["g", "h"]},
    ]
    files = [{"id": name, "sizeInBytes": size} for name, size in (("f", 1), ("g", 20), ("h", 300))]
    runs = [{"id": "a", "runtimeInSeconds": 2.5}, {"id": "b", "runtimeInSeconds": 0.5}]
    return {"workflow": {"specification": {"tasks": tasks, "files": files}, "execution": {"tasks": runs}}}


def test_workflows_are_checked(tmp_path):
    dag = load_wfformat(written(tmp_path, workflow()))
    assert dag.times[:, 0].tolist() == [2.5e6, 0.5e6] and dag.volumes.tolist() == [20.0]
    for change, problem in (
        (lambda w: w["specification"]["tasks"][0]["parents"].append("b"), "cycle"),
        (lambda w: w["execution"]["tasks"].pop(), "not a workflow"),
        (lambda w: w["specification"]["tasks"][1]["parents"].append("z"), "not a workflow"),
        (lambda w: w["specification"]["tasks"][1].update(parents=[]), "not its parent"),
        (lambda w: w["execution"]["tasks"][0].update(runtimeInSeconds=-1), "negative|is -1"),
    ):
        data = workflow()
        change(data["workflow"])
        with pytest.raises(InputError, match=problem):
            load_wfformat(written(tmp_path, data))


@needs_data
def test_kernel_times():
    table = load_kernel_times(data_file("kernel_timings_skylake_v100.csv"), 512)
    assert table == {
        "POTRF": (1999.566, 401.822),
        "SYRK": (3146.372, 115.076),
        "TRSM": (3186.344, table["TRSM"][1]),
        "GEMM": (5622.287, 86.996),
    }
    assert tiled("cholesky", 4, table).times[0].tolist() == [1999.566, 401.822]
    with pytest.raises(InputError, match=r"tiles of 7.*Choose of \[32, 64"):
        load_kernel_times(data_file("kernel_timings_skylake_v100.csv"), 7)
    told = json.loads(data_file("readys_tiles.json").read_text())
    for name, kernels in READYS_CPU_GPU.items():
        assert [list(column) for column in zip(*kernels.values(), strict=True)] == [
            told[name]["cpu"],
            told[name]["gpu"],
        ]


def test_kernel_times_are_checked(tmp_path):
    path = tmp_path / "times.csv"
    for text, problem in (
        ("device,kernel,tile,column\nx,dgemm,32,t\n", "times.csv:2: not a kernel's time"),
        ("device,kernel,tile,column,mean_us\nx,dgemm,32,t,-1\n", "mean_us is -1"),
        ("device,kernel,tile,column,mean_us\nx,dgemm,32,t,1\n", "no times of all kernels"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=problem):
            load_kernel_times(path, 32)


def test_jobs_by_name(tmp_path):
    """Every name gives a system and jobs that belong to it."""
    (tmp_path / "a.stg").write_text("1\n0 0 0\n1 5 1 0\n2 0 1 1\n")
    (tmp_path / "b.json").write_text(json.dumps(workflow()))
    names = [
        "random",
        "random_5-9x3",
        "cholesky_3",
        "lu_3",
        "qr_3",
        "pipeline_2x3",
        "holmes_3",
        "moe_2",
        "sequences_9",
        "tools_2",
        "topcuoglu",
    ]
    names += [str(tmp_path / "a.stg"), str(tmp_path / "b.json")]
    names += ["ds3", "gym_ds3"] if DATA.is_dir() else []
    for name in names:
        soc, stream = find_stream(name, 50.0, 7, slack=2.0)
        workload = stream.draw(np.random.default_rng(0)).matching(soc)
        assert len(workload) == 7 and workload.arrival_us[-1] > 0 and np.isfinite(workload.deadline_us).all()
    for name in ("ds4", "random_5x3", "svd_4", ""):
        with pytest.raises(InputError, match="Give one of: random"):
            find_stream(name)
    with pytest.raises(InputError, match=r"absent\.stg: cannot be read"):
        find_stream("absent.stg")


@needs_data
def test_workflows_are_single_graphs_on_unlike_pes():
    """Each workflow as often as asked for, with other times each time, on one machine."""
    graphs = workflow_graphs(2, num_pes=3)
    assert [dag.num_tasks for _, dag in graphs] == [52, 52, 10, 10, 22, 22]
    assert all(dag.times.shape[1] == soc.num_pes == 3 for soc, dag in graphs)
    assert not np.array_equal(graphs[0][1].times, graphs[1][1].times)
    np.testing.assert_array_equal(graphs[0][1].volumes, graphs[1][1].volumes)


def test_absent_data_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("SCHEDLAB_DATA", raising=False)
    with pytest.raises(InputError, match="SCHEDLAB_DATA is not set"):
        ds3_stream(100.0, 5)
    with pytest.raises(InputError, match=str(tmp_path)):
        ds3_stream(100.0, 5, data_dir=tmp_path)


# ---------------------------------------------------------------------------------------------------- generators


@settings(max_examples=40, deadline=None)
@given(
    num_tasks=st.integers(1, 60),
    kinds=st.integers(1, 5),
    ccr=st.floats(0, 5),
    heterogeneity=st.floats(0, 1.9),
    shape=st.floats(0.3, 3),
    seed=st.integers(0, 1000),
)
def test_random_graphs_keep_their_promises(num_tasks, kinds, ccr, heterogeneity, shape, seed):
    dag = random_layered(num_tasks, kinds, ccr=ccr, heterogeneity=heterogeneity, shape=shape, seed=seed)
    assert dag.times.shape == (num_tasks, kinds)
    assert (dag.edges[:, 0] < dag.edges[:, 1]).all()
    spread = dag.times.max(1) / dag.times.min(1)
    assert (spread <= (1 + heterogeneity / 2) / (1 - heterogeneity / 2) + 1e-9).all()
    assert (dag.volumes <= 20 * ccr).all()
    again = random_layered(num_tasks, kinds, ccr=ccr, heterogeneity=heterogeneity, shape=shape, seed=seed)
    np.testing.assert_array_equal(dag.times, again.times)


def test_communication_ratio_of_random_graphs():
    dag = random_layered(2000, 3, ccr=2.0, seed=1)
    assert dag.volumes.mean() / dag.times.mean() == pytest.approx(2.0, rel=0.05)
    with pytest.raises(InputError, match="num_tasks is 0"):
        random_layered(0, 1)
    soc, stream = random_stream(5, num_tasks=(10, 12))
    assert all(10 <= dag.num_tasks <= 12 for dag in stream.dags) and soc.num_pes == 4


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cholesky", lambda t: t + t * (t - 1) + t * (t - 1) * (t - 2) // 6),
        ("lu", lambda t: t + t * (t - 1) + (t - 1) * t * (2 * t - 1) // 6),
        ("qr", lambda t: t + t * (t - 1) + (t - 1) * t * (2 * t - 1) // 6),
    ],
)
def test_tiled_factorisations(name, count):
    for tiles in (1, 2, 5, 8):
        dag = tiled(name, tiles)
        assert dag.num_tasks == count(tiles)
        assert num_parts(dag.num_tasks, dag.edges) == 1
        exits = set(range(dag.num_tasks)) - set(dag.edges[:, 0].tolist())
        assert len(exits) == 1  # the last diagonal tile
        assert set(name.split()[0] for name in dag.task_names) <= set(READYS_CPU_GPU[name])
    assert cpu_gpu_soc().num_pes == 4
    with pytest.raises(InputError, match="Choose one of"):
        tiled("svd", 4)


def test_cholesky_of_three_tiles_by_hand():
    """POTRF 0 -> TRSM 1,0 and 2,0 -> SYRK 1, GEMM 2,1, SYRK 2 -> POTRF 1 -> TRSM 2,1 -> SYRK 2 -> POTRF 2."""
    dag = tiled("cholesky", 3, volume=7.0)
    names = dag.task_names
    edges = {(names[a], names[b]) for a, b in dag.edges}
    assert ("POTRF 0,0", "TRSM 1,0") in edges and ("POTRF 0,0", "TRSM 2,0") in edges
    assert ("TRSM 1,0", "GEMM 2,1") in edges and ("TRSM 2,0", "GEMM 2,1") in edges
    assert ("SYRK 1,1", "POTRF 1,1") in edges and ("GEMM 2,1", "TRSM 2,1") in edges
    assert set(dag.volumes.tolist()) == {7.0}


def test_ranks_of_the_example():
    """Table 1 of the HEFT paper, to its three decimals."""
    soc, dag = topcuoglu()
    ranks = np.empty(10)
    write_upward_ranks(Graph.of(dag, soc), ranks)
    told = [108.0, 77.0, 80.0, 80.0, 69.0, 63.333, 42.667, 35.667, 44.333, 14.667]
    np.testing.assert_allclose(ranks, told, atol=5e-4)


def test_tool_calls_and_sequences():
    soc, dag = tool_calls(rounds=3, calls=5, seed=2)
    assert num_parts(dag.num_tasks, dag.edges) == 1 and dag.times.shape[1] == len(soc.kinds)
    soc, dag = sequence_batch(300, seed=1)
    assert soc.num_pes == 4 and dag.num_tasks == 301
    assert np.isinf(dag.times).any()  # some sequences fit into large groups only
    assert (dag.times[:-1, -1] <= dag.times[:-1, 0]).all()  # four GPUs are faster than one


def test_pipelines_are_what_they_say():
    step = pipeline(
        3, 4, forward_us=[1, 2, 3], backward_us=2.0, weight_us=0.5, num_chunks=2, transfer_us=0.1, sync_us=1.0
    )
    assert step.dag.num_tasks == 3 * 6 * 4 + 3
    assert step.num_microbatches == 4
    names = step.dag.task_names
    assert names[step.forward[4, 2]] == "F4.2" and names[step.weight[1, 3]] == "W1.3"
    assert step.dag.times[step.forward[5, 0], 2] == 1.5  # the third stage's second chunk
    edges = {(names[a], names[b]) for a, b in step.dag.edges}
    for edge in (
        ("F0.1", "F1.1"),
        ("F5.1", "B5.1"),
        ("B5.1", "B4.1"),
        ("B2.0", "W2.0"),
        ("W2.3", "sync 2"),
        ("W5.0", "sync 2"),
    ):
        assert edge in edges
    with pytest.raises(InputError, match="0 microbatches"):
        pipeline(2, 0)
    with pytest.raises(InputError, match="times"):
        pipeline(2, 2, forward_us=-1.0)


def test_layers_go_by_speed():
    assert layers_by_speed(36, [4, 2]) == [24, 12]
    assert layers_by_speed(10, [1, 1, 1]) == [4, 3, 3]
    assert layers_by_speed(5, [100, 1, 1]) == [3, 1, 1]
    with pytest.raises(InputError):
        layers_by_speed(1, [1, 1])
    step = holmes([Group("infiniband", 4), Group("ethernet", 2)], 8)
    work = [step.dag.times[step.forward[s, 0], s] for s in range(2)]
    assert work[0] == pytest.approx(work[1])  # as many layers as keep the stages even
    uneven = holmes([Group("infiniband", 4), Group("ethernet", 2)], 8, in_proportion=False)
    assert uneven.dag.times[uneven.forward[1, 0], 1] == 2 * uneven.dag.times[uneven.forward[0, 0], 0]
    with pytest.raises(InputError, match="Choose a network"):
        holmes([Group("token-ring", 2)], 4)


def test_moe_layers():
    costs = MoeCosts((5, 80), (2, 30), (2, 30), (3, 150), (3, 50))
    soc, dag = moe_layer(costs, 4, all_reduce_parts=2)
    assert dag.num_tasks == 22 and soc.num_pes == 3
    by_name = dict(zip(dag.task_names, dag.times.tolist(), strict=True))
    assert by_name["dispatch 3"] == [25.0, math.inf, math.inf]
    assert by_name["experts 0"] == [math.inf, math.inf, 40.5]
    assert by_name["all-reduce 1"][0] == 28.0


def test_a_turned_graph_is_the_graph_of_what_was_turned():
    """On links that differ by direction; and twice turned, graph and plan are what they were."""
    links = ((0.5, 2.0, 1.0), (1.0, 1.0, 3.0), (2.0, 0.6, 1.0))
    soc, dag = replace(uniform_soc(3), bandwidth=links), random_layered(20, 3, seed=4)
    graph = Graph.of(dag, soc)
    for mine, theirs in zip(graph.turned(), Graph.of(dag.turned(), soc.turned()), strict=True):
        np.testing.assert_array_equal(np.sort(mine, axis=0), np.sort(theirs, axis=0))
    assert out_edges(graph.turned()) == out_edges(Graph.of(dag.turned(), soc.turned()))
    for mine, again in zip(graph, graph.turned().turned(), strict=True):
        np.testing.assert_array_equal(mine, again)
    plan = heft(graph)
    for mine, again in zip(plan, plan.turned().turned(), strict=True):
        np.testing.assert_allclose(mine, again)


def out_edges(graph: Graph) -> list[tuple[int, int, float]]:
    """(source, target, volume) of every edge, sorted."""
    sources = np.repeat(np.arange(len(graph.times)), np.diff(graph.out_first))
    return sorted(zip(sources.tolist(), graph.out_task.tolist(), graph.out_volume.tolist(), strict=True))
