"""Transformations, predictor and generators of request workloads."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedlab.envs.core.errors import InputError
from schedlab.envs.request_scheduling.generate import PERCENTILES, PUBLISHED, Bursts, Prefixes, generate
from schedlab.envs.request_scheduling.spec import SloClass
from schedlab.envs.request_scheduling.workload import (
    DEFAULT_RANK_CORRELATION,
    RANK_TOLERANCE,
    Workload,
    dense_ids,
    first_broken_prefix,
    spearman,
)


def blocks(workload: Workload, i: int) -> list[int]:
    return workload.hash_ids[workload.hash_offsets[i] : workload.hash_offsets[i + 1]].tolist()


def shared_blocks(workload: Workload, i: int, j: int) -> int:
    """Length of the common prefix of requests i and j, in blocks."""
    pairs = zip(blocks(workload, i), blocks(workload, j), strict=False)
    return next(
        (k for k, (a, b) in enumerate(pairs) if a != b), min(len(blocks(workload, i)), len(blocks(workload, j)))
    )


@pytest.fixture
def three() -> Workload:
    """Blocks of 4 tokens: request 1 repeats request 0's first block, request 2 is too short for a block."""
    return Workload.from_arrays(
        "three",
        arrival_s=[0.0, 1.0, 4.0],
        prompt_tokens=[9, 12, 3],
        output_tokens=[10, 20, 30],
        predicted_output_tokens=[11.0, 19.0, 33.0],
        hash_offsets=[0, 2, 5, 5],
        hash_ids=[0, 1, 0, 2, 3],
        hash_block_tokens=4,
        source="by hand",
    )


@st.composite
def workloads(draw: st.DrawFn, min_size: int = 1) -> Workload:
    """Requests that extend the prompt of an earlier one, in blocks of 8 tokens."""
    n = draw(st.integers(min_size, 25))
    gaps = draw(st.lists(st.floats(0, 100), min_size=n, max_size=n))
    rows: list[list[int]] = []
    prompts: list[int] = []
    next_id = 0
    for i in range(n):
        kept = rows[draw(st.integers(0, i - 1))] if i and draw(st.booleans()) else []
        row = list(kept[: draw(st.integers(0, len(kept)))])
        new = draw(st.integers(0, 3))
        row += range(next_id, next_id + new)
        next_id += new
        rows.append(row)
        prompts.append(len(row) * 8 + draw(st.integers(1, 7)))
    return Workload.from_arrays(
        "drawn",
        np.cumsum(gaps) - gaps[0],
        prompts,
        draw(st.lists(st.integers(1, 2000), min_size=n, max_size=n)),
        hash_offsets=np.cumsum([0, *map(len, rows)]),
        hash_ids=dense_ids(np.array([h for row in rows for h in row], np.int64)),
        hash_block_tokens=8,
    )


# --- Construction ----------------------------------------------------------------------------------------------------


def test_from_arrays_fills_defaults():
    w = Workload.from_arrays("w", [0, 1.5], [3, 4], [5, 6])
    assert len(w) == 2 and w.validate() is w
    assert w.arrival_s.dtype == np.float64 and w.prompt_tokens.dtype == np.int64 and w.slo_class.dtype == np.int32
    assert w.hash_offsets.tolist() == [0, 0, 0] and w.hash_block_tokens == 0 and not w.has_true_lengths
    assert w.prefix_hit_share() == 0


def test_from_arrays_copies_and_freezes():
    given_arrivals = np.array([0.0, 1.0])
    w = Workload.from_arrays("w", given_arrivals, [3, 4], [5, 6])
    given_arrivals[1] = 7
    assert w.arrival_s[1] == 1
    for field in fields(w):
        if isinstance(values := getattr(w, field.name), np.ndarray):
            with pytest.raises(ValueError, match="read-only"):
                values[:1] = 0


