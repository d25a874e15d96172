"""The command `schedlab`: dispatches to the module of each command, and imports no other."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module

ENVS = {
    "schedlab/RequestScheduling-v0": (
        "LLM serving: which waiting requests enter the next engine iteration, and how many prefill tokens it may run"
    ),
    "schedlab/ExpertCaching-v0": (
        "Mixture-of-Experts offloading: which resident expert makes room for a missing one, and what is loaded ahead"
    ),
    "schedlab/ExpertPlacement-v0": "Mixture-of-Experts on several devices: which device holds which expert",
    "schedlab/SocDag-v0": "task graphs on unlike processing elements: which ready task runs where, or waits",
}
"""Env id -> what it decides."""

COMMANDS = {
    "envs": "the environments, one a line, with what each decides",
    "train": "train an agent by a preset",
    "evaluate": "compare policies on a trace, in the simulator or on a real engine",
    "deploy": "run a real engine under a policy, guarded",
    "calibrate": "measure a real engine and fit the simulator's cost model",
    "fidelity": "compare simulator and engine under the same policies",
    "bench": "speeds of simulator, env, trainer and decisions",
    "report": "one HTML page from a results folder",
    "demo": "train, evaluate and deploy in small",
}
"""Command -> what it does; each is the module of that name."""


def usage() -> str:
    """What `schedlab --help` prints."""
    lines = ["usage: schedlab COMMAND [OPTIONS]", "", "A reinforcement-learning laboratory for schedulers.", ""]
    lines += [f"  {name:<11}{text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        "`schedlab COMMAND --help` explains a command with examples. To begin:",
        "",
        "  schedlab evaluate request_scheduling --policies fcfs sarathi_512 srpt agent --workload azure_conv",
        "  schedlab evaluate expert_caching --policies lru ema_95 arc agent belady",
        "  schedlab deploy agent --backend hf --workload azure_conv",
    ]
    return "\n".join(lines)


CUT_OFF = 141
"""Exit status where the reader of the output has gone (as `head` does): what a shell says of a SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    try:
        status = dispatch(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not is_cut_off(sys.stdout.fileno()):
            raise  # it was another pipe, say a worker's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return CUT_OFF


def is_cut_off(descriptor: int) -> bool:
    """Whether nobody reads any more what is written there."""
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))


def dispatch(argv: Sequence[str] | None) -> int:
    """Run the command that is named first."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        from difflib import get_close_matches

        close = get_close_matches(name, COMMANDS, n=1)
        did = f"Did you mean {close[0]!r}? " if close else ""
        print(f"error: no command is called {name!r}. {did}Commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if name == "envs":
        if rest and rest[0] in ("-h", "--help"):
            print("usage: schedlab envs\n\nPrint the id of every environment, one a line, and what it decides.")
            return 0
        width = max(map(len, ENVS)) + 2
        print("\n".join(f"{env_id:<{width}}{text}" for env_id, text in ENVS.items()))
        return 0
    return int(import_module(f"{__package__}.{name}").main(rest))


if __name__ == "__main__":
    sys.exit(main())
