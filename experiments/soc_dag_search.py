"""Rules searched for one kind of jobs: what the agent of task graphs imitates first; on the very jobs, a reference.

python -m schedlab.experiments.soc_dag_search        # prints the table `TEACHERS` of soc_dag_presets anew
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from ..baselines.soc_linear import LATE_SRPT, linear_rule
from ..envs.core.results import atomic_path
from ..envs.soc_dag.env import loss_of
from ..envs.soc_dag.generate import spark_stream
from ..envs.soc_dag.rule import Rule
from ..envs.soc_dag.sim import Simulator
from ..envs.soc_dag.spec import Soc, SocDagSpec
from ..envs.soc_dag.traces import ds3_stream
from ..envs.soc_dag.workload import Stream, Workload

SPREAD = np.array([0.7, 0.7, 0.5, 0.5, 1.0, 3.0, 0.5, 0.5, 0.3, 0.5])
"""First deviations of the weights of `soc_linear.PARAMS`."""
OF_DEADLINES = [4, 5, 9]
"""Weights that say something only where jobs have deadlines."""
NOT_NEGATIVE = [7, 8]


@dataclass(frozen=True)
class StreamCell:
    """One kind of jobs, arriving at one rate, under one objective."""

    jobs: str
    """"ds3" or "spark"."""
    objective: str
    gap_us: float
    noise_sigma: float = 0.2
    slack: float = math.inf
    """Deadlines, as multiples of a graph's shortest possible latency."""
    transfers: str = "pull"
    """When data move: as their consumer is bound, or, as in DS3, as soon as they are made ("push")."""
    choose_frequency: bool = False
    """Decisions name operating points."""

    @property
    def name(self) -> str:
        """What tables call it."""
        slack = f", slack {self.slack:g}" if self.slack < math.inf else ""
        pushed = ", pushed" if self.transfers == "push" else ""
        chosen = ", frequencies" if self.choose_frequency else ""
        return f"{self.jobs}, {self.objective}, gap {self.gap_us:g}, noise {self.noise_sigma:g}{slack}{pushed}{chosen}"

    def stream(self, num_jobs: int, gap_us: float | None = None) -> tuple[Soc, Stream]:
        """The SoC and the source of jobs, with another gap if given."""
        soc, stream = source_of(self.jobs, self.slack)
        return soc, replace(stream, gap_us=self.gap_us if gap_us is None else gap_us, num_jobs=num_jobs)

    def spec(self, soc: Soc) -> SocDagSpec:
        """Noise is normal for DS3's jobs, else lognormal."""
        noise = "none" if self.noise_sigma == 0 else "normal" if self.jobs == "ds3" else "lognormal"
        return SocDagSpec(
            soc,
            transfers=self.transfers,
            noise=noise,
            noise_sigma=self.noise_sigma,
            objective=self.objective,
            choose_frequency=self.choose_frequency,
        )


@cache
def source_of(jobs: str, slack: float) -> tuple[Soc, Stream]:
    """The SoC and a stream of these jobs, whose gap and length are still to be given."""
    return ds3_stream(0.0, 1, slack=slack) if jobs == "ds3" else spark_stream(gap_us=0.0, num_jobs=1, slack=slack)


def rule_loss(spec: SocDagSpec, rule: Rule, workloads: Sequence[Workload], seeds: Sequence[int]) -> list[float]:
    """The objective of each run, per job."""
    simulator, losses = Simulator(spec.replace(binding=rule.binding)), []
    for workload, seed in zip(workloads, seeds, strict=True):
        simulator.reset(workload, seed)
        simulator.run(rule)
        losses.append(float(loss_of(simulator.sim)) / len(workload))
    return losses


def search_linear(
    spec: SocDagSpec,
    workloads: Sequence[Workload],
    seeds: Sequence[int],
    *,
    start: Sequence[float] = LATE_SRPT,
    generations: int = 10,
    population: int = 20,
    elite: int = 5,
    seed: int = 0,
) -> tuple[np.ndarray, float]:
    """Cross-entropy search for the weights of `soc_linear.linear` that do best on these jobs: (weights, loss)."""
    rng = np.random.default_rng(seed)
    mean, spread = np.array(start, np.float64), SPREAD.copy()
    if not any(np.isfinite(workload.deadline_us).any() for workload in workloads):
        spread[OF_DEADLINES] = 0.0
    moving = spread > 0
    best, least = mean.copy(), math.inf
    for _ in range(generations):
        samples = mean + spread * rng.standard_normal((population, len(mean)))
        samples[0], samples[1] = mean, best
        samples[:, NOT_NEGATIVE] = np.abs(samples[:, NOT_NEGATIVE])
        losses = np.array([np.mean(rule_loss(spec, linear_rule(one), workloads, seeds)) for one in samples])
        order = np.argsort(losses)[:elite]
        if losses[order[0]] < least:
            best, least = samples[order[0]].copy(), float(losses[order[0]])
        mean = 0.3 * mean + 0.7 * samples[order].mean(0)
        spread = (0.3 * spread + 0.7 * samples[order].std(0) + 0.02 * SPREAD) * moving
    return best, least


TRAINING_SEED = 1_000_000
"""Training jobs are drawn from here on; test seeds are small numbers."""


def teacher_cells() -> list[StreamCell]:
    """The cells for which the agent's teachers are searched."""
    ds3 = [
        StreamCell("ds3", objective, gap, slack=3.0 if objective == "deadline" else math.inf)
        for objective in ("latency", "deadline", "edp")
        for gap in (200.0, 100.0, 60.0, 50.0, 40.0)
        if objective != "deadline" or gap < 200.0
    ]
    pushed = [replace(cell, transfers="push") for cell in ds3]
    return [*ds3, *pushed, StreamCell("spark", "latency", 40e6), StreamCell("spark", "latency", 25e6)]


TEACHERS = Path(__file__).with_name("soc_dag_teachers.json")
"""Weights of the rule found for every cell, by its name."""


def main(out: Path = TEACHERS) -> int:
    """Search for every cell on training jobs; print and write the weights."""
    found: dict[str, list[float]] = {}
    for cell in teacher_cells():
        soc, stream = cell.stream(300 if cell.jobs == "ds3" else 60)
        seeds = [TRAINING_SEED, TRAINING_SEED + 1, TRAINING_SEED + 2]
        workloads = [stream.draw(np.random.default_rng(seed)) for seed in seeds]
        weights, loss = search_linear(cell.spec(soc), workloads, seeds)
        srpt = float(np.mean(rule_loss(cell.spec(soc), linear_rule(), workloads, seeds)))
        found[cell.name] = [round(float(weight), 3) for weight in weights]
        print(f"{cell.name}: {loss:.4f}, late SRPT {srpt:.4f}, weights {found[cell.name]}", flush=True)
    with atomic_path(out) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
