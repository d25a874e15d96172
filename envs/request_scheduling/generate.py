"""Requests made up from published statistics: bursts of arrivals, fitted lengths, and shared prefixes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ..core.errors import InputError
from .workload import Workload

PERCENTILES = (0.0, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)
"""Percentiles that stand in `Published`, smallest and largest value included."""


@dataclass(frozen=True)
class Bursts:
    """On/off arrivals: bursts of requests with pauses between, relative to the mean rate.

    A Gamma process of a large CV puts the requests of a burst into one instant; here they come at a finite rate. The
    defaults are fitted to the code trace. Variance over mean of the arrivals in windows of 1, 10 and 60 s: 13, 72 and
    164 in the trace; about 9, 52 and 110 here; 68, 97 and 110 with Gamma gaps of the same CV.
    """

    requests: float = 63.0
    """Mean requests in a burst (geometric)."""
    speedup: float = 4.23
    """Rate within a burst over the mean rate."""
    gap_cv: float = 1.41
    """Coefficient of variation of the gaps within a burst (Gamma)."""

    def __post_init__(self) -> None:
        if not (self.requests > 1 and self.speedup > 1 and self.gap_cv > 0):
            raise InputError(f"{self} describes no bursts", remedy="Give requests > 1, speedup > 1 and gap_cv > 0")


@dataclass(frozen=True)
class Prefixes:
    """Sessions whose requests share prefixes: system prompt, then turns, each of which repeats what it follows.

    The defaults are fitted to the synthetic Mooncake trace, in which an infinite cache holds 65% of prompt tokens.
    """

    block_tokens: int = 512
    """Tokens a hash id covers."""
    turns: float = 2.9
    """Mean requests in a session (geometric)."""
    growth: float = 0.06
    """Mean growth of the prompt from turn to turn, in standard deviations of the (normal scores of) prompt lengths."""
    branch: float = 0.1
    """Probability that a request follows an earlier turn of its session than the latest."""
    think_s: float = 105.0
    """Mean seconds between turns (Gamma with shape 0.75)."""
    system_prompts: int = 8
    """Number of system prompts; sessions choose one by Zipf's law."""
    system_tokens: int = 1024
    """Length of every system prompt."""

    def __post_init__(self) -> None:
        is_valid = (
            self.block_tokens >= 1
            and self.turns >= 1
            and self.growth >= 0
            and 0 <= self.branch <= 1
            and self.think_s > 0
            and self.system_prompts >= 1
            and self.system_tokens >= 0
        )
        if not is_valid:
            raise InputError(f"{self} describes no sessions", remedy="Give positive sizes and a probability")


@dataclass(frozen=True)
class Published:
    """Statistics of a public trace: all that a generator knows of it."""

    num_requests: int
    requests_per_s: float
    arrival_cv: float
    """Coefficient of variation of the gaps between arrivals."""
    prompt_tokens: tuple[int, ...]
    """At `PERCENTILES`."""
    output_tokens: tuple[int, ...]
    """At `PERCENTILES`."""
    length_correlation: float
    """Spearman's rank correlation of prompt and output length."""
    source: str
    bursts: Bursts | None = None
    """On/off arrivals; None: Gamma."""
    prefixes: Prefixes | None = None


_AZURE = "Patel et al., ISCA 2024 (Splitwise); percentiles of Azure/AzurePublicDataset 2023"

PUBLISHED: dict[str, Published] = {
    "azure_conv": Published(
        num_requests=19366,
        requests_per_s=5.53,
        arrival_cv=1.094,
        prompt_tokens=(2, 29, 181, 207, 396, 1020, 1189, 2734, 4083, 4142, 6179, 14050),
        output_tokens=(7, 16, 41, 54, 85, 129, 395, 424, 451, 601, 954, 1000),
        length_correlation=0.07,
        source=_AZURE,
    ),
    "azure_code": Published(
        num_requests=8819,
        requests_per_s=2.567,
        arrival_cv=13.15,
        prompt_tokens=(3, 17, 75, 147, 578, 1469, 2744, 5188, 7303, 7436, 7437, 7437),
        output_tokens=(6, 6, 6, 7, 9, 13, 24, 55, 90, 251, 825, 1899),
        length_correlation=-0.02,
        source=_AZURE,
        bursts=Bursts(),
    ),
    "mooncake_synthetic": Published(
        num_requests=3993,
        requests_per_s=3.907,
        arrival_cv=1.011,
        prompt_tokens=(13, 16, 22, 30, 277, 11587, 23175, 38611, 48905, 66456, 191373, 191378),
        output_tokens=(1, 2, 2, 4, 11, 69, 250, 389, 519, 768, 813, 893),
        length_correlation=-0.52,
        source="Qin et al., FAST 2025 (Mooncake); percentiles of the synthetic trace in kvcache-ai/Mooncake",
        prefixes=Prefixes(),
    ),
    "sharegpt": Published(
        num_requests=300,
        requests_per_s=10.3,
        arrival_cv=0.942,
        prompt_tokens=(262, 264, 308, 363, 483, 732, 1110, 1460, 1749, 2765, 3835, 3998),
        output_tokens=(512, 516, 524, 531, 562, 632, 767, 770, 773, 784, 961, 1021),
        length_correlation=0.19,
        source="percentiles of the 300 ShareGPT requests in casys-kaist/LLMServingSim",
    ),
}
"""Statistics by name of the trace."""

