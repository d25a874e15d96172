"""A Mixture-of-Experts transformer taken apart at its gates: attention and gate of one layer, then its experts.

The model is transformers' OLMoE (arXiv 2409.02060), whose layers are an RMSNorm, attention, an RMSNorm, a router that
picks k of E experts by softmax, and the experts themselves, each w2(silu(w1 x) * w3 x). `GatedModel` runs those
modules, in the order of `OlmoeForCausalLM.forward`, but stops after each gate, so that somebody outside can first
fetch the experts that are needed. The logits are those of the whole model, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

from ..envs.core.errors import InputError
from .hf import load_model
from .hf_internals import check_transformers


def build_olmoe(
    *,
    hidden: int = 128,
    intermediate: int = 128,
    layers: int = 6,
    experts: int = 32,
    top_k: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 2048,
    max_positions: int = 2048,
    seed: int = 0,
) -> Any:
    """A small OLMoE with random weights that depend on nothing but the arguments (float32, on the CPU)."""
    check_transformers()
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
        experts_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OlmoeForCausalLM(config).eval()


def load_olmoe(path: str | PathLike[str]) -> Any:
    """The OLMoE of a local checkpoint folder, float32 (see `schedlab train-moe`). Raises InputError."""
    model = load_model(path)
    if model.config.model_type != "olmoe":
        raise InputError(
            f"is a {model.config.model_type} model, not an olmoe one",
            file=path,
            remedy="Give a folder that `schedlab train-moe` wrote, or another OLMoE checkpoint",
        )
    model.set_experts_implementation("eager")
    return model


class KeyValues:
    """Keys and values of one sequence, with room for `max_tokens` of them."""

    def __init__(self, model: Any, max_tokens: int) -> None:
        import torch

        config = model.config
        heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        shape = (2, 1, heads, max_tokens, size)
        self._layers = [
            torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(config.num_hidden_layers)
        ]
        self.num_tokens = 0
        """The token that is being computed included."""

    def update(self, layer: int, key_value: Any) -> tuple[Any, Any]:
        """Store the last token's key and value (2, 1, heads, size); return those of all, (1, heads, T, size) each."""
        memory = self._layers[layer]
        memory[:, :, :, self.num_tokens - 1] = key_value
        return memory[:, :, :, : self.num_tokens].unbind()


class _Layer(NamedTuple):
    """The weights of a decoder layer outside its experts: reading them off a torch module takes microseconds each."""

    attention_norm: Any  # (H,)
    query: Any  # (H, H)
    query_norm: Any  # (H,)
    key: Any  # (heads of keys * head size, H)
    key_norm: Any  # (heads of keys * head size,)
    value: Any  # (heads of keys * head size, H)
    output: Any  # (H, H)
    gate_norm: Any  # (H,)
    router: Any  # (E, H)


