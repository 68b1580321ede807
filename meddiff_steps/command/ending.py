"""How a program of this package ends: what went wrong in one message, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from meddiff_steps.core.errors import EXIT_PREEMPTED, Preempted, UserError
from meddiff_steps.provenance.record import first_process
from meddiff_steps.provenance.verify import shown

#: Steps that read what a stranger wrote, which may be nested or repeated without end.
READ_RELEASES = ("audit", "explain", "diff", "prove", "regenerate")


def exit_code(program: Callable[[], object], name: str) -> int:
    """Run what a step or a command does; its exit code, after its error was told.

    Parameters
    ----------
    program
        What is to be run.
    name
        Of the step or command.
    """
    try:
        program()
    except UserError as error:
        print("\n".join(map(shown, f"error: {error}".splitlines())), file=sys.stderr)
        return 2
    except (RecursionError, MemoryError) as error:
        if name not in READ_RELEASES:
            raise
        print(f"error: {type(error).__name__}. What was read is not what this program writes.", file=sys.stderr)
        return 2
    except Preempted as stopped:
        if not first_process():
            return 0  # a launcher that sees one process fail kills the others, which would hide the first one's status
        print(stopped, file=sys.stderr)
        return EXIT_PREEMPTED
    return 0
