rule plan:
    input:
        manifest=MANIFEST,
        qc=QC,
        after_tables=given("plan", [group.table for group in STUDY.plan if group.table]),
    output:
        out=PLAN,
    log:
        f"{RESULTS}/logs/plan.log",
    benchmark:
        f"{RESULTS}/benchmarks/plan.tsv"
    # Ahead of the trainings: a plan that cannot be is refused while nothing is lost.
    priority: 100
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500),
        runtime=minutes(30),
    params:
        **run_step("plan"),
    message:
        "Planning the synthetic subjects"
    shell:
        STEP


rule generate:
    input:
        plan=PLAN,
        autoencoder=AUTOENCODER,
        decoder=DECODER,
        masks=MASKS,
        diffusion=RELEASED_MODEL,
    output:
        out=passing("generated", GENERATED),
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
        **run_step("generate", shard=BY_SHARD),
    message:
        "Generating shard {wildcards.shard}"
    shell:
        STEP_WITH_THREADS
