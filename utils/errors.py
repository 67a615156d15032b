"""The two ways in which a run ends early, each with one line for the person who started it."""

# What to do when numbers are not finite any more.
LOWER_RATE = "the last checkpoint, if there is one, stands: start from there with a lower --lr"


class BadInput(ValueError):
    """An argument or a file can't be used; the message names it and says what to do. Exit status 2."""


class RunFailed(RuntimeError):
    """The run itself failed; the message says what it left. Exit status 1."""