BROKEN = {
    "no requests": (dict(arrival_s=[], prompt_tokens=[], output_tokens=[]), "holds no requests"),
    "sizes": (dict(prompt_tokens=[1]), "2 entries in arrival_s but 1 in prompt_tokens"),
    "not sorted": (dict(arrival_s=[1.0, 0.5]), r"arrival_s\[1\] = 0.5"),
    "negative time": (dict(arrival_s=[-1.0, 0.5]), r"arrival_s\[0\] = -1.0"),
    "nan time": (dict(arrival_s=[0.0, np.nan]), r"arrival_s\[1\] = nan"),
    "zero prompt": (dict(prompt_tokens=[4, 0]), r"prompt_tokens\[1\] = 0"),
    "negative output": (dict(output_tokens=[-4, 2]), r"output_tokens\[0\] = -4"),
    "huge output": (dict(output_tokens=[4, 2**40]), r"output_tokens\[1\] = 1099511627776"),
    "half a token": (dict(output_tokens=[4, 2.5]), r"output_tokens\[1\] = 2.5"),
    "nan length": (dict(output_tokens=[4, np.nan]), r"output_tokens\[1\] = nan"),
    "words": (dict(prompt_tokens=["a", "b"]), "prompt_tokens is no list of integers"),
    "table": (dict(prompt_tokens=[[1, 2], [3, 4]]), "prompt_tokens is no list of integers"),
    "ragged": (dict(prompt_tokens=[[1, 2], 3]), "prompt_tokens is no list of integers"),
    "class": (dict(slo_class=[0, -1]), r"slo_class\[1\] = -1"),
    "class overflows": (dict(slo_class=[0, 2**31]), r"slo_class\[1\] = 2147483648"),
    "prediction": (dict(predicted_output_tokens=[1.0, 0.0]), r"predicted_output_tokens\[1\] = 0"),
    "offsets": (dict(hash_offsets=[0, 1]), "2 hash_offsets for 2 requests"),
    "ids without block": (dict(hash_offsets=[0, 1, 1], hash_ids=[0]), "hash_block_tokens 0"),
    "block size": (dict(hash_block_tokens=-4), "hash_block_tokens -4"),
    "too many blocks": (
        dict(hash_offsets=[0, 2, 2], hash_ids=[0, 1], hash_block_tokens=4),
        r"prompt_tokens\[0\] = 4",
    ),
    "gap in ids": (dict(hash_offsets=[0, 1, 2], hash_ids=[0, 2], hash_block_tokens=4), "not dense"),
    "no prefix": (
        dict(prompt_tokens=[8, 8], hash_offsets=[0, 2, 4], hash_ids=[0, 1, 1, 0], hash_block_tokens=4),
        "in request 1, a hash id that follows another block",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_arrays_are_refused(case):
    changes, message = BROKEN[case]
    arrays = dict(arrival_s=[0.0, 1.0], prompt_tokens=[4, 4], output_tokens=[2, 2])
    with pytest.raises(InputError, match=message):
        Workload.from_arrays("w", **(arrays | changes))


def test_first_broken_prefix():
    offsets = np.array([0, 2, 2, 4, 5])
    assert first_broken_prefix(offsets, np.array([0, 1, 0, 1, 0])) is None
    assert first_broken_prefix(offsets, np.array([0, 1, 0, 2, 1])) == 3  # 1 followed 0, now it starts a prompt
    assert first_broken_prefix(offsets, np.array([0, 0, 0, 1, 0])) == 0  # 0 starts a prompt and follows itself
    assert first_broken_prefix(np.array([0, 0]), np.array([], np.int64)) is None


# --- Transformations -------------------------------------------------------------------------------------------------


def test_window_by_hand(three):
    w = three.window(1, 3).validate()
    assert w.arrival_s.tolist() == [0.0, 3.0]
    assert w.prompt_tokens.tolist() == [12, 3]
    assert w.predicted_output_tokens.tolist() == [19.0, 33.0]
    assert w.hash_offsets.tolist() == [0, 3, 3] and w.hash_ids.tolist() == [0, 1, 2]
    assert w.source == "by hand; requests 1:3"


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 1), (0, 4), (-1, 2), (3, None)])
def test_window_outside(three, start, stop):
    with pytest.raises(InputError, match="has 3 requests"):
        three.window(start, stop)


