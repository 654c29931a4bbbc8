"""The errors a person sees: one sentence (what, where, value, way out) and the exit code it ends
with.

Each class is also the standard exception a library user would catch. Instances cross Ray, so they
carry one positional string and pickle as they are.
"""

DONE = 0
CONFIGURATION = 2
DATA = 3
REFUSED = 4
TRAINING = 5
GATE = 6
STOPPED = 75


class TuneloomError(Exception):
    """Base of every error that is the user's to mend; `exit_code` is what the process ends with."""

    exit_code = 1


class ConfigError(TuneloomError, ValueError):
    """A key, value or combination of keys that cannot run. The message starts with the dotted
    key.
    """

    exit_code = CONFIGURATION


class DataError(TuneloomError, ValueError):
    """A file, row, template or dataset that cannot be trained on as it is."""

    exit_code = DATA


class RefusedError(TuneloomError, RuntimeError):
    """Refused before start: the plan does not fit, preflight or doctor said no, a run is locked."""

    exit_code = REFUSED


class TrainingError(TuneloomError, RuntimeError):
    """Training failed: non-finite steps, divergence, an option that did not act, a bad
    checkpoint.
    """

    exit_code = TRAINING


class DiskError(TrainingError):
    """A disk did not take what the run writes; once it does, the same command goes on."""


class GateError(TuneloomError, RuntimeError):
    """The tuned model did not pass the comparison it was asked to pass."""

    exit_code = GATE


class Stopped(TuneloomError):
    """Stopped early on a signal, after saving a checkpoint that the same command resumes from."""

    exit_code = STOPPED
