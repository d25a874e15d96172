"""The rows of `schedlab bench request_scheduling`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from . import command
from .bench import Args, Row, best_cpu_s, faster, shorter

if TYPE_CHECKING:
    from ..envs.request_scheduling.spec import RequestSchedulingSpec
    from ..envs.request_scheduling.workload import Workload

VIDUR_REQUESTS_PER_S, VIDUR_ITERATIONS_PER_S = 1550.0, 4590.0
"""Vidur (Agrawal et al., MLSys 2024), same list and model, metrics off, on a quiet core."""
DECISION_GOAL_US = 200.0
"""Cost of a decision that an engine does not feel."""
START_GOAL_S, MEMORY_GOAL_MB = 5.0, 300.0
NUM_REQUESTS = 4000
NUM_ROWS = 18
"""About how many there are, for the progress bar."""


# -------------------------------------------------------------------------------------------- simulator


def simulator_rows(spec: RequestSchedulingSpec, requests: Workload, repeats: int) -> Iterator[Row]:
    """Compiled runs of Sarathi-512 and FCFS; the fixed names stand for Sarathi-512 at Vidur's iterations a request.

    Vidur's run has 2.96 iterations a request: its requests are all queued early. With most of them waiting there is
    a decision at every iteration, and none is skipped over.
    """
    from ..baselines.request_scheduling import RULES
    from ..envs.request_scheduling.sim import Simulator
    from .scenario import SATURATED_RPS, saturated

    capacity = saturated(spec, requests, None).requests_per_s
    for load, label in ((None, "queued"), (1.1, "load_1.1"), (0.9, "load_0.9")):
        at_load = requests.at_rate(SATURATED_RPS if load is None else load * capacity)
        for rule in ("sarathi_512", "fcfs"):
            for recording in (False, True):
                simulator = Simulator(spec, recording=recording)

                def work(simulator: Simulator = simulator, rule: str = rule, at_load: Workload = at_load) -> None:
                    simulator.reset(at_load)
                    simulator.run(RULES[rule])

                work()
                seconds = best_cpu_s(work, repeats)
                iterations = int(simulator.state().engine[0]["iterations"])
                is_fixed = label == "queued" and rule == "sarathi_512" and not recording
                suffix = "" if is_fixed else f"/{rule}_{label}{'_recorded' if recording else ''}"
                detail = (
                    f"{len(requests)} requests, {rule}, {label.replace('_', ' ')}, {iterations / len(requests):.2f} "
                    f"iterations a request, recording {'on' if recording else 'off'}, best of {repeats}"
                )
                per_s = len(requests) / seconds
                yield faster("requests_per_cpu_s" + suffix, per_s, "1/s", "Vidur", VIDUR_REQUESTS_PER_S, detail)
                per_s = iterations / seconds
                yield faster("iterations_per_cpu_s" + suffix, per_s, "1/s", "Vidur", VIDUR_ITERATIONS_PER_S, detail)


START_SCRIPT = """
import resource, time
from schedlab.baselines.request_scheduling import RULES
from schedlab.envs.request_scheduling.generate import generate
from schedlab.envs.request_scheduling.sim import Simulator
from schedlab.envs.request_scheduling.spec import RequestSchedulingSpec
simulator = Simulator(RequestSchedulingSpec())
simulator.reset(generate("azure_conv", 4000, seed=0))
decision = simulator.default_decision()
RULES["sarathi_512"].reset(simulator.state())
RULES["sarathi_512"].decide(simulator.state(), decision)
simulator.step(decision)
print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def start_rows() -> Iterator[Row]:
    """CPU seconds from the start of Python to the end of the first iteration, and memory, with kernels compiled."""
    for _ in range(2):  # the first may have to compile
        run = subprocess.run([sys.executable, "-c", START_SCRIPT], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, run.stdout.split())
    detail = "a new process, compiled kernels in the cache, 4000 requests loaded"
    yield shorter("start_to_first_iteration_cpu_s", seconds, "s", "goal", START_GOAL_S, detail)
    yield shorter("start_memory_mb", megabytes, "MB", "goal", MEMORY_GOAL_MB, detail)


