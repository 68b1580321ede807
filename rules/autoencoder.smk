rule autoencoder:
    input:
        manifest=MANIFEST,
        qc=QC,
        images=COHORT_IMAGES,
        features=[STUDY.autoencoder.perceptual.weights] if STUDY.autoencoder.perceptual.weight else [],
    output:
        weights=lasting(AUTOENCODER),
        card=AUTOENCODER_CARD,
        history=AUTOENCODER_HISTORY,
        reconstructions=RECONSTRUCTIONS,
    log:
        f"{RESULTS}/logs/autoencoder.log",
    benchmark:
        f"{RESULTS}/benchmarks/autoencoder.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(2500, 2000, STUDY.autoencoder.optimiser.batch_size),
        runtime=minutes(2880),
        gpu=GPUS,
        nodes=1,  # a process per GPU, all started by one command
    params:
        config=settings("autoencoder"),
        code=code_digest("autoencoder"),
        images=lambda wildcards, input: repeat("--images", input.images),
        features=lambda wildcards, input: repeat("--features", input.features),
        state=f"{STATE}/autoencoder",
    message:
        "Training the autoencoder"
    shell:
        "python -m meddiff_steps autoencoder --config {params.config} --manifest {input.manifest} {params.images} "
        "--weights {output.weights} --card {output.card} --history {output.history} "
        "--reconstructions {output.reconstructions} {params.features} --state {params.state} --threads {threads} 2>&1 | tee {log}"
