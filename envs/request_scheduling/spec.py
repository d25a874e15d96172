"""What an LLM serving engine is and what it is asked for: frozen dataclasses, validated on creation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path

from ..core.errors import InputError

COST_FEATURES = (
    "constant",
    "prefill_tokens",
    "decode_requests",
    "decode_context",
    "prefill_query_context",
    "query_times_kv",
    "has_prefill",
)
"""Regressors of the iteration cost model, in the order of `CostModel.coefficients_s`."""


@dataclass(frozen=True)
class CostModel:
    """Seconds of one engine iteration, linear and non-negative in seven features.

    iteration_s = sum_i coefficients_s[i] * feature_i, with the features of `COST_FEATURES`:
    1; prefill tokens P; decoding requests D; tokens of context read by the decodes (their own new token
    included); sum over prefill chunks of q * (context after the chunk); Q * KV, where Q = P + D is the number
    of query tokens of the iteration and KV the context of all requests in it (engines whose attention runs
    over one dense Q x KV mask pay this); 1 if P > 0 (engines that leave a CUDA graph, or a fast path, for it).
    """

    name: str
    coefficients_s: tuple[float, ...]
    source: str = ""
    """Where the numbers are from: the measurement, machine and versions."""

    def __post_init__(self) -> None:
        if len(self.coefficients_s) != len(COST_FEATURES) or min(self.coefficients_s) < 0:
            raise InputError(
                f"cost model {self.name!r} has coefficients {self.coefficients_s}",
                remedy=f"Give {len(COST_FEATURES)} non-negative seconds, one for each of {COST_FEATURES}",
            )
        if sum(self.coefficients_s) <= 0:
            raise InputError(f"cost model {self.name!r} is all zero", remedy="Give at least one positive coefficient")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CostModel:
        """Read a cost model from the JSON that `schedlab calibrate` writes. Raises InputError."""
        try:
            data = json.loads(Path(path).read_text())
            return cls(data["name"], tuple(data["coefficients_s"]), data.get("source", ""))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"not a cost model ({error!r})", file=path, remedy="Write one with `schedlab calibrate hf`"
            ) from error


LLAMA2_7B_A100 = CostModel(
    name="llama2-7b-a100",
    coefficients_s=(9.0e-3, 8.6e-5, 3.0e-5, 3.3e-7, 3.5e-9, 0.0, 0.0),
    source="A100-like: weights 13.5 GB at 1.5 TB/s; 13.4 GFLOP a token at 156 TFLOP/s; 0.5 MB of KV a token",
)


@dataclass(frozen=True)
class EngineSpec:
    """Limits of one engine replica."""

    kv_blocks: int = 7500
    """KV-cache blocks in the pool (7500 x 16 = 120k tokens, Llama-2-7B beside its weights in 80 GB)."""
    block_tokens: int = 16
    """Tokens in one KV block."""
    max_batch_tokens: int = 8192
    """Most tokens (decodes and prefill) in one iteration."""
    max_running: int = 256
    """Most requests that hold KV at the same time."""
    prefix_cache: bool = False
    """Keep and share full blocks of prompts by block hash."""

    def __post_init__(self) -> None:
        for name in ("kv_blocks", "block_tokens", "max_batch_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise InputError(f"EngineSpec.{name} is {getattr(self, name)}", remedy="Give a positive integer")
        if self.max_running > self.max_batch_tokens:
            raise InputError(
                f"EngineSpec.max_running {self.max_running} exceeds max_batch_tokens {self.max_batch_tokens}",
                remedy="Every running request decodes one token an iteration: raise max_batch_tokens",
            )

    @property
    def kv_tokens(self) -> int:
        return self.kv_blocks * self.block_tokens


@dataclass(frozen=True)
class SloClass:
    """A class of service: limits on time to first token and time per output token, and its worth."""

    ttft_s: float = 1.0
    tpot_s: float = 0.15
    weight: float = 1.0
    share: float = 1.0
    """Share of requests in this class (normalised over the classes)."""

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0 and self.tpot_s > 0 and self.weight > 0 and self.share > 0):
            raise InputError(f"{self} has a limit that is not positive", remedy="Give positive seconds and weights")


ONE_CLASS = (SloClass(),)
TWO_CLASSES = (SloClass(ttft_s=1.0, tpot_s=0.10, weight=1.0), SloClass(ttft_s=10.0, tpot_s=0.30, weight=1.0))
"""Interactive and relaxed requests, half each."""

OBJECTIVES = ("mean_e2e", "slo_goodput", "p99_ttft")
"""Names of rewards. `slo_goodput` weighs completions by their class (`SloClass.weight`)."""


@dataclass(frozen=True)
class RequestSchedulingSpec:
    """One scheduling problem: an engine, its cost, the service classes and what is rewarded."""

    engine: EngineSpec = field(default_factory=EngineSpec)
    cost: CostModel = LLAMA2_7B_A100
    slo_classes: tuple[SloClass, ...] = ONE_CLASS
    objective: str = "mean_e2e"
    prefill_choices: tuple[int, ...] = (0, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
    """Prefill tokens of the launch rows of the action table, increasing."""
    num_candidates: int = 64
    """Rows of the action table: the engine's default, the launch rows, then as many visible requests."""

    longest_wait_s: float = 1800.0
    """Of requests that waited longer, the oldest gets every 8th admission whatever the policy prefers, so that
    waiting is bounded (`table.OVERDUE_EVERY`)."""

    def __post_init__(self) -> None:
        if not self.longest_wait_s > 0:
            raise InputError(f"longest_wait_s is {self.longest_wait_s}", remedy="Give positive seconds (inf: no bound)")
        if self.objective not in OBJECTIVES:
            raise InputError(f"unknown objective {self.objective!r}", remedy=f"Choose one of {OBJECTIVES}")
        if not self.slo_classes:
            raise InputError("no SLO class given", remedy="Give at least one SloClass")
        too_large = [b for b in self.prefill_choices if b > self.engine.max_batch_tokens or b < 0]
        if too_large:
            raise InputError(
                f"prefill choices {too_large} lie outside the engine's 0..{self.engine.max_batch_tokens} tokens",
                remedy="Lower the choices or raise EngineSpec.max_batch_tokens",
            )
        if not self.prefill_choices or list(self.prefill_choices) != sorted(set(self.prefill_choices)):
            raise InputError(
                f"prefill choices {self.prefill_choices} are not increasing", remedy="Sort them and drop duplicates"
            )
        if self.num_candidates <= len(self.prefill_choices) + 1:
            raise InputError(
                f"num_candidates {self.num_candidates} leaves no row for a request beside "
                f"{len(self.prefill_choices) + 1} launch rows",
                remedy="Raise num_candidates",
            )

    def replace(self, **changes: object) -> RequestSchedulingSpec:
        """A copy with some fields changed (`dataclasses.replace`)."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def to_dict(self) -> dict:
        """Plain JSON-able form, read back by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> RequestSchedulingSpec:
        cost = dict(data["cost"])
        cost["coefficients_s"] = tuple(cost["coefficients_s"])
        return cls(
            engine=EngineSpec(**data["engine"]),
            cost=CostModel(**cost),
            slo_classes=tuple(SloClass(**c) for c in data["slo_classes"]),
            objective=data["objective"],
            prefill_choices=tuple(data["prefill_choices"]),
            num_candidates=data["num_candidates"],
            longest_wait_s=data["longest_wait_s"],
        )
