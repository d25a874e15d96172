"""`EvictionNetwork`: how soon each expert will be needed again, from the routing so far. The torch side: training.

For token t and layer l it sees, strictly causally, the tokens before t whole, and of t the layers 0..l:

    x_t = silu(W norm(sum over layers of emb[layer, experts of t]))         what the whole token was
    h_t = two gated linear recurrences over x (minGRU, Feng et al. 2024)    what the sequence is about
    c_tl = sum over layers <= l of emb[layer, experts of t]                 what is known of the present token
    u_tl = f(c_tl + own[l, experts of t at l] + W' (x, h)_{t-1} + b_l)
    p_e = V_le u_tl + b_le                                                  a few channels for each expert e
    logits_e = MLP(features_e, p_e) + p_e

with the features of `expert_caching_features`. The recurrence is linear in its state, so that training runs it as a
parallel scan; deployment runs one step a token (`expert_caching.py`).

Output i is the log-odds of sum_d discount_i ** (d - 1) P(next use in d tokens): the chance that the expert is needed
again before a clock that stops with probability 1 - discount_i after each token. Counting the first use alone, not
all later ones, is what makes it a score for eviction: what happens after the next use is not at stake now.

`NextLayerHead` reads the same memory for another question: which experts of the layer above will this very token use?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .expert_caching_features import NUM_FEATURES
from .expert_caching_units import run_units

SHARES = (0.125, 0.25, 0.5, 0.75)
"""Cache sizes, as a share of the experts of a layer, for which the outputs are meant, in order."""

DISCOUNTS = (0.6, 0.87, 0.935, 0.96)
"""Discount a token of each output: the larger the cache, the longer an expert stays in it."""


class Recurrence(NamedTuple):
    """What the network carries from token to token, one row a stream."""

    hidden: Tensor  # (S, num_recurrences, D)
    context: Tensor  # (S, D): W' (x, h) of the last token


class GatedRecurrence(nn.Module):
    """h_t = a_t * h_{t-1} + (1 - a_t) * v_t with a_t = sigmoid(W_a x_t + b), v_t = W_v x_t + c (minGRU).

    Shapes:
        x (S, T, D), before (S, D), goes_on (S, T, 1), 0 where a sequence begins -> h (S, T, D)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates = nn.Linear(width, 2 * width)
        with torch.no_grad():  # memories from two tokens to three hundred
            forgets = torch.logspace(math.log10(0.5), math.log10(0.003), width)
            self.gates.bias[:width] = torch.logit(1 - forgets)
            self.gates.weight[:width] *= 0.3

    def forward(self, x: Tensor, before: Tensor, goes_on: Tensor) -> Tensor:
        gate, value = self.gates(x).chunk(2, dim=-1)
        keep = torch.sigmoid(gate)
        value = (1 - keep) * value
        keep = keep * goes_on
        value = torch.cat([value[:, :1] + keep[:, :1] * before.unsqueeze(1), value[:, 1:]], 1)
        return scan(keep, value)


def scan(keep: Tensor, value: Tensor) -> Tensor:
    """h_t = keep_t * h_{t-1} + value_t along dimension 1, h_{-1} = 0, in log2(T) passes (Hillis and Steele 1986)."""
    step, length = 1, keep.shape[1]
    while step < length:
        value = torch.cat([value[:, :step], value[:, step:] + keep[:, step:] * value[:, :-step]], 1)
        keep = torch.cat([keep[:, :step], keep[:, step:] * keep[:, :-step]], 1)
        step *= 2
    return value


