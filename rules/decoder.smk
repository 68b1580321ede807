if DECODER:

    rule decoder:
        input:
            manifest=MANIFEST,
            images=COHORT_IMAGES,
            autoencoder=AUTOENCODER,
            base=INIT.get("decoder", []),
        output:
            out=[*map(lasting, DECODER[:1]), *DECODER[1:], *DECODER_CURVE, RECONSTRUCTIONS],
        log:
            f"{RESULTS}/logs/decoder.log",
        benchmark:
            f"{RESULTS}/benchmarks/decoder.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 8
        resources:
            mem_mb=memory(2500, 600, STUDY.decoder.optimiser.batch_size),
            runtime=2880,
            gpu=GPUS,
            nodes=1,  # a process per GPU, all started by one command
        params:
            **run_step("decoder", state=f"{STATE}/decoder"),
        message:
            "Training the drawing decoder"
        shell:
            STEP_WITH_THREADS
