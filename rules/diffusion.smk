rule diffusion:
    input:
        manifest=MANIFEST,
        latents=expand(LATENTS, shard=COHORT_SHARDS),
        scale=LATENT_SCALE,
    output:
        weights=lasting(DIFFUSION),
        card=DIFFUSION_CARD,
        history=DIFFUSION_HISTORY,
    log:
        f"{RESULTS}/logs/diffusion.log",
    benchmark:
        f"{RESULTS}/benchmarks/diffusion.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(4000, 200, STUDY.diffusion.optimiser.batch_size),
        runtime=minutes(4320),
        gpu=GPUS,
        nodes=1,  # a process per GPU, all started by one command
    params:
        config=settings("diffusion"),
        code=code_digest("diffusion"),
        latents=lambda wildcards, input: repeat("--latents", input.latents),
        state=f"{STATE}/diffusion",
    message:
        "Training the latent diffusion model"
    shell:
        "python -m meddiff_steps diffusion --config {params.config} --manifest {input.manifest} {params.latents} --scale {input.scale} "
        "--weights {output.weights} --card {output.card} --history {output.history} --state {params.state} --threads {threads} 2>&1 | tee {log}"
