# With `pairs`: networks of label maps, which are those of images with other files. What images are drawn from, and what
# a segmenter gains from such pairs.
if STUDY.pairs:

    rule masks:
        input:
            images=PREPROCESSED,
        output:
            out=LABEL_MAP,
        log:
            f"{RESULTS}/logs/masks/maps/{{shard}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/masks/maps/{{shard}}.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 1
        resources:
            mem_mb=memory(1500, 100),
            runtime=minutes(120),
        params:
            **run_step("masks"),
        message:
            "Numbering the label maps of shard {wildcards.shard}"
        shell:
            STEP

    use rule autoencoder as mask_autoencoder with:
        input:
            manifest=MANIFEST,
            images=LABEL_MAPS,
            after_quality=QC,
        output:
            out=[
                *map(lasting, MASKS[:1]),
                MASKS[1],
                *(f"{RESULTS}/masks/autoencoder/{name}" for name in ("history.parquet", "reconstructions.arrow")),
            ],
        log:
            f"{RESULTS}/logs/masks/autoencoder.log",
        benchmark:
            f"{RESULTS}/benchmarks/masks/autoencoder.tsv"
        params:
            **run_step("autoencoder", state=f"{STATE}/masks/autoencoder"),
        message:
            "Training the autoencoder of label maps"

    use rule latents as mask_latents with:
        input:
            images=LABEL_MAP,
            autoencoder=MASKS[:2],
        output:
            out=passing("latents", LABEL_LATENT),
        log:
            f"{RESULTS}/logs/masks/latents/{{shard}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/masks/latents/{{shard}}.tsv"
        message:
            "Encoding the label maps of shard {wildcards.shard}"

    use rule scale as mask_scale with:
        input:
            manifest=MANIFEST,
            latents=LABEL_LATENTS,
            images=LABEL_MAPS,
            autoencoder=MASKS[:2],
        output:
            scale=LABEL_SCALE[0],
            out=f"{RESULTS}/masks/latents/manifest.json",
        log:
            f"{RESULTS}/logs/masks/scale.log",
        benchmark:
            f"{RESULTS}/benchmarks/masks/scale.tsv"

    use rule diffusion as mask_diffusion with:
        input:
            manifest=MANIFEST,
            latents=LABEL_LATENTS,
            scale=LABEL_SCALE[0],
        output:
            out=[*map(lasting, MASKS[2:3]), MASKS[3], f"{RESULTS}/masks/diffusion/history.parquet"],
        log:
            f"{RESULTS}/logs/masks/diffusion.log",
        benchmark:
            f"{RESULTS}/benchmarks/masks/diffusion.tsv"
        params:
            **run_step("diffusion", state=f"{STATE}/masks/diffusion"),
        message:
            "Training the latent diffusion model of label maps"

    rule segmentation_study:
        input:
            manifest=MANIFEST,
            images=COHORT_IMAGES,
            label_maps=LABEL_MAPS,
            filtered=expand(FILTERED, shard=PLAN_SHARDS),
            released=RELEASED,
        output:
            out=report(SEGMENTATION_STUDY[0], caption="../workflow/report/segmentation_study.rst", category="Figures"),
            cases=SEGMENTATION_STUDY[1],
        log:
            f"{RESULTS}/logs/segmentation_study.log",
        benchmark:
            f"{RESULTS}/benchmarks/segmentation_study.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 8
        resources:
            mem_mb=memory(4000, 800, STUDY.segmentation_study.optimiser.batch_size),
            runtime=minutes(720),
            gpu=min(GPUS, 1),
        params:
            **run_step("segmentation_study"),
        message:
            "Comparing segmenters that learnt from real pairs, synthetic ones, and both"
        shell:
            STEP_WITH_THREADS

else:

    rule segmentation_study:
        input:
            pairs_to_learn_from,
        localrule: True
