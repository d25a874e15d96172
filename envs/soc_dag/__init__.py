"""Which task of which job runs on which processing element of a heterogeneous SoC: `schedlab/SocDag-v0`."""

from .spec import PeKind, Soc, SocDagSpec
from .workload import Dag, Stream, Workload

__all__ = ["Dag", "PeKind", "Soc", "SocDagSpec", "Stream", "Workload"]
