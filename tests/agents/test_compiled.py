"""The compiled kernel is the torch network."""

import numpy as np
import pytest
import torch
from numba import njit

from schedlab.agents.compiled import deepsets_choose, deepsets_logits, pack_weights, with_own_scratch
from schedlab.agents.export import random_observations
from schedlab.agents.networks import MASKED_LOGIT, PointerNetwork


def network(context_size=5, candidate_size=7, hidden=16, normalise=False, seed=0, late_context=()):
    torch.manual_seed(seed)
    net = PointerNetwork(context_size, candidate_size, hidden=hidden, late_context=late_context)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if normalise:
            sample = torch.randn(100, context_size) + 1.0, 2.0 * torch.randn(100, 4, candidate_size)
            net.normalizer.fit(*sample, torch.ones(100, 4, dtype=torch.bool))
    return net


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("hidden", [3, 16, 64])  # 3: no vector and no pair of rows is full
@pytest.mark.parametrize("num_candidates", [1, 2, 13])
def test_equals_torch(hidden, num_candidates, normalise):
    net = network(hidden=hidden, normalise=normalise)
    weights = pack_weights(net, 20)
    obs = random_observations(net, 50, num_candidates)
    with torch.no_grad():
        logits, values = net(*(torch.as_tensor(obs[k]) for k in ("context", "candidates", "action_mask")))
    out = np.empty(num_candidates, np.float32)
    for i in range(50):
        args = weights, obs["context"][i], obs["candidates"][i], obs["action_mask"][i], out
        value = deepsets_logits(*args)
        np.testing.assert_allclose(out, logits[i], rtol=1e-4, atol=1e-4)
        assert value == pytest.approx(values[i].item(), rel=1e-4, abs=1e-4)
        assert deepsets_choose(*args) == logits[i].argmax()


def test_dead_rows_are_not_read():
    net = network()
    weights = pack_weights(net)
    obs = random_observations(net, 1, 9)
    context, candidates, mask = obs["context"][0], obs["candidates"][0], obs["action_mask"][0]
    clean, dirty = np.empty(9, np.float32), np.empty(9, np.float32)
    deepsets_logits(weights, context, candidates, mask, clean)
    candidates[~mask] = np.nan
    deepsets_logits(weights, context, candidates, mask, dirty)
    np.testing.assert_array_equal(clean, dirty)
    assert (clean[~mask] == np.float32(MASKED_LOGIT)).all()
    assert deepsets_choose(weights, context, candidates, np.zeros(9, bool), clean) == -1


@pytest.mark.parametrize("late_context", [(), (1, 4)])
def test_what_is_remembered_is_what_would_be_computed(late_context):
    """From call to call a context column, some rows and the mask change, as from pick to pick."""
    net, rng = network(normalise=True, late_context=late_context), np.random.default_rng(0)
    weights = pack_weights(net, 11)
    context, candidates = rng.normal(size=5).astype(np.float32), rng.normal(size=(11, 7)).astype(np.float32)
    out = np.empty(11, np.float32)
    for step in range(60):
        context[4 if step % 3 else 2] += np.float32(0.5)
        candidates[rng.integers(11)] = rng.normal(size=7)
        mask = rng.random(11) < 0.7
        mask[rng.integers(11)] = True
        value = deepsets_logits(weights, context, candidates, mask, out)
        with torch.no_grad():
            logits, values = net(*(torch.as_tensor(part[None]) for part in (context, candidates, mask)))
        np.testing.assert_allclose(out, logits[0], rtol=1e-4, atol=1e-4)
        assert value == pytest.approx(values[0].item(), rel=1e-4, abs=1e-4)


def test_rows_that_stay_are_computed_once():
    """Only the late columns change: two passes after the first compute the one row that is new."""
    net = network(late_context=(1, 4))
    weights, rng = pack_weights(net, 6), np.random.default_rng(0)
    context, candidates = rng.normal(size=5).astype(np.float32), rng.normal(size=(6, 7)).astype(np.float32)
    mask, out = np.ones(6, bool), np.empty(6, np.float32)
    deepsets_choose(weights, context, candidates, mask, out)
    weights.keys[:6] = np.nan  # whoever reads them again gives NaN, but for the one row that is computed anew
    context[4] += 1.0
    candidates[2] += 1.0
    deepsets_choose(weights, context, candidates, mask, out)
    np.testing.assert_array_equal(np.isnan(weights.keys[:6, 0]), np.arange(6) != 2)
    context[2] += 1.0
    deepsets_choose(weights, context, candidates, mask, out)
    assert np.isfinite(weights.keys[:6]).all()


def test_nothing_of_a_nan_stays():
    net = network()
    weights, rng = pack_weights(net, 6), np.random.default_rng(0)
    context, candidates = rng.normal(size=5).astype(np.float32), rng.normal(size=(6, 7)).astype(np.float32)
    mask, clean, again = np.ones(6, bool), np.empty(6, np.float32), np.empty(6, np.float32)
    deepsets_logits(weights, context, candidates, mask, clean)
    spoilt, spoilt_context = candidates.copy(), context.copy()
    spoilt[3, 2] = np.nan
    spoilt_context[0] = np.nan
    for arguments in ((context, spoilt), (spoilt_context, candidates), (context, spoilt)):
        deepsets_logits(weights, *arguments, mask, again)
    deepsets_logits(weights, context, candidates, mask, again)
    np.testing.assert_array_equal(clean, again)


def test_runs_inside_compiled_code():
    @njit
    def choose_all(weights, context, candidates, mask, logits, chosen):
        for i in range(len(chosen)):
            chosen[i] = deepsets_choose(weights, context[i], candidates[i], mask[i], logits)

    net = network()
    obs = random_observations(net, 20, 8)
    chosen = np.empty(20, np.int64)
    weights = with_own_scratch(pack_weights(net, 8))
    choose_all(weights, obs["context"], obs["candidates"], obs["action_mask"], np.empty(8, np.float32), chosen)
    assert obs["action_mask"][np.arange(20), chosen].all()


def test_limits_are_told():
    net = network()
    obs = random_observations(net, 1, 9)
    with pytest.raises(ValueError, match="max_candidates"):
        deepsets_logits(
            pack_weights(net, 4),
            obs["context"][0],
            obs["candidates"][0],
            obs["action_mask"][0],
            np.empty(9, np.float32),
        )
    with pytest.raises(ValueError, match="'attention' has no compiled kernel"):
        pack_weights(PointerNetwork(5, 7, "attention", 16))
