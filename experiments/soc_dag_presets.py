"""Training presets of task graphs: self-labelling over single graphs and streams, with plans and searched rules to
begin with, and a policy gradient on noisy graphs.

One network for every objective, system and number of jobs: what is asked for is among the columns of the context.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from ..baselines.soc_linear import PARAMS, linear_rule
from ..baselines.soc_static import STATIC, plan_rule
from ..envs.soc_dag.env import SocDagVectorEnv
from ..envs.soc_dag.generate import cpu_gpu_soc, random_layered, random_stream, tiled
from ..envs.soc_dag.library import Graph, Plan
from ..envs.soc_dag.rule import Rule
from ..envs.soc_dag.spec import Soc, SocDagSpec, uniform_soc
from ..envs.soc_dag.table import FEATURE_VERSION
from ..envs.soc_dag.workload import Dag, Workload
from .soc_dag_search import TEACHERS, TRAINING_SEED, StreamCell, rule_loss, teacher_cells

if TYPE_CHECKING:
    from ..agents.policy import PointerPolicy
    from ..agents.soc_dag_train import Draw, Instance
    from ..agents.train import Evaluate
    from .presets import Recipe

DataDir = str | PathLike[str] | None

LATE_PEFT = linear_rule((0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0), "late_peft")
"""Highest upward rank first, to where the job would end first: what noisy single graphs begin with."""
PUSHED, FREQUENCIES = 0.3, 0.25
"""Shares of the streams in which data are pushed, and in which frequencies may be chosen."""
SHORTEST_STREAM, LONGEST_STREAM, KEPT_JOBS = 15, 300, 7
"""Jobs of a stream, and of how many of these as many states as they have are learned from, drawn from all of them.
Queues are long in long streams only; but single graphs are to have their say, too."""
DISTRACTED = 0.2
"""Share of the streams under other objectives whose jobs have deadlines all the same: these must not matter."""
EXACT_ROUNDS, EXACT_TASKS, EXACT_SECONDS = 4, 24, 2.0
"""In the first rounds, small graphs are planned by CP-SAT, where it is installed, for as long as that."""


def single(dag: Dag, soc: Soc) -> Workload:
    """One job, there at the start."""
    return Workload.from_arrays(dag.name, soc.kind_names, [dag], [0], [0.0], source=dag.source)


def single_spec(soc: Soc, noise_sigma: float = 0.0) -> SocDagSpec:
    """The setting of the literature on static schedules: makespan, data move as soon as they are made."""
    noise = "lognormal" if noise_sigma > 0 else "none"
    return SocDagSpec(soc, transfers="push", objective="makespan", noise=noise, noise_sigma=noise_sigma)


def best_static(dag: Dag, soc: Soc) -> Plan:
    """The shortest plan of the static schedulers."""
    graph = Graph.of(dag, soc)
    return min((scheduler(graph) for scheduler in STATIC.values()), key=lambda plan: plan.makespan_us)


# ------------------------------------------------------------------------------------------------- what is drawn


def draw_layered(rng: np.random.Generator, most: int = 50) -> tuple[Soc, Dag]:
    """A random layered graph on 2 to 8 PEs; half of them with parameters drawn widely."""
    pes = int(rng.choice([2, 3, 4, 4, 4, 6, 8]))
    varied: dict[str, Any] = {}
    if rng.random() < 0.5:
        varied = {
            "ccr": float(np.exp(rng.uniform(math.log(0.1), math.log(5.0)))),
            "heterogeneity": float(rng.uniform(0.2, 1.8)),
            "shape": float(rng.uniform(0.5, 2.0)),
            "degree": float(rng.uniform(1.5, 4.0)),
        }
    return uniform_soc(pes), random_layered(int(rng.integers(10, most + 1)), pes, seed=rng, **varied)


def draw_tiles(rng: np.random.Generator, least: int = 3, most: int = 7) -> tuple[Soc, Dag]:
    """A tiled Cholesky, LU or QR of `least` to `most` tiles on 1 to 3 CPUs and GPUs."""
    name = str(rng.choice(["cholesky", "lu", "qr"]))
    tiles = int(rng.integers(least, most + 1))
    return cpu_gpu_soc(int(rng.integers(1, 4)), int(rng.integers(1, 4))), tiled(name, tiles)


def draw_single(rng: np.random.Generator, index: int, samples: int = 64) -> Instance:
    """A single graph without noise, with the best static plan or, of small ones at first, CP-SAT's."""
    from ..agents.soc_dag_train import Instance

    soc, dag = draw_layered(rng) if rng.random() < 0.75 else draw_tiles(rng)
    plan = best_static(dag, soc)
    if index < EXACT_ROUNDS and dag.num_tasks <= EXACT_TASKS and find_spec("ortools"):
        from ..baselines.cp_sat.soc_dag import solve

        plan = solve(dag, soc, seconds=EXACT_SECONDS, resolution_us=0.1, num_workers=1, hint=plan).plan
    return Instance(single_spec(soc), single(dag, soc), 0, [plan_rule("plan", [plan])], samples)


