"""The serving engine, simulated: numba kernels over plain arrays. `state.py` says what one iteration does.

`Sim` holds one engine: what a policy may see (`state`), what it may not (the trace, the prefix cache's books), and
the record of the run. Kernels change it in place. Iterations in which nothing can change (no request waits, none
finishes, no block runs out) are executed together by `fast_forward`, with the same result as one by one.

Prefix cache (after vLLM's and Hugging Face's block managers): a full prompt block becomes shareable at the end of the
iteration that computed it. Blocks are reference counted; those that nobody references stay cached, count as free, and
are evicted least recently used first. A request's blocks are released last first, so that a cached block's
predecessors are always cached too. At least one prompt token is always computed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import types

from ..core.errors import InputError
from ..core.interface import Outcome
from ..core.kernel import UNCOUNTED, njit, njit_borrowed, njit_inlined
from .rule import Rule
from .spec import RequestSchedulingSpec
from .state import (
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
from .timeline import Timeline
from .workload import Workload

TRACE_DTYPE = np.dtype(
    [
        ("arrival_s", "f8"),
        ("prompt_tokens", "i8"),
        ("output_tokens", "i8"),
        ("predicted_output_tokens", "f8"),
        ("ttft_slo_s", "f8"),
        ("tpot_slo_s", "f8"),
        ("slo_weight", "f8"),
        ("slo_class", "i4"),
        ("priority", "i4"),
        ("client", "i4"),
        ("pad", "i4"),
    ],
    align=True,
)

BOOKS_DTYPE = np.dtype(
    [
        ("num_requests", "i8"),
        ("num_refused", "i8"),
        ("next_admission", "i8"),
        ("blocks_unused", "i8"),  # free blocks that hold nothing
        ("blocks_idle", "i8"),  # free blocks that hold a cached prefix
        ("decode_context", "i8"),  # tokens that the next iteration's decodes read; -1: to be counted
        ("num_full", "i8"),
        ("num_segments", "i8"),
        ("recording", "i8"),
        ("latency_s", "f8"),  # sum over requests of time in the system so far: ends as the sum of E2E latencies
        ("ttft_s", "f8"),  # sum of times to first token so far
        ("slo_met", "f8"),  # weight of finished requests that met both limits
        ("ttft_met", "f8"),  # weight of requests whose first token was in time
    ],
    align=True,
)


memmove = types.ExternalFunction("memmove", types.voidptr(types.voidptr, types.voidptr, types.uintp))
"""The C library's: destination, source, bytes."""


class Sim(NamedTuple):
    """One simulated engine. N requests, H distinct prompt blocks, P hash positions."""

    state: State
    trace: np.ndarray  # (N,) TRACE_DTYPE, the future
    cost: np.ndarray  # (7,) float64 seconds, spec.COST_FEATURES
    books: np.ndarray  # (1,) BOOKS_DTYPE
    hash_offsets: np.ndarray  # (N + 1,) int64
    hash_ids: np.ndarray  # (P,) int64
    hash_held: np.ndarray  # (P,) bool: this request references the cached copy of this block
    block_refs: np.ndarray  # (H,) int64
    block_cached: np.ndarray  # (H,) bool
    lru: np.ndarray  # (H + 1, 2) int64: previous, next in the ring of idle blocks; entry H is the sentinel
    segment_start: np.ndarray  # (N,) int64: first iteration of the open token segment
    prefilling: np.ndarray  # (N,) int64: the running requests that do not decode yet, in order of admission
    chunk: np.ndarray  # (N,) int64: prefill tokens in this iteration
    tokens_left: np.ndarray  # (N,) int64: output tokens still to come
    full: np.ndarray  # (N,) int64: decoding requests whose last block is full, the first books.num_full
    segments: np.ndarray  # (S, 3) int64, Timeline.segments (only if recording)
    iteration_start_s: np.ndarray  # (I,) float64 (only if recording)
    iteration_end_s: np.ndarray  # (I,) float64
    iteration_stats: np.ndarray  # (I, 3) int64: prefill tokens, decodes, blocks in use


# ---------------------------------------------------------------------------------------------- prefix cache


@njit_borrowed
def _lru_remove(sim: Sim, block: int) -> None:
    before, after = sim.lru[block, 0], sim.lru[block, 1]
    sim.lru[before, 1] = after
    sim.lru[after, 0] = before
    sim.books[0].blocks_idle -= 1


@njit_borrowed
def _lru_append(sim: Sim, block: int) -> None:
    sentinel = len(sim.lru) - 1
    last = sim.lru[sentinel, 0]
    sim.lru[last, 1] = block
    sim.lru[block, 0] = last
    sim.lru[block, 1] = sentinel
    sim.lru[sentinel, 0] = block
    sim.books[0].blocks_idle += 1


