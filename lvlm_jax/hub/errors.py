"""What goes wrong with other people's checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be read or does not fit: the message names the file or key, and the fix."""
