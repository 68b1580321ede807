"""Whether the GPU benchmark runs from end to end, on a processor, and survives what fails in it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_packages
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import convolutions
from benchmarks.gpu.compare import Pace, Side, compare
from benchmarks.gpu.record import Allotment, Record, allot

#: What torch brings, and the standard library under site-packages.
TORCHS = {"torch", "torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "setuptools"}
#: Runs the benchmark where nothing can be imported but Python's own, torch's, and what a bare machine is given.
BARE = """
import importlib.machinery, sys
known = set(sys.argv.pop(1).split(","))
class Bare:
    find_distributions = staticmethod(importlib.machinery.PathFinder.find_distributions)
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if path is None and spec is not None and name not in known:
            if "site-packages" in str(spec.origin or spec.submodule_search_locations):
                return None
        return spec
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Bare()
from benchmarks.gpu.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """All parts, on a processor, with the packages of a bare machine."""
    out = tmp_path_factory.mktemp("gpu")
    known = {name.partition(".")[0] for name in gpu_packages.NEEDED} | TORCHS
    command = [sys.executable, "-c", BARE, ",".join(sorted(known)), "--quick", "--out", str(out), "--minutes", "5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "gpu.json").read_text()) | {"said": done.stdout}


def test_everything_runs_on_a_processor_and_is_written_down(rehearsed):
    assert rehearsed["failures"] == []
    assert "s/image" in rehearsed["said"] and "FAILED" not in rehearsed["said"]
    timed = [(result["part"], result["side"]) for result in rehearsed["results"] if "side" in result]
    assert timed == [
        ("sampling", "peer DDIM-2"),
        ("sampling", "peer RFlow-2"),
        ("sampling", "ours eager"),
        ("diffusion training", "peer tutorial"),
        ("diffusion training", "peer cached latents"),
        ("diffusion training", "ours eager"),
        ("autoencoder training", "peer tutorial"),
        ("autoencoder training", "ours eager"),
        ("latents", "ours eager"),
        ("detector", "ours eager"),
        ("drawing training", "ours eager"),
        ("latency", "ours eager"),
        ("sampling", "peer DDIM-200"),
    ]
    for result in rehearsed["results"]:
        if "side" in result:
            assert 0 < result["seconds_per_image"]["low"] <= result["seconds_per_image"]["value"]
            assert result["compiling_seconds"] >= 0 and result["making_seconds"] > 0
        if result.get("side") == "ours eager" and result["part"] != "drawing training":
            assert result["utilisation_measured"]["value"] > 0
    assert {result["ratio"] for result in rehearsed["results"] if "ratio" in result} == {
        "peer DDIM-2 / ours eager",
        "peer RFlow-2 / ours eager",
        "peer tutorial / ours eager",
        "peer cached latents / ours eager",
    }


def test_images_in_bf16_are_those_of_fp32_but_for_rounding(rehearsed):
    """The same subjects at another batch size, and in bf16 where the processor has it; with the drawing decoder."""
    (check,) = [result for result in rehearsed["results"] if "way" in result]
    assert check["spread"] > 0.01
    assert check["largest_difference"] < 0.05


def test_a_jobs_start_is_taken_apart(rehearsed):
    (found,) = [result["seconds"] for result in rehearsed["results"] if "seconds" in result]
    whole = found.pop("whole")
    assert set(found) == {"imports", "device", "loading", "first_batch", "second_batch", "interpreter"}
    assert min(found.values()) >= 0
    assert sum(found.values()) == pytest.approx(whole, abs=0.01)


# -------------------------------------------------------------------------------------------------------- time


def test_what_compiles_is_prepared_last():
    """Its time may not suffice, and the plain way must have been timed by then."""
    names = [side.name for side in gpu._ours(lambda compiled: works, 1, 1.0)]
    assert names == ["ours eager", "ours compiled"]


def test_shares_are_no_more_than_there_is():
    assert sum(share for _, _, share in gpu.PARTS) <= 1 + 1e-9
    assert sum(share for _, _, share in gpu.QUICK_PARTS) <= 1 + 1e-9


def test_no_part_takes_what_is_anothers():
    """Whoever uses all that it was given leaves the others theirs; who uses less leaves them more."""
    shares = [share for _, _, share in gpu.PARTS]
    for used in (1.0, 0.5):
        left = 540.0
        for number, share in enumerate(shares):
            given = allot(left, share, shares[number + 1 :])
            assert given.preparing + given.timing >= 540.0 * share / sum(shares) - 1e-6
            left -= used * (given.preparing + given.timing)
        assert left >= -1e-6
    assert allot(-5.0, 0.1, []) == Allotment(0.0, 0.0)


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("", len(gpu.PARTS)),
        ("ukb sampling", 1),
        ("ukb sampling, ixi_2mm", 6),
        ("training,start", 6),
    ],
)
def test_parts_are_chosen_by_their_names(only, expected):
    assert len(gpu.chosen_parts(gpu.PARTS, only)) == expected


