"""The ways in which a command fails, each with its exit status."""


class BadInput(ValueError):
    """An argument or a file can't be used; the message names it, and says what to do."""

    status = 2


class RunFailed(RuntimeError):
    """The run itself failed; the message says what it left."""

    status = 1


class NotFinite(RunFailed):
    """A loss, a gradient or a weight is nan or infinite; the message says where."""

    def __init__(self, text: str):
        super().__init__(f"{text}; the last checkpoint, if there is one, is intact: start from there with a lower --lr")
