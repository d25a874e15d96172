"""The action table of request scheduling: which rows can be chosen now, what they look like, what choosing one does.

The same kernels serve the simulated env and the real engine: they read a `State` and write a `Decision`. A decision
is built by zero or more picks of waiting requests ("put this one next") and one launch row ("run the iteration with
this many prefill tokens"), which admits the picks and nobody else: holding requests back under memory pressure is
worth much. Row 0 launches the engine's own default instead (first come first served, full budget).

When KV blocks would run out in the coming iteration, a *victim* phase comes first: the rows are running requests, and
choosing one preempts it (the last row offered is the engine's own victim, the last admitted).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.kernel import njit, njit_borrowed
from .spec import RequestSchedulingSpec
from .state import NO_LIMIT, Decision, State, reset_decision

OVERDUE_EVERY = 8
"""One admission in so many goes to the request that waited longest, once it waited longer than allowed: so whoever is
passed over by a policy still waits a bounded time, and a backlog of the hopeless cannot take the whole engine."""

FEATURE_VERSION = 4
"""Raised whenever the meaning of a column below changes: checkpoints of another version are refused."""

CONTEXT_FEATURES = (
    "kv_free_share",
    "running / 256",
    "decoding / 256",
    "log1p(waiting) / 8",
    "log1p(residual prompt tokens waiting) / 14",
    "share of the waiting that owe a first token and are past its limit",
    "tanh(oldest wait / TTFT limit / 4)",
    "recent iteration seconds / 0.2 (at most 4)",
    "recent iteration seconds / least TPOT limit running (at most 4)",
    "log(load offered lately: by the last 50 arrivals) / 2, in [-1, 1]",
    "log(load offered: by the last 500 arrivals), in [-1, 1]",
    "log(KV tokens that would be held if none had to wait / KV tokens) / 4, in [-1, 1]",
    "log1p(prefill seconds waiting) / 6",
    "picked / 16",
    "prefill tokens picked / 4096",
    "prefill tokens left of running requests / 4096",
    "predicted growth of the running / KV tokens",
    "blocks of the picked / blocks free (at most 2)",
    "share of the running that outlived their prediction",
    "share of the running behind their TPOT limit",
    "objective is mean E2E",
    "objective is goodput",
    "spread of TTFT limits among the waiting, in decades",
    "prefix cache is on",
    "victim phase",
)
CANDIDATE_FEATURES = (
    "is a launch row",
    "log2(1 + launch prefill tokens) / 14",
    "launch: with no prefill 1, the engine's default -1",
    "launch: prefill tokens that would run / 4096",
    "launch: seconds of the iteration / 0.2 (at most 4)",
    "launch: seconds of the iteration / least TPOT limit running (at most 4)",
    "residual prompt tokens / 4096 (at most 4)",
    "log1p(residual prompt tokens) / 12",
    "log1p(predicted output tokens left) / 8",
    "prefill seconds + predicted decode work, log10, / 2",
    "waited / TTFT limit (at most 4), / 4",
    "slack to the TTFT limit after own prefill, / limit, in [-1, 1]",
    "owes a first token and cannot meet its limit",
    "has been preempted",
    "log10(TTFT limit) / 2",
    "log10(TPOT limit)",
    "prompt share found in the prefix cache",
    "blocks needed / blocks free (at most 2)",
    "rank by work among the waiting, in [0, 1]",
    "rank by arrival among the waiting, in [0, 1]",
    "SLO weight / 4",
    "priority / 4",
    "waited seconds, log1p, / 6",
    "victim row: KV blocks held / blocks in use",
    "residual prompt tokens / 65536 (at most 4)",
    "waited seconds / longest wait allowed (at most 2)",
)
NUM_CONTEXT, NUM_CANDIDATE = len(CONTEXT_FEATURES), len(CANDIDATE_FEATURES)
PICKED_CONTEXT = tuple(
    CONTEXT_FEATURES.index(name)
    for name in ("picked / 16", "prefill tokens picked / 4096", "blocks of the picked / blocks free (at most 2)")
)
"""Columns of the context that change from pick to pick; all others stay what they were when the table was opened."""

TABLE_DTYPE = np.dtype(
    [
        ("num_rows", "i8"),  # launch rows and visible requests
        ("num_launches", "i8"),  # row 0 (the default) and the prefill choices
        ("num_picked", "i8"),
        ("picked_tokens", "i8"),
        ("picked_blocks", "i8"),
        ("partial_tokens", "i8"),  # prefill still owed by running requests
        ("decode_context", "i8"),
        ("victim", "i8"),  # 1 in the victim phase
        ("waiting_tokens", "i8"),  # residual prompt tokens of all that wait
        ("hopeless", "i8"),  # waiting requests past their TTFT limit
        ("growth", "f8"),  # predicted output tokens left of running requests
        ("least_tpot_s", "f8"),  # least TPOT limit among the running (0.15 if none)
        ("outlived", "i8"),
        ("behind_tpot", "i8"),
        ("oldest_wait", "f8"),  # longest wait, in TTFT limits
        ("ttft_spread", "f8"),
        ("overdue", "i8"),  # the request that waited longest, if longer than allowed, else -1
        ("blocks_needed", "i8"),  # new blocks that the coming iteration's decodes need
    ],
    align=True,
)


class Problem(NamedTuple):
    """What the table must know of the spec."""

    choices: np.ndarray  # (L,) int64 prefill tokens of the launch rows
    cost: np.ndarray  # (7,) float64 seconds, the calibrated cost model
    mean_e2e: np.ndarray  # (1,) float64, 1 if the objective is mean E2E latency
    longest_wait_s: np.ndarray  # (1,) float64: who waited longer goes first

    @classmethod
    def of(cls, spec: RequestSchedulingSpec) -> Problem:
        return cls(
            np.array(spec.prefill_choices, np.int64),
            np.array(spec.cost.coefficients_s, np.float64),
            np.array([float(spec.objective == "mean_e2e")]),
            np.array([spec.longest_wait_s]),
        )


class Table(NamedTuple):
    """The rows that can be chosen at one decision; K rows in all."""

    head: np.ndarray  # (1,) TABLE_DTYPE
    requests: np.ndarray  # (K,) int64 request id of a row, -1 for launch rows
    open: np.ndarray  # (K,) bool: not picked yet
    blocks: np.ndarray  # (K,) int64 blocks that admission would take
    ranks: np.ndarray  # (K, 2) float64: by work, by arrival, in [0, 1]
    scratch: np.ndarray  # (3, K) float64 keys of the shortlist
    chosen: np.ndarray  # (3, K) int64 places of the shortlist


def empty_table(num_candidates: int) -> Table:
    """A Table for K rows."""
    k = num_candidates
    return Table(
        np.zeros(1, TABLE_DTYPE),
        np.zeros(k, np.int64),
        np.zeros(k, np.bool_),
        np.zeros(k, np.int64),
        np.zeros((k, 2)),
        np.zeros((3, k)),
        np.zeros((3, k), np.int64),
    )


@njit_borrowed
def _insert(keys, places, length: int, limit: int, key: float, place: int) -> int:
    """Insert into the sorted list of the `limit` smallest keys. Returns its new length."""
    if length == limit and key >= keys[length - 1]:
        return length
    i = length if length < limit else limit - 1
    while i > 0 and keys[i - 1] > key:
        keys[i] = keys[i - 1]
        places[i] = places[i - 1]
        i -= 1
    keys[i] = key
    places[i] = place
    return min(length + 1, limit)


@njit_borrowed
def _survey(state: State, table: Table) -> None:
    """Sum up the running and the waiting requests in the table's head."""
    engine, head = state.engine[0], table.head[0]
    head.num_picked, head.picked_tokens, head.picked_blocks = 0, 0, 0
    requests = state.requests
    partial, context, growth, outlived, behind, blocks = 0, 0, 0.0, 0, 0, 0
    least_tpot_s = np.inf
    now_s = engine.now_s
    for i in range(engine.num_running):
        row = requests[state.running[i]]
        if row.computed_tokens < row.prefill_target:
            partial += row.prefill_target - row.computed_tokens
        else:
            context += row.computed_tokens + 1
            blocks += row.computed_tokens == row.kv_blocks * engine.block_tokens
        left = row.predicted_output_tokens - row.generated_tokens
        growth += max(left, 0.0)
        outlived += left <= 0.0
        least_tpot_s = min(least_tpot_s, row.tpot_slo_s)
        if row.generated_tokens > 1:
            behind += (now_s - row.first_token_s) > row.tpot_slo_s * (row.generated_tokens - 1)
    head.partial_tokens, head.decode_context, head.growth = partial, context, growth
    head.outlived, head.behind_tpot, head.blocks_needed = outlived, behind, blocks
    head.least_tpot_s = least_tpot_s if least_tpot_s < np.inf else 0.15
    head.victim = 1 if blocks > engine.kv_blocks_free else 0


