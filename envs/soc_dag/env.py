"""`schedlab/SocDag-v0`: the scheduler of a system of unlike processing elements as a pointer problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import InputError
from ..core.kernel import entry_point, njit, njit_borrowed
from ..core.vector_env import GraphSize, PointerEnv, PointerVectorEnv
from .generate import random_stream
from .graph import (
    NUM_EDGE,
    NUM_EDGE_TYPES,
    NUM_NODE,
    GraphArrays,
    clear_graph,
    empty_graph,
    graph_of,
    write_graph,
)
from .library import Library, build_library
from .look_ahead import Outlook
from .rule import Rule
from .sim import ARRIVAL_DTYPE, BOOKS_DTYPE, KIND_DTYPE, Sim, arrival_rows, configure, run_decision, start
from .spec import SocDagSpec
from .state import DECISION_DTYPE, Decision, State, empty_state, reset_decision
from .table import (
    NUM_CANDIDATE,
    NUM_CONTEXT,
    Table,
    action_of,
    choose,
    empty_table,
    open_table,
    write_observation,
)
from .workload import Stream, Workload, noise_draws

LATENCY, MAKESPAN, ENERGY, EDP, DEADLINE = range(5)
"""Values of `engine["objective"]`, in the order of `spec.OBJECTIVES`."""


@dataclass(frozen=True)
class Task:
    """A scheduling problem and its jobs: what an episode is drawn from."""

    spec: SocDagSpec
    workload: Workload | Stream


class Batch(NamedTuple):
    """All envs: the arrays of `Sim`, `Table` and `Decision`, with a leading axis of B envs unless they are shared."""

    engine: np.ndarray  # (B, 1) ENGINE_DTYPE
    pes: np.ndarray  # (B, P)
    jobs: np.ndarray  # (B, J)
    tasks: np.ndarray  # (B, N)
    times: np.ndarray  # (B, N, P)
    transfer: np.ndarray  # (B, N, P)
    edges: np.ndarray  # (B, E)
    ready: np.ndarray  # (B, N)
    live: np.ndarray  # (B, J)
    levels: np.ndarray  # (B, P, L)
    default_level: np.ndarray  # (B, P)
    ahead: np.ndarray  # (B, N, P)
    library_dags: np.ndarray  # (D,), shared: the graphs of all tasks
    library_nodes: np.ndarray  # (n,), shared
    library_times: np.ndarray  # (n, P), shared
    library_targets: np.ndarray  # (e,), shared
    library_volumes: np.ndarray  # (e,), shared
    library_moved: np.ndarray  # (e,), shared
    library_ahead: np.ndarray  # (n, P), shared
    arrivals: np.ndarray  # (B, J) ARRIVAL_DTYPE
    draws: np.ndarray  # (B, N)
    latency: np.ndarray  # (B, P, P)
    bandwidth: np.ndarray  # (B, P, P)
    kinds: np.ndarray  # (B, K)
    power: np.ndarray  # (B, K, L, C)
    next_at: np.ndarray  # (B, P)
    next_task: np.ndarray  # (B, N)
    tail: np.ndarray  # (B, P)
    data_at: np.ndarray  # (B, N)
    books: np.ndarray  # (B, 1) BOOKS_DTYPE
    table_head: np.ndarray  # (B, 1) TABLE_DTYPE
    table_rows: np.ndarray  # (B, R, 3)
    table_shown: np.ndarray  # (B, V)
    table_node_of: np.ndarray  # (B, N)
    outlook_num_considered: np.ndarray  # (B, 1)
    outlook_considered: np.ndarray  # (B, 4K)
    outlook_of_tasks: np.ndarray  # (B, 4K, 6)
    outlook_planned: np.ndarray  # (B, 6, 4K)
    outlook_of_pes: np.ndarray  # (B, 11, P)
    outlook_job_end: np.ndarray  # (B, J)
    bind: np.ndarray  # (B, 1) DECISION_DTYPE
    loss: np.ndarray  # (B,) float64 the objective at the last action


@njit_borrowed
def state_of(batch: Batch, b: int) -> State:
    """What env b shows to a policy (views)."""
    return State(
        batch.engine[b],
        batch.pes[b],
        batch.jobs[b],
        batch.tasks[b],
        batch.times[b],
        batch.transfer[b],
        batch.edges[b],
        batch.ready[b],
        batch.live[b],
        batch.levels[b],
        batch.default_level[b],
        batch.ahead[b],
    )


@njit_borrowed
def sim_of(batch: Batch, b: int) -> Sim:
    """The simulation of env b (views)."""
    library = Library(
        batch.library_dags,
        batch.library_nodes,
        batch.library_times,
        batch.library_targets,
        batch.library_volumes,
        batch.library_moved,
        batch.library_ahead,
    )
    return Sim(
        state_of(batch, b),
        library,
        batch.arrivals[b],
        batch.draws[b],
        batch.latency[b],
        batch.bandwidth[b],
        batch.kinds[b],
        batch.power[b],
        batch.next_at[b],
        batch.next_task[b],
        batch.tail[b],
        batch.data_at[b],
        batch.books[b],
    )


@njit_borrowed
def table_of(batch: Batch, b: int) -> Table:
    """The action table of env b (views)."""
    outlook = Outlook(
        batch.outlook_num_considered[b],
        batch.outlook_considered[b],
        batch.outlook_of_tasks[b],
        batch.outlook_planned[b],
        batch.outlook_of_pes[b],
        batch.outlook_job_end[b],
    )
    return Table(batch.table_head[b], batch.table_rows[b], batch.table_shown[b], batch.table_node_of[b], outlook)


@njit_borrowed
def open_choice(sim: Sim, table: Table, decision: Decision) -> bool:
    """List the rows; decisions without a choice are taken. False when the jobs are finished."""
    while not sim.books[0].done:
        open_table(sim.state, table)
        if table.head[0].num_rows > 2 or sim.state.engine[0].num_in_progress > 0:
            return True
        choose(table, decision, 1)
        run_decision(sim, decision)
    return False


@njit_borrowed
def loss_of(sim: Sim) -> float:
    """What the reward counts, from the start to now; see `SocDagVectorEnv`."""
    engine, books = sim.state.engine[0], sim.books[0]
    objective = engine.objective
    if objective == MAKESPAN:
        return engine.now / engine.unit
    if objective == ENERGY:
        return engine.energy / (engine.unit * engine.watts_unit) if engine.watts_unit > 0.0 else 0.0
    if objective == EDP:
        energy = engine.energy / (engine.unit * engine.watts_unit) if engine.watts_unit > 0.0 else 0.0
        return energy * books.live_us / (engine.unit * books.num_jobs)
    if objective == DEADLINE:
        return float(engine.num_late)
    return books.live_us / engine.unit


class Views(NamedTuple):
    """What the envs show, with a leading axis of B envs: the arrays of `PointerVectorEnv`."""

    context: np.ndarray  # (B, C) float32
    candidates: np.ndarray  # (B, K, F) float32
    action_mask: np.ndarray  # (B, K) bool
    graph: GraphArrays  # of the envs; without nodes if no graph is shown


@njit_borrowed
def observe(sim: Sim, table: Table, views: Views, b: int) -> None:
    """Write the observation of env b; after the last step it is empty, and only the first row is legal."""
    has_graph = views.graph.nodes.shape[1] > 0
    if sim.books[0].done:
        views.context[b] = 0.0
        views.candidates[b] = 0.0
        views.action_mask[b] = False
        views.action_mask[b, 0] = True
        table.head[0].num_filled = 0
        if has_graph:
            clear_graph(table, graph_of(views.graph, b))
        return
    write_observation(sim.state, table, views.context[b], views.candidates[b], views.action_mask[b])
    if has_graph:
        write_graph(sim.state, table, graph_of(views.graph, b))


@njit_borrowed
def step_batch(batch: Batch, actions, rewards, done, views: Views) -> None:
    """One action in each env; writes rewards (B,), done (B,) and the observations."""
    for b in range(len(actions)):
        sim, table, decision = sim_of(batch, b), table_of(batch, b), Decision(batch.bind[b])
        choose(table, decision, actions[b])
        run_decision(sim, decision)
        open_choice(sim, table, decision)
        done[b] = sim.books[0].done != 0
        loss = loss_of(sim)
        rewards[b] = batch.loss[b] - loss
        batch.loss[b] = loss
        observe(sim, table, views, b)


@njit_borrowed
def start_one(batch: Batch, b: int, views: Views) -> bool:
    """Start env b, whose episode is loaded, and run to its first choice. False if it has none."""
    sim, table, decision = sim_of(batch, b), table_of(batch, b), Decision(batch.bind[b])
    start(sim)
    alive = open_choice(sim, table, decision)
    batch.loss[b] = loss_of(sim)
    observe(sim, table, views, b)
    return alive


_state_of = njit(state_of.py_func)  # counted references, for the rule's own kernel


@njit
def follow_batch(batch: Batch, decide, params, memory, bind, actions) -> None:
    """What a rule would choose in each env; see `SocDagVectorEnv.rule_actions`."""
    for b in range(len(actions)):
        wanted = Decision(bind[b])
        reset_decision(wanted)
        decide(_state_of(batch, b), params[b], memory[b], wanted)
        actions[b] = followed_action(batch, b, wanted)


@njit_borrowed
def followed_action(batch: Batch, b: int, wanted: Decision) -> int:
    """The row that does what a rule wants; to wait, or the first row, where none does."""
    action = action_of(state_of(batch, b), table_of(batch, b), wanted)
    if action < 0:
        return 0 if batch.engine[b, 0].num_in_progress > 0 else 1
    return action


class SocDagVectorEnv(PointerVectorEnv):
    """Which ready task of which job runs on which processing element (PE), or none for now.

    DECIDED whenever a task finished or a job arrived, and after each binding at the same time, as long as there are a
    task
        and a PE that it may be bound to: late (to an idle PE, the default), when the task becomes ready, or when its
        job arrives, as the spec says (`state.py`). Decisions without a choice are taken by themselves.
    ACTION: Discrete(K). Row 0 waits for the next event; the other rows are (task, PE) pairs, for each operating point
        where the spec lets frequencies be chosen.
    OBSERVATION: context float32 (C,), candidates float32 (K, F), action_mask bool (K,); with `graph` (the default) also
        nodes float32 (V, Fn) for PEs and unfinished tasks of live jobs, edges int32 (2, E), edge_type int32 (E,),
        edge_mask bool (E,), edge_features float32 (E, Fe), node_group int32 (V,), the job of a task (-1 for PEs), and
        candidate_node and candidate_place int32 (K,), the task and the PE of a row. The columns are named in
        `table.CONTEXT_FEATURES`, `CANDIDATE_FEATURES`, `NODE_FEATURES` and `EDGE_FEATURES`, scaled to about [-1, 1] by
        the `unit`, the mean shortest latency of the workload's graphs. The noise of executions and jobs to come are
        never observed.
    REWARD: minus the growth of the objective since the last action: "latency", the sum of the time that jobs have been
        live, in units; "makespan", time in units; "energy", in units times the PEs' mean power; "edp", that energy
        times the latency in units, per job; "deadline", jobs finished late.
    TERMINATION: when the last job is finished. TRUNCATION: never.
    EPISODE: a task drawn at random from `tasks`. Of a `Stream`, jobs drawn anew; of a `Workload`, `episode_jobs`
        consecutive jobs from a random one on (all of them if None). Without tasks: 4 random layered graphs on 4 PEs.
    REFERENCE: Decima (Mao et al., SIGCOMM 2019), READYS (Grinsztajn et al., Cluster 2021), SoCRATES (Sung et al. 2021).
    """

    metadata = {**PointerVectorEnv.metadata, "render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        *,
        tasks: Sequence[Task] | None = None,
        spec: SocDagSpec | None = None,
        workload: Workload | Stream | None = None,
        episode_jobs: int | None = None,
        graph: bool = True,
        debug: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if tasks is None:
            if workload is None:
                soc, workload = random_stream(16, num_tasks=(6, 14), gap_us=25.0, num_jobs=4)
                spec = spec or SocDagSpec(soc, transfers="push", graph_tasks=64, graph_edges=256)
            if spec is None:
                raise InputError("a workload without a spec", remedy="Give the SocDagSpec with its SoC")
            tasks = [Task(spec, workload)]
        self.tasks = list(tasks)
        if not self.tasks:
            raise InputError("no task given", remedy="Give at least one Task(spec, workload)")
        if episode_jobs is not None and episode_jobs < 1:
            raise InputError(f"episode_jobs is {episode_jobs}", remedy="Give a positive number of jobs")
        limits = {(t.spec.num_candidates, t.spec.graph_tasks, t.spec.graph_edges) for t in self.tasks}
        if len(limits) > 1:
            raise InputError(
                f"tasks differ in (num_candidates, graph_tasks, graph_edges): {sorted(limits)}",
                remedy="Give them an env each, or make them agree",
            )
        self.episode_jobs = episode_jobs
        self._num_pes = max(task.spec.soc.num_pes for task in self.tasks)
        one = self.tasks[0].spec
        num_nodes = self._num_pes + one.graph_tasks
        size = GraphSize(num_nodes, NUM_NODE, one.graph_edges, NUM_EDGE_TYPES, NUM_EDGE, True) if graph else None
        super().__init__(num_envs, NUM_CONTEXT, one.num_candidates, NUM_CANDIDATE, graph=size, debug=debug)
        self.render_mode = render_mode
        self._libraries = [build_library(task.workload.dags, checked(task).soc) for task in self.tasks]
        self._first_dag = np.cumsum([0, *(len(library.dags) for library in self._libraries)])
        shown = GraphArrays(**self.graph) if graph else stacked(empty_graph(0, 0, 0), num_envs)
        self._views = Views(self.context, self.candidates, self.action_mask, shown)
        self.batch = self._empty_batch(size)
        self.task_index = np.zeros(num_envs, np.int64)
        self._episodes: list[tuple[Workload, int] | None] = [None] * num_envs
        self._actions = np.zeros(num_envs, np.int64)
        self._rewards, self._done = np.zeros(num_envs), np.zeros(num_envs, np.bool_)
        self._step_arguments = (self.batch, self._actions, self._rewards, self._done, self._views)
        self._step_batch = entry_point(step_batch, *self._step_arguments)
        self._followed: dict[str, Any] = {}

    def _empty_batch(self, size: GraphSize | None) -> Batch:
        """Arrays for all envs, large enough for every task."""
        b, p, specs = self.num_envs, self._num_pes, [task.spec for task in self.tasks]
        jobs = max(self._most_jobs(task) for task in self.tasks)
        num_tasks = max(self._most(i, "num_tasks") for i in range(len(self.tasks)))
        num_edges = max(self._most(i, "num_edges") for i in range(len(self.tasks)))
        kinds = [kind for spec in specs for kind in spec.soc.kinds]
        num_levels, widest = max(len(k.frequencies_mhz) for k in kinds), max(k.count for k in kinds)
        num_kinds = max(len(spec.soc.kinds) for spec in specs)
        state = empty_state(p, jobs, num_tasks, num_edges, num_levels)
        n = len(state.tasks)
        rows = empty_table(specs[0].num_candidates, p, jobs, n, size.nodes if size else 0)._asdict()
        outlook = rows.pop("outlook")
        return Batch(
            **stacked(state, b)._asdict(),
            **{f"library_{name}": array for name, array in joined(self._libraries, p)._asdict().items()},
            arrivals=np.zeros((b, jobs), ARRIVAL_DTYPE),
            draws=np.zeros((b, n)),
            latency=np.zeros((b, p, p)),
            bandwidth=np.zeros((b, p, p)),
            kinds=np.zeros((b, num_kinds), KIND_DTYPE),
            power=np.zeros((b, num_kinds, num_levels, widest)),
            next_at=np.full((b, p), np.inf),
            next_task=np.full((b, n), -1, np.int64),
            tail=np.full((b, p), -1, np.int64),
            data_at=np.zeros((b, n)),
            books=np.zeros((b, 1), BOOKS_DTYPE),
            **{f"table_{name}": np.repeat(array[None], b, axis=0) for name, array in rows.items()},
            **{f"outlook_{name}": array for name, array in stacked(outlook, b)._asdict().items()},
            bind=np.zeros((b, 1), DECISION_DTYPE),
            loss=np.zeros(b),
        )

    def _most_jobs(self, task: Task) -> int:
        """Jobs of the longest episode of a task."""
        jobs = task.workload.num_jobs if isinstance(task.workload, Stream) else len(task.workload)
        return min(jobs, self.episode_jobs or jobs)

    def _most(self, index: int, column: str) -> int:
        """Room that episodes of a task need for tasks or edges: of a stream, as if every job were its largest graph."""
        workload, sizes = self.tasks[index].workload, self._libraries[index].dags[column]
        jobs = self._most_jobs(self.tasks[index])
        if isinstance(workload, Stream):
            return jobs * int(sizes.max())
        ends = np.concatenate([[0], np.cumsum(sizes[workload.dag_of_job])])
        return int((ends[jobs:] - ends[:-jobs]).max())

    def _draw(self, task: Task, rng: np.random.Generator) -> Workload:
        """The jobs of an episode."""
        if isinstance(task.workload, Stream):
            drawn = task.workload.draw(rng)
            return drawn if self.episode_jobs is None else drawn.window(0, self._most_jobs(task))
        jobs = self._most_jobs(task)
        if jobs == len(task.workload):
            return task.workload
        return task.workload.window(int(rng.integers(len(task.workload) - jobs + 1)), jobs)

    def _reset_envs(self, which: np.ndarray) -> None:
        for b in which:
            rng = self._rngs[b]
            for _ in range(100):
                if self._load(int(b), int(rng.integers(len(self.tasks))), rng):
                    break
            else:
                raise InputError(
                    "100 episodes in a row had nothing to decide",
                    remedy="Give more PEs, or jobs with tasks in parallel",
                )

    def _load(self, b: int, index: int, rng: np.random.Generator) -> bool:
        """Load an episode of a task into env b and run it to its first choice."""
        spec, batch = self.tasks[index].spec, self.batch
        workload, seed = self._draw(self.tasks[index], rng), int(rng.integers(1 << 31))
        self.task_index[b], self._episodes[b] = index, (workload, seed)
        if self._followed:  # what a rule remembers belongs to an episode
            self._followed["memory"][b] = 0.0
        p = spec.soc.num_pes
        batch.latency[b, :p, :p], batch.bandwidth[b, :p, :p] = spec.soc.links()
        configure(sim_views(batch, b), spec, self._libraries[index].dags["shortest"].mean())
        rows = arrival_rows(workload)
        rows["graph"] += self._first_dag[index]
        batch.arrivals[b, : len(workload)] = rows
        batch.draws[b, : workload.num_tasks] = noise_draws(workload, seed)
        batch.books[b, 0]["num_jobs"] = len(workload)
        return bool(start_one(batch, b, self._views))

    def _step_envs(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._actions[:] = actions
        self._step_batch(*self._step_arguments)
        return self._rewards.copy(), self._done.copy(), np.zeros(self.num_envs, np.bool_)

    def state(self, b: int = 0) -> State:
        """What env b shows to a policy (views)."""
        return State(*(array[b] for array in self.batch[: len(State._fields)]))

    def episode(self, b: int = 0) -> tuple[Workload, int]:
        """The jobs of env b's episode and the seed of its noise. They hold the future: for oracles."""
        episode = self._episodes[b]
        if episode is None:
            raise RuntimeError("no episode: call reset() first")
        return episode

    def rule_actions(self, rules: Sequence[Rule]) -> np.ndarray:
        """int64 (B,): what a rule would choose now, `rules[b]` in env b, all of one kernel: a teacher for imitation.

        A choice that has no row (there are more pairs than rows) becomes that of the nearest frequency, or a wait.
        Rules that are made from an episode's future (`episode`) must be made anew when it ends.
        """
        kernel = rules[0].decide_kernel
        if len(rules) != self.num_envs or any(rule.decide_kernel is not kernel for rule in rules):
            raise InputError(f"{len(rules)} rules for {self.num_envs} envs", remedy="Give one an env, of one kernel")
        f = self._followed
        if f.get("kernel") is not kernel:
            memory = np.stack([rule.new_memory(self.state(b)) for b, rule in enumerate(rules)])
            bind = np.zeros_like(self.batch.bind)
            f = self._followed = {"kernel": kernel, "rules": (), "params": None, "memory": memory, "bind": bind}
        if len(f["rules"]) != len(rules) or any(a is not b for a, b in zip(f["rules"], rules, strict=True)):
            f["rules"], widest = tuple(rules), max(len(rule.param_array) for rule in rules)
            f["params"] = np.stack([np.pad(rule.param_array, (0, widest - len(rule.param_array))) for rule in rules])
        actions = np.zeros(self.num_envs, np.int64)
        arguments: tuple[Any, ...] = (self.batch, kernel, f["params"], f["memory"], f["bind"], actions)
        follow_batch(*arguments)
        return actions

    def render(self) -> tuple[np.ndarray, ...] | None:
        """A picture of each SoC's schedule so far, uint8 (height, width, 3); None without a render mode."""
        if self.render_mode is None:
            return None
        from .render import draw_state, rgb_array

        socs = [self.tasks[index].spec.soc for index in self.task_index]
        return tuple(rgb_array(draw_state(self.state(b), soc)) for b, soc in enumerate(socs))


