# With distill.subjects, a first model (the teacher, trained on real scans) makes images that pass the filter, and a second
# one, trained on these alone, makes the cohort that is released. Every rule here is one of the others with other files.
if STUDY.distill.subjects:
    TEACHER_STUDY = STUDY.model_copy(update={"plan": [study_config.PlanGroup(name="teacher", subjects=STUDY.distill.subjects)]})
    TEACHER_SHARDS = shard_names(plan_shards(TEACHER_STUDY.plan, STUDY.generate.shard_size))
    TEACHER_FILES = {"diffusion": DIFFUSION, "diffusion_card": DIFFUSION_CARD}

    use rule plan as teacher_plan with:
        input:
            manifest=MANIFEST,
        output:
            TEACHER_PLAN,
        log:
            f"{RESULTS}/logs/teacher/plan.log",
        benchmark:
            f"{RESULTS}/benchmarks/teacher/plan.tsv"
        params:
            config=settings("plan", TEACHER_STUDY),
            code=code_digest("plan"),

    use rule generate as teacher_generate with:
        input:
            **AUTOENCODER_FILES,
            **TEACHER_FILES,
            plan=TEACHER_PLAN,
        output:
            passing("generated", TEACHER_GENERATED),
        log:
            f"{RESULTS}/logs/teacher/generate/{{shard}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/teacher/generate/{{shard}}.tsv"
        message:
            "Generating shard {wildcards.shard} of the first model"

    use rule filter as teacher_filter with:
        input:
            **DETECTOR_FILES,
            **TEACHER_FILES,
            plan=TEACHER_PLAN,
            generated=TEACHER_GENERATED,
            reference=REFERENCE,
            calibration=CALIBRATION,
        output:
            images=passing("filtered", TEACHER_FILTERED),
            decisions=TEACHER_DECISIONS_SHARD,
        log:
            f"{RESULTS}/logs/teacher/filter/{{shard}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/teacher/filter/{{shard}}.tsv"
        message:
            "Filtering shard {wildcards.shard} of the first model"

    use rule privacy as teacher_privacy with:
        input:
            **DETECTOR_FILES,
            **TEACHER_FILES,
            manifest=MANIFEST,
            images=COHORT_IMAGES,
            plan=TEACHER_PLAN,
            generated=expand(TEACHER_GENERATED, shard=TEACHER_SHARDS),
            filtered=expand(TEACHER_FILTERED, shard=TEACHER_SHARDS),
            shard_decisions=expand(TEACHER_DECISIONS_SHARD, shard=TEACHER_SHARDS),
            reference=REFERENCE,
            calibration=CALIBRATION,
        output:
            report=TEACHER_REPORTS["teacher_privacy"],
            decisions=TEACHER_DECISIONS,
        log:
            f"{RESULTS}/logs/teacher/privacy.log",
        benchmark:
            f"{RESULTS}/benchmarks/teacher/privacy.tsv"
        message:
            "Attacking the cohort of the first model"

    use rule measure as teacher_measure with:
        input:
            **EMBEDDER_FILES,
            **SEGMENTER_FILES,
            manifest=MANIFEST,
            images=COHORT_IMAGES,
            generated=expand(TEACHER_FILTERED, shard=TEACHER_SHARDS),
            plan=TEACHER_PLAN,
            reconstructions=RECONSTRUCTIONS,
            networks=[network.weights for network in STUDY.evaluate.features],
        output:
            metrics=TEACHER_REPORTS["teacher_metrics"],
            predictions=TEACHER_PREDICTIONS,
            components=TEACHER_COMPONENTS,
        log:
            f"{RESULTS}/logs/teacher/evaluate.log",
        benchmark:
            f"{RESULTS}/benchmarks/teacher/evaluate.tsv"
        params:
            config=settings("evaluate", TEACHER_STUDY),
            code=code_digest("evaluate"),
            images=lambda wildcards, input: repeat("--images", input.images),
            generated=lambda wildcards, input: repeat("--generated", input.generated),
            instruments=lambda wildcards, input: options(input, EMBEDDER_FILES | SEGMENTER_FILES),
        message:
            "Measuring the cohort of the first model"

    rule distill:
        input:
            plan=TEACHER_PLAN,
            decisions=TEACHER_DECISIONS,
        output:
            DISTILLED_MANIFEST,
        log:
            f"{RESULTS}/logs/distilled/manifest.log",
        benchmark:
            f"{RESULTS}/benchmarks/distilled/manifest.tsv"
        localrule: True
        conda:
            "../envs/meddiff.yaml"
        threads: 1
        resources:
            mem_mb=memory(1500),
            runtime=minutes(30),
        params:
            config=settings("distill"),
            code=code_digest("distill"),
        message:
            "Taking accepted synthetic images as a training cohort"
        shell:
            "python -m meddiff_steps distill --config {params.config} --plan {input.plan} --decisions {input.decisions} --out {output} 2>&1 | tee {log}"

    use rule latents as distilled_latents with:
        input:
            images=TEACHER_FILTERED,
            autoencoder=AUTOENCODER,
            card=AUTOENCODER_CARD,
        output:
            passing("latents", DISTILLED_LATENTS),
        log:
            f"{RESULTS}/logs/distilled/latents/{{shard}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/distilled/latents/{{shard}}.tsv"
        message:
            "Encoding shard {wildcards.shard} of the synthetic training cohort"

    use rule scale as distilled_scale with:
        input:
            manifest=DISTILLED_MANIFEST,
            latents=expand(DISTILLED_LATENTS, shard=TEACHER_SHARDS),
        output:
            scale=DISTILLED_SCALE,
            manifest=DISTILLED_LATENT_MANIFEST,
        log:
            f"{RESULTS}/logs/distilled/scale.log",
        benchmark:
            f"{RESULTS}/benchmarks/distilled/scale.tsv"

    use rule diffusion as distilled_diffusion with:
        input:
            manifest=DISTILLED_MANIFEST,
            latents=expand(DISTILLED_LATENTS, shard=TEACHER_SHARDS),
            scale=DISTILLED_SCALE,
        output:
            weights=lasting(DIFFUSION_FILES["diffusion"]),
            card=DIFFUSION_FILES["diffusion_card"],
            history=RELEASED_HISTORY,
        log:
            f"{RESULTS}/logs/distilled/diffusion.log",
        benchmark:
            f"{RESULTS}/benchmarks/distilled/diffusion.tsv"
        message:
            "Training the second diffusion model, on synthetic images alone"
