rule simulate:
    output:
        out=SIMULATED,
    log:
        f"{RESULTS}/logs/simulate.log",
    benchmark:
        f"{RESULTS}/benchmarks/simulate.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 2
    resources:
        mem_mb=memory(3000),
        runtime=minutes(60),
    params:
        **run_step("simulate"),
    message:
        "Simulating a brain cohort"
    shell:
        STEP_WITH_THREADS


rule cohort:
    input:
        simulated=SIMULATED if STUDY.cohort.source == "simulated" else [],
        after_fetching=FETCHED if STUDY.storage.cohort else [],
        after_tables=given("cohort", COHORT_TABLE),
    output:
        out=MANIFEST,
        card=COHORT_CARD,
    log:
        f"{RESULTS}/logs/cohort.log",
    benchmark:
        f"{RESULTS}/benchmarks/cohort.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(2000),
        runtime=minutes(120),
    params:
        **run_step("cohort"),
    message:
        "Reading the cohort, making its manifest and splits"
    shell:
        STEP_WITH_THREADS
