if STUDY.segmentation:

    rule segmenter:
        input:
            manifest=MANIFEST,
            qc=QC,
            images=COHORT_IMAGES,
        output:
            weights=SEGMENTER_FILES["segmenter"],
            card=SEGMENTER_FILES["segmenter_card"],
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
            config=settings("segmenter"),
            code=code_digest("segmenter"),
            images=lambda wildcards, input: repeat("--images", input.images),
        message:
            "Training the segmenter that measures volumes"
        shell:
            "python -m meddiff_steps segmenter --config {params.config} --manifest {input.manifest} --qc {input.qc} {params.images} "
            "--weights {output.weights} --card {output.card} --threads {threads} 2>&1 | tee {log}"


rule measure:
    input:
        **EMBEDDER_FILES,
        **SEGMENTER_FILES,
        manifest=MANIFEST,
        images=COHORT_IMAGES,
        generated=expand(FILTERED, shard=PLAN_SHARDS),
        plan=PLAN,
        reconstructions=RECONSTRUCTIONS,
        networks=[network.weights for network in STUDY.evaluate.features],
    output:
        metrics=report(METRICS, caption="../workflow/report/metrics.rst", category="Figures"),
        predictions=PREDICTIONS,
        components=COMPONENTS,
    log:
        f"{RESULTS}/logs/evaluate.log",
    benchmark:
        f"{RESULTS}/benchmarks/evaluate.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(6000),
        runtime=minutes(120),
    params:
        config=settings("evaluate"),
        code=code_digest("evaluate"),
        images=lambda wildcards, input: repeat("--images", input.images),
        generated=lambda wildcards, input: repeat("--generated", input.generated),
        instruments=lambda wildcards, input: options(input, EMBEDDER_FILES | SEGMENTER_FILES),
    message:
        "Measuring covariate fidelity, realism, diversity and sharpness"
    shell:
        "python -m meddiff_steps evaluate --config {params.config} --manifest {input.manifest} {params.images} {params.generated} "
        "--plan {input.plan} --reconstructions {input.reconstructions} {params.instruments} --out {output.metrics} --predictions {output.predictions} "
        "--components {output.components} 2>&1 | tee {log}"


rule compare_samplers:
    input:
        **AUTOENCODER_FILES,
        **DIFFUSION_FILES,
        manifest=MANIFEST,
        images=COHORT_IMAGES,
        plan=PLAN,
    output:
        results=report(SAMPLER_STUDY, caption="../workflow/report/sampler_study.rst", category="Figures"),
        figure=report(SAMPLER_FIGURE, caption="../workflow/report/sampler_study.rst", category="Figures"),
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
        config=settings("sampler_study"),
        code=code_digest("sampler_study"),
        images=lambda wildcards, input: repeat("--images", input.images),
        models=lambda wildcards, input: options(input, AUTOENCODER_FILES | DIFFUSION_FILES),
    message:
        "Comparing samplers: quality against steps and seconds"
    shell:
        "python -m meddiff_steps sampler_study --config {params.config} --manifest {input.manifest} {params.images} --plan {input.plan} "
        "{params.models} --out {output.results} --figure {output.figure} --threads {threads} 2>&1 | tee {log}"
