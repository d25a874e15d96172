"""What a scheduler may know and what it may ask for, as numba-friendly record arrays.

The same `State` and `Decision` are filled by the simulator (compiled) and by the real engine (from Python), so a
rule written over them runs unchanged in both. A `State` never holds the future: rows of requests that have not
arrived are zero, and true output lengths are not in it.

One engine iteration under a `Decision`:

0. Requests listed in `preempt` lose their KV and go to the front of the waiting list (recompute: their prompt and
   the tokens generated so far must be prefilled again).
1. Every running request whose prefill is complete decodes one token, in order of admission. A request whose last
   block is full needs a new block; when none is free the last admitted running request is preempted.
2. Prefill: at most `prefill_tokens` in all (and `max_batch_tokens` with the decodes), at most `chunk_tokens` a
   request. Requests with an incomplete prefill come first, in order of admission.
3. Then waiting requests are admitted while fewer than `max_running` run: first those listed in `order`, then, if
   `admit_rest` is set, the others in the order of the waiting list (arrival order, preempted ones in front).
   Admission takes all blocks of the prompt at once, less those found in the prefix cache; it must leave
   `kv_reserve_blocks` free unless nothing runs. The first request that does not fit ends admission. With
   `whole_prompts`, a prompt that does not fit into what is left of the budget ends it too (unless it would be the
   iteration's first prefill: then it is cut at the budget).
4. All this is one forward pass. At its end each decode, and each prefill that became complete, yields one token.

An iteration in which nothing would run although work is there is launched under the engine's default instead (first
come first served, full budget; the picks are dropped).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.blocks import zeros_by_line
from ..core.kernel import njit, njit_borrowed

WAITING, RUNNING, FINISHED, REFUSED = 1, 2, 3, 4
"""Values of `requests["status"]`; 0 is a request that has not arrived."""

REQUEST_DTYPE = np.dtype(
    [
        # First what is looked at of requests that wait, and there may be thousands: it fits one line of the cache.
        ("arrival_s", "f8"),
        ("prompt_tokens", "i8"),
        ("predicted_output_tokens", "f8"),  # from the declared predictor; the true length is hidden
        ("generated_tokens", "i8"),
        ("cached_tokens", "i8"),  # prefix-cache hit, if admitted now (0 without a prefix cache)
        ("ttft_slo_s", "f8"),
        ("tpot_slo_s", "f8"),
        ("slo_weight", "f8"),
        # What matters most of those that run.
        ("prefill_target", "i8"),  # tokens to have in KV before the next token: prompt, plus generated if preempted
        ("computed_tokens", "i8"),  # tokens in KV now
        ("kv_blocks", "i8"),  # blocks held
        ("first_token_s", "f8"),  # nan until the first token
        ("last_token_s", "f8"),  # nan until the first token
        ("admission", "i8"),  # serial number of the latest admission
        ("priority", "i4"),  # lower is more urgent
        ("client", "i4"),
        ("preemptions", "i4"),
        ("slo_class", "i2"),
        ("status", "i2"),
    ],
    align=True,
)
"""Two lines of the cache (`zeros_by_line`)."""

ENGINE_DTYPE = np.dtype(
    [
        ("now_s", "f8"),
        ("last_iteration_s", "f8"),  # duration of the latest iteration
        ("ema_iteration_s", "f8"),  # exponential mean of iteration durations, decay 0.9
        ("ema_arrival_gap_s", "f8"),  # exponential mean of the gaps between arrivals, decay 0.98
        # Means over the latest arrivals (`note_arrival`): how often requests come, and what one brings of the work that
        # the cost model counts (`spec.COST_FEATURES`). Together they are the load that is offered.
        ("mean_arrival_gap_s", "f8"),
        ("mean_prefill_tokens", "f8"),  # prompt tokens not in the prefix cache at arrival
        ("mean_query_context", "f8"),  # these times the tokens before them
        ("mean_decode_steps", "f8"),  # output tokens, predicted
        ("mean_decode_context", "f8"),  # KV tokens that these steps read: also KV tokens held x steps
        ("iterations", "i8"),
        ("kv_blocks_free", "i8"),  # unreferenced cached blocks count as free
        ("kv_blocks_total", "i8"),
        ("block_tokens", "i8"),
        ("max_batch_tokens", "i8"),
        ("max_running", "i8"),
        ("num_arrived", "i8"),  # rows of `requests` that are filled
        ("num_waiting", "i8"),  # live length of `waiting`
        ("num_running", "i8"),  # live length of `running`
        ("num_decoding", "i8"),  # running requests whose prefill is complete
        ("num_finished", "i8"),
        ("num_preemptions", "i8"),
        ("prefix_cache", "i8"),  # 1 if the engine shares prefixes
    ],
    align=True,
)

LEVERS_DTYPE = np.dtype(
    [
        ("prefill_tokens", "i8"),
        ("chunk_tokens", "i8"),
        ("max_running", "i8"),
        ("kv_reserve_blocks", "i8"),
        ("whole_prompts", "i8"),  # 0 or 1
        ("admit_rest", "i8"),  # 0 or 1
        ("num_order", "i8"),  # live length of `order`
        ("num_preempt", "i8"),  # live length of `preempt`
    ],
    align=True,
)

NO_LIMIT = 1 << 40

MEMORY = 500
"""Arrivals over which the engine's means are taken: about. Fewer say little of the load, as lengths vary tenfold and
more; many more hide that it drifts."""


class State(NamedTuple):
    """What a scheduler may know now. Request ids are row numbers of `requests`, in order of arrival."""

    engine: np.ndarray  # (1,) ENGINE_DTYPE
    requests: np.ndarray  # (N,) REQUEST_DTYPE
    waiting: np.ndarray  # (N,) int64 request ids, the first num_waiting are live
    running: np.ndarray  # (N,) int64 request ids in order of admission, the first num_running are live


class Decision(NamedTuple):
    """What the scheduler asks of the next iteration. `reset_decision` gives the engine's own default."""

    levers: np.ndarray  # (1,) LEVERS_DTYPE
    order: np.ndarray  # (N,) int64 waiting request ids to admit, in this order
    preempt: np.ndarray  # (N,) int64 running request ids to preempt