def test_a_part_that_is_not_there_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--quick", "--out", str(tmp_path), "--only", "sampling,smapling"])
    assert "'smapling': no part is called so; there are quick sampling, quick diffusion_training" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_side_that_runs_out_of_memory_takes_half_the_batch():
    tried = []

    def make(batch):
        tried.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError("pretended")
        return lambda: batch

    side = Side("ours eager", make, 8)
    side.prepare(torch.device("cpu"))
    assert tried == [8, 4, 2]
    assert side.batch == 2


class Place:
    """What `compare` needs of a case."""

    name, device = "1x1x1", torch.device("cpu")


def works(batch):
    return lambda: time.sleep(0.01) or batch


def test_a_side_that_fails_or_hangs_costs_nobody_else_a_figure(tmp_path):
    record = Record(tmp_path / "gpu.json", time.monotonic() + 60)
    record.machine(matrix_flops=1e9)

    def no_memory(batch):
        raise torch.OutOfMemoryError("pretended")

    def hangs(batch):
        time.sleep(30)

    sides = [
        Side("peer", no_memory, 1),
        Side("ours compiled", hangs, 4),
        Side("peer other", works, 4),
        Side("ours eager", works, 4, operations=1e6),
    ]
    compare(record, Place(), "part", sides, Allotment(8.0, 1.0), Pace(3, 0.05))
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [(failure["where"], failure["reason"][:13]) for failure in content["failures"]] == [
        ("1x1x1 part: peer", "out of memory"),
        ("1x1x1 part: ours compiled", "OutOfTime: af"),
    ]
    assert [result.get("side", result.get("ratio")) for result in content["results"]] == [
        "peer other",
        "ours eager",
        "peer other / ours eager",
    ]
    ratio = content["results"][-1]["times"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert ratio["value"] == pytest.approx(1, rel=0.5)


def test_compiling_is_written_down_and_leaves_the_time_of_timing(tmp_path):
    """The first call of a side takes long, as one that compiles does."""
    record = Record(tmp_path / "gpu.json", time.monotonic() + 60)
    record.machine(matrix_flops=1e9)

    def slow_at_first(batch):
        calls = iter([0.6])
        return lambda: time.sleep(next(calls, 0.01)) or batch

    compare(record, Place(), "part", [Side("ours compiled", slow_at_first, 4)], Allotment(1.0, 1.0), Pace(3, 0.05))
    (result,) = record.content["results"]
    assert result["compiling_seconds"] == pytest.approx(0.6, abs=0.2)
    assert result["seconds_per_image"]["n"] == 3
    assert result["seconds_per_image"]["high"] < 0.1


# ------------------------------------------------------------------------------------------------ convolutions


def test_a_right_convolution_is_called_right():
    for layout in (torch.channels_last_3d, torch.contiguous_format):
        found = convolutions.check((2, 4, 8, 10, 8), torch.device("cpu"), layout)
        assert found["wrong"] == []
        assert 0 < found["output"] < 0.01 and 0 < found["weight_gradient"] < 0.01


@pytest.mark.parametrize("broken", [float("nan"), 3.0])
def test_a_wrong_one_is_called_wrong(monkeypatch, broken):
    """In the last image of a batch only, as where numbers past 2^31 are not reached."""
    convolve = torch.nn.Conv3d.forward

    def forward(self, x):
        made = convolve(self, x)
        if x.dtype == torch.bfloat16 and len(x) > 1:
            made = torch.cat([made[:-1], made[-1:] * broken])
        return made

    monkeypatch.setattr(torch.nn.Conv3d, "forward", forward)
    found = convolutions.check((2, 4, 8, 10, 8), torch.device("cpu"), torch.channels_last_3d)
    assert "output" in found["wrong"]
    assert found["alone"] < 0.01


def test_large_shapes_are_large():
    numbers = [torch.Size(shape).numel() for shape in convolutions.SHAPES]
    assert numbers[0] > 2**31 and numbers[1] > 2**31
    assert numbers[2] < 2**31 < 2 * numbers[2]  # bytes


# ------------------------------------------------------------------------------------------------- the machine


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "--quick" in capsys.readouterr().err


def test_packages_are_those_of_the_lock(monkeypatch):
    monkeypatch.setattr(gpu_packages.importlib.util, "find_spec", lambda module: None)
    needed = gpu_packages.missing()
    assert len(needed) == len(gpu_packages.NEEDED)
    assert all("==" in line for line in needed)
    assert not any(line.startswith("torch==") for line in needed)
