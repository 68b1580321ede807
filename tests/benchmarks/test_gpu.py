"""Whether the GPU benchmark runs from end to end, on a processor, and survives what fails in it."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import gpu, gpu_packages


def test_everything_runs_on_a_processor_and_is_written_down(tmp_path, capsys):
    assert gpu.main(["--quick", "--out", str(tmp_path), "--minutes", "5"]) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["failures"] == []
    timed = {(result["part"], result["side"]): result for result in content["results"] if "side" in result}
    for part, sides in (("sampling", 1), ("diffusion training", 2), ("autoencoder training", 1)):
        assert ("ours eager" in [side for p, side in timed if p == part]) and len(
            [p for p, _ in timed if p == part]
        ) == sides + 1
    for (_, side), result in timed.items():
        assert 0 < result["seconds_per_image"]["low"] <= result["seconds_per_image"]["value"]
        if side.startswith("ours"):
            assert result["utilisation_measured"]["value"] > 0
    ratios = [result for result in content["results"] if "ratio" in result]
    assert {result["ratio"] for result in ratios} == {
        "peer / ours eager",
        "peer bf16 / ours eager",
        "peer DDIM-2 / ours eager",
    }
    (check,) = [result for result in content["results"] if "way" in result]
    assert check["spread"] > 0.01
    assert (
        check["largest_difference"] < 0.05
    )  # the same subjects at another batch size, and in bf16 where the processor has it
    assert "s/image" in capsys.readouterr().out


def test_a_side_that_runs_out_of_memory_takes_half_the_batch(tmp_path):
    tried = []

    def make(batch):
        tried.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError("pretended")
        return lambda: batch

    side = gpu.Side("ours eager", make, 8)
    side.prepare(torch.device("cpu"))
    assert tried == [8, 4, 2]
    assert side.batch == 2


class Place:
    """What `compare` needs of a case."""

    name, device = "1x1x1", torch.device("cpu")


def test_a_side_that_fails_or_hangs_costs_nobody_else_a_figure(tmp_path):
    record = gpu.Record(tmp_path / "gpu.json", time.monotonic() + 60)
    record.machine(matrix_flops=1e9)

    def no_memory(batch):
        raise torch.OutOfMemoryError("pretended")

    def hangs(batch):
        time.sleep(30)

    def works(batch):
        return lambda: time.sleep(0.01) or batch

    sides = [
        gpu.Side("peer", no_memory, 4),
        gpu.Side("peer bf16", works, 4),
        gpu.Side("ours eager", works, 4),
        gpu.Side("ours compiled", hangs, 4),
    ]
    gpu.compare(record, Place, "part", sides, 1e6, limit=12.0, turns=3, turn_seconds=0.05)
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [(failure["where"], failure["reason"][:13]) for failure in content["failures"]] == [
        ("1x1x1 part: peer", "out of memory"),
        ("1x1x1 part: ours compiled", "OutOfTime: af"),
    ]
    assert [result.get("side", result.get("ratio")) for result in content["results"]] == [
        "peer bf16",
        "ours eager",
        "peer bf16 / ours eager",
    ]
    ratio = content["results"][-1]["times"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert ratio["value"] == pytest.approx(1, rel=0.5)


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
