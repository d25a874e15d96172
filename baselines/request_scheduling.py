"""The field's request schedulers as rules over `State`: compiled in the simulator, unchanged on a real engine.

`RULES` maps names to rules with their published or default knobs. Most schedulers differ only in the order of the
waiting list and in a few fixed limits: those share the kernel `ordered`. `search_knobs` finds the best fixed knobs
for a workload.

Units: lengths and budgets in tokens, times in seconds. A *token budget* counts decodes and prefill together, as
Sarathi-Serve and vLLM (`max_num_batched_tokens`) do.
"""

from __future__ import annotations

import numpy as np

from ..envs.core.kernel import njit
from ..envs.request_scheduling.rule import Rule, pick_smallest
from ..envs.request_scheduling.state import FINISHED, REFUSED, RUNNING

FCFS, SJF_PROMPT, SJF, SRPT, PREDICTED_RANK, RESIDUAL, HOPELESS_LAST, HOPELESS_LAST_SRPT, PRIORITY, EDF = range(10)
"""Orders of the kernel `ordered`."""
ORDER_NAMES = (
    "fcfs",
    "sjf_prompt",
    "sjf",
    "srpt",
    "predicted_rank",
    "residual",
    "hopeless_last",
    "hopeless_last_srpt",
    "priority",
    "edf",
)

HOPELESS = 1e12
"""Added to the key of a request that can no longer meet its TTFT limit: after all that can."""


@njit(cache=True)
def residual_prompt(row):
    """Prompt tokens that a waiting request would have to compute if admitted now."""
    return row.prompt_tokens + row.generated_tokens - row.cached_tokens


@njit(cache=True)
def predicted_remaining(row):
    """Output tokens still expected; a request that outlived its prediction is expected to go on by a fifth."""
    return max(row.predicted_output_tokens - row.generated_tokens, 0.2 * row.generated_tokens + 1.0)


@njit(cache=True)
def is_hopeless(row, now_s, margin_s):
    """True if the first token is still owed and its limit will have passed in `margin_s` seconds."""
    return row.generated_tokens == 0 and now_s + margin_s > row.arrival_s + row.ttft_slo_s


@njit(cache=True)
def order_key(kind, row, now_s, decode_weight, margin_s):
    """Key of a waiting request under an order: smaller goes first."""
    if kind == SJF_PROMPT:
        return float(row.prompt_tokens)
    if kind == SJF:
        return row.prompt_tokens + decode_weight * row.predicted_output_tokens
    if kind == SRPT:
        return residual_prompt(row) + decode_weight * predicted_remaining(row)
    if kind == PREDICTED_RANK:
        return row.predicted_output_tokens
    if kind == RESIDUAL:
        return float(residual_prompt(row))
    if kind == HOPELESS_LAST:
        return residual_prompt(row) + HOPELESS * is_hopeless(row, now_s, margin_s)
    if kind == HOPELESS_LAST_SRPT:
        return (
            residual_prompt(row)
            + decode_weight * predicted_remaining(row)
            + HOPELESS * is_hopeless(row, now_s, margin_s)
        )
    if kind == PRIORITY:
        return row.priority * HOPELESS + row.arrival_s
    if kind == EDF:
        return row.arrival_s + row.ttft_slo_s
    return row.arrival_s


@njit(cache=True)
def set_token_budget(state, decision, tokens):
    """Limit decodes and prefill of the iteration to `tokens` together; decodes always go."""
    decision.levers[0].prefill_tokens = max(int(tokens) - state.engine[0].num_decoding, 0)


@njit(cache=True)
def write_keys(state, params, keys):
    """Keys of the waiting requests (num_waiting,) under the params of `ordered`."""
    now_s = state.engine[0].now_s
    for i in range(state.engine[0].num_waiting):
        row = state.requests[state.waiting[i]]
        waited_s = now_s - row.arrival_s
        keys[i] = order_key(int(params[0]), row, now_s, params[4], params[6]) - params[5] * waited_s
        if waited_s > params[8]:
            keys[i] = row.arrival_s - HOPELESS