class EvictionNetwork(nn.Module):
    """Scores of all experts of some layers for a chunk of tokens (see the head of this file).

    Args:
        num_layers, num_experts: of the model whose routing it learns.
        width: D of the embeddings and the recurrences.
        num_channels: numbers an expert gets from the token's vector, at least one an output.
        hidden: units of the MLP that is run for every expert.
        num_recurrences: recurrences one upon the other.
        dropout: of the token's vector; whole layers of a token are hidden as often.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        width: int = 128,
        num_channels: int = 4,
        hidden: int = 24,
        num_recurrences: int = 2,
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        outputs = len(DISCOUNTS)
        if num_channels < outputs:
            raise ValueError(
                f"{num_channels} channels for {outputs} outputs. Give at least as many channels as outputs"
            )
        self.config: dict[str, Any] = {
            "num_layers": num_layers,
            "num_experts": num_experts,
            "width": width,
            "num_channels": num_channels,
            "hidden": hidden,
            "num_recurrences": num_recurrences,
            "dropout": dropout,
        }
        self.embedding = nn.Parameter(torch.randn(num_layers, num_experts, width) * 0.15)
        self.own = nn.Parameter(torch.randn(num_layers, num_experts, width) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.token = nn.Linear(width, width)
        self.recurrences = nn.ModuleList(GatedRecurrence(width) for _ in range(num_recurrences))
        self.mixers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_recurrences))
        self.from_history = nn.Linear(width * (num_recurrences + 1), width)
        self.prefix_scale = nn.Parameter(torch.linspace(1.5, 0.5, num_layers))
        self.layer_bias = nn.Parameter(torch.zeros(num_layers, width))
        self.middle = nn.Linear(width, width)
        self.channels = nn.Parameter(torch.randn(num_layers, num_channels, width, num_experts) * (0.5 / width**0.5))
        self.channel_bias = nn.Parameter(torch.zeros(num_layers, num_channels, 1, num_experts))
        inputs = NUM_FEATURES + num_channels
        self.unit_in = nn.Parameter(torch.randn(hidden, inputs) / (NUM_FEATURES - 2) ** 0.5)
        self.unit_bias = nn.Parameter(torch.randn(num_layers, hidden) * 0.3)
        out = torch.randn(outputs, inputs + hidden) * 0.05
        out[:, inputs:] *= 2
        out[:, NUM_FEATURES:inputs] += torch.eye(outputs, num_channels)
        self.out = nn.Parameter(out)
        self.out_bias = nn.Parameter(torch.full((num_layers, outputs), -2.0))
        self.dropout = nn.Dropout(dropout)

    def begin(self, num_streams: int) -> Recurrence:
        """The Recurrence of streams that have seen nothing."""
        width = self.config["width"]
        return Recurrence(
            torch.zeros(num_streams, self.config["num_recurrences"], width), torch.zeros(num_streams, width)
        )

    def forward(
        self, used: Tensor, begins: Tensor, before: Recurrence, layers: Sequence[int], features: Tensor
    ) -> tuple[Tensor, Recurrence]:
        """Logits of n layers for T tokens of each of S streams.

        Shapes:
            used float32 (S, T, L, E), 1 where a token uses an expert; begins bool (S, T), True at the first token of a
            sequence; layers: n, increasing; features (n, NUM_FEATURES, S * T * E)
            -> logits (n, outputs, S * T * E), Recurrence after the last token (detached)
        """
        n, index = len(layers), torch.as_tensor(layers)
        used = used.flatten(0, 1)
        if self.training and self.dropout.p > 0:
            used = used * (torch.rand(*used.shape[:2], 1) >= self.dropout.p)
        prefix, context, after = self.remember(used, begins, before, layers)
        own = torch.bmm(used[:, index].transpose(0, 1), self.own[index])
        u = prefix * self.prefix_scale[index, None, None] + own + self.layer_bias[index, None]
        u = self.dropout(F.silu(u + context))
        u = u + self.dropout(F.silu(self.middle(u)))
        return self._score(u, index, features.view(n, NUM_FEATURES, -1)), after

    def remember(
        self, used: Tensor, begins: Tensor, before: Recurrence, layers: Sequence[int]
    ) -> tuple[Tensor, Tensor, Recurrence]:
        """What is known at each token: c_tl of n layers, and W' (x, h)_{t-1}.

        Shapes:
            used (S * T, L, E), begins (S, T) -> prefix (n, S * T, D), context (S * T, D), Recurrence (detached)
        """
        num_streams, length = begins.shape
        goes_on = (~begins).float().unsqueeze(-1)
        prefix, whole = self._embed(used, layers)

        x = F.silu(self.token(self.norm(whole.view(num_streams, length, -1))))
        history, below, last = [x], x, []
        for i, (recurrence, mixer) in enumerate(zip(self.recurrences, self.mixers, strict=True)):
            h = recurrence(below, before.hidden[:, i], goes_on)
            last.append(h[:, -1])
            history.append(h)
            below = F.silu(mixer(h)) + x
        context = self.from_history(torch.cat(history, -1))
        after = Recurrence(torch.stack(last, 1).detach(), context[:, -1].detach())
        context = torch.cat([before.context.unsqueeze(1), context[:, :-1]], 1) * goes_on
        return prefix, context.flatten(0, 1), after

    def _embed(self, used: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Sums of embeddings over layers 0..l for each l of `layers`, (n, N, D), and over all layers, (N, D)."""
        num_experts, table = used.shape[2], self.embedding.flatten(0, 1)
        flat, sums, total, first = used.flatten(1), [], None, 0
        for end in [int(layer) + 1 for layer in layers] + [used.shape[1]]:
            if end > first:
                span = slice(first * num_experts, end * num_experts)
                part = flat[:, span] @ table[span]
                total = part if total is None else total + part
            sums.append(total)
            first = end
        return torch.stack(sums[:-1]), sums[-1]

    def _score(self, u: Tensor, index: Tensor, features: Tensor) -> Tensor:
        """Logits (n, outputs, N * E) from token vectors (n, N, D) and feature tables; each step one batched product."""
        weights, bias = self.channels[index], self.channel_bias[index]
        channels = [torch.baddbmm(bias[:, k], u, weights[:, k]) for k in range(self.config["num_channels"])]
        p = torch.stack(channels, 1).flatten(2)
        return run_units(features, p, self.unit_in, self.unit_bias[index], self.out, self.out_bias[index])