# -------------------------------------------------------------------------------------------------- env


def make_env(spec: RequestSchedulingSpec, requests: Workload, num_envs: int, seed: int) -> Any:
    """The vector env over windows of 500 of these requests."""
    from ..envs.request_scheduling.env import RequestSchedulingVectorEnv, Task

    size = min(500, len(requests))
    env = RequestSchedulingVectorEnv(num_envs, tasks=[Task(spec, requests)], episode_requests=size)
    env.reset(seed=seed)
    return env


def env_rows(
    spec: RequestSchedulingSpec, requests: Workload, num_envs: int, steps: int, repeats: int, seed: int
) -> Iterator[Row]:
    """The vector env with observations, under a policy in numpy: a linear score of the candidate rows."""
    env = make_env(spec, requests, num_envs, seed)
    weights = np.random.default_rng(seed).standard_normal(env.single_observation_space["candidates"].shape[1])
    weights = weights.astype(np.float32)
    obs = env.observation()
    iterations = decisions = 0

    def work() -> None:
        nonlocal obs, iterations, decisions
        iterations, decisions = 0, steps * num_envs
        before = env.iterations
        for _ in range(steps):
            scores = np.where(obs["action_mask"], obs["candidates"] @ weights, -np.inf)
            obs = env.step(scores.argmax(1))[0]
            now = env.iterations
            # In the step that ends an episode the iterations before its end are not counted: a few too few.
            iterations += int(np.where(now >= before, now - before, now).sum())
            before = now

    work()
    best = max((iterations / best_cpu_s(work, 1), decisions, iterations) for _ in range(repeats))
    detail = (
        f"{num_envs} envs, observations, policy in numpy, {best[1] / max(best[2], 1):.2f} decisions an iteration, "
        f"best of {repeats}"
    )
    yield faster("vector_env_iterations_per_cpu_s", best[0], "1/s", "Vidur", VIDUR_ITERATIONS_PER_S, detail)
    env.close()


# ---------------------------------------------------------------------------------------------- learning


def ppo_rows(spec: RequestSchedulingSpec, requests: Workload, num_envs: int, rollouts: int, seed: int) -> Iterator[Row]:
    """Decisions per CPU second of PPO on this env, rollouts and updates, beside sb3-contrib's own loop."""
    import torch
    from sb3_contrib import MaskablePPO

    from ..agents.policy import PointerPolicy
    from ..agents.ppo import FastMaskablePPO
    from ..envs.core.sb3 import SB3VecEnv

    torch.set_num_threads(1)
    n_steps = 64
    speeds = {}
    for trainer in (FastMaskablePPO, MaskablePPO):  # both warmed up, both the best of as many rollouts
        env = SB3VecEnv(make_env(spec, requests, num_envs, seed))
        model = trainer(
            PointerPolicy,
            env,
            n_steps=n_steps,
            batch_size=2048,
            n_epochs=4,
            seed=seed,
            policy_kwargs={"encoder": "deepsets", "hidden": 64},
        )
        model.learn(n_steps * num_envs)  # warm-up
        taken = []
        for _ in range(rollouts):
            start = time.process_time()
            model.learn(n_steps * num_envs, reset_num_timesteps=False)
            taken.append(time.process_time() - start)
        speeds[trainer] = n_steps * num_envs / min(taken)
        if isinstance(model, FastMaskablePPO):
            shares = {name: share for name, share in model.profile.summary().items() if name != "decisions_per_s"}
            profile = ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares.items())
        env.close()
    detail = (
        f"FastMaskablePPO, deepsets of width 64, {spec.num_candidates} candidates, {num_envs} envs, 4 epochs, "
        f"best of {rollouts}; CPU time: {profile}; reference: sb3-contrib's MaskablePPO with the same policy and env"
    )
    fast, plain = speeds[FastMaskablePPO], speeds[MaskablePPO]
    yield faster("ppo_decisions_per_s", fast, "1/s", "sb3-contrib MaskablePPO", plain, detail)


