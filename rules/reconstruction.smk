# snakemake reconstruction --config 'reconstruction={operators: [mri]}': scans from incomplete measurements of them, as
# a BIDS derivative (docs/applications/reconstruction.md).


rule reconstruction:
    input:
        manifest=manifest_of_scans_to_reconstruct,
        qc=QC,
        images=COHORT_IMAGES,
        autoencoder=AUTOENCODER,
        diffusion=DIFFUSION,
    output:
        out=derivative("reconstruction"),
    log:
        f"{RESULTS}/logs/reconstruction.log",
    benchmark:
        f"{RESULTS}/benchmarks/reconstruction.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        # States of a network that is differentiated, and the images of every scan.
        mem_mb=memory(6000, 4000, 4 * STUDY.reconstruction.samples),
        runtime=minutes(240),
        gpu=min(GPUS, 1),
    params:
        **run_step("reconstruction"),
    message:
        "Reconstructing scans from incomplete measurements"
    shell:
        STEP_WITH_THREADS
