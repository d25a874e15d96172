"""What every command shares: arguments by tyro, errors in one line, progress bars, and one place to warn from."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..envs.core.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

Args = TypeVar("Args")

USAGE_ERROR = 2
"""Exit status of a command that was given something that it cannot use."""


def run(
    args_type: type[Args] | Callable[[Sequence[str]], type[Args]],
    action: Callable[[Args], int],
    argv: Sequence[str] | None,
    name: str,
    text: str,
) -> int:
    """Parse `argv`, act, and return the exit status.

    Args:
        args_type: dataclass of the arguments, help text beneath each field; or what chooses it by the arguments, for
            commands whose options depend on the domain.
        action: what the command does; it returns the exit status.
        argv: arguments without the program's name; None: those of the process.
        name: of the command.
        text: what `--help` says before the arguments: the docstring of the command's module.
    """
    import tyro

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a shared machine more threads wait for each other
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        chosen: Any = args_type if isinstance(args_type, type) else args_type(given)
        return action(tyro.cli(chosen, prog=f"schedlab {name}", args=given, description=text))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def console() -> Console:
    """Where tables are printed; wide enough for them when the output is no terminal."""
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    return Console(width=None if is_terminal else 150, soft_wrap=False)


def say(message: str) -> None:
    """One line for the user, beside the results (on standard error)."""
    print(message, file=sys.stderr, flush=True)


class Bar(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: float, what: str | None = None) -> None:
        """`done` of the total is done; `what` is being done now."""


@contextmanager
def progress(what: str, total: float, *, is_still: bool = False) -> Iterator[Bar]:
    """A progress bar on standard error that vanishes at the end.

    One that `is_still` is drawn only when it moves: else a thread draws it ten times a second, which takes a core from
    what is measured for a ms or two each time.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=not is_still) as bars:
        task = bars.add_task(what, total=total)

        def move(done: float, what: str | None = None) -> None:
            bars.update(task, completed=done, description=what, refresh=is_still)

        yield move
