"""A system of unlike processing elements and what its scheduler may do: frozen dataclasses, validated on creation.

Times are microseconds (us), volumes and bandwidths in any one unit and that unit a microsecond, power in watts, energy
in microjoules. Sources without a unit have theirs taken for these.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..core.errors import InputError

BINDINGS = ("late", "ready", "arrival")
"""When a task may be bound to a PE: when the PE is idle; when its predecessors are finished; when its job arrives."""
TRANSFERS = ("pull", "push")
"""When data begin to move: when their consumer is bound (and their producer finished); when their producer is
finished, to wherever they may be needed, as in DS3 and in the literature on static schedules."""
NOISES = ("none", "normal", "lognormal")
"""How a duration comes from the nominal time t and a standard normal z (sigma is `noise_sigma`): t;
max(rint(t + sigma t z), 1), as DS3 does; t exp(sigma z - sigma^2 / 2), which keeps the mean."""
OBJECTIVES = ("latency", "makespan", "energy", "edp", "deadline")
"""What the reward adds up to (negative): sum of the jobs' latencies; time until the last job is finished; energy;
energy times sum of latencies; jobs that were finished late."""


@dataclass(frozen=True)
class PeKind:
    """Identical processing elements (PEs): a cluster of cores, an accelerator with several lanes."""

    name: str
    count: int = 1
    """PEs of this kind."""
    frequencies_mhz: tuple[float, ...] = (1000.0,)
    """Operating points (DVFS), increasing. Times of tasks are those at the last one; at f they are last / f as long."""
    power_w: tuple[tuple[float, ...], ...] = ()
    """Watts of all PEs of the kind together: for each frequency, with 1, 2, ... `count` of them executing. Where PEs
    run at several frequencies, the mean of theirs. Empty: no power is modelled."""
    idle_w: float = 0.0
    """Watts of each PE that does not execute."""
    default_level: int = -1
    """Index of the frequency at which tasks run unless a decision says otherwise (the governor); -1: the last."""

    def __post_init__(self) -> None:
        def error(problem: str, remedy: str) -> InputError:
            return InputError(f"PE kind {self.name!r}: {problem}", remedy=remedy)

        if self.count < 1:
            raise error(f"count is {self.count}", "Give at least one PE, or leave the kind out")
        mhz = self.frequencies_mhz
        if not mhz or min(mhz) <= 0 or list(mhz) != sorted(set(mhz)) or not math.isfinite(mhz[-1]):
            raise error(f"frequencies_mhz is {mhz}", "Give positive frequencies in increasing order")
        if self.power_w and [len(row) for row in self.power_w] != [self.count] * len(mhz):
            raise error(
                f"power_w has rows of {[len(row) for row in self.power_w]}",
                f"Give {len(mhz)} rows (one a frequency) of {self.count} (one a number of active PEs)",
            )
        if any(not 0 <= watts < math.inf for row in (*self.power_w, (self.idle_w,)) for watts in row):
            raise error("a power is negative or not finite", "Give watts")
        if not -len(mhz) <= self.default_level < len(mhz):
            raise error(f"default_level is {self.default_level}", f"Give the index of one of {len(mhz)} frequencies")


@dataclass(frozen=True)
class Soc:
    """The PEs and the links between them, by kind.

    Moving `volume` from a PE of kind a to another PE of kind b takes latency_us[a][b] + volume / bandwidth[a][b], to a
    task on the same PE volume / self_bandwidth. Links are not shared: transfers do not slow each other down.
    """

    name: str
    kinds: tuple[PeKind, ...]
    bandwidth: tuple[tuple[float, ...], ...] = ()
    """Volume a microsecond between two PEs, by their kinds; inf: no time. Empty: inf everywhere."""
    latency_us: tuple[tuple[float, ...], ...] = ()
    """Added to every transfer between two PEs. Empty: 0 everywhere."""
    self_bandwidth: float = math.inf
    whole_us: bool = False
    """Transfers take whole microseconds, rounded down (DS3)."""
    source: str = ""

    def __post_init__(self) -> None:
        if not self.kinds:
            raise InputError(f"SoC {self.name!r} has no PE", remedy="Give at least one PeKind")
        names = [kind.name for kind in self.kinds]
        if len(set(names)) != len(names):
            raise InputError(f"SoC {self.name!r} has kinds {names}", remedy="Give every kind a name of its own")
        for what, matrix, low in (("bandwidth", self.bandwidth, math.ulp(0.0)), ("latency_us", self.latency_us, 0.0)):
            if matrix and [len(row) for row in matrix] != [len(names)] * len(names):
                raise InputError(
                    f"SoC {self.name!r}: {what} has rows of {[len(row) for row in matrix]}",
                    remedy=f"Give a square matrix over the kinds {names}",
                )
            bad = [value for row in matrix for value in row if not value >= low]
            if bad:
                raise InputError(f"SoC {self.name!r}: a {what} is {bad[0]}", remedy="Give positive numbers")
        if not self.self_bandwidth > 0:
            raise InputError(
                f"SoC {self.name!r}: self_bandwidth is {self.self_bandwidth}", remedy="Give a positive one"
            )

    @property
    def kind_names(self) -> tuple[str, ...]:
        return tuple(kind.name for kind in self.kinds)

    @property
    def kind_of_pe(self) -> np.ndarray:
        """int64 (P,): the kind of each PE; PEs are numbered through the kinds."""
        return np.repeat(np.arange(len(self.kinds)), [kind.count for kind in self.kinds])

    @property
    def pe_names(self) -> tuple[str, ...]:
        """`kind` for single PEs, else `kind.0`, `kind.1`, ..."""
        return tuple(
            kind.name if kind.count == 1 else f"{kind.name}.{i}" for kind in self.kinds for i in range(kind.count)
        )

    @property
    def num_pes(self) -> int:
        return sum(kind.count for kind in self.kinds)

    def turned(self) -> Soc:
        """The SoC whose links go the other way."""
        bandwidth, latency_us = (tuple(zip(*links, strict=True)) for links in (self.bandwidth, self.latency_us))
        return replace(self, bandwidth=bandwidth, latency_us=latency_us)

    def links(self) -> tuple[np.ndarray, np.ndarray]:
        """(latency, bandwidth), float64 (P, P) each: between any two PEs, and on the diagonal on one PE."""
        kind = self.kind_of_pe
        pairs = np.ix_(kind, kind)
        size = (len(self.kinds), len(self.kinds))
        latency = (np.array(self.latency_us) if self.latency_us else np.zeros(size))[pairs].astype(np.float64)
        bandwidth = (np.array(self.bandwidth) if self.bandwidth else np.full(size, np.inf))[pairs].astype(np.float64)
        np.fill_diagonal(latency, 0.0)
        np.fill_diagonal(bandwidth, self.self_bandwidth)
        return latency, bandwidth


def uniform_soc(num_pes: int, *, bandwidth: float = 1.0, latency_us: float = 0.0, name: str = "uniform") -> Soc:
    """PEs that are all unlike (each a kind of its own, `p0`, `p1`, ...) with equal links between them.

    The machine of the scheduling literature: volumes are transfer times, and nothing is paid on one PE.
    """
    size = range(num_pes)
    return Soc(
        name,
        tuple(PeKind(f"p{i}") for i in size),
        bandwidth=tuple(tuple(bandwidth for _ in size) for _ in size),
        latency_us=tuple(tuple(latency_us for _ in size) for _ in size),
    )


@dataclass(frozen=True)
class SocDagSpec:
    """One scheduling problem: the SoC, when tasks are bound, how durations vary, what is rewarded."""

    soc: Soc
    binding: str = "late"
    """One of `BINDINGS`."""
    transfers: str = "pull"
    """One of `TRANSFERS`."""
    noise: str = "none"
    """One of `NOISES`."""
    noise_sigma: float = 0.0
    """Relative spread of the noise."""
    choose_frequency: bool = False
    """Every operating point is a candidate of its own; else tasks run at `PeKind.default_level`."""
    objective: str = "latency"
    """One of `OBJECTIVES`."""
    num_candidates: int = 64
    """Rows of the action table: one to wait, the others for (task, PE) pairs."""
    graph_tasks: int = 128
    """Tasks that a graph observation has room for."""
    graph_edges: int = 512
    """Edges that a graph observation has room for."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("binding", BINDINGS),
            ("transfers", TRANSFERS),
            ("noise", NOISES),
            ("objective", OBJECTIVES),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"SocDagSpec.{name} is {getattr(self, name)!r}", remedy=f"Choose one of {', '.join(allowed)}"
                )
        if not 0 <= self.noise_sigma < math.inf:
            raise InputError(f"noise_sigma is {self.noise_sigma}", remedy="Give a non-negative number")
        for name, least in (("num_candidates", 2), ("graph_tasks", 1), ("graph_edges", 1)):
            if getattr(self, name) < least:
                raise InputError(f"SocDagSpec.{name} is {getattr(self, name)}", remedy=f"Give at least {least}")

    def replace(self, **changes: object) -> SocDagSpec:
        """A copy with some fields changed (`dataclasses.replace`)."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def to_dict(self) -> dict:
        """Plain form for JSON (which has no infinity: Python's writes and reads `Infinity`), read by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> SocDagSpec:
        """The spec that `to_dict` wrote."""

        def tuples(value: Any) -> Any:
            return tuple(tuples(v) for v in value) if isinstance(value, (list, tuple)) else value

        soc = {name: tuples(value) for name, value in data["soc"].items()}
        kinds = tuple(PeKind(**{name: tuples(v) for name, v in kind.items()}) for kind in data["soc"]["kinds"])
        return cls(**{**data, "soc": Soc(**{**soc, "kinds": kinds})})
