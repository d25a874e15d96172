"""Hugging Face transformers' continuous batching as a `Backend`: a real model, one iteration at a time, our schedule.

`HFEngine` executes a `Decision` exactly as `envs/request_scheduling/state.py` defines an iteration, so that it and
the simulator make the same schedules from the same decisions. What differs is time: here it is measured.

Blocks and the prefix cache, precisely (what transformers 5.19 does, and what we make of it):

- *Admission* references the longest prefix of the prompt that is in the cache, then takes all other blocks of the
  prompt at once, ceil(prefill_target / block_tokens) in all (transformers alone would take blocks chunk by chunk). A
  decode takes a block when its token does not fit into those it has. The last token of a request is never written:
  it ends holding ceil((prompt + output - 1) / block_tokens) blocks.
- *What is shared*: full blocks of the prompt that `Workload.hash_ids` cover, by a hash chained from the prompt's
  start. A block becomes shareable at the end of the iteration that computes its last token, so two requests admitted
  in one iteration do not share. (transformers would also hash the uncovered blocks, which only the request itself
  could hit, and those of generated tokens, which no workload describes. It would not register the blocks of a request
  that ends in the iteration that completes its prefill; we do.)
- *A hit* is never the whole prompt: at most (prefill_target - 1) // block_tokens blocks, so that a token is left to
  compute. It may use blocks that are idle or in use by others (reference counts).
- *Duplicates*: a request that completes a block whose content another one completed before it adopts that block and
  its own goes back to the unused ones at once. Within an iteration this happens in order of admission, as does the
  release of the blocks of requests that finish.
- *Release* (finish and preemption alike): references are dropped last block first; shareable blocks that nobody
  references any more stay cached and count as free, all others become unused. A preempted request can therefore hit
  its own prompt again. (transformers releases first block first, and forgets the blocks of its victims.)
- *Eviction*: unused blocks are taken first. When they run out, cached blocks are evicted one by one, in the order in
  which they were released (least recently used first); a hit takes its blocks out of that order before the rest of
  the admission takes any. A cached block's predecessors are always cached too. (transformers evicts all at once.)

Iterations are measured from the call of the planner to the last change of the books: scheduling, preparing tensors,
forward pass, sampling, update. Arrivals, the creation of prompts and the refresh of `cached_tokens` lie outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np

from ..envs.core.errors import InputError
from ..envs.core.interface import Outcome
from ..envs.request_scheduling.spec import COST_FEATURES, ONE_CLASS, EngineSpec, SloClass
from ..envs.request_scheduling.state import (
    FINISHED,
    REFUSED,
    RUNNING,
    WAITING,
    Decision,
    State,
    empty_decision,
    empty_state,
    note_arrival,
    reset_decision,
)
from ..envs.request_scheduling.timeline import Timeline
from ..envs.request_scheduling.workload import Workload
from .hf_internals import PagedStepper, chain_block_hashes, check_transformers

ENGINE_CLOCKS = ("cpu", "wall", "device")


def build_llama(
    *,
    hidden: int = 256,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 4,
    vocab: int = 1024,
    max_positions: int = 32768,
    seed: int = 0,
) -> Any:
    """A small Llama with random weights that depend on nothing but the arguments (float32, on the CPU)."""
    check_transformers()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        # Wider than the usual 0.02: the greedy tokens of a narrow random model hardly depend on the prompt.
        initializer_range=0.1,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def load_model(path: str | PathLike[str], dtype: str = "float32") -> Any:
    """The causal LM of a local checkpoint folder; nothing is downloaded. Raises InputError."""
    check_transformers()
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load a causal LM ({error})", file=path, remedy="Give a folder with config.json and weights"
        ) from error


def prompt_token_ids(workload: Workload, request: int, seed: int, vocab: int) -> np.ndarray:
    """(prompt_tokens,) int64 token ids of a request: a function of (seed, request), or of (seed, hash id) where known.

    Blocks with equal hash ids get equal tokens, and different tokens almost surely otherwise.
    """
    tokens = _noise(seed, 2 * request + 1, np.arange(workload.prompt_tokens[request]))
    block = workload.hash_block_tokens
    if block > 0:
        ids = workload.hash_ids[workload.hash_offsets[request] : workload.hash_offsets[request + 1]]
        shared = _noise(seed, 2 * ids[:, None].astype(np.int64), np.arange(block)[None, :]).ravel()[: len(tokens)]
        tokens[: len(shared)] = shared
    return (tokens % np.uint64(vocab)).astype(np.int64)


def _noise(seed: int, stream: Any, index: np.ndarray) -> np.ndarray:
    """Uniform uint64 from a counter (splitmix64's finalizer, applied to each key in turn)."""
    value: Any = np.uint64(seed & 0xFFFFFFFF)
    with np.errstate(over="ignore"):
        for key in (stream, index):
            value = value * np.uint64(0x9E3779B97F4A7C15) + np.asarray(key).astype(np.uint64) + np.uint64(1)
            value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            value = value ^ (value >> np.uint64(31))
    return value


class HFEngine:
    """A model served by transformers' continuous batching, as a `Backend`.

    The engine owns the clock: simulated arrivals become visible at the first iteration boundary at or after
    `arrival_s`; when nothing is present time jumps to the next arrival. Decoding is greedy and every request yields
    exactly `output_tokens` tokens. Requests that can never fit (more blocks than the pool, more positions than the
    model, no tokens) are refused on arrival, the others go on. `cached_tokens` of a running request is its hit when
    it was admitted.

    Args:
        spec: limits of the engine. The dense attention mask takes max_batch_tokens x (kv_tokens + max_batch_tokens)
            numbers: keep both moderate.
        model: None for a small random Llama, a local checkpoint folder, or a causal LM (moved to `device`).
        device: "cpu", "cuda", "cuda:1", ...
        clock: "cpu" (CPU seconds of this thread), "wall" or "device" (CUDA events on the compute stream); None for
            "cpu" on a CPU and "device" elsewhere.
        slo_classes: limits by `Workload.slo_class`.
        dtype: of a model loaded from a folder.
        num_threads: torch's compute threads (a "cpu" clock sees only one).

    Raises:
        InputError: if transformers, model, device or memory cannot serve this.
    """

    def __init__(
        self,
        spec: EngineSpec,
        model: Any = None,
        device: str = "cpu",
        clock: str | None = None,
        *,
        slo_classes: tuple[SloClass, ...] = ONE_CLASS,
        dtype: str = "float32",
        num_threads: int = 1,
    ) -> None:
        check_transformers()
        import torch

        is_cpu = torch.device(device).type == "cpu"
        clock = clock or ("cpu" if is_cpu else "device")
        if clock not in ENGINE_CLOCKS or (clock == "device" and is_cpu):
            raise InputError(
                f"clock {clock!r} on device {device!r}", remedy='Use "cpu" or "wall", or "device" with CUDA'
            )
        if not is_cpu and not torch.cuda.is_available():
            raise InputError(f"device {device!r} is not available", remedy='Use device="cpu"')
        torch.set_num_threads(num_threads)
        if model is None:
            model = build_llama()
        elif isinstance(model, str | PathLike):
            model = load_model(model, dtype)
        self.model = model.to(device)
        self.clock = clock
        self.capacity = spec
        self.slo_classes = slo_classes
        text_config = self.model.config.get_text_config()
        self.vocab: int = text_config.vocab_size
        self.max_positions: int = getattr(text_config, "max_position_embeddings", None) or 1 << 40
        self._hf = PagedStepper(
            self.model,
            kv_blocks=spec.kv_blocks,
            block_tokens=spec.block_tokens,
            max_batch_tokens=spec.max_batch_tokens,
            max_running=spec.max_running,
            prefix_cache=spec.prefix_cache,
        )
        self._timer = _timer(clock, self._hf.device_stream)
        self._loaded = False
        self._warm_up()

    # ----------------------------------------------------------------------------------------------- Backend

    def reset(self, workload: Workload, seed: int = 0) -> None:
        """Load a workload and go back to time zero. `seed` draws the prompts. Raises InputError."""
        self._check(workload)
        spec, n = self.capacity, len(workload)
        self.workload, self.seed = workload, seed
        self._prefix = spec.prefix_cache and workload.hash_block_tokens > 0
        self._hf.reset(self._most_tokens_read())
        self._state = empty_state(n)
        self._decision = empty_decision(n)
        self._default = empty_decision(n)
        engine = self._state.engine[0]
        engine["kv_blocks_free"] = engine["kv_blocks_total"] = spec.kv_blocks
        engine["block_tokens"] = spec.block_tokens
        engine["max_batch_tokens"] = spec.max_batch_tokens
        engine["max_running"] = spec.max_running
        engine["prefix_cache"] = int(self._prefix)
        self._num_refused = 0
        self._next_admission = 0
        self._segment_start = np.full(n, -1, np.int64)
        self._segments: list[tuple[int, int, int]] = []
        self._iterations: list[tuple[float, float, int, int, int]] = []
        self._features: list[tuple[float, ...]] = []
        self._hashes_by_id: dict[int, list[int]] = {}
        self._hashes: dict[int, list[int]] = {}  # of the shareable blocks of requests in the system
        self._loaded = True
        self._skip_idle()

    def state(self) -> State:
        """The live State: always with something present, unless the workload is finished."""
        self._require_workload()
        return self._state

    def default_decision(self) -> Decision:
        """This engine's Decision, filled with the default (first come first served)."""
        self._require_workload()
        reset_decision(self._state, self._decision)
        return self._decision

    def step(self, decision: Decision) -> Outcome:
        """One iteration under `decision`. `info["features"]` holds the `COST_FEATURES` of the iteration."""
        self._require_workload()
        if not self._skip_idle():
            return Outcome(0.0, True)
        engine = self._state.engine[0]
        start_s = float(engine["now_s"])
        self._timer.start()
        self._hf.iterate(lambda: self._plan(decision))
        self._book_tokens()
        seconds = self._timer.stop()
        self._pass_time(start_s, seconds)
        self._refresh_cached_tokens()
        info = {"features": self._features[-1], "ignored_ids": self._ignored_ids}
        return Outcome(seconds, not self._skip_idle(), info)

    def timeline(self) -> Timeline:
        """The record of the run so far (copies)."""
        self._require_workload()
        work, n = self.workload, len(self.workload)
        requests = self._state.requests[:n]
        rows = np.array(self._iterations, np.float64).reshape(-1, 5)
        limits = np.array([(c.ttft_s, c.tpot_s, c.weight) for c in self.slo_classes])[work.slo_class]
        return Timeline(
            arrival_s=work.arrival_s.copy(),
            prompt_tokens=work.prompt_tokens.copy(),
            output_tokens=work.output_tokens.copy(),
            slo_class=work.slo_class.copy(),
            ttft_slo_s=limits[:, 0].copy(),
            tpot_slo_s=limits[:, 1].copy(),
            slo_weight=limits[:, 2].copy(),
            refused=requests["status"] == REFUSED,
            preemptions=requests["preemptions"].astype(np.int64),
            iteration_start_s=rows[:, 0].copy(),
            iteration_end_s=rows[:, 1].copy(),
            prefill_tokens=rows[:, 2].astype(np.int64),
            decode_requests=rows[:, 3].astype(np.int64),
            kv_blocks_used=rows[:, 4].astype(np.int64),
            segments=np.array(self._segments, np.int64).reshape(-1, 3),
        )

    def close(self) -> None:
        """Release model and cache. The engine cannot be used afterwards."""
        if hasattr(self, "_hf"):
            self._loaded = False
            self._hf.close()
            del self._hf, self.model

    # ------------------------------------------------------------------------------------------ more records

    def features(self) -> np.ndarray:
        """(I, 7) float64: `COST_FEATURES` of each iteration so far."""
        return np.array(self._features, np.float64).reshape(-1, len(COST_FEATURES))

    def generated_tokens(self, request: int) -> list[int]:
        """Token ids that a request has yielded so far."""
        return self._hf.generated_tokens(request) if request in self._hf.states else []

    # ---------------------------------------------------------------------------------------------- arrivals

    def _check(self, workload: Workload) -> None:
        if len(workload) and not 0 <= int(workload.slo_class.min()) <= int(workload.slo_class.max()) < len(
            self.slo_classes
        ):
            raise InputError(
                f"workload {workload.name!r} has SLO classes {np.unique(workload.slo_class)}, the engine has "
                f"{len(self.slo_classes)}",
                remedy="Pass slo_classes to HFEngine, or assign classes with workload.with_classes(slo_classes)",
            )
        block = workload.hash_block_tokens
        if self.capacity.prefix_cache and block > 0 and block % self.capacity.block_tokens:
            raise InputError(
                f"workload {workload.name!r} hashes blocks of {block} tokens, the engine has blocks of "
                f"{self.capacity.block_tokens}",
                remedy="Convert it with workload.with_block_tokens(spec.block_tokens)",
            )

    def _most_tokens_read(self) -> int:
        """Most tokens of context that one iteration can read: more than the pool holds if prefixes are shared."""
        if not self._prefix:
            return 0
        tokens = self.workload.prompt_tokens + self.workload.output_tokens
        fits = tokens - 1 <= min(self.capacity.kv_tokens, self.max_positions)
        return int(np.sort(tokens[fits])[::-1][: self.capacity.max_running].sum())

    def _require_workload(self) -> None:
        if not self._loaded:
            raise RuntimeError("no workload loaded: call reset(workload) first")

    def _skip_idle(self) -> bool:
        """If nothing is present, jump to the next arrival. False when the workload is finished."""
        engine, arrival_s = self._state.engine[0], self.workload.arrival_s
        self._absorb_arrivals()
        while engine["num_waiting"] + engine["num_running"] == 0:
            if engine["num_arrived"] >= len(arrival_s):
                return False
            engine["now_s"] = max(engine["now_s"], arrival_s[engine["num_arrived"]])
            self._absorb_arrivals()
        return True

    def _absorb_arrivals(self) -> None:
        """Let requests that have arrived by now into the waiting list, or refuse them."""
        engine, work = self._state.engine[0], self.workload
        arrival_s, now_s = work.arrival_s, engine["now_s"]
        request = int(engine["num_arrived"])
        while request < len(arrival_s) and arrival_s[request] <= now_s:
            self._arrive(request)
            request += 1
            engine["num_arrived"] = request

    def _arrive(self, request: int) -> None:
        engine, work, row = self._state.engine[0], self.workload, self._state.requests[request]
        prompt, output = int(work.prompt_tokens[request]), int(work.output_tokens[request])
        slo_class = int(work.slo_class[request])
        limits = self.slo_classes[slo_class]
        row["arrival_s"] = work.arrival_s[request]
        row["prompt_tokens"] = row["prefill_target"] = prompt
        row["predicted_output_tokens"] = work.predicted_output_tokens[request]
        row["first_token_s"] = row["last_token_s"] = np.nan
        row["ttft_slo_s"], row["tpot_slo_s"], row["slo_weight"] = limits.ttft_s, limits.tpot_s, limits.weight
        row["admission"] = -1
        row["slo_class"] = slo_class
        row["priority"], row["client"] = work.priority[request], work.client[request]
        # The last token is never fed back: it needs neither a place in the cache nor a position.
        tokens = prompt + output - 1
        malformed = prompt < 1 or output < 1
        if malformed or self._blocks_for(tokens) > self.capacity.kv_blocks or tokens > self.max_positions:
            row["status"] = REFUSED
            self._num_refused += 1
            note_arrival(self._state, request)
            return
        ids = prompt_token_ids(work, request, self.seed, self.vocab).tolist()
        self._hf.add(request, ids, output)
        if self._prefix:
            self._hashes[request] = self._shareable_hashes(request, ids)
            row["cached_tokens"] = self._cached_tokens(request, 0)
        row["status"] = WAITING
        note_arrival(self._state, request)
        self._state.waiting[engine["num_waiting"]] = request
        engine["num_waiting"] += 1

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.capacity.block_tokens)

    def _shareable_hashes(self, request: int, ids: list[int]) -> list[int]:
        """Hashes of the engine blocks that the request's hash ids cover, computed once for each hash id."""
        work, block = self.workload, self.workload.hash_block_tokens
        hashes: list[int] = []
        first, last = int(work.hash_offsets[request]), int(work.hash_offsets[request + 1])
        for place, hash_id in enumerate(work.hash_ids[first:last].tolist()):
            of_id = self._hashes_by_id.get(hash_id)
            if of_id is None:
                tokens = ids[place * block : (place + 1) * block]
                of_id = chain_block_hashes(hashes[-1] if hashes else None, tokens, self.capacity.block_tokens)
                self._hashes_by_id[hash_id] = of_id
            hashes += of_id
        return hashes

    def _most_hit_blocks(self, request: int) -> int:
        """Blocks that a prefix hit may cover: what is shareable, less the last token."""
        target = int(self._state.requests[request]["prefill_target"])
        return min(len(self._hashes[request]), (target - 1) // self.capacity.block_tokens)

    def _cached_tokens(self, request: int, recent: int) -> int:
        """The prefix-cache hit of a waiting request, in tokens, given a recent answer."""
        size = self.capacity.block_tokens
        most = self._most_hit_blocks(request)
        return size * self._hf.count_cached_prefix(self._hashes[request], most, recent // size)

    def _refresh_cached_tokens(self) -> None:
        if self._prefix:
            hits = self._state.requests["cached_tokens"]
            for request in self._state.waiting[: self._state.engine[0]["num_waiting"]].tolist():
                hits[request] = self._cached_tokens(request, int(hits[request]))

    # ------------------------------------------------------------------------------------- one iteration

    def _plan(self, decision: Decision) -> list:
        """Steps 0 to 3 of an iteration (see `state.py`). Returns the batch, in order of admission."""
        state, engine, hf = self._state, self._state.engine[0], self._hf
        self._ignored_ids = 0
        self._free = int(engine["kv_blocks_free"])
        levers = decision.levers[0]
        for request in decision.preempt[: levers["num_preempt"]].tolist():
            self._preempt_running(request)
        self._place_decodes()
        chunks = self._hand_out_prefill(decision)
        if not chunks and engine["num_decoding"] == 0:
            reset_decision(state, self._default)
            chunks = self._hand_out_prefill(self._default)
        engine["kv_blocks_free"] = self._free

        running = state.running[: engine["num_running"]]
        computed = state.requests["computed_tokens"][running]
        decoding = computed >= state.requests["prefill_target"][running]
        batch, prefill, query_context, context = [], 0, 0, 0
        for request, is_decoding, before in zip(running.tolist(), decoding.tolist(), computed.tolist(), strict=True):
            if is_decoding:
                batch.append(hf.schedule_decode(request))
            elif tokens := chunks.get(request, 0):
                after = before + tokens
                batch.append(hf.schedule_prefill(request, tokens, self._newly_shareable(request, before, after)))
                prefill += tokens
                context += after
                query_context += tokens * after
        decodes = int(engine["num_decoding"])
        decode_context = int(computed[decoding].sum()) + decodes
        context += decode_context
        self._chunks, self._decoding = chunks, running[decoding]
        query_kv = (prefill + decodes) * context
        self._features.append((1.0, prefill, decodes, decode_context, query_context, query_kv, float(prefill > 0)))
        return batch

    def _newly_shareable(self, request: int, before: int, after: int) -> int:
        """Shareable blocks that a chunk from `before` to `after` computed tokens completes."""
        if not self._prefix:
            return 0
        size, most = self.capacity.block_tokens, len(self._hashes[request])
        return min(after // size, most) - min(before // size, most)

    def _place_decodes(self) -> None:
        """Give every decode a block for its token, preempting the last admitted when blocks run out."""
        engine, requests = self._state.engine[0], self._state.requests
        running = self._state.running[: engine["num_running"]]
        computed = requests["computed_tokens"][running]
        is_short = (computed >= requests["prefill_target"][running]) & (
            computed == requests["kv_blocks"][running] * self.capacity.block_tokens
        )
        for place in np.flatnonzero(is_short).tolist():
            while self._free == 0 and place < engine["num_running"]:
                self._preempt(int(engine["num_running"]) - 1)
            if place >= engine["num_running"]:
                return
            request = int(running[place])
            self._hf.grow(request)
            self._free -= 1
            requests["kv_blocks"][request] += 1

    def _hand_out_prefill(self, decision: Decision) -> dict[int, int]:
        """Prefill tokens by request: incomplete prefills, then picks, then the rest, as the levers say."""
        state, engine = self._state, self._state.engine[0]
        requests, levers = state.requests, decision.levers[0]
        chunk, most_running = int(levers["chunk_tokens"]), min(int(levers["max_running"]), self.capacity.max_running)
        num_running = int(engine["num_running"])
        budget = min(int(levers["prefill_tokens"]), self.capacity.max_batch_tokens - int(engine["num_decoding"]))
        left = budget
        chunks: dict[int, int] = {}
        if num_running > engine["num_decoding"]:
            running = state.running[:num_running]
            to_compute = requests["prefill_target"][running] - requests["computed_tokens"][running]
            for place in np.flatnonzero(to_compute > 0).tolist():
                tokens = min(int(to_compute[place]), left, chunk)
                if tokens <= 0:
                    break
                chunks[int(running[place])] = tokens
                left -= tokens
        num_waiting = int(engine["num_waiting"])
        order = decision.order[: levers["num_order"]].tolist()
        num_listed = len(order)
        if levers["admit_rest"] and num_waiting:
            # The rest is looked at one by one, and rarely far: do not copy a long list.
            order = _Chained(order, state.waiting[:num_waiting])
        admitted = False
        for place, request in enumerate(order):
            if left <= 0 or engine["num_running"] >= most_running:
                break
            if not 0 <= request < engine["num_arrived"] or requests["status"][request] != WAITING:
                self._ignored_ids += place < num_listed
                continue
            tokens = self._admit(request, levers, left, left == budget)
            if tokens < 0:
                break
            admitted = True
            tokens = min(tokens, left, chunk)
            if tokens > 0:
                chunks[request] = tokens
                left -= tokens
        if admitted:
            waiting = state.waiting[:num_waiting]
            waiting = waiting[requests["status"][waiting] == WAITING]
            state.waiting[: len(waiting)] = waiting
            engine["num_waiting"] = len(waiting)
        return chunks

    def _admit(self, request: int, levers: np.void, left: int, is_first_prefill: bool) -> int:
        """Try to admit a waiting request. Returns the tokens it has to compute, or -1 if admission ends here."""
        engine, row, hf = self._state.engine[0], self._state.requests[request], self._hf
        target = int(row["prefill_target"])
        prefix = hf.cached_prefix(self._hashes[request][: self._most_hit_blocks(request)]) if self._prefix else []
        hit_tokens = len(prefix) * self.capacity.block_tokens
        to_compute = target - hit_tokens
        if levers["whole_prompts"] and to_compute > left and not is_first_prefill:
            return -1
        num_idle = hf.count_idle(prefix)
        new_blocks = self._blocks_for(target) - len(prefix)
        reserve = int(levers["kv_reserve_blocks"]) if engine["num_running"] > 0 else 0
        if new_blocks + reserve > self._free - num_idle:
            return -1
        hf.admit(request, prefix)
        self._free -= num_idle + new_blocks
        row["kv_blocks"] = len(prefix) + new_blocks
        row["cached_tokens"] = row["computed_tokens"] = hit_tokens
        row["status"] = RUNNING
        row["admission"] = self._next_admission
        self._next_admission += 1
        self._state.running[engine["num_running"]] = request
        engine["num_running"] += 1
        return to_compute

    def _preempt_running(self, request: int) -> None:
        """Preempt the running request with this id, if there is one."""
        places = np.flatnonzero(self._state.running[: self._state.engine[0]["num_running"]] == request)
        if len(places):
            self._preempt(int(places[0]))
        else:
            self._ignored_ids += 1

    def _preempt(self, place: int) -> None:
        """Preempt the running request at this place of the running list: to the front of the waiting list."""
        state, engine = self._state, self._state.engine[0]
        request = int(state.running[place])
        num_running, num_waiting = int(engine["num_running"]), int(engine["num_waiting"])
        state.running[place : num_running - 1] = state.running[place + 1 : num_running].copy()
        state.waiting[1 : num_waiting + 1] = state.waiting[:num_waiting].copy()
        state.waiting[0] = request
        engine["num_running"] = num_running - 1
        engine["num_waiting"] = num_waiting + 1
        engine["num_preemptions"] += 1
        row = state.requests[request]
        if row["computed_tokens"] >= row["prefill_target"]:
            engine["num_decoding"] -= 1
        self._close_segment(request)
        self._hf.preempt(request)
        self._free = self._hf.free_blocks
        row["status"] = WAITING
        row["preemptions"] += 1
        row["kv_blocks"] = row["computed_tokens"] = row["cached_tokens"] = 0
        row["prefill_target"] = row["prompt_tokens"] + row["generated_tokens"]

    def _close_segment(self, request: int) -> None:
        start = int(self._segment_start[request])
        if start >= 0:
            self._segments.append((request, start, int(self._state.engine[0]["iterations"]) - start))
            self._segment_start[request] = -1

    def _book_tokens(self) -> None:
        """Step 4: a token for each decode and each completed prefill; the finished leave."""
        engine, requests = self._state.engine[0], self._state.requests
        decoding = self._decoding
        self._blocks_used = self.capacity.kv_blocks - int(engine["kv_blocks_free"])
        requests["computed_tokens"][decoding] += 1
        self._completed: list[int] = []
        for request, tokens in self._chunks.items():
            row = requests[request]
            row["computed_tokens"] += tokens
            if row["computed_tokens"] >= row["prefill_target"]:
                self._completed.append(request)
        engine["num_decoding"] += len(self._completed)
        self._segment_start[self._completed] = engine["iterations"]
        self._yielding = np.concatenate((decoding, np.array(self._completed, np.int64)))
        requests["generated_tokens"][self._yielding] += 1
        engine["iterations"] += 1
        is_over = requests["generated_tokens"][self._yielding] >= self.workload.output_tokens[self._yielding]
        if is_over.any():
            over = self._yielding[is_over]
            requests["status"][over] = FINISHED
            requests["kv_blocks"][over] = 0
            running = self._state.running[: engine["num_running"]]
            is_over = requests["status"][running] == FINISHED
            for request in running[is_over].tolist():
                if not self._hf.is_finished(request):
                    raise RuntimeError(f"request {request} has all its tokens, but transformers goes on with it")
                self._close_segment(request)
                self._hashes.pop(request, None)
            kept = running[~is_over]
            self._state.running[: len(kept)] = kept
            engine["num_running"] = len(kept)
            engine["num_decoding"] -= len(over)
            engine["num_finished"] += len(over)
        engine["kv_blocks_free"] = self._hf.free_blocks

    def _pass_time(self, start_s: float, seconds: float) -> None:
        engine, requests = self._state.engine[0], self._state.requests
        end_s = start_s + seconds
        engine["now_s"] = end_s
        engine["last_iteration_s"] = seconds
        engine["ema_iteration_s"] = (
            seconds if engine["iterations"] == 1 else 0.9 * engine["ema_iteration_s"] + 0.1 * seconds
        )
        requests["last_token_s"][self._yielding] = end_s
        for request in self._completed:
            if requests["generated_tokens"][request] == 1:
                requests["first_token_s"][request] = end_s
        prefill, decodes = self._features[-1][1:3]
        self._iterations.append((start_s, end_s, int(prefill), int(decodes), self._blocks_used))

    def _warm_up(self) -> None:
        """Run a few small iterations, so that the first ones measured do not pay for lazy set-up."""
        spec = self.capacity
        tokens = max(1, min(3 * spec.block_tokens, spec.max_batch_tokens, spec.kv_blocks * spec.block_tokens - 4))
        n = min(2, spec.max_running)
        self.reset(
            Workload.from_arrays("warm-up", np.zeros(n), np.full(n, tokens), np.full(n, 4), slo_class=np.zeros(n))
        )
        done = False
        while not done:
            done = self.step(self.default_decision()).done
        self._hf.reset()
        self._loaded = False


class _Chained:
    """The picks, then the waiting list, as Python ints, without copying the list."""

    def __init__(self, picks: list[int], waiting: np.ndarray) -> None:
        self._picks, self._waiting = picks, waiting

    def __iter__(self):
        yield from self._picks
        for request in self._waiting:
            yield int(request)


class _HostTimer:
    """Seconds of one of Python's clocks."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now

    def start(self) -> None:
        self._start = self._now()

    def stop(self) -> float:
        return self._now() - self._start


class _DeviceTimer:
    """Seconds between two CUDA events on the compute stream, so that host work between them counts, too."""

    def __init__(self, stream: Any) -> None:
        import torch

        self._stream = stream
        self._first, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self._first.record(self._stream)

    def stop(self) -> float:
        self._last.record(self._stream)
        self._last.synchronize()
        return self._first.elapsed_time(self._last) / 1e3


def _timer(clock: str, stream: Any) -> _HostTimer | _DeviceTimer:
    if clock == "device":
        return _DeviceTimer(stream)
    return _HostTimer(time.thread_time if clock == "cpu" else time.perf_counter)
