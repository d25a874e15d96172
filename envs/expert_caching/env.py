"""`schedlab/ExpertCaching-v0`: the cache of an offloaded Mixture-of-Experts model as a pointer problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import InputError
from ..core.kernel import njit, njit_borrowed
from ..core.vector_env import GraphSize, PointerEnv, PointerVectorEnv
from .advice import Advice, show_advice
from .affinity import Affinity
from .rule import Rule
from .sim import (
    BOOKS_DTYPE,
    COST_DTYPE,
    EPOCH_DTYPE,
    QUEUE_DTYPE,
    Sim,
    check_shape,
    cost_rows,
    run_epoch,
    set_limits,
    start,
)
from .spec import ExpertCachingSpec
from .state import (
    ENGINE_DTYPE,
    EXPERT_DTYPE,
    LAYER_DTYPE,
    PLAN_DTYPE,
    SEQUENCE_DTYPE,
    SLOT_DTYPE,
    Decision,
    State,
    empty_state,
    reset_decision,
)
from .table import (
    NUM_CANDIDATE,
    NUM_CONTEXT,
    PREFETCH,
    TABLE_DTYPE,
    Table,
    action_of,
    choose,
    next_choice,
    open_epoch,
    resolve_wanted,
    show_choice,
    strongest,
    write_candidate_nodes,
    write_candidates,
    write_context,
    write_graph,
    write_mask,
)
from .timeline import LOAD_DTYPE
from .workload import Workload, generate, interleave


@dataclass(frozen=True)
class Task:
    """A caching problem and the routing to serve: what an episode is drawn from."""

    spec: ExpertCachingSpec
    workload: Workload
    advice: Advice | None = None
    """What a predictor says of this workload; the observation shows it."""

    def __post_init__(self) -> None:
        if self.advice is not None:
            self.advice.check(self.workload)


class Batch(NamedTuple):
    """All envs: the arrays of `Sim`, `Table` and `Decision`, with a leading axis of N envs unless they are shared."""

    engine: np.ndarray  # (N, 1) ENGINE_DTYPE
    layers: np.ndarray  # (N, L)
    experts: np.ndarray  # (N, L, E)
    slots: np.ndarray  # (N, S)
    needed: np.ndarray  # (N, M)
    missing: np.ndarray  # (N, M)
    sequences: np.ndarray  # (N, B)
    history: np.ndarray  # (N, B, W, L, k)
    counts: np.ndarray  # (N, B, L, E)
    known: np.ndarray  # (N, K, B, L, k)
    routing: np.ndarray  # (T, L, k), shared: the tokens of all tasks
    predicted: np.ndarray  # (T, L, P), shared
    predicted_probability: np.ndarray  # (T, L, P), shared
    token_ids: np.ndarray  # (T,), shared
    token_sequence: np.ndarray  # (T,), shared
    token_position: np.ndarray  # (T,), shared
    advice_keep: np.ndarray  # (T, L, E), shared, or empty: `Advice`
    advice_above: np.ndarray  # (T, L, E), shared, or empty
    batches: np.ndarray  # (N, steps, B)
    cost: np.ndarray  # (N, 1) COST_DTYPE
    books: np.ndarray  # (N, 1) BOOKS_DTYPE
    uses: np.ndarray  # (N, E)
    queue: np.ndarray  # (N, S) QUEUE_DTYPE
    no_loads: np.ndarray  # (0,) LOAD_DTYPE, shared: nothing is recorded
    no_epochs: np.ndarray  # (0,) EPOCH_DTYPE, shared
    table_head: np.ndarray  # (N, 1) TABLE_DTYPE
    table_rows: np.ndarray  # (N, K, 3)
    table_open: np.ndarray  # (N, K)
    table_scores: np.ndarray  # (N, K)
    table_affinity: np.ndarray  # (N, 2, E)
    plan: np.ndarray  # (N, 1) PLAN_DTYPE
    victims: np.ndarray  # (N, M)
    prefetch: np.ndarray  # (N, P, 3)
    num_filled: np.ndarray  # (N,) int64 rows of the observation that are filled
    graph_epoch: np.ndarray  # (N,) int64 epoch that the nodes and edges of the observation show, -1: none
    loss: np.ndarray  # (N,) float64 stall, or loads, at the last action
    unit: np.ndarray  # (N,) float64 what the loss is divided by: seconds of a load, or 1


@njit_borrowed
def state_of(batch: Batch, n: int) -> State:
    """What env n shows to a policy (views)."""
    return State(
        batch.engine[n],
        batch.layers[n],
        batch.experts[n],
        batch.slots[n],
        batch.needed[n],
        batch.missing[n],
        batch.sequences[n],
        batch.history[n],
        batch.counts[n],
        batch.known[n],
    )


@njit_borrowed
def sim_of(batch: Batch, n: int) -> Sim:
    """The simulation of env n (views)."""
    return Sim(
        state_of(batch, n),
        batch.routing,
        batch.predicted,
        batch.predicted_probability,
        batch.token_ids,
        batch.token_sequence,
        batch.token_position,
        batch.batches[n],
        batch.cost[n],
        batch.books[n],
        batch.uses[n],
        batch.queue[n],
        batch.no_loads,
        batch.no_epochs,
    )


@njit_borrowed
def advice_of(batch: Batch) -> Advice:
    """What is said of the tokens of all envs (views)."""
    return Advice(batch.advice_keep, batch.advice_above)


@njit_borrowed
def table_of(batch: Batch, n: int) -> Table:
    """The action table of env n (views)."""
    return Table(
        batch.table_head[n], batch.table_rows[n], batch.table_open[n], batch.table_scores[n], batch.table_affinity[n]
    )


@njit_borrowed
def decision_of(batch: Batch, n: int) -> Decision:
    """The decision being built in env n (views)."""
    return Decision(batch.plan[n], batch.victims[n], batch.prefetch[n])


@njit_borrowed
def advance(sim: Sim, table: Table, decision: Decision, affinity: Affinity, advice: Advice) -> bool:
    """From a gate's answer on, run epochs until there is something to decide. False when the workload is finished."""
    while not sim.books[0].done:
        show_advice(sim.state, sim.batches, advice)
        reset_decision(sim.state, decision)
        open_epoch(sim.state, table, affinity)
        if next_choice(sim.state, table, decision):
            return True
        run_epoch(sim, decision)
    return False


