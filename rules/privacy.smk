rule embedder:
    input:
        manifest=MANIFEST,
        images=COHORT_IMAGES,
    output:
        out=EMBEDDER,
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
        **run_step("embedder"),
    message:
        "Training the copy detector"
    shell:
        STEP_WITH_THREADS


rule calibrate:
    input:
        manifest=manifest_of_a_filter,
        images=COHORT_IMAGES,
        autoencoder=AUTOENCODER,
        scale=LATENT_SCALE,
        embedder=EMBEDDER,
        latents=expand(LATENTS, shard=COHORT_SHARDS) if DETECTED_LATENTS else [],
        label_maps=LABEL_MAPS,
    output:
        reference=REFERENCE,
        reference_scans=REFERENCE_SCANS,
        out=CALIBRATION,
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
        gpu=min(GPUS, 1),
    params:
        **run_step("calibrate"),
    message:
        "Calibrating the copy detectors"
    shell:
        STEP_WITH_THREADS


rule filter:
    input:
        plan=PLAN,
        generated=GENERATED,
        autoencoder=AUTOENCODER,
        scale=LATENT_SCALE,
        embedder=EMBEDDER,
        decoder=DECODER,
        masks=MASKS,
        diffusion=RELEASED_MODEL,
        reference=REFERENCE,
        reference_scans=REFERENCE_SCANS,
        calibration=CALIBRATION,
    output:
        out=passing("filtered", FILTERED),
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
        **run_step("filter", shard=BY_SHARD),
    message:
        "Filtering shard {wildcards.shard}"
    shell:
        STEP_WITH_THREADS


rule privacy:
    input:
        manifest=MANIFEST,
        images=COHORT_IMAGES,
        plan=PLAN,
        generated=expand(GENERATED, shard=PLAN_SHARDS),
        filtered=expand(FILTERED, shard=PLAN_SHARDS),
        shard_decisions=expand(DECISIONS_SHARD, shard=PLAN_SHARDS),
        autoencoder=AUTOENCODER,
        scale=LATENT_SCALE,
        embedder=EMBEDDER,
        decoder=DECODER,
        masks=MASKS,
        label_maps=LABEL_MAPS,
        diffusion=RELEASED_MODEL,
        reference=REFERENCE,
        reference_scans=REFERENCE_SCANS,
        calibration=CALIBRATION,
    output:
        out=PRIVACY_REPORT,
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
        gpu=min(GPUS, 1),
    params:
        **run_step("privacy"),
    message:
        "Attacking the synthetic cohort"
    shell:
        STEP_WITH_THREADS


rule gate:
    input:
        report=PRIVACY_REPORT,
        decisions=DECISIONS,
        plan=PLAN,
    output:
        out=RELEASED,
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
        **run_step("gate"),
    message:
        "Checking the privacy verdict"
    shell:
        STEP


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
        out=NEIGHBOURS,
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
        **run_step("neighbours"),
    message:
        "Showing the released images nearest to training scans, for the owner of the cohort"
    shell:
        STEP
