"""The learned expert cache as policies over `State`: compiled, streaming, strictly causal.

`LearnedEviction` evicts by the score of `expert_caching_score`. Where the batch interleaves sequences, each row has its
own stream, and an expert is kept by the chance that any row needs it.

`LearnedCaching` also prefetches and bypasses. In every epoch `advise` writes what the network says into the state:
`keep` for the experts of the present layer, `predicted` for those of the layer above. A rule over the state decides
by these two columns (`expert_caching_rule`), or a pointer network that sees them among the columns of the action table
(`expert_caching_pointer`).

Decisions are made without the interpreter's lock: on a real engine the thread that reads what is missing needs it.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..envs.core.blocks import BoundCall, load
from ..envs.core.errors import InputError
from ..envs.core.kernel import UNCOUNTED, njit
from ..envs.expert_caching.advice import Advice, stored
from ..envs.expert_caching.rule import evict_lowest
from ..envs.expert_caching.sim import Sim, Simulator, has_room, run_epoch
from ..envs.expert_caching.state import Decision, State, reset_decision
from .expert_caching_checkpoint import load_weights
from .expert_caching_rule import Knobs, by_advice
from .expert_caching_score import (
    Memory,
    Weights,
    for_share,
    new_memory,
    observe,
    score_layer,
    score_layer_above,
    weigh_row,
)

if TYPE_CHECKING:
    from ..envs.expert_caching.workload import Workload

SHIPPED = Path(__file__).parent / "shipped" / "expert_caching" / "deepseek_v2_lite"
"""Folder of the shipped scores for DeepSeek-V2-Lite; those for other models stand beside it."""

EXPECTED_TOKENS = 4
"""Coming tokens by which an expert's worth is guessed from its prior, before its layer is seen in a run."""


@njit(cache=True)
def hear_gate(state: State, weights: Weights, memory: Memory) -> None:
    """Take note of what the gate of the present layer chose, in every row."""
    engine, history = state.engine[0], state.history
    for b in range(engine.num_sequences):
        row = state.sequences[b]
        if row.sequence >= 0:
            used = history[b, (row.served - 1) % history.shape[1], engine.layer]
            observe(weights, memory, b, engine.layer, row.position, used)


@njit(cache=True)
def score_rows(state: State, weights: Weights, memory: Memory, above: bool) -> None:
    """Write `memory.scores` of the present layer's experts: -log P(no row needs it soon).

    With `above` also `memory.unused`: P(no row needs it in the layer above).
    """
    engine, num_experts = state.engine[0], state.experts.shape[1]
    layer, scores, unused = engine.layer, memory.scores[engine.layer], memory.unused
    num_slots = state.layers[layer].end_slot - state.layers[layer].first_slot
    share = num_slots / (state.experts.size if engine.pooled else num_experts)
    scores[:] = 0
    unused[:] = 1
    for b in range(engine.num_sequences):
        row = state.sequences[b]
        if row.sequence < 0:
            continue
        used = state.history[b, (row.served - 1) % state.history.shape[1], layer]
        num_past, match = weigh_row(memory, b, layer)
        score_layer(weights, memory, b, layer, used, num_past, match, share)
        for e in range(num_experts):
            logit = for_share(memory.logits, e, weights.shares, share)
            scores[e] += np.log1p(np.exp(logit))  # up to rounding of the product
        if above:
            score_layer_above(weights, memory, b, layer, used, num_past, match)
            for e in range(num_experts):
                unused[e] /= np.float32(1.0) + np.exp(memory.above[e])


@njit(cache=True, nogil=True)
def decide_learned(state: State, weights: Weights, memory: Memory, decision: Decision) -> None:
    """Evict the candidate that is least likely to be needed soon by any row. Called in every epoch, in order."""
    engine, slots = state.engine[0], state.slots
    hear_gate(state, weights, memory)
    if engine.num_missing == 0 and engine.pooled == 0:
        return
    score_rows(state, weights, memory, False)
    for slot in range(state.layers[engine.layer].first_slot, state.layers[engine.layer].end_slot):
        held = slots[slot]
        if held.expert >= 0:
            memory.keys[slot] = memory.scores[held.layer, held.expert]
    evict_lowest(state, memory.keys, decision)


@njit(cache=True, nogil=True, **UNCOUNTED)
def decide_learned_at(address: int, kind: Any, decision: Decision) -> None:
    """`decide_learned` with its other arguments in a block of memory."""
    state, weights, memory = load(address, kind)
    decide_learned(state, weights, memory, decision)


@njit(cache=True)
def expect_prior(state: State) -> None:
    """Write `keep` of all experts, for layers that no token has come to: P(one of the next tokens needs it)."""
    for layer in range(state.engine[0].num_layers):
        for e in range(state.engine[0].num_experts):
            row = state.experts[layer, e]
            row.keep = 1.0 - (1.0 - row.prior) ** EXPECTED_TOKENS


@njit(cache=True)
def advise(state: State, weights: Weights, memory: Memory) -> None:
    """Write `keep` of the present layer's experts, and `predicted` of those above. Called in every epoch, in order."""
    layer = state.engine[0].layer
    if state.engine[0].pooled and state.engine[0].epoch == 0:  # else those of the layers to come would go first
        expect_prior(state)
    above = (layer + 1) % state.engine[0].num_layers
    hear_gate(state, weights, memory)
    score_rows(state, weights, memory, True)
    for e in range(state.experts.shape[1]):
        state.experts[layer, e].keep = 1.0 - np.exp(-memory.scores[layer, e])
        state.experts[layer, e].predicted = 0.0
        state.experts[above, e].predicted = 1.0 - memory.unused[e]


