rule images:
    input:
        filtered=FILTERED,
        released=RELEASED,
    output:
        IMAGES,
    log:
        f"{RESULTS}/logs/images/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/images/{{shard}}.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500, 64, 4),
        runtime=minutes(120),
    params:
        config=settings("images"),
        code=code_digest("images"),
        release=RELEASE_ROOT,
    message:
        "Writing the images of shard {wildcards.shard}"
    shell:
        "python -m meddiff_steps images --config {params.config} --generated {input.filtered} --released {input.released} --release {params.release} --out {output} 2>&1 | tee {log}"


rule describe:
    input:
        released=RELEASED,
        report=PRIVACY_REPORT,
        images=expand(IMAGES, shard=PLAN_SHARDS),
        cohort_card=COHORT_CARD,
        autoencoder_card=AUTOENCODER_CARD,
        diffusion_card=DIFFUSION_FILES["diffusion_card"],
        metrics=METRICS,
    output:
        RELEASE,
    log:
        f"{RESULTS}/logs/release.log",
    benchmark:
        f"{RESULTS}/benchmarks/release.tsv"
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500),
        runtime=minutes(30),
    params:
        config=settings("release"),
        code=code_digest("release"),
        images=lambda wildcards, input: repeat("--images", input.images),
        cards=lambda wildcards, input: options(input, ["cohort_card", "autoencoder_card", "diffusion_card"]),
    message:
        "Completing the released dataset"
    shell:
        "python -m meddiff_steps release --config {params.config} --released {input.released} --privacy {input.report} {params.images} "
        "{params.cards} --metrics {input.metrics} --out {output} 2>&1 | tee {log}"


rule ledger:
    input:
        plan=PLAN,
        decisions=DECISIONS,
        privacy=PRIVACY_REPORT,
        calibration=CALIBRATION,
        images=expand(IMAGES, shard=PLAN_SHARDS),
        autoencoder_card=AUTOENCODER_CARD,
        diffusion_card=DIFFUSION_FILES["diffusion_card"],
        description=RELEASE,
    output:
        root=lasting(LEDGER),
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
        config=settings("ledger"),
        code=code_digest("ledger"),
        images=lambda wildcards, input: repeat("--images", input.images),
        files=lambda wildcards, input: options(input, ["plan", "decisions", "privacy", "calibration", "autoencoder_card", "diffusion_card", "description"]),
    message:
        "Writing the ledger and sealing the release"
    shell:
        "python -m meddiff_steps ledger --config {params.config} {params.files} {params.images} "
        "--private {output.private} --out {output.root} 2>&1 | tee {log}"
