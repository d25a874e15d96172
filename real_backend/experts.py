"""A real Mixture-of-Experts model whose experts do not fit into fast memory, as a `Backend`: one layer at a time.

`ExpertEngine` executes a `Decision` exactly as `envs/expert_caching/state.py` defines an epoch, and keeps the same
books as the simulator: with the same routing and decisions, both hold the same experts. What differs is time, which is
measured here, and with it how far prefetches have come when a gate answers.

A step serves the next token of each row of the batch; a prompt is served a token at a time, like what follows it. The
clock is the wall's, from the first decision on, and it does not stop while the policy decides: nor does the channel.
`Outcome.seconds` is the time from one gate's answer to the next: decision, loads, experts, and attention and gate of
the next layer.

Experts are computed as they come, those at hand first, and added up in the order of their ids: the logits are those of
the model with all experts in memory, bit for bit, whatever the policy does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np

from ..envs.core.errors import InputError
from ..envs.core.interface import Outcome
from ..envs.core.kernel import entry_point
from ..envs.expert_caching.sim import EPOCH_DTYPE, Sim, has_room, new_sim, start
from ..envs.expert_caching.spec import CostModel, ExpertCachingSpec
from ..envs.expert_caching.state import (
    BYPASS,
    QUEUED,
    RESIDENT,
    Decision,
    State,
    empty_decision,
    reset_decision,
    resolve_decision,
)
from ..envs.expert_caching.timeline import Timeline
from ..envs.expert_caching.workload import Workload
from .experts_books import book_epoch
from .experts_model import GatedModel, KeyValues, build_olmoe, expert_output, load_olmoe
from .experts_store import ExpertFile, ExpertShape, Load, LoadChannel, PinnedPool

ROUTINGS = ("gate", "trace")
"""Who chooses the experts: the model's own gates, or the workload."""
CHUNK_BYTES = 3 << 19
"""Read at once, unless told otherwise. A load on demand overtakes a prefetch at the end of a chunk; but there the
channel's thread also needs the interpreter, for which it has to wait beside computing: 3.1 MB in three chunks took 4.5
ms beside attention on two busy cores, in two 3.0, in one 2.8."""


class OffloadedModel:
    """An OLMoE whose experts have been moved to a file on disk (CPU) or to pinned memory (CUDA).

    Args:
        model: of `experts_model.build_olmoe` or `load_olmoe`. Its experts are taken out: it cannot be used elsewhere.
        device: "cpu" or a CUDA device, where the model computes.
        folder: where the file of experts is made (CPU); default: the folder for temporary files. It must be on a disk.

    Raises:
        InputError: if the folder is not on a disk, the device absent, or the memory too small.
    """

    def __init__(self, model: Any, device: str = "cpu", folder: str | PathLike[str] | None = None) -> None:
        import torch

        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda") or (self.device.type == "cuda" and not torch.cuda.is_available()):
            raise InputError(f"device {device!r} is not available", remedy='Use device="cpu"')
        blocks = [block.mlp.experts for block in model.model.layers]
        num_experts = model.config.num_experts
        self.shape = ExpertShape(model.config.hidden_size, model.config.intermediate_size, model.dtype)
        experts = ((block.gate_up_proj[e], block.down_proj[e]) for block in blocks for e in range(num_experts))
        self.store: ExpertFile | PinnedPool
        if self.device.type == "cpu":
            self.store = ExpertFile(experts, self.shape, folder)
        else:
            self.store = PinnedPool(experts, self.shape, len(blocks) * num_experts, self.device)
        for block in model.model.layers:
            block.mlp.experts = None
        self.gated = GatedModel(model.to(self.device))

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's record."""
        return self.shape.record_bytes

    def close(self) -> None:
        """Forget the experts."""
        self.store.close()


