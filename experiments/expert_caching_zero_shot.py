"""Evict by a score that was trained on another model's routing: what share of the LRU-to-Belady gap does it close?

Trained on the training sequences of one trace (`--trace`) is the part of the eviction score that knows no layer and no
expert (`agents.expert_caching_network.PortableNetwork`). It is measured, compiled, in the simulator, on the held-out
sequences of that trace and on the whole of the other one: per-layer caches, unit sizes, demand loads.

Example:

  python -m schedlab.experiments.expert_caching_zero_shot --out results/expert_caching_gap
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..baselines.expert_caching import RULES, belady_loads
from ..envs.core.results import atomic_path
from ..envs.expert_caching.spec import ExpertCachingSpec
from . import command
from .expert_caching import demand_loads
from .expert_caching_gap import SHARES, percent_closed, split
from .expert_caching_gap import Args as GapArgs
from .expert_traces import MOE, load_trace

STEPS = 800
"""Optimizer steps of each network."""


@dataclass
class Args(GapArgs):
    """Arguments of the experiment: those of `expert_caching_gap`, of which the steps are not used."""

    out: Path = Path("results/expert_caching_gap")
    """Folder of zero_shot.json, and of what is computed from traces once."""
    own_tokens: int = 8000
    """Held-out tokens of the trace trained on, beside which the other one stands."""
    other: str = MOE
    """Routing trace of the other model: `moe` (of our own small one), a name in the data folder, or a file."""


def measure(args: Args) -> dict[str, Any]:
    """Train one network a seed, measure it on both traces and return what zero_shot.json holds. Raises InputError."""
    import torch

    from ..agents.expert_caching import LearnedEviction
    from ..agents.expert_caching_checkpoint import pack_portable
    from ..agents.expert_caching_train import EvictionTraining, prepare_trace, train_portable

    torch.set_num_threads(1)
    train, test = split(args)
    trace = prepare_trace(train, args.out)
    networks = []
    for seed in range(args.seeds):
        command.say(f"training seed {seed}")
        networks.append(train_portable(trace, EvictionTraining(seed=seed, head_steps=STEPS)))
    rows: dict[str, Any] = {}
    measured = {"same model, held out": test.head(args.own_tokens), args.other: load_trace(args.other, args.data_dir)}
    for name, workload in measured.items():
        layers, experts, k = workload.num_layers, workload.num_experts, workload.top_k
        uses = workload.num_tokens * layers * k
        row: dict[str, list] = {"lru": [], "belady": [], "agent": [], "gap": [], "points": []}
        for share in SHARES:
            command.say(f"measuring {name} at {share:.1%}")
            spec = ExpertCachingSpec(cache_share=share, eviction_only=True, history_tokens=1)
            lru = demand_loads(workload, spec, RULES["lru"])
            best = int(belady_loads(workload, (round(share * experts),) * layers).sum())
            agent = [
                demand_loads(workload, spec, LearnedEviction("portable", pack_portable(network, layers, experts), k))
                for network in networks
            ]
            row["lru"].append(1 - lru / uses)
            row["belady"].append(1 - best / uses)
            row["agent"].append([1 - loads / uses for loads in agent])
            row["gap"].append(percent_closed(lru - np.array(agent), np.full(len(agent), lru - best)).tolist())
            row["points"].append([100 * (lru - loads) / uses for loads in agent])
        rows[name] = {"model": [layers, experts, k], "tokens": workload.num_tokens, **row}
    return {"shares": SHARES, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """Both traces as text."""
    lines = []
    for name, row in results["rows"].items():
        lines.append(f"{name}: {row['model'][0]} layers x {row['model'][1]} experts, top {row['model'][2]}")
        for i, share in enumerate(results["shares"]):
            gap, points = np.array(row["gap"][i]), np.array(row["points"][i])
            lines.append(
                f"  {share:6.1%}: LRU {row['lru'][i]:.3f}, Belady {row['belady'][i]:.3f}; gap closed {gap.mean():.1f}% "
                f"({gap.min():.1f} to {gap.max():.1f}), {points.mean():+.2f} points ({points.min():+.2f} at worst)"
            )
    return "\n".join(lines)


def act(args: Args) -> int:
    """Measure, write zero_shot.json, print the table. Returns the exit status."""
    results = measure(args)
    with atomic_path(args.out / "zero_shot.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1))
    print(table(results))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    return command.run(Args, act, argv, "expert_caching_zero_shot", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
