# What is made of a sealed release on request: copies for machine learning (release.exports) and its models
# (release.models).


rule export:
    input:
        root=LEDGER,
        images=IMAGES,
    output:
        out=WEBDATASET_SHARD,
    log:
        f"{RESULTS}/logs/export/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/export/{{shard}}.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500, 16),
        runtime=minutes(60),
    params:
        **run_step("export"),
    message:
        "Exporting the images of shard {wildcards.shard}"
    shell:
        STEP


rule export_index:
    input:
        root=LEDGER,
        images=expand(IMAGES, shard=PLAN_SHARDS),
        tars=expand(WEBDATASET_SHARD, shard=PLAN_SHARDS),
    output:
        out=WEBDATASET[0],
        also=WEBDATASET[1:],
    log:
        f"{RESULTS}/logs/export_index.log",
    benchmark:
        f"{RESULTS}/benchmarks/export_index.tsv"
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(60),
    params:
        **run_step("export_index"),
    message:
        "Listing the export for machine learning"
    shell:
        STEP


rule export_models:
    input:
        autoencoder=AUTOENCODER,
        decoder=DECODER,
        diffusion=RELEASED_MODEL,
        root=LEDGER,
        privacy=PRIVACY_REPORT,
        metrics=METRICS,
    output:
        out=MODEL_RELEASE[0],
        also=MODEL_RELEASE[1:],
    log:
        f"{RESULTS}/logs/export_models.log",
    benchmark:
        f"{RESULTS}/benchmarks/export_models.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000, 2000),
        runtime=minutes(30),
    params:
        **run_step("export_models"),
    message:
        "Packing the models of the release"
    shell:
        STEP