@njit(cache=True)
def ordered(state, params, memory, decision):
    """Serve the waiting list in a fixed order within fixed limits.

    params: order, token budget, most running requests, share of KV blocks kept free at admission, weight of an
    output token against a prompt token, ageing (tokens of key forgiven per second waited), seconds of margin in the
    judgement of hopelessness, whole prompts (0 or 1), longest wait in seconds before a request goes first.
    """
    engine = state.engine[0]
    levers = decision.levers[0]
    kind = int(params[0])
    set_token_budget(state, decision, params[1])
    levers.max_running = int(params[2])
    levers.kv_reserve_blocks = int(params[3] * engine.kv_blocks_total)
    levers.whole_prompts = int(params[7])
    if kind == FCFS or engine.num_waiting == 0 or engine.num_running >= levers.max_running:
        return
    if levers.prefill_tokens == 0:
        return
    keys = memory[: engine.num_waiting]
    write_keys(state, params, keys)
    levers.admit_rest = 0
    pick_smallest(state, keys, decision, levers.prefill_tokens)


def ordered_rule(
    name: str,
    order: int,
    *,
    token_budget: float = 8192,
    max_running: float = 256,
    kv_reserve: float = 0.0,
    decode_weight: float = 1.0,
    ageing: float = 0.0,
    margin_s: float = 0.0,
    whole_prompts: bool = False,
    longest_wait_s: float = np.inf,
    source: str = "",
) -> Rule:
    """A rule of the kernel `ordered` (its docstring has the units)."""
    params = (order, token_budget, max_running, kv_reserve, decode_weight, ageing, margin_s, whole_prompts)
    return Rule(name, ordered, (*map(float, params), float(longest_wait_s)), memory_per_request=1, source=source)


@njit(cache=True)
def static_batching(state, params, memory, decision):
    """A batch of up to params[0] requests runs to its longest member before the next one is formed.

    Memory: the number of the present batch, then per request the batch that it belongs to. A member that has not
    fitted yet, or was preempted, stays a member.
    """
    engine, levers = state.engine[0], decision.levers[0]
    member_of = memory[1:]
    if engine.num_running == 0:
        memory[0] += 1
        for i in range(min(int(params[0]), engine.num_waiting)):
            member_of[state.waiting[i]] = memory[0]
    for i in range(engine.num_waiting):
        if member_of[state.waiting[i]] == memory[0]:
            decision.order[levers.num_order] = state.waiting[i]
            levers.num_order += 1
    levers.admit_rest = 0


@njit(cache=True)
def qwen_chunks(state, params, memory, decision):
    """Chunks that shrink as the context grows, so that the time of an iteration stays level.

    A chunk of q tokens over context c costs q (1 + c / L): with L = params[1] tokens (where attention costs as much
    as the rest) and params[0] the chunk at an empty context, q = params[0] / (1 + c / L).
    """
    context = 0
    engine = state.engine[0]
    for i in range(engine.num_running):
        row = state.requests[state.running[i]]
        if row.computed_tokens < row.prefill_target:
            context = row.computed_tokens
            break
    decision.levers[0].prefill_tokens = max(int(params[0] / (1.0 + context / params[1])), 64)


@njit(cache=True)
def p_pas(state, params, memory, decision):
    """A token budget that follows the load: from params[0] when little prefill is queued to params[1] at params[2].

    The load is the prefill work queued, in tokens; the budget grows with it in proportion.
    """
    engine = state.engine[0]
    queued = 0
    for i in range(engine.num_waiting):
        queued += residual_prompt(state.requests[state.waiting[i]])
    for i in range(engine.num_running):
        row = state.requests[state.running[i]]
        queued += max(row.prefill_target - row.computed_tokens, 0)
    share = min(queued / params[2], 1.0)
    set_token_budget(state, decision, params[0] + share * (params[1] - params[0]))


