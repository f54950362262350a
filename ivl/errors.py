"""The one error that a user's input can cause; the command line prints it without a traceback."""


class InputError(ValueError):
    """Bad input: a file, a row, a flag, a checkpoint. The message names the place, the value and the remedy."""
