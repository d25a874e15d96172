"""ONNX: the policy as one file that needs no torch, and the proof that it chooses as the original does."""

from __future__ import annotations

import io
import time
import warnings
from os import PathLike
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from ..envs.core.errors import InputError
from .compiled import deepsets_choose, pack_weights
from .networks import PointerNetwork
from .policy import OBSERVATION_KEYS

OUTPUTS = ("action", "logits", "value")


class _Decision(nn.Module):
    """What the file computes: scaling, mask and argmax inside."""

    def __init__(self, network: PointerNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, context: Tensor, candidates: Tensor, action_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, values = self.network(context, candidates, action_mask)
        return logits.argmax(1), logits, values


def onnx_bytes(network: PointerNetwork, metadata: dict[str, str] | None = None) -> bytes:
    """The network as an ONNX model with the weights inside.

    Inputs: context float32 (B, C), candidates float32 (B, K, F), action_mask bool (B, K), with B and K free.
    Outputs: action int64 (B,), logits float32 (B, K), value float32 (B,).
    """
    config = network.config
    example = (
        torch.zeros(2, config["context_size"]),
        torch.zeros(2, 3, config["candidate_size"]),
        torch.ones(2, 3, dtype=torch.bool),
    )
    sizes = {"context": {0: "B"}, "candidates": {0: "B", 1: "K"}, "action_mask": {0: "B", 1: "K"}}
    sizes |= {"action": {0: "B"}, "logits": {0: "B", 1: "K"}, "value": {0: "B"}}
    buffer = io.BytesIO()
    was_training, device = network.training, network.value.weight.device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The tracing exporter takes 0.1 s and gives a smaller file; the dynamo exporter takes 7 s for the same graph.
        torch.onnx.export(
            _Decision(network).eval().cpu(),
            example,
            buffer,
            dynamo=False,
            input_names=list(OBSERVATION_KEYS),
            output_names=list(OUTPUTS),
            dynamic_axes=sizes,
            opset_version=17,
        )
    network.train(was_training).to(device)
    model = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, {key: str(value) for key, value in (metadata or {}).items()})
    onnx.checker.check_model(model)
    return model.SerializeToString()


class OnnxPolicy:
    """Runs `policy.onnx` on one thread: the index of the best row for one table, or for a batch of tables.

    Args:
        source: path of the file, or its bytes.

    Raises:
        InputError: the file is missing, or is not such a model.
    """

    def __init__(self, source: str | PathLike[str] | bytes) -> None:
        file = None if isinstance(source, bytes) else Path(source)
        if file is not None and not file.is_file():
            raise InputError("no such file", file=file, remedy="Give the policy.onnx of a checkpoint folder")
        model = source if isinstance(source, bytes) else Path(source).read_bytes()
        options = onnxruntime.SessionOptions()
        # A decision takes tens of microseconds: more threads would cost more than they save, and steal from the engine.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            inputs = {i.name: i.shape for i in self.session.get_inputs()}
            self.context_size, self.candidate_size = inputs["context"][1], inputs["candidates"][2]
        except Exception as error:  # onnxruntime has an exception class for each status code
            raise InputError(
                f"not a policy that can be run ({error})", file=file, remedy="Save the checkpoint again"
            ) from error
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)

    def __call__(self, context: np.ndarray, candidates: np.ndarray, action_mask: np.ndarray) -> int:
        """Row to choose, from context (C,), candidates (K, F) and mask (K,)."""
        return int(self.choose(context[None], candidates[None], action_mask[None])[0])

    def choose(self, context: np.ndarray, candidates: np.ndarray, action_mask: np.ndarray) -> np.ndarray:
        """Rows to choose, int64 (B,), from context (B, C), candidates (B, K, F) and masks (B, K)."""
        return self.session.run(["action"], {"context": context, "candidates": candidates, "action_mask": action_mask})[
            0
        ]


def random_observations(
    network: PointerNetwork, count: int, num_candidates: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Observations with features in [-1, 1] and 1 to `num_candidates` legal rows; dead rows are zero."""
    rng = np.random.default_rng(seed)
    context_size, candidate_size = network.config["context_size"], network.config["candidate_size"]
    mask = rng.permuted(np.arange(num_candidates) < rng.integers(1, num_candidates + 1, (count, 1)), axis=1)
    candidates = rng.uniform(-1, 1, (count, num_candidates, candidate_size)).astype(np.float32) * mask[..., None]
    context = rng.uniform(-1, 1, (count, context_size)).astype(np.float32)
    return {"context": context, "candidates": candidates.astype(np.float32), "action_mask": mask}


def agreement(
    network: PointerNetwork, model: OnnxPolicy, count: int = 1000, num_candidates: int = 64
) -> dict[str, float]:
    """Share of random observations in which the ONNX file, and the compiled kernel, choose the row that torch does."""
    obs = random_observations(network, count, num_candidates)
    with torch.no_grad():
        logits, _ = network(
            *(torch.as_tensor(obs[key], device=network.value.weight.device) for key in OBSERVATION_KEYS)
        )
        expected = logits.argmax(1).cpu().numpy()
    shares = {"onnx": float(np.mean(model.choose(**obs) == expected))}
    if network.config["encoder"] == "deepsets":
        weights, scratch = pack_weights(network, num_candidates), np.empty(num_candidates, np.float32)
        chosen = [
            deepsets_choose(weights, obs["context"][i], obs["candidates"][i], obs["action_mask"][i], scratch)
            for i in range(count)
        ]
        shares["compiled"] = float(np.mean(np.array(chosen) == expected))
    return shares


def latency_us(network: PointerNetwork, num_candidates: int = 64, repeats: int = 2000) -> dict[str, float]:
    """Microseconds of wall time of one decision with all rows live: median and 99th percentile of each runner."""
    obs = random_observations(network, 1, num_candidates)
    obs["action_mask"][:] = True
    context, candidates, mask = (np.ascontiguousarray(obs[key][0]) for key in OBSERVATION_KEYS)
    model = OnnxPolicy(onnx_bytes(network))
    runners = {"onnx": lambda: model(context, candidates, mask)}
    if network.config["encoder"] == "deepsets":
        weights, scratch = pack_weights(network, num_candidates), np.empty(num_candidates, np.float32)
        runners["compiled"] = lambda: deepsets_choose(weights, context, candidates, mask, scratch)
    result = {}
    for name, run in runners.items():
        run()
        taken = np.empty(repeats)
        for i in range(repeats):
            start_ns = time.perf_counter_ns()
            run()
            taken[i] = (time.perf_counter_ns() - start_ns) / 1e3
        result[f"{name}_p50"], result[f"{name}_p99"] = (float(x) for x in np.percentile(taken, [50, 99]))
    return result
