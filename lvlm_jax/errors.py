"""How a run may end that is nobody's bug: said in one sentence, without a traceback, with a status of its own.

Light: the command imports it before anything heavy.
"""

MISTAKES = (
    ValueError,
    OSError,  # a file that is missing, in the way, or not ours; a hub that cannot be reached; a full or read-only disk
    ImportError,  # an optional package is absent
)
"""What a user can mend; the command ends with status 2."""


class Ended(RuntimeError):
    """A run that cannot go on; `status` is the command's exit status."""

    status = 1


class Diverged(Ended):
    """Too many updates in a row were not finite, or spikes."""


class OutOfMemory(Ended):
    """A device has less memory than the step needs; the message says what to change."""


class Alone(Ended):
    """Other processes did not come, or have gone: the same command may work another time (BSD's EX_TEMPFAIL)."""

    status = 75