@njit(cache=True)
def preemptive_srpt(state, params, memory, decision):
    """SRPT by predicted length that also takes from the running: params as `ordered`, then the preemption factor.

    When the shortest waiting request cannot be admitted and its predicted work, times the factor params[9], is less
    than that of the longest running request, the latter is preempted (its KV is recomputed later: hence the factor).
    One preemption an iteration (TRAIL, Shahout et al. 2024, limits preemption for the same reason).
    """
    ordered(state, params, memory, decision)
    engine, levers = state.engine[0], decision.levers[0]
    if engine.num_waiting == 0 or engine.num_running == 0 or levers.prefill_tokens == 0:
        return
    if levers.num_order == 0:  # no request may join the running, but one may take the place of another
        keys = memory[: engine.num_waiting]
        write_keys(state, params, keys)
        decision.order[0] = state.waiting[np.argmin(keys)]
        levers.num_order, levers.admit_rest = 1, 0
    first = state.requests[decision.order[0]]
    need = (first.prompt_tokens + first.generated_tokens) // engine.block_tokens + 1
    most_running = min(levers.max_running, engine.max_running)
    if engine.kv_blocks_free >= need + levers.kv_reserve_blocks and engine.num_running < most_running:
        return
    work = residual_prompt(first) + params[4] * predicted_remaining(first)
    worst, worst_work = -1, 0.0
    for i in range(engine.num_running):
        row = state.requests[state.running[i]]
        left = max(row.prefill_target - row.computed_tokens, 0) + params[4] * predicted_remaining(row)
        if left > worst_work and row.preemptions < 3:
            worst, worst_work = state.running[i], left
    if worst >= 0 and params[9] * work < worst_work:
        decision.preempt[0] = worst
        levers.num_preempt = 1


@njit(cache=True)
def fastserve(state, params, memory, decision):
    """FastServe's skip-join multi-level feedback queue.

    Level q has a quantum of params[0] * 2^q tokens of service. A new request joins the first level whose quantum
    covers its prompt (skip-join); one that used up its quantum goes down a level; one that waited more than
    params[1] seconds goes to the top. Higher levels first, in order of arrival within a level; a waiting request of
    a higher level preempts a running one of a lower level when there is no room (KV is recomputed here, where
    FastServe swaps it to the host). params[2]: most running requests.
    Memory per request: level + 1 (0: not seen), service at entry into the level, since when it waits; a sort key.
    """
    engine, levers = state.engine[0], decision.levers[0]
    levers.max_running = int(params[2])
    num_levels = 8
    keys = memory[3 * len(state.requests) :]
    for i in range(engine.num_waiting + engine.num_running):
        waiting = i < engine.num_waiting
        request = state.waiting[i] if waiting else state.running[i - engine.num_waiting]
        row = state.requests[request]
        slot = memory[3 * request : 3 * request + 3]
        if slot[0] == 0:
            level = 0
            while level < num_levels - 1 and params[0] * 2.0**level < row.prompt_tokens:
                level += 1
            slot[0], slot[1], slot[2] = level + 1, 0.0, engine.now_s
        service = float(row.prompt_tokens if row.generated_tokens > 0 else 0) + row.generated_tokens
        # every level passed since the last look: a decision may come after many iterations
        while slot[0] < num_levels and service - slot[1] > params[0] * 2.0 ** (slot[0] - 1):
            slot[1] += params[0] * 2.0 ** (slot[0] - 1)
            slot[0] += 1
        if not waiting:
            slot[2] = engine.now_s
        else:
            if engine.now_s - slot[2] > params[1]:
                slot[0], slot[1], slot[2] = 1, service, engine.now_s
            keys[i] = slot[0] * HOPELESS + row.arrival_s
    if engine.num_waiting == 0:
        return
    levers.admit_rest = 0
    first = state.waiting[np.argmin(keys[: engine.num_waiting])]
    pick_smallest(state, keys[: engine.num_waiting], decision, levers.prefill_tokens)
    if levers.num_order == 0:  # no request may join the running, but one may take the place of another
        decision.order[0] = first
        levers.num_order = 1
    row = state.requests[first]
    need = (row.prompt_tokens + row.generated_tokens) // engine.block_tokens + 1
    free = engine.kv_blocks_free
    room = min(levers.max_running, engine.max_running) - engine.num_running
    while free < need or room < 1:
        worst = -1
        for i in range(engine.num_running - 1, -1, -1):
            request = state.running[i]
            taken = False
            for j in range(levers.num_preempt):
                taken = taken or decision.preempt[j] == request
            if not taken and (worst < 0 or memory[3 * request] > memory[3 * worst]):
                worst = request
        if worst < 0 or memory[3 * worst] <= memory[3 * first]:
            levers.num_preempt = 0  # it would not fit all the same
            break
        decision.preempt[levers.num_preempt] = worst
        levers.num_preempt += 1
        free += state.requests[worst].kv_blocks
        room += 1