def draw_noisy(
    rng: np.random.Generator, index: int, samples: int = 16, tiles: float = 0.6, least: int = 3, calmest: float = 0.2
) -> Instance:
    """A single graph whose durations vary by `calmest` to 1; a share `tiles` is tiled, `least` or more to a side."""
    from ..agents.soc_dag_train import Instance

    soc, dag = draw_tiles(rng, least) if rng.random() < tiles else draw_layered(rng)
    spec = single_spec(soc, float(rng.uniform(calmest, 1.0)))
    return Instance(spec, single(dag, soc), int(rng.integers(TRAINING_SEED)), [LATE_PEFT], samples)


@cache
def teachers() -> list[tuple[StreamCell, Rule]]:
    """The cells of streams with the rules searched for them."""
    weights = json.loads(TEACHERS.read_text())
    return [(cell, linear_rule(tuple(weights[cell.name]))) for cell in teacher_cells()]


@cache
def teachers_of_frequencies() -> list[tuple[StreamCell, Rule]]:
    """The same where frequencies may be chosen, data pulled.

    The rules for energy times delay weigh energy against finish in the choice of the PE, and so in that of its
    operating point (10-18% less with it, as they are); for other objectives that weight is left out: tasks run as fast
    as they can. Not at gap 40: 45% of the tables have no room for every frequency there.
    """
    found = []
    for cell, rule in teachers():
        if cell.jobs == "ds3" and cell.transfers == "pull" and cell.gap_us > 40.0:
            weights, is_edp = rule.param_array.copy(), cell.objective == "edp"
            weights[PARAMS.index("energy against finish, in the choice of PE")] *= is_edp
            found.append((replace(cell, choose_frequency=True), linear_rule(weights)))
    return found


def draw_stream(rng: np.random.Generator, index: int) -> Instance:
    """Jobs of one of the cells, at about its rate, with less or more noise.

    The rule says what to do wherever the policy comes. No samples: the best of 12 runs of a stream owes more to luck
    than to skill (measured: an agent that imitated these fell 9% behind the rules in energy-delay product).
    """
    from ..agents.soc_dag_train import Instance

    drawn = rng.random()
    kinds = teachers_of_frequencies()
    if drawn < 1.0 - FREQUENCIES:
        kinds = [one for one in teachers() if (one[0].transfers == "push") == (drawn < PUSHED)]
    cell, rule = kinds[int(rng.integers(len(kinds)))]
    if cell.objective != "deadline" and rng.random() < DISTRACTED:
        cell = replace(cell, slack=float(rng.choice([2.0, 3.0, 5.0])))
    jobs = int(np.exp(rng.uniform(math.log(SHORTEST_STREAM), math.log(LONGEST_STREAM))))
    soc, stream = cell.stream(jobs, cell.gap_us * float(rng.uniform(0.85, 1.15)))
    sigma = float(rng.choice([0.0, 0.2, 0.2, 0.5]))
    spec = cell.spec(soc).replace(noise_sigma=sigma)
    return Instance(spec, stream.draw(rng), int(rng.integers(TRAINING_SEED)), [rule], 0, KEPT_JOBS / jobs)


def draw_group(rng: np.random.Generator, index: int, samples: int = 16) -> Instance:
    """A noisy single graph to play in groups: more tiles, more noise."""
    return draw_noisy(rng, index, samples, tiles=0.7, least=5, calmest=0.3)


def draw_kept(rng: np.random.Generator, index: int) -> Instance:
    """What a policy that learns from noisy graphs is not to forget."""
    return draw_single(rng, index, samples=1) if rng.random() < 0.5 else draw_stream(rng, index)


def mixture(parts: Sequence[tuple[float, Draw]]) -> Draw:
    """Draws from one of the parts, with these probabilities."""

    def draw(rng: np.random.Generator, index: int) -> Instance:
        which = int(rng.choice(len(parts), p=[share for share, _ in parts]))
        return parts[which][1](rng, index)

    return draw


# -------------------------------------------------------------------------------------------------- how it is judged