def empty_state(num_requests: int) -> State:
    """A zeroed State for up to `num_requests` requests."""
    n = max(num_requests, 1)
    requests = zeros_by_line(n, REQUEST_DTYPE)
    return State(np.zeros(1, ENGINE_DTYPE), requests, np.zeros(n, np.int64), np.zeros(n, np.int64))


def empty_decision(num_requests: int) -> Decision:
    """A zeroed Decision for up to `num_requests` requests."""
    n = max(num_requests, 1)
    return Decision(np.zeros(1, LEVERS_DTYPE), np.zeros(n, np.int64), np.zeros(n, np.int64))


@njit_borrowed
def note_arrival(state: State, request: int) -> None:
    """Take a request into the engine's means over arrivals; its row has just been filled.

    The n-th weighs 1 / min(n, MEMORY): a plain mean at first, then an exponential one. A refused request brings no
    work.
    """
    engine, row = state.engine[0], state.requests[request]
    if request > 0:
        gap_s = row.arrival_s - state.requests[request - 1].arrival_s
        engine.ema_arrival_gap_s += (0.02 if request > 1 else 1.0) * (gap_s - engine.ema_arrival_gap_s)
        engine.mean_arrival_gap_s += (gap_s - engine.mean_arrival_gap_s) / min(request, MEMORY)
    prefill = steps = 0.0
    if row.status != REFUSED:
        prefill, steps = float(row.prompt_tokens - row.cached_tokens), row.predicted_output_tokens
    weight = 1.0 / min(request + 1, MEMORY)
    engine.mean_prefill_tokens += weight * (prefill - engine.mean_prefill_tokens)
    engine.mean_query_context += weight * (prefill * (row.prompt_tokens - 0.5 * prefill) - engine.mean_query_context)
    engine.mean_decode_steps += weight * (steps - engine.mean_decode_steps)
    engine.mean_decode_context += weight * (steps * (row.prompt_tokens + 0.5 * steps) - engine.mean_decode_context)


@njit(cache=True)
def reset_decision(state: State, decision: Decision) -> None:
    """Fill `decision` with the engine's default: first come first served, no limit below the engine's own."""
    levers = decision.levers[0]
    levers.prefill_tokens = state.engine[0].max_batch_tokens
    levers.chunk_tokens = NO_LIMIT
    levers.max_running = state.engine[0].max_running
    levers.kv_reserve_blocks = 0
    levers.whole_prompts = 0
    levers.admit_rest = 1
    levers.num_order = 0
    levers.num_preempt = 0
