"""`schedlab/RequestScheduling-v0`: the scheduler of an LLM serving engine as a pointer problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..core.blocks import zeros_by_line
from ..core.errors import InputError
from ..core.kernel import njit
from ..core.vector_env import PointerEnv, PointerVectorEnv
from .generate import generate
from .rule import Rule
from .sim import (
    BOOKS_DTYPE,
    TRACE_DTYPE,
    Sim,
    check_workload,
    fast_forward,
    refresh_waiting,
    run_iteration,
    skip_idle,
    start,
    trace_rows,
)
from .spec import RequestSchedulingSpec
from .state import ENGINE_DTYPE, LEVERS_DTYPE, REQUEST_DTYPE, Decision, State, reset_decision
from .table import (
    NUM_CANDIDATE,
    NUM_CONTEXT,
    TABLE_DTYPE,
    Problem,
    Table,
    action_of,
    choose,
    open_table,
    update_observation,
    visible_state,
    write_mask,
    write_observation,
)
from .workload import Workload


@dataclass(frozen=True)
class Task:
    """A scheduling problem and requests to serve: what an episode is drawn from."""

    spec: RequestSchedulingSpec
    workload: Workload


class Batch(NamedTuple):
    """All envs: the arrays of `Sim`, `Problem`, `Table` and `Decision` with a leading axis of B envs."""

    engine: np.ndarray  # (B, 1) ENGINE_DTYPE
    requests: np.ndarray  # (B, N) REQUEST_DTYPE
    waiting: np.ndarray  # (B, N)
    running: np.ndarray  # (B, N)
    trace: np.ndarray  # (B, N) TRACE_DTYPE
    cost: np.ndarray  # (B, 7)
    books: np.ndarray  # (B, 1) BOOKS_DTYPE
    hash_offsets: np.ndarray  # (B, N + 1)
    hash_ids: np.ndarray  # (B, P)
    hash_held: np.ndarray  # (B, P)
    block_refs: np.ndarray  # (B, H)
    block_cached: np.ndarray  # (B, H)
    lru: np.ndarray  # (B, H + 1, 2)
    segment_start: np.ndarray  # (B, N)
    prefilling: np.ndarray  # (B, N)
    chunk: np.ndarray  # (B, N)
    tokens_left: np.ndarray  # (B, N)
    full: np.ndarray  # (B, N + 1)
    no_segments: np.ndarray  # (0, 3): training keeps no record
    no_times: np.ndarray  # (0,)
    choices: np.ndarray  # (B, L)
    mean_e2e: np.ndarray  # (B, 1)
    longest_wait_s: np.ndarray  # (B, 1)
    table_head: np.ndarray  # (B, 1) TABLE_DTYPE
    table_requests: np.ndarray  # (B, K)
    table_open: np.ndarray  # (B, K)
    table_blocks: np.ndarray  # (B, K)
    table_ranks: np.ndarray  # (B, K, 2)
    table_scratch: np.ndarray  # (B, 3, K)
    table_chosen: np.ndarray  # (B, 3, K)
    levers: np.ndarray  # (B, 1) LEVERS_DTYPE
    order: np.ndarray  # (B, N)
    preempt: np.ndarray  # (B, N)
    gain: np.ndarray  # (B,) what has been rewarded so far


def empty_batch(num_envs: int, requests: int, positions: int, blocks: int, choices: int, rows: int) -> Batch:
    """Zeroed arrays for B envs of up to `requests` requests and a prefix cache of `blocks` distinct blocks."""
    b, n, k = num_envs, requests, rows
    i8 = np.int64
    return Batch(
        engine=np.zeros((b, 1), ENGINE_DTYPE),
        requests=zeros_by_line((b, n), REQUEST_DTYPE),
        waiting=np.zeros((b, n), i8),
        running=np.zeros((b, n), i8),
        trace=np.zeros((b, n), TRACE_DTYPE),
        cost=np.zeros((b, 7)),
        books=np.zeros((b, 1), BOOKS_DTYPE),
        hash_offsets=np.zeros((b, n + 1), i8),
        hash_ids=np.zeros((b, positions), i8),
        hash_held=np.zeros((b, positions), np.bool_),
        block_refs=np.zeros((b, blocks), i8),
        block_cached=np.zeros((b, blocks), np.bool_),
        lru=np.zeros((b, blocks + 1, 2), i8),
        segment_start=np.zeros((b, n), i8),
        prefilling=np.zeros((b, n), i8),
        chunk=np.zeros((b, n), i8),
        tokens_left=np.zeros((b, n), i8),
        full=np.zeros((b, n + 1), i8),
        no_segments=np.zeros((0, 3), i8),
        no_times=np.zeros(0),
        choices=np.zeros((b, choices), i8),
        mean_e2e=np.zeros((b, 1)),
        longest_wait_s=np.zeros((b, 1)),
        table_head=np.zeros((b, 1), TABLE_DTYPE),
        table_requests=np.zeros((b, k), i8),
        table_open=np.zeros((b, k), np.bool_),
        table_blocks=np.zeros((b, k), i8),
        table_ranks=np.zeros((b, k, 2)),
        table_scratch=np.zeros((b, 3, k)),
        table_chosen=np.zeros((b, 3, k), i8),
        levers=np.zeros((b, 1), LEVERS_DTYPE),
        order=np.zeros((b, n), i8),
        preempt=np.zeros((b, n), i8),
        gain=np.zeros(b),
    )


@njit(cache=True)
def sim_of(batch: Batch, e: int) -> Sim:
    """The simulation of env e (views)."""
    return Sim(
        State(batch.engine[e], batch.requests[e], batch.waiting[e], batch.running[e]),
        batch.trace[e],
        batch.cost[e],
        batch.books[e],
        batch.hash_offsets[e],
        batch.hash_ids[e],
        batch.hash_held[e],
        batch.block_refs[e],
        batch.block_cached[e],
        batch.lru[e],
        batch.segment_start[e],
        batch.prefilling[e],
        batch.chunk[e],
        batch.tokens_left[e],
        batch.full[e],
        batch.no_segments,
        batch.no_times,
        batch.no_times,
        batch.no_segments,
    )


@njit(cache=True)
def problem_of(batch: Batch, e: int) -> Problem:
    """The problem of env e (views)."""
    return Problem(batch.choices[e], batch.cost[e], batch.mean_e2e[e], batch.longest_wait_s[e])


@njit(cache=True)
def table_of(batch: Batch, e: int) -> Table:
    """The action table of env e (views)."""
    return Table(
        batch.table_head[e],
        batch.table_requests[e],
        batch.table_open[e],
        batch.table_blocks[e],
        batch.table_ranks[e],
        batch.table_scratch[e],
        batch.table_chosen[e],
    )


@njit(cache=True)
def decision_of(batch: Batch, e: int) -> Decision:
    """The decision being built in env e (views)."""
    return Decision(batch.levers[e], batch.order[e], batch.preempt[e])


@njit(cache=True)
def advance(sim: Sim, problem: Problem, table: Table, decision: Decision) -> bool:
    """Run iterations until there is something to decide. False when the workload is finished."""
    while skip_idle(sim):
        if fast_forward(sim) > 0:
            continue
        refresh_waiting(sim)
        if open_table(sim.state, problem, table, decision):
            return True
        reset_decision(sim.state, decision)
        run_iteration(sim, decision)
    return False


@njit(cache=True)
def step_batch(batch: Batch, actions, rewards, done, context, candidates, mask) -> None:
    """One action in each env; writes rewards (B,), done (B,) and the observations."""
    for e in range(len(actions)):
        sim, problem, table, decision = (
            sim_of(batch, e),
            problem_of(batch, e),
            table_of(batch, e),
            decision_of(batch, e),
        )
        done[e] = False
        launched = choose(sim.state, problem, table, decision, actions[e])
        if launched:
            run_iteration(sim, decision)
            done[e] = not advance(sim, problem, table, decision)
        books = sim.books[0]
        gain = -books.latency_s / 100.0 if problem.mean_e2e[0] > 0 else books.slo_met / 10.0
        rewards[e] = gain - batch.gain[e]
        batch.gain[e] = gain
        if launched:
            observe_one(sim, problem, table, context[e], candidates[e], mask[e], done[e])
        else:
            update_observation(sim.state, problem, table, actions[e], context[e], candidates[e])
            write_mask(sim.state, problem, table, mask[e])


@njit(cache=True)
def observe_one(sim: Sim, problem: Problem, table: Table, context, candidates, mask, done) -> None:
    """The observation of one env; after the last step the engine is empty and only the first row is legal."""
    if done:
        context[:] = 0.0
        candidates[:] = 0.0
        mask[:] = False
        mask[0] = True
    else:
        write_observation(sim.state, problem, table, context, candidates)
        write_mask(sim.state, problem, table, mask)


@njit(cache=True)
def start_one(batch: Batch, e: int, limits, context, candidates, mask) -> bool:
    """Start env e, whose trace is loaded, and run to its first decision. False if there is none in its workload."""
    sim, problem, table, decision = sim_of(batch, e), problem_of(batch, e), table_of(batch, e), decision_of(batch, e)
    start(sim, limits[0], limits[1], limits[2], limits[3], limits[4], 0)
    batch.gain[e] = 0.0
    alive = advance(sim, problem, table, decision)
    observe_one(sim, problem, table, context, candidates, mask, not alive)
    books = sim.books[0]
    batch.gain[e] = -books.latency_s / 100.0 if problem.mean_e2e[0] > 0 else books.slo_met / 10.0
    return alive


@njit
def rule_actions_batch(
    batch: Batch,
    members,
    decide,
    params,
    memory,
    wanted_levers,
    wanted_order,
    wanted_preempt,
    engine,
    waiting,
    mask,
    actions,
):
    """What a rule would choose in each env of `members`; see `RequestSchedulingVectorEnv.rule_actions`."""
    for e in members:
        state, table = sim_of(batch, e).state, table_of(batch, e)
        wanted = Decision(wanted_levers[e], wanted_order[e], wanted_preempt[e])
        if table.head[0].num_picked == 0:
            reset_decision(state, wanted)
            decide(visible_state(state, table, engine[e], waiting[e]), params[e], memory[e], wanted)
        actions[e] = action_of(state, problem_of(batch, e), table, mask[e], wanted, table.head[0].num_picked)


class RequestSchedulingVectorEnv(PointerVectorEnv):
    """Which waiting requests enter the engine's next iteration, and how many prefill tokens it may run.

    DECIDED, before every iteration in which there is a choice: zero or more picks of waiting requests, then one launch.
        The launch admits the picks and nobody else. When KV blocks run out, running requests are offered instead and
        choosing one preempts it. Iterations without a choice run by themselves.
    ACTION: Discrete(K). Row 0 launches the engine's default (first come first served, full budget); rows 1..L launch
        with `spec.prefill_choices[row - 1]` prefill tokens; the other rows are waiting requests (or running ones, in
        the victim phase). Every 8th admission must be the request that waited longest, if it waited
        longer than `spec.longest_wait_s`.
    OBSERVATION: context float32 (C,), candidates float32 (K, F), action_mask bool (K,); the columns are named in
        `table.CONTEXT_FEATURES` and `table.CANDIDATE_FEATURES`, scaled to about [-1, 1]. True output lengths are never
        observed, only predictions.
    REWARD: `mean_e2e`: minus the seconds that requests spent in the system since the last action (Little's law: they
        sum to the total latency), over 100. `slo_goodput`: weight of the requests that finished within both limits
        of their class, over 10.
    TERMINATION: when every request of the workload is finished. TRUNCATION: never.
    EPISODE: a task drawn at random from `tasks`; of its workload a window of `episode_requests` (the whole if None).
        Without tasks or a workload: windows of 256 of 2,048 requests generated after the Azure conversation trace.
    REFERENCE: continuous batching as in Orca (OSDI 2022), vLLM (SOSP 2023) and Sarathi-Serve (OSDI 2024).
    """

    metadata = {**PointerVectorEnv.metadata, "render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        *,
        tasks: Sequence[Task] | None = None,
        spec: RequestSchedulingSpec | None = None,
        workload: Workload | None = None,
        episode_requests: int | None = None,
        debug: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if tasks is None:
            spec = spec or RequestSchedulingSpec()
            if workload is None:
                workload, episode_requests = generate("azure_conv", 2048, seed=0), episode_requests or 256
            tasks = [Task(spec, workload.with_classes(spec.slo_classes, 0))]
        self.tasks = list(tasks)
        if not self.tasks:
            raise InputError("no task given", remedy="Give at least one Task(spec, workload)")
        rows, choices = self._common_table(self.tasks)
        super().__init__(num_envs, NUM_CONTEXT, rows, NUM_CANDIDATE, debug=debug)
        self.render_mode = render_mode
        self.episode_requests = episode_requests
        for task in self.tasks:
            check_workload(task.spec, task.workload)
        longest = max(len(task.workload) for task in self.tasks)
        requests = min(longest, episode_requests or longest)
        shared = [t.workload for t in self.tasks if t.spec.engine.prefix_cache and t.workload.hash_block_tokens]
        positions = max((_most_positions(w, requests) for w in shared), default=0)
        blocks = max((int(w.hash_ids.max()) + 1 if len(w.hash_ids) else 0 for w in shared), default=0)
        self.batch = empty_batch(num_envs, max(requests, 1), positions, blocks, choices, rows)
        self.task_index = np.zeros(num_envs, np.int64)
        self._rewards = np.zeros(num_envs)
        self._done = np.zeros(num_envs, np.bool_)
        self._followed: dict[str, Any] = {}

    @staticmethod
    def _common_table(tasks: Sequence[Task]) -> tuple[int, int]:
        shapes = {(task.spec.num_candidates, len(task.spec.prefill_choices)) for task in tasks}
        if len(shapes) > 1:
            raise InputError(
                f"tasks differ in (num_candidates, launch rows): {sorted(shapes)}",
                remedy="Give all specs of one env the same num_candidates and as many prefill_choices",
            )
        return shapes.pop()

    def _reset_envs(self, which: np.ndarray) -> None:
        for e in which:
            rng = self._rngs[e]
            for _ in range(100):
                index = int(rng.integers(len(self.tasks)))
                if self._load(int(e), index, rng):
                    break
            else:
                raise InputError(
                    "100 episodes in a row had nothing to decide", remedy="Give workloads with more requests or load"
                )

    def _load(self, e: int, index: int, rng: np.random.Generator) -> bool:
        """Load an episode of a task into env e and run it to its first decision."""
        task, batch = self.tasks[index], self.batch
        workload = task.workload
        if self.episode_requests is not None and len(workload) > self.episode_requests:
            begin = int(rng.integers(len(workload) - self.episode_requests + 1))
            workload = workload.window(begin, begin + self.episode_requests)
        n, engine = len(workload), task.spec.engine
        self.task_index[e] = index
        if self._followed:  # what a rule remembers belongs to an episode
            self._followed["memory"][e] = 0.0
        batch.requests[e].view(np.uint8)[:] = 0
        batch.trace[e, :n] = trace_rows(task.spec, workload)
        batch.cost[e] = task.spec.cost.coefficients_s
        batch.choices[e] = task.spec.prefill_choices
        batch.mean_e2e[e] = task.spec.objective == "mean_e2e"
        batch.longest_wait_s[e] = task.spec.longest_wait_s
        batch.books[e, 0]["num_requests"] = n
        prefix = bool(engine.prefix_cache and workload.hash_block_tokens)
        batch.hash_offsets[e] = 0
        if prefix:
            batch.hash_offsets[e, : n + 1] = workload.hash_offsets
            batch.hash_ids[e, : len(workload.hash_ids)] = workload.hash_ids
        limits = (engine.kv_blocks, engine.block_tokens, engine.max_batch_tokens, engine.max_running, int(prefix))
        return bool(start_one(batch, e, limits, self.context[e], self.candidates[e], self.action_mask[e]))

    def _step_envs(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        step_batch(self.batch, actions, self._rewards, self._done, self.context, self.candidates, self.action_mask)
        return self._rewards.copy(), self._done.copy(), np.zeros(self.num_envs, np.bool_)

    def rule_actions(self, rules: Sequence[Rule]) -> np.ndarray:
        """int64 (N,): what a rule would choose now, `rules[task]` for the envs on that task.

        A teacher for imitation: the rule decides once an iteration, then its picks are followed one by one.
        """
        n = self.batch.order.shape[1]
        if self._followed.get("rules") != tuple(rules):
            size = max(rule.new_memory(n).size for rule in rules)
            self._followed = {
                "rules": tuple(rules),
                "memory": np.zeros((self.num_envs, size)),
                "levers": np.zeros((self.num_envs, 1), LEVERS_DTYPE),
                "order": np.zeros((self.num_envs, n), np.int64),
                "preempt": np.zeros((self.num_envs, n), np.int64),
                "engine": np.zeros((self.num_envs, 1), ENGINE_DTYPE),
                "waiting": np.zeros((self.num_envs, n), np.int64),
            }
        f = self._followed
        present = [rules[int(i)] for i in self.task_index]
        params = np.zeros((self.num_envs, max(len(rule.params) for rule in rules)))
        for e, rule in enumerate(present):
            params[e, : len(rule.params)] = rule.params
        actions = np.zeros(self.num_envs, np.int64)
        wanted = (f["levers"], f["order"], f["preempt"])
        for kernel in {rule.decide_kernel for rule in present}:
            members = np.array([e for e, rule in enumerate(present) if rule.decide_kernel is kernel])
            memory, state = f["memory"], (f["engine"], f["waiting"])
            rule_actions_batch(self.batch, members, kernel, params, memory, *wanted, *state, self.action_mask, actions)
        return actions

    def render(self) -> tuple[np.ndarray, ...] | None:
        """A picture of each engine, uint8 (height, width, 3); None without a render mode."""
        if self.render_mode is None:
            return None
        from .render import draw_engine, rgb_array

        b = self.batch
        states = (State(b.engine[e], b.requests[e], b.waiting[e], b.running[e]) for e in range(self.num_envs))
        return tuple(rgb_array(draw_engine(state)) for state in states)

    @property
    def iterations(self) -> np.ndarray:
        """int64 (N,): engine iterations since the start of each episode."""
        return self.batch.engine["iterations"][:, 0].copy()


def _most_positions(workload: Workload, requests: int) -> int:
    """Most hash positions of any window of `requests` requests."""
    offsets = workload.hash_offsets
    n = min(requests, len(workload))
    return int((offsets[n:] - offsets[: len(offsets) - n]).max())


class RequestSchedulingEnv(PointerEnv):
    """One request scheduling env: see `RequestSchedulingVectorEnv`, whose keyword arguments it takes."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(RequestSchedulingVectorEnv(1, **kwargs))