def stacked(arrays: Any, num_envs: int) -> Any:
    """The arrays of a NamedTuple, once for each env, with a leading axis."""
    return type(arrays)(*(np.repeat(array[None], num_envs, axis=0) for array in arrays))


def checked(task: Task) -> SocDagSpec:
    """The spec of a task whose workload is for its SoC. Raises InputError."""
    if task.workload.kind_names != task.spec.soc.kind_names:
        raise InputError(
            f"workload {task.workload.name!r} has times on the PE kinds {', '.join(task.workload.kind_names)}, SoC "
            f"{task.spec.soc.name!r} has {', '.join(task.spec.soc.kind_names)}",
            remedy="Load the jobs for this SoC",
        )
    return task.spec


def joined(libraries: Sequence[Library], num_pes: int) -> Library:
    """One library of several, for up to `num_pes` PEs."""
    dags = []
    first_task = first_edge = 0
    nodes = []
    for library in libraries:
        rows, node = library.dags.copy(), library.nodes.copy()
        rows["first_task"] += first_task
        rows["first_edge"] += first_edge
        node["first_out"] += first_edge
        dags.append(rows)
        nodes.append(node)
        first_task, first_edge = first_task + len(node), first_edge + len(library.targets)
    times = [pad_pes(library.times, num_pes, np.inf) for library in libraries]
    ahead = [pad_pes(library.ahead, num_pes, 0.0) for library in libraries]
    flat = ([getattr(library, name) for library in libraries] for name in ("targets", "volumes", "moved"))
    parts = (dags, nodes, times, *flat, ahead)
    return Library(*(np.ascontiguousarray(np.concatenate(part)) for part in parts))


def pad_pes(table: np.ndarray, num_pes: int, value: float) -> np.ndarray:
    """A table (n, P) with columns of `value` added for more PEs."""
    return np.pad(table, ((0, 0), (0, num_pes - table.shape[1])), constant_values=value)


def sim_views(batch: Batch, b: int) -> Sim:
    """`sim_of` for Python."""
    state = State(*(array[b] for array in batch[: len(State._fields)]))
    library = Library(*batch[len(State._fields) : len(State._fields) + len(Library._fields)])
    return Sim(state, library, *(getattr(batch, name)[b] for name in Sim._fields[2:]))


class SocDagEnv(PointerEnv):
    """One SoC scheduling env: see `SocDagVectorEnv`, whose keyword arguments it takes."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(SocDagVectorEnv(1, **kwargs))
