"""Requests to serve: the `Workload` record, its transformations, and the declared length predictor.

Loaders of public traces are in `traces.py`, generators in `generate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.errors import InputError
from .spec import SloClass

DEFAULT_RANK_CORRELATION = 0.8
"""Rank correlation of the length predictor of every loader and generator: about what learning to rank reaches
(Fu et al. 2024, "Efficient LLM scheduling by learning to rank")."""

RANK_TOLERANCE = 0.005
"""How close `Workload.with_predictor` comes to the rank correlation asked for, given some hundred requests."""

MAX_TOKENS = 1 << 31
"""Longest prompt or output that is believed."""

_MAX_SIGMA = 20.0
_MAX_LENGTH_FACTOR = 1e6
_PREDICTOR_NOTE = "length predictor"


@dataclass(frozen=True, eq=False)
class Workload:
    """A list of requests, sorted by arrival. Every array has one entry a request, N in all.

    `output_tokens` is the future: engines read it to know when a request ends, policies never do.
    Transformations return new workloads, with read-only arrays, and note themselves in `source`.
    """

    name: str
    arrival_s: np.ndarray  # (N,) float64, non-decreasing, from 0
    prompt_tokens: np.ndarray  # (N,) int64, >= 1
    output_tokens: np.ndarray  # (N,) int64, >= 1
    predicted_output_tokens: np.ndarray  # (N,) float64, > 0
    slo_class: np.ndarray  # (N,) int32
    priority: np.ndarray  # (N,) int32, lower is more urgent
    client: np.ndarray  # (N,) int32
    hash_offsets: np.ndarray  # (N + 1,) int64: blocks of request i are hash_ids[hash_offsets[i]:hash_offsets[i + 1]]
    hash_ids: np.ndarray  # int64, dense ids from 0; equal ids are equal prompt prefixes; full blocks only
    hash_block_tokens: int = 0  # prompt tokens a hash id covers; 0: no prefix information
    source: str = ""
    """Where the requests are from, as printed beside results."""
    has_true_lengths: bool = False
    """True when `predicted_output_tokens` are the true lengths: results are then an oracle's."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    @classmethod
    def from_arrays(
        cls,
        name: str,
        arrival_s: Any,
        prompt_tokens: Any,
        output_tokens: Any,
        *,
        predicted_output_tokens: Any = None,
        slo_class: Any = None,
        priority: Any = None,
        client: Any = None,
        hash_offsets: Any = None,
        hash_ids: Any = None,
        hash_block_tokens: int = 0,
        source: str = "",
    ) -> Workload:
        """A validated workload from array-likes (copied). Raises InputError.

        Classes, priorities and clients default to 0, prefix hashes to none, and predicted lengths to the default
        predictor (`DEFAULT_RANK_CORRELATION`, seed 0).
        """
        arrivals = _column("arrival_s", arrival_s, np.float64)
        zeros = np.zeros(len(arrivals), np.int32)
        outputs = _column("output_tokens", output_tokens, np.int64)
        predicted = outputs if predicted_output_tokens is None else predicted_output_tokens
        workload = _frozen(
            cls(
                name=name,
                arrival_s=arrivals,
                prompt_tokens=_column("prompt_tokens", prompt_tokens, np.int64),
                output_tokens=outputs,
                predicted_output_tokens=_column("predicted_output_tokens", predicted, np.float64),
                slo_class=_column("slo_class", zeros if slo_class is None else slo_class, np.int32),
                priority=_column("priority", zeros if priority is None else priority, np.int32),
                client=_column("client", zeros if client is None else client, np.int32),
                hash_offsets=_column(
                    "hash_offsets", np.zeros(len(arrivals) + 1) if hash_offsets is None else hash_offsets, np.int64
                ),
                hash_ids=_column("hash_ids", [] if hash_ids is None else hash_ids, np.int64),
                hash_block_tokens=hash_block_tokens,
                source=source,
            )
        ).validate()
        return workload.with_predictor(DEFAULT_RANK_CORRELATION) if predicted_output_tokens is None else workload

    def validate(self) -> Workload:
        """This workload, if every invariant of its fields holds. Raises InputError naming the first that does not."""
        num_requests = len(self.arrival_s)
        if num_requests == 0:
            raise self._error("holds no requests", "Give at least one request")
        for name in ("prompt_tokens", "output_tokens", "predicted_output_tokens", "slo_class", "priority", "client"):
            if len(getattr(self, name)) != num_requests:
                raise self._error(
                    f"has {num_requests} entries in arrival_s but {len(getattr(self, name))} in {name}",
                    "Give one entry a request in every array",
                )
        self._require(np.isfinite(self.arrival_s), "arrival_s", "Give finite seconds")
        self._require(self.arrival_s >= 0, "arrival_s", "Count seconds from the first arrival")
        in_order = np.concatenate(([True], self.arrival_s[1:] >= self.arrival_s[:-1]))
        self._require(in_order, "arrival_s", "It lies before the arrival of the previous request: sort by arrival")
        for name in ("prompt_tokens", "output_tokens"):
            lengths = getattr(self, name)
            self._require((lengths >= 1) & (lengths <= MAX_TOKENS), name, f"Give lengths of 1 to {MAX_TOKENS} tokens")
        predicted = self.predicted_output_tokens
        self._require(np.isfinite(predicted) & (predicted > 0), "predicted_output_tokens", "Give positive tokens")
        self._require(self.slo_class >= 0, "slo_class", "Give indices into the spec's slo_classes")
        self._validate_hashes()
        return self

    def _validate_hashes(self) -> None:
        offsets, ids, block = self.hash_offsets, self.hash_ids, self.hash_block_tokens
        remedy = "Give N + 1 rising offsets, from 0 to the number of hash ids"
        if block < 0:
            raise self._error(f"has hash_block_tokens {block}", "Give a positive block size, or 0 for no prefixes")
        if len(offsets) != len(self) + 1 or offsets[0] != 0 or offsets[-1] != len(ids):
            raise self._error(f"has {len(offsets)} hash_offsets for {len(self)} requests, {len(ids)} hash ids", remedy)
        num_blocks = np.diff(offsets)
        self._require(num_blocks >= 0, "hash_offsets", remedy)
        if len(ids) == 0:
            return
        if block == 0:
            raise self._error(f"has {len(ids)} hash ids but hash_block_tokens 0", "Say how many tokens an id covers")
        full_blocks = self.prompt_tokens // block
        self._require(
            num_blocks <= full_blocks, "prompt_tokens", f"It has more hash ids than full blocks of {block} tokens"
        )
        if ids.min() < 0 or len(np.unique(ids)) != int(ids.max()) + 1:
            raise self._error("has hash ids that are not dense from 0", "Number them with `dense_ids`")
        broken = first_broken_prefix(offsets, ids)
        if broken is not None:
            raise self._error(
                f"has, in request {broken}, a hash id that follows another block than elsewhere",
                "An id must stand for the whole prompt up to and with its block",
            )

    def _require(self, holds: np.ndarray, name: str, remedy: str) -> None:
        if not holds.all():
            row = int(np.argmin(holds))
            raise self._error(f"has {name}[{row}] = {getattr(self, name)[row]}", remedy)

    def _error(self, problem: str, remedy: str) -> InputError:
        return InputError(f"workload {self.name!r} {problem}", remedy=remedy)

    def _with(self, note: str = "", **changes: Any) -> Workload:
        """A copy with some fields changed, and a note on it in `source`; a new predictor's replaces the old one's."""
        notes = [part for part in self.source.split("; ") if part]
        if note.startswith(_PREDICTOR_NOTE):
            notes = [part for part in notes if not part.startswith(_PREDICTOR_NOTE)]
        return _frozen(replace(self, source="; ".join([*notes, note] if note else notes), **changes))

    def window(self, start: int = 0, stop: int | None = None) -> Workload:
        """Requests start ... stop - 1, with arrivals shifted so that the first arrives at 0."""
        stop = len(self) if stop is None else stop
        if not 0 <= start < stop <= len(self):
            raise self._error(
                f"has {len(self)} requests, no window {start}:{stop}", f"Choose 0 <= start < stop <= {len(self)}"
            )
        if (start, stop) == (0, len(self)) and self.arrival_s[0] == 0:
            return self
        rows = slice(start, stop)
        blocks = slice(self.hash_offsets[start], self.hash_offsets[stop])
        return self._with(
            f"requests {start}:{stop}",
            arrival_s=self.arrival_s[rows] - self.arrival_s[start],
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            predicted_output_tokens=self.predicted_output_tokens[rows],
            slo_class=self.slo_class[rows],
            priority=self.priority[rows],
            client=self.client[rows],
            hash_offsets=self.hash_offsets[start : stop + 1] - self.hash_offsets[start],
            hash_ids=dense_ids(self.hash_ids[blocks]),
        )

    def split_by_time(self, fraction: float) -> tuple[Workload, Workload]:
        """Requests that arrive before `fraction` of the time of the last arrival, and the others."""
        if not 0 < fraction < 1:
            raise self._error(f"cannot be split at fraction {fraction}", "Choose a fraction between 0 and 1")
        if self._last_arrival_s() <= 0:
            raise self._error("arrives all at once and has no time to split", "Use window(start, stop)")
        cut = int(np.searchsorted(self.arrival_s, fraction * self.arrival_s[-1], side="left"))
        cut = min(max(cut, 1), len(self) - 1)  # rounding must leave a request on either side
        return self.window(0, cut), self.window(cut, len(self))

    def scale_time(self, factor: float) -> Workload:
        """Arrival times multiplied by `factor`: 2 halves the load."""
        return self._scale_time(factor, f"arrival times x {factor:.6g}")

    def at_rate(self, requests_per_s: float) -> Workload:
        """Arrival times scaled so that N / (last arrival) is `requests_per_s`; the pattern of bursts stays."""
        if not (math.isfinite(requests_per_s) and requests_per_s > 0):
            raise self._error(f"cannot arrive at {requests_per_s} requests/s", "Give a positive rate")
        if self._last_arrival_s() <= 0:
            raise self._error("arrives all at once and has no rate", "Use a workload that arrives over some time")
        factor = len(self) / (self._last_arrival_s() * requests_per_s)
        return self._scale_time(factor, f"at {requests_per_s:.6g} requests/s")

    def _scale_time(self, factor: float, note: str) -> Workload:
        if not (factor > 0 and math.isfinite(factor * self._last_arrival_s())):
            raise self._error(f"cannot be scaled in time by {factor}", "Give a positive, finite factor")
        return self._with(note, arrival_s=self.arrival_s * factor)

    def _last_arrival_s(self) -> float:
        return float(self.arrival_s[-1]) if len(self) else 0.0

    def scale_lengths(self, factor: float) -> Workload:
        """Prompts, outputs, predictions and hash blocks multiplied by `factor`, at least one token each.

        With prefix hashes, hash_block_tokens * factor must be a whole number: the blocks of a prompt then cover the
        same share of it as before. Prompts are rounded down in that case, to the nearest token without hashes.
        """
        if not 0 < factor <= _MAX_LENGTH_FACTOR:
            raise self._error(
                f"cannot be scaled in length by {factor}", f"Give a positive factor, up to {_MAX_LENGTH_FACTOR:g}"
            )
        block = self.hash_block_tokens
        new_block = round(block * factor)
        if block and (new_block < 1 or abs(block * factor - new_block) > 1e-6):
            raise self._error(
                f"has hash blocks of {block} tokens, and {block} x {factor} = {block * factor:.6g} is no whole number",
                f"Use a factor k/{block}, such as {max(new_block, 1)}/{block} = {max(new_block, 1) / block:.6g}",
            )
        prompts = self.prompt_tokens * new_block // block if block else np.rint(self.prompt_tokens * factor)
        outputs = np.maximum(np.rint(self.output_tokens * factor), 1)
        return self._with(
            f"lengths x {factor:.6g}",
            prompt_tokens=np.maximum(prompts, 1).astype(np.int64),
            output_tokens=outputs.astype(np.int64),
            predicted_output_tokens=outputs if self.has_true_lengths else self.predicted_output_tokens * factor,
            hash_block_tokens=new_block,
        ).validate()

    def scale_outputs(self, factor: float) -> Workload:
        """Outputs multiplied by `factor`, at least one token each; predictions are the true lengths again."""
        if not 0 < factor <= _MAX_LENGTH_FACTOR:
            raise self._error(
                f"cannot have outputs scaled by {factor}", f"Give a positive factor, up to {_MAX_LENGTH_FACTOR:g}"
            )
        outputs = np.maximum(np.rint(self.output_tokens * factor), 1).astype(np.int64)
        return self._with(f"outputs x {factor:.6g}", output_tokens=outputs).with_true_lengths()

    def with_predictor(self, rank_correlation: float, seed: int = 0) -> Workload:
        """Predicted lengths true * exp(sigma z), with sigma such that Spearman's correlation is the given one.

        z is standard normal and depends on the seed and the request's row alone; apply the predictor before
        splitting, and every split sees the same predictions. 1.0 gives the exact lengths, and the results of an
        oracle. Where no sigma gives the correlation (few requests, or lengths that are all equal), the nearest is
        taken, and `source` states what was reached.
        """
        if not 0 < rank_correlation <= 1:
            raise self._error(
                f"cannot have a predictor of rank correlation {rank_correlation}", "Choose one above 0, up to 1"
            )
        if rank_correlation == 1:
            return self.with_true_lengths()
        noise = np.random.default_rng(seed).standard_normal(len(self))
        sigma, reached = _fit_sigma(self.output_tokens, noise, rank_correlation)
        missed = "" if abs(reached - rank_correlation) <= RANK_TOLERANCE else f" (reached {reached:.3g})"
        return self._with(
            f"{_PREDICTOR_NOTE}: rank correlation {rank_correlation:g}{missed}, seed {seed}",
            predicted_output_tokens=self.output_tokens * np.exp(sigma * noise),
            has_true_lengths=False,
        )

    def with_true_lengths(self) -> Workload:
        """Predicted lengths equal to the true ones: what follows are results of an oracle."""
        return self._with(
            f"{_PREDICTOR_NOTE}: true lengths",
            predicted_output_tokens=self.output_tokens.astype(np.float64),
            has_true_lengths=True,
        )

    def with_classes(self, slo_classes: Sequence[SloClass], seed: int = 0) -> Workload:
        """Service classes drawn at random, by the `share` of each class."""
        if not slo_classes:
            raise self._error("was given no SLO classes", "Give at least one SloClass")
        shares = np.cumsum([c.share for c in slo_classes])
        draws = np.random.default_rng(seed).random(len(self)) * shares[-1]
        classes = np.minimum(np.searchsorted(shares, draws, side="right"), len(slo_classes) - 1)
        return self._with(f"{len(slo_classes)} SLO classes, seed {seed}", slo_class=classes.astype(np.int32))

    def with_block_tokens(self, block_tokens: int) -> Workload:
        """Hash ids of blocks of `block_tokens`, the engine's KV block: id h becomes h*m ... h*m + m - 1."""
        if block_tokens < 1:
            raise self._error(f"cannot have blocks of {block_tokens} tokens", "Give a positive block size")
        block = self.hash_block_tokens
        if block in (0, block_tokens):
            return self
        if block % block_tokens:
            raise self._error(
                f"has hash blocks of {block} tokens, no multiple of the engine's {block_tokens}",
                f"Choose EngineSpec.block_tokens among the divisors of {block}, or a trace with other blocks",
            )
        parts = block // block_tokens
        return self._with(
            hash_offsets=self.hash_offsets * parts,
            hash_ids=(self.hash_ids[:, None] * parts + np.arange(parts)).reshape(-1),
            hash_block_tokens=block_tokens,
        )

    def prefix_hit_share(self) -> float:
        """Share of all prompt tokens that an infinite prefix cache would hold at the request's arrival."""
        ids = self.hash_ids
        seen_before = np.ones(len(ids), bool)
        seen_before[np.unique(ids, return_index=True)[1]] = False
        return float(seen_before.sum() * self.hash_block_tokens / self.prompt_tokens.sum())


