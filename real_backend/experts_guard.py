"""`GuardedPolicy` for cache policies: one that fails is replaced by LRU without prefetch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..envs.expert_caching.state import Decision, State, empty_decision, reset_decision, resolve_decision
from .guard import GuardedPolicy


class GuardedCachePolicy(GuardedPolicy):
    """Runs a cache policy on a copy of the state; LRU decides where it raises or asks for what is illegal.

    A backend would itself repair an illegal decision, part by part (`resolve_decision`): a policy that does not know
    its state is better not believed at all.

    Args: as `GuardedPolicy`, but decisions are made in the caller's thread unless `time_budget_s` is given: handing
    one to a thread takes longer than most of them.
    """

    default_name = "LRU on demand"

    def __init__(self, policy: Any, time_budget_s: float | None = None, **kwargs: Any) -> None:
        super().__init__(policy, time_budget_s, **kwargs)

    def _allocate(self, state: State) -> tuple[State, Decision]:
        return State(*(array.copy() for array in state)), empty_decision(state, int(state.engine[0]["max_prefetch"]))

    def _clear(self) -> None:
        reset_decision(self._snapshot, self._private)

    def _problem(self, state: State) -> str | None:
        engine = state.engine[0]
        counted = int(engine["num_illegal"])
        illegal = resolve_decision(state, self._private)
        engine["num_illegal"] = counted  # the backend counts what it repairs itself
        return f"{illegal} parts of the decision are illegal" if illegal else None

    def _accept(self, decision: Decision) -> None:
        for ours, theirs in zip(self._private, decision, strict=True):
            theirs[:] = ours

    def _copy(self, state: State) -> None:
        """Bring the snapshot up to date; of the history, the present token of each row.

        `keep` is what the policy itself wrote of layers that it has seen (`LearnedCaching`), and stays.
        """
        keep = self._snapshot.experts["keep"].copy()
        for name, ours, theirs in zip(State._fields, self._snapshot, state, strict=True):
            if name == "history":
                rows = np.arange(len(theirs))
                present = (state.sequences["served"] - 1) % theirs.shape[1]
                ours[rows, present] = theirs[rows, present]
            else:
                ours[:] = theirs
        self._snapshot.experts["keep"] = keep
