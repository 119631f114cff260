"""The one error a user sees: what went wrong, why, and how to mend it."""

from __future__ import annotations


class GrpoError(Exception):
    """A mistake of the user's or of the surroundings, told in three lines.

    `what` names the thing that failed, `why` the cause, `fix` the next step. The command line prints
    the three lines and exits with `exit_code` (2 unless told); a traceback appears only with `--debug`.
    """

    def __init__(self, what: str, *, why: str, fix: str, exit_code: int = 2) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  fix: {self.fix}"


class ConfigError(GrpoError):
    """The configuration cannot be used."""


class PluginError(GrpoError):
    """A plugin that the run needs is broken, absent or refused."""


class PlanError(GrpoError):
    """The plan cannot serve what the model and the config need."""


class CheckpointError(GrpoError):
    """A checkpoint is incomplete, damaged or does not fit the model."""


class DataError(GrpoError):
    """A dataset is empty, unreadable or has rows that cannot be used."""


class RewardError(GrpoError):
    """A reward function raised, hung or returned something that is not a number."""


class NonFiniteError(GrpoError, FloatingPointError):
    """Logits, a loss or a gradient are NaN or infinite; nothing was changed because of them."""
