# snakemake counterfactual --config 'counterfactual={covariate: NAME, scans: [SCAN, ...]}': real scans with one
# covariate moved, as a BIDS derivative (docs/counterfactual.md).


rule counterfactual:
    input:
        **guides_of_counterfactuals(),
        manifest=manifest_of_scans_to_move,
        qc=QC,
        images=COHORT_IMAGES,
        autoencoder=AUTOENCODER,
        decoder=DECODER,
        diffusion=DIFFUSION,
        embedder=EMBEDDER,
        predictors=PREDICTORS,
    output:
        out=derivative("counterfactuals"),
    log:
        f"{RESULTS}/logs/counterfactual.log",
    benchmark:
        f"{RESULTS}/benchmarks/counterfactual.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(4000, 600, STUDY.counterfactual.most_scans * (STUDY.counterfactual.sweep_steps + 3)),
        runtime=minutes(240),
        gpu=min(GPUS, 1),
    params:
        **run_step("counterfactual"),
    message:
        "Moving a covariate of real scans"
    shell:
        STEP_WITH_THREADS
