"""The one error type for input that a user gave us and that we cannot use."""

from __future__ import annotations

from os import PathLike


class InputError(ValueError):
    """Bad input, told in one message: where it stands, what is wrong, what to do.

    Args:
        problem: what was found and what was expected, with the offending value.
        remedy: the next step, in the imperative.
        file: the file that holds the value, if any.
        line: 1-based line in that file, if known.
    """

    def __init__(
        self,
        problem: str,
        *,
        remedy: str,
        file: str | PathLike[str] | None = None,
        line: int | None = None,
    ) -> None:
        where = "" if file is None else f"{file}:{line}: " if line is not None else f"{file}: "
        super().__init__(f"{where}{problem}. {remedy}")
        self.problem, self.remedy, self.file, self.line = problem, remedy, file, line
