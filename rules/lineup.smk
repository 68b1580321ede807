# snakemake lineup: real and synthetic images in random order, for people to tell apart (docs/evaluation.md). Private:
# it shows scans of the cohort, and is no part of a release.


rule lineup:
    input:
        manifest=MANIFEST,
        images=COHORT_IMAGES,
        generated=expand(FILTERED, shard=PLAN_SHARDS),
        plan=PLAN,
    output:
        out=f"{RESULTS}/lineup/lineup.html",
        key=f"{RESULTS}/lineup/key.json",
    log:
        f"{RESULTS}/logs/lineup.log",
    benchmark:
        f"{RESULTS}/benchmarks/lineup.tsv"
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(30),
    params:
        **run_step("lineup"),
    message:
        "Drawing real and synthetic images for people to tell apart"
    shell:
        STEP