def score_on(graphs: int = 24, jobs: int = 150, cells: Sequence[StreamCell] = ()) -> Evaluate:
    """Measures a policy, greedy, on training jobs: percent that it is under the best static plan or the cell's rule.

    `score` is the mean over "random", "cholesky" and the objectives of the cells.
    """
    from ..agents.compiled import pack_weights
    from ..agents.soc_dag import PointerScheduling
    from ..envs.soc_dag.sim import Simulator

    rng = np.random.default_rng(TRAINING_SEED)
    runs: list[tuple[str, SocDagSpec, Workload, int, float]] = []
    for _ in range(graphs):
        soc = uniform_soc(4)
        dag = random_layered(int(rng.integers(20, 51)), 4, seed=rng)
        runs.append(("random", single_spec(soc), single(dag, soc), 0, best_static(dag, soc).makespan_us))
    soc, dag = cpu_gpu_soc(), tiled("cholesky", 8)
    runs.append(("cholesky", single_spec(soc), single(dag, soc), 0, best_static(dag, soc).makespan_us))
    rules = dict(teachers()) if cells else {}
    for cell in cells:
        soc, stream = cell.stream(jobs)
        workload, spec = stream.draw(np.random.default_rng(TRAINING_SEED + 9)), cell.spec(soc)
        runs.append((cell.objective, spec, workload, 9, rule_loss(spec, rules[cell], [workload], [9])[0]))

    def evaluate(policy: PointerPolicy) -> dict[str, float]:
        from ..envs.soc_dag.env import loss_of

        gains: dict[str, list[float]] = {}
        for name, spec, workload, seed, reference in runs:
            agent = PointerScheduling("agent", pack_weights(policy.network, spec.num_candidates), spec.num_candidates)
            simulator = Simulator(spec)
            simulator.reset(workload, seed)
            agent.run(simulator)
            if spec.objective == "makespan":
                loss = float(simulator.sim.state.engine[0]["now"])
            else:
                loss = float(loss_of(simulator.sim)) / len(workload)
            gains.setdefault(name, []).append(100.0 * (reference - loss) / max(reference, 1e-3))
        means = {name: float(np.mean(values)) for name, values in gains.items()}
        return {"score": float(np.mean(list(means.values()))), **means}

    return evaluate


# ------------------------------------------------------------------------------------------------------ presets


def build(seed: int, draw: Draw, instances: int, evaluate: Evaluate, card: str, **changes: Any) -> Recipe:
    """Self-labelling on what `draw` draws, then a policy gradient on noisy graphs, if `group_rounds` says so."""
    from ..agents.soc_dag import ENV_ID
    from ..agents.soc_dag_train import BestOfSamples, GroupsOfRuns
    from ..agents.train import TrainConfig
    from .presets import Recipe

    soc, stream = random_stream(16, num_tasks=(6, 14), gap_us=25.0, num_jobs=4)
    spec = SocDagSpec(soc, transfers="push")

    def make_env(num_envs: int, env_seed: int) -> SocDagVectorEnv:
        env = SocDagVectorEnv(num_envs, spec=spec, workload=stream, graph=False)
        env.reset(seed=env_seed)
        return env

    config = TrainConfig(
        env_id=ENV_ID,
        spec=spec.to_dict(),
        feature_version=FEATURE_VERSION,
        seed=seed,
        total_steps=0,
        **changes,
    )
    return Recipe(
        config,
        make_env,
        evaluate=evaluate,
        card=card,
        labeller=BestOfSamples(draw, instances, seed),
        player=GroupsOfRuns(draw_group, instances // 2, seed=seed),
        keeper=BestOfSamples(draw_kept, 4 * instances, seed),
    )


def tiny(seed: int, data_dir: DataDir) -> Recipe:
    """Random graphs only: the way to an agent, not one."""

    def draw(rng: np.random.Generator, index: int) -> Instance:
        return draw_single(rng, EXACT_ROUNDS, samples=32)

    card = (
        "# A small scheduler of task graphs\n\nSelf-labelled on random graphs and tiled factorisations for makespan. "
        "Made to show the way, not to win.\n"
    )
    return build(seed, draw, 32, score_on(12), card, hidden=32, label_rounds=12, label_capacity=12_000)


def agent(seed: int, data_dir: DataDir) -> Recipe:
    """The shipped agent: single graphs with and without noise, DS3's mix under three objectives, data-parallel jobs."""
    if data_dir is not None:  # the cells find DS3's jobs by this variable alone
        os.environ["SCHEDLAB_DATA"] = str(data_dir)
    parts: list[tuple[float, Callable]] = [(0.5, draw_single), (0.25, draw_noisy), (0.25, draw_stream)]
    judged = [cell for cell in teacher_cells() if cell.gap_us in (50.0, 25e6)]
    card = (
        "# The shipped scheduler of task graphs\n\nOne network for single graphs (makespan, with and without noise), "
        "DS3's mix (latency, deadlines, energy-delay product; data pulled or pushed; frequencies given or chosen) and "
        "data-parallel jobs. Self-labelled: the best of 64 (single graphs) or 16 (with noise) samples, a plan of "
        "HEFT, PEFT, CPOP, lookahead HEFT or CP-SAT, or a searched rule, is imitated. Then a policy gradient on groups "
        "of runs of noisy graphs. `docs/soc_dag.md` has what it was measured at.\n"
    )
    return build(
        seed,
        mixture(parts),
        96,
        score_on(24, cells=judged),
        card,
        hidden=48,
        label_rounds=240,
        label_passes=1,
        label_capacity=72_000,
        label_lr=2e-3,
        group_rounds=160,
    )
