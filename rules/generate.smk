rule plan:
    input:
        manifest=MANIFEST,
        tables=tables([group.table for group in STUDY.plan if group.table], PLAN),
    output:
        PLAN,
    log:
        f"{RESULTS}/logs/plan.log",
    benchmark:
        f"{RESULTS}/benchmarks/plan.tsv"
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500),
        runtime=minutes(30),
    params:
        config=settings("plan"),
        code=code_digest("plan"),
    message:
        "Planning the synthetic subjects"
    shell:
        "python -m meddiff_steps plan --config {params.config} --manifest {input.manifest} --out {output} 2>&1 | tee {log}"


rule generate:
    input:
        **AUTOENCODER_FILES,
        **DIFFUSION_FILES,
        plan=PLAN,
    output:
        passing("generated", GENERATED),
    log:
        f"{RESULTS}/logs/generate/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/generate/{{shard}}.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(2500, 600, STUDY.generate.batch_size),
        runtime=minutes(480),
        gpu=min(GPUS, 1),
    params:
        config=settings("generate"),
        code=code_digest("generate"),
        models=lambda wildcards, input: options(input, AUTOENCODER_FILES | DIFFUSION_FILES),
    message:
        "Generating shard {wildcards.shard}"
    shell:
        "python -m meddiff_steps generate --config {params.config} --plan {input.plan} --shard {wildcards.shard} "
        "{params.models} --out {output} --threads {threads} 2>&1 | tee {log}"
