# snakemake segmentation --configfile config/studies/lgg_segmentation.yaml: a structure marked in real scans by several
# draws, as a BIDS derivative (docs/applications/segmentation.md).


rule segmentation_model:
    input:
        manifest=manifest_of_scans_to_mark,
        images=COHORT_IMAGES,
    output:
        out=SEGMENTATION_MODEL,
    log:
        f"{RESULTS}/logs/segmentation_model.log",
    benchmark:
        f"{RESULTS}/benchmarks/segmentation_model.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(3000, 2400, STUDY.segmentation_ensemble.optimiser.batch_size),
        runtime=minutes(2880),
        gpu=GPUS,
        nodes=1,  # a process per GPU, all started by one command
    params:
        **run_step("segmentation_model", state=f"{STATE}/segmentation_model"),
    message:
        "Training what marks a structure"
    shell:
        STEP_WITH_THREADS


rule segmentation:
    input:
        manifest=MANIFEST,
        qc=QC,
        images=COHORT_IMAGES,
        model=SEGMENTATION_MODEL[:-1],
    output:
        out=derivative("segmentation"),
    log:
        f"{RESULTS}/logs/segmentation.log",
    benchmark:
        f"{RESULTS}/benchmarks/segmentation.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(3000, 2400, STUDY.segmentation_ensemble.samples),
        runtime=minutes(240),
        gpu=min(GPUS, 1),
    params:
        **run_step("segmentation"),
    message:
        "Marking a structure by several draws"
    shell:
        STEP_WITH_THREADS
