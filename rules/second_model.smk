# With second_model.subjects, a first model (the teacher, trained on real scans) makes images that pass the filter, and
# a second one, trained on these alone, makes the cohort that is released. Every rule here is one of the others with
# other files.
if STUDY.second_model.subjects:
    TEACHER_STUDY = STUDY.model_copy(
        update={"plan": [study_config.PlanGroup(name="teacher", subjects=STUDY.second_model.subjects)]}
    )
    TEACHER_SHARDS = shard_names(plan_shards(TEACHER_STUDY.plan, STUDY.generate.shard_size))
    TEACHER_GENERATED = f"{TEACHER}/generated/shard-{{shard}}.arrow"
    TEACHER_FILTERED = f"{TEACHER}/filtered/shard-{{shard}}.arrow"
    TEACHER_DECISIONS_SHARD = f"{TEACHER}/privacy/decisions/shard-{{shard}}.parquet"
    SECOND_LATENTS = f"{RESULTS}/second_model/latents/shard-{{shard}}.arrow"

    use rule plan as teacher_plan with:
        input:
            manifest=MANIFEST,
            qc=QC,
        output:
            out=f"{TEACHER}/plan.parquet",
        log:
            f"{RESULTS}/logs/teacher/plan.log",
        benchmark:
            f"{RESULTS}/benchmarks/teacher/plan.tsv"
        params:
            **run_step("plan", TEACHER_STUDY),

    use rule generate as teacher_generate with:
        input:
            plan=rules.teacher_plan.output.out,
            autoencoder=AUTOENCODER,
            decoder=DECODER,
            diffusion=DIFFUSION,
        output:
            out=passing("generated", TEACHER_GENERATED),
        log:
            f"{RESULTS}/logs/teacher/generate/{{shard}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/teacher/generate/{{shard}}.tsv"
        message:
            "Generating shard {wildcards.shard} of the first model"

    use rule filter as teacher_filter with:
        input:
            plan=rules.teacher_plan.output.out,
            generated=TEACHER_GENERATED,
            autoencoder=AUTOENCODER,
            scale=LATENT_SCALE,
            embedder=EMBEDDER,
            decoder=DECODER,
            diffusion=DIFFUSION,
            reference=REFERENCE,
            reference_scans=REFERENCE_SCANS,
            calibration=CALIBRATION,
        output:
            out=passing("filtered", TEACHER_FILTERED),
            decisions=TEACHER_DECISIONS_SHARD,
        log:
            f"{RESULTS}/logs/teacher/filter/{{shard}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/teacher/filter/{{shard}}.tsv"
        message:
            "Filtering shard {wildcards.shard} of the first model"

    use rule privacy as teacher_privacy with:
        input:
            manifest=MANIFEST,
            images=COHORT_IMAGES,
            plan=rules.teacher_plan.output.out,
            generated=expand(TEACHER_GENERATED, shard=TEACHER_SHARDS),
            filtered=expand(TEACHER_FILTERED, shard=TEACHER_SHARDS),
            shard_decisions=expand(TEACHER_DECISIONS_SHARD, shard=TEACHER_SHARDS),
            autoencoder=AUTOENCODER,
            scale=LATENT_SCALE,
            embedder=EMBEDDER,
            decoder=DECODER,
            diffusion=DIFFUSION,
            reference=REFERENCE,
            reference_scans=REFERENCE_SCANS,
            calibration=CALIBRATION,
        output:
            out=TEACHER_REPORTS[0],
            decisions=f"{TEACHER}/privacy/decisions.parquet",
        log:
            f"{RESULTS}/logs/teacher/privacy.log",
        benchmark:
            f"{RESULTS}/benchmarks/teacher/privacy.tsv"
        message:
            "Attacking the cohort of the first model"

    use rule evaluate as teacher_evaluate with:
        input:
            manifest=MANIFEST,
            images=COHORT_IMAGES,
            generated=expand(TEACHER_FILTERED, shard=TEACHER_SHARDS),
            plan=rules.teacher_plan.output.out,
            reconstructions=RECONSTRUCTIONS,
            embedder=EMBEDDER,
            predictors=PREDICTORS,
            segmenter=SEGMENTER,
            after_networks=FEATURE_NETWORKS,
        output:
            out=[
                TEACHER_REPORTS[1],
                *(f"{TEACHER}/evaluation/{name}.parquet" for name in ("predictions", "components")),
            ],
        log:
            f"{RESULTS}/logs/teacher/evaluate.log",
        benchmark:
            f"{RESULTS}/benchmarks/teacher/evaluate.tsv"
        params:
            **run_step("evaluate", TEACHER_STUDY),
        message:
            "Measuring the cohort of the first model"

    rule second_model:
        input:
            plan=rules.teacher_plan.output.out,
            decisions=rules.teacher_privacy.output.decisions,
        output:
            out=f"{RESULTS}/second_model/manifest.parquet",
        log:
            f"{RESULTS}/logs/second_model/manifest.log",
        benchmark:
            f"{RESULTS}/benchmarks/second_model/manifest.tsv"
        localrule: True
        conda:
            "../envs/meddiff.yaml"
        threads: 1
        resources:
            mem_mb=memory(1500),
            runtime=minutes(30),
        params:
            **run_step("second_model"),
        message:
            "Taking accepted synthetic images as a training cohort"
        shell:
            STEP

    use rule latents as second_latents with:
        input:
            images=TEACHER_FILTERED,
            autoencoder=AUTOENCODER,
        output:
            out=passing("latents", SECOND_LATENTS),
        log:
            f"{RESULTS}/logs/second_model/latents/{{shard}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/second_model/latents/{{shard}}.tsv"
        message:
            "Encoding shard {wildcards.shard} of the synthetic training cohort"

    use rule scale as second_scale with:
        input:
            manifest=rules.second_model.output.out,
            latents=expand(SECOND_LATENTS, shard=TEACHER_SHARDS),
            images=expand(TEACHER_FILTERED, shard=TEACHER_SHARDS),
            autoencoder=AUTOENCODER,
        output:
            scale=f"{RESULTS}/second_model/latents/scale.safetensors",
            out=f"{RESULTS}/second_model/latents/manifest.json",
        log:
            f"{RESULTS}/logs/second_model/scale.log",
        benchmark:
            f"{RESULTS}/benchmarks/second_model/scale.tsv"

    use rule diffusion as second_diffusion with:
        input:
            manifest=rules.second_model.output.out,
            latents=expand(SECOND_LATENTS, shard=TEACHER_SHARDS),
            scale=rules.second_scale.output.scale,
        output:
            out=[*map(lasting, RELEASED_MODEL[:1]), RELEASED_MODEL[1], f"{RELEASED_FOLDER}/history.parquet"],
        log:
            f"{RESULTS}/logs/second_model/diffusion.log",
        benchmark:
            f"{RESULTS}/benchmarks/second_model/diffusion.tsv"
        message:
            "Training the second diffusion model, on synthetic images alone"

    use rule tone as second_tone with:
        input:
            manifest=rules.second_model.output.out,
            images=expand(TEACHER_FILTERED, shard=TEACHER_SHARDS),
            autoencoder=AUTOENCODER,
            decoder=DECODER,
            diffusion=RELEASED_MODEL[:2],
        output:
            out=RELEASED_MODEL[2:],
        log:
            f"{RESULTS}/logs/second_model/tone.log",
        benchmark:
            f"{RESULTS}/benchmarks/second_model/tone.tsv"
