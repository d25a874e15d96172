"""The rows of `schedlab bench soc_dag`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from . import command
from .bench import Args, Row, best_cpu_s, faster, shorter

if TYPE_CHECKING:
    from ..envs.soc_dag.spec import Soc
    from ..envs.soc_dag.workload import Dag, Stream

SAGA_MS = {(10, 4): 0.88, (10, 16): 3.9, (100, 16): 56.0, (1000, 16): 2228.0}
"""(tasks, PEs) -> CPU ms of one HEFT schedule by SAGA (Coleman and Krishnamachari, 2023), as measured on a quiet core:
stands in where SAGA is not installed."""
GRAPH_GOAL, RULES_GOAL = 100e3, 1e6
PEERS = "spark-sched-sim 400-850, READYS about 1,000, gym_ds3 1,000-3,860 a second"
NUM_ROWS = 9
"""How many there are, for the progress bar."""


def heft_rows(quick: bool, repeats: int, seed: int) -> Iterator[Row]:
    """HEFT called from Python, and from the graph as it was given (with its conversion), beside SAGA's."""
    from ..baselines.soc_static import heft
    from ..envs.soc_dag.generate import random_layered
    from ..envs.soc_dag.library import Graph
    from ..envs.soc_dag.spec import uniform_soc

    for (tasks, pes), saga_ms in SAGA_MS.items():
        dag, soc = random_layered(tasks, pes, seed=seed), uniform_soc(pes)
        graph = Graph.of(dag, soc)
        heft(graph)
        calls = max(1, (200 if quick else 5000) // tasks)

        def work(graph: Graph = graph, calls: int = calls) -> None:
            for _ in range(calls):
                heft(graph)

        ms = best_cpu_s(work, repeats) / calls * 1e3
        measured_ms = saga_cpu_ms(dag, pes, repeats)
        beside = "SAGA not installed: its time on a quiet core" if measured_ms is None else "SAGA in the same process"
        detail = f"{tasks} tasks on {pes} PEs, called from Python, mean of {calls}, best of {repeats}; {beside}"
        yield shorter(f"heft_{tasks}x{pes}_ms", ms, "ms", "SAGA", measured_ms or saga_ms, detail)


def saga_cpu_ms(dag: Dag, num_pes: int, repeats: int) -> float | None:
    """CPU ms of SAGA's HEFT on this graph; None where it is not installed (`pip install anrg.saga`).

    SAGA knows tasks by a cost and PEs by a speed: it gets mean times and equal PEs, which are as many operations.
    """
    try:
        from saga import Network, TaskGraph
        from saga.schedulers.heft import HeftScheduler
    except ImportError:
        return None
    costs = [(str(task), float(us)) for task, us in enumerate(dag.times.mean(1))]
    edges = [(str(a), str(b), float(volume)) for (a, b), volume in zip(dag.edges, dag.volumes, strict=True)]
    graph = TaskGraph.create(costs, edges)
    pes = [str(pe) for pe in range(num_pes)]
    network = Network.create([(pe, 1.0) for pe in pes], [(a, b, 1.0) for a, b in itertools.combinations(pes, 2)])
    scheduler = HeftScheduler()
    return best_cpu_s(lambda: scheduler.schedule(network, graph), repeats) * 1e3


def stream(gap_us: float, num_jobs: int, args: Args) -> tuple[Soc, Stream]:
    """DS3's mix, or random graphs where the data are not there."""
    from ..envs.core.errors import InputError
    from ..envs.soc_dag.generate import random_stream
    from ..envs.soc_dag.traces import ds3_stream

    try:
        return ds3_stream(gap_us, num_jobs, data_dir=args.data_dir)
    except InputError:
        return random_stream(num_pes=16, gap_us=gap_us, num_jobs=num_jobs)


def env_rows(args: Args, num_envs: int, steps: int, repeats: int) -> Iterator[Row]:
    """Decisions of the vector env under a random policy, with and without graph observations."""
    from ..envs.soc_dag.env import SocDagVectorEnv
    from ..envs.soc_dag.spec import SocDagSpec

    soc, jobs = stream(100.0, 50, args)
    spec = SocDagSpec(soc, noise="normal", noise_sigma=0.2, graph_edges=256)
    for graph in (True, False):
        env = SocDagVectorEnv(num_envs, spec=spec, workload=jobs, graph=graph)
        _, info = env.reset(seed=args.seed)
        draws = np.random.default_rng(args.seed).random((steps, num_envs, spec.num_candidates))
        seconds = []
        for _ in range(repeats + 1):  # the first compiles
            spent = 0.0
            for draw in draws:
                actions = (info["action_mask"] * draw).argmax(1)
                start = time.process_time()
                *_, info = env.step(actions)
                spent += time.process_time() - start
            seconds.append(spent)
        env.close()
        per_s = num_envs * steps / min(seconds[1:])
        seen = "graph observations" if graph else "flat observations"
        detail = f"{jobs.name}, {num_envs} envs, {seen}, resets included, best of {repeats}; peers: {PEERS}"
        name = "decisions_per_cpu_s_graph_obs" if graph else "decisions_per_cpu_s_obs"
        yield faster(name, per_s, "1/s", "goal", GRAPH_GOAL, detail)


def rule_rows(args: Args, num_jobs: int, repeats: int) -> Iterator[Row]:
    """Tasks bound per CPU-second by rules compiled into the simulator."""
    from ..baselines.soc_dag import RULES, system_spec
    from ..envs.soc_dag.sim import Simulator
    from ..envs.soc_dag.spec import SocDagSpec

    soc, jobs = stream(100.0, num_jobs, args)
    workload = jobs.draw(np.random.default_rng(args.seed))
    for name in ("eft", "heft_rt", "late_srpt"):
        rule = RULES[name]
        simulator = Simulator(system_spec(rule, SocDagSpec(soc, noise="normal", noise_sigma=0.2)))
        taken = []
        for seed in range(repeats + 1):  # the first compiles
            simulator.reset(workload, seed)
            start = time.process_time()
            simulator.run(rule)
            taken.append(time.process_time() - start)
        per_s = workload.num_tasks / min(taken[1:])
        detail = f"{jobs.name}, {num_jobs} jobs, noise .2, {name}, best of {repeats}; peers: {PEERS}"
        suffix = "" if name == "eft" else f"/{name}"
        yield faster("decisions_per_cpu_s_rules" + suffix, per_s, "1/s", "goal", RULES_GOAL, detail)


def rows(args: Args) -> Iterator[Row]:
    """All rows, as they are measured."""
    quick = args.quick
    repeats = 1 if quick else args.repeats
    command.say(stream(100.0, 1, args)[1].source)
    yield from heft_rows(quick, repeats, args.seed)
    yield from env_rows(args, 4 if quick else 64, 20 if quick else 50, repeats)
    yield from rule_rows(args, 50 if quick else 2000, repeats)