def test_split_by_time_by_hand(three):
    first, second = three.split_by_time(0.25)  # requests before 1.0 s
    assert (len(first), len(second)) == (1, 2) and second.arrival_s.tolist() == [0.0, 3.0]
    first, second = three.split_by_time(0.99)
    assert (len(first), len(second)) == (2, 1)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_split_outside(three, fraction):
    with pytest.raises(InputError, match="fraction"):
        three.split_by_time(fraction)


def test_rates_by_hand(three):
    assert three.at_rate(1.5).arrival_s.tolist() == [0.0, 0.5, 2.0]  # 3 requests, the last at 2 s
    assert three.scale_time(2).arrival_s.tolist() == [0.0, 2.0, 8.0]


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_bad_factors(three, value):
    for call in (three.at_rate, three.scale_time, three.scale_lengths):
        with pytest.raises(InputError, match="three"):
            call(value)


def test_a_single_burst_has_no_rate():
    burst = Workload.from_arrays("burst", [0, 0], [1, 1], [1, 1])
    for call in (burst.at_rate, burst.split_by_time):
        with pytest.raises(InputError, match="all at once"):
            call(0.5)


def test_scale_lengths_by_hand(three):
    half = three.scale_lengths(0.5).validate()
    assert half.hash_block_tokens == 2
    assert half.prompt_tokens.tolist() == [4, 6, 1] and half.output_tokens.tolist() == [5, 10, 15]
    assert half.predicted_output_tokens.tolist() == [5.5, 9.5, 16.5]
    assert half.hash_ids.tolist() == three.hash_ids.tolist()
    oracle = three.with_true_lengths().scale_lengths(0.25)
    assert oracle.predicted_output_tokens.tolist() == oracle.output_tokens.tolist() == [2, 5, 8]
    assert three.scale_lengths(0.25).prompt_tokens.tolist() == [2, 3, 1]


@pytest.mark.parametrize("factor", [0.3, 0.1, 1.1])
def test_scaled_blocks_are_whole(three, factor):
    with pytest.raises(InputError, match=r"hash blocks of 4 tokens.*no whole number.*k/4"):
        three.scale_lengths(factor)


def test_scale_lengths_without_hashes_rounds():
    w = Workload.from_arrays("w", [0, 1], [10, 1], [1, 1]).scale_lengths(0.37)
    assert w.prompt_tokens.tolist() == [4, 1] and w.output_tokens.tolist() == [1, 1]
    with pytest.raises(InputError, match="prompt_tokens"):
        Workload.from_arrays("w", [0], [10**8], [1]).scale_lengths(1000)


def test_scale_outputs_by_hand(three):
    half = three.scale_outputs(0.04).validate()
    assert half.output_tokens.tolist() == [1, 1, 1] and half.prompt_tokens.tolist() == three.prompt_tokens.tolist()
    longer = three.scale_outputs(1.5).validate()
    assert longer.output_tokens.tolist() == longer.predicted_output_tokens.tolist() == [15, 30, 45]
    assert "outputs x 1.5" in longer.source
    with pytest.raises(InputError, match="scaled by 0"):
        three.scale_outputs(0)


def test_block_tokens_by_hand(three):
    w = three.with_block_tokens(2).validate()
    assert w.hash_block_tokens == 2
    assert w.hash_offsets.tolist() == [0, 4, 10, 10]
    assert w.hash_ids.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    assert three.with_block_tokens(4) is three
    plain = Workload.from_arrays("plain", [0], [10], [1])
    assert plain.with_block_tokens(16) is plain


def test_block_tokens_must_divide(three):
    with pytest.raises(InputError, match=r"blocks of 4 tokens.*engine's 3.*block_tokens"):
        three.with_block_tokens(3)
    with pytest.raises(InputError, match="engine's 8"):
        three.with_block_tokens(8)
    with pytest.raises(InputError, match="blocks of 0 tokens"):
        three.with_block_tokens(0)


def test_prefix_hit_share_by_hand(three):
    assert three.prefix_hit_share() == 4 / 24  # one block of 4 tokens, of 9 + 12 + 3


