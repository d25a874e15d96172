"""The parts every domain shares: protocols, the pointer vector env, result rows, errors."""

from .errors import InputError
from .interface import Backend, Outcome, Policy

__all__ = ["Backend", "InputError", "Outcome", "Policy"]