def dense_ids(ids: np.ndarray) -> np.ndarray:
    """Ids renumbered from 0 without gaps, in the same order of size."""
    return np.unique(ids, return_inverse=True)[1].reshape(-1).astype(np.int64)


def first_broken_prefix(hash_offsets: np.ndarray, hash_ids: np.ndarray) -> int | None:
    """First request in which an id follows another id than where it was first seen; None if there is none."""
    if len(hash_ids) == 0:
        return None
    parents = np.empty_like(hash_ids)
    parents[1:] = hash_ids[:-1]
    starts = hash_offsets[:-1]
    parents[starts[starts < hash_offsets[1:]]] = -1
    first_parent = np.full(int(hash_ids.max()) + 1, -1, np.int64)
    first_parent[hash_ids[::-1]] = parents[::-1]  # the last write, the first occurrence, stays
    broken = np.flatnonzero(parents != first_parent[hash_ids])
    return int(np.searchsorted(hash_offsets, broken[0], side="right") - 1) if len(broken) else None


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; nan if either side is constant."""
    return _cosine(_centred_ranks(a), _centred_ranks(b))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    # No `@`: threads of the BLAS cost more than these sums, fivefold where cores are shared.
    norm = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else math.nan


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks less their mean; ties get the mean of their ranks."""
    order = np.argsort(values)
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    sizes = np.diff(starts, append=len(values))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(starts + (sizes - len(values)) / 2, sizes)
    return ranks


