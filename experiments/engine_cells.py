"""Cells on the small real engine, simulated under its measured cost model: where an agent trains for deployment there.

Requests, limits and units are those of `evaluate --backend hf`: lengths divided by 16, the engine's own seconds. With
the smaller KV pool memory binds at the batch that the engine serves best, as it does at full size; with the larger one
(the full-size pool, made small) computation binds long before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files

import numpy as np

from ..envs.request_scheduling.spec import CostModel, RequestSchedulingSpec
from ..envs.request_scheduling.workload import Workload
from .cells import OBJECTIVES
from .scenario import HF_LENGTH_SCALE, Scenario, build_scenario

ENGINE_TRACES = ("azure_conv", "azure_code")
ENGINE_LOADS = (1.1, 1.5)
KV_BLOCKS = (234, 937)
"""Pools of blocks of 8 tokens: a quarter of the full-size pool made small, and all of it."""


def hf_cpu_cost() -> CostModel:
    """Cost of the small Llama under transformers' continuous batching on one CPU thread (`schedlab calibrate hf`)."""
    data = json.loads((files(__package__) / "request_scheduling_hf_cpu.json").read_text())
    return CostModel(data["name"], tuple(data["coefficients_s"]), data["source"])


@dataclass(frozen=True)
class EngineCell:
    """One comparison on the small engine: what `headroom.search_linear` needs of a cell."""

    trace: str
    load: float
    objective: str
    kv_blocks: int

    @property
    def name(self) -> str:
        return f"hf_cpu_{self.kv_blocks}/{self.trace}/{self.load:g}/{self.objective}"

    @property
    def metric(self) -> str:
        return self.scenario.metric

    @property
    def lower_is_better(self) -> bool:
        return self.objective == "mean_e2e"

    @cached_property
    def scenario(self) -> Scenario:
        return build_scenario(
            self.trace,
            load=self.load,
            objective=self.objective,
            requests=1000,
            cost=hf_cpu_cost(),
            kv_blocks=self.kv_blocks,
        )

    @property
    def spec(self) -> RequestSchedulingSpec:
        return self.scenario.spec

    def train_workloads(self, repetition: int = 0) -> list[Workload]:
        """Windows of 1,000 requests from the training part; every repetition draws other predictions and classes."""
        return self.scenario.training_windows(4, 1000 + 10 * repetition)

    def search_start(self, full_size: np.ndarray) -> np.ndarray:
        """Parameters of the `linear` family for the full-size engine, in this engine's tokens."""
        start = full_size.copy()
        start[:2] *= HF_LENGTH_SCALE
        start[6] -= np.log2(HF_LENGTH_SCALE)
        return start


def engine_cells() -> list[EngineCell]:
    """The 24 cells."""
    return [
        EngineCell(trace, load, objective, kv_blocks)
        for kv_blocks in KV_BLOCKS
        for trace in ENGINE_TRACES
        for objective in OBJECTIVES
        for load in ENGINE_LOADS
    ]
