if TEXT:

    rule text:
        input:
            manifest=MANIFEST,
            qc=QC,
            after_encoder=given("text", [f"{STUDY.text.encoder}/config.json"]) if STUDY.text.encoder else [],
        output:
            out=TEXT,
        log:
            f"{RESULTS}/logs/text.log",
        benchmark:
            f"{RESULTS}/benchmarks/text.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 8
        resources:
            mem_mb=memory(4000),
            runtime=minutes(240),
        params:
            **run_step("text"),
        message:
            "Encoding the texts of the cohort"
        shell:
            STEP_WITH_THREADS

    rule text_fidelity:
        input:
            manifest=MANIFEST,
            images=COHORT_IMAGES,
            autoencoder=AUTOENCODER,
            decoder=DECODER,
            diffusion=DIFFUSION,
        output:
            out=TEXT_FIDELITY,
        log:
            f"{RESULTS}/logs/text_fidelity.log",
        benchmark:
            f"{RESULTS}/benchmarks/text_fidelity.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 8
        resources:
            mem_mb=memory(4000, 600, STUDY.generate.batch_size),
            runtime=minutes(480),
            gpu=min(GPUS, 1),
        params:
            **run_step("text_fidelity"),
        message:
            "Measuring whether images show what texts say"
        shell:
            STEP_WITH_THREADS
