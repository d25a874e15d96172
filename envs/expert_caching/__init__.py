"""Which experts of an offloaded Mixture-of-Experts model stay in fast memory: `schedlab/ExpertCaching-v0`."""

from .spec import CostModel, ExpertCachingSpec
from .workload import Workload

__all__ = ["CostModel", "ExpertCachingSpec", "Workload"]
