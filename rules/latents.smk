rule latents:
    input:
        images=PREPROCESSED,
        autoencoder=AUTOENCODER,
        card=AUTOENCODER_CARD,
    output:
        passing("latents", LATENTS),
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
        config=settings("latents"),
        code=code_digest("latents"),
    message:
        "Encoding shard {wildcards.shard}"
    shell:
        "python -m meddiff_steps latents --config {params.config} --images {input.images} --autoencoder {input.autoencoder} "
        "--autoencoder-card {input.card} --out {output} --threads {threads} 2>&1 | tee {log}"


rule scale:
    input:
        manifest=MANIFEST,
        latents=expand(LATENTS, shard=COHORT_SHARDS),
    output:
        scale=LATENT_SCALE,
        manifest=LATENT_MANIFEST,
    log:
        f"{RESULTS}/logs/scale.log",
    benchmark:
        f"{RESULTS}/benchmarks/scale.tsv"
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(60),
    params:
        config=settings("scale"),
        code=code_digest("scale"),
        latents=lambda wildcards, input: repeat("--latents", input.latents),
    message:
        "Measuring the scale of the latents"
    shell:
        "python -m meddiff_steps scale --config {params.config} --manifest {input.manifest} {params.latents} --scale {output.scale} --out {output.manifest} 2>&1 | tee {log}"
