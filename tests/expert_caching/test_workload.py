"""Routing: the file format and what it refuses, splits by sequence, batches, generated routing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from routing import random_routing

from schedlab.envs.core.errors import InputError
from schedlab.envs.expert_caching.affinity import Affinity
from schedlab.envs.expert_caching.spec import CostModel, ExpertCachingSpec
from schedlab.envs.expert_caching.workload import (
    Workload,
    find_routing,
    generate,
    interleave,
    load_routing,
    save_routing,
)

GOOD = np.array([[[0, 1], [2, 3]], [[1, 2], [0, 3]], [[3, 0], [1, 2]]])


def test_a_file_comes_back_as_it_was(tmp_path):
    workload = generate(5, seed=2)
    workload = workload.with_prior(workload.popularity())
    save_routing(tmp_path / "trace.npz", workload)
    read = load_routing(tmp_path / "trace.npz", top_k=workload.top_k)
    for name in ("experts", "sequence_offsets", "predicted", "token_ids", "num_experts", "source"):
        assert np.array_equal(getattr(read, name), getattr(workload, name)), name
    assert np.allclose(read.predicted_probability, workload.predicted_probability, atol=1e-3)
    assert np.allclose(read.prior, workload.prior)
    assert list(tmp_path.iterdir()) == [tmp_path / "trace.npz"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"experts": np.where(GOOD == 3, 4, GOOD)}, r"token 0 \(sequence 0\), layer 1 is 4, outside 0..3"),
        ({"experts": GOOD - 1}, r"is -1, outside 0..3"),
        ({"experts": GOOD[:, :, :1], "top_k": 2}, "1 experts a token, the model declares top 2"),
        ({"experts": np.where(GOOD == 1, 0, GOOD)}, r"token 0 .* \[0, 0\] names an expert twice"),
        ({"experts": [[[0, 1], [2]], [[1, 2], [0, 3]]]}, "is ragged"),
        ({"experts": GOOD[:, 0]}, "has shape"),
        ({"experts": GOOD.astype(float)}, "dtype float64"),
        ({"experts": GOOD[:0], "lengths": []}, "at least one token"),
        ({"lengths": [2, 2]}, "seq_len sums to 4, experts has 3 tokens"),
        ({"lengths": [3, 0]}, r"seq_len\[1\] is 0"),
        ({"num_experts": 1}, "num_experts 1 with top 2"),
        ({"predicted": GOOD, "predicted_probability": np.where(GOOD == 2, np.nan, 0.5)}, r"\[0, 1, 0\] is nan"),
        ({"predicted": GOOD, "predicted_probability": GOOD * 0.5}, "is 1.5"),
        ({"predicted": GOOD + 1}, "outside -1..3"),
        ({"predicted": GOOD[:2]}, "predicted has shape"),
        ({"token_ids": [1, 2]}, "2 entries for 3 tokens"),
        ({"prior": np.ones((2, 3))}, "prior has shape"),
        ({"prior": np.full((2, 4), np.nan)}, "is nan"),
    ],
)
def test_bad_routing_is_refused(changes, told):
    arguments = {"experts": GOOD, "lengths": [2, 1], "num_experts": 4, **changes}
    with pytest.raises(InputError, match=told) as caught:
        Workload.from_arrays("bad", **arguments)
    assert caught.value.remedy


def test_bad_files_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_routing(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("layer,expert")
    np.savez(tmp_path / "other.npz", tokens=GOOD)
    np.savez(tmp_path / "objects.npz", experts=np.array([[1], [2, 3]], object), seq_len=[2])
    np.savez(tmp_path / "long.npz", experts=GOOD, seq_len=[7])
    np.save(tmp_path / "single.npy", GOOD)
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    for name, told in (
        ("text", "not a routing trace"),
        ("other", "no array 'experts'"),
        ("objects", "not a routing trace"),
        ("long", "sums to 7"),
        ("single", "one array"),
    ):
        with pytest.raises(InputError, match=told) as caught:
            load_routing(tmp_path / f"{name}.npz")
        assert str(caught.value).startswith(str(tmp_path / f"{name}.npz"))


def test_routing_is_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "expert_routing").mkdir()
    save_routing(tmp_path / "expert_routing" / "mine.npz", generate(2))
    monkeypatch.setenv("SCHEDLAB_DATA", str(tmp_path))
    assert len(find_routing("mine")) == 2
    assert find_routing("synthetic").num_experts == 32
    with pytest.raises(InputError, match="no routing trace 'yours'"):
        find_routing("yours")


def test_splits_are_by_sequence():
    workload = generate(20, seed=1)
    parts = workload.split(0.5, 0.25, 0.25, seed=3)
    assert [len(part) for part in parts] == [10, 5, 5]
    tokens = {workload.experts[a:b].tobytes() for a, b in pairwise(workload.sequence_offsets)}
    seen = [part.experts[a:b].tobytes() for part in parts for a, b in pairwise(part.sequence_offsets)]
    assert set(seen) == tokens
    assert len(seen) == 20
    assert np.array_equal(parts[2].prior, parts[0].popularity())
    for shares in ((), (0.7, 0.7), (-0.1,), (0.001, 0.9)):
        with pytest.raises(InputError):
            workload.split(*shares)


def test_head_cuts_the_last_sequence():
    workload = random_routing(np.random.default_rng(0), layers=1, experts=4, k=1, lengths=[3, 4, 5])
    assert workload.head(5).lengths.tolist() == [3, 2]
    assert workload.head(3).lengths.tolist() == [3]
    assert workload.head(99).lengths.tolist() == [3, 4, 5]


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_every_token_is_served_once_and_in_order(rows):
    lengths = np.array([4, 1, 6, 2, 2, 9, 1])
    batches = interleave(lengths, rows)
    served = batches[batches >= 0]
    assert sorted(served) == list(range(25))
    step_of = np.empty(25, int)
    step_of[served] = np.nonzero(batches >= 0)[0]
    ends = np.cumsum(lengths)
    for begin, end in zip(ends - lengths, ends, strict=True):
        assert (np.diff(step_of[begin:end]) == 1).all()


def test_affinity_counts_what_follows():
    workload = Workload.from_arrays("hand", [[[0], [1]], [[0], [2]], [[1], [2]]], [2, 1], num_experts=3)
    affinity = Affinity.fit(workload)
    assert affinity.next_layer[0].tolist() == [
        [0, 0.5, 0.5],
        [0, 0, 1],
        [0, pytest.approx(1 / 3), pytest.approx(2 / 3)],
    ]
    assert affinity.next_layer[1, 1].tolist() == [1, 0, 0]  # layer 1 of token 0, then layer 0 of token 1
    assert affinity.same_layer[0, 0].tolist() == [1, 0, 0]


def test_generated_routing_has_locality():
    """The next token uses an expert of this one far more often than chance, and predictions are mostly right."""
    workload = generate(16, seed=0)
    inside = workload.token_position[1:] > 0
    again = (workload.experts[1:, :, :, None] == workload.experts[:-1, :, None, :]).any(3)[inside].mean()
    assert again > 2 * workload.top_k / workload.num_experts
    hit = (workload.experts[:, 1:, :, None] == workload.predicted[:, 1:, None, :]).any(3).mean()
    assert hit > 0.9
    assert (workload.predicted[:, 0] == -1).all()
    with pytest.raises(InputError, match="num_experts is 2"):
        generate(num_experts=2, top_k=4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cache_share": 0.05}, "a cache of 2 slots is smaller than the 4 experts"),
        ({"cache_share": 0.25, "num_sequences": 4}, "8 slots is smaller than the 16 experts"),
        ({"memory_bytes": 100e6}, "32 slots of 17301504 bytes exceed memory_bytes 100000000"),
        ({"layer_slots": (8, 8)}, "gives 2 layers, the model has 4"),
        ({"layer_slots": (8, 8, 8, 40)}, "40 slots for the 32 experts"),
        ({"prefetch_depth": 4}, "reaches round the 4 layers"),
    ],
)
def test_impossible_configurations_are_refused(changes, told):
    with pytest.raises(InputError, match=told):
        ExpertCachingSpec(**changes).slots_of(4, 32, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_share": 0.0},
        {"cache_share": 1.5},
        {"num_sequences": 0},
        {"max_prefetch": -1},
        {"layer_slots": (-1,)},
        {"eviction_only": True, "max_prefetch": 1},
        {"num_candidates": 1},
    ],
)
def test_bad_specs_are_refused(changes):
    with pytest.raises(InputError):
        ExpertCachingSpec(**changes)


def test_a_spec_comes_back_as_it_was(tmp_path):
    spec = ExpertCachingSpec(layer_slots=(4, 5), bypass=True)
    assert ExpertCachingSpec.from_dict(spec.to_dict()) == spec
    (tmp_path / "cost.json").write_text('{"name": "x", "attention_s": -1}')
    with pytest.raises(InputError, match="not a cost model"):
        CostModel.load(tmp_path / "cost.json")
    with pytest.raises(InputError, match="non-negative seconds"):
        CostModel("x", attention_s=-1.0, expert_s=1.0, expert_bytes=1, bandwidth=1.0)
