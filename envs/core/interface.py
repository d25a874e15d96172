"""The protocols that join policies to simulators and real backends. No domain in them.

A *backend* executes decisions: the simulator is one, a real engine is another. A *policy* turns what is known now
(a domain's `State`) into a domain's `Decision`. Both records belong to the domain; the protocols only say how they
flow. Decisions are written into an object that the backend owns, so that compiled rules allocate nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

StateT = TypeVar("StateT", contravariant=True)
DecisionT = TypeVar("DecisionT", contravariant=True)

CLOCKS = ("wall", "cpu", "device", "model")
"""What a backend's seconds are: wall time, CPU time of the engine thread, device events, or a cost model."""


@dataclass(frozen=True)
class Outcome:
    """What one `Backend.step` did."""

    seconds: float
    """Measured (or modelled) seconds that the step took, on the backend's clock."""
    done: bool
    """True when the workload is finished."""
    info: dict[str, Any] = field(default_factory=dict)


class Policy(Protocol[StateT, DecisionT]):
    """Decides: a rule, a plan or a learned agent.

    `is_oracle` marks a policy that was given the future (true lengths, the whole trace); its results stand in rows
    of their own.
    """

    name: str
    is_oracle: bool

    def reset(self, state: StateT) -> None:
        """Forget the previous run; `state` is the backend's state before the first step."""

    def decide(self, state: StateT, decision: DecisionT) -> None:
        """Write the decision for `state` into `decision`, which holds the backend's default."""


@runtime_checkable
class Backend(Protocol):
    """Executes: a simulator or a real engine, stepped from outside. The owner of the loop is the caller.

    Attributes:
        clock: one of `CLOCKS`.
        capacity: the limits within which decisions must stay (a domain's spec record).
    """

    clock: str
    capacity: Any

    def reset(self, workload: Any, seed: int = 0) -> None:
        """Load a workload and go back to time zero."""

    def state(self) -> Any:
        """The live State; arrays are views that change at the next step."""

    def default_decision(self) -> Any:
        """The Decision object of this backend, filled with the engine's own default."""

    def step(self, decision: Any) -> Outcome:
        """Execute one decision, jumping over idle time first."""

    def close(self) -> None:
        """Release what the backend holds."""
