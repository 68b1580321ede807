"""How long a job of `generate` takes before it is at work: `python -m benchmarks.gpu.start STUDY FOLDER DEVICE`.

Run in a process of its own by `job_start`, which adds what the interpreter took.  Prints one line of JSON: seconds of
imports, of the device, of loading weights, and of the first and the second batch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def job_start(study: str, folder: Path, device: str, limit: float) -> dict[str, float]:
    """Seconds of a job's parts, in a fresh process; `folder` has autoencoder/, diffusion/ and maybe decoder/.

    Raises
    ------
    RuntimeError
        The process failed; its last words are in it.
    TimeoutError
        It took longer than `limit` seconds.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.start", study, str(folder), device]
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, cwd=Path(__file__).parents[2], env=dict(os.environ)
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"after {limit:.0f} s") from error
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-500:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    whole = time.perf_counter() - begun
    return found | {"interpreter": round(whole - sum(found.values()), 3), "whole": round(whole, 3)}


def main(study: str, folder: Path, device: str) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def done(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[name], last = round(now - last, 3), now

    import torch

    from benchmarks.gpu.case import study_of
    from meddiff_steps import config
    from meddiff_steps.compute.device import make_fabric
    from meddiff_steps.core.random_streams import batch_noise, seed_key
    from meddiff_steps.diffusion.conditioning import Condition
    from meddiff_steps.models.trained import TrainedModel
    from meddiff_steps.synthesis.generate import CohortGenerator

    done("imports")
    compute = config.Compute(device=device, compile=False)
    fabric = make_fabric(compute, threads=torch.get_num_threads())
    torch.zeros(1, device=fabric.device)
    done("device")
    decoder = folder / "decoder" if (folder / "decoder").is_dir() else None
    model = TrainedModel.load(
        folder / "autoencoder", folder / "diffusion", fabric, compute, decoder=decoder, toned=False
    )
    done("loading")
    settings = study_of(study).generate
    generator = CohortGenerator(model, settings)
    who = [("bench/syn", i, 0) for i in range(settings.batch_size)]
    noise = batch_noise([seed_key(*subject, "noise") for subject in who], model.latent_shape)
    condition = Condition(torch.zeros(len(who), len(model.encoding.level_counts), device=fabric.device))
    for name in ("first_batch", "second_batch"):
        generator.decode(generator.latents(noise, condition, who), who)
        done(name)
    return seconds


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])))