@njit
def run_learned(sim: Sim, decide, params, memory, decision: Decision) -> bool:
    """`sim.run_rule` for kernels that slice arrays, and therefore count references."""
    while not sim.books[0].done:
        if not has_room(sim):
            return False
        reset_decision(sim.state, decision)
        decide(sim.state, params, memory, decision)
        run_epoch(sim, decision)
    return True


class LearnedEviction:
    """The learned eviction score as a `Policy`. It neither prefetches nor bypasses.

    Args:
        name: shown in results.
        weights: from `load_eviction` or `pack_eviction`.
        top_k: experts a token of the model that the weights are for.
    """

    is_oracle = False
    kernel: Any = staticmethod(decide_learned)
    """Called with the state, `_inputs`, and the decision to be written."""
    kernel_at: Any = staticmethod(decide_learned_at)
    """The same, for one decision asked from Python."""

    def __init__(self, name: str, weights: Weights, top_k: int) -> None:
        self.name = name
        self.weights = weights
        self.shape = (*weights.embedding.shape[1:3], top_k)

    def reset(self, state: State) -> None:
        """Forget the previous run. Raises InputError if the weights are for a model of another shape."""
        engine = state.engine[0]
        shape = (int(engine["num_layers"]), int(engine["num_experts"]), int(engine["top_k"]))
        if shape != self.shape:
            raise InputError(
                f"policy {self.name!r} knows the routing of {_told(self.shape)}, the workload is of {_told(shape)}",
                remedy="Train one on a trace of this model: python -m schedlab.experiments.expert_caching_gap --help",
            )
        self.memory = new_memory(self.weights, len(state.sequences), shape[2], len(state.slots))
        self._bound: BoundCall | None = None

    def decide(self, state: State, decision: Decision) -> None:
        """Write the decision for `state` into `decision`; to be called in every epoch."""
        if self._bound is None or self._bound.arguments[0] is not state:
            self._bound = BoundCall(self.kernel_at, (state, *self._inputs), decision)
        self._bound(decision)

    def run(self, simulator: Simulator) -> None:
        """Serve the simulator's whole workload, compiled."""
        self.reset(simulator.state())
        while not run_learned(simulator.sim, self.kernel, *self._inputs, simulator.default_decision()):
            simulator.make_room()

    @property
    def _inputs(self) -> tuple[Any, Any]:
        """What the kernel knows, and what it remembers."""
        return self.weights, self.memory


# ------------------------------------------------------------------------------------------- prefetch and bypass


@njit(cache=True, nogil=True)
def decide_advised(state: State, weights: Weights, memory: Memory, decision: Decision) -> None:
    """`advise`, then `by_advice`. Called in every epoch, in order."""
    advise(state, weights, memory)
    by_advice(state, memory.knobs, memory.keys, decision)


@njit(cache=True, nogil=True, **UNCOUNTED)
def decide_advised_at(address: int, kind: Any, decision: Decision) -> None:
    """`decide_advised` with its other arguments in a block of memory."""
    state, weights, memory = load(address, kind)
    decide_advised(state, weights, memory, decision)


@njit(cache=True)
def foresee(weights: Weights, memory: Memory, experts, positions, share: float, keep, above) -> None:
    """Fill `Advice` for one sequence after the other: experts (T, L, k), positions (T,) in their sequences."""
    num_tokens, num_layers, _ = experts.shape
    for t in range(num_tokens):
        for layer in range(num_layers):
            used = experts[t, layer]
            observe(weights, memory, 0, layer, positions[t], used)
            num_past, match = weigh_row(memory, 0, layer)
            score_layer(weights, memory, 0, layer, used, num_past, match, share)
            for e in range(keep.shape[2]):
                logit = for_share(memory.logits, e, weights.shares, share)
                keep[t, layer, e] = stored(1.0 / (1.0 + np.exp(-logit)))
            score_layer_above(weights, memory, 0, layer, used, num_past, match)
            for e in range(keep.shape[2]):
                above[t, layer, e] = stored(1.0 / (1.0 + np.exp(-memory.above[e])))


def advice_for(weights: Weights, workload: Workload, share: float) -> Advice:
    """What the network says at every token, for caches of this share of the experts: about 2 CPU-ms a token."""
    shape = (workload.num_tokens, workload.num_layers, workload.num_experts)
    advice = Advice(np.empty(shape, np.uint8), np.empty(shape, np.uint8))
    memory = new_memory(weights, 1, workload.top_k)
    foresee(weights, memory, workload.experts, workload.token_position, share, *advice)
    return advice


class LearnedCaching(LearnedEviction):
    """The learned scores as a `Policy` that evicts, prefetches where the spec allows it, and bypasses.

    Args:
        name: shown in results.
        weights: from `load_eviction` or `pack_eviction`.
        top_k: experts a token of the model that the weights are for.
        knobs: of `by_advice`.
    """

    kernel: Any = staticmethod(decide_advised)
    kernel_at: Any = staticmethod(decide_advised_at)

    def __init__(self, name: str, weights: Weights, top_k: int, knobs: Knobs | None = None) -> None:
        super().__init__(name, weights, top_k)
        self.knobs = knobs or Knobs()

    def reset(self, state: State) -> None:
        """Forget the previous run. Raises InputError if the weights are for a model of another shape."""
        super().reset(state)
        self.memory = self.memory._replace(knobs=np.array(self.knobs, np.float64))


def _told(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} layers x {shape[1]} experts, top {shape[2]}"


def load_eviction(folder: str | PathLike[str], name: str | None = None) -> LearnedEviction:
    """The policy of a checkpoint folder. Raises InputError if a file is missing or broken."""
    return LearnedEviction(name or Path(folder).name, *load_weights(folder))
