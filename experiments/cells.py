"""The cells of request scheduling in which policies are compared: trace x load x objective, held out by time.

Training requests are the first part of each trace, test requests a later part; nothing is fitted on the latter but
the load: capacity differs from slice to slice, so arrivals of each slice are scaled to a share of its own capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..baselines.request_scheduling import RULES
from ..envs.request_scheduling.sim import Simulator
from ..envs.request_scheduling.spec import LLAMA2_7B_A100, CostModel, EngineSpec, RequestSchedulingSpec, SloClass
from ..envs.request_scheduling.traces import find_workload
from ..envs.request_scheduling.workload import Workload

LOADS = (0.7, 0.9, 1.1, 1.3)
OBJECTIVES = ("mean_e2e", "goodput", "goodput_2class")
TRACES = ("azure_conv", "azure_code", "mooncake_synthetic")

LLAMA3_8B_A100 = CostModel(
    name="llama3-8b-a100",
    coefficients_s=(1.0e-2, 9.4e-5, 3.0e-5, 8.2e-8, 3.5e-9, 0.0, 0.0),
    source="A100-like: as llama2-7b-a100 with grouped-query attention, 0.125 MB of KV a token",
)


@dataclass(frozen=True)
class TraceCells:
    """What the cells of one trace share."""

    engine: EngineSpec
    cost: CostModel
    one_class: tuple[SloClass, ...]
    two_classes: tuple[SloClass, ...]
    num_requests: int
    """Requests in the test part, and in one training window."""
    num_windows: int
    """Training windows, spread evenly over what comes before the test part (they may overlap)."""
    output_factors: tuple[float, ...] = (1.0,)
    """Outputs of training windows are multiplied by these in turn: for traffic that drifts, as it will go on to do."""


SMALL_SLO: dict[str, Any] = dict(
    one_class=(SloClass(ttft_s=1.0, tpot_s=0.15),),
    two_classes=(SloClass(ttft_s=1.0, tpot_s=0.10), SloClass(ttft_s=10.0, tpot_s=0.30)),
)
TRACE_CELLS = {
    "azure_conv": TraceCells(EngineSpec(), LLAMA2_7B_A100, **SMALL_SLO, num_requests=4000, num_windows=3),
    "azure_code": TraceCells(EngineSpec(), LLAMA2_7B_A100, **SMALL_SLO, num_requests=2900, num_windows=3),
    "mooncake_synthetic": TraceCells(
        EngineSpec(kv_blocks=8192, block_tokens=128, prefix_cache=True),
        LLAMA3_8B_A100,
        one_class=(SloClass(ttft_s=10.0, tpot_s=0.2),),
        two_classes=(SloClass(ttft_s=5.0, tpot_s=0.15), SloClass(ttft_s=30.0, tpot_s=0.4)),
        num_requests=1300,
        num_windows=3,
        output_factors=(1.0, 0.5, 2.0),  # the mean output falls from 200 tokens to 120 over the training part
    ),
}


@dataclass(frozen=True)
class Cell:
    """One comparison: the requests of a trace at a load, judged by an objective."""

    trace: str
    load: float
    objective: str

    @property
    def name(self) -> str:
        return f"{self.trace}/{self.load:g}/{self.objective}"

    @property
    def metric(self) -> str:
        return "mean_e2e_s" if self.objective == "mean_e2e" else "slo_goodput"

    @property
    def lower_is_better(self) -> bool:
        return self.objective == "mean_e2e"

    @property
    def spec(self) -> RequestSchedulingSpec:
        cells = TRACE_CELLS[self.trace]
        return RequestSchedulingSpec(
            engine=cells.engine,
            cost=cells.cost,
            slo_classes=cells.two_classes if self.objective == "goodput_2class" else cells.one_class,
            objective="mean_e2e" if self.objective == "mean_e2e" else "slo_goodput",
        )

    def test_workload(self, seed: int = 0) -> Workload:
        """The held-out requests (the end of the trace); `seed` draws predictions and classes."""
        return self._loaded(-1, seed)

    def train_workloads(self, repetition: int = 0) -> list[Workload]:
        """Windows from the start of the trace, apart from the test part.

        Every repetition draws other predictions and classes, and takes the next of the `output_factors`.
        """
        cells = TRACE_CELLS[self.trace]
        factor = cells.output_factors[repetition % len(cells.output_factors)]
        return [self._loaded(i, 1000 + 10 * repetition + i, factor) for i in range(cells.num_windows)]

    def _loaded(self, window: int, seed: int, output_factor: float = 1.0) -> Workload:
        slice_ = trace_slice(self.trace, window, output_factor).with_predictor(0.8, seed)
        slice_ = slice_.with_classes(self.spec.slo_classes, seed)
        return slice_.at_rate(self.load * capacity_rps(self.trace, window, output_factor))


def all_cells() -> list[Cell]:
    """The 36 cells."""
    return [Cell(trace, load, objective) for trace in TRACES for objective in OBJECTIVES for load in LOADS]


@lru_cache(maxsize=64)
def trace_slice(trace: str, window: int, output_factor: float = 1.0) -> Workload:
    """Window `window` of the training part, or the test part (-1)."""
    cells = TRACE_CELLS[trace]
    workload = find_workload(trace)
    if cells.engine.prefix_cache:
        workload = workload.with_block_tokens(cells.engine.block_tokens)
    n = cells.num_requests
    if window < 0:
        return workload.window(len(workload) - n)
    last_start = len(workload) - 2 * n
    start = window * last_start // max(cells.num_windows - 1, 1)
    workload = workload.window(start, start + n)
    return workload if output_factor == 1.0 else workload.scale_outputs(output_factor)


@lru_cache(maxsize=64)
def capacity_rps(trace: str, window: int, output_factor: float = 1.0) -> float:
    """Requests per second of a saturated engine: every request of the slice there at time zero, Sarathi-2048."""
    cells = TRACE_CELLS[trace]
    workload = trace_slice(trace, window, output_factor).at_rate(1e9)
    simulator = Simulator(RequestSchedulingSpec(engine=cells.engine, cost=cells.cost), recording=False)
    simulator.reset(workload)
    simulator.run(RULES["sarathi_2048"])
    return len(workload) / float(np.float64(simulator.sim.state.engine[0]["now_s"]))
