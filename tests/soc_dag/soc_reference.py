"""The rules of `state.py` once more, in plain Python with objects: what the simulator must equal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from schedlab.envs.soc_dag.spec import SocDagSpec
from schedlab.envs.soc_dag.workload import Workload, noise_draws


@dataclass
class Task:
    number: int
    job: Job
    times: list[float]
    draw: float
    before: list[tuple[Task, float]] = field(default_factory=list)
    after: list[Task] = field(default_factory=list)
    pe: int | None = None
    level: int = 0
    ready_at: float = math.inf
    bound_at: float = math.inf
    start: float = math.inf
    finish: float = math.inf
    done: bool = False


@dataclass
class Job:
    arrival: float
    tasks: list[Task] = field(default_factory=list)
    finish: float = math.inf


class ReferenceSimulator:
    """Ask `options()`, then `bind(task, pe, level)` or `wait()`, until `done`."""

    def __init__(self, spec: SocDagSpec, workload: Workload, seed: int) -> None:
        self.spec, self.soc = spec, spec.soc
        self.kind = [k for k, kind in enumerate(self.soc.kinds) for _ in range(kind.count)]
        self.queues: list[list[Task]] = [[] for _ in self.kind]
        draws = noise_draws(workload, seed)
        self.coming: list[Job] = []
        self.tasks: list[Task] = []
        for j in range(len(workload)):
            dag, job = workload.dags[workload.dag_of_job[j]], Job(float(workload.arrival_us[j]))
            for row in dag.times:
                times = [float(row[k]) for k in self.kind]
                job.tasks.append(Task(len(self.tasks), job, times, float(draws[len(self.tasks)])))
                self.tasks.append(job.tasks[-1])
            for (source, target), volume in zip(dag.edges, dag.volumes, strict=True):
                job.tasks[target].before.append((job.tasks[source], float(volume)))
                job.tasks[source].after.append(job.tasks[target])
            self.coming.append(job)
        self.live: list[Job] = []
        self.ready: list[Task] = []
        self.now = self.energy = self.live_us = 0.0
        self.num_unlocked = 0
        self.advance()

    # what is known of a task

    def slowdown(self, pe: int, level: int) -> float:
        mhz = self.soc.kinds[self.kind[pe]].frequencies_mhz
        return mhz[-1] / mhz[level]

    def transfer(self, volume: float, source: int, target: int) -> float:
        a, b = self.kind[source], self.kind[target]
        if source == target:
            us = volume / self.soc.self_bandwidth
        else:
            latency = self.soc.latency_us[a][b] if self.soc.latency_us else 0.0
            us = latency + (volume / self.soc.bandwidth[a][b] if self.soc.bandwidth else 0.0)
        return float(math.floor(us)) if self.soc.whole_us else us

    def data_at(self, task: Task) -> float:
        """When all data are on the PE of a bound task whose predecessors are done."""
        at = task.bound_at
        for source, volume in task.before:
            begin = source.finish if self.spec.transfers == "push" else max(source.finish, task.bound_at)
            at = max(at, begin + self.transfer(volume, source.pe, task.pe))
        return at

    def duration(self, task: Task) -> float:
        nominal = task.times[task.pe] * self.slowdown(task.pe, task.level)
        sigma = self.spec.noise_sigma
        if self.spec.noise == "normal":
            return max(float(round(nominal + sigma * nominal * task.draw)), 1.0)
        if self.spec.noise == "lognormal":
            return nominal * math.exp(sigma * task.draw - 0.5 * sigma * sigma)
        return nominal

    # events

    def events(self) -> list[tuple[float, int, str]]:
        found = []
        for pe, queue in enumerate(self.queues):
            if queue and queue[0].start < math.inf:
                found.append((queue[0].start + self.duration(queue[0]), pe, "end"))
            elif queue and all(source.done for source, _ in queue[0].before):
                found.append((max(self.data_at(queue[0]), self.now), pe, "begin"))
        return found

    def watts(self) -> float:
        total = 0.0
        for k, kind in enumerate(self.soc.kinds):
            busy = [q[0] for pe, q in enumerate(self.queues) if self.kind[pe] == k and q and q[0].start < math.inf]
            total += kind.idle_w * (kind.count - len(busy))
            if kind.power_w and busy:
                total += sum(kind.power_w[task.level][len(busy) - 1] for task in busy) / len(busy)
        return total

    def advance(self) -> None:
        while True:
            if self.live and not self.events() and not self.ready:
                self.unlock()
            times = [at for at, _, _ in self.events()] + [job.arrival for job in self.coming[:1]]
            at = min(times)
            self.energy += self.watts() * (at - self.now)
            self.live_us += len(self.live) * (at - self.now)
            self.now = at
            for pe in range(len(self.queues)):  # an end may let a begin come about on a PE further on, or before
                for when, where, what in self.events():
                    if where == pe and when <= at:
                        if what == "end":
                            self.end(pe)
                        else:
                            self.queues[pe][0].start = at
                self.begin_now()
            while self.coming and self.coming[0].arrival <= at:
                job = self.coming.pop(0)
                self.live.append(job)
                for task in job.tasks:
                    if not task.before:
                        task.ready_at = job.arrival
                    if not task.before or self.spec.binding == "arrival":
                        self.ready.append(task)
            if not self.live and not self.coming:
                return
            if self.options() and not any(when <= at for when, _, _ in self.events()):
                return

    def begin_now(self) -> None:
        """Executions whose data are there begin at once."""
        for at, pe, what in self.events():
            if what == "begin" and at <= self.now:
                self.queues[pe][0].start = self.now

    def end(self, pe: int) -> None:
        task = self.queues[pe].pop(0)
        task.finish, task.done = self.now, True
        for after in task.after:
            if all(source.done for source, _ in after.before):
                after.ready_at = self.now
                if self.spec.binding != "arrival":
                    self.ready.append(after)
        if all(other.done for other in task.job.tasks):
            task.job.finish = self.now
            self.live.remove(task.job)

    def unlock(self) -> None:
        self.num_unlocked += 1
        for queue in self.queues:
            for task in queue:
                if all(source.done for source, _ in task.before):
                    queue.remove(task)
                    queue.insert(0, task)
                    self.begin_now()
                    return
        raise AssertionError("nothing to unlock")

    # decisions

    @property
    def done(self) -> bool:
        return not self.live and not self.coming

    def options(self) -> list[tuple[int, int, int]]:
        """(task, PE, level) that may be bound now."""
        found = []
        for task in self.ready:
            for pe, us in enumerate(task.times):
                if us < math.inf and (self.spec.binding != "late" or not self.queues[pe]):
                    kind = self.soc.kinds[self.kind[pe]]
                    default = range(len(kind.frequencies_mhz))[kind.default_level]
                    levels = range(len(kind.frequencies_mhz)) if self.spec.choose_frequency else [default]
                    found += [(task.number, pe, level) for level in levels]
        return found

    def bind(self, number: int, pe: int, level: int) -> None:
        task = self.tasks[number]
        self.ready.remove(task)
        task.pe, task.level, task.bound_at = pe, level, self.now
        self.queues[pe].append(task)
        self.begin_now()
        if not self.options():
            self.advance()

    def wait(self) -> None:
        self.advance()

    @property
    def may_wait(self) -> bool:
        return bool(self.events())
