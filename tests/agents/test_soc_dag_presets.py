"""`schedlab train soc_dag/tiny`, resumed after a kill, evaluated as a policy; and the shipped agent."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from schedlab.agents.checkpoint import load_checkpoint
from schedlab.agents.soc_dag import SHIPPED, load_pointer, sampled_plans
from schedlab.agents.soc_dag_train import BestOfSamples, GroupsOfRuns
from schedlab.agents.train import train
from schedlab.baselines.soc_static import STATIC
from schedlab.envs.core.errors import InputError
from schedlab.envs.soc_dag.generate import cpu_gpu_soc, random_layered, tiled
from schedlab.envs.soc_dag.library import Graph
from schedlab.envs.soc_dag.spec import uniform_soc
from schedlab.experiments import evaluate
from schedlab.experiments.presets import PRESETS
from schedlab.experiments.soc_dag import find_policies
from schedlab.experiments.soc_dag_presets import draw_group, single_spec


def train_tiny(out, rounds: int, *, stop_after: int | None = None, resume: bool = False):
    """The preset with few rounds; raises KeyboardInterrupt after some."""
    recipe, rows = PRESETS["soc_dag/tiny"].build(0, None), []

    def moved(row):
        rows.append(row)
        if len(rows) == stop_after:
            raise KeyboardInterrupt

    few = {"label_rounds": rounds, "group_rounds": 3, "label_capacity": 3000, "rounds_per_checkpoint": 2}
    config = replace(recipe.config, **few, hidden=16)
    labeller = BestOfSamples(recipe.labeller.draw, 6)
    player = GroupsOfRuns(partial(draw_group, samples=4), 2)
    result = train(
        config, recipe.make_env, out, labeller=labeller, player=player, keeper=labeller, resume=resume, progress=moved
    )
    return result, rows


def test_training_goes_on_after_a_kill_and_its_result_is_a_policy(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "run", 6, stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "run", 6, stop_after=4, resume=True)
    result, rows = train_tiny(tmp_path / "run", 6, resume=True)
    assert [row["group_round"] for row in rows] == [2]
    assert load_checkpoint(result.final).config["env_id"] == "schedlab/SocDag-v0"
    argv = ["soc_dag", "--policies", "late_rank", str(tmp_path / "run"), "--workload", "random_8-12x3", "--seeds", "2"]
    argv += ["--objective", "makespan", "--transfers", "push", "--out", str(tmp_path / "results")]
    assert evaluate.main(argv) == 0
    assert evaluate.main(["--validate", str(tmp_path / "results")]) == 0
    rows = list(csv.DictReader((tmp_path / "results" / "results.csv").open()))
    assert {row["policy"] for row in rows} == {"late_rank", str(tmp_path / "run")}


def test_without_a_labeller_there_are_no_rounds(tmp_path):
    recipe = PRESETS["soc_dag/tiny"].build(0, None)
    with pytest.raises(InputError, match="no labeller"):
        train(recipe.config, recipe.make_env, tmp_path / "run")


def test_the_shipped_agent_beats_the_static_schedulers():
    """On fresh random graphs and on the tiled Cholesky, which it was not trained on in this size."""
    agent, rng, ratios = load_pointer(SHIPPED, "agent"), np.random.default_rng(99), []
    for _ in range(8):
        soc = uniform_soc(4)
        dag = random_layered(int(rng.integers(20, 51)), 4, seed=rng)
        best = min(scheduler(Graph.of(dag, soc)).makespan_us for scheduler in STATIC.values())
        ratios.append(min(plan.makespan_us for plan in sampled_plans(agent, soc, dag)) / best)
    assert np.mean(ratios) < 0.98
    plans = sampled_plans(agent, cpu_gpu_soc(), tiled("cholesky", 8))
    assert min(plan.makespan_us for plan in plans) <= 250.0


def test_agents_are_found_by_name():
    names = ["agent", "agent_8", "agent_8_climb", "climb_8"]
    agent, *planners = find_policies(names)
    assert [agent.name, *(planner.name for planner in planners)] == names
    dag = random_layered(40, 4, seed=5, ccr=4.0)  # far from what any of them ends at
    ends = [planner.plan(dag, single_spec(uniform_soc(4))).makespan_us for planner in planners]
    assert 0 < ends[1] < ends[0]
    with pytest.raises(InputError, match="agent_<samples>"):
        find_policies(["agent_zero"])
