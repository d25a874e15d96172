"""`schedlab/ExpertPlacement-v0` and the placements of the field."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

import schedlab.envs  # noqa: F401
from schedlab.baselines.expert_placement import contiguous, cp_sat, greedy, layerwise
from schedlab.envs.core.errors import InputError
from schedlab.envs.expert_caching.placement import ExpertPlacementSpec, ExpertPlacementVectorEnv, PlacementProblem
from schedlab.envs.expert_caching.workload import Workload, generate

PLACERS = (contiguous, greedy, layerwise)


def chains() -> Workload:
    """Expert e is always followed by e + 1 (of 4, in a ring): the first layer settles all others."""
    first = np.arange(40) % 4
    return Workload.from_arrays("chains", np.stack([first, (first + 1) % 4, (first + 2) % 4], 1)[:, :, None], [40])


def best_of_all(problem: PlacementProblem) -> float:
    """Exhaustive search, two devices."""
    num_experts = problem.popularity.shape[1]
    rows = [
        np.isin(np.arange(num_experts), chosen).astype(int)
        for chosen in combinations(range(num_experts), num_experts // 2)
    ]
    placements = (np.stack(rows_) for rows_ in product(rows, repeat=len(problem.popularity)))
    return max(problem.kept(p) for p in placements if not problem.problems(p))


def test_chains_are_kept_whole():
    problem = PlacementProblem.of(ExpertPlacementSpec(num_devices=2), chains())
    assert problem.kept(contiguous(problem)) == 0.5
    for place in (greedy, layerwise, cp_sat):
        assert problem.kept(place(problem)) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limits", [{}, {"energy_j": (1.0, 3.0), "energy_limit_j": 5.9}])
def test_the_integer_program_is_exact(seed, limits):
    workload = generate(6, num_layers=3, num_experts=4, top_k=1, mean_length=15, seed=seed)
    problem = PlacementProblem.of(ExpertPlacementSpec(num_devices=2, **limits), workload)
    best = best_of_all(problem)
    found = cp_sat(problem)
    assert problem.problems(found) == []
    assert problem.kept(found) == pytest.approx(best, abs=1e-5)
    for place in (greedy, layerwise):
        assert problem.problems(place(problem)) == []
        assert problem.kept(place(problem)) <= best + 1e-9


def test_affinity_beats_routing_blind_placement():
    """As ExFlow reports: far fewer tokens change devices; the sweeps never lose to greedy."""
    problem = PlacementProblem.of(ExpertPlacementSpec(num_devices=4), generate(32, seed=1))
    kept = {place.__name__: problem.kept(place(problem)) for place in PLACERS}
    assert abs(kept["contiguous"] - 0.25) < 0.06
    assert kept["greedy"] > kept["contiguous"] + 0.05
    assert kept["layerwise"] >= kept["greedy"]


def test_bad_placements_and_problems_are_refused():
    problem = PlacementProblem.of(ExpertPlacementSpec(num_devices=2), chains())
    assert "layer 0 has [4, 0] experts" in problem.problems(np.zeros((3, 4), int))[0]
    assert "shape" in problem.problems(np.zeros((2, 4), int))[0]
    with pytest.raises(InputError, match="4 experts of 3 layers for 3 devices"):
        PlacementProblem.of(ExpertPlacementSpec(num_devices=3), chains())
    with pytest.raises(InputError, match="cheapest balanced placement takes 6 of energy"):
        spec = ExpertPlacementSpec(num_devices=2, energy_j=(1.0, 3.0), energy_limit_j=5.0)
        PlacementProblem.of(spec, chains())
    for changes in ({"num_devices": 0}, {"energy_j": (1.0,)}, {"latency_limit_s": 0.0}, {"latency_s": (-1, 1, 1, 1)}):
        with pytest.raises(InputError):
            ExpertPlacementSpec(**changes)


@pytest.mark.parametrize(
    "spec",
    [
        ExpertPlacementSpec(num_devices=4),
        ExpertPlacementSpec(num_devices=2, energy_j=(1.0, 3.0), energy_limit_j=31.0),
        ExpertPlacementSpec(num_devices=4, latency_s=(1.0, 1.0, 2.0, 5.0), latency_limit_s=33.0),
    ],
)
def test_random_legal_play_gives_a_legal_placement(spec):
    workload = generate(24, seed=5)
    env = ExpertPlacementVectorEnv(3, spec=spec, workload=workload, episode_sequences=12, debug=True)
    rng = np.random.default_rng(0)
    _, info = env.reset(seed=0)
    problems = list(env.problems)
    total = np.zeros(3)
    for _ in range(4 * 32):
        placement = env.placement.copy()
        assert info["action_mask"].any(1).all()
        actions = np.where(info["action_mask"], rng.random(info["action_mask"].shape), -1).argmax(1)
        last = [env.order[n, env.head[n, 0], env.head[n, 1]] for n in range(3)]
        obs, reward, terminated, _, info = env.step(actions)
        assert np.isfinite(obs["context"]).all()
        total += reward
    assert terminated.all()
    for n in range(3):
        placement[n, 3, last[n]] = actions[n]
        assert problems[n].problems(placement[n]) == []
        assert problems[n].kept(placement[n]) == pytest.approx(total[n])


def test_following_the_flow_in_the_env_is_greedy_enough():
    """The first candidate feature alone makes a good policy: it beats random placement."""
    env = ExpertPlacementVectorEnv(1, workload=generate(24, seed=5), episode_sequences=None)
    obs, _ = env.reset(seed=0)
    total = 0.0
    for _ in range(4 * 32):
        score = np.where(obs["action_mask"][0], obs["candidates"][0, :, 0], -1.0)
        obs, reward, *_ = env.step(np.array([score.argmax()]))
        total += reward[0]
    assert total > 0.3
