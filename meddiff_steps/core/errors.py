"""Errors that a person can act on."""


class UserError(Exception):
    """Something in the input is wrong.

    The message names the file or field, what was found, what was expected, and the remedy; the command line
    prints it without a traceback and exits with 2.
    """


class Preempted(Exception):
    """A training was asked to stop (SIGTERM, SIGINT), saved its state and left; the same command goes on from there.

    The command line prints the message and exits with `EXIT_PREEMPTED`, so that Snakemake or Slurm starts it again.
    """


#: Exit status of a step that stopped early and can be started again: EX_TEMPFAIL of BSD's sysexits.h.
EXIT_PREEMPTED = 75
