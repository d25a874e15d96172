"""Routing traces by name, split into sequences that policies are fitted to and sequences that they are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path

import numpy as np

from ..envs.expert_caching.affinity import Affinity
from ..envs.expert_caching.workload import Workload, find_routing, load_routing

MOE = "moe"
"""The routing of our own small model, which comes with the package."""
MOE_FILE = Path(__file__).parents[1] / "real_backend" / "data" / "moe.npz"
HELD_OUT, SPLIT_SEED = 0.25, 2026
"""Share of the sequences that the shipped policies were never fitted to, and the seed that draws them."""


@dataclass(frozen=True)
class Trace:
    """Sequences to measure on, and those that policies are fitted to; the prior of both is the latter's popularity."""

    name: str
    test: Workload
    training: Workload
    part: str = "test"

    def draw(self, tokens: int, seed: int) -> Workload:
        """`tokens` tokens of the test sequences, in an order that the seed draws.

        Where the trace has no predictions of the next layer, `with_guesses` stand in for them.
        """
        order = np.random.default_rng(seed).permutation(len(self.test))
        drawn = self.test.select(order, name=self.test.name).head(tokens)
        return drawn if drawn.predicted.shape[2] else with_guesses(drawn, self._affinity)

    @cached_property
    def _affinity(self) -> Affinity:
        return Affinity.fit(self.training)


def load_trace(name: str, data_dir: str | PathLike[str] | None = None) -> Workload:
    """All sequences of a name or file. Raises InputError."""
    return load_routing(MOE_FILE) if name == MOE else find_routing(name, data_dir)


def find_trace(
    name: str,
    data_dir: str | PathLike[str] | None = None,
    *,
    part: str = "test",
    held_out: float = HELD_OUT,
    seed: int = SPLIT_SEED,
) -> Trace:
    """The trace of a name or file, split by whole sequences; with `part` "all" both parts are the whole.

    Raises InputError.
    """
    workload = load_trace(name, data_dir)
    test, training = (workload, workload) if part == "all" else workload.split(held_out, 1 - held_out, seed=seed)
    prior = training.popularity()
    return Trace(name, test.with_prior(prior), training.with_prior(prior), part)


def with_guesses(workload: Workload, affinity: Affinity) -> Workload:
    """The workload with predictions of each next layer: the 2k experts that most often follow those of this one.

    They stand in for what the next layer's gate says of this layer's gate input, where a trace has no record of that.
    """
    layers, num_experts, k = workload.num_layers, workload.num_experts, workload.top_k
    width = min(2 * k, num_experts)
    predicted = np.full((workload.num_tokens, layers, width), -1, np.int16)
    probability = np.zeros(predicted.shape, np.float32)
    for layer in range(layers - 1):
        scores = affinity.next_layer[layer][workload.experts[:, layer]].mean(axis=1)  # (T, E)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :width]
        predicted[:, layer + 1] = best
        probability[:, layer + 1] = np.take_along_axis(scores, best, axis=1).clip(0.0, 1.0)
    return workload.with_predictions(predicted, probability)
