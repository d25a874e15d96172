"""Fixtures that several rooms use."""

from __future__ import annotations

import numpy as np
import pytest

from schedlab.envs.request_scheduling.spec import CostModel, EngineSpec, RequestSchedulingSpec, SloClass
from schedlab.envs.request_scheduling.timeline import Timeline


@pytest.fixture
def miniature() -> Timeline:
    """Four requests and seven iterations on the engine of `miniature_spec`, worked by hand.

    An iteration takes 1 + P/4 + D/2 seconds; blocks hold 4 tokens, the pool has 10.

    | it | seconds       | P                  | D      | blocks    | tokens at its end        |
    |----|---------------|--------------------|--------|-----------|--------------------------|
    | 0  | 0.00 -  2.00  | 4: r0              |        | 1         | r0 #1                    |
    | 1  | 2.00 -  4.50  | 2: r1, 2 of 8: r2  | r0     | 2 + 1 + 2 | r0 #2, r1 #1 (its last)  |
    | 2  | 4.50 -  7.50  | 6: r2              | r0     | 2 + 2     | r0 #3 (its last), r2 #1  |
    | 3  | 7.50 -  9.75  | 5 of 9: r2 again   |        | 3         | r2 was preempted         |
    | 4  | 9.75 - 11.75  | 4: r2              |        | 3         | r2 #2                    |
    | 5  | 11.75 - 13.25 |                    | r2     | 3         | r2 #3                    |
    | 6  | 13.25 - 14.75 |                    | r2     | 3         | r2 #4 (its last)         |

    r3 arrives at 5.0 s and can never fit: refused.
    """
    return Timeline(
        arrival_s=np.array([0.0, 0.5, 1.0, 5.0]),
        prompt_tokens=np.array([4, 2, 8, 100]),
        output_tokens=np.array([3, 1, 4, 5]),
        slo_class=np.array([0, 0, 1, 1], np.int32),
        ttft_slo_s=np.array([4.0, 4.0, 6.0, 6.0]),
        tpot_slo_s=np.array([2.75, 2.75, 10.0, 10.0]),
        slo_weight=np.array([1.0, 1.0, 2.0, 2.0]),
        refused=np.array([False, False, False, True]),
        preemptions=np.array([0, 0, 1, 0]),
        iteration_start_s=np.array([0.0, 2.0, 4.5, 7.5, 9.75, 11.75, 13.25]),
        iteration_end_s=np.array([2.0, 4.5, 7.5, 9.75, 11.75, 13.25, 14.75]),
        prefill_tokens=np.array([4, 4, 6, 5, 4, 0, 0]),
        decode_requests=np.array([0, 1, 1, 0, 0, 1, 1]),
        kv_blocks_used=np.array([1, 5, 4, 3, 3, 3, 3]),
        segments=np.array([[1, 1, 1], [0, 0, 3], [2, 2, 1], [2, 4, 3]]),
    )


@pytest.fixture
def miniature_spec() -> RequestSchedulingSpec:
    """The engine on which `miniature` ran."""
    return RequestSchedulingSpec(
        engine=EngineSpec(kv_blocks=10, block_tokens=4, max_batch_tokens=8, max_running=4),
        cost=CostModel("by-hand", (1.0, 0.25, 0.5, 0.0, 0.0, 0.0, 0.0)),
        slo_classes=(SloClass(4.0, 2.75, 1.0), SloClass(6.0, 10.0, 2.0)),
        prefill_choices=(0, 8),
    )
