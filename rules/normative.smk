# snakemake normative --config 'normative={wanted: true}': how far real scans are from a reference population, as a BIDS
# derivative (docs/applications/normative.md).


rule normative:
    input:
        manifest=manifest_of_scans_to_compare,
        qc=QC,
        images=COHORT_IMAGES,
        autoencoder=AUTOENCODER,
        diffusion=DIFFUSION,
    output:
        out=derivative("normative"),
    log:
        f"{RESULTS}/logs/normative.log",
    benchmark:
        f"{RESULTS}/benchmarks/normative.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(4000, 600, 4 * STUDY.normative.samples),
        runtime=minutes(240),
        gpu=min(GPUS, 1),
    params:
        **run_step("normative"),
    message:
        "Mapping how far scans are from a reference"
    shell:
        STEP_WITH_THREADS
