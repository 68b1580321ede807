# What is made of a sealed release on request: copies for machine learning (release.exports) and its models (release.models).


rule export:
    input:
        root=LEDGER,
        images=IMAGES,
    output:
        WEBDATASET_SHARD,
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
        config=settings("export"),
        code=code_digest("export"),
    message:
        "Exporting the images of shard {wildcards.shard}"
    shell:
        "python -m meddiff_steps export --config {params.config} --root {input.root} --images {input.images} --out {output} 2>&1 | tee {log}"


rule export_index:
    input:
        root=LEDGER,
        images=expand(IMAGES, shard=PLAN_SHARDS),
        tars=expand(WEBDATASET_SHARD, shard=PLAN_SHARDS),
    output:
        **WEBDATASET_FILES,
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
        config=settings("export_index"),
        code=code_digest("export_index"),
        images=lambda wildcards, input: repeat("--images", input.images),
        tars=lambda wildcards, input: repeat("--tars", input.tars),
    message:
        "Listing the export for machine learning"
    shell:
        "python -m meddiff_steps export_index --config {params.config} --root {input.root} {params.images} {params.tars} "
        "--out {output.manifest} 2>&1 | tee {log}"


rule export_models:
    input:
        **AUTOENCODER_FILES,
        **DIFFUSION_FILES,
        root=LEDGER,
        privacy=PRIVACY_REPORT,
    output:
        **MODEL_RELEASE_FILES,
    log:
        f"{RESULTS}/logs/export_models.log",
    benchmark:
        f"{RESULTS}/benchmarks/export_models.tsv"
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500),
        runtime=minutes(30),
    params:
        config=settings("export_models"),
        code=code_digest("export_models"),
        files=lambda wildcards, input: options(input, [*AUTOENCODER_FILES, *DIFFUSION_FILES, "root", "privacy"]),
    message:
        "Packing the models of the release"
    shell:
        "python -m meddiff_steps export_models --config {params.config} {params.files} --out {output.readme} 2>&1 | tee {log}"