@njit(cache=True)
def vtc(state, params, memory, decision):
    """Virtual token counters (Sheng et al., OSDI 2024): fair service by weighted tokens per client.

    Each client has a counter of the service it got: params[0] a prompt token, charged at admission, params[1] an
    output token. The client with the smallest counter among those that wait goes next, request by request. A client
    that comes back to the queue is lifted to the smallest counter of those that waited there. Clients are taken
    modulo 256.
    Memory: first request that may still owe a charge, 256 counters, 256 counters with the picks charged, then per
    request the service charged, 1 if it was seen waiting, and 1 if it is picked.
    """
    engine, levers = state.engine[0], decision.levers[0]
    clients, n = 256, len(state.requests)
    counters, ahead = memory[1 : 1 + clients], memory[1 + clients : 1 + 2 * clients]
    first = 1 + 2 * clients
    charged, seen, picked = memory[first : first + n], memory[first + n : first + 2 * n], memory[first + 2 * n :]
    while memory[0] < engine.num_arrived and seen[int(memory[0])] < 0.0:
        memory[0] += 1
    for request in range(int(memory[0]), engine.num_arrived):  # the finished too: they may never have been seen to run
        row = state.requests[request]
        if row.status == RUNNING or row.status == FINISHED:
            service = params[0] * row.prompt_tokens + params[1] * row.generated_tokens
            counters[row.client % clients] += service - charged[request]
            charged[request] = service
        if row.status == FINISHED or row.status == REFUSED:
            seen[request] = -1.0
    lowest = np.inf
    for i in range(engine.num_waiting):
        request = state.waiting[i]
        client = state.requests[request].client % clients
        ahead[client] = 0.0
        if seen[request] > 0.0:
            lowest = min(lowest, counters[client])
    for i in range(engine.num_waiting):
        request = state.waiting[i]
        if seen[request] > 0.0:
            ahead[state.requests[request].client % clients] = 1.0
    for i in range(engine.num_waiting):
        request = state.waiting[i]
        client = state.requests[request].client % clients
        if ahead[client] == 0.0 and lowest < np.inf:
            counters[client] = max(counters[client], lowest)
        seen[request] = 1.0
        picked[request] = 0.0
    for i in range(engine.num_waiting):
        client = state.requests[state.waiting[i]].client % clients
        ahead[client] = counters[client]
    levers.admit_rest = 0
    tokens, room = levers.prefill_tokens, engine.max_running - engine.num_running
    while tokens > 0 and room > 0:
        best, least = -1, np.inf
        for i in range(engine.num_waiting):
            request = state.waiting[i]
            counter = ahead[state.requests[request].client % clients]
            if picked[request] == 0.0 and counter < least:
                best, least = request, counter
        if best < 0:
            return
        row = state.requests[best]
        picked[best] = 1.0
        ahead[row.client % clients] += params[0] * row.prompt_tokens - min(charged[best], params[0] * row.prompt_tokens)
        decision.order[levers.num_order] = best
        levers.num_order += 1
        tokens -= residual_prompt(row)
        room -= 1


