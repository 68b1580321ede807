# snakemake harmonisation --configfile config/studies/lgg_harmonisation.yaml: scans of some sites as another shows them, as
# a BIDS derivative (docs/applications/harmonisation.md).


rule harmonisation_model:
    input:
        manifest=manifest_of_scans_to_harmonise,
        images=COHORT_IMAGES,
    output:
        out=HARMONISATION_MODEL,
    log:
        f"{RESULTS}/logs/harmonisation_model.log",
    benchmark:
        f"{RESULTS}/benchmarks/harmonisation_model.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(3000, 4800, STUDY.harmonisation.unpaired.optimiser.batch_size),
        runtime=2880,
        gpu=min(GPUS, 1),
    params:
        **run_step("harmonisation_model", state=f"{STATE}/harmonisation_model"),
    message:
        "Training what takes scans to the look of a site"
    shell:
        STEP_WITH_THREADS


rule harmonisation:
    input:
        manifest=MANIFEST,
        qc=QC,
        images=COHORT_IMAGES,
        model=HARMONISATION_MODEL[:-1],
    output:
        out=derivative("harmonisation"),
    log:
        f"{RESULTS}/logs/harmonisation.log",
    benchmark:
        f"{RESULTS}/benchmarks/harmonisation.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        # Every way of test scans, most_scans of them; of as many training scans of each side three images, and half as
        # many again that are of one side.
        mem_mb=memory(6000, 2400 * STUDY.harmonisation.samples + 60 * STUDY.harmonisation.most_scans),
        runtime=minutes(240),
        gpu=min(GPUS, 1),
    params:
        **run_step("harmonisation"),
    message:
        "Taking scans to the look of a site"
    shell:
        STEP_WITH_THREADS
