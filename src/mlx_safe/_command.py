"""What the command's rooms share."""

__all__ = ["CommandError"]


class CommandError(Exception):
    """A user's mistake: one line that says what to do, exit status 2."""