_SAME_REQUESTS = {"vllm_rtx4090": "sharegpt", "vllm_rtxpro6000": "sharegpt"}


def generate(
    name: str,
    num_requests: int | None = None,
    seed: int = 0,
    *,
    requests_per_s: float | None = None,
    arrival_cv: float | None = None,
    bursts: Bursts | None = None,
    prefixes: Prefixes | None = None,
) -> Workload:
    """Requests with the published statistics of a trace, or "synthetic": Poisson arrivals, lengths of azure_conv.

    Arrivals are Gamma of CV `arrival_cv` (1: Poisson, 0: even), or on/off where `bursts` are given or published; an
    `arrival_cv` given without `bursts` always means Gamma. N / (last arrival) is exactly `requests_per_s`. Lengths
    are drawn by stratified sampling, so that their percentiles hold for any number of requests.
    """
    fitted_to = "azure_conv" if name == "synthetic" else _SAME_REQUESTS.get(name, name)
    if fitted_to not in PUBLISHED:
        raise InputError(
            f"no statistics are known of {name!r}",
            remedy=f"Choose one of {', '.join([*PUBLISHED, *_SAME_REQUESTS, 'synthetic'])}",
        )
    known = PUBLISHED[fitted_to]
    if name == "synthetic":
        known = replace(known, num_requests=2000, arrival_cv=1.0)
    if bursts is None and arrival_cv is None:
        bursts = known.bursts
    num_requests = known.num_requests if num_requests is None else num_requests
    requests_per_s = known.requests_per_s if requests_per_s is None else requests_per_s
    arrival_cv = known.arrival_cv if arrival_cv is None else arrival_cv
    prefixes = known.prefixes if prefixes is None else prefixes
    if num_requests < 1:
        raise InputError(f"num_requests is {num_requests}", remedy="Give a positive number")
    if not (math.isfinite(requests_per_s) and requests_per_s > 0):
        raise InputError(f"requests_per_s is {requests_per_s}", remedy="Give a positive rate")
    if not (math.isfinite(arrival_cv) and arrival_cv >= 0):
        raise InputError(f"arrival_cv is {arrival_cv}", remedy="Give 0 (even), 1 (Poisson) or more (bursts)")

    arrival_rng, length_rng, session_rng = np.random.default_rng(seed).spawn(3)
    if bursts is None:
        gaps = _gamma_gaps(num_requests - 1, arrival_cv, arrival_rng)
    else:
        gaps = _on_off_gaps(num_requests - 1, arrival_cv, bursts, arrival_rng)
    arrival_s = np.concatenate(([0.0], np.cumsum(np.maximum(gaps, 1e-9))))
    if num_requests > 1:
        arrival_s *= num_requests / (requests_per_s * arrival_s[-1])
    hashes: dict[str, object] = {}
    if prefixes is None:
        scores = length_rng.standard_normal(num_requests)
    else:
        scores, parents, systems = _sessions(num_requests, num_requests / requests_per_s, prefixes, session_rng)
    prompts = _lengths(scores, known.prompt_tokens, length_rng)
    if prefixes is not None:
        offsets, ids = _hash_ids(prompts, parents, systems, prefixes)
        hashes = {"hash_offsets": offsets, "hash_ids": ids, "hash_block_tokens": prefixes.block_tokens}
    correlation = 2 * math.sin(math.pi * known.length_correlation / 6)  # Pearson's, of normal scores
    other = length_rng.standard_normal(num_requests)
    spread = scores.std() if num_requests > 1 else 1.0
    output_scores = correlation * (scores - scores.mean()) / spread + math.sqrt(1 - correlation**2) * other
    made = "synthetic, lengths of azure_conv" if name == "synthetic" else f"published percentiles of {fitted_to}"
    return Workload.from_arrays(
        name,
        arrival_s,
        prompts,
        _lengths(output_scores, known.output_tokens, length_rng),
        source=f"generated: {'' if name == 'synthetic' else 'fitted to the '}{made}, seed {seed}",
        **hashes,  # type: ignore[arg-type]
    )


