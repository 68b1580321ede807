rule simulate:
    output:
        SIMULATED,
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
        config=settings("simulate"),
        code=code_digest("simulate"),
    message:
        "Simulating a brain cohort"
    shell:
        "python -m meddiff_steps simulate --config {params.config} --out {output} --threads {threads} 2>&1 | tee {log}"


rule cohort:
    input:
        simulated=SIMULATED if STUDY.cohort.source == "simulated" else [],
        fetched=FETCHED if STUDY.storage.cohort else [],
        tables=cohort_tables(),
    output:
        manifest=MANIFEST,
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
        config=settings("cohort"),
        code=code_digest("cohort"),
        simulated=lambda wildcards, input: f"--simulated {Path(input.simulated).parent}" if input.simulated else "",
    message:
        "Reading the cohort, making its manifest and splits"
    shell:
        "python -m meddiff_steps cohort --config {params.config} {params.simulated} --out {output.manifest} "
        "--card {output.card} --threads {threads} 2>&1 | tee {log}"
