"""Who goes next in an LLM serving engine: `schedlab/RequestScheduling-v0`."""

from .spec import CostModel, EngineSpec, RequestSchedulingSpec, SloClass
from .workload import Workload

__all__ = ["CostModel", "EngineSpec", "RequestSchedulingSpec", "SloClass", "Workload"]
