# snakemake anomaly --config 'anomaly={methods: [gaussian_noise]}': maps of what is unusual in scans, as a BIDS
# derivative (docs/applications/anomaly.md).


rule anomaly:
    input:
        manifest=manifest_of_scans_to_map,
        qc=QC,
        images=COHORT_IMAGES,
        autoencoder=AUTOENCODER if STUDY.anomaly.need("a trained model") else [],
        diffusion=DIFFUSION if STUDY.anomaly.need("a trained model") else [],
        latents=expand(LATENTS, shard=COHORT_SHARDS) if STUDY.anomaly.need("latents of the cohort") else [],
        scale=LATENT_SCALE if STUDY.anomaly.need("latents of the cohort") else [],
        translation=FORETELLING if STUDY.anomaly.need("translation.cycle") else [],
        back=TRANSLATION_BACK if STUDY.anomaly.need("translation.cycle") else [],
    output:
        out=derivative("anomaly"),
    log:
        f"{RESULTS}/logs/anomaly.log",
    benchmark:
        f"{RESULTS}/benchmarks/anomaly.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        # Maps of every method, first of the scans that thresholds come from, then of those that are asked about.
        mem_mb=memory(
            4000,
            4 * STUDY.anomaly.images_held,
            max(STUDY.anomaly.most_scans, STUDY.anomaly.most_calibration_scans),
        ),
        runtime=minutes(240),
        gpu=min(GPUS, 1),
    params:
        **run_step("anomaly"),
    message:
        "Mapping what is unusual in scans"
    shell:
        STEP_WITH_THREADS