class GatedModel:
    """An OLMoE, computed a layer at a time: `embed`, then for each layer `attend`, `gate`, the experts, then `head`.

    Rows of a batch are tokens of different sequences, each with keys and values of its own.

    Shapes: hidden (B, H) float, expert ids (B, k) int64, weights (B, k) float.
    """

    def __init__(self, model: Any) -> None:
        import torch

        config = model.config
        if config.clip_qkv is not None or config.attention_bias:
            raise InputError("the model clips or biases its queries", remedy="Use an OLMoE without either")
        self.model = model
        self.device = model.device
        self.num_layers: int = config.num_hidden_layers
        self.num_experts: int = config.num_experts
        self.top_k: int = config.num_experts_per_tok
        self.vocab: int = config.vocab_size
        self.max_positions: int = config.max_position_embeddings
        self._heads: int = config.num_attention_heads
        self._head_size: int = config.hidden_size // config.num_attention_heads
        self._scale: float = self._head_size**-0.5
        self._epsilon: float = config.rms_norm_eps
        self._normalised_gates: bool = config.norm_topk_prob
        self._layers = [
            _Layer(
                block.input_layernorm.weight.data,
                block.self_attn.q_proj.weight.data,
                block.self_attn.q_norm.weight.data,
                block.self_attn.k_proj.weight.data,
                block.self_attn.k_norm.weight.data,
                block.self_attn.v_proj.weight.data,
                block.self_attn.o_proj.weight.data,
                block.post_attention_layernorm.weight.data,
                block.mlp.gate.weight.data,
            )
            for block in model.model.layers
        ]
        self._embedding = model.model.embed_tokens.weight.data
        self._head_norm = model.model.norm.weight.data
        self._head = model.lm_head.weight.data
        positions = torch.arange(self.max_positions, device=self.device)[None]
        with torch.inference_mode():
            cos, sin = model.model.rotary_emb(torch.zeros(1, device=self.device), positions)
            half = self._head_size // 2
            self._cos = cos[0, :, None]
            # x cos + (-x2, x1) sin = x cos + (x2, x1) (-sin, sin): fewer operations, the same bits
            self._sin = torch.cat((-sin[0, :, None, :half], sin[0, :, None, half:]), dim=-1)

    def new_sequence(self, max_tokens: int) -> KeyValues:
        """Room for the keys and values of one sequence."""
        return KeyValues(self.model, max_tokens)

    def embed(self, tokens: Sequence[int]) -> Any:
        """(B,) token ids -> hidden (B, H)."""
        import torch

        return self._embedding[torch.tensor(tokens, device=self.device)]

    def attend(self, layer: int, hidden: Any, sequences: Sequence[KeyValues]) -> tuple[Any, Any]:
        """Attention of one layer: (hidden with attention added, input of the gate), both (B, H).

        OlmoeDecoderLayer and OlmoeAttention, for one new token in each of several sequences of unlike length.
        """
        import torch
        from torch.nn.functional import linear, scaled_dot_product_attention

        weights, rows, size = self._layers[layer], len(sequences), self._head_size
        normed = self._rms_norm(hidden, weights.attention_norm)
        query = self._rms_norm(linear(normed, weights.query), weights.query_norm)
        key = self._rms_norm(linear(normed, weights.key), weights.key_norm)
        value = linear(normed, weights.value).view(rows, -1, size)
        both = torch.cat((query, key), dim=-1).view(rows, -1, size)
        end = sequences[0].num_tokens
        place = slice(end - 1, end) if rows == 1 else [sequence.num_tokens - 1 for sequence in sequences]
        both = both * self._cos[place] + both.roll(size // 2, dims=-1) * self._sin[place]
        query = both[:, : self._heads, None]
        key_value = torch.stack((both[:, self._heads :], value))
        outputs = []
        for i, sequence in enumerate(sequences):
            keys, values = sequence.update(layer, key_value[:, i : i + 1])
            outputs.append(
                scaled_dot_product_attention(query[i : i + 1], keys, values, scale=self._scale, enable_gqa=True)
            )
        output = outputs[0] if rows == 1 else torch.cat(outputs)
        hidden = hidden + linear(output.reshape(rows, -1), weights.output)
        return hidden, self._rms_norm(hidden, weights.gate_norm)

    def gate(self, layer: int, gate_input: Any) -> tuple[Any, Any]:
        """What the layer's router chooses for each row: (expert ids, weights), both (B, k)."""
        weights, ids = self._odds(layer, gate_input).topk(self.top_k, dim=-1)
        return ids, self._normalise(weights)

    def weights_of(self, layer: int, gate_input: Any, ids: Sequence[Sequence[int]]) -> Any:
        """Weights (B, k) of experts that somebody else chose."""
        import torch

        chosen = torch.tensor(ids, device=self.device)
        return self._normalise(self._odds(layer, gate_input).gather(1, chosen))

    def guess(self, layer: int, gate_input: Any, width: int) -> tuple[Any, Any]:
        """What the layer's router says of another layer's gate input (Fate, arXiv 2502.12224).

        Returns (expert ids, their probability of being among the k chosen), both (B, width), most probable first. The
        probability is k times the router's softmax, at most 1.
        """
        odds, ids = self._odds(layer, gate_input).topk(width, dim=-1)
        return ids, (odds * self.top_k).clamp_(max=1.0)

    def head(self, hidden: Any) -> Any:
        """Logits (B, vocab) of the next tokens."""
        from torch.nn.functional import linear

        return linear(self._rms_norm(hidden, self._head_norm), self._head)

    def _odds(self, layer: int, gate_input: Any) -> Any:
        """(B, E): the softmax of a layer's router."""
        from torch.nn.functional import linear

        return linear(gate_input, self._layers[layer].router).softmax(dim=-1)

    def _normalise(self, weights: Any) -> Any:
        return weights / weights.sum(dim=-1, keepdim=True) if self._normalised_gates else weights

    def _rms_norm(self, x: Any, weight: Any) -> Any:
        return weight * (x * ((x * x).mean(-1, keepdim=True) + self._epsilon).rsqrt())


def expert_output(weights: tuple[Any, Any], rows: Any, gates: Any) -> Any:
    """w2(silu(w1 x) * w3 x) for some rows (n, H), times each row's gate (n, 1), as OlmoeExperts computes it.

    `weights` are (w1 over w3 (2 I, H), w2 (H, I)).
    """
    from torch.nn.functional import linear, silu

    gate, up = linear(rows, weights[0]).chunk(2, dim=-1)
    return linear(silu(gate) * up, weights[1]) * gates
