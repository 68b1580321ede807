"""Which variants of a registry a study asks for."""

from __future__ import annotations

from collections.abc import Sequence

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registry import Registry


def chosen(registry: Registry, names: Sequence[str] | None, key: str) -> list[str]:
    """Names of a registry that are asked for, once each and in its order; None: all of them.

    Parameters
    ----------
    key
        Of the config, for the message.

    Raises
    ------
    UserError
        A name is not in the registry, or none is asked for.
    """
    known = registry.names()
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise UserError(f"{key}: there is no {unknown[0]}. Choose from {', '.join(known)}.")
    if names is not None and not names:
        raise UserError(f"{key}: nothing is chosen. Choose from {', '.join(known)}, or leave the key out for all.")
    return [name for name in known if names is None or name in names]
