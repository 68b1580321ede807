rule latents:
    input:
        images=PREPROCESSED,
        autoencoder=AUTOENCODER,
    output:
        out=passing("latents", LATENTS),
    log:
        f"{RESULTS}/logs/latents/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/latents/{{shard}}.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(2000, 600, STUDY.latents.batch_size),
        runtime=minutes(240),
        gpu=min(GPUS, 1),
    params:
        **run_step("latents"),
    message:
        "Encoding shard {wildcards.shard}"
    shell:
        STEP_WITH_THREADS


rule scale:
    input:
        manifest=MANIFEST,
        latents=expand(LATENTS, shard=COHORT_SHARDS),
        images=COHORT_IMAGES,
        autoencoder=AUTOENCODER,
        base=INIT.get("diffusion", []),
    output:
        scale=LATENT_SCALE,
        out=f"{RESULTS}/latents/manifest.json",
    log:
        f"{RESULTS}/logs/scale.log",
    benchmark:
        f"{RESULTS}/benchmarks/scale.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(6000, 2000),
        runtime=minutes(120),
        gpu=min(GPUS, 1),
    params:
        **run_step("scale"),
    message:
        "Measuring the latents: their scale, and what covariates do to them"
    shell:
        STEP_WITH_THREADS
