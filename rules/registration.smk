# snakemake registration --config 'registration={pairs: 12}': scans of several people brought onto each other, as a BIDS
# derivative (docs/applications/registration.md).


rule registration_train:
    input:
        manifest=manifest_of_scans_to_register,
        images=COHORT_IMAGES,
    output:
        out=[*network(REGISTRATION_NETWORK), f"{REGISTRATION_NETWORK}/history.parquet"],
    log:
        f"{RESULTS}/logs/registration/train/{{network}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/registration/train/{{network}}.tsv"
    wildcard_constraints:
        network="score|plain",
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(3000, 600, STUDY.registration.optimiser.batch_size),
        runtime=720,
        gpu=min(GPUS, 1),
    params:
        **run_step("registration_train", network=lambda wildcards: wildcards.network, state=f"{STATE}/registration"),
    message:
        "Training the registration network, {wildcards.network}"
    shell:
        STEP_WITH_THREADS


rule registration:
    input:
        manifest=manifest_of_scans_to_register,
        qc=QC,
        images=COHORT_IMAGES,
        score=expand(network(REGISTRATION_NETWORK), network="score"),
        plain=expand(network(REGISTRATION_NETWORK), network="plain"),
    output:
        out=derivative("registration"),
    log:
        f"{RESULTS}/logs/registration.log",
    benchmark:
        f"{RESULTS}/benchmarks/registration.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(4000, 100, STUDY.registration.pairs),
        runtime=minutes(240),
        gpu=min(GPUS, 1),
    params:
        **run_step("registration"),
    message:
        "Bringing scans onto each other"
    shell:
        STEP_WITH_THREADS
