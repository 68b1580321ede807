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
        runtime=2880,
        gpu=GPUS,
        nodes=1,  # a process per GPU, all started by one command
    params:
        **run_step("segmentation_model", state=f"{STATE}/segmentation_model"),
    message:
        "Training what marks a structure"
    shell:
        STEP_WITH_THREADS


# What is compared with patches: `whole` scans at the same cost, patches that are `unplaced`.
use rule segmentation_model as segmentation_beside with:
    output:
        out=image_to_image(SEGMENTATION_BESIDE),
    log:
        f"{RESULTS}/logs/segmentation_beside/{{beside}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/segmentation_beside/{{beside}}.tsv"
    wildcard_constraints:
        beside="whole|unplaced",
    params:
        **run_step("segmentation_model", beside=lambda wildcards: wildcards.beside, state=f"{STATE}/segmentation_model"),
    message:
        "Training what is compared with patches, {wildcards.beside}"


rule segmentation_few_labels:
    input:
        manifest=manifest_of_scans_to_mark,
        images=COHORT_IMAGES,
        base=lambda wildcards: (
            network(SEGMENTATION_FEW_LABELS.format(network="pretraining"))
            if wildcards.network.startswith("pretrained")
            else []
        ),
    output:
        out=trained(SEGMENTATION_FEW_LABELS),
    log:
        f"{RESULTS}/logs/segmentation_few_labels/{{network}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/segmentation_few_labels/{{network}}.tsv"
    wildcard_constraints:
        network=r"pretraining|(scratch|pretrained)_(\d+|all)",
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(3000, 2400, STUDY.segmentation_ensemble.optimiser.batch_size),
        runtime=2880,
        gpu=GPUS,
        nodes=1,  # a process per GPU, all started by one command
    params:
        **run_step(
            "segmentation_few_labels",
            network=lambda wildcards: wildcards.network,
            state=f"{STATE}/segmentation_few_labels",
        ),
    message:
        "Training what marks a structure with few labels, {wildcards.network}"
    shell:
        STEP_WITH_THREADS


rule segmentation:
    input:
        manifest=MANIFEST,
        qc=QC,
        images=COHORT_IMAGES,
        model=SEGMENTATION_MODEL[:-1],
        beside=[
            file
            for name in STUDY.segmentation_ensemble.beside
            for file in image_to_image(SEGMENTATION_BESIDE.format(beside=name))[:-1]
        ],
        few_labels=[
            file
            for name in STUDY.segmentation_ensemble.few_labels
            for file in network(SEGMENTATION_FEW_LABELS.format(network=name))
        ],
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