@given(workloads(), st.data())
@settings(max_examples=60, deadline=None)
def test_windows_preserve_requests(w, data):
    start = data.draw(st.integers(0, len(w) - 1))
    stop = data.draw(st.integers(start + 1, len(w)))
    part = w.window(start, stop).validate()
    assert part.arrival_s[0] == 0
    for name in ("prompt_tokens", "output_tokens", "predicted_output_tokens", "client", "priority", "slo_class"):
        assert np.array_equal(getattr(part, name), getattr(w, name)[start:stop])
    for i in range(len(part)):
        assert len(blocks(part, i)) == len(blocks(w, start + i))
        assert shared_blocks(part, 0, i) == shared_blocks(w, start, start + i)


@given(workloads(min_size=2), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_splits_cover_the_workload(w, fraction):
    if w.arrival_s[-1] == 0:
        return
    first, second = w.split_by_time(fraction)
    for name in ("prompt_tokens", "output_tokens", "predicted_output_tokens"):
        assert np.array_equal(np.concatenate((getattr(first, name), getattr(second, name))), getattr(w, name))
    assert len(first) and len(second) and second.arrival_s[0] == 0


@given(workloads(), st.sampled_from([0.125, 0.25, 0.5, 0.75, 1, 2, 3.125]))
@settings(max_examples=60, deadline=None)
def test_scaling_lengths_keeps_prefixes(w, factor):
    scaled = w.scale_lengths(factor).validate()
    assert scaled.prefix_hit_share() == pytest.approx(w.prefix_hit_share(), abs=0.2)
    assert (scaled.prompt_tokens >= 1).all() and (scaled.output_tokens >= 1).all()
    for i in range(len(w)):
        shared = shared_blocks(scaled, 0, i)
        assert shared == shared_blocks(w, 0, i)
        assert shared * scaled.hash_block_tokens <= scaled.prompt_tokens[i]


@given(workloads(), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=60, deadline=None)
def test_smaller_blocks_cover_the_same_tokens(w, block_tokens):
    fine = w.with_block_tokens(block_tokens).validate()
    assert fine.prefix_hit_share() == pytest.approx(w.prefix_hit_share())
    for i in range(len(w)):
        assert shared_blocks(fine, 0, i) * block_tokens == shared_blocks(w, 0, i) * 8


@given(workloads(min_size=2), st.floats(0.01, 1000))
@settings(max_examples=60, deadline=None)
def test_at_rate(w, rate):
    if w.arrival_s[-1] < 1e-9:
        return
    scaled = w.at_rate(rate).validate()
    assert len(w) / scaled.arrival_s[-1] == pytest.approx(rate)
    assert scaled.at_rate(len(w) / w.arrival_s[-1]).arrival_s == pytest.approx(w.arrival_s)


# --- Predictor and classes -------------------------------------------------------------------------------------------


@given(st.floats(0.2, 0.99), st.integers(0, 2**32), st.sampled_from(["azure_conv", "azure_code", "sharegpt"]))
@settings(max_examples=25, deadline=None)
def test_predictor_reaches_the_correlation(rank_correlation, seed, name):
    w = generate(name, 1000).with_predictor(rank_correlation, seed)
    assert spearman(w.output_tokens, w.predicted_output_tokens) == pytest.approx(rank_correlation, abs=RANK_TOLERANCE)
    assert not w.has_true_lengths
    again = generate(name, 1000).with_predictor(rank_correlation, seed)
    assert np.array_equal(w.predicted_output_tokens, again.predicted_output_tokens)


def test_spearman_agrees_with_scipy():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a = rng.integers(0, 9, 300)
    b = a + rng.integers(0, 30, 300)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert np.isnan(spearman(a, np.ones(300)))


def test_noise_belongs_to_the_request():
    """The same seed gives the same noise, up to sigma, to a request of a longer workload."""
    long, short = (generate("azure_conv", 400).window(0, n).with_predictor(0.7, seed=3) for n in (400, 200))
    noise = [np.log(w.predicted_output_tokens / w.output_tokens)[:200] for w in (long, short)]
    assert np.corrcoef(noise)[0, 1] == pytest.approx(1)
    other = generate("azure_conv", 400).with_predictor(0.7, seed=4)
    assert not np.allclose(other.predicted_output_tokens, long.predicted_output_tokens)


def test_predictions_survive_a_split():
    w = generate("azure_conv", 300)
    first, second = w.split_by_time(0.4)
    assert np.array_equal(
        np.concatenate((first.predicted_output_tokens, second.predicted_output_tokens)), w.predicted_output_tokens
    )


def test_true_lengths_are_declared(three):
    for w in (three.with_true_lengths(), three.with_predictor(1.0)):
        assert w.has_true_lengths and w.predicted_output_tokens.tolist() == [10, 20, 30]
        assert w.source == "by hand; length predictor: true lengths"
        assert w.window(0, 2).has_true_lengths
        again = w.with_predictor(0.5, seed=2)  # three requests can reach it: ranks 1 3 2
        assert not again.has_true_lengths
        assert again.source == "by hand; length predictor: rank correlation 0.5, seed 2"


@pytest.mark.parametrize("rank_correlation", [0, -0.5, 1.01, float("nan")])
def test_predictor_outside(three, rank_correlation):
    with pytest.raises(InputError, match="rank correlation"):
        three.with_predictor(rank_correlation)


def test_constant_lengths_have_nothing_to_rank():
    w = Workload.from_arrays("w", [0, 1, 2], [1, 2, 3], [7, 7, 7])
    assert w.predicted_output_tokens.tolist() == [7, 7, 7] and not w.has_true_lengths
    assert w.source == "length predictor: rank correlation 0.8 (reached nan), seed 0"


def test_a_correlation_out_of_reach_is_stated():
    w = Workload.from_arrays("w", [0, 1], [1, 2], [7, 9]).with_predictor(0.2, seed=0)
    assert "rank correlation 0.2 (reached " in w.source


def test_classes_follow_their_shares():
    w = generate("azure_conv", 5000)
    mixed = w.with_classes((SloClass(share=3.0), SloClass(share=1.0)), seed=5)
    assert mixed.slo_class.dtype == np.int32
    assert np.mean(mixed.slo_class == 0) == pytest.approx(0.75, abs=0.03)
    assert np.array_equal(mixed.slo_class, w.with_classes((SloClass(share=3.0), SloClass(share=1.0)), seed=5).slo_class)
    assert not np.array_equal(mixed.slo_class, w.with_classes((SloClass(share=3.0), SloClass()), seed=6).slo_class)
    assert w.with_classes((SloClass(),)).slo_class.max() == 0
    with pytest.raises(InputError, match="no SLO classes"):
        w.with_classes(())


# --- Generators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_generated_percentiles_are_the_published_ones(name):
    w, known = generate(name, 20_000, seed=1).validate(), PUBLISHED[name]
    for lengths, published in ((w.prompt_tokens, known.prompt_tokens), (w.output_tokens, known.output_tokens)):
        for percentile in (50, 90, 99):
            expected = published[PERCENTILES.index(percentile)]
            assert np.percentile(lengths, percentile) == pytest.approx(expected, rel=0.03)
        assert lengths.min() >= published[0] and lengths.max() <= published[-1]
    assert len(w) / w.arrival_s[-1] == pytest.approx(known.requests_per_s)
    gaps = np.diff(w.arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(known.arrival_cv, rel=0.15)
    assert spearman(w.prompt_tokens, w.output_tokens) == pytest.approx(known.length_correlation, abs=0.03)
    assert spearman(w.output_tokens, w.predicted_output_tokens) == pytest.approx(DEFAULT_RANK_CORRELATION, abs=0.005)


@pytest.mark.parametrize("name", [*PUBLISHED, "vllm_rtx4090", "vllm_rtxpro6000", "synthetic"])
@pytest.mark.parametrize("num_requests", [1, 2, 100])
def test_any_size_is_valid_and_repeatable(name, num_requests):
    first, again, other = (generate(name, num_requests, seed) for seed in (7, 7, 8))
    assert len(first.validate()) == num_requests and first.name == name
    for field in fields(first):
        if isinstance(getattr(first, field.name), np.ndarray):
            assert np.array_equal(getattr(first, field.name), getattr(again, field.name))
    if num_requests == 100:
        assert not np.array_equal(first.arrival_s, other.arrival_s)
    assert first.source.startswith("generated: ")


def test_default_size_is_the_published_one():
    assert len(generate("azure_code")) == PUBLISHED["azure_code"].num_requests


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 4.0])
def test_gamma_arrivals(cv):
    w = generate("azure_conv", 40_000, seed=2, requests_per_s=8.0, arrival_cv=cv)
    gaps = np.diff(w.arrival_s)
    assert len(w) / w.arrival_s[-1] == pytest.approx(8.0)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1, abs=1e-9)


