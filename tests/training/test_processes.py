"""Two processes that train together (gloo, on the processor) against one, with the same batch."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file
from tiny_step import OUTPUTS, prepare

from meddiff_steps import config
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.errors import EXIT_PREEMPTED, UserError
from meddiff_steps.training.loop import of_this_process, rank_share

ROOT = Path(__file__).parents[2]
#: The processes take the same step but for the order of sums. Largest relative difference of a point of the training
#: curve, 2e-7 when measured with AdamW, and of a weight relative to the largest of its tensor, 3e-5 when measured (Adam
#: enlarges small gradients). Muon computes in bfloat16: 1e-4 and 5e-2, of layers that begin at zero.
TOLERANCES = {"adamw": (1e-5, 1e-3), "muon": (1e-3, 1e-1)}


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def trained(
    folder: Path, devices: int, *launcher: str, method: str = "muon", steps: int = 60, network: str = "resnet"
) -> Path:
    folder.mkdir()
    command = prepare(folder, method, steps, network, devices=devices)
    if launcher:
        command = [sys.executable, *launcher, *command[1:]]
    assert status(start(command, folder)) == 0, (folder / "log").read_text()[-4000:]
    return folder


def status(process: subprocess.Popen[bytes]) -> int:
    """Exit status; where that takes too long, all processes of the training are killed."""
    try:
        return process.wait(800)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def assert_alike(one: Path, two: Path, weights_name: str, method: str) -> None:
    """Training curve and weights, of two folders that hold a network each."""
    curve_tolerance, weight_tolerance = TOLERANCES[method]
    curve, expected = (pd.read_parquet(folder / "history.parquet") for folder in (two, one))
    assert curve[["step", "metric"]].equals(expected[["step", "metric"]])
    np.testing.assert_allclose(curve["value"], expected["value"], rtol=curve_tolerance)
    weights = load_file(two / weights_name)
    for name, value in load_file(one / weights_name).items():
        assert float((weights[name] - value).abs().max()) <= weight_tolerance * max(float(value.abs().max()), 1e-3), (
            name
        )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", TOLERANCES)
def test_a_diffusion_model_learns_the_same_in_two_processes(tmp_path, method):
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [sys.executable, str(Path(__file__).with_name("tiny_diffusion.py")), str(folder), str(number), method]
        assert status(start(command, folder)) == 0, (folder / "log").read_text()[-4000:]
    assert_alike(tmp_path / "1", tmp_path / "2", "weights.safetensors", method)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_processes_learn_what_one_learns_and_one_of_them_writes(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    short: dict[str, Any] = {"method": "adamw", "steps": 24}  # later, signs of errors near 0 have come out otherwise
    one = trained(tmp_path / "one", 1, **short)
    launched = trained(tmp_path / "launched", 2, **short)
    torchrun = trained(tmp_path / "torchrun", 2, *launcher, **short)
    for two in (launched, torchrun):
        assert_alike(one / "autoencoder", two / "autoencoder", "model.safetensors", "adamw")
        assert "running on 2 x cpu" in (two / "log").read_text()
        assert (two / "log").read_text().count("PSNR") == 2  # once per split, so of one process
        assert not list(two.rglob(".partial-*"))
    assert (launched / OUTPUTS[0]).read_bytes() == (torchrun / OUTPUTS[0]).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_codebooks_of_two_processes_follow_the_batch_of_one(tmp_path):
    """A few steps: later, a cell between two entries has gone to the other one by rounding."""
    one = trained(tmp_path / "one", 1, method="adamw", steps=3, network="vq")
    two = trained(tmp_path / "two", 2, method="adamw", steps=3, network="vq")
    assert_alike(one / "autoencoder", two / "autoencoder", "model.safetensors", "adamw")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_processes_leave_together_and_go_on_to_the_same_bytes(tmp_path):
    straight = trained(tmp_path / "straight", 2)
    folder = tmp_path / "preempted"
    folder.mkdir()
    command = prepare(folder, devices=2)
    process = start(command, folder)
    deadline = time.monotonic() + 600
    while not list(folder.glob("state/*/step-*.safetensors")):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert status(process) == EXIT_PREEMPTED, (folder / "log").read_text()
    assert (folder / "log").read_text().count("asked to stop; saved") == 1
    assert status(start(command, folder)) == 0
    for name in OUTPUTS:
        assert (folder / name).read_bytes() == (straight / name).read_bytes(), name


class Ranks:
    def __init__(self, rank, size):
        self.global_rank, self.world_size = rank, size


def test_shares_make_the_batch_and_unequal_ones_are_refused():
    batch = np.arange(6)
    assert sorted(np.concatenate([rank_share(batch, Ranks(rank, 3)) for rank in range(3)])) == list(batch)
    with pytest.raises(UserError, match=r"batch_size is 6 and compute.devices 4"):
        rank_share(batch, Ranks(0, 4))


def test_sums_of_a_stopped_training_come_back_to_the_bit_or_as_their_mean():
    each = {"train/l1": [float(np.float32(0.1)), float(np.float32(0.3))]}
    for rank in range(2):
        fabric: Any = Ranks(rank, 2)
        fabric.to_device = lambda tensor: tensor
        assert float(of_this_process(each, fabric)["train/l1"]) == each["train/l1"][rank]
        fabric.world_size = 1
        assert float(of_this_process(each, fabric)["train/l1"]) == pytest.approx(0.2)


def test_a_job_of_slurm_with_one_task_starts_its_processes_itself(monkeypatch):
    """Snakemake's inner `srun -n1` makes the variables of one task, whatever compute.devices is."""
    for name, value in {
        "SLURM_NTASKS": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    fabric = make_fabric(config.Compute(device="cpu", precision="32-true", devices=4), threads=1)
    assert fabric.world_size == 1


def test_another_number_of_processes_than_the_study_says_is_refused(monkeypatch):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_ID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"SLURM started 2 processes, but this step works in 4"):
        make_fabric(config.Compute(device="cpu", precision="32-true", devices=4), threads=1, processes=4)
