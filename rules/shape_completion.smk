# snakemake shape_completion --config 'shape_completion={points: shapes.npz}': what is missing of shapes, as points and
# masks (docs/applications/shape-completion.md).


rule shape_completion_train:
    input:
        points=points_of_shapes("shape_completion_train"),
    output:
        out=[*SHAPE_NETWORK, f"{RESULTS}/shape_network/history.parquet"],
    log:
        f"{RESULTS}/logs/shape_completion/train.log",
    benchmark:
        f"{RESULTS}/benchmarks/shape_completion/train.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(3000),
        runtime=480,
        gpu=min(GPUS, 1),
    params:
        **run_step("shape_completion_train", state=f"{STATE}/shape_completion"),
    message:
        "Training the diffusion of points"
    shell:
        STEP_WITH_THREADS


rule shape_completion:
    input:
        points=points_of_shapes("shape_completion"),
        network=SHAPE_NETWORK,
    output:
        out=derivative("shape_completion"),
    log:
        f"{RESULTS}/logs/shape_completion.log",
    benchmark:
        f"{RESULTS}/benchmarks/shape_completion.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(3000),
        runtime=minutes(120),
        gpu=min(GPUS, 1),
    params:
        **run_step("shape_completion"),
    message:
        "Completing shapes"
    shell:
        STEP_WITH_THREADS
