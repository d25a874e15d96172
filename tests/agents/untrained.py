"""A scheduler of task graphs that was never trained, for tests that only need one that decides."""

from __future__ import annotations

import torch

from schedlab.agents.compiled import pack_weights
from schedlab.agents.networks import PointerNetwork
from schedlab.agents.soc_dag import PointerScheduling
from schedlab.envs.soc_dag.spec import SocDagSpec
from schedlab.envs.soc_dag.table import NUM_CANDIDATE, NUM_CONTEXT


def untrained_network() -> PointerNetwork:
    """Always the same weights, whose logits are far from a tie."""
    torch.manual_seed(0)
    network = PointerNetwork(NUM_CONTEXT, NUM_CANDIDATE, hidden=16)
    torch.nn.init.orthogonal_(network.head.query.weight, 3.0)
    return network


def untrained_agent() -> PointerScheduling:
    """It, compiled, for as many candidates as a spec has by default."""
    rows = SocDagSpec.num_candidates
    return PointerScheduling("agent", pack_weights(untrained_network(), rows), rows)