@njit_borrowed
def loss_of(sim: Sim) -> float:
    """Stall in seconds since the start; in eviction-only mode, loads."""
    return float(sim.state.engine[0].num_demand_loads) if sim.cost[0].eviction_only else sim.books[0].total_stall_s


@njit_borrowed
def observe(sim: Sim, table: Table, decision: Decision, num_filled, same_rows: bool, context, candidates, mask) -> None:
    """Write the observation of one env; after the last step it is empty, and only the first row is legal."""
    if sim.books[0].done:
        context[:] = 0.0
        candidates[:] = 0.0
        mask[:] = False
        mask[0] = True
        num_filled[0] = 0
        return
    write_context(sim.state, table, decision, context)
    write_mask(sim.state, table, mask)
    if not same_rows:
        write_candidates(sim.state, table, num_filled[0], candidates)
        num_filled[0] = table.head[0].num_rows


@njit_borrowed
def step_batch(batch: Batch, affinity: Affinity, actions, rewards, done, context, candidates, mask) -> None:
    """One action in each env; writes rewards (N,), done (N,) and the observations."""
    for n in range(len(actions)):
        sim, table, decision = sim_of(batch, n), table_of(batch, n), decision_of(batch, n)
        phase = table.head[0].phase
        choose(sim.state, table, decision, actions[n])
        in_epoch = next_choice(sim.state, table, decision)
        if not in_epoch:
            run_epoch(sim, decision)
            advance(sim, table, decision, affinity, advice_of(batch))
        done[n] = sim.books[0].done != 0
        loss = loss_of(sim)
        rewards[n] = (batch.loss[n] - loss) / batch.unit[n]
        batch.loss[n] = loss
        same_rows = in_epoch and table.head[0].phase == phase
        observe(sim, table, decision, batch.num_filled[n:], same_rows, context[n], candidates[n], mask[n])


@njit_borrowed
def start_one(batch: Batch, n: int, affinity: Affinity, warm: bool, context, candidates, mask) -> bool:
    """Start env n, whose episode is loaded, and run to its first decision. False if it has none."""
    sim, table, decision = sim_of(batch, n), table_of(batch, n), decision_of(batch, n)
    start(sim, warm)
    alive = advance(sim, table, decision, affinity, advice_of(batch))
    batch.loss[n] = loss_of(sim)
    observe(sim, table, decision, batch.num_filled[n:], False, context, candidates, mask)
    return alive


