"""Which kernels this machine can load."""


def problem() -> str | None:
    """Why there are no kernels; None if there are."""
    return "there are none yet"


def name() -> str:
    return ""