@njit_borrowed
def _blocks_to_admit(row, block_tokens: int) -> int:
    return (
        row.prompt_tokens + row.generated_tokens + block_tokens - 1
    ) // block_tokens - row.cached_tokens // block_tokens


@njit_borrowed
def _prefill_s_per_token(problem: Problem, decode_context: int) -> float:
    """Seconds that one more token of prefill adds to an iteration with this much decode context."""
    return problem.cost[1] + problem.cost[5] * decode_context


@njit_borrowed
def _shortlist(state: State, problem: Problem, table: Table) -> int:
    """Choose the waiting requests that get a row. Returns the fewest blocks that any waiting request needs.

    All of them if there is room. Else, if goodput is the objective, half of the rows go to the least predicted work
    among requests that can still meet their TTFT limit; what is left to the least work of all, and an eighth or so to
    the front of the waiting list. The request that is overdue, if any, is always among them.
    """
    engine, head = state.engine[0], table.head[0]
    first = head.num_launches
    room = len(table.requests) - first
    requests, waiting = state.requests, state.waiting
    num_waiting, now_s = engine.num_waiting, engine.now_s
    few = num_waiting <= room
    mean_e2e = problem.mean_e2e[0] > 0
    prefill_s_per_token = _prefill_s_per_token(problem, head.decode_context)
    limits = (room // 2, room - room // 4) if not mean_e2e else (0, room - room // 8)
    hopeful, least = 0, 0
    tokens, hopeless, fewest, shortest = 0, 0, NO_LIMIT, NO_LIMIT
    oldest, low, high, limit_s, per_limit = 0.0, np.inf, 0.0, 0.0, 0.0
    head.overdue, overdue_since_s = -1, now_s - problem.longest_wait_s[0]
    for i in range(num_waiting):
        row = requests[waiting[i]]
        residual = row.prompt_tokens + row.generated_tokens - row.cached_tokens
        tokens += residual
        if row.cached_tokens > 0:
            fewest = min(fewest, _blocks_to_admit(row, engine.block_tokens))
        else:  # thousands wait: one division for all of them
            shortest = min(shortest, residual)
        waited_s = now_s - row.arrival_s
        late = row.generated_tokens == 0 and waited_s + prefill_s_per_token * residual > row.ttft_slo_s
        hopeless += late
        if row.ttft_slo_s != limit_s:
            limit_s, per_limit = row.ttft_slo_s, 1.0 / row.ttft_slo_s
        oldest = max(oldest, waited_s * per_limit)
        if row.arrival_s < overdue_since_s:
            head.overdue, overdue_since_s = waiting[i], row.arrival_s
        low, high = min(low, row.ttft_slo_s), max(high, row.ttft_slo_s)
        if not few:
            work = residual + max(row.predicted_output_tokens - row.generated_tokens, 1.0)
            if not (late or mean_e2e):
                hopeful = _insert(table.scratch[0], table.chosen[0], hopeful, limits[0], work, i)
            least = _insert(table.scratch[1], table.chosen[1], least, limits[1], work, i)
    if shortest < NO_LIMIT:
        fewest = min(fewest, (shortest + engine.block_tokens - 1) // engine.block_tokens)
    head.waiting_tokens, head.hopeless, head.oldest_wait = tokens, hopeless, oldest
    head.ttft_spread = np.log10(high / low) if num_waiting > 0 else 0.0
    count = first
    if few:
        for i in range(num_waiting):
            table.requests[count] = waiting[i]
            count += 1
    else:
        if head.overdue >= 0:
            table.requests[count] = head.overdue
            count += 1
        for which in range(3):
            length = hopeful if which == 0 else least if which == 1 else num_waiting
            end = len(table.requests) - (room // 8 if which < 2 else 0)
            for j in range(length):
                if count == end:
                    break
                place = table.chosen[which, j] if which < 2 else j
                seen = False
                for k in range(first, count):
                    seen = seen or table.requests[k] == waiting[place]
                if not seen:
                    table.requests[count] = waiting[place]
                    count += 1
    for k in range(first, count):
        table.blocks[k] = _blocks_to_admit(requests[table.requests[k]], engine.block_tokens)
        table.open[k] = True
    head.num_rows = count
    _rank(state, table, first, count)
    return fewest


@njit_borrowed
def _rank(state: State, table: Table, first: int, count: int) -> None:
    """Ranks of the visible requests by work and by arrival, in [0, 1]."""
    last = max(count - first - 1, 1)
    keys, rows = table.scratch[0], table.chosen[0]
    for which in range(2):
        length = 0
        for k in range(first, count):
            key = float(table.requests[k])
            if which == 0:
                row = state.requests[table.requests[k]]
                key = row.prompt_tokens + row.generated_tokens - row.cached_tokens + row.predicted_output_tokens
            length = _insert(keys, rows, length, len(keys), key, k)
        for i in range(length):
            table.ranks[rows[i], which] = i / last


@njit_borrowed
def open_table(state: State, problem: Problem, table: Table, decision: Decision) -> bool:
    """Begin the decision of the coming iteration. False if there is nothing to decide (launch the default)."""
    head = table.head[0]
    reset_decision(state, decision)
    head.num_launches = 1 + len(problem.choices)
    _survey(state, table)
    if head.victim:
        _shortlist(state, problem, table)  # for what it sums up of the waiting
        _offer_victims(state, table)
        return True
    return _offer_requests(state, problem, table)


@njit_borrowed
def _launch_tokens(state: State, problem: Problem, row: int) -> int:
    """Prefill tokens that a launch row allows."""
    most = state.engine[0].max_batch_tokens - state.engine[0].num_decoding
    return most if row == 0 else min(problem.choices[row - 1], most)


@njit_borrowed
def _offer_requests(state: State, problem: Problem, table: Table) -> bool:
    engine, head = state.engine[0], table.head[0]
    for k in range(head.num_launches):
        table.requests[k] = -1
        table.open[k] = True
        table.scratch[2, k] = np.log2(1.0 + _launch_tokens(state, problem, k)) / 14.0
    fewest = _shortlist(state, problem, table)
    can_admit = engine.num_waiting > 0 and engine.num_running < engine.max_running and fewest <= engine.kv_blocks_free
    return can_admit or (head.partial_tokens > 0 and engine.num_decoding > 0)


@njit_borrowed
def _offer_victims(state: State, table: Table) -> None:
    """Rows for the running requests: all, or the ones admitted last if there are more than rows."""
    engine, head = state.engine[0], table.head[0]
    first = head.num_launches
    for k in range(first):
        table.open[k] = False
        table.requests[k] = -1
    start = max(engine.num_running - (len(table.requests) - first), 0)
    count = first
    for i in range(start, engine.num_running):
        table.requests[count] = state.running[i]
        table.blocks[count] = state.requests[state.running[i]].kv_blocks
        table.open[count] = True
        count += 1
    head.num_rows = count
    _rank(state, table, first, count)


@njit_borrowed
def _is_turn_of_overdue(state: State, table: Table) -> bool:
    """True for every OVERDUE_EVERY-th admission; every admission ended in a finish, a preemption or is running."""
    engine = state.engine[0]
    admissions = engine.num_finished + engine.num_preemptions + engine.num_running + table.head[0].num_picked
    return admissions % OVERDUE_EVERY == 0


@njit_borrowed
def write_mask(state: State, problem: Problem, table: Table, mask) -> None:
    """bool (K,): which rows may be chosen. Never empty."""
    engine, head = state.engine[0], table.head[0]
    mask[:] = False
    if head.victim:
        for k in range(head.num_launches, head.num_rows):
            mask[k] = table.open[k]
        return
    largest = _launch_tokens(state, problem, head.num_launches - 1)
    owed = head.partial_tokens + head.picked_tokens
    room = engine.num_running + head.num_picked < engine.max_running and owed < largest
    if room:
        free = engine.kv_blocks_free - head.picked_blocks - head.blocks_needed
        for k in range(head.num_launches, head.num_rows):
            mask[k] = table.open[k] and table.blocks[k] <= free
        if head.overdue >= 0 and _is_turn_of_overdue(state, table):
            overdue = head.num_launches
            while table.requests[overdue] != head.overdue:
                overdue += 1
            if table.open[overdue]:
                fits = mask[overdue]
                mask[:] = False
                if fits:
                    mask[overdue] = True
                    return
    mask[0] = head.num_picked == 0
    for k in range(1, head.num_launches):
        # Of choices that would run the same prefill only the smallest is offered, and none that would run nothing.
        tokens = problem.choices[k - 1]
        covered = k > 1 and problem.choices[k - 2] >= owed
        if tokens == 0:
            mask[k] = engine.num_decoding > 0 and head.num_picked == 0
        else:
            mask[k] = owed > 0 and not covered


@njit_borrowed
def write_observation(state: State, problem: Problem, table: Table, context, candidates) -> None:
    """float32 (C,) and (K, F): the columns of CONTEXT_FEATURES and CANDIDATE_FEATURES."""
    candidates[:] = 0.0
    _write_context(state, problem, table, context)
    _write_launches(state, problem, table, candidates)
    _write_requests(state, problem, table, candidates)


@njit_borrowed
def update_observation(state: State, problem: Problem, table: Table, action: int, context, candidates) -> None:
    """What `write_observation` would write after choosing the row `action`, given what it wrote before."""
    candidates[action] = 0.0
    _write_context(state, problem, table, context)
    _write_launches(state, problem, table, candidates)


@njit_borrowed
def _write_context(state: State, problem: Problem, table: Table, context) -> None:
    engine, head = state.engine[0], table.head[0]
    total, free = float(engine.kv_blocks_total), max(float(engine.kv_blocks_free), 1.0)
    waiting, running = max(engine.num_waiting, 1), max(engine.num_running, 1)
    prefill_s = _prefill_s_per_token(problem, head.decode_context)
    context[0] = engine.kv_blocks_free / total
    context[1] = engine.num_running / 256.0
    context[2] = engine.num_decoding / 256.0
    context[3] = np.log1p(engine.num_waiting) / 8.0
    context[4] = np.log1p(head.waiting_tokens) / 14.0
    context[5] = head.hopeless / waiting
    context[6] = np.tanh(head.oldest_wait / 4.0)
    context[7] = min(engine.ema_iteration_s / 0.2, 4.0)
    context[8] = min(engine.ema_iteration_s / head.least_tpot_s, 4.0)
    offered_s = _seconds_offered(engine, problem)
    context[9] = _log_within(offered_s / max(engine.ema_arrival_gap_s, 1e-4), 2.0)
    context[10] = _log_within(offered_s / max(engine.mean_arrival_gap_s, 1e-4), 1.0)
    held = engine.mean_decode_context * engine.ema_iteration_s / max(engine.mean_arrival_gap_s, 1e-4)
    context[11] = _log_within(held / (total * engine.block_tokens), 4.0)
    context[12] = np.log1p(head.waiting_tokens * prefill_s) / 6.0
    context[13] = head.num_picked / 16.0
    context[14] = head.picked_tokens / 4096.0
    context[15] = head.partial_tokens / 4096.0
    context[16] = head.growth / (total * engine.block_tokens)
    context[17] = min(head.picked_blocks / free, 2.0)
    context[18] = head.outlived / running
    context[19] = head.behind_tpot / running
    context[20] = problem.mean_e2e[0]
    context[21] = 1.0 - problem.mean_e2e[0]
    context[22] = head.ttft_spread
    context[23] = engine.prefix_cache
    context[24] = head.victim


@njit_borrowed
def _log_within(ratio: float, most: float) -> float:
    """log(ratio) / most, in [-1, 1]."""
    return min(max(np.log(ratio + 1e-9) / most, -1.0), 1.0)


@njit_borrowed
def _seconds_offered(engine, problem: Problem) -> float:
    """Engine seconds that a request brings, as the means over arrivals have it, in the batch that serves it best.

    What the constant costs a request falls with the KV that a batch holds; what the product of queries and KV costs
    rises with it. Divided by the gap between arrivals this is the load: 1 keeps the engine busy for ever.
    """
    cost = problem.cost
    queries, context = engine.mean_prefill_tokens + engine.mean_decode_steps, engine.mean_decode_context
    of_one = context / max(engine.mean_decode_steps, 1.0)
    held = min(float(engine.kv_blocks_total * engine.block_tokens), engine.max_running * of_one)
    if cost[5] * queries > 0.0:
        held = min(held, np.sqrt(cost[0] * context / (cost[5] * queries)))
    return (
        cost[0] * context / max(held, 1.0)
        + cost[1] * engine.mean_prefill_tokens
        + cost[2] * engine.mean_decode_steps
        + cost[3] * context
        + cost[4] * engine.mean_query_context
        + cost[5] * queries * held
    )


@njit_borrowed
def _write_launches(state: State, problem: Problem, table: Table, candidates) -> None:
    engine, head = state.engine[0], table.head[0]
    if head.victim:
        return
    owed = head.partial_tokens + head.picked_tokens
    for k in range(head.num_launches):
        row = candidates[k]
        allowed = _launch_tokens(state, problem, k)
        tokens = min(allowed, owed + head.waiting_tokens if k == 0 else owed)
        seconds = (
            problem.cost[0]
            + problem.cost[1] * tokens
            + problem.cost[2] * engine.num_decoding
            + problem.cost[3] * head.decode_context
            + problem.cost[4] * 0.5 * float(tokens) * tokens
            + problem.cost[5] * (engine.num_decoding + tokens) * (head.decode_context + tokens)
            + problem.cost[6] * (tokens > 0)
        )
        row[0] = 1.0
        row[1] = table.scratch[2, k]
        row[2] = -1.0 if k == 0 else 1.0 if allowed == 0 else 0.0
        row[3] = tokens / 4096.0
        row[4] = min(seconds / 0.2, 4.0)
        row[5] = min(seconds / head.least_tpot_s, 4.0)


@njit_borrowed
def _write_requests(state: State, problem: Problem, table: Table, candidates) -> None:
    engine, head = state.engine[0], table.head[0]
    now_s, prefill_s = engine.now_s, _prefill_s_per_token(problem, head.decode_context)
    total, free = float(engine.kv_blocks_total), max(float(engine.kv_blocks_free), 1.0)
    used = max(total - engine.kv_blocks_free, 1.0)
    decode_s = 0.1 * problem.cost[0] + problem.cost[5] * head.decode_context
    last_limit_s, log_limit, last_tpot_s, log_tpot = 0.0, 0.0, 0.0, 0.0
    for k in range(head.num_launches, head.num_rows):
        if not table.open[k]:
            continue
        row = candidates[k]
        request = state.requests[table.requests[k]]
        target = request.prompt_tokens + request.generated_tokens
        residual = target - request.cached_tokens
        left = max(request.predicted_output_tokens - request.generated_tokens, 0.2 * request.generated_tokens + 1.0)
        own_s = prefill_s * residual + (problem.cost[4] + problem.cost[5]) * float(residual) * target
        waited_s = now_s - request.arrival_s
        limit_s = request.ttft_slo_s
        row[6] = min(residual / 4096.0, 4.0)
        row[7] = np.log1p(residual) / 12.0
        row[8] = np.log1p(left) / 8.0
        row[9] = np.log10(own_s + left * decode_s + 1e-4) / 2.0
        row[22] = np.log1p(waited_s) / 6.0
        row[24] = min(residual / 65536.0, 4.0)  # in the linear, too: orders that weigh prompts of 100,000 tokens
        row[25] = min(waited_s / problem.longest_wait_s[0], 2.0)  # against waits of minutes ask for fine differences
        row[13] = request.generated_tokens > 0
        if limit_s != last_limit_s:
            last_limit_s, log_limit = limit_s, np.log10(limit_s) / 2.0
        if request.tpot_slo_s != last_tpot_s:
            last_tpot_s, log_tpot = request.tpot_slo_s, np.log10(request.tpot_slo_s)
        row[14] = log_limit
        row[15] = log_tpot
        row[18] = table.ranks[k, 0]
        row[19] = table.ranks[k, 1]
        row[20] = request.slo_weight / 4.0
        row[21] = request.priority / 4.0
        if head.victim:
            row[23] = request.kv_blocks / used
            continue
        if request.generated_tokens == 0:
            row[10] = min(waited_s / limit_s, 4.0) / 4.0
            slack = (limit_s - waited_s - own_s) / limit_s
            row[11] = min(max(slack, -1.0), 1.0)
            row[12] = slack < 0.0
        row[16] = request.cached_tokens / target
        row[17] = min(table.blocks[k] / free, 2.0)


@njit_borrowed
def choose(state: State, problem: Problem, table: Table, decision: Decision, action: int) -> bool:
    """Take a row. True when it was a launch: `decision` is complete."""
    head, levers = table.head[0], decision.levers[0]
    request = table.requests[action]
    if head.victim:
        decision.preempt[levers.num_preempt] = request
        levers.num_preempt += 1
        table.open[action] = False
        head.victim = 0 if _victims_suffice(state, table, decision) else 1
        levers.admit_rest = 0  # nothing is admitted in an iteration that had to preempt
        return head.victim == 0
    if request < 0:
        if action > 0:
            levers.prefill_tokens = problem.choices[action - 1]
            levers.admit_rest = 0
        return True
    decision.order[levers.num_order] = request
    levers.num_order += 1
    row = state.requests[request]
    table.open[action] = False
    head.num_picked += 1
    head.picked_tokens += row.prompt_tokens + row.generated_tokens - row.cached_tokens
    head.picked_blocks += table.blocks[action]
    return False


@njit_borrowed
def _victims_suffice(state: State, table: Table, decision: Decision) -> bool:
    """True if the blocks of the victims chosen so far cover what the remaining decodes need, or none is left."""
    engine, levers = state.engine[0], decision.levers[0]
    needed, free = table.head[0].blocks_needed, engine.kv_blocks_free
    for i in range(levers.num_preempt):
        row = state.requests[decision.preempt[i]]
        free += row.kv_blocks
        needed -= row.computed_tokens >= row.prefill_target and (
            row.computed_tokens == row.kv_blocks * engine.block_tokens
        )
    return needed <= free or levers.num_preempt >= engine.num_running - 1


@njit(cache=True)
def visible_state(state: State, table: Table, engine: np.ndarray, waiting: np.ndarray) -> State:
    """The state in which only the requests that have a row wait: what a rule must see to be imitated on the table.

    `engine` (1,) ENGINE_DTYPE and `waiting` (N,) int64 are written to.
    """
    head = table.head[0]
    engine[0] = state.engine[0]
    count = 0
    if head.victim == 0:
        for k in range(head.num_launches, head.num_rows):
            waiting[count] = table.requests[k]
            count += 1
    engine[0].num_waiting = count
    return State(engine, state.requests, waiting, state.running)


@njit_borrowed
def action_of(state: State, problem: Problem, table: Table, mask, wanted: Decision, follow: int) -> int:
    """The row that brings the table closest to what a rule wants: its pick number `follow`, else a launch.

    `wanted` is the decision of the rule for this state. A rule that has run out of picks, or whose next pick is not
    on the table, launches with the choice nearest to its prefill budget.
    """
    head, levers = table.head[0], wanted.levers[0]
    if head.victim:
        for k in range(head.num_rows - 1, head.num_launches - 1, -1):
            if mask[k]:
                return k
    engine = state.engine[0]
    if follow < levers.num_order and engine.num_running + head.num_picked < levers.max_running:
        owed = head.partial_tokens + head.picked_tokens
        reserve = levers.kv_reserve_blocks if engine.num_running + head.num_picked > 0 else 0
        for k in range(head.num_launches, head.num_rows):
            fits = table.blocks[k] + head.picked_blocks + reserve <= engine.kv_blocks_free
            if mask[k] and table.requests[k] == wanted.order[follow] and owed < levers.prefill_tokens and fits:
                return k
    first_launch = 0 if follow == 0 and levers.num_order == 0 and levers.admit_rest == 1 else 1
    if first_launch == 0 and mask[0] and engine.num_waiting > 0 and engine.num_running < levers.max_running:
        return 0
    best, best_distance = -1, np.inf
    for k in range(1, head.num_launches):
        if mask[k]:
            distance = abs(np.log2((64.0 + problem.choices[k - 1]) / (64.0 + levers.prefill_tokens)))
            if distance < best_distance:
                best, best_distance = k, distance
    return best if best >= 0 else int(np.argmax(mask))