def dispersion(arrival_s: np.ndarray, window_s: float) -> float:
    """Variance over mean of the number of arrivals in windows."""
    counts = np.histogram(arrival_s, np.arange(0, arrival_s[-1], window_s))[0]
    return counts.var() / counts.mean()


def test_bursts_of_the_code_trace():
    """Measured on the trace: variance over mean 13 at 1 s, 72 at 10 s, 164 at 60 s; 73% of seconds without arrivals."""
    w = generate("azure_code", seed=3)
    for window_s, measured in ((1, 13.2), (10, 71.6), (60, 164.0)):
        assert measured / 2 < dispersion(w.arrival_s, window_s) < measured * 2
    counts = np.histogram(w.arrival_s, np.arange(0, w.arrival_s[-1], 1.0))[0]
    assert np.mean(counts == 0) == pytest.approx(0.734, abs=0.05)
    gamma = generate("azure_code", seed=3, arrival_cv=13.15)
    assert dispersion(gamma.arrival_s, 1) > 2 * 13.2


@pytest.mark.parametrize("seed", range(3))
def test_sessions_share_prefixes(seed):
    w = generate("mooncake_synthetic", seed=seed)
    assert w.hash_block_tokens == 512
    assert w.prefix_hit_share() == pytest.approx(0.65, abs=0.04)
    more = generate("mooncake_synthetic", seed=seed, prefixes=Prefixes(turns=8))
    assert more.prefix_hit_share() > w.prefix_hit_share() + 0.1
    none = generate("mooncake_synthetic", seed=seed, prefixes=Prefixes(turns=1, system_tokens=0))
    assert none.prefix_hit_share() == 0


