"""A graph network over tasks and PEs with a pointer head over (task, PE) rows, with torch-geometric and without.

Messages pass along precedences and between tasks and PEs (GINE: Xu et al. 2019, Hu et al. 2020), both ways; tasks are
pooled to jobs, jobs to the whole (Decima, SIGCOMM 2019; SoCRATES 2021). A row's embedding joins its columns, its task,
its PE and its job; the head is `networks.PointerHead`. No layer knows the number of jobs, tasks, PEs or rows.

`PygPointerNetwork` runs the convolutions of torch-geometric on the nodes of all graphs without padding: for training.
`GraphPointerNetwork` has the same weights and needs torch alone, on padded arrays: for deployment. They are equal
(tested). What the encoder costs beside `networks.DeepSetsEncoder`, and what it gains, stands in docs/soc_dag.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .networks import PointerHead, pool

GRAPH_KEYS = (
    "context",
    "candidates",
    "action_mask",
    "nodes",
    "edges",
    "edge_type",
    "edge_mask",
    "candidate_node",
    "edge_features",
    "node_group",
    "candidate_place",
)
"""What a network here reads of an observation (`PointerVectorEnv` with a detailed graph)."""


class GraphShape(NamedTuple):
    """Columns of a graph observation."""

    context: int
    candidate: int
    node: int
    edge: int
    edge_types: int


class GineConv(nn.Module):
    """x_i' = W_2 relu(W_1 ((1 + eps) x_i + sum_{j -> i} relu(x_j + W_e e_ji)) + b_1) + b_2, on padded arrays.

    Parameters are named as in `torch_geometric.nn.GINEConv`, whose weights it takes.

    Shapes:
        x (B, V, H), source int64 (B, E), target int64 (B, E), edge (B, E, Fe), mask (B, E) -> (B, V, H)
    """

    def __init__(self, hidden: int, edge_size: int) -> None:
        super().__init__()
        self.nn = update_network(hidden)
        self.lin = nn.Linear(edge_size, hidden)
        self.register_buffer("eps", torch.zeros(1))

    def forward(self, x: Tensor, source: Tensor, target: Tensor, edge: Tensor, mask: Tensor) -> Tensor:
        hidden = x.shape[2]
        messages = torch.relu(x.gather(1, source.unsqueeze(-1).expand(-1, -1, hidden)) + self.lin(edge))
        messages = messages * mask.unsqueeze(-1)
        total = torch.zeros_like(x).scatter_add(1, target.unsqueeze(-1).expand(-1, -1, hidden), messages)
        return self.nn((1.0 + self.eps) * x + total)


def update_network(hidden: int) -> nn.Sequential:
    """The two layers inside a GINE convolution."""
    return nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))


class GraphPointerNetwork(nn.Module):
    """Graph encoder, hierarchical pooling, pointer head, value; torch only, on padded observations.

    x^0 = relu(W n),  x^{l+1} = relu(x^l + GINE(x^l));  job = [mean, max] of its tasks;  all = [mean, max] of the jobs
    h_i = relu(W_h relu(W_x c_i + W_c c + W_t x_task + W_p x_PE + W_j job));  g = MLP[c, mean_i h_i, max_i h_i, all]

    Shapes:
        observations with a leading B, see `GRAPH_KEYS` -> logits (B, K), values (B,)
    """

    def __init__(self, shape: GraphShape, hidden: int = 48, num_layers: int = 2, clip: float = 10.0) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "shape": tuple(shape),
            "hidden": hidden,
            "num_layers": num_layers,
            "clip": clip,
        }
        self.edge_types = shape.edge_types
        self.node_in = nn.Linear(shape.node, hidden)
        edge_size = 2 * shape.edge_types + shape.edge
        self.convs = nn.ModuleList(self._new_conv(hidden, edge_size) for _ in range(num_layers))
        self.from_candidate = nn.Linear(shape.candidate, hidden, bias=False)
        self.from_context = nn.Linear(shape.context, hidden)
        self.from_task = nn.Linear(hidden, hidden, bias=False)
        self.from_place = nn.Linear(hidden, hidden, bias=False)
        self.from_job = nn.Linear(2 * hidden, hidden, bias=False)
        self.row = nn.Linear(hidden, hidden)
        self.summary_in = nn.Linear(shape.context + 6 * hidden, hidden)
        self.summary_out = nn.Linear(hidden, hidden)
        self.head = PointerHead(hidden, clip)
        self.value = nn.Linear(hidden, 1)
        nn.init.orthogonal_(self.head.query.weight, 0.1)

    def _new_conv(self, hidden: int, edge_size: int) -> nn.Module:
        return GineConv(hidden, edge_size)

    def forward(self, obs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        mask, context = obs["action_mask"].bool(), obs["context"]
        x = self.embed_nodes(obs)
        jobs, job_mask = self.pool_jobs(x, obs["node_group"].long())
        task, place = obs["candidate_node"].long(), obs["candidate_place"].long()
        group = obs["node_group"].long().gather(1, task.clamp(min=0)).masked_fill(task < 0, -1)
        rows = self.from_candidate(obs["candidates"]) + self.from_context(context).unsqueeze(1)
        rows = rows + pick(self.from_task(x), task) + pick(self.from_place(x), place)
        rows = torch.relu(self.row(torch.relu(rows + pick(self.from_job(jobs), group))))
        parts = [context, pool(rows, mask), pool(jobs, job_mask)]
        summary = torch.relu(self.summary_out(torch.relu(self.summary_in(torch.cat(parts, dim=1)))))
        return self.head(rows, summary, mask), self.value(summary).squeeze(-1)

    def edge_attributes(self, obs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every edge both ways: source, target int64 (B, 2E), columns (B, 2E, Fe') and mask (B, 2E)."""
        source, target = obs["edges"].long().unbind(1)
        kind, columns = obs["edge_type"].long(), obs["edge_features"]
        forth = nn.functional.one_hot(kind, 2 * self.edge_types)
        back = nn.functional.one_hot(kind + self.edge_types, 2 * self.edge_types)
        both = torch.cat([torch.cat([forth, back], 1).to(columns.dtype), torch.cat([columns, columns], 1)], 2)
        mask = obs["edge_mask"].bool()
        return torch.cat([source, target], 1), torch.cat([target, source], 1), both, torch.cat([mask, mask], 1)

    def embed_nodes(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (B, V, H), zero for nodes that are not there."""
        live = obs["nodes"].any(2, keepdim=True)
        x = torch.relu(self.node_in(obs["nodes"])) * live
        source, target, columns, mask = self.edge_attributes(obs)
        for conv in self.convs:
            x = torch.relu(x + conv(x, source, target, columns, mask)) * live
        return x

    def pool_jobs(self, x: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and maximum over the tasks of each job, (B, V, 2H) by the number of the job, and which there are."""
        member = (group >= 0).unsqueeze(-1)
        index = group.clamp(min=0).unsqueeze(-1)
        count = torch.zeros_like(x[..., :1]).scatter_add(1, index, member.to(x.dtype))
        index = index.expand_as(x)
        total = torch.zeros_like(x).scatter_add(1, index, x * member)
        highest = torch.zeros_like(x).scatter_reduce(1, index, x * member, "amax")
        return torch.cat([total / count.clamp(min=1.0), highest], dim=2), count.squeeze(-1) > 0


class PygPointerNetwork(GraphPointerNetwork):
    """The same with torch-geometric's convolutions and pooling, on the nodes and edges that are there.

    Graphs are joined by offsets: `Batch.from_data_list` takes 50 times as long.
    """

    def _new_conv(self, hidden: int, edge_size: int) -> nn.Module:
        from torch_geometric.nn import GINEConv  # takes seconds to import

        return GINEConv(update_network(hidden), edge_dim=edge_size)

    def embed_nodes(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Embeddings (B, V, H), zero for nodes that are not there."""
        num_sets, num_nodes, _ = obs["nodes"].shape
        live = obs["nodes"].any(2).flatten()
        place = live.cumsum(0) - 1  # of each node among those that are there
        source, target, columns, mask = self.edge_attributes(obs)
        offset = torch.arange(num_sets, device=live.device).unsqueeze(1) * num_nodes
        edges = place[torch.stack([(source + offset)[mask], (target + offset)[mask]])]
        x = torch.relu(self.node_in(obs["nodes"].flatten(0, 1)[live]))
        for conv in self.convs:
            x = torch.relu(x + conv(x, edges, columns[mask]))
        full = x.new_zeros(num_sets * num_nodes, x.shape[1])
        return full.masked_scatter(live.unsqueeze(-1), x).view(num_sets, num_nodes, -1)

    def pool_jobs(self, x: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and maximum over the tasks of each job, (B, V, 2H) by the number of the job, and which there are."""
        from torch_geometric.utils import scatter

        num_sets, num_nodes, hidden = x.shape
        member = (group >= 0).flatten()
        index = (group + torch.arange(num_sets, device=x.device).unsqueeze(1) * num_nodes).flatten()[member]
        flat, size = x.flatten(0, 1)[member], num_sets * num_nodes
        parts = [scatter(flat, index, dim_size=size, reduce=how) for how in ("mean", "max")]
        there = torch.zeros(size, dtype=torch.bool, device=x.device).index_fill(0, index, True)
        return torch.cat(parts, dim=1).view(num_sets, num_nodes, 2 * hidden), there.view(num_sets, num_nodes)


def pick(table: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, V, H) by int64 (B, K), zero where the index is -1: (B, K, H)."""
    rows = table.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, table.shape[2]))
    return rows * (index >= 0).unsqueeze(-1)
