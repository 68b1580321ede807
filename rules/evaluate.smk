rule predictors:
    input:
        manifest=MANIFEST,
        images=COHORT_IMAGES,
    output:
        out=PREDICTORS,
    log:
        f"{RESULTS}/logs/predictors.log",
    benchmark:
        f"{RESULTS}/benchmarks/predictors.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(6000, 100),
        runtime=minutes(240),
    params:
        **run_step("predictors"),
    message:
        "Learning to measure covariates"
    shell:
        STEP


if STUDY.segmentation:

    rule segmenter:
        input:
            manifest=MANIFEST,
            qc=QC,
            images=COHORT_IMAGES,
        output:
            out=SEGMENTER,
        log:
            f"{RESULTS}/logs/segmenter.log",
        benchmark:
            f"{RESULTS}/benchmarks/segmenter.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 8
        resources:
            mem_mb=memory(3000, 500, STUDY.segmentation.optimiser.batch_size),
            runtime=minutes(480),
            gpu=min(GPUS, 1),
        params:
            **run_step("segmenter"),
        message:
            "Training the segmenter that measures volumes"
        shell:
            STEP_WITH_THREADS


rule evaluate:
    input:
        manifest=MANIFEST,
        images=COHORT_IMAGES,
        generated=expand(FILTERED, shard=PLAN_SHARDS),
        plan=PLAN,
        reconstructions=RECONSTRUCTIONS,
        embedder=EMBEDDER,
        predictors=PREDICTORS,
        segmenter=SEGMENTER,
        after_networks=FEATURE_NETWORKS,
    output:
        out=[report(METRICS, caption="../workflow/report/metrics.rst", category="Figures"), *EVALUATION[1:]],
    log:
        f"{RESULTS}/logs/evaluate.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(6000, 100),
        runtime=minutes(720),
    params:
        **run_step("evaluate"),
    message:
        "Measuring covariate fidelity, realism, diversity and sharpness"
    shell:
        STEP


rule sampler_study:
    input:
        manifest=MANIFEST,
        images=COHORT_IMAGES,
        plan=PLAN,
        predictors=PREDICTORS,
        autoencoder=AUTOENCODER,
        decoder=DECODER,
        diffusion=DIFFUSION if STUDENT else RELEASED_MODEL,
        few_step=STUDENT,
    output:
        out=report(
            f"{RESULTS}/sampler_study/results.json", caption="../workflow/report/sampler_study.rst", category="Figures"
        ),
        figure=report(
            f"{RESULTS}/sampler_study/figure.png", caption="../workflow/report/sampler_study.rst", category="Figures"
        ),
    log:
        f"{RESULTS}/logs/sampler_study.log",
    benchmark:
        f"{RESULTS}/benchmarks/sampler_study.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(4000, 600, STUDY.generate.batch_size),
        runtime=minutes(480),
        gpu=min(GPUS, 1),
    params:
        **run_step("sampler_study"),
    message:
        "Comparing samplers: quality against steps and seconds"
    shell:
        STEP_WITH_THREADS
