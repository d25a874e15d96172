"""Every private call into transformers' continuous batching, in one place, for one minor release.

The engine in `hf.py` says *what* happens to which request; the verbs here (`add`, `admit`, `grow`, `preempt`,
`schedule_decode`, `schedule_prefill`, `iterate`) do it to transformers' own scheduler, paged cache and batch
processor. None of that is a public interface and most of it changes between minor releases, so `check_transformers`
looks for every name used here at start-up, and a canary test compares greedy tokens with `model.generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from ..envs.core.errors import InputError

SUPPORTED_RELEASE = "5.19"
SCHEDULER_NAME = "schedlab"

_REQUIRED = {
    "continuous_api.ContinuousBatchingManager": ("_create_batch_processor", "destroy"),
    "continuous_api.ContinuousBatchProcessor": ("prepare_next_batch", "_generation_step", "update_batch", "reset"),
    "continuous_api.OutputRouter": ("deliver_batch",),
    "scheduler.Scheduler": ("reset", "schedule_batch", "finish_request", "_schedule_request"),
    "requests.RequestState": ("create_equivalent_initial_request", "to_generation_output", "current_len"),
    "requests.RequestStatus": ("PENDING", "PREFILLING", "DECODING", "FINISHED"),
    "requests.FutureRequestState": ("state", "has_new_token", "complete_blocks", "query_length"),
    "input_outputs.ContinuousBatchingIOs": ("_setup_static_tensors",),
    "requests.get_device_and_memory_breakdown": (),
    "cache.PagedAttentionCache": ("can_store_request_tokens", "free_blocks", "mark_complete_blocks", "reset"),
    "cache_allocators.FullAttentionCacheAllocator": ("acquire_prefix_blocks", "mark_complete_blocks"),
    "cache_allocators.CachePool": ("count_free_blocks", "free_blocks", "num_free_sectors"),
    "cache_allocators.cache_allocator.BlockLedger": ("acquire", "release", "register_new_hash"),
    "cache_allocators.cache_allocator.compute_block_hash": (),
    "scheduler.SCHEDULER_MAPPING": (),
}
"""Names under transformers.generation.continuous_batching and the attributes of theirs that are used here."""


def check_transformers() -> None:
    """Make sure the installed transformers is the one this module was written for. Raises InputError."""
    import importlib

    remedy = f"Install it with: pip install 'transformers>={SUPPORTED_RELEASE},<{_next_release()}'"
    try:
        import transformers
    except ImportError as error:
        raise InputError("the Hugging Face engine needs transformers, which is not installed", remedy=remedy) from error
    if transformers.__version__.split(".")[:2] != SUPPORTED_RELEASE.split("."):
        raise InputError(
            f"transformers {transformers.__version__} is installed, the engine is written for {SUPPORTED_RELEASE}",
            remedy=remedy,
        )
    for path, attributes in _REQUIRED.items():
        module_name, name = path.rsplit(".", 1)
        try:
            module = importlib.import_module(f"transformers.generation.continuous_batching.{module_name}")
            found = getattr(module, name)
        except (ImportError, AttributeError) as error:
            raise InputError(f"transformers {transformers.__version__} has no {path}", remedy=remedy) from error
        missing = [a for a in attributes if not hasattr(found, a)]
        if missing:
            raise InputError(f"transformers {transformers.__version__}: {path} lacks {missing}", remedy=remedy)


def _next_release() -> str:
    major, minor = SUPPORTED_RELEASE.split(".")
    return f"{major}.{int(minor) + 1}"


@lru_cache(maxsize=1)
def _scheduler_class() -> type:
    """The scheduler that executes a plan made elsewhere, registered under `SCHEDULER_NAME`."""
    from transformers.generation.continuous_batching.requests import RequestStatus
    from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, Scheduler

    class PlannedScheduler(Scheduler):
        """Runs exactly the batch that `plan()` returns; picks, budgets and evicts nothing itself."""

        def __init__(self, cache: Any, safety_margin: float | None, max_requests_per_batch: int) -> None:
            super().__init__(cache, 0.0, max_requests_per_batch)

        def reset(self) -> None:
            super().reset()
            self.plan: Callable[[], list] = list
            self.batch_by_id: dict[str, Any] = {}

        def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[list, bool, int, int]:
            batch = self.plan()
            self.batch_by_id = {item.state.request_id: item for item in batch if item.complete_blocks}
            num_query_tokens = sum(item.query_length for item in batch)
            tokens_read = sum(item.state.position_offset for item in batch)
            return batch, False, num_query_tokens, tokens_read

        def finish_request(self, request_id: str) -> None:
            item = self.batch_by_id.get(request_id)
            if item is not None and item.state.status == RequestStatus.FINISHED:
                # transformers does not register the blocks of a request that ends with its prefill: do it here,
                # or prompts with one output token would never be shared.
                state = item.state
                for name, count in item.complete_blocks.items():
                    allocator = self.cache.cache_allocators[name]
                    allocator.mark_complete_blocks(request_id, state.initial_tokens + state.generated_tokens, count)
            release_last_block_first(self.cache, request_id)
            self.active_requests.pop(request_id, None)

    SCHEDULER_MAPPING[SCHEDULER_NAME] = PlannedScheduler
    return PlannedScheduler


def release_last_block_first(cache: Any, request_id: str) -> None:
    """Drop a request's references so that, in the order of eviction, a block comes before its predecessor.

    transformers releases the first block first; evicted in that order, a cached prefix would lose its head first and
    the rest of it would be out of reach.
    """
    for allocator in cache.cache_allocators.values():
        table = allocator.block_table.get(request_id)
        if table is not None:
            table.reverse()
    cache.free_blocks(request_id)


def chain_block_hashes(parent: int | None, tokens: Sequence[int], block_tokens: int) -> list[int]:
    """transformers' hashes of the full blocks of `tokens`, chained from the hash of the block before (or None)."""
    from transformers.generation.continuous_batching.cache_allocators.cache_allocator import compute_block_hash

    hashes = []
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = compute_block_hash(parent, list(tokens[start : start + block_tokens]))
        hashes.append(parent)
    return hashes


