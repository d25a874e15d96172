"""Pointer networks: a set of candidate rows and a context in, one logit a row and one value out.

Every layer is permutation-equivariant over the candidates and none knows their number K, so one set of weights serves
any table size. Two encoders share one head:

- `DeepSetsEncoder` (Zaheer et al. 2017, "Deep Sets"): row-wise MLP, masked mean and max. Small enough to be written
  again in a compiled kernel (`compiled.py`), which is what runs in microsecond loops.
- `AttentionEncoder` (Vaswani et al. 2017; pre-norm as in Xiong et al. 2020): rows see each other before they are
  pooled.

Head: a context query over the candidate embeddings with tanh-clipped logits (Vinyals et al. 2015, "Pointer
Networks"; Bello et al. 2016 for the clipping).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .fused import EncodeRows, Rows, ScoreRows, Workspace

MASKED_LOGIT = -1e8
"""Logit of a row that may not be chosen: exp of it is exactly 0 in float32, and it stays finite in products."""

ENCODERS = ("deepsets", "attention")


def pool(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Mean and max over the live rows of non-negative embeddings (B, K, H): (B, 2H), zero for an empty set.

    Embeddings are outputs of a ReLU, hence zeroing the dead rows leaves the maximum as it is.
    """
    live = mask.unsqueeze(-1).to(embeddings.dtype)
    embeddings = embeddings * live
    mean = embeddings.sum(1) / live.sum(1).clamp(min=1.0)
    return torch.cat([mean, embeddings.amax(1)], dim=1)


class InputNormalizer(nn.Module):
    """Fixed affine scaling of the inputs, kept with the weights: (x - mean) * inverse_std.

    Environments scale their features themselves, so the default is the identity; `fit` sets it from a sample.
    """

    def __init__(self, context_size: int, candidate_size: int) -> None:
        super().__init__()
        self.register_buffer("context_mean", torch.zeros(context_size))
        self.register_buffer("context_inverse_std", torch.ones(context_size))
        self.register_buffer("candidate_mean", torch.zeros(candidate_size))
        self.register_buffer("candidate_inverse_std", torch.ones(candidate_size))
        self.is_identity = True

    @torch.no_grad()
    def fit(self, context: Tensor, candidates: Tensor, mask: Tensor, minimum_std: float = 0.05) -> None:
        """Set mean and deviation from a sample: context (B, C), candidates (B, K, F), mask bool (B, K).

        Deviations below `minimum_std` count as that: a feature that hardly moved must not be blown up later.
        """
        for name, sample in (("context", context), ("candidate", candidates[mask])):
            getattr(self, f"{name}_mean").copy_(sample.mean(0))
            getattr(self, f"{name}_inverse_std").copy_(1.0 / sample.std(0, correction=0).clamp(min=minimum_std))
        self.is_identity = False

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def refresh(self) -> None:
        """Look again whether the scaling is the identity (after the buffers were written from outside)."""
        means = (self.context_mean, self.candidate_mean)
        scales = (self.context_inverse_std, self.candidate_inverse_std)
        self.is_identity = all(bool((m == 0).all()) for m in means) and all(bool((s == 1).all()) for s in scales)

    def context(self, context: Tensor) -> Tensor:
        return context if self.is_identity else (context - self.context_mean) * self.context_inverse_std

    def candidates(self, candidates: Tensor) -> Tensor:
        return candidates if self.is_identity else (candidates - self.candidate_mean) * self.candidate_inverse_std


