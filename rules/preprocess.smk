rule preprocess:
    input:
        manifest=MANIFEST,
        template=given("preprocess", [TEMPLATE] if TEMPLATE else []),
        exclude=EXCLUDE,
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
        mem_mb=memory(2000 + extraction_mb(STUDY), 64, 4),
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
        "Checking that enough scans could be preprocessed (look at them: target scan_pages)"
    shell:
        STEP


# snakemake scan_pages: every scan as it was preprocessed, for a person to keep or exclude (docs/own-cohort.md). Private:
# it shows scans of the cohort, and is no part of a release.
rule scan_pages:
    input:
        qc=QC,
        images=COHORT_IMAGES,
        template=given("preprocess", [TEMPLATE] if TEMPLATE else []),
        exclude=EXCLUDE,
    output:
        out=SCAN_PAGES,
    log:
        f"{RESULTS}/logs/scan_pages.log",
    benchmark:
        f"{RESULTS}/benchmarks/scan_pages.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(60),
    params:
        **run_step("scan_pages"),
    message:
        f"Drawing all scans for people to look at: {SCAN_PAGES}"
    shell:
        STEP
