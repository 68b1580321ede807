"""Errors that a person can act on."""


class UserError(Exception):
    """Something in the input is wrong.

    The message names the file or field, what was found, what was expected, and the remedy; the command line
    prints it without a traceback and exits with 2.
    """
