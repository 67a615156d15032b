"""The two ways in which a run ends early, each with one line for the person who started it."""


class BadInput(ValueError):
    """An argument or a file can't be used; the message names it and says what to do. Exit status 2."""


class RunFailed(RuntimeError):
    """The run itself failed; the message says what it left. Exit status 1."""