def decision_rows(spec: RequestSchedulingSpec, requests: Workload, decisions: int, seed: int) -> Iterator[Row]:
    """P99 of one decision of a learned policy from Python, on states of an overloaded engine with all rows live."""
    import torch

    from ..agents.checkpoint import load_checkpoint
    from ..agents.compiled import pack_weights
    from ..agents.export import OnnxPolicy, onnx_bytes
    from ..agents.networks import PointerNetwork
    from ..agents.request_scheduling import CompiledPolicy, TablePolicy
    from ..baselines.request_scheduling import RULES
    from ..envs.request_scheduling.sim import Simulator
    from ..envs.request_scheduling.table import NUM_CANDIDATE, NUM_CONTEXT
    from .policies import SHIPPED
    from .scenario import SATURATED_RPS

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    if SHIPPED.is_dir():
        network, whose = load_checkpoint(SHIPPED).network, "the shipped agent"
    else:
        network = PointerNetwork(NUM_CONTEXT, NUM_CANDIDATE, encoder="deepsets", hidden=64).eval()
        whose = "untrained weights"
    onnx = OnnxPolicy(onnx_bytes(network))
    policies: dict[str, Any] = {
        "": CompiledPolicy("compiled", pack_weights(network, spec.num_candidates), spec),
        "/onnx": TablePolicy("onnx", lambda o: onnx(o["context"], o["candidates"], o["action_mask"]), spec),
    }
    # A rule drives: the policy is asked where more wait than the table has rows, and its answer is thrown away.
    for suffix, policy in policies.items():
        simulator = Simulator(spec, recording=False)
        simulator.reset(requests.at_rate(SATURATED_RPS))
        rule = RULES["sarathi_512"]
        rule.reset(simulator.state())
        policy.reset(simulator.state())
        policy.decide(simulator.state(), simulator.default_decision())
        taken: list[float] = []
        picks = 0
        done = False
        while not done and len(taken) < decisions:
            state, decision = simulator.state(), simulator.default_decision()
            if state.engine[0]["num_waiting"] >= spec.num_candidates:
                start = time.thread_time()
                policy.decide(state, decision)
                taken.append(time.thread_time() - start)
                picks += int(decision.levers[0]["num_order"])
            decision = simulator.default_decision()
            rule.decide(state, decision)
            done = simulator.step(decision).done
        value = float(np.percentile(taken, 99)) * 1e6
        p50 = float(np.percentile(taken, 50)) * 1e6
        detail = (
            f"{'ONNX Runtime' if suffix else 'compiled'}, {spec.num_candidates} candidates full, {len(taken)} states, "
            f"{picks / len(taken):.1f} picks a decision ({whose}); P50 {p50:.0f} us"
        )
        yield shorter("decision_p99_us" + suffix, value, "us", "goal", DECISION_GOAL_US, detail)


def rows(args: Args) -> Iterator[Row]:
    """All rows, as they are measured."""
    from ..envs.request_scheduling.spec import RequestSchedulingSpec
    from ..envs.request_scheduling.traces import find_workload

    spec = RequestSchedulingSpec()
    quick = args.quick
    trace = find_workload("azure_conv", args.data_dir)
    requests = trace.window(0, min(400 if quick else NUM_REQUESTS, len(trace)))
    requests = requests.with_predictor(0.8, args.seed)
    command.say(requests.source)
    repeats = 1 if quick else args.repeats
    yield from simulator_rows(spec, requests, repeats)
    if not quick:
        yield from start_rows()
    yield from env_rows(spec, requests, 8 if quick else 256, 20 if quick else 200, repeats, args.seed)
    yield from ppo_rows(spec, requests, 8 if quick else 64, 1 if quick else 3, args.seed)
    yield from decision_rows(spec, requests, 50 if quick else 1000, args.seed)