class ExpertEngine:
    """An `OffloadedModel` with a cache of experts, as a `Backend`, clock "wall".

    Args:
        model: the model; several engines may use it, one at a time.
        spec: slots and what may be done with them; `spec.cost.expert_bytes` must be the model's (`expert_bytes`),
            `spec.cost.chunk_bytes` is how much is read at once.
        routing: "gate": the model's gates choose the experts, as it reads the workload's tokens (`token_ids`).
            "trace": the workload's experts are used, with the gates' weights for them, so that a trace of another model
            of this shape, or without tokens, runs here too.
        keep_logits: keep the logits of all steps in `logits`, for comparison.

    Attributes:
        next_tokens: int64 (T,): the most probable token after each one that was served, -1: not served. Where the
            workload's own next token is -1 it is used: greedy decoding.
        logits: a tensor (tokens of the step, vocab) a step, if kept.
        decision_s: float64 (I,): wall seconds of each decision so far: from the end of a step to the call of the next.

    Raises:
        InputError: if model and spec do not fit each other or the memory.
    """

    clock = "wall"

    def __init__(
        self, model: OffloadedModel, spec: ExpertCachingSpec, *, routing: str = "gate", keep_logits: bool = False
    ) -> None:
        gated = model.gated
        _check_spec(spec, model)
        if routing not in ROUTINGS:
            raise InputError(f"routing is {routing!r}", remedy=f"Choose one of {ROUTINGS}")
        self.model, self.capacity, self.routing, self.keep_logits = model, spec, routing, keep_logits
        self._gated = gated
        num_slots = sum(spec.slots_of(gated.num_layers, gated.num_experts, gated.top_k))
        # Beside the slots, buffers for what a layer misses: loads on demand begin before it is decided where they stay.
        num_buffers = num_slots + min(gated.num_experts, gated.top_k * spec.num_sequences)
        self._slots = model.store.open_slots(num_buffers, spec.cost.chunk_bytes)
        self._channel = LoadChannel(self._slots)
        self._buffers = list(range(num_buffers))  # buffer of each slot, then the spare ones
        self._num_slots = num_slots
        self._sim: Sim | None = None
        self._hidden: Any = None  # (rows, H): of the tokens of the step

    # ----------------------------------------------------------------------------------------------- Backend

    def reset(self, workload: Workload, seed: int = 0, *, batches: np.ndarray | None = None) -> None:
        """Load a workload and go to its first epoch.

        Args:
            workload: sequences of tokens, and the routing that was recorded of them.
            seed: draws the tokens, where the workload has none (with routing "trace").
            batches: int (steps, B) tokens of each step, -1 idle; default `interleave`.

        Raises:
            InputError: if the workload is not of this model's shape, or has no tokens to read.
        """
        self._check_workload(workload)
        self.workload = workload
        self._channel.clear()
        self._in_flight: dict[tuple[int, int], Load] = {}  # prefetches, in the order of the channel's queue
        self._urgent: list[Load] = []  # of the present layer
        sim = new_sim(self.capacity, workload, True, batches)
        for name in ("attention_s", "attention_token_s", "step_s"):
            sim.cost[name] = 0.0  # measured, not modelled: see `book_epoch`
        # The kernels that keep the books read the routing from arrays; here these are filled as the gates answer.
        self._experts, self._predicted = workload.experts.copy(), workload.predicted.copy()
        self._probability, self._tokens = workload.predicted_probability.copy(), workload.token_ids.copy()
        self._sim = sim._replace(
            experts=_read_only(self._experts),
            predicted=_read_only(self._predicted),
            predicted_probability=_read_only(self._probability),
            token_ids=_read_only(self._tokens),
        )
        first = workload.sequence_offsets[:-1]
        drawn = np.random.default_rng(seed).integers(self._gated.vocab, size=len(first))
        self._tokens[first] = np.where(self._tokens[first] < 0, drawn, self._tokens[first])
        self._decision = empty_decision(self._sim.state, self.capacity.max_prefetch)
        self._sequences: dict[int, KeyValues] = {}
        self._begun = np.zeros(len(self._sim.queue), np.int64)
        self._ready_s = np.full(len(self._sim.queue), np.inf)
        self._arrival_s = np.full(self._gated.num_experts, np.nan)
        both, seen = (self._sim.state, self._decision), (self._begun, self._ready_s, self._arrival_s)
        self._reset_decision, self._resolve = entry_point(reset_decision, *both), entry_point(resolve_decision, *both)
        self._book_epoch = entry_point(book_epoch, self._sim, self._decision, (0.0, 0.0, 0.0), *seen)
        self.next_tokens = np.full(workload.num_tokens, -1)
        self.logits: list[Any] = []
        with _inference_mode():
            self._begin_step(0)
            self._ask_gate(0)
            start(self._sim, self.capacity.warm_start)
            self._fill_slots()
        self._initial = np.stack([self.state().slots["layer"], self.state().slots["expert"]], 1).astype(np.int64)
        self.state().engine["now_s"] = 0.0
        self._is_started = False
        self._paused_at: float | None = None
        self._decision_s = np.zeros(len(self._sim.epochs))

    def state(self) -> State:
        """The live State."""
        return self._books.state

    def default_decision(self) -> Decision:
        """This backend's Decision, filled with the default (LRU, no prefetch)."""
        self._reset_decision(self._books.state, self._decision)
        return self._decision

    def step(self, decision: Decision) -> Outcome:
        """One epoch, then attention and gate of the next."""
        sim = self._books
        if sim.books[0]["done"]:
            return Outcome(0.0, True)
        decided = time.perf_counter()
        if not self._is_started:
            self._origin = self._answered = decided
            self._is_started = True
            self._load_on_demand()
        self._make_room()
        sim = self._books
        engine = sim.state.engine[0]
        self._decision_s[engine["epoch"]] = decided - self._answered
        self._resolve(sim.state, decision)
        with _inference_mode():
            stall_s = self._compute_experts(decision)
            end_s = time.perf_counter() - self._origin
            step, layer = divmod(int(engine["epoch"]) + 1, self._gated.num_layers)
            if layer == 0:
                self._end_step()
            if step < len(sim.batches):
                if layer == 0:
                    self._begin_step(step)
                self._ask_gate(layer)
        more = self._book(decision, end_s, stall_s)
        if more:
            self._load_on_demand()
        self._answered = time.perf_counter()
        return Outcome(float(engine["last_layer_s"]), not more)

    def pause(self) -> None:
        """Stop the clock and the channel between two steps: something else is to run."""
        self._channel.hold()
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Go on after `pause`; to be called before the next decision."""
        if self._paused_at is not None and self._is_started:
            away_s = time.perf_counter() - self._paused_at
            self._origin, self._answered = self._origin + away_s, self._answered + away_s
            for load in (*self._in_flight.values(), *self._urgent):
                if load.is_ready:  # since the last gate, before the pause: not booked yet
                    load.ready_at += away_s
        self._paused_at = None
        self._channel.go_on()

    def timeline(self) -> Timeline:
        """The record of the run so far (copies)."""
        sim = self._books
        epochs = sim.epochs[: int(sim.state.engine[0]["epoch"])]
        return Timeline(
            num_layers=self._gated.num_layers,
            batches=sim.batches.copy(),
            initial=self._initial.copy(),
            **{name: epochs[name].copy() for name in EPOCH_DTYPE.names or ()},
            loads=sim.loads[: int(sim.books[0]["num_loads"])].copy(),
            expert_bytes=self.model.expert_bytes,
        )

    def close(self) -> None:
        """Release the slots and end the thread. The model can be used by another engine."""
        if hasattr(self, "_channel"):
            self._channel.close()
            self._slots.close()
            self._sim = None
            del self._channel, self._slots

    # ------------------------------------------------------------------------------------------ more records

    @property
    def decision_s(self) -> np.ndarray:
        return self._decision_s[: int(self._books.state.engine[0]["epoch"])].copy()

    @property
    def _books(self) -> Sim:
        if self._sim is None:
            raise RuntimeError("no workload loaded: call reset(workload) first")
        return self._sim

    def recorded(self) -> Workload:
        """The workload with the routing that this run used, all of it served. Equal to it if the gates agreed."""
        work = self.workload
        return Workload.from_arrays(
            work.name,
            self._experts,
            work.lengths,
            num_experts=work.num_experts,
            predicted=self._predicted,
            predicted_probability=self._probability,
            token_ids=self._tokens,
            prior=work.prior,
            source=work.source,
        )

    # ------------------------------------------------------------------------------------------------ checks

    def _check_workload(self, workload: Workload) -> None:
        gated = self._gated
        shape = (workload.num_layers, workload.num_experts, workload.top_k)
        if shape != (gated.num_layers, gated.num_experts, gated.top_k):
            raise InputError(
                f"workload {workload.name!r} has (layers, experts, top k) {shape}, the model has "
                f"{(gated.num_layers, gated.num_experts, gated.top_k)}",
                remedy="Use a trace of this model, or build a model of that shape with build_olmoe",
            )
        if workload.lengths.max() > gated.max_positions:
            raise InputError(
                f"workload {workload.name!r} has a sequence of {workload.lengths.max()} tokens, the model reads "
                f"{gated.max_positions}",
                remedy="Cut the sequences",
            )
        unknown = workload.token_ids >= gated.vocab
        if self.routing == "gate":
            unknown[workload.sequence_offsets[:-1]] |= workload.token_ids[workload.sequence_offsets[:-1]] < 0
        if unknown.any():
            token = int(unknown.argmax())
            raise InputError(
                f"token_ids[{token}] of workload {workload.name!r} is {workload.token_ids[token]}, the model's tokens "
                f"are 0..{gated.vocab - 1}",
                remedy='Use a trace that this model recorded, or routing="trace" without token ids',
            )

    # --------------------------------------------------------------------------------------------- one epoch

    def _compute_experts(self, decision: Decision) -> float:
        """Send off the decision's loads and compute the needed experts. Returns the seconds of waiting for loads."""
        at_hand = self._send_prefetches(decision)
        rows = self._rows_by_expert()
        outputs = {expert: self._compute(buffer, *rows[expert]) for expert, buffer in at_hand}
        stall_s, asked = 0.0, time.perf_counter()
        for load in self._channel.finished(self._num_urgent):
            self._slots.weights(load.buffer)
            stall_s += time.perf_counter() - asked
            expert = load.record % self._gated.num_experts
            self._arrival_s[expert] = load.ready_at - self._origin
            outputs[expert] = self._compute(load.buffer, *rows[expert])
            asked = time.perf_counter()
        total = self._hidden.new_zeros(self._hidden.shape)
        for expert in sorted(outputs):
            if len(self._active) == 1:
                total += outputs[expert]
            else:
                total.index_add_(0, rows[expert][0], outputs[expert])
        self._hidden = self._hidden + total
        victims = decision.victims[: self.state().engine[0]["num_missing"]].tolist()
        for spare, slot in enumerate(victims, start=self._num_slots):
            if slot != BYPASS:
                self._buffers[slot], self._buffers[spare] = self._buffers[spare], self._buffers[slot]
        return stall_s

    def _load_on_demand(self) -> None:
        """Ask the channel for what the gate found late and missing; the missing go into the spare buffers."""
        state, width = self.state(), self._gated.num_experts
        engine = state.engine[0]
        layer, needed = int(engine["layer"]), state.needed[: engine["num_needed"]].tolist()
        missing = state.missing[: engine["num_missing"]].tolist()
        # in the order of the channel's queue, which is that of `_in_flight`
        self._late = {e: load for (of, e), load in self._in_flight.items() if of == layer and e in needed}
        spare = self._buffers[self._num_slots :]
        self._urgent = [Load(layer * width + e, buffer, True) for e, buffer in zip(missing, spare, strict=False)]
        self._num_urgent = self._channel.submit(list(self._late.values()), self._urgent, ())

    def _send_prefetches(self, decision: Decision) -> list[tuple[int, int]]:
        """Hand the decision's cancellations and prefetches to the channel.

        Returns (expert, buffer) of the needed experts at hand: those that nobody has to wait for.
        """
        state, buffers, width = self.state(), self._buffers, self._gated.num_experts
        engine, plan = state.engine[0], decision.plan[0]
        layer, late = int(engine["layer"]), self._late
        if plan["cancel_queued"]:
            status = state.experts["status"]
            queued = [k for k in self._in_flight if status[k] == QUEUED and not (k[0] == layer and k[1] in late)]
            self._channel.drop([self._in_flight.pop(key) for key in queued])
        ahead = []
        for target, expert, slot in decision.prefetch[: plan["num_prefetch"]].tolist():
            load = self._in_flight[target, expert] = Load(target * width + expert, buffers[slot], False)
            ahead.append(load)
        self._channel.submit((), (), ahead)
        missing = state.missing[: engine["num_missing"]].tolist()
        slot_of = state.experts["slot"][layer]
        needed = state.needed[: engine["num_needed"]].tolist()
        at_hand = [(e, buffers[slot_of[e]]) for e in needed if e not in late and e not in missing]
        return at_hand + [(e, load.buffer) for e, load in late.items() if not load.is_urgent]

    def _rows_by_expert(self) -> dict[int, tuple[Any, Any]]:
        """Of each needed expert: the rows of the batch that use it (None: the only one), and their weights (n, 1)."""
        import torch

        if len(self._active) == 1:
            return {e: (None, self._weights[:, i : i + 1]) for i, e in enumerate(self._ids[0])}
        rows: dict[int, tuple[list[int], list[int]]] = {}
        for row, experts in enumerate(self._ids):
            for place, expert in enumerate(experts):
                of_expert = rows.setdefault(expert, ([], []))
                of_expert[0].append(row)
                of_expert[1].append(place)
        device = self._gated.device
        tensors = {e: (torch.tensor(r, device=device), torch.tensor(p, device=device)) for e, (r, p) in rows.items()}
        return {expert: (r, self._weights[r, p, None]) for expert, (r, p) in tensors.items()}

    def _compute(self, buffer: int, rows: Any, weights: Any) -> Any:
        inputs = self._gate_input if rows is None else self._gate_input[rows]
        output = expert_output(self._slots.weights(buffer), inputs, weights)
        self._slots.used(buffer)
        return output

    def _book(self, decision: Decision, end_s: float, stall_s: float) -> bool:
        """Bring the books up to date with what was measured. False when the workload is finished."""
        now, progress = self._channel.progress(list(self._in_flight.values()))
        for place, (num_begun, ready_at) in enumerate(progress):
            self._begun[place], self._ready_s[place] = num_begun, ready_at - self._origin
        under_way = zip(self._in_flight.items(), progress, strict=True)
        self._in_flight = {key: load for (key, load), (_, ready_at) in under_way if ready_at == np.inf}
        times = (end_s, stall_s, now - self._origin)
        return self._book_epoch(self._books, decision, times, self._begun, self._ready_s, self._arrival_s)

    def _make_room(self) -> None:
        """Double the record of loads when it is full."""
        if not has_room(self._books):
            loads = self._books.loads
            self._sim = self._books._replace(loads=np.concatenate([loads, np.empty_like(loads)]))

    # ---------------------------------------------------------------------------------------------- the model

    def _begin_step(self, step: int) -> None:
        """Embed the next tokens: the workload's, or those that the model itself named last."""
        sim = self._books
        self._active = [token for token in sim.batches[step].tolist() if token >= 0]
        self._row_sequences = []
        for token in self._active:
            sequence, position = int(sim.token_sequence[token]), int(sim.token_position[token])
            if position == 0:
                self._sequences[sequence] = self._gated.new_sequence(int(self.workload.lengths[sequence]))
            memory = self._sequences.get(sequence)
            if memory is None or memory.num_tokens != position:
                raise InputError(
                    f"step {step} serves token {position} of sequence {sequence} out of turn",
                    remedy="Give batches that serve the tokens of each sequence in order",
                )
            memory.num_tokens += 1
            self._row_sequences.append(memory)
            if self._tokens[token] < 0:
                self._tokens[token] = self.next_tokens[token - 1]
        self._hidden = self._gated.embed(self._tokens[self._active].tolist())

    def _ask_gate(self, layer: int) -> None:
        """Attention and gate of a layer; what the gate says goes where the books read it."""
        gated, active = self._gated, self._active
        self._hidden, self._gate_input = gated.attend(layer, self._hidden, self._row_sequences)
        if self.routing == "trace":
            self._ids = self._experts[active, layer].tolist()
            self._weights = gated.weights_of(layer, self._gate_input, self._ids)
            return
        ids, self._weights = gated.gate(layer, self._gate_input)
        self._ids = ids.tolist()
        self._experts[active, layer] = self._ids
        width = self._predicted.shape[2]
        if width and layer + 1 < gated.num_layers:
            ids, odds = gated.guess(layer + 1, self._gate_input, width)
            self._predicted[active, layer + 1] = ids.tolist()
            self._probability[active, layer + 1] = odds.tolist()

    def _end_step(self) -> None:
        """Logits of the step; sequences that ended are forgotten."""
        logits = self._gated.head(self._hidden)
        self.next_tokens[self._active] = logits.argmax(dim=-1).tolist()
        if self.keep_logits:
            self.logits.append(logits.cpu())
        sim = self._books
        for token in self._active:
            sequence = int(sim.token_sequence[token])
            if sim.token_position[token] + 1 == self.workload.lengths[sequence]:
                del self._sequences[sequence]

    def _fill_slots(self) -> None:
        """Read the experts that the cache starts with."""
        resident = np.argwhere(self.state().experts["status"] == RESIDENT).tolist()
        slot = self.state().experts["slot"]
        width = self._gated.num_experts
        loads = [Load(layer * width + e, self._buffers[slot[layer, e]], True) for layer, e in resident]
        for _ in self._channel.finished(self._channel.submit((), loads, ())):
            pass


