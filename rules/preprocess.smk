rule preprocess:
    input:
        manifest=MANIFEST,
        template=tables([TEMPLATE] if TEMPLATE else [], QC),
    output:
        out=PREPROCESSED,
        qc=QC_SHARD,
    log:
        f"{RESULTS}/logs/preprocess/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/preprocess/{{shard}}.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 2
    resources:
        mem_mb=memory(2000, 64, 4),
        runtime=minutes(120),
    params:
        **run_step("preprocess", shard=BY_SHARD),
    message:
        "Preprocessing shard {wildcards.shard}"
    shell:
        STEP_WITH_THREADS


rule quality:
    input:
        qc=expand(QC_SHARD, shard=COHORT_SHARDS),
    output:
        out=QC,
    log:
        f"{RESULTS}/logs/quality.log",
    benchmark:
        f"{RESULTS}/benchmarks/quality.tsv"
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(10),
    params:
        **run_step("quality"),
    message:
        "Checking that enough scans could be preprocessed"
    shell:
        STEP