def _gamma_gaps(num_gaps: int, cv: float, rng: np.random.Generator) -> np.ndarray:
    """Gaps of mean 1 and coefficient of variation `cv`."""
    return np.ones(num_gaps) if cv == 0 else rng.gamma(cv**-2, cv**2, num_gaps)


def _on_off_gaps(num_gaps: int, cv: float, bursts: Bursts, rng: np.random.Generator) -> np.ndarray:
    """Gaps of mean 1 and coefficient of variation `cv`: Gamma gaps in bursts, and rare Gamma pauses."""
    pause_share = 1 / bursts.requests
    short = 1 / bursts.speedup
    pause = (1 - (1 - pause_share) * short) / pause_share
    square = (1 + cv**2 - (1 - pause_share) * short**2 * (1 + bursts.gap_cv**2)) / pause_share
    pause_cv = math.sqrt(max(square / pause**2 - 1, 0.0))
    if pause_cv == 0:
        least = math.sqrt((1 - pause_share) * short**2 * (1 + bursts.gap_cv**2) + pause_share * pause**2 - 1)
        raise InputError(
            f"{bursts} cannot have arrival_cv {cv}",
            remedy=f"Give a CV above {least:.3g}, or arrival_cv without bursts for Gamma arrivals",
        )
    in_burst = rng.gamma(bursts.gap_cv**-2, short * bursts.gap_cv**2, num_gaps)
    pauses = rng.gamma(pause_cv**-2, pause * pause_cv**2, num_gaps)
    return np.where(rng.random(num_gaps) < pause_share, pauses, in_burst)


def _lengths(scores: np.ndarray, percentiles: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Lengths in the order of `scores`, by a log-linear inverse CDF through the percentiles."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    shares = (ranks + rng.random(len(scores))) / len(scores)
    return np.rint(np.exp(np.interp(100 * shares, PERCENTILES, np.log(percentiles)))).astype(np.int64)


def _sessions(
    num_requests: int, duration_s: float, prefixes: Prefixes, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Length score, request that it follows (-1: none), and system prompt of every request, in order of time."""
    sizes = rng.geometric(1 / prefixes.turns, num_requests)  # more sessions than needed, cut below
    session = np.repeat(np.arange(num_requests), sizes)[:num_requests]
    firsts = np.flatnonzero(np.diff(session, prepend=-1))
    turn = np.arange(num_requests) - firsts[session]
    thinks = np.where(turn == 0, 0.0, rng.gamma(0.75, prefixes.think_s / 0.75, num_requests))
    grows = np.where(turn == 0, 0.0, rng.exponential(prefixes.growth, num_requests))
    start_s = rng.uniform(0, duration_s, len(firsts))[session]
    base = rng.standard_normal(len(firsts))[session]

    time_s = start_s + _sums_within(thinks, firsts, session)
    scores = base + _sums_within(grows, firsts, session)
    back = np.where(rng.random(num_requests) < prefixes.branch, (rng.random(num_requests) * turn).astype(np.int64), 0)
    parents = np.where(turn == 0, -1, np.arange(num_requests) - 1 - np.minimum(back, np.maximum(turn - 1, 0)))
    popularity = 1 / np.arange(1, prefixes.system_prompts + 1)
    systems = rng.choice(prefixes.system_prompts, len(firsts), p=popularity / popularity.sum())[session]

    order = np.argsort(time_s, kind="stable")
    place = np.empty(num_requests, np.int64)
    place[order] = np.arange(num_requests)
    return scores[order], np.where(parents < 0, -1, place[parents])[order], systems[order]


def _sums_within(values: np.ndarray, firsts: np.ndarray, session: np.ndarray) -> np.ndarray:
    """Running sums that start anew with every session."""
    sums = np.cumsum(values)
    return sums - (sums[firsts] - values[firsts])[session]


def _hash_ids(
    prompts: np.ndarray, parents: np.ndarray, systems: np.ndarray, prefixes: Prefixes
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and dense ids: blocks of the prompt that is followed, else of the system prompt, then new ones."""
    system_blocks = prefixes.system_tokens // prefixes.block_tokens
    system_ids: dict[tuple[int, int], int] = {}
    next_id = 0
    rows: list[list[int]] = []
    for prompt, parent, system in zip(prompts.tolist(), parents.tolist(), systems.tolist(), strict=True):
        num_blocks = prompt // prefixes.block_tokens
        ids = rows[parent][:num_blocks] if parent >= 0 else []
        for depth in range(len(ids), num_blocks):
            key = (system, depth)
            if depth < system_blocks and key in system_ids:
                ids.append(system_ids[key])
                continue
            if depth < system_blocks:
                system_ids[key] = next_id
            ids.append(next_id)
            next_id += 1
        rows.append(ids)
    offsets = np.concatenate(([0], np.cumsum([len(ids) for ids in rows])))
    return offsets, np.array([h for ids in rows for h in ids], np.int64)