def _fit_sigma(true_lengths: np.ndarray, noise: np.ndarray, rank_correlation: float) -> tuple[float, float]:
    """Bisection for sigma, and the correlation it reaches; ranks of true * exp(sigma z) are those of log + sigma z."""
    log_true = np.log(true_lengths)
    true_ranks = _centred_ranks(log_true)
    low, high, best, reached = 0.0, _MAX_SIGMA, 0.0, _cosine(true_ranks, true_ranks)
    if math.isnan(reached):  # lengths are all equal: nothing to rank
        return 0.0, reached
    for _ in range(40):
        sigma = (low + high) / 2
        correlation = _cosine(true_ranks, _centred_ranks(log_true + sigma * noise))
        if abs(correlation - rank_correlation) < abs(reached - rank_correlation):
            best, reached = sigma, correlation
        if abs(reached - rank_correlation) < RANK_TOLERANCE / 20:
            break
        low, high = (sigma, high) if correlation > rank_correlation else (low, sigma)
    return best, reached


def _column(name: str, values: Any, dtype: type) -> np.ndarray:
    """A contiguous copy in `dtype`. Raises InputError where the values are no such numbers."""
    try:
        given = np.asarray(values)
        numbers = given.astype(np.float64) if given.dtype.kind in "fO" else given
        if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
            raise TypeError(f"array of {given.dtype} and shape {given.shape}")
        if np.issubdtype(dtype, np.integer):
            info = np.iinfo(dtype)
            broken = ~np.isfinite(numbers) | (numbers != np.floor(numbers))
            broken |= (numbers < float(info.min)) | (numbers > float(info.max))
            if broken.any():
                row = int(np.argmax(broken))
                raise TypeError(f"{name}[{row}] = {given[row]}")
        return np.array(given, dtype)
    except (TypeError, ValueError) as error:
        kind = "integers" if np.issubdtype(dtype, np.integer) else "numbers"
        raise InputError(f"{name} is no list of {kind}: {error}", remedy=f"Give a flat list of {kind}") from error


def _frozen(workload: Workload) -> Workload:
    """The same workload over read-only arrays (a copy where an array could be written through another name)."""
    for name in workload.__dataclass_fields__:
        values = getattr(workload, name)
        if isinstance(values, np.ndarray) and values.flags.writeable:
            owned = values if values.base is None else values.copy()
            owned.flags.writeable = False
            object.__setattr__(workload, name, owned)
    return workload
