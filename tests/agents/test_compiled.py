"""The compiled kernel is the torch network."""

import numpy as np
import pytest
import torch
from numba import njit

from schedlab.agents.compiled import deepsets_choose, deepsets_logits, pack_weights, with_own_scratch
from schedlab.agents.export import random_observations
from schedlab.agents.networks import MASKED_LOGIT, PointerNetwork


def network(context_size=5, candidate_size=7, hidden=16, normalise=False, seed=0):
    torch.manual_seed(seed)
    net = PointerNetwork(context_size, candidate_size, hidden=hidden)
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
