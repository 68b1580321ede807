rule preprocess:
    input:
        MANIFEST,
    output:
        shard=PREPROCESSED,
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
        config=settings("preprocess"),
        code=code_digest("preprocess"),
    message:
        "Preprocessing shard {wildcards.shard}"
    shell:
        "python -m meddiff_steps preprocess --config {params.config} --manifest {input} --shard {wildcards.shard} "
        "--out {output.shard} --qc {output.qc} --threads {threads} 2>&1 | tee {log}"


rule quality:
    input:
        expand(QC_SHARD, shard=COHORT_SHARDS),
    output:
        QC,
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
        config=settings("quality"),
        code=code_digest("quality"),
        qc=lambda wildcards, input: repeat("--qc", input),
    message:
        "Checking that enough scans could be preprocessed"
    shell:
        "python -m meddiff_steps quality --config {params.config} {params.qc} --out {output} 2>&1 | tee {log}"
