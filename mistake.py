"""The error for what the user did wrong; every room may import it."""


class Mistake(ValueError):
    """A flag, a file or a request that cannot be what the user meant.

    Its text is one line that names the flag (`name=value`) or file:line, and the remedy.  A program prints that line
    and ends with exit code 2 (program/parse.py, `run`); any other exception is a fault of the code and keeps its
    traceback.
    """