def test_system_prompts_are_shared_between_sessions():
    w = generate(
        "azure_conv",
        500,
        prefixes=Prefixes(block_tokens=16, turns=1, system_prompts=2, system_tokens=160),
    ).validate()
    firsts = {blocks(w, i)[0] for i in range(len(w)) if blocks(w, i)}
    assert len(firsts) == 2
    assert max(shared_blocks(w, 0, i) for i in range(1, len(w))) == 10  # 160 tokens, and no block beyond


BAD_GENERATORS = {
    "unknown": (dict(name="azure_chat"), "no statistics are known of 'azure_chat'.*azure_conv"),
    "no requests": (dict(num_requests=0), "num_requests is 0"),
    "rate": (dict(requests_per_s=0.0), "requests_per_s is 0.0"),
    "nan rate": (dict(requests_per_s=float("nan")), "requests_per_s is nan"),
    "cv": (dict(arrival_cv=-1.0), "arrival_cv is -1.0"),
    "bursts of low cv": (dict(arrival_cv=1.0, bursts=Bursts()), "cannot have arrival_cv 1.0.*CV above"),
}


@pytest.mark.parametrize("case", BAD_GENERATORS)
def test_bad_generator_arguments(case):
    arguments, message = BAD_GENERATORS[case]
    with pytest.raises(InputError, match=message):
        generate(**({"name": "azure_conv", "num_requests": 10} | arguments))


@pytest.mark.parametrize("changes", [dict(turns=0.5), dict(branch=1.5), dict(block_tokens=0), dict(think_s=0.0)])
def test_bad_prefixes(changes):
    with pytest.raises(InputError, match="describes no sessions"):
        replace(Prefixes(), **changes)


def test_bad_bursts():
    with pytest.raises(InputError, match="describes no bursts"):
        Bursts(speedup=0.5)
