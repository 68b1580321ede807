# snakemake inpainting --config 'inpainting={hole: {file: PATTERN}}': hidden parts of real scans drawn anew, as a BIDS
# derivative (docs/applications/inpainting.md).


rule inpainting:
    input:
        manifest=manifest_of_scans_to_fill,
        qc=QC,
        images=COHORT_IMAGES,
        autoencoder=AUTOENCODER,
        decoder=DECODER,
        diffusion=DIFFUSION,
        predictors=PREDICTORS,
        after_hole=given("inpainting", HOLE),
    output:
        out=derivative("inpainting"),
    log:
        f"{RESULTS}/logs/inpainting.log",
    benchmark:
        f"{RESULTS}/benchmarks/inpainting.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(4000, 600, STUDY.inpainting.most_scans + 4 * STUDY.inpainting.samples),
        runtime=minutes(240),
        gpu=min(GPUS, 1),
    params:
        **run_step("inpainting"),
    message:
        "Drawing hidden parts of real scans"
    shell:
        STEP_WITH_THREADS