@njit(cache=True)
def linear(state, params, memory, decision):
    """A linear score with state-dependent limits: the family in which the hindsight reference is searched.

    params, all of order one:
    0 weight of residual prompt (per 1,000 tokens)       1 weight of predicted remaining output (per 1,000 tokens)
    2 credit per second waited, relative to the limit    3 credit per unit of urgency 1 / (1 + slack / limit)
    4 hopelessness margin, in TTFT limits                5 bonus of preempted requests
    6 log2 of the token budget                           7 token budget given back per decoding request
    8 most running requests / 256                        9 share of KV kept free at admission
    10 share of the running requests' predicted growth kept free
    11 share of KV that must be free before a hopeless request is admitted
    12 weight of a hopeless request's TTFT limit (which of the hopeless go first)
    """
    engine, levers = state.engine[0], decision.levers[0]
    budget = 2.0 ** params[6] - params[7] * engine.num_decoding
    levers.prefill_tokens = int(min(max(budget, 0.0), 1e9))
    levers.max_running = int(max(params[8], 0.004) * 256.0)
    if engine.num_waiting == 0 or engine.num_running >= levers.max_running or levers.prefill_tokens == 0:
        return
    growth = 0.0
    if params[10] > 0.0:
        for i in range(engine.num_running):
            growth += predicted_remaining(state.requests[state.running[i]])
    reserve = params[9] * engine.kv_blocks_total + params[10] * growth / engine.block_tokens
    levers.kv_reserve_blocks = int(min(reserve, 0.9 * engine.kv_blocks_total))
    keys = memory[: engine.num_waiting]
    now_s = engine.now_s
    spare = engine.kv_blocks_free > params[11] * engine.kv_blocks_total
    for i in range(engine.num_waiting):
        row = state.requests[state.waiting[i]]
        waited = (now_s - row.arrival_s) / row.ttft_slo_s
        key = params[0] * 1e-3 * residual_prompt(row) + params[1] * 1e-3 * predicted_remaining(row)
        key -= params[2] * waited
        if row.generated_tokens > 0:
            key -= params[5]
        elif waited + params[4] > 1.0:
            key += 1e6 + params[12] * row.ttft_slo_s if spare or engine.num_running == 0 else np.inf
        else:
            key -= params[3] / (2.0 - waited)
        keys[i] = key
    levers.admit_rest = 0
    pick_smallest(state, keys, decision, levers.prefill_tokens)


VLLM = "vLLM (Kwon et al., SOSP 2023), V1 scheduler"
SARATHI = "Sarathi-Serve (Agrawal et al., OSDI 2024)"

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "static_batching", static_batching, (64.0,), memory_size=1, memory_per_request=1, source="FasterTransformer"
        ),
        ordered_rule("orca", FCFS, whole_prompts=True, source="Orca (Yu et al., OSDI 2022); Flover (2023)"),
        ordered_rule("fcfs", FCFS, source=VLLM),
        ordered_rule("vllm_priority", PRIORITY, source=VLLM + ", scheduling policy `priority`"),
        ordered_rule("sarathi_512", FCFS, token_budget=512, source=SARATHI),
        ordered_rule("sarathi_2048", FCFS, token_budget=2048, source=SARATHI),
        Rule("qwen_chunks", qwen_chunks, (2048.0, 24500.0), source="Qwen2.5-1M technical report, section 4 (2025)"),
        ordered_rule("sjf_prompt", SJF_PROMPT, token_budget=2048, source="shortest prompt first"),
        ordered_rule("sjf", SJF, token_budget=2048, ageing=10.0, source="shortest job first by predicted length"),
        ordered_rule(
            "srpt", SRPT, token_budget=2048, ageing=10.0, source="shortest remaining processing time, predicted"
        ),
        Rule(
            "srpt_preemptive",
            preemptive_srpt,
            (*ordered_rule("", SRPT, token_budget=2048, ageing=10.0).params, 2.0),
            memory_per_request=1,
            source="TRAIL (Shahout et al., 2024)",
        ),
        ordered_rule(
            "learning_to_rank",
            PREDICTED_RANK,
            token_budget=2048,
            longest_wait_s=120.0,
            source="Fu et al., NeurIPS 2024; PARS (2025): order of predicted ranks, starved requests first",
        ),
        ordered_rule("residual_sjf", RESIDUAL, token_budget=2048, source="prompt less cached prefix, shortest first"),
        ordered_rule("hopeless_last", HOPELESS_LAST, token_budget=1024, source="deadline-aware SJF"),
        ordered_rule("edf", EDF, token_budget=2048, source="earliest TTFT deadline first"),
        Rule("fastserve", fastserve, (256.0, 60.0, 256.0), memory_per_request=4, source="FastServe (Wu et al., 2023)"),
        Rule("p_pas", p_pas, (512.0, 4096.0, 16384.0), source="P-PAS: prefill budget that adapts to load"),
        Rule("vtc", vtc, (1.0, 2.0), memory_size=513, memory_per_request=3, source="VTC (Sheng et al., OSDI 2024)"),
    )
}