@njit_borrowed
def _take_blocks(sim: Sim, count: int) -> None:
    """Take free blocks: unused ones first, then cached ones, least recently used first."""
    books = sim.books[0]
    sim.state.engine[0].kv_blocks_free -= count
    unused = min(count, books.blocks_unused)
    books.blocks_unused -= unused
    for _ in range(count - unused):
        block = sim.lru[len(sim.lru) - 1, 1]
        _lru_remove(sim, block)
        sim.block_cached[block] = False


@njit_borrowed
def refresh_cached_tokens(sim: Sim, request: int) -> None:
    """Set `cached_tokens` of a waiting request to what the prefix cache holds now.

    A cached block's predecessors are cached too, so the hit grows or shrinks from where it was.
    """
    row = sim.state.requests[request]
    first = sim.hash_offsets[request]
    block_tokens = sim.state.engine[0].block_tokens
    target = row.prompt_tokens + row.generated_tokens
    most = min(sim.hash_offsets[request + 1] - first, (target - 1) // block_tokens)
    hit = min(row.cached_tokens // block_tokens, most)
    while hit > 0 and not sim.block_cached[sim.hash_ids[first + hit - 1]]:
        hit -= 1
    while hit < most and sim.block_cached[sim.hash_ids[first + hit]]:
        hit += 1
    row.cached_tokens = hit * block_tokens


@njit_borrowed
def _share_computed_blocks(sim: Sim, request: int, before: int, after: int) -> None:
    """Make the prompt blocks filled by computing tokens before..after shareable."""
    engine, books = sim.state.engine[0], sim.books[0]
    block_tokens = engine.block_tokens
    first = sim.hash_offsets[request]
    last = min(sim.hash_offsets[request + 1], first + after // block_tokens)
    for position in range(first + before // block_tokens, last):
        block = sim.hash_ids[position]
        if not sim.block_cached[block]:
            sim.block_cached[block] = True
            sim.block_refs[block] = 1
            sim.hash_held[position] = True
        else:  # another request computed it in the meantime: adopt its copy, give ours back
            if sim.block_refs[block] == 0:
                _lru_remove(sim, block)
                engine.kv_blocks_free -= 1
            sim.block_refs[block] += 1
            sim.hash_held[position] = True
            books.blocks_unused += 1
            engine.kv_blocks_free += 1


@njit_borrowed
def _release_blocks(sim: Sim, request: int) -> None:
    row = sim.state.requests[request]
    engine, books = sim.state.engine[0], sim.books[0]
    private = row.kv_blocks
    for position in range(sim.hash_offsets[request + 1] - 1, sim.hash_offsets[request] - 1, -1):
        if sim.hash_held[position]:
            sim.hash_held[position] = False
            private -= 1
            block = sim.hash_ids[position]
            sim.block_refs[block] -= 1
            if sim.block_refs[block] == 0:
                _lru_append(sim, block)
                engine.kv_blocks_free += 1
    books.blocks_unused += private
    engine.kv_blocks_free += private
    row.kv_blocks = 0


# ------------------------------------------------------------------------------------------ arrivals, tokens


@njit_borrowed
def absorb_arrivals(sim: Sim) -> None:
    """Let requests that have arrived by now into the waiting list, or refuse those that can never fit."""
    engine, books = sim.state.engine[0], sim.books[0]
    while engine.num_arrived < books.num_requests:
        request = engine.num_arrived
        trace = sim.trace[request]
        if trace.arrival_s > engine.now_s:
            break
        row = sim.state.requests[request]
        row.arrival_s = trace.arrival_s
        row.prompt_tokens = trace.prompt_tokens
        row.predicted_output_tokens = trace.predicted_output_tokens
        row.prefill_target = trace.prompt_tokens
        row.computed_tokens = 0
        row.generated_tokens = 0
        row.cached_tokens = 0
        row.kv_blocks = 0
        row.first_token_s = np.nan
        row.last_token_s = np.nan
        row.ttft_slo_s = trace.ttft_slo_s
        row.tpot_slo_s = trace.tpot_slo_s
        row.slo_weight = trace.slo_weight
        row.admission = -1
        row.slo_class = trace.slo_class
        row.priority = trace.priority
        row.client = trace.client
        row.preemptions = 0
        engine.num_arrived += 1
        tokens = trace.prompt_tokens + trace.output_tokens - 1
        if (tokens + engine.block_tokens - 1) // engine.block_tokens > engine.kv_blocks_total:
            row.status = REFUSED
            books.num_refused += 1
            note_arrival(sim.state, request)
            continue
        row.status = WAITING
        if engine.prefix_cache:
            refresh_cached_tokens(sim, request)
        note_arrival(sim.state, request)
        sim.tokens_left[request] = trace.output_tokens
        sim.state.waiting[engine.num_waiting] = request
        engine.num_waiting += 1
        books.latency_s += engine.now_s - trace.arrival_s


@njit_borrowed
def _close_segment(sim: Sim, request: int) -> None:
    books = sim.books[0]
    start = sim.segment_start[request]
    if start >= 0:
        if books.recording:
            segment = sim.segments[books.num_segments]
            segment[0] = request
            segment[1] = start
            segment[2] = sim.state.engine[0].iterations - start
            books.num_segments += 1
        sim.segment_start[request] = -1


@njit_borrowed
def _finish(sim: Sim, request: int) -> None:
    """The request yielded its last token at the end of the iteration just counted."""
    row = sim.state.requests[request]
    engine, books = sim.state.engine[0], sim.books[0]
    _close_segment(sim, request)
    _release_blocks(sim, request)
    row.status = FINISHED
    engine.num_finished += 1
    ttft_s = row.first_token_s - row.arrival_s
    tpot_s = (row.last_token_s - row.first_token_s) / max(row.generated_tokens - 1, 1)
    if ttft_s <= row.ttft_slo_s and tpot_s <= row.tpot_slo_s:
        books.slo_met += row.slo_weight


@njit_borrowed
def _move(array, start: int, end: int, by: int) -> None:
    """array[start:end] moves by `by` places (negative: to the front), overlaps allowed: thousands may wait."""
    memmove(array[start + by :].ctypes, array[start:].ctypes, array.itemsize * (end - start))


@njit_borrowed
def _preempt(sim: Sim, index: int) -> None:
    """Preempt the running request at this place of the running list: to the front of the waiting list."""
    state, engine = sim.state, sim.state.engine[0]
    request = state.running[index]
    for i in range(index, engine.num_running - 1):
        state.running[i] = state.running[i + 1]
    engine.num_running -= 1
    _move(state.waiting, 0, engine.num_waiting, 1)
    state.waiting[0] = request
    engine.num_waiting += 1
    engine.num_preemptions += 1
    row = state.requests[request]
    sim.books[0].decode_context = -1
    if row.computed_tokens >= row.prefill_target:
        engine.num_decoding -= 1
    else:
        kept = 0
        for i in range(engine.num_running + 1 - engine.num_decoding):
            sim.prefilling[kept] = sim.prefilling[i]
            kept += sim.prefilling[i] != request
    _close_segment(sim, request)
    _release_blocks(sim, request)
    row.status = WAITING
    row.preemptions += 1
    row.computed_tokens = 0
    row.cached_tokens = 0
    row.prefill_target = row.prompt_tokens + row.generated_tokens


# ------------------------------------------------------------------------------------------------ iterations


@njit_borrowed
def iteration_seconds(cost, prefill, decodes, decode_context, query_context, kv) -> float:
    """`CostModel` in code: seconds of an iteration with these features (see spec.COST_FEATURES)."""
    return (
        cost[0]
        + cost[1] * prefill
        + cost[2] * decodes
        + cost[3] * decode_context
        + cost[4] * query_context
        + cost[5] * (prefill + decodes) * kv
        + cost[6] * (prefill > 0)
    )


@njit_borrowed
def _admit(sim: Sim, request: int, levers, left: int, first_prefill: bool) -> int:
    """Try to admit a waiting request. Returns the prefill tokens it gets, or -1 if admission ends here."""
    state, engine, books = sim.state, sim.state.engine[0], sim.books[0]
    row = state.requests[request]
    refresh_cached_tokens(sim, request)
    target = row.prompt_tokens + row.generated_tokens
    need = target - row.cached_tokens
    if levers.whole_prompts and need > left and not first_prefill:
        return -1
    hit_blocks = row.cached_tokens // engine.block_tokens
    first = sim.hash_offsets[request]
    idle_hits = 0
    for position in range(first, first + hit_blocks):
        idle_hits += sim.block_refs[sim.hash_ids[position]] == 0
    new_blocks = (target + engine.block_tokens - 1) // engine.block_tokens - hit_blocks
    reserve = levers.kv_reserve_blocks if engine.num_running > 0 else 0
    if new_blocks + reserve > engine.kv_blocks_free - idle_hits:
        return -1
    for position in range(first, first + hit_blocks):
        block = sim.hash_ids[position]
        if sim.block_refs[block] == 0:
            _lru_remove(sim, block)
            engine.kv_blocks_free -= 1
        sim.block_refs[block] += 1
        sim.hash_held[position] = True
    _take_blocks(sim, new_blocks)
    row.kv_blocks = hit_blocks + new_blocks
    row.status = RUNNING
    row.prefill_target = target
    row.computed_tokens = row.cached_tokens
    row.admission = books.next_admission
    books.next_admission += 1
    sim.prefilling[engine.num_running - engine.num_decoding] = request
    state.running[engine.num_running] = request
    engine.num_running += 1
    return min(need, min(left, levers.chunk_tokens))


@njit_inlined
def _schedule_decodes(sim: Sim) -> int:
    """Give every decode a place for its token, preempting the last admitted when blocks run out.

    Returns the tokens of context that the decodes read. The common case, known from the end of the last iteration, is
    that nobody was preempted and that there are blocks for all whose last one is full.
    """
    state, engine, books = sim.state, sim.state.engine[0], sim.books[0]
    requests, running = state.requests, state.running
    if books.decode_context >= 0 and books.num_full <= engine.kv_blocks_free:
        for i in range(books.num_full):
            requests[sim.full[i]].kv_blocks += 1
        if books.num_full:
            _take_blocks(sim, books.num_full)
        return books.decode_context
    block_tokens = engine.block_tokens
    context = 0
    i = 0
    while i < engine.num_running:
        row = requests[running[i]]
        computed = row.computed_tokens
        if computed >= row.prefill_target:
            if computed == row.kv_blocks * block_tokens:
                while engine.kv_blocks_free == 0 and i < engine.num_running:
                    _preempt(sim, engine.num_running - 1)
                if i >= engine.num_running:
                    break
                _take_blocks(sim, 1)
                row.kv_blocks += 1
            context += computed + 1
        i += 1
    return context


@njit_borrowed
def _drop_admitted(state: State, num_admitted: int) -> None:
    """Take the requests just admitted out of the waiting list; most often they stand at its front."""
    engine, requests, waiting = state.engine[0], state.requests, state.waiting
    kept = i = 0
    while i - kept < num_admitted:
        waiting[kept] = waiting[i]
        kept += requests[waiting[i]].status == WAITING
        i += 1
    _move(waiting, i, engine.num_waiting, -num_admitted)
    engine.num_waiting -= num_admitted


@njit_inlined
def _schedule_prefills(sim: Sim, decision: Decision, levers) -> int:
    """Hand out the prefill budget: incomplete prefills, then picks, then the rest. Returns the tokens given."""
    state, engine = sim.state, sim.state.engine[0]
    budget = max(min(levers.prefill_tokens, engine.max_batch_tokens - engine.num_decoding), 0)
    left = budget
    for i in range(engine.num_running - engine.num_decoding):
        request = sim.prefilling[i]
        row = state.requests[request]
        tokens = min(row.prefill_target - row.computed_tokens, min(left, levers.chunk_tokens))
        sim.chunk[request] = tokens
        left -= tokens
    most_running = min(levers.max_running, engine.max_running)
    num_admitted = 0
    going = True
    for i in range(levers.num_order):
        if left <= 0 or engine.num_running >= most_running:
            going = False
            break
        request = decision.order[i]
        if request < 0 or request >= engine.num_arrived or state.requests[request].status != WAITING:
            continue
        tokens = _admit(sim, request, levers, left, left == budget)
        if tokens < 0:
            going = False
            break
        sim.chunk[request] = tokens
        left -= tokens
        num_admitted += 1
    if going and levers.admit_rest:
        for i in range(engine.num_waiting):
            if left <= 0 or engine.num_running >= most_running:
                break
            request = state.waiting[i]
            if state.requests[request].status != WAITING:
                continue
            tokens = _admit(sim, request, levers, left, left == budget)
            if tokens < 0:
                break
            sim.chunk[request] = tokens
            left -= tokens
            num_admitted += 1
    if num_admitted:
        _drop_admitted(state, num_admitted)
    return budget - left


@njit_inlined
def _pass_time(sim: Sim, seconds: float, prefill: int, decodes: int) -> None:
    """Let the iteration happen: the clock, what the requests in the system waited, the record."""
    engine, books = sim.state.engine[0], sim.books[0]
    start_s = engine.now_s
    engine.now_s = start_s + seconds
    engine.last_iteration_s = seconds
    if engine.iterations == 0:
        engine.ema_iteration_s = seconds
    else:
        engine.ema_iteration_s = 0.9 * engine.ema_iteration_s + 0.1 * seconds
    books.latency_s += seconds * (engine.num_waiting + engine.num_running)
    if books.recording:
        i = engine.iterations
        sim.iteration_start_s[i] = start_s
        sim.iteration_end_s[i] = engine.now_s
        sim.iteration_stats[i, 0] = prefill
        sim.iteration_stats[i, 1] = decodes
        sim.iteration_stats[i, 2] = engine.kv_blocks_total - engine.kv_blocks_free
    engine.iterations += 1


@njit_borrowed
def _advance_prefill(sim: Sim, request: int) -> bool:
    """Book the chunk just computed; a prefill that became complete yields a token. True if that was its last."""
    engine, books = sim.state.engine[0], sim.books[0]
    row = sim.state.requests[request]
    tokens = sim.chunk[request]
    sim.chunk[request] = 0
    before = row.computed_tokens
    row.computed_tokens = before + tokens
    if engine.prefix_cache:
        _share_computed_blocks(sim, request, before, before + tokens)
    if row.computed_tokens < row.prefill_target:
        return False
    engine.num_decoding += 1
    sim.segment_start[request] = engine.iterations - 1
    row.generated_tokens += 1
    row.last_token_s = engine.now_s
    if row.generated_tokens == 1:
        row.first_token_s = engine.now_s
        books.ttft_s += engine.now_s - row.arrival_s
        if engine.now_s - row.arrival_s <= row.ttft_slo_s:
            books.ttft_met += row.slo_weight
    sim.tokens_left[request] -= 1
    return sim.tokens_left[request] == 0


@njit_inlined
def _yield_tokens(sim: Sim) -> None:
    """The end of the iteration: a token for each decode and each completed prefill; the finished leave.

    The loop over decodes is the simulator's hottest: it calls nothing, because handing over `sim` costs more than
    the work itself.
    """
    state, engine, books = sim.state, sim.state.engine[0], sim.books[0]
    requests, running, chunk, tokens_left, full = state.requests, state.running, sim.chunk, sim.tokens_left, sim.full
    now_s, block_tokens = engine.now_s, engine.block_tokens
    prefilling = sim.prefilling
    kept = num_full = context = num_prefilling = 0
    for i in range(engine.num_running):
        request = running[i]
        row = requests[request]
        computed = row.computed_tokens
        over = False
        if computed >= row.prefill_target:
            computed += 1
            row.computed_tokens = computed
            row.generated_tokens += 1
            row.last_token_s = now_s
            tokens_left[request] -= 1
            over = tokens_left[request] == 0
        elif chunk[request] > 0:
            over = _advance_prefill(sim, request)
            computed = row.computed_tokens
        if over:
            engine.num_decoding -= 1
            _finish(sim, request)
            continue
        running[kept] = request
        kept += 1
        if computed >= row.prefill_target:
            context += computed + 1
            full[num_full] = request
            num_full += computed == row.kv_blocks * block_tokens
        else:
            prefilling[num_prefilling] = request
            num_prefilling += 1
    engine.num_running = kept
    books.decode_context, books.num_full = context, num_full


@njit_borrowed
def run_iteration(sim: Sim, decision: Decision) -> None:
    """One engine iteration under `decision`, as `state.py` defines it. Something must be waiting or running."""
    state, engine = sim.state, sim.state.engine[0]
    levers = decision.levers[0]
    for i in range(levers.num_preempt):
        for j in range(engine.num_running):
            if state.running[j] == decision.preempt[i]:
                _preempt(sim, j)
                break
    decode_context = _schedule_decodes(sim)
    prefill = _schedule_prefills(sim, decision, levers)
    if prefill == 0 and engine.num_decoding == 0:
        reset_decision(state, decision)
        prefill = _schedule_prefills(sim, decision, levers)
    decodes = engine.num_decoding
    query_context = 0.0
    kv = float(decode_context)
    for i in range(engine.num_running - decodes):
        request = sim.prefilling[i]
        tokens = sim.chunk[request]
        if tokens > 0:
            context = state.requests[request].computed_tokens + tokens
            query_context += float(tokens) * context
            kv += context
    seconds = iteration_seconds(sim.cost, prefill, decodes, decode_context, query_context, kv)
    _pass_time(sim, seconds, prefill, decodes)
    _yield_tokens(sim)
    absorb_arrivals(sim)


@njit_borrowed
def fast_forward(sim: Sim) -> int:
    """Run together the iterations up to the next arrival, finish or shortage of blocks. Returns how many.

    Only when nothing waits and every running request decodes: then no decision could change anything.
    """
    state, engine, books = sim.state, sim.state.engine[0], sim.books[0]
    decodes = engine.num_decoding
    if engine.num_waiting > 0 or decodes == 0 or decodes < engine.num_running:
        return 0
    requests, running, block_tokens = state.requests, state.running, engine.block_tokens
    most = 1 << 40
    context = 0
    for i in range(decodes):
        row = requests[running[i]]
        most = min(most, sim.tokens_left[running[i]])
        context += row.computed_tokens + 1
    while most > 0:
        blocks = 0
        for i in range(decodes):
            row = requests[running[i]]
            blocks += max((row.computed_tokens + most + block_tokens - 1) // block_tokens - row.kv_blocks, 0)
        if blocks <= engine.kv_blocks_free:
            break
        most //= 2
    if most == 0:
        return 0
    next_arrival_s = sim.trace[engine.num_arrived].arrival_s if engine.num_arrived < books.num_requests else np.inf
    if next_arrival_s <= engine.now_s:
        return 0
    first_iteration = engine.iterations
    if books.recording:
        most = min(most, len(sim.iteration_start_s) - first_iteration)
    steps = 0
    blocks_used = engine.kv_blocks_total - engine.kv_blocks_free
    while steps < most and engine.now_s < next_arrival_s:
        seconds = iteration_seconds(sim.cost, 0, decodes, context, 0.0, float(context))
        _pass_time(sim, seconds, 0, decodes)
        context += decodes
        steps += 1
    if books.recording:  # the blocks in use at the end of each iteration
        for i in range(decodes):
            row = requests[running[i]]
            room = row.kv_blocks * block_tokens - row.computed_tokens
            for step in range(room, steps, block_tokens):
                sim.iteration_stats[first_iteration + step, 2] += 1
        for step in range(1, steps):
            extra = sim.iteration_stats[first_iteration + step - 1, 2] - blocks_used
            sim.iteration_stats[first_iteration + step, 2] += extra
    for i in range(decodes):
        row = requests[running[i]]
        row.computed_tokens += steps - 1  # the last of them is booked by _yield_tokens
        row.generated_tokens += steps - 1
        sim.tokens_left[running[i]] -= steps - 1
        blocks = (row.computed_tokens + block_tokens) // block_tokens
        if blocks > row.kv_blocks:
            _take_blocks(sim, blocks - row.kv_blocks)
            row.kv_blocks = blocks
    _yield_tokens(sim)
    absorb_arrivals(sim)
    return steps


@njit_borrowed
def skip_idle(sim: Sim) -> bool:
    """If nothing is present, jump to the next arrival. False when the workload is finished."""
    engine, books = sim.state.engine[0], sim.books[0]
    while engine.num_waiting + engine.num_running == 0:
        if engine.num_arrived >= books.num_requests:
            return False
        engine.now_s = max(engine.now_s, sim.trace[engine.num_arrived].arrival_s)
        absorb_arrivals(sim)
    return True


@njit_borrowed
def refresh_waiting(sim: Sim) -> None:
    """Bring `cached_tokens` of every waiting request up to date (a no-op without a prefix cache)."""
    if sim.state.engine[0].prefix_cache:
        for i in range(sim.state.engine[0].num_waiting):
            refresh_cached_tokens(sim, sim.state.waiting[i])


@njit_borrowed
def has_room(sim: Sim) -> bool:
    """True if the record has room for one more iteration.

    In one iteration a running request ends at most two segments (preempted, admitted again, finished), a waiting one
    at most one.
    """
    engine, books = sim.state.engine[0], sim.books[0]
    ended = 2 * engine.num_running + engine.num_waiting
    return not books.recording or (
        engine.iterations < len(sim.iteration_start_s) and books.num_segments + ended <= len(sim.segments)
    )


@njit(**UNCOUNTED)
def run_rule(sim: Sim, decide, params, memory, decision: Decision, forward: bool) -> bool:
    """Serve the workload under a compiled rule `decide(state, params, memory, decision)`.

    Returns False when the record is full: make room and call again.
    """
    while skip_idle(sim):
        if not has_room(sim):
            return False
        if forward and fast_forward(sim) > 0:
            continue
        refresh_waiting(sim)
        reset_decision(sim.state, decision)
        decide(sim.state, params, memory, decision)
        run_iteration(sim, decision)
    return True


@njit_borrowed
def start(sim: Sim, kv_blocks, block_tokens, max_batch_tokens, max_running, prefix_cache, recording) -> None:
    """Empty the engine and go back to time zero. The caller has filled the trace, cost and hash arrays and zeroed
    `state.requests`."""
    engine, books = sim.state.engine[0], sim.books[0]
    engine.now_s = 0.0
    engine.last_iteration_s = 0.0
    engine.ema_iteration_s = 0.0
    engine.ema_arrival_gap_s = 0.0
    engine.mean_arrival_gap_s = 0.0
    engine.mean_prefill_tokens = 0.0
    engine.mean_query_context = 0.0
    engine.mean_decode_steps = 0.0
    engine.mean_decode_context = 0.0
    engine.iterations = 0
    engine.kv_blocks_free = kv_blocks
    engine.kv_blocks_total = kv_blocks
    engine.block_tokens = block_tokens
    engine.max_batch_tokens = max_batch_tokens
    engine.max_running = max_running
    engine.num_arrived = 0
    engine.num_waiting = 0
    engine.num_running = 0
    engine.num_decoding = 0
    engine.num_finished = 0
    engine.num_preemptions = 0
    engine.prefix_cache = prefix_cache
    books.num_refused = 0
    books.next_admission = 0
    books.blocks_unused = kv_blocks
    books.blocks_idle = 0
    books.num_segments = 0
    books.decode_context = 0
    books.num_full = 0
    books.recording = recording
    books.latency_s = 0.0
    books.ttft_s = 0.0
    books.slo_met = 0.0
    books.ttft_met = 0.0
    sim.hash_held[:] = False
    sim.block_refs[:] = 0
    sim.block_cached[:] = False
    sentinel = len(sim.lru) - 1
    sim.lru[sentinel, 0] = sentinel
    sim.lru[sentinel, 1] = sentinel
    sim.segment_start[:] = -1
    sim.chunk[:] = 0
    absorb_arrivals(sim)


class Simulator:
    """The simulated engine as a `Backend`: one replica, clock "model".

    Args:
        spec: engine limits, cost model and service classes.
        recording: keep the record that `timeline` returns.
    """

    clock = "model"

    def __init__(self, spec: RequestSchedulingSpec, *, recording: bool = True) -> None:
        self.spec = spec
        self.capacity = spec.engine
        self.recording = recording
        self._sim: Sim | None = None

    def reset(self, workload: Workload, seed: int = 0) -> None:
        """Load a workload and go back to time zero (the simulator draws nothing: `seed` is for other backends)."""
        self.workload = workload
        self._sim = new_sim(self.spec, workload, self.recording)
        self._decision = empty_decision(len(workload))
        skip_idle(self.sim)

    @property
    def sim(self) -> Sim:
        """The arrays of the simulation."""
        if self._sim is None:
            raise RuntimeError("no workload loaded: call reset(workload) first")
        return self._sim

    def state(self) -> State:
        """The live State, with prefix-cache hits of waiting requests brought up to date."""
        refresh_waiting(self.sim)
        return self.sim.state

    def default_decision(self) -> Decision:
        """This backend's Decision, filled with the engine's default (first come first served)."""
        reset_decision(self.sim.state, self._decision)
        return self._decision

    def step(self, decision: Decision) -> Outcome:
        """One iteration, after jumping over idle time."""
        if not skip_idle(self.sim):
            return Outcome(0.0, True)
        if not has_room(self.sim):
            self.make_room()
        run_iteration(self.sim, decision)
        return Outcome(float(self.sim.state.engine[0]["last_iteration_s"]), not skip_idle(self.sim))

    def run(self, rule: Rule, *, forward: bool = True) -> None:
        """Serve the rest of the workload under a compiled rule. `forward=False` takes every iteration singly."""
        memory = rule.new_memory(len(self.workload))
        while not run_rule(self.sim, rule.decide_kernel, rule.param_array, memory, self._decision, forward):
            self.make_room()

    def make_room(self) -> None:
        """Double the room of the record."""
        self._sim = with_more_room(self.sim)

    def timeline(self) -> Timeline:
        """The record of the run so far."""
        return timeline_of(self.sim, self.workload)

    def close(self) -> None:
        self._sim = None


def check_workload(spec: RequestSchedulingSpec, workload: Workload) -> bool:
    """True if prefixes are shared in this run. Raises InputError if the workload does not fit the spec."""
    engine = spec.engine
    prefix = engine.prefix_cache and workload.hash_block_tokens > 0
    if prefix and workload.hash_block_tokens != engine.block_tokens:
        raise InputError(
            f"workload {workload.name!r} hashes blocks of {workload.hash_block_tokens} tokens, the engine has blocks "
            f"of {engine.block_tokens}",
            remedy="Convert it with workload.with_block_tokens(spec.engine.block_tokens)",
        )
    if len(workload) and int(workload.slo_class.max()) >= len(spec.slo_classes):
        raise InputError(
            f"workload {workload.name!r} has SLO class {int(workload.slo_class.max())}, the spec has "
            f"{len(spec.slo_classes)}",
            remedy="Assign classes with workload.with_classes(spec.slo_classes)",
        )
    return bool(prefix)


def new_sim(spec: RequestSchedulingSpec, workload: Workload, recording: bool) -> Sim:
    """Allocate and start the simulation of one workload. Raises InputError if the workload does not fit the spec."""
    engine = spec.engine
    prefix = check_workload(spec, workload)
    n = len(workload)
    positions = len(workload.hash_ids) if prefix else 0
    blocks = int(workload.hash_ids.max()) + 1 if positions else 0
    room = 4 * n + 1024 if recording else 0
    sim = Sim(
        state=empty_state(n),
        trace=trace_rows(spec, workload),
        cost=np.array(spec.cost.coefficients_s, np.float64),
        books=np.zeros(1, BOOKS_DTYPE),
        hash_offsets=workload.hash_offsets.astype(np.int64) if prefix else np.zeros(max(n, 1) + 1, np.int64),
        hash_ids=workload.hash_ids.astype(np.int64) if prefix else np.zeros(0, np.int64),
        hash_held=np.zeros(positions, np.bool_),
        block_refs=np.zeros(blocks, np.int64),
        block_cached=np.zeros(blocks, np.bool_),
        lru=np.zeros((blocks + 1, 2), np.int64),
        segment_start=np.zeros(max(n, 1), np.int64),
        prefilling=np.zeros(max(n, 1), np.int64),
        chunk=np.zeros(max(n, 1), np.int64),
        tokens_left=np.zeros(max(n, 1), np.int64),
        full=np.zeros(max(n, 1) + 1, np.int64),
        segments=np.empty((room, 3), np.int64),
        iteration_start_s=np.empty(room),
        iteration_end_s=np.empty(room),
        iteration_stats=np.empty((room, 3), np.int64),
    )
    sim.books[0]["num_requests"] = n
    start(
        sim, engine.kv_blocks, engine.block_tokens, engine.max_batch_tokens, engine.max_running, int(prefix), recording
    )
    return sim


def trace_rows(spec: RequestSchedulingSpec, workload: Workload) -> np.ndarray:
    """(N,) TRACE_DTYPE: the workload's requests with the limits of their classes."""
    rows = np.zeros(max(len(workload), 1), TRACE_DTYPE)[: len(workload)]
    classes = np.array([(c.ttft_s, c.tpot_s, c.weight) for c in spec.slo_classes])
    for name in (
        "arrival_s",
        "prompt_tokens",
        "output_tokens",
        "predicted_output_tokens",
        "slo_class",
        "priority",
        "client",
    ):
        rows[name] = getattr(workload, name)
    for column, name in enumerate(("ttft_slo_s", "tpot_slo_s", "slo_weight")):
        rows[name] = classes[workload.slo_class, column]
    return rows


def with_more_room(sim: Sim) -> Sim:
    """The same simulation with the arrays of its record doubled."""

    def doubled(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, np.empty_like(array)])

    return sim._replace(
        segments=doubled(sim.segments),
        iteration_start_s=doubled(sim.iteration_start_s),
        iteration_end_s=doubled(sim.iteration_end_s),
        iteration_stats=doubled(sim.iteration_stats),
    )


def timeline_of(sim: Sim, workload: Workload) -> Timeline:
    """The record of a finished run as a Timeline (copies)."""
    iterations = int(sim.state.engine[0]["iterations"])
    stats = sim.iteration_stats[:iterations]
    n = len(workload)
    requests = sim.state.requests[:n]
    return Timeline(
        arrival_s=workload.arrival_s.copy(),
        prompt_tokens=workload.prompt_tokens.copy(),
        output_tokens=workload.output_tokens.copy(),
        slo_class=workload.slo_class.copy(),
        ttft_slo_s=sim.trace["ttft_slo_s"].copy(),
        tpot_slo_s=sim.trace["tpot_slo_s"].copy(),
        slo_weight=sim.trace["slo_weight"].copy(),
        refused=requests["status"] == REFUSED,
        preemptions=requests["preemptions"].astype(np.int64),
        iteration_start_s=sim.iteration_start_s[:iterations].copy(),
        iteration_end_s=sim.iteration_end_s[:iterations].copy(),
        prefill_tokens=stats[:, 0].copy(),
        decode_requests=stats[:, 1].copy(),
        kv_blocks_used=stats[:, 2].copy(),
        segments=sim.segments[: int(sim.books[0]["num_segments"])].copy(),
    )
