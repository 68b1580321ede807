"""Estimates of what a study will cost."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meddiff_steps import config
from meddiff_steps.config import Study, freeze, load_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.models.drawing.base import build as build_decoder
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.operations import cost
from meddiff_steps.operations import work_of_applications as of_applications
from meddiff_steps.operations.core_speed import slowness
from meddiff_steps.operations.cost import Estimate, Machine, estimates, too_long, wall_hours, wasted
from meddiff_steps.operations.counting import TRAINING
from meddiff_steps.operations.expected import expected
from meddiff_steps.operations.rates import CORE_FLOPS, PROCESSOR, REQUESTS, RULES, extraction_mb
from meddiff_steps.operations.work import Flops, forward_flops, passes_per_sample, work
from meddiff_steps.privacy.size import BYTES_PER_VALUE, batch_size
from meddiff_steps.steps import plan_cost

ROOT = Path(__file__).parents[2]
#: Without the template, which has to be filled in.
STUDIES = sorted(path for path in (ROOT / "config/studies").glob("*.yaml") if path.stem != "template")

#: Seconds of the processor that stages of the demo took on two cores of a Xeon with AMX, all jobs together, as
#: Snakemake's benchmarks tell them (column `cpu_time`: of the wall they say less, for the machine was shared).
DEMO: dict[str, float] = {
    "simulate": 23.0,
    "preprocess": 472.3,
    "autoencoder": 618.4,
    "decoder": 369.3,
    "diffusion": 283.0,
    "embedder": 24.9,
    "latents": 11.0,
    "scale": 15.0,
    "tone": 15.2,
    "generate": 54.3,
    "showcase": 12.5,
    "privacy": 17.9,
    "evaluate": 106.4,
    "report": 10.9,
}

#: The same of applications of committed studies without data, with scans, or shapes.
APPLICATIONS: dict[str, tuple[int, dict[str, float]]] = {
    "simulated_lesions": (
        200,
        {"translation_model": 415.9, "translation": 98.0, "segmentation_model": 295.4, "segmentation": 144.3},
    ),
    "simulated_registration": (120, {"registration/train": 355.0, "registration": 65.9}),
    "simulated_shapes": (200, {"shape_completion/train": 140.5, "shape_completion": 82.0}),
}


@pytest.fixture(scope="module")
def demo() -> Study:
    return load_study(ROOT / "config/config.yaml")


@pytest.fixture(scope="module")
def published() -> Study:
    return load_study(ROOT / "config/studies/ukb.yaml")


def changed(study: Study, section: str, **changes) -> Study:
    return study.model_copy(update={section: getattr(study, section).model_copy(update=changes)})


# --------------------------------------------------------------------------------------------------- counting


def test_operations_are_those_of_real_networks(demo):
    autoencoder = build_first_stage(demo.autoencoder, 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder.encode(torch.rand(2, 1, *demo.preprocess.shape))
    found = forward_flops(demo)
    assert 2 * found.encoder == counter.get_total_flops()
    decoder, steps = build_decoder(demo.decoder, (1, *demo.preprocess.shape)), 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder.draw(*torch.rand(2, 1, 1, *demo.preprocess.shape), steps)
    # Beside the network, the stems are counted.
    assert steps * found.drawing == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_published_networks_have_the_operations_that_their_layers_say(published):
    """From the last convolution of the decoder, 128 channels to 128 at 160 x 224 x 160, alone come 5.07 TFLOP."""
    found = forward_flops(published)
    assert found.decoder > 2 * 27 * 128 * 128 * 160 * 224 * 160 > 5.0e12
    assert found == Flops(
        *(pytest.approx(value, rel=0.01) for value in (7.93e12, 15.14e12, 1.242e12, 1.336e12)),
        embedder=pytest.approx(1.39e7, rel=0.01),
        discriminator=pytest.approx(6.95e11, rel=0.01),
    )


def test_work_follows_the_plan_and_guidance_doubles_passes(demo):
    twice = demo.model_copy(update={"plan": [demo.plan[0].model_copy(update={"subjects": 400})]})
    one, two = work(demo, 1000), work(twice, 1000)
    for name in ("denoiser", "decoder", "drawing"):
        # 100 images of a shard are made in 7 batches of 16.
        assert two["generate"].flops[name] == 2 * one["generate"].flops[name]
    assert one["generate"].flops["decoder"] == 2 * 7 * 16 * forward_flops(demo).decoder
    assert two["diffusion"] == one["diffusion"]
    unguided, guided = (changed(demo, "generate", guidance_scale=scale) for scale in (1.0, 2.0))
    passes = [work(study, 1000)["generate"].flops for study in (unguided, guided)]
    assert passes[1]["denoiser"] == 2 * passes[0]["denoiser"] and passes[1]["drawing"] == passes[0]["drawing"]


def test_guidance_costs_where_it_acts_and_latents_at_half_the_resolution_an_eighth(demo):
    def passes(**changes):
        return passes_per_sample(changed(demo, "generate", **({"guidance_scale": 2.0} | changes)))

    steps = demo.generate.num_inference_steps
    assert (passes(guidance_scale=1.0), passes(), passes(guidance_interval=(1e8, 1e9))) == (steps, 2 * steps, steps)
    assert steps < passes(guidance_interval=(0.3, 3.0)) < 2 * steps
    without = changed(demo, "autoencoder", equivariance_weight=0.0)
    more, less = (work(study, 1000)["autoencoder"].flops["decoder trained"] for study in (demo, without))
    optimiser = demo.autoencoder.optimiser
    assert more - less == pytest.approx(3 * optimiser.steps * optimiser.batch_size * forward_flops(demo).decoder / 8)


def test_a_study_without_drawing_decoder_spares_its_work(demo):
    without = changed(demo, "decoder", network=None)
    found, before = work(without, 1000), work(demo, 1000)
    assert set(before) - set(found) == {"decoder"}
    assert "drawing" in before["generate"].flops and "drawing" not in found["generate"].flops
    assert found["generate"].units["normal number"] < before["generate"].units["normal number"]
    assert found["diffusion"] == before["diffusion"]


def test_a_student_spares_guidance_and_steps_and_is_trained_for_it(demo):
    student = changed(demo, "few_step", method="progressive", num_inference_steps=4, teacher_steps=16)
    found, before = work(student, 1000), work(demo, 1000)
    assert set(found) - set(before) == {"few_step"} and found["generate"] == before["generate"], "it draws nothing yet"
    optimiser, one = student.few_step.optimiser, forward_flops(student).denoiser
    latents = optimiser.steps * optimiser.batch_size * one
    assert found["few_step"].flops["denoiser trained"] == pytest.approx(2 * 3 * latents)  # 8 steps, then 4
    assert found["few_step"].flops["denoiser"] == pytest.approx((2 * 2 + 2) * latents)
    draws = changed(student, "generate", sampler="progressive", num_inference_steps=None)
    assert passes_per_sample(draws) == 4


def test_gradient_checkpointing_costs_a_pass_forward_and_a_judge_what_it_is_asked(published):
    kept = changed(published, "autoencoder", gradient_checkpointing=False)
    one, other = (work(study, 1000)["autoencoder"].flops for study in (published, kept))
    assert one["encoder trained"] == pytest.approx(4 / 3 * other["encoder trained"])
    alone = changed(kept, "autoencoder", adversarial=config.Adversarial())
    assert "discriminator trained" in other and "discriminator trained" not in work(alone, 1000)["autoencoder"].flops


def test_every_rate_and_request_that_is_counted_with_is_known():
    """And none is there in vain."""
    flops, units, stages = set(), set(), set()
    studies = [load_study(ROOT / "config" / name) for name in ("config.yaml", "studies/ukb.yaml")]
    heads = changed(studies[0], "preprocess", brain_extraction="deepbet", bias_field="n4")
    asked = ("hippocampus_pairs", "lgg_segmentation", "lgg_translation", "registration", "shape_completion")
    asked += ("hippocampus_patches", "lgg_few_labels")
    studies += [load_study(ROOT / f"config/studies/{name}.yaml") for name in asked]
    for study in [*studies, heads, changed(studies[0], "few_step", method="progressive")]:
        for stage, one in work(study, 1000).items():
            stages.add(stage)
            flops |= one.flops.keys()
            units |= one.units.keys()
    assert (flops, units, stages) == (CORE_FLOPS.keys(), PROCESSOR.keys(), REQUESTS.keys())


def test_jobs_ask_for_what_their_rules_ask_for(published):
    """Cores and memory of every rule that is counted."""
    rules = "\n".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    detecting = BYTES_PER_VALUE * batch_size(published.preprocess.shape)
    names = {
        "STUDY": published,
        "extraction_mb": extraction_mb,
        "DETECTING": detecting,
        "DRAWING_AND_DETECTING": max(detecting, 600 * published.generate.batch_size),
        "minutes": int,
        "memory": lambda base, each=0, images=1: int(
            base + each * images * math.prod(published.preprocess.shape) / 2**20
        ),
    }
    for stage, request in REQUESTS.items():
        rule = RULES.get(stage, stage)
        again = re.search(rf"^ *use rule (\w+) as {rule} with:", rules, re.M)
        if again:
            assert request is REQUESTS[again[1]], stage
            continue
        (body,) = re.findall(rf"^ *rule {rule}:\n(.*?)(?=^ *rule |\Z)", rules, re.M | re.S)
        threads = re.search(r"^ *threads: (\d+)$", body, re.M)
        asked, limit = (re.search(rf"{key}=(.*\)|\d+),", body) for key in ("mem_mb", "runtime"))
        expected = (int(threads[1]), eval(limit[1], names), eval(asked[1], names))
        assert (request.cores, request.minutes, request.memory(published)) == expected, stage


def test_networks_are_timed_on_a_core_of_this_machine():
    """Roughly: a processor without bfloat16 takes several times as long as one with it, and none a hundredth."""
    threads, drawn = torch.get_num_threads(), torch.random.get_rng_state()
    slower = slowness()
    assert set(slower) == set(CORE_FLOPS) and all(0.05 < one < 50 for one in slower.values())
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), drawn)
    study = load_study(ROOT / "config/config.yaml")
    twice = dict.fromkeys(CORE_FLOPS, 2.0)
    known, slow = (
        {one.stage: one.core_hours for one in estimates(study, 1000, Machine(cores=1, slower=rates))}
        for rates in ({}, twice)
    )
    assert 1.8 < slow["diffusion"] / known["diffusion"] <= 2 and slow["images"] == known["images"]


def test_stages_are_asked_for_by_their_rules():
    study = load_study(ROOT / "config/studies/simulated_pairs.yaml")
    found = expected(study, 400, 2, None, {"mask_autoencoder", "diffusion"})
    assert {one.stage for one in found if one.asked} == {"masks/autoencoder", "diffusion"}


# -------------------------------------------------------------------------------------------- applications


def counted(name, scans=1000, **changes):
    study = load_study(ROOT / f"config/studies/{name}.yaml")
    for section, values in changes.items():
        study = changed(study, section, **values)
    return study, work(study, scans)


def test_a_pass_of_a_residual_network_is_that_of_its_convolutions():
    """At 16 x 16 places, blocks of 4 x 4 voxels: three contrasts are seen beside the mask that is drawn."""
    study, _ = counted("lgg_segmentation")
    settings = study.segmentation_ensemble
    width, places, blocks = settings.channels[0], 16 * 16, settings.num_res_blocks
    inputs, outputs = 4 * 16 + 2, 16
    convolutions = 2 * 9 * places * (inputs * width + 2 * blocks * width**2 + width * outputs)
    assert of_applications.Images(settings, 3, 1).one_pass((64, 64)) == pytest.approx(convolutions, rel=0.03)


def test_segmentation_and_translation_cost_their_steps_and_draws():
    study, found = counted("lgg_segmentation")
    settings = study.segmentation_ensemble
    one, optimiser = of_applications.Images(settings, 3, 1).one_pass((64, 64)), settings.optimiser
    looks = 1 + math.ceil(optimiser.steps / optimiser.validate_every)
    whole = 2 * one * (TRAINING * optimiser.steps * optimiser.batch_size + 64 * looks)
    assert found["segmentation_model"].flops["image to image trained"] == pytest.approx(whole)
    evaluations = 1 + 8 * (10 + 5)  # of the network without noise, of draws, and of those that begin at its mask
    assert found["segmentation"].flops["image to image"] == pytest.approx(300 * evaluations * one)
    _, never = counted("lgg_segmentation", segmentation_ensemble={"start": 0.0})
    assert never["segmentation"].flops["image to image"] == pytest.approx(300 * (1 + 8 * 10) * one)

    study, found = counted("lgg_translation")
    _, alone = counted("lgg_translation", translation={"lesion": None})
    _, cycle = counted("lgg_translation", translation={"lesion": None, "source": ["image"], "cycle": True})
    settings = study.translation
    images = settings.optimiser.steps * settings.optimiser.batch_size
    looked_at = 64 * (1 + math.ceil(settings.optimiser.steps / settings.optimiser.validate_every))

    def learnt(sources, mean=False):
        """A network of one contrast; with `mean` it is told of another one what that says, which takes a pass."""
        first = of_applications.Images(settings, sources, 1)
        one = replace(first, mean=first) if mean else first
        under = mean * first.one_pass((64, 64)) * (images + looked_at)
        return one.one_pass((64, 64)) * (TRAINING * images + looked_at) + under

    trained = [each["translation_model"].flops["image to image trained"] for each in (found, alone, cycle)]
    assert trained[1] == pytest.approx(learnt(2) + learnt(2, mean=True))
    assert trained[0] == pytest.approx(trained[1] + learnt(1))
    assert trained[2] == pytest.approx(learnt(1) + learnt(1, mean=True) + learnt(1))
    assert learnt(2, mean=True) == pytest.approx(4 / 3 * learnt(2), rel=0.05)
    assert [each["translation_model"].networks for each in (found, alone, cycle)] == [3, 2, 3]


def test_what_is_compared_is_trained_too():
    """Networks of few labels, beside patches, of slices and of volumes."""
    study, found = counted("lgg_few_labels")
    settings = study.segmentation_ensemble
    count = len(settings.few_labels)
    jobs = count + bool(settings.pretraining_steps)
    assert found["segmentation_few_labels"].jobs == jobs and found["segmentation_few_labels"].networks == 1
    _, scratch = counted("lgg_few_labels", segmentation_ensemble={"pretraining_steps": 0})
    few = [each["segmentation_few_labels"].flops["image to image trained"] for each in (scratch, found)]
    two = found["segmentation_model"].flops["image to image trained"]
    assert 0.9 * two < 2 * few[0] / scratch["segmentation_few_labels"].jobs < 1.1 * two
    assert few[1] > 2 * few[0]

    study, found = counted("hippocampus_patches")
    model, beside = (found[f"segmentation_{name}"] for name in ("model", "beside"))
    assert beside.jobs == len(study.segmentation_ensemble.beside) and beside.networks == model.networks == 2
    # `whole` looks at as many voxels, in fewer scans
    each = beside.flops["image to image trained"] / beside.jobs
    assert each == pytest.approx(model.flops["image to image trained"], rel=0.1)

    study, found = counted("hippocampus_slices")
    one, more = study.translation.optimiser.steps, study.translation.volume_steps
    first, second = counted("hippocampus_slices", translation={"volume_steps": 2 * more})[1], found
    added = [each["translation_model"].flops["image to image trained"] for each in (second, first)]
    assert added[1] > added[0] and found["translation_model"].networks == 4
    plain = of_applications.Images(study.translation, 1, 1, slices="alone")
    size = plain.one_pass(study.preprocess.shape)
    drawing, joined, solid = (
        replace(plain, slices=slices, mean=plain).one_pass(study.preprocess.shape)
        for slices in ("alone", "joined", "solid")
    )
    assert size < drawing < joined and solid == pytest.approx(joined, rel=0.06)
    batch = study.translation.optimiser.batch_size
    steps = added[0] / batch / TRAINING
    under = (2 * one + 2 * more) * size / TRAINING  # what the network without noise says, in each step of all others
    assert steps == pytest.approx(one * (size + drawing) + more * joined + (one + more) * solid + under, rel=0.1)

    study, found = counted("lgg_missing")
    _, fixed = counted("lgg_missing", translation={"missing": False, "target": ["post"], "source": ["image", "pre"]})
    assert len(study.translation.source) == len(study.translation.target) == 3
    # In six choices of what is there, of all but three at once
    ratio = found["translation"].flops["image to image"] / fixed["translation"].flops["image to image"]
    assert 6 < ratio < 9


def test_registration_costs_both_networks_and_demons_twice_a_pair():
    study, found = counted("registration")
    score, plain = (
        of_applications.pass_of_registration(study.registration, study.preprocess.shape, kind) for kind in (True, False)
    )
    assert score > plain > 0
    assert found["registration/train"].jobs == 2
    assert found["registration"].flops["registration"] == pytest.approx(12 * (4 * score + 3 * plain))
    assert found["registration"].units["voxel matched"] == 2 * 12 * 80 * 96 * 80
    assert not {"registration", "registration/train"} & work(changed(study, "registration", pairs=0), 1000).keys()


def test_shapes_cost_attention_among_points_and_to_what_is_left():
    study, found = counted("shape_completion", scans=100)
    settings = study.shape_completion
    c, n, k = settings.channels, settings.drawn, settings.known
    block = 2 * c * 4 * c + 2 * n * c * c * (1 + 1 + 8) + 2 * (n + k) * c * 2 * c + 2 * 2 * n * (n + k) * c
    ends = 2 * (n + k) * 33 * c + 2 * (13 + c) * c + 2 * n * c * 3
    one = of_applications.pass_of_points(settings)
    assert one == pytest.approx(settings.blocks * block + ends, rel=0.01)
    assert found["shape_completion"].flops["points"] == pytest.approx(25 * 5 * 25 * one)


def test_label_maps_cost_what_images_of_as_many_channels_would():
    study, found = counted("hippocampus_pairs")
    assert {f"masks/{name}" for name in ("maps", "autoencoder", "latents", "scale", "diffusion")} < found.keys()
    assert found["masks/diffusion"].flops == pytest.approx(found["diffusion"].flops)
    assert found["masks/latents"].flops["encoder"] > found["latents"].flops["encoder"]
    assert found["masks/latents"].bytes == found["latents"].bytes, "the grid of latents is the same"
    assert not any(name.startswith("masks/") for name in work(study.model_copy(update={"pairs": None}), 1000))


def test_applications_stand_beside_what_all_costs(capsys):
    plan_cost.run(ROOT / "config/studies/lgg_translation.yaml", scans=1000, cores=2)
    text = capsys.readouterr().out
    rows = set(re.findall(r"^(translation\w*|= together) +\d+ ", text, re.M))
    assert rows == {"translation_model", "translation", "= together"}
    assert text.index("= together") < text.index("applications, asked for by name") < text.index("translation_model")
    plan_cost.run(ROOT / "config/studies/lgg_translation.yaml", scans=1000, as_object=True)
    found = json.loads(capsys.readouterr().out)
    parts = sum(found[group]["core_hours"] for group in cost.GROUPS)
    assert found["together"]["core_hours"] == pytest.approx(parts) and found["applications"]["core_hours"] > 0


# --------------------------------------------------------------------------------------------------- rates


def test_the_demo_takes_as_long_as_is_counted(demo):
    """Within a factor of 1.5, for stages of which there is more than 10 s."""
    found = {one.stage: one for one in estimates(demo, demo.cohort.subjects, Machine(cores=1))}
    wrong = {
        stage: (round(3600 * found[stage].core_hours, 1), took)
        for stage, took in DEMO.items()
        if not 1 / 1.5 < 3600 * found[stage].core_hours / took < 1.5
    }
    assert not wrong, f"seconds counted, measured: {wrong}"
    assert min(DEMO.values()) > 10 and {"autoencoder", "generate", "evaluate"} <= DEMO.keys()


@pytest.mark.parametrize("name", APPLICATIONS)
def test_applications_take_as_long_as_is_counted(name):
    """Within a factor of 1.5."""
    scans, measured = APPLICATIONS[name]
    study = load_study(ROOT / f"config/studies/{name}.yaml")
    counted = {one.stage: 3600 * one.core_hours for one in estimates(study, scans, Machine(cores=1))}
    wrong = {
        stage: (round(counted[stage], 1), took)
        for stage, took in measured.items()
        if not 1 / 1.5 < counted[stage] / took < 1.5
    }
    assert not wrong, f"seconds counted, measured: {wrong}"


def test_the_published_scale_fits_into_a_day_of_a_gpu(published):
    """From preprocessed scans to an audited release of 100,000 volumes, trainings apart, at 400 TFLOP/s."""
    found = cost.as_json(
        published, published.cost.scans, list(estimates(published, published.cost.scans, Machine(4e14)))
    )
    assert (found["scans"], found["subjects"]) == (31_740, 100_000)
    after = found["after_training"]
    assert 10 < after["gpu_hours"] <= 24 and 50 < after["core_hours"] <= 500
    stages = {one["stage"]: one for one in found["stages"]}
    assert stages["generate"]["tflop"] == pytest.approx(5.33e6, rel=0.01)
    assert stages["generate"]["jobs"] == 40
    assert after["gpu_hours"] == pytest.approx(
        sum(one["gpu_hours"] for one in found["stages"] if one["group"] == "after_training")
    )
    assert found["training"]["gpu_hours"] > 100


def test_a_slower_gpu_takes_longer_and_jobs_of_it_start_as_before(published):
    fast, slow = ({one.stage: one for one in estimates(published, 31_740, Machine(rate))} for rate in (4e14, 1e14))
    work_of = [one["autoencoder"].hours * (1 - one["autoencoder"].start_share) for one in (fast, slow)]
    assert work_of[1] == pytest.approx(4 * work_of[0], rel=0.02)  # beside the networks, losses are computed
    start_of = [one["generate"].hours * one["generate"].start_share for one in (fast, slow)]
    assert start_of[0] == pytest.approx(start_of[1])
    assert fast["images"] == slow["images"]


def test_jobs_that_start_longer_than_they_should_are_named(published):
    small = changed(published, "generate", shard_size=250)
    names = [{one.stage for one in wasted(estimates(study, 31_740, Machine(4e14)))} for study in (published, small)]
    assert "generate" not in names[0] and "generate" in names[1]


def test_a_job_that_its_rule_would_end_is_named(demo, published, capsys):
    (one,) = too_long([Estimate("images", "after_training", 9, 2.1, 0, 1, 2000, 0.1, 0.0, 0.0, False)])
    assert one.stage == "images"
    assert not too_long(estimates(demo, 1000, Machine(cores=2)))
    plan_cost.run(ROOT / "config/studies/ukb.yaml", tflops=20)
    text = capsys.readouterr().out
    assert re.search(
        r"^autoencoder: a job takes \d+\.\d hours, and its rule asks for 48\. .*autoencoder:runtime=\d+$", text, re.M
    )


@pytest.mark.parametrize("compiles", [True, "auto", False])
def test_networks_are_compiled_where_the_study_compiles_them(published, compiles):
    found = {
        one.stage: one for one in estimates(changed(published, "compute", compile=compiles), 31_740, Machine(4e14))
    }
    starts = {name: found[name].hours_each * found[name].start_share * 3600 for name in ("generate", "diffusion")}
    assert (starts["generate"] > 30, starts["diffusion"] > 30) == (compiles is True, compiles is not False)


def test_jobs_that_run_beside_each_other_take_as_long_as_one():
    def stage(name, jobs, hours):
        return Estimate(name, "after_training", jobs, hours, 1, 8, 2000, 0.1, 0.0, 0.0, False)

    found = [stage("generate", 10, 0.5), stage("privacy", 1, 2.0)]
    assert wall_hours(found, 1) == 7.0
    assert wall_hours(found, 5) == 3.0
    assert wall_hours(found, 4) == 3.5


# ------------------------------------------------------------------------------------------- the step, studies


def test_what_was_measured_on_a_busy_machine_is_what_processors_did(demo, tmp_path):
    """The same work in ten times the time, because others were there, is the same work; more cores share it."""
    freeze(demo, None, tmp_path / "config")
    (tmp_path / "cohort").mkdir()
    pq.write_table(pa.table({"scan_id": range(1000)}), tmp_path / "cohort/manifest.parquet")
    benchmark = tmp_path / "benchmarks/decoder.tsv"
    benchmark.parent.mkdir()
    hours = {}
    for wall, cores in ((600, 1), (6000, 1), (6000, 8)):
        benchmark.write_text(f"s\th:m:s\tcpu_time\n{wall}.0\t-\t590.0\n", encoding="utf-8")
        found = {one.stage: one for one in estimates(demo, 1000, Machine(cores=cores), tmp_path)}["decoder"]
        hours[wall, cores] = found.hours_each
    assert hours[600, 1] == pytest.approx(590 / 3600) and hours[6000, 1] == hours[600, 1]
    assert hours[6000, 8] < hours[6000, 1]


def test_a_folder_without_results_is_refused(demo, tmp_path):
    with pytest.raises(UserError, match=r"expected the results of a finished study"):
        list(estimates(demo, 1000, Machine(), tmp_path))


def test_what_is_printed_is_one_object_or_a_table(capsys):
    path = ROOT / "config/studies/ukb.yaml"
    plan_cost.run(path, tflops=400, as_object=True)
    found = json.loads(capsys.readouterr().out)
    assert found["after_training"].keys() == {"gpu_hours", "core_hours", "disk_bytes"}
    assert [one["stage"] for one in found["stages"]][:3] == ["cohort", "preprocess", "autoencoder"]
    plan_cost.run(path, tflops=400, scans=1000, jobs=50)
    text = capsys.readouterr().out
    assert "1,000 scans in, 100,000 synthetic subjects out" in text
    assert re.search(r"^generate +40 ", text, re.M) and re.search(r"^= together ", text, re.M)
    assert "from start to end with 50 jobs at a time" in text


def test_what_cannot_be_known_is_asked_for(tmp_path):
    path = ROOT / "config/studies/ukb.yaml"
    with pytest.raises(UserError, match=r"nothing says how fast a GPU is\. Give --tflops"):
        plan_cost.run(path)
    other = tmp_path / "study.yaml"
    other.write_text(path.read_text().replace("cost: {scans: 31740}", "cost: {tflops: 300}"))
    with pytest.raises(UserError, match=r"say how many scans it has with --scans, or write it .* as cost\.scans"):
        plan_cost.run(other)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_can_be_counted(path):
    found = list(estimates(load_study(path), 500, Machine(1e14)))
    assert all(one.hours > 0 and one.memory > 0 for one in found)


def test_the_fast_study_of_the_published_scale_needs_a_fraction_of_it(published):
    fast = load_study(ROOT / "config/studies/ukb_fast.yaml")
    mine, theirs = forward_flops(fast), forward_flops(published)
    assert mine.encoder < theirs.encoder / 7 and mine.decoder < theirs.decoder / 7
    # Everything but the networks and how they are trained is the same.
    names = (
        "cohort",
        "covariates",
        "splits",
        "preprocess",
        "plan",
        "release",
        "compute",
        "cost",
        "privacy",
        "evaluate",
    )
    assert all(getattr(fast, name) == getattr(published, name) for name in names)
    stages = [{one.stage: one for one in estimates(study, 31_740, Machine(4e14))} for study in (fast, published)]
    assert stages[0]["autoencoder"].gpu_hours < stages[1]["autoencoder"].gpu_hours / 20
    assert stages[0]["generate"].gpu_hours < stages[1]["generate"].gpu_hours
