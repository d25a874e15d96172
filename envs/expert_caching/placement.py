"""`schedlab/ExpertPlacement-v0`: which device holds which expert, so that tokens seldom change devices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import InputError
from ..core.kernel import njit_borrowed
from ..core.vector_env import PointerEnv, PointerVectorEnv
from .workload import Workload, generate

CONTEXT_FEATURES = (
    "layer / layers",
    "experts of the layer placed / experts",
    "popularity of the expert x experts / top k, / 4",
    "affinity kept so far / affinity decided so far",
    "energy a token so far / limit",
    "latency a token so far / limit",
    "flow into the expert from the layer before / popularity",
)
CANDIDATE_FEATURES = (
    "flow into the expert from this device / flow into it",
    "that, less the best of the other open devices'",
    "flow from this device that is still without a place / flow from the layer before",
    "room left for this layer",
    "popularity placed here in this layer / top k",
    "energy of a use / largest",
    "latency of a use / largest",
)


@dataclass(frozen=True)
class ExpertPlacementSpec:
    """Devices, and what a use of an expert costs on each."""

    num_devices: int = 4
    energy_j: tuple[float, ...] = ()
    """Joules of one use of an expert on each device; none: devices are equal and free."""
    latency_s: tuple[float, ...] = ()
    """Seconds of one use of an expert on each device; none: devices are equal and free."""
    energy_limit_j: float = math.inf
    """Most joules a token."""
    latency_limit_s: float = math.inf
    """Most seconds a token, summed over its uses."""

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise InputError(f"num_devices is {self.num_devices}", remedy="Give at least one device")
        for name in ("energy_j", "latency_s"):
            values = getattr(self, name)
            if values and (len(values) != self.num_devices or min(values) < 0 or not math.isfinite(sum(values))):
                raise InputError(
                    f"{name} is {values} for {self.num_devices} devices", remedy="Give one non-negative number each"
                )
        for name in ("energy_limit_j", "latency_limit_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}", remedy="Give a positive limit, or leave it out")

    @property
    def costs(self) -> np.ndarray:
        """float64 (2, D): joules and seconds of a use on each device."""
        zeros = (0.0,) * self.num_devices
        return np.array([self.energy_j or zeros, self.latency_s or zeros], np.float64)

    @property
    def limits(self) -> np.ndarray:
        """float64 (2,): joules and seconds a token."""
        return np.array([self.energy_limit_j, self.latency_limit_s], np.float64)


@dataclass(frozen=True)
class PlacementProblem:
    """What a placement is judged by, counted on a workload.

    A placement is int (L, E): the device of each expert, every device E / D experts of every layer.
    """

    spec: ExpertPlacementSpec
    popularity: np.ndarray  # (L, E) float64: uses a token
    flow: np.ndarray  # (L - 1, E, E) float64: uses a token of e' at layer l + 1 by tokens that used e at layer l

    @classmethod
    def of(cls, spec: ExpertPlacementSpec, workload: Workload) -> PlacementProblem:
        """Count popularity and flow. Raises InputError if the experts cannot be shared out, or no placement fits."""
        layers, num_experts = workload.num_layers, workload.num_experts
        if num_experts % spec.num_devices or layers < 2:
            raise InputError(
                f"{num_experts} experts of {layers} layers for {spec.num_devices} devices",
                remedy="Give a number of devices that divides the experts, and at least two layers",
            )
        flow = np.empty((layers - 1, num_experts, num_experts))
        routing = workload.experts.astype(np.int64)
        for layer in range(layers - 1):
            pairs = routing[:, layer, :, None] * num_experts + routing[:, layer + 1, None, :]
            flow[layer] = np.bincount(pairs.ravel(), minlength=num_experts**2).reshape(num_experts, num_experts)
        problem = cls(spec, workload.popularity().astype(np.float64), flow / workload.num_tokens)
        least = problem.least_costs()
        for name, cost, limit in zip(("energy", "latency"), least, spec.limits, strict=True):
            if cost > limit * (1 + 1e-9):
                raise InputError(
                    f"the cheapest balanced placement takes {cost:g} of {name} a token, the limit is {limit:g}",
                    remedy="Raise the limit or give cheaper devices",
                )
        return problem

    @property
    def room(self) -> int:
        """Experts of a layer on each device."""
        return self.popularity.shape[1] // self.spec.num_devices

    def kept(self, placement: np.ndarray) -> float:
        """Share of the flow between layers that stays on its device."""
        same = placement[:-1, :, None] == placement[1:, None, :]
        return float((self.flow * same).sum() / self.flow.sum())

    def token_costs(self, placement: np.ndarray) -> np.ndarray:
        """float64 (2,): joules and seconds a token."""
        return np.array([(self.popularity * cost[placement]).sum() for cost in self.spec.costs])

    def least_costs(self) -> np.ndarray:
        """float64 (2,): the least joules, and seconds, of any balanced placement: popular experts go cheapest."""
        popular = -np.sort(-self.popularity, axis=1)
        return np.array([(popular * np.repeat(np.sort(cost), self.room)).sum() for cost in self.spec.costs])

    def problems(self, placement: np.ndarray) -> list[str]:
        """What is wrong with a placement, empty if nothing is: shape, devices, balance, limits."""
        found = []
        if placement.shape != self.popularity.shape:
            return [f"placement has shape {placement.shape}, expected {self.popularity.shape}"]
        for layer, row in enumerate(placement):
            counts = [int((row == device).sum()) for device in range(self.spec.num_devices)]
            if counts != [self.room] * self.spec.num_devices:
                found.append(f"layer {layer} has {counts} experts on the devices, expected {self.room} on each")
        names = ("energy", "latency")
        costs = self.token_costs(np.clip(placement, 0, self.spec.num_devices - 1))
        for name, cost, limit in zip(names, costs, self.spec.limits, strict=True):
            if cost > limit * (1 + 1e-9):
                found.append(f"{name} of {cost:g} a token exceeds the limit of {limit:g}")
        return found


@njit_borrowed
def least_left(popular, order, place, layer, room_left, cost, scratch) -> float:
    """Least cost of the experts of a layer from `place` on, in order of popularity: the cheapest devices fill first."""
    for d in range(len(cost)):
        scratch[d] = room_left[d]
    total = 0.0
    for i in range(place, len(order)):
        best = -1
        for d in range(len(cost)):
            if scratch[d] > 0 and (best < 0 or cost[d] < cost[best]):
                best = d
        if best < 0:
            return total
        scratch[best] -= 1
        total += popular[layer, order[i]] * cost[best]
    return total


@njit_borrowed
def place_one(head, device, placement, room_left, spent, popular, order, flow, costs, total_flow) -> float:
    """Put the present expert on a device and go on. Returns the share of the flow that this keeps."""
    layer, place = head[0], head[1]
    expert = order[layer, place]
    placement[layer, expert] = device
    room_left[device] -= 1
    gain = 0.0
    if layer > 0:
        for e in range(placement.shape[1]):
            if placement[layer - 1, e] == device:
                gain += flow[layer - 1, e, expert]
    for c in range(2):
        spent[c] += popular[layer, expert] * costs[c, device]
    head[1] += 1
    if head[1] == placement.shape[1]:
        head[0] += 1
        head[1] = 0
        for d in range(len(room_left)):
            room_left[d] = placement.shape[1] // len(room_left)
    return gain / total_flow


@njit_borrowed
def observe_placement(
    head, placement, room_left, spent, kept, popular, order, flow, costs, limits, later, scratch, context, rows, mask
) -> None:
    """Write the observation of one env; a device is open if a placement within the limits can follow."""
    layer, place = head[0], head[1]
    num_layers, num_experts = placement.shape
    devices = len(room_left)
    context[:] = 0.0
    rows[:] = 0.0
    mask[:] = False
    if layer == num_layers:
        mask[0] = True
        return
    expert = order[layer, place]
    weight = popular[layer, expert]
    per_token, inflow = 0.0, 0.0
    for e in range(num_experts):
        per_token += popular[layer, e]
        if layer > 0:
            inflow += flow[layer - 1, e, expert]
    within = 0
    for d in range(devices):
        fits = room_left[d] > 0
        room_left[d] -= 1
        for c in range(2):
            if fits and limits[c] < np.inf:
                left = least_left(popular, order[layer], place + 1, layer, room_left, costs[c], scratch)
                fits = spent[c] + weight * costs[c, d] + left + later[c, layer] <= limits[c] * (1 + 1e-9)
        room_left[d] += 1
        mask[d] = fits
        within += fits
    for d in range(devices):
        if within == 0:  # two limits at once may leave nothing: then whatever has room
            mask[d] = room_left[d] > 0
        here, waiting, placed = 0.0, 0.0, 0.0
        for e in range(num_experts):
            if layer > 0 and placement[layer - 1, e] == d:
                here += flow[layer - 1, e, expert]
                for i in range(place, num_experts):
                    waiting += flow[layer - 1, e, order[layer, i]]
            if placement[layer, e] == d:
                placed += popular[layer, e]
        rows[d, 0] = here / inflow if inflow > 0.0 else 0.0
        rows[d, 2] = waiting / (per_token * per_token) if layer > 0 else 0.0
        rows[d, 3] = room_left[d] * devices / num_experts
        rows[d, 4] = placed / per_token
        for c in range(2):
            largest = 1e-300
            for other in range(devices):
                largest = max(largest, costs[c, other])
            rows[d, 5 + c] = costs[c, d] / largest
    for d in range(devices):
        best = 0.0
        for other in range(devices):
            if other != d and mask[other]:
                best = max(best, rows[other, 0])
        rows[d, 1] = rows[d, 0] - best
    context[0] = layer / num_layers
    context[1] = place / num_experts
    context[2] = weight * num_experts / per_token / 4.0
    decided = max(layer - 1 + place / num_experts, 1e-9) / max(num_layers - 1, 1)
    context[3] = kept / decided if layer > 0 else 0.0
    for c in range(2):
        context[4 + c] = spent[c] / limits[c]
    context[6] = inflow / max(weight, 1e-9) / per_token


class ExpertPlacementVectorEnv(PointerVectorEnv):
    """Which device holds which expert of a Mixture-of-Experts model that is spread over several.

    DECIDED: the device of one expert after the other: layer by layer, in a layer the most popular first.
    ACTION: Discrete(D), a device. Open are those with room (every device holds E / D experts of each layer) from which
        a placement within the energy and latency limits can still follow. Where two limits leave none, all with room
        are open, and the limits are overstepped: `over_limit` of the final observation's env counts it.
    OBSERVATION: context float32 (C,), candidates float32 (D, F), action_mask bool (D,); the columns are named in
        CONTEXT_FEATURES and CANDIDATE_FEATURES, scaled to about [-1, 1].
    REWARD: share of the token flow from the layer before that this choice keeps on its device: sums to
        `PlacementProblem.kept`. Minus 1 at the end for each limit overstepped.
    TERMINATION: when every expert has a device. TRUNCATION: never.
    EPISODE: flows counted on `episode_sequences` random sequences of the workload (all of it if None).
    REFERENCE: ExFlow (Yao et al., IPDPS 2024, arXiv 2401.08383); limits as in MoE^2 (arXiv 2501.09410).
    """

    metadata = {**PointerVectorEnv.metadata, "render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        *,
        spec: ExpertPlacementSpec | None = None,
        workload: Workload | None = None,
        episode_sequences: int | None = None,
        render_mode: str | None = None,
        debug: bool = False,
    ) -> None:
        self.placement_spec = spec or ExpertPlacementSpec()  # `spec` belongs to gymnasium
        if workload is None:
            workload, episode_sequences = generate(seed=0), episode_sequences or 16
        self.workload, self.episode_sequences = workload, episode_sequences
        devices = self.placement_spec.num_devices
        super().__init__(num_envs, len(CONTEXT_FEATURES), devices, len(CANDIDATE_FEATURES), debug=debug)
        self.render_mode = render_mode
        whole = PlacementProblem.of(self.placement_spec, workload)
        self.problems = [whole] * num_envs
        layers, num_experts = whole.popularity.shape
        self.placement = np.full((num_envs, layers, num_experts), -1, np.int64)
        self.head = np.zeros((num_envs, 2), np.int64)  # layer, place in its order
        self.room_left = np.zeros((num_envs, devices), np.int64)
        self.spent = np.zeros((num_envs, 2))
        self.kept = np.zeros(num_envs)
        self.order = np.zeros((num_envs, layers, num_experts), np.int64)
        self.later = np.zeros((num_envs, 2, layers))  # least cost of the layers after each one
        self._scratch = np.zeros(devices, np.int64)

    def _reset_envs(self, which: np.ndarray) -> None:
        for n in which:
            workload = self.workload
            if self.episode_sequences is not None and len(workload) > self.episode_sequences:
                workload = workload.select(self._rngs[n].choice(len(workload), self.episode_sequences, replace=False))
            problem = self.problems[n] = PlacementProblem.of(self.placement_spec, workload)
            self.placement[n] = -1
            self.head[n] = 0
            self.room_left[n] = problem.room
            self.spent[n] = 0.0
            self.kept[n] = 0.0
            self.order[n] = np.argsort(-problem.popularity, axis=1, kind="stable")
            popular = -np.sort(-problem.popularity, axis=1)
            for c, cost in enumerate(self.placement_spec.costs):
                least = popular @ np.repeat(np.sort(cost), problem.room)
                self.later[n, c] = least[::-1].cumsum()[::-1] - least
            self._observe(int(n))

    def _observe(self, n: int) -> None:
        problem = self.problems[n]
        observe_placement(
            self.head[n],
            self.placement[n],
            self.room_left[n],
            self.spent[n],
            self.kept[n],
            problem.popularity,
            self.order[n],
            problem.flow,
            self.placement_spec.costs,
            self.placement_spec.limits,
            self.later[n],
            self._scratch,
            self.context[n],
            self.candidates[n],
            self.action_mask[n],
        )

    def _step_envs(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rewards, done = np.zeros(self.num_envs), np.zeros(self.num_envs, np.bool_)
        for n, device in enumerate(actions):
            problem = self.problems[n]
            rewards[n] = place_one(
                self.head[n],
                device,
                self.placement[n],
                self.room_left[n],
                self.spent[n],
                problem.popularity,
                self.order[n],
                problem.flow,
                self.placement_spec.costs,
                problem.flow.sum(),
            )
            self.kept[n] += rewards[n]
            done[n] = self.head[n, 0] == len(problem.popularity)
            if done[n]:
                rewards[n] -= self.over_limit(n)
            self._observe(n)
        return rewards, done, np.zeros(self.num_envs, np.bool_)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """A picture of each placement, uint8 (height, width, 3); None without a render mode."""
        if self.render_mode is None:
            return None
        from .render import draw_placement, rgb_array

        return tuple(
            rgb_array(draw_placement(placement, self.placement_spec.num_devices, kept=float(kept)))
            for placement, kept in zip(self.placement, self.kept, strict=True)
        )

    def over_limit(self, n: int = 0) -> int:
        """Limits that env n has overstepped."""
        return int((self.spent[n] > self.placement_spec.limits * (1 + 1e-9)).sum())


class ExpertPlacementEnv(PointerEnv):
    """One expert placement env: see `ExpertPlacementVectorEnv`, whose keyword arguments it takes."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(ExpertPlacementVectorEnv(1, **kwargs))
