"""The base of every env: a natively batched pointer problem, choose one row of a table of candidates."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv


class GraphSize(NamedTuple):
    """Limits of a graph observation."""

    nodes: int
    columns: int
    """Features of a node."""
    edges: int
    edge_types: int
    edge_columns: int = 0
    """Features of an edge; 0: the observation has none."""
    detailed: bool = False
    """Whether the observation also says which group a node belongs to, and names a second node of every row."""


def pointer_observation_space(context: int, rows: int, columns: int, graph: GraphSize | None = None) -> spaces.Dict:
    """The Dict space of one env: context (C,), candidates (K, F) and action_mask (K,); with a graph, its arrays too."""
    arrays: dict[str, spaces.Space] = {
        "context": spaces.Box(-np.inf, np.inf, (context,), np.float32),
        "candidates": spaces.Box(-np.inf, np.inf, (rows, columns), np.float32),
        "action_mask": spaces.Box(0, 1, (rows,), np.bool_),
    }
    if graph is not None:
        masks: spaces.Space = spaces.Box(0, 1, (graph.edges,), np.bool_)
        arrays |= {
            "nodes": spaces.Box(-np.inf, np.inf, (graph.nodes, graph.columns), np.float32),
            "edges": spaces.Box(0, graph.nodes - 1, (2, graph.edges), np.int32),
            "edge_type": spaces.Box(0, graph.edge_types - 1, (graph.edges,), np.int32),
            "edge_mask": masks,
            "candidate_node": spaces.Box(-1, graph.nodes - 1, (rows,), np.int32),
        }
        if graph.edge_columns:
            arrays["edge_features"] = spaces.Box(-np.inf, np.inf, (graph.edges, graph.edge_columns), np.float32)
        if graph.detailed:
            arrays["node_group"] = spaces.Box(-1, graph.nodes - 1, (graph.nodes,), np.int32)
            arrays["candidate_place"] = spaces.Box(-1, graph.nodes - 1, (rows,), np.int32)
    return spaces.Dict(arrays)


class PointerVectorEnv(VectorEnv):
    """N envs stepped in one call, each a pointer problem over K candidate rows.

    ACTION: int (N,), the row chosen in each env; rows where `action_mask` is False are illegal.
    OBSERVATION: dict of `context` float32 (N, C), `candidates` float32 (N, K, F), `action_mask` bool (N, K); rows of
    candidates beyond the live count are zero. With a graph also `nodes` float32 (N, V, Fn), `edges` int32 (N, 2, E)
    from node to node, `edge_type` int32 (N, E), `edge_mask` bool (N, E), and `candidate_node` int32 (N, K), the node
    that a row is about, -1 for none; where the graph has them, `edge_features` float32 (N, E, Fe), `node_group` int32
    (N, V), the group (a job) that a node belongs to, and `candidate_place` int32 (N, K), the node where a row would put
    it. Sizes are limits, not shapes that a policy may memorise.
    AUTORESET: SAME_STEP. The observation after a last step is the first one of the next episode; the last one is in
    `info["final_obs"]`, with the mask `info["_final_obs"]` telling which envs ended.
    SEEDING: env i of `reset(seed=s)` draws its episodes from (s + i), so a trajectory depends on its seed alone and not
    on `num_envs`: env i here is env 0 of a batch seeded with s + i.
    ILLEGAL ACTIONS: raise ValueError if `debug`, else they are counted in `num_illegal_actions` and the first legal row
    is taken instead, and `info["illegal_action"]` marks where.

    A subclass fills `self.context`, `self.candidates`, `self.action_mask`, and the arrays in `self.graph` if it has one
    (all allocated here), in `_reset_envs` and `_step_envs`.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int,
        context: int,
        rows: int,
        columns: int,
        *,
        graph: GraphSize | None = None,
        debug: bool = False,
    ) -> None:
        self.num_envs = num_envs
        self.debug = debug
        self.single_observation_space = pointer_observation_space(context, rows, columns, graph)
        self.single_action_space = spaces.Discrete(rows)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.context = np.zeros((num_envs, context), np.float32)
        self.candidates = np.zeros((num_envs, rows, columns), np.float32)
        self.action_mask = np.zeros((num_envs, rows), np.bool_)
        self.graph: dict[str, np.ndarray] = {}
        if graph is not None:
            self.graph = {
                "nodes": np.zeros((num_envs, graph.nodes, graph.columns), np.float32),
                "edges": np.zeros((num_envs, 2, graph.edges), np.int32),
                "edge_type": np.zeros((num_envs, graph.edges), np.int32),
                "edge_mask": np.zeros((num_envs, graph.edges), np.bool_),
                "candidate_node": np.full((num_envs, rows), -1, np.int32),
            }
            if graph.edge_columns:
                self.graph["edge_features"] = np.zeros((num_envs, graph.edges, graph.edge_columns), np.float32)
            if graph.detailed:
                self.graph["node_group"] = np.full((num_envs, graph.nodes), -1, np.int32)
                self.graph["candidate_place"] = np.full((num_envs, rows), -1, np.int32)
        self.num_illegal_actions = 0
        self._rngs: list[np.random.Generator] = []

    # What a domain writes ---------------------------------------------------------------------------------

    def _reset_envs(self, which: np.ndarray) -> None:
        """Start a new episode in the envs listed, drawing from `self._rngs`, and write their observations."""
        raise NotImplementedError

    def _step_envs(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take legal actions. Returns reward float64 (N,), terminated bool (N,), truncated bool (N,)."""
        raise NotImplementedError

    # What gymnasium calls ---------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start new episodes everywhere. Without a seed the streams of the envs go on."""
        if seed is not None or not self._rngs:
            seeds = (
                seed if isinstance(seed, list) else [None if seed is None else seed + i for i in range(self.num_envs)]
            )
            if len(seeds) != self.num_envs:
                raise ValueError(f"{len(seeds)} seeds given for {self.num_envs} envs")
            self._rngs = [np.random.default_rng(s) for s in seeds]
        self._reset_envs(np.arange(self.num_envs))
        return self.observation(), {"action_mask": self.action_mask.copy()}

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one action in each env."""
        given = np.asarray(actions, np.int64)
        actions = self._legal(given)
        reward, terminated, truncated = self._step_envs(actions)
        info: dict[str, Any] = {} if actions is given else {"illegal_action": actions != given}
        done = terminated | truncated
        if done.any():
            final = self.observation()
            info["final_obs"], info["_final_obs"] = final, done.copy()
            info["final_info"], info["_final_info"] = {"action_mask": final["action_mask"]}, done.copy()
            self._reset_envs(np.flatnonzero(done))
        info["action_mask"] = self.action_mask.copy()
        return self.observation(), reward, terminated, truncated, info

    def observation(self) -> dict[str, np.ndarray]:
        """Copies of the current observation arrays."""
        return {
            "context": self.context.copy(),
            "candidates": self.candidates.copy(),
            "action_mask": self.action_mask.copy(),
            **{name: array.copy() for name, array in self.graph.items()},
        }

    def action_masks(self) -> np.ndarray:
        """bool (N, K), True where an action is legal (the name that sb3-contrib looks for)."""
        return self.action_mask.copy()

    def _legal(self, actions: np.ndarray) -> np.ndarray:
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions have shape {actions.shape}, expected {(self.num_envs,)}")
        rows = self.action_mask.shape[1]
        inside = (actions >= 0) & (actions < rows)
        legal = inside & self.action_mask[np.arange(self.num_envs), np.where(inside, actions, 0)]
        if legal.all():
            return actions
        if self.debug:
            env = int(np.flatnonzero(~legal)[0])
            raise ValueError(
                f"action {actions[env]} of env {env} is masked; legal rows are "
                f"{np.flatnonzero(self.action_mask[env]).tolist()}"
            )
        self.num_illegal_actions += int((~legal).sum())
        return np.where(legal, actions, self.action_mask.argmax(1))


class PointerEnv(gym.Env):
    """One env of a `PointerVectorEnv`, as a plain gymnasium Env without autoreset: the `num_envs=1` view."""

    def __init__(self, vector_env: PointerVectorEnv) -> None:
        if vector_env.num_envs != 1:
            raise ValueError(f"PointerEnv is the view of a vector env with one env, got {vector_env.num_envs}")
        self.vector_env = vector_env
        self.observation_space = vector_env.single_observation_space
        self.action_space = vector_env.single_action_space
        self.metadata = {k: v for k, v in vector_env.metadata.items() if k != "autoreset_mode"}
        self.render_mode = getattr(vector_env, "render_mode", None)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start a new episode."""
        super().reset(seed=seed)
        self.vector_env.reset(seed=seed, options=options)
        return self._observation(), {"action_mask": self.action_masks()}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Take one action."""
        env = self.vector_env
        given = np.array([action], np.int64)
        actions = env._legal(given)
        reward, terminated, truncated = env._step_envs(actions)
        info: dict[str, Any] = {} if actions is given else {"illegal_action": True}
        info["action_mask"] = self.action_masks()
        return self._observation(), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def action_masks(self) -> np.ndarray:
        """bool (K,), True where an action is legal."""
        return self.vector_env.action_mask[0].copy()

    def _observation(self) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in self.vector_env.observation().items()}

    def render(self) -> Any:
        """What the vector env renders of its env."""
        frames = self.vector_env.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Release what the env holds."""
        self.vector_env.close()
