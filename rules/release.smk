rule images:
    input:
        generated=FILTERED,
        released=RELEASED,
        predictors=PREDICTORS,
        segmenter=SEGMENTER,
    output:
        out=IMAGES,
    log:
        f"{RESULTS}/logs/images/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/images/{{shard}}.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(2500, 64, 4),
        runtime=minutes(120),
    params:
        **run_step("images", release=RELEASE_ROOT),
    message:
        "Writing the images of shard {wildcards.shard}"
    shell:
        STEP


rule describe:
    input:
        released=RELEASED,
        privacy=PRIVACY_REPORT,
        images=expand(IMAGES, shard=PLAN_SHARDS),
        cohort=[MANIFEST, COHORT_CARD],
        qc=QC,
        autoencoder=AUTOENCODER[1:],
        decoder=DECODER[1:],
        masks=MASKS[1::2],
        diffusion=RELEASED_MODEL[1::2],
        metrics=METRICS,
    output:
        out=RELEASE,
    log:
        f"{RESULTS}/logs/describe.log",
    benchmark:
        f"{RESULTS}/benchmarks/describe.tsv"
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500),
        runtime=minutes(30),
    params:
        **run_step("describe"),
    message:
        "Completing the released dataset"
    shell:
        STEP


rule ledger:
    input:
        plan=PLAN,
        decisions=DECISIONS,
        privacy=PRIVACY_REPORT,
        calibration=CALIBRATION,
        images=expand(IMAGES, shard=PLAN_SHARDS),
        autoencoder=AUTOENCODER[1:],
        decoder=DECODER[1:],
        masks=MASKS[1::2],
        diffusion=RELEASED_MODEL[1::2],
        description=RELEASE,
    output:
        out=lasting(LEDGER),
        private=PRIVATE_LEDGER,
    log:
        f"{RESULTS}/logs/ledger.log",
    benchmark:
        f"{RESULTS}/benchmarks/ledger.tsv"
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(60),
    params:
        **run_step("ledger"),
    message:
        "Writing the ledger and sealing the release"
    shell:
        STEP
