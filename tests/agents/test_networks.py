"""Pointer networks: equivariance, any K, masks, and the hand-written gradient."""

import copy

import numpy as np
import pytest
import torch

from schedlab.agents.fused import Rows
from schedlab.agents.networks import ENCODERS, MASKED_LOGIT, PointerNetwork

C, F = 4, 5


def batch(num_sets=7, num_candidates=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_sets, num_candidates, generator=generator) < 0.6
    mask[:, 2] = True
    context = torch.randn(num_sets, C, generator=generator)
    candidates = torch.randn(num_sets, num_candidates, F, generator=generator) * mask.unsqueeze(-1)
    return context, candidates, mask


def network(encoder="deepsets", hidden=16, seed=0):
    torch.manual_seed(seed)
    net = PointerNetwork(C, F, encoder, hidden)
    with torch.no_grad():
        for parameter in net.parameters():  # biases too, which start at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("encoder", ENCODERS)
def test_permuting_candidates_permutes_logits(encoder):
    net, (context, candidates, mask) = network(encoder), batch()
    order = torch.randperm(mask.shape[1])
    logits, values = net(context, candidates, mask)
    permuted, same_values = net(context, candidates[:, order], mask[:, order])
    torch.testing.assert_close(permuted, logits[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same_values, values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_dead_rows_do_not_matter(encoder):
    net, (context, candidates, mask) = network(encoder), batch()
    logits, values = net(context, candidates, mask)
    padded_candidates = torch.cat([candidates, torch.zeros(7, 11, F)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(7, 11, dtype=torch.bool)], dim=1)
    padded_candidates[~padded_mask] = 123.0  # whatever stands there
    padded, same_values = net(context, padded_candidates, padded_mask)
    torch.testing.assert_close(padded[:, :9], logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same_values, values, rtol=1e-4, atol=1e-5)
    assert (padded[~padded_mask] == MASKED_LOGIT).all()
    assert (padded[padded_mask].abs() <= 10.0).all()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_scores_depend_on_the_set(encoder):
    """Ranks of two rows may change when a third is there: keys are conditioned on the set."""
    net, (context, candidates, mask) = network(encoder), batch()
    logits, _ = net(context, candidates, mask)
    smaller = mask.clone()
    smaller[:, 3:] = False
    alone, _ = net(context, candidates, smaller)
    both = smaller & mask
    differences = (logits - alone)[both]
    assert differences.abs().max() > 1e-3
    assert differences.std() > 1e-4


def test_first_policy_is_nearly_uniform():
    net, (context, candidates, mask) = PointerNetwork(C, F), batch()
    logits, _ = net(context, candidates, mask)
    assert logits[mask].std() < 1.0


@pytest.mark.parametrize("normalise", [False, True])
def test_rows_equal_padded_with_gradients(normalise):
    plain, (context, candidates, mask) = network(hidden=24), batch(32, 12)
    if normalise:
        plain.normalizer.fit(context, candidates, mask)
    fused = copy.deepcopy(plain)
    weights = torch.randn(32, 12)

    def loss(logits, values):
        return (torch.log_softmax(logits, 1) * weights * mask).sum() + (values**2).sum()

    logits, values = plain(context, candidates, mask)
    fused_logits, fused_values = fused.forward_rows(context, Rows.gather(candidates, mask), 12)
    torch.testing.assert_close(fused_logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused_values, values, rtol=1e-4, atol=1e-5)
    loss(logits, values).backward()
    loss(fused_logits, fused_values).backward()
    for (name, a), b in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        torch.testing.assert_close(b[1].grad, a.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_rows_of_an_empty_set_and_no_rows_at_all():
    net, (context, candidates, mask) = network(), batch()
    for dead in (mask.clone().index_fill_(0, torch.tensor([3]), False), torch.zeros_like(mask)):
        logits, values = net(context, candidates, dead)
        row_logits, row_values = net.forward_rows(context, Rows.gather(candidates, dead), 9)
        torch.testing.assert_close(row_logits, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(row_values, values, rtol=1e-4, atol=1e-5)


def test_backward_of_an_overwritten_forward_is_refused():
    net, (context, candidates, mask) = network(), batch()
    rows = Rows.gather(candidates, mask)
    first, _ = net.forward_rows(context, rows, 9)
    net.forward_rows(context, rows, 9)
    with pytest.raises(RuntimeError, match="ran again before"):
        first.sum().backward()


def test_rows_from_a_larger_store():
    _, candidates, mask = batch()
    positions = torch.tensor([5, 1, 5])
    slots = mask[positions].flatten().nonzero().flatten()
    where = positions[slots // 9] * 9 + slots % 9
    a = Rows.at(candidates.flatten(0, 1), where, slots, mask[positions])
    b = Rows.gather(candidates[positions], mask[positions])
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_normaliser_survives_the_state_dict():
    net, (context, candidates, mask) = network(), batch()
    net.normalizer.fit(context, candidates, mask)
    other = PointerNetwork(C, F, "deepsets", 16)
    other.load_state_dict(net.state_dict())
    assert not other.normalizer.is_identity
    torch.testing.assert_close(other(context, candidates, mask)[0], net(context, candidates, mask)[0])
    scaled = other.normalizer.candidates(candidates)[mask]
    np.testing.assert_allclose(scaled.mean(0).numpy(), 0, atol=1e-5)


def test_unknown_encoder_is_named():
    with pytest.raises(ValueError, match="unknown encoder 'gru'"):
        PointerNetwork(C, F, "gru")