class PagedStepper:
    """A model behind transformers' paged batch processor, stepped by hand: no thread, no queue.

    Request ids are integers. Blocks are *unused* (hold nothing), *cached* (hold a shareable prefix that nobody
    references) or referenced; unused and cached blocks are free.

    Args:
        model: a causal LM with full attention in every layer, on its device.
        kv_blocks, block_tokens, max_batch_tokens, max_running: as in `EngineSpec`.
        prefix_cache: share full blocks by content.

    Raises:
        InputError: if transformers, the model or the memory cannot serve this.
    """

    def __init__(
        self,
        model: Any,
        *,
        kv_blocks: int,
        block_tokens: int,
        max_batch_tokens: int,
        max_running: int,
        prefix_cache: bool,
    ) -> None:
        check_transformers()
        _scheduler_class()
        import torch
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
        from transformers.generation.continuous_batching.requests import (
            FutureRequestState,
            RequestState,
            RequestStatus,
        )

        self._torch, self._future, self._request_state, self._status = (
            torch,
            FutureRequestState,
            RequestState,
            RequestStatus,
        )
        if block_tokens < 4:
            raise InputError(
                f"EngineSpec.block_tokens is {block_tokens}, transformers wants at least 4 tokens a block",
                remedy="Raise block_tokens",
            )
        # do_sample=False: greedy. eos -1: never stop before the length that the workload asks for.
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
        config = ContinuousBatchingConfig(
            page_size=block_tokens,
            num_blocks=kv_blocks,
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=max_running,
            max_blocks_per_request=0,  # the decode fast path belongs to flash kernels
            allow_block_sharing=prefix_cache,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
            cpu_offload_space=0.0,
            scheduler_type=SCHEDULER_NAME,
            safety_margin=0.0,
            seed=0,
        )
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)
        self.manager = ContinuousBatchingManager(model, generation, config)
        try:
            with torch.random.fork_rng(devices=[]):  # transformers seeds the global generator
                self.processor = self.manager._create_batch_processor()
        except MemoryError as error:
            mask_gb = max_batch_tokens * (kv_blocks * block_tokens + max_batch_tokens) * model.dtype.itemsize / 1e9
            raise InputError(
                f"{kv_blocks} blocks of {block_tokens} tokens and batches of {max_batch_tokens} tokens do not fit into "
                f"memory ({error}; the dense attention mask alone takes {mask_gb:.1f} GB)",
                remedy="Lower EngineSpec.kv_blocks or max_batch_tokens",
            ) from error
        self.model = model
        self.device_stream = self.processor.inputs_and_outputs.compute_stream
        self.scheduler = self.processor.scheduler
        self.cache = self.processor.cache
        if list(self.cache.cache_allocators) != ["full_attention"]:
            raise InputError(
                f"the model has attention layers of types {list(self.cache.cache_allocators)}",
                remedy="Use a model with full attention in every layer (Llama, SmolLM2, Qwen2, ...)",
            )
        self.block_tokens = block_tokens
        self.allocator = self.cache.cache_allocators["full_attention"]
        self.ledger, self.pool = self.allocator.ledger, self.cache.pool
        # The pool is cut into sectors of at least 128 bytes and rounded up: blocks beyond kv_blocks are never used.
        self._surplus_blocks = self.allocator.num_blocks - kv_blocks
        # Finished requests stay in `states`; nobody reads the output queue, so do not let it grow.
        self.processor.output_router.deliver_batch = lambda outputs: None
        self.states: dict[int, Any] = {}

    def reset(self, tokens_read: int = 0) -> None:
        """Forget all requests and the contents of the cache, and make room to read `tokens_read` tokens at once.

        transformers sizes its read indices and its mask for each cached token being read once in an iteration;
        requests that share a prefix read it once each. Raises InputError if memory does not suffice.
        """
        if tokens_read > self.cache.max_tokens_read:
            self._grow_inputs(tokens_read)
        self.processor.reset()
        self.cache.reset()
        self.states.clear()

    def _grow_inputs(self, tokens_read: int) -> None:
        from transformers.generation.continuous_batching.requests import get_device_and_memory_breakdown

        inputs = self.processor.inputs_and_outputs
        columns = tokens_read + self.cache.max_batch_tokens
        num_bytes = columns * (self.cache.max_batch_tokens * self.model.dtype.itemsize + 8)
        _, total, reserved, allocated = get_device_and_memory_breakdown()
        if num_bytes > 0.9 * (total - max(reserved, allocated)):
            raise InputError(
                f"requests that share prefixes may read {tokens_read} tokens in an iteration: their attention mask "
                f"takes {num_bytes / 1e9:.1f} GB",
                remedy="Lower EngineSpec.max_running or max_batch_tokens, or use a workload of shorter requests",
            )
        self.cache.max_tokens_read = tokens_read
        inputs.attention_mask = None  # free the old one first
        inputs._setup_static_tensors(self.processor.logit_processor)

    def close(self) -> None:
        """Let go of the cache and of transformers' manager."""
        self.states.clear()
        self.manager.destroy()
        del self.processor, self.scheduler, self.cache, self.allocator, self.ledger, self.pool, self.manager

    # ------------------------------------------------------------------------------------------------ blocks

    @property
    def unused_blocks(self) -> int:
        """Blocks that hold nothing."""
        pool, allocator = self.pool, self.allocator
        in_sectors = pool.num_free_sectors * allocator.blocks_per_sector
        return pool.count_free_blocks(allocator.index) + in_sectors - self._surplus_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody references: unused, or cached."""
        return self.unused_blocks + len(self.ledger.cached_blocks)

    def cached_prefix(self, hashes: Sequence[int]) -> list[int]:
        """Blocks in the cache (idle or in use) that hold the longest prefix of this chain of hashes."""
        blocks = []
        lookup = self.ledger.hash_to_block
        for block_hash in hashes:
            block = lookup.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_cached_prefix(self, hashes: Sequence[int], most: int, start: int = 0) -> int:
        """Length of `cached_prefix(hashes[:most])`, searched up or down from `start`, a recent answer.

        Right because a block's predecessors are always cached as long as it is (see `hf.py`).
        """
        lookup = self.ledger.hash_to_block
        hit = min(start, most)
        while hit > 0 and hashes[hit - 1] not in lookup:
            hit -= 1
        while hit < most and hashes[hit] in lookup:
            hit += 1
        return hit

    def count_idle(self, blocks: Sequence[int]) -> int:
        """How many of these blocks nobody references."""
        idle = self.ledger.cached_blocks
        return sum(block in idle for block in blocks)

    def _make_room(self, num_blocks: int) -> None:
        """Evict cached blocks, least recently used first, until `num_blocks` are unused.

        transformers itself only knows how to drop all cached blocks at once.
        """
        missing = num_blocks - self.unused_blocks
        if missing <= 0:
            return
        ledger = self.ledger
        evicted = list(islice(ledger.cached_blocks, missing))
        for block in evicted:
            del ledger.cached_blocks[block]
            del ledger.hash_to_block[ledger.block_to_hash.pop(block)]
        self.pool.free_blocks(self.allocator.index, evicted)

    # ---------------------------------------------------------------------------------------------- requests

    def add(self, request: int, tokens: list[int], max_new_tokens: int) -> None:
        """Let a request wait."""
        state = self._request_state(
            request_id=str(request), initial_tokens=tokens, max_new_tokens=max_new_tokens, eos_token_id=-1
        )
        self.states[request] = state
        self.scheduler.waiting_requests[state.request_id] = state

    def admit(self, request: int, prefix: list[int]) -> None:
        """Reserve all blocks of a waiting request's prompt, the first of them being the cached blocks `prefix`."""
        state = self.states[request]
        if prefix:
            hit_tokens = len(prefix) * self.block_tokens
            self.allocator.acquire_prefix_blocks(state.request_id, hit_tokens, prefix)
            state.remaining_prefill_tokens = state.remaining_prefill_tokens[hit_tokens:]
            state.position_offset += hit_tokens
        state.status = self._status.PREFILLING
        del self.scheduler.waiting_requests[state.request_id]
        self.scheduler.active_requests[state.request_id] = state
        self._reserve(state, len(state.remaining_prefill_tokens))

    def grow(self, request: int) -> None:
        """Give a decoding request the block for its next token."""
        self._reserve(self.states[request], 1)

    def _reserve(self, state: Any, num_tokens: int) -> None:
        self._make_room(self.allocator.needs_new_blocks(state.request_id, state.current_len(), num_tokens))
        if not self.cache.can_store_request_tokens(state, num_tokens):
            raise RuntimeError(f"no room for {num_tokens} tokens of request {state.request_id}: the books are wrong")

    def preempt(self, request: int) -> None:
        """Take an active request's blocks; it waits again, its tokens so far having become part of its prompt."""
        state = self.states[request]
        release_last_block_first(self.cache, state.request_id)
        del self.scheduler.active_requests[state.request_id]
        state = state.create_equivalent_initial_request()
        self.states[request] = state
        self.scheduler.waiting_requests[state.request_id] = state

    def generated_tokens(self, request: int) -> list[int]:
        """Token ids that a request has yielded so far, over all its preemptions."""
        return self.states[request].to_generation_output().generated_tokens

    def is_finished(self, request: int) -> bool:
        """True once transformers has ended the request."""
        return self.states[request].status == self._status.FINISHED

    # --------------------------------------------------------------------------------------------- iteration

    def schedule_decode(self, request: int) -> Any:
        """The batch entry of a request's next token."""
        return self._future(self.states[request], True, {}, 1)

    def schedule_prefill(self, request: int, num_tokens: int, new_shared_blocks: int) -> Any:
        """The batch entry of a prefill chunk, after which `new_shared_blocks` more blocks become shareable."""
        state = self.states[request]
        self.scheduler._schedule_request(state, state.remaining_prefill_tokens, num_tokens, set())
        complete = {"full_attention": new_shared_blocks} if new_shared_blocks else {}
        return self._future(state, not state.remaining_prefill_tokens, complete, num_tokens)

    def iterate(self, plan: Callable[[], list]) -> None:
        """One forward pass over the batch that `plan()` makes. `plan` may admit, grow and preempt."""
        self.scheduler.plan = plan
        with self._torch.no_grad():
            if not self.processor.prepare_next_batch():
                raise RuntimeError("the plan was empty")
            self.processor._generation_step(self.model)
            self.processor.update_batch()
