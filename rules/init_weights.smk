if INIT:

    rule init_weights:
        input:
            manifest=MANIFEST,
            given=given("init_weights", GIVEN_FILES),
        output:
            also=[file for files in INIT.values() for file in files],
        log:
            f"{RESULTS}/logs/init_weights.log",
        benchmark:
            f"{RESULTS}/benchmarks/init_weights.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 1
        resources:
            mem_mb=memory(6000),
            runtime=minutes(60),
        params:
            **run_step("init_weights", out=f"{RESULTS}/init"),
        message:
            "Converting the given weights"
        shell:
            STEP
