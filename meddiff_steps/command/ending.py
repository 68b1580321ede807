"""How a program of this package ends: what went wrong in one message, and an exit code."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable

from meddiff_steps.core.errors import EXIT_PREEMPTED, Preempted, UserError
from meddiff_steps.provenance.record import first_process
from meddiff_steps.provenance.verify import shown

log = logging.getLogger(__name__)

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


def tell_cost(name: str) -> None:
    """Log what a step took of the processor, with its child processes, and its peak memory: exactly, which Snakemake's
    benchmarks are not; they look every half minute.
    """
    if not first_process():
        return
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak = max(each.ru_maxrss for each in used) * (1 if sys.platform == "darwin" else 1024) / 1e6
    log.info("%s: %.2f s of the processor, %.0f MB at most", name, sum(u.ru_utime + u.ru_stime for u in used), peak)
