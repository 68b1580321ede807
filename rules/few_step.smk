# With few_step.method, a student of the diffusion model that draws in a few steps: of the cohort, where generate.sampler
# says so, and beside its teacher in the target sampler_study.
if STUDY.few_step.method:

    rule few_step:
        input:
            manifest=MANIFEST,
            latents=expand(LATENTS, shard=COHORT_SHARDS),
            scale=LATENT_SCALE,
            diffusion=DIFFUSION[:2],
        output:
            out=[*map(lasting, STUDENT[:1]), STUDENT[1], f"{RESULTS}/few_step/history.parquet"],
        log:
            f"{RESULTS}/logs/few_step.log",
        benchmark:
            f"{RESULTS}/benchmarks/few_step.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 8
        resources:
            mem_mb=memory(4000, 200, STUDY.few_step.optimiser.batch_size),
            runtime=2880,
            gpu=GPUS,
            nodes=1,  # a process per GPU, all started by one command
        params:
            **run_step("few_step", state=f"{STATE}/few_step"),
        message:
            "Distilling the diffusion model into a student that draws in a few steps"
        shell:
            STEP_WITH_THREADS

    use rule tone as few_step_tone with:
        input:
            manifest=MANIFEST,
            images=COHORT_IMAGES,
            autoencoder=AUTOENCODER,
            decoder=DECODER,
            diffusion=STUDENT[:2],
        output:
            out=STUDENT[2:],
        log:
            f"{RESULTS}/logs/few_step/tone.log",
        benchmark:
            f"{RESULTS}/benchmarks/few_step/tone.tsv"
        params:
            **run_step("tone", STUDY.drawn_by_student()),
