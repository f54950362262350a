"""The one error that a user's input can cause; the command line prints it without a traceback."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: a file, a row, a flag, a checkpoint. The message names the place, the value and the remedy."""


def nearest(word: object, known: Iterable[str], kind: str) -> str:
    """The remedy for an unknown word: `did you mean 'x'?`, or all there are, as in `keys are a, b`."""
    known = list(known)
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{kind} are {', '.join(known)}"