@njit_borrowed
def write_graphs(batch: Batch, which, following, nodes, edges, edge_type, edge_mask, candidate_node) -> None:
    """The graphs of the envs listed; after its last step an env has none. Nodes and edges stay through an epoch."""
    for n in which:
        if batch.books[n, 0].done:
            nodes[n] = 0.0
            edges[n] = 0
            edge_type[n] = 0
            edge_mask[n] = False
            candidate_node[n] = -1
            batch.graph_epoch[n] = -1
            continue
        state, table, epoch = state_of(batch, n), table_of(batch, n), batch.engine[n, 0].epoch
        if batch.graph_epoch[n] != epoch:
            batch.graph_epoch[n] = epoch
            write_graph(state, table, following, nodes[n], edges[n], edge_type[n], edge_mask[n])
        write_candidate_nodes(state, table, nodes.shape[1], candidate_node[n])


@njit
def follow_batch(batch: Batch, decide, params, memory, plan, victims, prefetch, epochs, actions) -> None:
    """What a rule would choose in each env; see `ExpertCachingVectorEnv.rule_actions`."""
    for n in range(len(actions)):
        if batch.books[n, 0].done:
            actions[n] = 0
            continue
        wanted = Decision(plan[n], victims[n], prefetch[n])
        if epochs[n] != batch.engine[n, 0].epoch:
            epochs[n] = batch.engine[n, 0].epoch
            follow_one(batch, n, wanted)
            decide(_state_of(batch, n), params[n], memory[n], wanted)
            resolve_one(batch, n, wanted)
        actions[n] = followed_action(batch, n, wanted)


_state_of = njit(state_of.py_func)  # counted references, for the rule's own kernel


@njit_borrowed
def follow_one(batch: Batch, n: int, wanted: Decision) -> None:
    """The default, which the rule changes."""
    reset_decision(state_of(batch, n), wanted)


@njit_borrowed
def resolve_one(batch: Batch, n: int, wanted: Decision) -> None:
    """What can be done of it."""
    resolve_wanted(state_of(batch, n), wanted)


@njit_borrowed
def followed_action(batch: Batch, n: int, wanted: Decision) -> int:
    """The row that builds what the rule wants."""
    return action_of(state_of(batch, n), table_of(batch, n), wanted, decision_of(batch, n))


@njit_borrowed
def show_choices(which, actions, candidates) -> None:
    """Mark the row that a rule would choose in each of the envs listed."""
    for n in which:
        show_choice(candidates[n], actions[n])


