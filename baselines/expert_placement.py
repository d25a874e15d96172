"""Placements of experts on devices: ExFlow's integer program by CP-SAT, and greedy by affinity.

Every function takes a `PlacementProblem` and returns a placement, int64 (L, E), that balances every layer and keeps the
limits (`PlacementProblem.problems` is empty), or raises InputError.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..envs.core.errors import InputError
from ..envs.expert_caching.placement import PlacementProblem

SCALE = 10**7
"""Flows, energies and latencies become integers of this many units a token for CP-SAT."""


def contiguous(problem: PlacementProblem) -> np.ndarray:
    """The usual expert parallelism: expert e of every layer on device e // (E / D), whatever the routing."""
    layers, num_experts = problem.popularity.shape
    return np.tile(np.arange(num_experts) // problem.room, (layers, 1))


def greedy(problem: PlacementProblem) -> np.ndarray:
    """Layer by layer: pairs of (expert, device) in order of the flow that they keep, as long as there is room.

    ExFlow's greedy rival. Under limits on energy or latency, a pair is passed over if no placement within them
    could follow.
    """
    layers, num_experts = problem.popularity.shape
    placement = np.zeros((layers, num_experts), np.int64)
    placement[0] = _popular_apart(problem)
    if not _fits(problem, placement, 1):
        placement[0] = _cheapest_layer(problem, 0)
    for layer in range(1, layers):
        gains = _gains(problem, placement, layer)
        placement[layer] = -1
        room = np.full(problem.spec.num_devices, problem.room)
        for pair in np.argsort(-gains, axis=None, kind="stable"):
            expert, device = divmod(int(pair), problem.spec.num_devices)
            if placement[layer, expert] < 0 and room[device] > 0:
                placement[layer, expert] = device
                room[device] -= 1
        if not _fits(problem, placement, layer + 1):
            placement[layer] = _cheapest_layer(problem, layer)
    return _checked(problem, placement)


def layerwise(problem: PlacementProblem, *, sweeps: int = 4) -> np.ndarray:
    """Greedy, then each layer in turn placed optimally between its neighbours (an assignment problem), to and fro.

    A sweep never lowers the flow kept. Under limits, a layer changes only if the limits still hold.
    """
    placement = greedy(problem)
    layers = len(placement)
    for sweep in range(sweeps):
        for layer in range(layers) if sweep % 2 == 0 else range(layers - 1, -1, -1):
            gains = _gains(problem, placement, layer, both=True)
            rows, columns = linear_sum_assignment(-np.repeat(gains, problem.room, axis=1))
            changed = placement.copy()
            changed[layer, rows] = columns // problem.room
            if problem.kept(changed) > problem.kept(placement) and not problem.problems(changed):
                placement = changed
    return _checked(problem, placement)


def cp_sat(problem: PlacementProblem, *, time_limit_s: float = 60.0, workers: int = 1, seed: int = 0) -> np.ndarray:
    """ExFlow's integer program, warm-started by `layerwise`: the best placement found within the time limit.

    Maximises the sum over layers and devices of flow[l, e, e'] * x[l, e, d] * x[l + 1, e', d], with E / D experts of
    each layer on each device, and the limits. Exact if CP-SAT closes the gap, which it does for a few dozen experts.

    Raises InputError if ortools is not installed.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise InputError("ortools is not installed", remedy="Install it with `pip install schedlab[exact]`") from error
    layers, num_experts = problem.popularity.shape
    devices = range(problem.spec.num_devices)
    model = cp_model.CpModel()
    x = [[[model.new_bool_var(f"x{n}_{e}_{d}") for d in devices] for e in range(num_experts)] for n in range(layers)]
    for layer in range(layers):
        for e in range(num_experts):
            model.add_exactly_one(x[layer][e])
        for d in devices:
            model.add(sum(x[layer][e][d] for e in range(num_experts)) == problem.room)
    if len(set(problem.spec.energy_j)) <= 1 and len(set(problem.spec.latency_s)) <= 1:
        model.add(x[0][0][0] == 1)  # equal devices: their names do not matter
    terms = []
    for layer in range(layers - 1):
        for e in range(num_experts):
            for following in range(num_experts):
                units = round(problem.flow[layer, e, following] * SCALE)
                if units == 0:
                    continue
                for d in devices:
                    both = model.new_bool_var("")
                    model.add_implication(both, x[layer][e][d])
                    model.add_implication(both, x[layer + 1][following][d])
                    terms.append(units * both)
    for cost, limit in zip(problem.spec.costs, problem.spec.limits, strict=True):
        if np.isfinite(limit):
            spent = [
                int(np.ceil(problem.popularity[n, e] * cost[d] * SCALE)) * x[n][e][d]
                for n in range(layers)
                for e in range(num_experts)
                for d in devices
            ]
            model.add(sum(spent) <= int(limit * SCALE))
    model.maximize(sum(terms))
    start = layerwise(problem)
    first = start[0, 0]
    renamed = np.where(start == 0, first, np.where(start == first, 0, start)) if first else start
    if len(set(problem.spec.energy_j)) <= 1 and len(set(problem.spec.latency_s)) <= 1:
        start = renamed
    for layer in range(layers):
        for e in range(num_experts):
            for d in devices:
                model.add_hint(x[layer][e][d], bool(start[layer, e] == d))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.num_workers = workers
    solver.parameters.random_seed = seed
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return _checked(problem, start)
    found = np.array([[[solver.boolean_value(v) for v in row] for row in layer] for layer in x]).argmax(2)
    return _checked(problem, found if problem.kept(found) >= problem.kept(start) else start)


def _gains(problem: PlacementProblem, placement: np.ndarray, layer: int, *, both: bool = False) -> np.ndarray:
    """float64 (E, D): flow that a layer's experts keep on each device, from the layer before (and to the next)."""
    on_device = np.eye(problem.spec.num_devices)
    gains = np.zeros((placement.shape[1], problem.spec.num_devices))
    if layer > 0:
        gains += problem.flow[layer - 1].T @ on_device[placement[layer - 1]]
    if both and layer + 1 < len(placement):
        gains += problem.flow[layer] @ on_device[placement[layer + 1]]
    return gains


def _popular_apart(problem: PlacementProblem) -> np.ndarray:
    """int (E,): the first layer, dealt out by popularity, so that no device gets all popular experts."""
    order = np.argsort(-problem.popularity[0], kind="stable")
    devices = np.empty(len(order), np.int64)
    devices[order] = np.arange(len(order)) % problem.spec.num_devices
    return devices


def _cheapest_layer(problem: PlacementProblem, layer: int) -> np.ndarray:
    """int (E,): popular experts on the cheapest devices, of the two costs the one whose limit is closer."""
    tightness = [
        least / limit if np.isfinite(limit) else 0.0
        for least, limit in zip(problem.least_costs(), problem.spec.limits, strict=True)
    ]
    cost = problem.spec.costs[int(np.argmax(tightness))]
    devices = np.empty(problem.popularity.shape[1], np.int64)
    devices[np.argsort(-problem.popularity[layer], kind="stable")] = np.repeat(np.argsort(cost), problem.room)
    return devices


def _fits(problem: PlacementProblem, placement: np.ndarray, layers: int) -> bool:
    """True if the first layers leave room within the limits for the cheapest placement of the others."""
    whole = placement.copy()
    for layer in range(layers, len(placement)):
        whole[layer] = _cheapest_layer(problem, layer)
    return not problem.problems(whole)


def _checked(problem: PlacementProblem, placement: np.ndarray) -> np.ndarray:
    wrong = problem.problems(placement)
    if wrong:
        raise InputError(f"no placement found within the limits ({wrong[0]})", remedy="Raise the limits")
    return placement.astype(np.int64)
