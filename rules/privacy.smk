rule embedder:
    input:
        manifest=MANIFEST,
        images=COHORT_IMAGES,
    output:
        weights=EMBEDDER,
        card=EMBEDDER_CARD,
    log:
        f"{RESULTS}/logs/embedder.log",
    benchmark:
        f"{RESULTS}/benchmarks/embedder.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(2000, 40, STUDY.privacy.embedder.optimiser.batch_size),
        runtime=minutes(720),
    params:
        config=settings("embedder"),
        code=code_digest("embedder"),
        images=lambda wildcards, input: repeat("--images", input.images),
    message:
        "Training the copy detector"
    shell:
        "python -m meddiff_steps embedder --config {params.config} --manifest {input.manifest} {params.images} "
        "--weights {output.weights} --card {output.card} --threads {threads} 2>&1 | tee {log}"


rule calibrate:
    input:
        **DETECTOR_FILES,
        manifest=MANIFEST,
        images=COHORT_IMAGES,
    output:
        reference=REFERENCE,
        card=CALIBRATION,
    log:
        f"{RESULTS}/logs/calibrate.log",
    benchmark:
        f"{RESULTS}/benchmarks/calibrate.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(4000, DETECTING + 1200),  # and 20 scans, copied in 7 ways
        runtime=minutes(720),
    params:
        config=settings("calibrate"),
        code=code_digest("calibrate"),
        images=lambda wildcards, input: repeat("--images", input.images),
        detectors=lambda wildcards, input: options(input, DETECTOR_FILES),
    message:
        "Calibrating the copy detectors"
    shell:
        "python -m meddiff_steps calibrate --config {params.config} --manifest {input.manifest} {params.images} {params.detectors} "
        "--reference {output.reference} --out {output.card} --threads {threads} 2>&1 | tee {log}"


rule filter:
    input:
        **DETECTOR_FILES,
        **DIFFUSION_FILES,
        plan=PLAN,
        generated=GENERATED,
        reference=REFERENCE,
        calibration=CALIBRATION,
    output:
        images=passing("filtered", FILTERED),
        decisions=DECISIONS_SHARD,
    log:
        f"{RESULTS}/logs/filter/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/filter/{{shard}}.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(4000, DRAWING_AND_DETECTING),
        runtime=minutes(720),
        gpu=min(GPUS, 1),
    params:
        config=settings("filter"),
        code=code_digest("filter"),
        # Not an input: every change of a scan makes `reference` anew. As inputs, 400 jobs x 128 shards were half of the time to plan.
        images=repeat("--images", COHORT_IMAGES),
        models=lambda wildcards, input: options(input, DETECTOR_FILES | DIFFUSION_FILES),
    message:
        "Filtering shard {wildcards.shard}"
    shell:
        "python -m meddiff_steps filter --config {params.config} --plan {input.plan} --shard {wildcards.shard} --generated {input.generated} "
        "{params.images} {params.models} --reference {input.reference} --calibration {input.calibration} "
        "--out {output.images} --decisions {output.decisions} --threads {threads} 2>&1 | tee {log}"


rule privacy:
    input:
        **DETECTOR_FILES,
        **DIFFUSION_FILES,
        manifest=MANIFEST,
        images=COHORT_IMAGES,
        plan=PLAN,
        generated=expand(GENERATED, shard=PLAN_SHARDS),
        filtered=expand(FILTERED, shard=PLAN_SHARDS),
        shard_decisions=expand(DECISIONS_SHARD, shard=PLAN_SHARDS),
        reference=REFERENCE,
        calibration=CALIBRATION,
    output:
        report=PRIVACY_REPORT,
        decisions=DECISIONS,
    log:
        f"{RESULTS}/logs/privacy.log",
    benchmark:
        f"{RESULTS}/benchmarks/privacy.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(8000, DETECTING),
        runtime=minutes(720),
    params:
        config=settings("privacy"),
        code=code_digest("privacy"),
        shards=lambda wildcards, input: " ".join(
            repeat(f"--{name.replace('_', '-')}", input[name]) for name in ("images", "generated", "filtered", "shard_decisions")
        ),
        models=lambda wildcards, input: options(input, DETECTOR_FILES | DIFFUSION_FILES),
    message:
        "Attacking the synthetic cohort"
    shell:
        "python -m meddiff_steps privacy --config {params.config} --manifest {input.manifest} --plan {input.plan} {params.shards} {params.models} "
        "--reference {input.reference} --calibration {input.calibration} --decisions {output.decisions} --out {output.report} "
        "--threads {threads} 2>&1 | tee {log}"


rule gate:
    input:
        report=PRIVACY_REPORT,
        decisions=DECISIONS,
        plan=PLAN,
    output:
        RELEASED,
    log:
        f"{RESULTS}/logs/gate.log",
    benchmark:
        f"{RESULTS}/benchmarks/gate.tsv"
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500),
        runtime=minutes(30),
    params:
        config=settings("gate"),
        code=code_digest("gate"),
    message:
        "Checking the privacy verdict"
    shell:
        "python -m meddiff_steps gate --config {params.config} --report {input.report} --decisions {input.decisions} --plan {input.plan} "
        "--out {output} 2>&1 | tee {log}"


rule neighbours:
    input:
        manifest=MANIFEST,
        images=COHORT_IMAGES,
        plan=PLAN,
        filtered=expand(FILTERED, shard=PLAN_SHARDS),
        decisions=DECISIONS,
        reference=REFERENCE,
        calibration=CALIBRATION,
    output:
        NEIGHBOURS,
    log:
        f"{RESULTS}/logs/neighbours.log",
    benchmark:
        f"{RESULTS}/benchmarks/neighbours.tsv"
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000),
        runtime=minutes(30),
    params:
        config=settings("neighbours"),
        code=code_digest("neighbours"),
        shards=lambda wildcards, input: " ".join(repeat(f"--{name}", input[name]) for name in ("images", "filtered")),
    message:
        "Showing the released images nearest to training scans, for the owner of the cohort"
    shell:
        "python -m meddiff_steps neighbours --config {params.config} --manifest {input.manifest} {params.shards} --plan {input.plan} "
        "--decisions {input.decisions} --reference {input.reference} --calibration {input.calibration} --out {output} 2>&1 | tee {log}"