class DeepSetsEncoder(nn.Module):
    """Row-wise MLP on [candidate, context], masked mean and max, MLP on [context, mean, max].

    u_i = relu(W_x x_i + W_c c' + b);  h_i = relu(W_h u_i + b);
    g   = relu(W_2 relu(W_1 [c, mean_i h_i, max_i h_i] + b) + b)

    W_c c' is computed once a set, which is why the first layer is kept in two parts. c' is the context without its
    `late_context` columns: where these alone change from one choice to the next (what was picked so far), the rows
    need not be embedded again, and the compiled kernel does not.

    Shapes:
        context (B, C), candidates (B, K, F), mask bool (B, K) -> h (B, K, H), g (B, H)
    """

    takes_rows = True

    def __init__(
        self, context_size: int, candidate_size: int, hidden: int = 64, late_context: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.register_buffer("early", torch.ones(context_size), persistent=False)
        self.early[list(late_context)] = 0.0
        self.from_candidate = nn.Linear(candidate_size, hidden, bias=False)
        self.from_context = nn.Linear(context_size, hidden)
        self.row = nn.Linear(hidden, hidden)
        self.summary_in = nn.Linear(context_size + 2 * hidden, hidden)
        self.summary_out = nn.Linear(hidden, hidden)

    def forward(self, context: Tensor, candidates: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.relu(self.from_candidate(candidates) + self.from_early_context(context).unsqueeze(1))
        rows = torch.relu(self.row(rows))
        return rows, self.summarise(context, pool(rows, mask))

    def from_early_context(self, context: Tensor) -> Tensor:
        """W_c c' + b, what every row sees of the context (B, C): (B, H)."""
        return self.from_context(context * self.early)

    def summarise(self, context: Tensor, pooled: Tensor) -> Tensor:
        """Embedding g (B, H) of the whole set."""
        return torch.relu(self.summary_out(torch.relu(self.summary_in(torch.cat([context, pooled], dim=1)))))


class AttentionBlock(nn.Module):
    """Pre-norm transformer block over the rows of a set; masked rows are never attended to.

    x <- x + W_o softmax(Q(n) K(n)^T / sqrt(d) + mask) V(n),  n = LN(x);   x <- x + W_2 relu(W_1 LN(x))

    Shapes:
        x (B, K, H), mask bool (B, K) -> (B, K, H)
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp_in, self.mlp_out = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        num_sets, num_rows, hidden = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(num_sets, num_rows, 3, self.heads, hidden // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, K, d)
        scores = query @ key.transpose(-2, -1) / math.sqrt(hidden // self.heads)
        scores = torch.where(mask[:, None, None, :], scores, MASKED_LOGIT)
        mixed = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).reshape(num_sets, num_rows, hidden)
        x = x + self.out(mixed)
        return x + self.mlp_out(torch.relu(self.mlp_in(self.norm_mlp(x))))


class AttentionEncoder(nn.Module):
    """Masked multi-head self-attention over the candidates, pooled as in `DeepSetsEncoder`.

    Shapes:
        context (B, C), candidates (B, K, F), mask bool (B, K) -> h (B, K, H), g (B, H)
    """

    takes_rows = False

    def __init__(
        self, context_size: int, candidate_size: int, hidden: int = 64, num_blocks: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden {hidden} is not a multiple of heads {heads}. Choose hidden as such a multiple")
        self.from_candidate = nn.Linear(candidate_size, hidden, bias=False)
        self.from_context = nn.Linear(context_size, hidden)
        self.blocks = nn.ModuleList(AttentionBlock(hidden, heads) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(hidden)
        self.row = nn.Linear(hidden, hidden)
        self.summary_in = nn.Linear(context_size + 2 * hidden, hidden)
        self.summary_out = nn.Linear(hidden, hidden)

    def forward(self, context: Tensor, candidates: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.from_candidate(candidates) + self.from_context(context).unsqueeze(1)
        for block in self.blocks:
            x = block(x, mask)
        rows = torch.relu(self.row(self.norm(x)))
        return rows, self.summarise(context, pool(rows, mask))

    summarise = DeepSetsEncoder.summarise


class PointerHead(nn.Module):
    """A query from the set points at the rows; keys are conditioned on the set, so scores may depend on the others.

    k_i = relu(W_k h_i + W_g g + b);  logit_i = clip * tanh(q . k_i / sqrt(H)),  q = W_q g + b

    Shapes:
        h (B, K, H), g (B, H), mask bool (B, K) -> logits (B, K), masked rows at `MASKED_LOGIT`
    """

    def __init__(self, hidden: int = 64, clip: float = 10.0) -> None:
        super().__init__()
        self.clip, self.scale = clip, 1.0 / math.sqrt(hidden)
        self.key_from_row = nn.Linear(hidden, hidden, bias=False)
        self.key_from_set = nn.Linear(hidden, hidden)
        self.query = nn.Linear(hidden, hidden)

    def forward(self, rows: Tensor, summary: Tensor, mask: Tensor) -> Tensor:
        keys = torch.relu(self.key_from_row(rows) + self.key_from_set(summary).unsqueeze(1))
        scores = (keys @ self.query(summary).unsqueeze(-1)).squeeze(-1)
        return torch.where(mask, self.clip * torch.tanh(scores * self.scale), MASKED_LOGIT)


class PointerNetwork(nn.Module):
    """Normaliser, encoder, pointer head and value head.

    Args:
        context_size: C, numbers in the context.
        candidate_size: F, numbers in a candidate row.
        encoder: one of `ENCODERS`.
        hidden: H, width of every layer.
        clip: logits lie in [-clip, clip].
        late_context: columns of the context that the rows do not see (`DeepSetsEncoder`), only the summary does.

    Shapes:
        context float32 (B, C), candidates float32 (B, K, F), mask bool (B, K) -> logits (B, K), values (B,)
    """

    def __init__(
        self,
        context_size: int,
        candidate_size: int,
        encoder: str = "deepsets",
        hidden: int = 64,
        clip: float = 10.0,
        late_context: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if encoder not in ENCODERS:
            raise ValueError(f"unknown encoder {encoder!r}. Choose one of {ENCODERS}")
        if late_context and encoder != "deepsets":
            raise ValueError(f"encoder {encoder!r} shows its rows the whole context. Leave late_context empty")
        if not set(late_context) <= set(range(context_size)):
            raise ValueError(f"late_context is {late_context}. Choose from the columns 0 to {context_size - 1}")
        self.config: dict[str, Any] = {
            "context_size": context_size,
            "candidate_size": candidate_size,
            "encoder": encoder,
            "hidden": hidden,
            "clip": clip,
            "late_context": tuple(late_context),
        }
        self.normalizer = InputNormalizer(context_size, candidate_size)
        self.encoder: DeepSetsEncoder | AttentionEncoder
        if encoder == "deepsets":
            self.encoder = DeepSetsEncoder(context_size, candidate_size, hidden, late_context)
        else:
            self.encoder = AttentionEncoder(context_size, candidate_size, hidden)
        self.head = PointerHead(hidden, clip)
        self.value_hidden = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, 1)
        self._workspace = Workspace()
        self._initialise()

    def _initialise(self) -> None:
        """Orthogonal, gain sqrt(2) before ReLU, as in PPO; a small query makes the first policy nearly uniform."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, math.sqrt(2))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.orthogonal_(self.head.query.weight, 0.1)
        nn.init.orthogonal_(self.value.weight, 1.0)

    def show_late_context(self, is_shown: bool) -> None:
        """Let the rows see the columns of `late_context` after all, or no longer: to learn without them later."""
        if self.config["late_context"]:
            self.encoder.early[list(self.config["late_context"])] = float(is_shown)

    @property
    def takes_rows(self) -> bool:
        """Whether `forward_rows` works: the encoder treats rows one by one, and the weights are on the CPU."""
        return self.encoder.takes_rows and self.value.weight.device.type == "cpu"

    def forward(self, context: Tensor, candidates: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        context = self.normalizer.context(context)
        rows, summary = self.encoder(context, self.normalizer.candidates(candidates), mask)
        return self.head(rows, summary, mask), self._value(summary)

    def forward_rows(self, context: Tensor, rows: Rows, num_candidates: int) -> tuple[Tensor, Tensor]:
        """The same function of the live rows alone, on the CPU: the faster, the emptier the table.

        Only the latest call can be differentiated (see `fused.Workspace`).
        """
        encoder, head = self.encoder, self.head
        context, candidates = self.normalizer.context(context), self.normalizer.candidates(rows.candidates)
        embeddings, pooled = EncodeRows.apply(
            self._workspace,
            candidates,
            rows.offsets,
            encoder.from_early_context(context),
            encoder.from_candidate.weight,
            encoder.row.weight,
            encoder.row.bias,
        )
        summary = encoder.summarise(context, pooled)
        scores = ScoreRows.apply(
            self._workspace,
            embeddings,
            rows.offsets,
            head.key_from_set(summary),
            head.query(summary),
            head.key_from_row.weight,
        )
        logits = head.clip * torch.tanh(scores * head.scale)
        table = logits.new_full((context.shape[0] * num_candidates,), MASKED_LOGIT)
        return table.index_copy(0, rows.slots, logits).view(-1, num_candidates), self._value(summary)

    def _value(self, summary: Tensor) -> Tensor:
        return self.value(torch.relu(self.value_hidden(summary))).squeeze(-1)
