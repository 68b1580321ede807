"""Everything a training needs to go on after a kill, in one safetensors file (never a pickle).

Checkpoints live outside the outputs of a rule, because Snakemake deletes those when a job fails.  Their folder is
named by what determines the training (its code, config and data), so a changed study never resumes an old one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from meddiff_steps.core.code_digest import code_digest
from meddiff_steps.core.files import atomic_path, sha256_file

log = logging.getLogger(__name__)


def state_key(step: str, config: Path, inputs: Sequence[Path]) -> str:
    """Name of the state folder of a training step: a digest of its code, its frozen config and its input files'
    contents.
    """
    digest = hashlib.sha256(
        code_digest(step, json.loads(config.read_text(encoding="utf-8"))).encode() + config.read_bytes()
    )
    for path in inputs:
        digest.update(sha256_file(path).encode())
    return digest.hexdigest()[:16]


class CheckpointFolder:
    """The two newest checkpoints of one training: should the newest not be readable, the one before it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def save(
        self, step: int, modules: Mapping[str, nn.Module], optimisers: Mapping[str, Optimizer], extra: dict[str, Any]
    ) -> None:
        """Write all weights and optimiser moments after `step` updates, then remove all but this checkpoint and the one
        before it.

        `extra` is JSON (the training curve so far).
        """
        tensors: dict[str, Tensor] = {}
        for name, module in modules.items():
            tensors |= {f"module/{name}/{key}": value for key, value in module.state_dict().items()}
        for name, optimiser in optimisers.items():
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser/{name}/{index}/{key}": value for key, value in state.items()}
        written = self.folder / f"step-{step:09d}.safetensors"
        with atomic_path(written) as path:
            # One metadata entry only: with more, safetensors orders them at random.
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
                path,
                {"state": json.dumps({"step": step} | extra)},
            )
        # Nothing of a later step: whatever left it there, this training has not come that far, and what it wrote itself
        # must stay.
        for old in sorted(path for path in self.folder.glob("step-*.safetensors") if path < written)[:-1]:
            old.unlink(missing_ok=True)  # a job that outlived its killed Snakemake may train beside this one

    def restore(
        self, modules: Mapping[str, nn.Module], optimisers: Mapping[str, Optimizer]
    ) -> tuple[int, dict[str, Any]]:
        """Load the newest readable checkpoint; returns (updates done, extra), or (0, {}) where there is none.

        One that cannot be read is put aside as `step-*.safetensors.broken`, with a warning.
        """
        for path in sorted(self.folder.glob("step-*.safetensors"), reverse=True):
            try:
                with safe_open(path, framework="pt") as stream:
                    extra = json.loads(stream.metadata()["state"])
                    tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - not a dict
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                log.warning(
                    "%s cannot be read (%s); put aside as %s.broken, trying the one before it", path, error, path.name
                )
                with suppress(FileNotFoundError):  # another process of the same training was first
                    path.rename(path.with_name(f"{path.name}.broken"))
                continue
            for name, module in modules.items():
                prefix = f"module/{name}/"
                module.load_state_dict(
                    {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                )
            for name, optimiser in optimisers.items():
                prefix = f"optimiser/{name}/"
                state: dict[int, dict[str, Tensor]] = {}
                for key, value in tensors.items():
                    if key.startswith(prefix):
                        index, field = key.removeprefix(prefix).split("/")
                        state.setdefault(int(index), {})[field] = value
                optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
            step = extra.pop("step")
            log.info("resuming after step %d from %s", step, path)
            return step, extra
        return 0, {}
