rule autoencoder:
    input:
        manifest=MANIFEST,
        images=COHORT_IMAGES,
        features=given("autoencoder", PERCEPTUAL),
        after_quality=QC,
        base=INIT.get("autoencoder", []),
    output:
        out=[*map(lasting, AUTOENCODER[:1]), *AUTOENCODER[1:], AUTOENCODER_CURVE, AUTOENCODER_RECONSTRUCTIONS],
    log:
        f"{RESULTS}/logs/autoencoder.log",
    benchmark:
        f"{RESULTS}/benchmarks/autoencoder.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(2500, 2000, STUDY.autoencoder.optimiser.batch_size),
        runtime=2880,
        gpu=GPUS,
        nodes=1,  # a process per GPU, all started by one command
    params:
        **run_step("autoencoder", state=f"{STATE}/autoencoder"),
    message:
        "Training the autoencoder"
    shell:
        STEP_WITH_THREADS