class NextLayerHead(nn.Module):
    """Log-odds that the present token uses each expert of the layer above, from what an `EvictionNetwork` remembers.

        v_tl = f(A c_tl + own[l, experts of t at l] + C W' (x, h)_{t-1} + b_l)
        p_e = V_le v_tl + b_le
        logit_e = MLP(features_e, p_e) + p_e

    with the features of layer l + 1 as they are when layer l's gate has spoken. Above the last layer comes the first
    one of the token after.

    Args:
        num_layers, num_experts, width: of the network that it reads, which is not changed.
        hidden: units of the MLP that is run for every expert.
        dropout: of the token's vector.
    """

    def __init__(
        self, num_layers: int, num_experts: int, width: int = 128, hidden: int = 16, dropout: float = 0.05
    ) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(num_layers, num_experts, width) * 0.1)
        self.from_prefix = nn.Linear(width, width, bias=False)
        with torch.no_grad():  # sums over up to L layers come in
            self.from_prefix.weight *= 0.3
        self.from_context = nn.Linear(width, width, bias=False)
        self.layer_bias = nn.Parameter(torch.zeros(num_layers, width))
        self.middle = nn.Linear(width, width)
        self.channels = nn.Parameter(torch.randn(num_layers, width, num_experts) * (0.3 / width**0.5))
        self.channel_bias = nn.Parameter(torch.zeros(num_layers, 1, num_experts))
        self.hidden_in = nn.Parameter(torch.randn(hidden, NUM_FEATURES + 1) * 0.25)
        self.hidden_bias = nn.Parameter(torch.randn(num_layers, hidden, 1) * 0.3)
        self.hidden_out = nn.Parameter(torch.randn(1, hidden) * 0.1)
        self.feature_out = nn.Parameter(torch.randn(1, NUM_FEATURES) * 0.05)
        self.dropout = nn.Dropout(dropout)

    def forward(self, prefix: Tensor, context: Tensor, used: Tensor, layers: Sequence[int], features: Tensor) -> Tensor:
        """Logits for the experts of the layers above n layers.

        Shapes:
            prefix (n, N, D) and context (N, D) of `EvictionNetwork.remember`, used (N, L, E), layers: n,
            features (n, NUM_FEATURES, N * E) -> (n, N, E)
        """
        index = torch.as_tensor(layers)
        n, tokens = prefix.shape[:2]
        own = torch.bmm(used[:, index].transpose(0, 1), self.own[index])
        v = self.from_prefix(prefix) + own + self.from_context(context) + self.layer_bias[index, None]
        v = self.dropout(F.silu(v))
        v = v + self.dropout(F.silu(self.middle(v)))
        p = torch.baddbmm(self.channel_bias[index], v, self.channels[index]).view(n, 1, -1)
        inputs = torch.cat([features, p], 1)
        hidden = torch.relu_(torch.baddbmm(self.hidden_bias[index], self.hidden_in.expand(n, -1, -1), inputs))
        logits = torch.baddbmm(p, self.hidden_out.expand(n, -1, -1), hidden)
        return torch.baddbmm(logits, self.feature_out.expand(n, -1, -1), features).view(n, tokens, -1)


class PortableNetwork(nn.Module):
    """What of an `EvictionNetwork` knows no layer and no expert: a score for models that it was not trained on.

        logits_e = MLP(features_e)

    with the features of `expert_caching_features`, which mean the same in every model.

    Shapes:
        features (n, NUM_FEATURES, N) -> (n, outputs, N)
    """

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        outputs = len(DISCOUNTS)
        self.hidden_in = nn.Linear(NUM_FEATURES, hidden)
        self.hidden_out = nn.Linear(hidden, outputs)
        self.feature_out = nn.Linear(NUM_FEATURES, outputs, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        rows = features.transpose(1, 2)
        return (self.hidden_out(torch.relu(self.hidden_in(rows))) + self.feature_out(rows)).transpose(1, 2)