def open_model(
    workload: Workload,
    path: str | PathLike[str] | None = None,
    *,
    device: str = "cpu",
    folder: str | PathLike[str] | None = None,
) -> tuple[OffloadedModel, str]:
    """A model to serve a workload with, and the routing (`ROUTINGS`) that it then has.

    With a path it is that checkpoint, whose own gates route. Without one it is a model of the workload's layers,
    experts and top k with random weights, which follows the workload's routing: what it computes means nothing, but it
    reads and computes as much as any other of its size. An expert has 3.1 MB; attention takes 3.3 times as long as an
    expert, which is what attention and shared experts of DeepSeek-V2-Lite take (3.6).

    Args:
        workload: what it will serve.
        path: of a checkpoint (`load_olmoe`).
        device: where it computes.
        folder: for the file of experts (`OffloadedModel`).
    """
    if path is not None:
        return OffloadedModel(load_olmoe(path), device, folder), "gate"
    model = build_olmoe(
        hidden=1024,
        intermediate=256,
        layers=workload.num_layers,
        experts=workload.num_experts,
        top_k=workload.top_k,
        heads=16,
        kv_heads=4,
        max_positions=max(2048, int(workload.lengths.max())),
    )
    return OffloadedModel(model, device, folder), "trace"


def record_routing(
    model: OffloadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    name: str,
    new_tokens: int = 0,
    num_predicted: int = 0,
    source: str = "",
    progress: Callable[[float], None] | None = None,
) -> Workload:
    """The routing of some prompts, and of `new_tokens` that the model adds to each (greedily), as a workload.

    All experts are in memory for it.

    Args:
        model: the model.
        prompts: token ids of each sequence.
        name: of the workload.
        new_tokens: tokens that are added to each prompt.
        num_predicted: experts a layer that its gate, applied to the gate input of the layer before, names
            (`GatedModel.guess`).
        source: of the workload.
        progress: called with the number of prompts that are done.
    """
    gated = model.gated
    lengths = np.array([len(prompt) + new_tokens for prompt in prompts])
    tokens = np.concatenate([np.append(prompt, np.full(new_tokens, -1)) for prompt in prompts]).astype(np.int64)
    shape = (len(tokens), gated.num_layers)
    unknown = Workload.from_arrays(
        name,
        np.broadcast_to(np.arange(gated.top_k), (*shape, gated.top_k)),
        lengths,
        num_experts=gated.num_experts,
        predicted=np.full((*shape, num_predicted), -1),
        token_ids=tokens,
        source=source,
    )
    engine = ExpertEngine(model, ExpertCachingSpec(unmeasured_cost(model), cache_share=1.0, warm_start=True))
    try:
        engine.reset(unknown)
        while not engine.step(engine.default_decision()).done:
            if progress is not None:
                progress(engine.state().sequences[0]["sequence"])
        return engine.recorded()
    finally:
        engine.close()


def unmeasured_cost(model: OffloadedModel) -> CostModel:
    """A cost model of the right sizes for engines that are only to run, or to be calibrated: the times are guesses."""
    return CostModel(
        "unmeasured",
        attention_s=4e-4,
        expert_s=1e-4,
        expert_bytes=model.expert_bytes,
        bandwidth=1e9,
        chunk_bytes=CHUNK_BYTES,
        source="a guess: calibrate it with `schedlab calibrate experts`",
    )


def _check_spec(spec: ExpertCachingSpec, model: OffloadedModel) -> None:
    if spec.cost.expert_bytes != model.expert_bytes:
        raise InputError(
            f"cost model {spec.cost.name!r} is of experts of {spec.cost.expert_bytes} bytes, the model's have "
            f"{model.expert_bytes}",
            remedy="Calibrate this model with `schedlab calibrate experts`",
        )
    for name, value in (("host_share", 1.0), ("known_steps", 0), ("eviction_only", False)):
        if getattr(spec, name) != value:
            raise InputError(
                f"{name} is {getattr(spec, name)}: only the simulator has that",
                remedy=f"Set {name} to {value} for the real backend",
            )


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.setflags(write=False)
    return view


def _inference_mode() -> Any:
    import torch

    return torch.inference_mode()