class ExpertCachingVectorEnv(PointerVectorEnv):
    """Which expert leaves the cache for a missing one, what streams past it, and what is loaded ahead.

    DECIDED, in each epoch (a layer of a step) in which there is a choice: a victim, or bypass, for every missing expert
        that finds no free slot; then up to `spec.max_prefetch` prefetches, each with a victim if its layer has no free
        slot. `table.py` has the phases. Epochs without a choice run by themselves.
    ACTION: Discrete(K). Row 0 is bypass (where allowed), or no prefetch; the other rows are slots to give up, or
        experts to prefetch.
    OBSERVATION: context float32 (C,), candidates float32 (K, F), action_mask bool (K,); the columns are named in
        `table.CONTEXT_FEATURES` and `table.CANDIDATE_FEATURES`, scaled to about [-1, 1]. The routing of higher layers
        and later tokens is never observed. With `graph=True` also the typed graph of `table.write_graph`. With `shown`,
        a rule for each task, a column of the candidates marks the row that the rule would choose.
    REWARD: minus the stall since the last action, in loads (`CostModel.load_s`); in eviction-only mode minus the loads.
    TERMINATION: when the episode's tokens are served. TRUNCATION: never.
    EPISODE: a task drawn at random from `tasks`; of its workload random sequences, `episode_tokens` tokens in all (the
        last one is cut; the whole workload if None), interleaved as the spec says. The cache is carried over.
        Without tasks or a workload: 512 tokens of synthetic routing (`workload.generate`).
    REFERENCE: expert offloading as in Mixtral-offloading (Eliseev and Mazur 2023) and MoE-Infinity (Xue et al. 2024).
    """

    metadata = {**PointerVectorEnv.metadata, "render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        *,
        tasks: Sequence[Task] | None = None,
        spec: ExpertCachingSpec | None = None,
        workload: Workload | None = None,
        episode_tokens: int | None = None,
        affinity: Affinity | None = None,
        shown: Sequence[Rule] | None = None,
        graph: bool = False,
        debug: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if tasks is None:
            if workload is None:
                workload, episode_tokens = generate(seed=0), episode_tokens or 512
            tasks = [Task(spec or ExpertCachingSpec(max_prefetch=2, history_tokens=1), workload)]
        self.tasks = list(tasks)
        if not self.tasks:
            raise InputError("no task given", remedy="Give at least one Task(spec, workload)")
        if episode_tokens is not None and episode_tokens < 1:
            raise InputError(f"episode_tokens is {episode_tokens}", remedy="Give a positive number of tokens")
        if shown is not None and len(shown) != len(self.tasks):
            raise InputError(f"{len(shown)} rules to show for {len(self.tasks)} tasks", remedy="Give one a task")
        self.shown = shown
        self._check_common_shape()
        self.affinity = affinity if affinity is not None else Affinity.fit(self.tasks[0].workload)
        self._following = strongest(self.affinity)
        rows, size = self.tasks[0].spec.num_candidates, self._graph_size() if graph else None
        super().__init__(num_envs, NUM_CONTEXT, rows, NUM_CANDIDATE, graph=size, debug=debug)
        self.render_mode = render_mode
        self.episode_tokens = episode_tokens
        # tokens are stored once for every workload, and once more where tasks have other advice about it
        sources = {(id(task.workload), id(task.advice)): task for task in self.tasks}
        self.workloads = [task.workload for task in sources.values()]
        self._advice = [task.advice or Advice.none() for task in sources.values()]
        self._source_of = [list(sources).index((id(task.workload), id(task.advice))) for task in self.tasks]
        self._first_token = np.cumsum([0, *(w.num_tokens for w in self.workloads)])
        self.batch = self._empty_batch()
        self.task_index = np.zeros(num_envs, np.int64)
        self._rewards = np.zeros(num_envs)
        self._done = np.zeros(num_envs, np.bool_)
        self._episodes: list[Workload] = [self.workloads[0]] * num_envs
        self._followed: dict[str, Any] = {}

    def _check_common_shape(self) -> None:
        """Envs of one batch share their arrays: the model's shape and a few limits must agree between tasks."""
        shapes = {
            (t.workload.num_layers, t.workload.num_experts, t.workload.top_k, t.workload.predicted.shape[2])
            for t in self.tasks
        }
        limits = {
            (t.spec.num_candidates, t.spec.num_sequences, t.spec.history_tokens, t.spec.known_steps) for t in self.tasks
        }
        for what, values in (
            ("(layers, experts, top k, predictions)", shapes),
            ("(num_candidates, num_sequences, history_tokens, known_steps)", limits),
        ):
            if len(values) > 1:
                raise InputError(
                    f"tasks differ in {what}: {sorted(values)}", remedy="Give them an env each, or make them agree"
                )
        if len({task.advice is None for task in self.tasks}) > 1:
            raise InputError("some tasks have advice, others none", remedy="Give it to all tasks, or to none")

    def _graph_size(self) -> GraphSize:
        """Room for the layers in reach and the edges of everything that a batch may need."""
        one = self.tasks[0].workload
        reach = 1 + max(t.spec.prefetch_depth if t.spec.max_prefetch else 0 for t in self.tasks)
        needed = min(one.num_experts, one.top_k * self.tasks[0].spec.num_sequences)
        reach = min(reach, one.num_layers)
        edges = needed * min(reach, 2) * self._following.shape[3]
        return GraphSize(nodes=reach * one.num_experts, columns=NUM_CANDIDATE, edges=edges, edge_types=2)

    def _empty_batch(self) -> Batch:
        """Arrays for all envs, large enough for every task."""
        n, spec, one = self.num_envs, self.tasks[0].spec, self.tasks[0].workload
        slots = [t.spec.slots_of(one.num_layers, one.num_experts, one.top_k) for t in self.tasks]
        largest = max(slots, key=sum)
        state = empty_state(
            largest,
            one.num_experts,
            one.top_k,
            num_sequences=spec.num_sequences,
            history_tokens=spec.history_tokens,
            known_steps=spec.known_steps,
        )
        longest = max(w.num_tokens for w in self.workloads)
        steps = min(longest, self.episode_tokens or longest)
        prefetches = max(t.spec.max_prefetch for t in self.tasks)
        k, dtypes = spec.num_candidates, (ENGINE_DTYPE, LAYER_DTYPE, EXPERT_DTYPE, SLOT_DTYPE)
        assert tuple(array.dtype for array in state[:4]) == dtypes and state.sequences.dtype == SEQUENCE_DTYPE

        def joined(name: str) -> np.ndarray:
            tokens = np.concatenate([getattr(w, name) for w in self.workloads])
            # as in the workloads: kernels are compiled once for read-only arrays, in the simulator and here
            tokens.setflags(write=getattr(self.workloads[0], name).flags.writeable)
            return tokens

        return Batch(
            **{name: np.repeat(array[None], n, axis=0) for name, array in state._asdict().items()},
            routing=joined("experts"),
            predicted=joined("predicted"),
            predicted_probability=joined("predicted_probability"),
            token_ids=joined("token_ids"),
            token_sequence=joined("token_sequence"),
            token_position=joined("token_position"),
            advice_keep=np.concatenate([advice.keep for advice in self._advice]),
            advice_above=np.concatenate([advice.above for advice in self._advice]),
            batches=np.full((n, steps, spec.num_sequences), -1, np.int64),
            cost=np.zeros((n, 1), COST_DTYPE),
            books=np.zeros((n, 1), BOOKS_DTYPE),
            uses=np.zeros((n, one.num_experts), np.int64),
            queue=np.zeros((n, len(state.slots)), QUEUE_DTYPE),
            no_loads=np.zeros(0, LOAD_DTYPE),
            no_epochs=np.zeros(0, EPOCH_DTYPE),
            table_head=np.zeros((n, 1), TABLE_DTYPE),
            table_rows=np.zeros((n, k, 3), np.int64),
            table_open=np.zeros((n, k), np.bool_),
            table_scores=np.zeros((n, k)),
            table_affinity=np.zeros((n, 2, one.num_experts), np.float32),
            plan=np.zeros((n, 1), PLAN_DTYPE),
            victims=np.zeros((n, len(state.missing)), np.int64),
            prefetch=np.zeros((n, prefetches, 3), np.int64),
            num_filled=np.zeros(n, np.int64),
            graph_epoch=np.full(n, -1),
            loss=np.zeros(n),
            unit=np.ones(n),
        )

    def _reset_envs(self, which: np.ndarray) -> None:
        for n in which:
            rng = self._rngs[n]
            for _ in range(100):
                if self._load(int(n), int(rng.integers(len(self.tasks))), rng):
                    break
            else:
                raise InputError(
                    "100 episodes in a row had nothing to decide", remedy="Give a smaller cache or longer episodes"
                )
        self._show_choices(which)
        if self.graph:
            write_graphs(self.batch, which, self._following, *self.graph.values())

    def _load(self, n: int, index: int, rng: np.random.Generator) -> bool:
        """Load an episode of a task into env n and run it to its first decision."""
        spec, workload, batch = self.tasks[index].spec, self.tasks[index].workload, self.batch
        tokens, lengths = self._draw(workload, rng)
        batches = interleave(lengths, spec.num_sequences)
        self.task_index[n] = index
        self._episodes[n] = workload.take(tokens, lengths)
        if self._followed:  # what a rule remembers belongs to an episode
            self._followed["memory"][n] = 0.0
            self._followed["epochs"][n] = -1
        rows = tokens + self._first_token[self._source_of[index]]
        batch.batches[n] = -1
        batch.batches[n, : len(batches)] = np.where(batches >= 0, rows[batches], -1)
        slots = spec.slots_of(workload.num_layers, workload.num_experts, workload.top_k)
        empty = empty_state(slots, workload.num_experts, workload.top_k, pooled=spec.pooled)
        batch.layers[n] = empty.layers
        batch.engine[n, 0]["num_slots"], batch.engine[n, 0]["pooled"] = sum(slots), spec.pooled
        set_limits(State(*(array[n] for array in batch[: len(State._fields)])), spec, workload.prior)
        batch.cost[n] = cost_rows(spec, workload)
        batch.books[n, 0]["num_steps"] = len(batches)
        batch.graph_epoch[n] = -1
        batch.unit[n] = 1.0 if spec.eviction_only else spec.cost.load_s
        return bool(
            start_one(
                batch, n, self.affinity, spec.warm_start, self.context[n], self.candidates[n], self.action_mask[n]
            )
        )

    def _draw(self, workload: Workload, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of an episode and the lengths of its sequences."""
        if self.episode_tokens is None or workload.num_tokens <= self.episode_tokens:
            return np.arange(workload.num_tokens), workload.lengths
        left, tokens, lengths = self.episode_tokens, [], []
        for sequence in rng.permutation(len(workload)):
            length = min(int(workload.lengths[sequence]), left)
            tokens.append(workload.sequence_offsets[sequence] + np.arange(length))
            lengths.append(length)
            left -= length
            if left == 0:
                break
        return np.concatenate(tokens), np.array(lengths)

    def _step_envs(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        step_batch(
            self.batch,
            self.affinity,
            actions,
            self._rewards,
            self._done,
            self.context,
            self.candidates,
            self.action_mask,
        )
        self._show_choices(np.flatnonzero(~self._done))
        if self.graph:
            write_graphs(self.batch, np.arange(self.num_envs), self._following, *self.graph.values())
        return self._rewards.copy(), self._done.copy(), np.zeros(self.num_envs, np.bool_)

    def _show_choices(self, which: np.ndarray) -> None:
        """Mark what the rules that are shown would choose."""
        if self.shown is not None:
            actions = self.rule_actions([self.shown[index] for index in self.task_index.tolist()])
            show_choices(which, actions, self.candidates)

    def state(self, n: int = 0) -> State:
        """What env n shows to a policy (views)."""
        return State(*(array[n] for array in self.batch[: len(State._fields)]))

    def episode(self, n: int = 0) -> Workload:
        """The routing that env n serves in this episode. It holds the future: for oracles."""
        return self._episodes[n]

    def rule_actions(self, rules: Sequence[Rule]) -> np.ndarray:
        """int64 (N,): what a rule would choose now, `rules[n]` in env n, all of one kernel.

        A teacher for imitation: the rule decides once an epoch, then its decision is followed row by row. It is asked
        only in epochs in which there is a choice, so rules that must see every one (ARC, LFU) are approximate here.
        An oracle (`belady(env.episode(n), spec)`) must be made anew when the episode of its env ends. Where rules are
        shown, only their kernel can be followed: what a rule remembers is kept for one at a time.
        """
        kernel = rules[0].decide_kernel
        if self.shown is not None and kernel is not self.shown[0].decide_kernel:
            raise InputError(
                f"rule {rules[0].name!r} followed while {self.shown[0].name!r} is shown",
                remedy="Follow the rules that are shown, or make an env without `shown`",
            )
        if len(rules) != self.num_envs or any(rule.decide_kernel is not kernel for rule in rules):
            raise InputError(f"{len(rules)} rules for {self.num_envs} envs", remedy="Give one an env, of one kernel")
        f, b = self._followed, self.batch
        if f.get("kernel") is not kernel:
            f = self._followed = {
                "kernel": kernel,
                "rules": [None] * self.num_envs,
                "params": np.zeros((self.num_envs, 0)),
                "memory": np.stack([rule.new_memory(self.state(n)) for n, rule in enumerate(rules)]),
                "wanted": (np.zeros_like(b.plan), np.zeros_like(b.victims), np.zeros_like(b.prefetch)),
                "epochs": np.full(self.num_envs, -1),
            }
        for n, rule in enumerate(rules):
            if f["rules"][n] is not rule:
                check_shape(rule, self.tasks[0].workload)
                f["rules"][n] = rule
                self._set_params(n, rule.param_array)
        actions = np.zeros(self.num_envs, np.int64)
        arguments: tuple[Any, ...] = (b, kernel, f["params"], f["memory"], *f["wanted"], f["epochs"], actions)
        follow_batch(*arguments)
        return actions

    def _set_params(self, n: int, params: np.ndarray) -> None:
        """Give the rule followed in env n its parameters; tables of episodes differ in length."""
        f = self._followed
        room = f["params"].shape[1]
        if len(params) > room:
            f["params"] = np.pad(f["params"], ((0, 0), (0, len(params) - room)))
        f["params"][n] = 0.0
        f["params"][n, : len(params)] = params

    def render(self) -> tuple[np.ndarray, ...] | None:
        """A picture of each cache, uint8 (height, width, 3); None without a render mode."""
        if self.render_mode is None:
            return None
        from .render import draw_cache, rgb_array

        return tuple(rgb_array(draw_cache(self.state(n))) for n in range(self.num_envs))

    @property
    def in_prefetch(self) -> np.ndarray:
        """bool (N,): the present decision is about prefetching."""
        return self.batch.table_head["phase"][:, 0] >= PREFETCH


class ExpertCachingEnv(PointerEnv):
    """One expert caching env: see `ExpertCachingVectorEnv`, whose keyword arguments it takes."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(ExpertCachingVectorEnv(1, **kwargs))
