"""An offloaded Mixture-of-Experts model and what its cache may do: frozen dataclasses, validated on creation."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path

from ..core.errors import InputError


@dataclass(frozen=True)
class CostModel:
    """Seconds of computing and loading experts, at one layer of one step.

    layer_s = attention_s + attention_token_s * tokens + decision_s + stall + expert_s * experts + expert_token_s * uses
    with `experts` the distinct ones needed, `uses` the (token, expert) pairs, and the stall the time in which
    the experts wait for loads. A load is read in chunks of `chunk_bytes` (the last one may be shorter), each of which
    takes chunk_latency_s + its bytes / bandwidth, one chunk at a time, never interrupted.
    """

    name: str
    attention_s: float
    """Everything in a layer before the gate's answer, per step."""
    expert_s: float
    """One expert over one batch."""
    expert_bytes: int
    bandwidth: float
    """Bytes a second of the channel into the cache."""
    attention_token_s: float = 0.0
    expert_token_s: float = 0.0
    step_s: float = 0.0
    """What a step costs outside its layers (embedding, head, sampling)."""
    decision_s: float = 0.0
    """The policy's decision: no prefetch begins and nothing is computed before it is made, but what is missing is
    already being loaded."""
    chunk_bytes: int = 2 << 20
    chunk_latency_s: float = 0.0
    store_bandwidth: float = 3e9
    """Bytes a second for experts that the tier behind the channel does not hold (`ExpertCachingSpec.host_share`)."""
    overlap: bool = True
    """Experts at hand are computed while others load; else none is computed before all are there."""
    source: str = ""
    """Where the numbers are from: the measurement, machine and versions."""

    def __post_init__(self) -> None:
        for name in (
            "attention_s",
            "expert_s",
            "attention_token_s",
            "expert_token_s",
            "step_s",
            "decision_s",
            "chunk_latency_s",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"CostModel.{name} of {self.name!r} is {getattr(self, name)}", remedy="Give non-negative seconds"
                )
        for name in ("expert_bytes", "bandwidth", "chunk_bytes", "store_bandwidth"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(
                    f"CostModel.{name} of {self.name!r} is {getattr(self, name)}", remedy="Give a positive number"
                )

    @property
    def chunks(self) -> int:
        """Chunks of one expert."""
        return -(-self.expert_bytes // self.chunk_bytes)

    @property
    def load_s(self) -> float:
        """Seconds to load one expert through an idle channel."""
        return self.expert_bytes / self.bandwidth + self.chunks * self.chunk_latency_s

    @property
    def store_load_s(self) -> float:
        """The same for an expert that comes from the store below the tier behind the channel."""
        return self.expert_bytes / min(self.bandwidth, self.store_bandwidth) + self.chunks * self.chunk_latency_s

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CostModel:
        """Read a cost model from the JSON that `schedlab calibrate` writes. Raises InputError."""
        try:
            data = json.loads(Path(path).read_text())
            data.pop("report", None)
            return cls(**data)
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"not a cost model ({error!r})", file=path, remedy="Write one with `schedlab calibrate experts`"
            ) from error


DEEPSEEK_V2_LITE_A100 = CostModel(
    name="deepseek-v2-lite-a100",
    attention_s=4.0e-5,
    expert_s=1.5e-5,
    expert_bytes=17_301_504,
    bandwidth=25e9,
    chunk_latency_s=1.0e-5,
    source="A100-like: 17.3 MB of bf16 at 1.5 TB/s of HBM, PCIe 4 at 25 GB/s",
)
SAMBANOVA_COE = CostModel(
    name="sambanova-coe",
    attention_s=0.0,
    expert_s=1.0e-2,
    expert_bytes=13_500_000_000,
    bandwidth=1.0e12,
    chunk_bytes=1 << 28,
    store_bandwidth=32e9,
    source="SN40L (arXiv 2405.07518): whole 7B models of 13.5 GB, DDR to HBM at about 1 TB/s a node; computing streams "
    "the model from HBM through SRAM (expert_s); 32 GB/s is the host link of the GPU node it is compared with",
)


@dataclass(frozen=True)
class ExpertCachingSpec:
    """One caching problem: the slots, what may be done with them, what loads and computing cost.

    The number of layers, experts and experts a token is the workload's.
    """

    cost: CostModel = DEEPSEEK_V2_LITE_A100
    cache_share: float = 0.25
    """Share of the experts of each layer that fits into the cache (rounded to whole slots)."""
    layer_slots: tuple[int, ...] = ()
    """Slots of each layer, instead of `cache_share`."""
    memory_bytes: float = math.inf
    """Fast memory for all slots; more slots than fit are refused."""
    pooled: bool = False
    """All layers share all slots; else each layer has its own."""
    bypass: bool = False
    """A missing expert may be streamed without being cached."""
    max_prefetch: int = 0
    """Prefetches that may be asked for in one epoch; 0: loads on demand only."""
    prefetch_depth: int = 1
    """Layers ahead of the current one for which experts may be prefetched."""
    num_sequences: int = 1
    """Sequences interleaved: tokens in a step."""
    known_steps: int = 0
    """Coming steps whose routing is known, of models with a router apart from the layers (Read-ME); else 0."""
    history_tokens: int = 1024
    """Tokens of routing that the state remembers of each interleaved sequence."""
    host_share: float = 1.0
    """Share of all experts that the tier behind the channel holds, least recently used ones dropped first; the others
    are loaded from the store below it at `cost.store_bandwidth`."""
    warm_start: bool = False
    """The cache starts full, with the experts of highest prior; else empty."""
    eviction_only: bool = False
    """Loads take no time and the reward counts them: pure replacement."""
    num_candidates: int = 65
    """Rows of the action table: one for bypass or none, the others for experts."""

    def __post_init__(self) -> None:
        for name in ("cache_share", "host_share"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"ExpertCachingSpec.{name} is {getattr(self, name)}", remedy="Give a share in (0, 1]")
        least = {"prefetch_depth": 1, "num_sequences": 1, "history_tokens": 1, "num_candidates": 2}
        for name in (*least, "max_prefetch", "known_steps"):
            if getattr(self, name) < least.get(name, 0):
                raise InputError(
                    f"ExpertCachingSpec.{name} is {getattr(self, name)}",
                    remedy=f"Give an integer of at least {least.get(name, 0)}",
                )
        if any(slots < 0 for slots in self.layer_slots):
            raise InputError(f"layer_slots {self.layer_slots} has a negative number", remedy="Give numbers of slots")
        if self.eviction_only and self.max_prefetch:
            raise InputError(
                f"eviction_only with max_prefetch {self.max_prefetch}: loads that take no time need no prefetch",
                remedy="Set max_prefetch to 0 or eviction_only to False",
            )

    def slots_of(self, num_layers: int, num_experts: int, top_k: int) -> tuple[int, ...]:
        """Slots of each layer for a model of this shape. Raises InputError where the configuration is impossible."""
        slots = self.layer_slots or (round(self.cache_share * num_experts),) * num_layers
        if len(slots) != num_layers:
            raise InputError(
                f"layer_slots gives {len(slots)} layers, the model has {num_layers}", remedy="Give one for each layer"
            )
        if max(slots) > num_experts and not self.pooled:
            raise InputError(
                f"{max(slots)} slots for the {num_experts} experts of a layer", remedy="Give at most one an expert"
            )
        if sum(slots) * self.cost.expert_bytes > self.memory_bytes:
            raise InputError(
                f"{sum(slots)} slots of {self.cost.expert_bytes} bytes exceed memory_bytes {self.memory_bytes:.0f}",
                remedy=f"Give at most {int(self.memory_bytes // self.cost.expert_bytes)} slots in all, or more memory",
            )
        most_needed = min(num_experts, top_k * self.num_sequences)
        smallest = sum(slots) if self.pooled else min(slots)
        if smallest < most_needed and not self.bypass:
            raise InputError(
                f"a cache of {smallest} slots is smaller than the {most_needed} experts that a layer may need at once "
                f"(top {top_k} of {num_experts}, {self.num_sequences} sequences)",
                remedy="Raise the slots, lower num_sequences, or set bypass=True so that experts may be streamed",
            )
        if self.prefetch_depth >= num_layers > 1:
            raise InputError(
                f"prefetch_depth {self.prefetch_depth} reaches round the {num_layers} layers",
                remedy=f"Give at most {num_layers - 1}",
            )
        return tuple(slots)

    def replace(self, **changes: object) -> ExpertCachingSpec:
        """A copy with some fields changed (`dataclasses.replace`)."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def to_dict(self) -> dict:
        """Plain JSON-able form, read back by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> ExpertCachingSpec:
        """The spec that `to_dict` wrote."""
        return cls(**{**data, "cost": CostModel(**data["cost"]), "layer_slots": tuple(data["layer_slots"])})


COMPOSITION_OF_EXPERTS = ExpertCachingSpec(
    cost=SAMBANOVA_COE, cache_share=35 / 150, num_sequences=1, history_tokens=1, bypass=False
)
"""SambaNova's Composition of Experts (arXiv 2405.07518): whole models are the experts (one layer, top 1 of 150), the
cache is HBM, the tier behind the channel DDR, which holds them all, and SRAM is what computing streams through."""
