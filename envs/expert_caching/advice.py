"""What a learned predictor says at every token, computed once: to train agents on, and to tune rules by.

A deployed predictor computes the same while it runs, and writes the same two columns of the state.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.errors import InputError
from ..core.kernel import UNCOUNTED, njit, njit_borrowed
from .rule import Rule
from .sim import Sim, Simulator, check_shape, has_room, run_epoch
from .state import Decision, State, reset_decision
from .workload import Workload


class Advice(NamedTuple):
    """Probabilities p of a workload's tokens, as 255 * sqrt(p) rounded: small ones need the resolution."""

    keep: np.ndarray  # (T, L, E) uint8: of a next use soon, when the gate of the layer has spoken
    above: np.ndarray  # (T, L, E) uint8: of use in the layer above, by the same token (above the last: by the next one)

    @classmethod
    def none(cls) -> Advice:
        """Nobody says anything: `keep` and `predicted` stay as they are."""
        return cls(np.zeros((0, 0, 0), np.uint8), np.zeros((0, 0, 0), np.uint8))

    def check(self, workload: Workload) -> None:
        """Raise InputError if it is not about this workload."""
        shape = (workload.num_tokens, workload.num_layers, workload.num_experts)
        if len(self.keep) and (self.keep.shape != shape or self.above.shape != shape):
            raise InputError(
                f"advice of shapes {self.keep.shape} and {self.above.shape} for workload {workload.name!r} of {shape}",
                remedy="Compute it for this very workload",
            )


@njit_borrowed
def show_advice(state: State, batches, advice: Advice) -> None:
    """Write what is said in the present epoch into `keep` and `predicted`: that any row needs the expert."""
    if len(advice.keep) == 0:
        return
    engine, experts = state.engine[0], state.experts
    layer, above = engine.layer, (engine.layer + 1) % engine.num_layers
    for e in range(engine.num_experts):
        unkept, unused = np.float32(1.0), np.float32(1.0)
        for b in range(engine.num_sequences):
            token = batches[engine.step, b]
            if token >= 0:
                unkept *= np.float32(1.0) - probability(advice.keep[token, layer, e])
                unused *= np.float32(1.0) - probability(advice.above[token, layer, e])
        experts[layer, e].keep = np.float32(1.0) - unkept
        experts[layer, e].predicted = 0.0
        experts[above, e].predicted = np.float32(1.0) - unused


@njit_borrowed
def probability(stored) -> np.float32:
    """What a stored number stands for."""
    root = np.float32(stored) * np.float32(1.0 / 255.0)
    return root * root


@njit_borrowed
def stored(p: float) -> int:
    """How a probability is stored."""
    return int(np.sqrt(p) * 255.0 + 0.5)


@njit(**UNCOUNTED)
def run_advised(sim: Sim, advice: Advice, decide, params, memory, decision: Decision) -> bool:
    """`sim.run_rule` for a rule that reads advice."""
    state, books = sim.state, sim.books
    while not books[0].done:
        if not has_room(sim):
            return False
        show_advice(state, sim.batches, advice)
        reset_decision(state, decision)
        decide(state, params, memory, decision)
        run_epoch(sim, decision)
    return True


def run_with_advice(simulator: Simulator, rule: Rule, advice: Advice) -> None:
    """Run the rest of the simulator's workload under a rule that reads advice."""
    check_shape(rule, simulator.workload)
    advice.check(simulator.workload)
    memory, decision = rule.new_memory(simulator.state()), simulator.default_decision()
    while not run_advised(simulator.sim, advice, rule.decide_kernel, rule.param_array, memory, decision):
        simulator.make_room()
