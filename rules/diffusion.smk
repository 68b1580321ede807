rule diffusion:
    input:
        manifest=MANIFEST,
        latents=expand(LATENTS, shard=COHORT_SHARDS),
        scale=LATENT_SCALE,
        text=TEXT,
        label_latents=LABEL_LATENTS,
        label_scale=LABEL_SCALE,
        base=INIT.get("diffusion", []),
    output:
        out=[*map(lasting, DIFFUSION[:1]), DIFFUSION[1], f"{RESULTS}/diffusion/history.parquet"],
    log:
        f"{RESULTS}/logs/diffusion.log",
    benchmark:
        f"{RESULTS}/benchmarks/diffusion.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(4000, 200, STUDY.diffusion.optimiser.batch_size),
        runtime=4320,
        gpu=GPUS,
        nodes=1,  # a process per GPU, all started by one command
    params:
        **run_step("diffusion", state=f"{STATE}/diffusion"),
    message:
        "Training the latent diffusion model"
    shell:
        STEP_WITH_THREADS


rule tone:
    input:
        manifest=MANIFEST,
        images=COHORT_IMAGES,
        autoencoder=AUTOENCODER,
        decoder=DECODER,
        masks=MASKS,
        diffusion=DIFFUSION[:2],
    output:
        out=DIFFUSION[2:],
    log:
        f"{RESULTS}/logs/tone.log",
    benchmark:
        f"{RESULTS}/benchmarks/tone.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(2500, 600, STUDY.generate.batch_size),
        runtime=minutes(240),
        gpu=min(GPUS, 1),
    params:
        **run_step("tone", STUDY.drawn_by_teacher()),
    message:
        "Fitting the grey levels of generated images"
    shell:
        STEP_WITH_THREADS
