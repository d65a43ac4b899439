"""Why a run stops before its end; the messages are for whoever started it."""


class TooManyBroken(ValueError):
    """More rows are broken than may be left out."""


class Diverged(RuntimeError):
    """Training has come to numbers that are none."""
