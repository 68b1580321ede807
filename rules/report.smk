rule showcase:
    input:
        manifest=MANIFEST,
        autoencoder=AUTOENCODER,
        decoder=DECODER,
        masks=MASKS,
        qc=QC,
        diffusion=RELEASED_MODEL,
    output:
        out=SHOWCASE,
    log:
        f"{RESULTS}/logs/showcase.log",
    benchmark:
        f"{RESULTS}/benchmarks/showcase.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(2500, 600, STUDY.generate.batch_size),
        runtime=minutes(60),
        gpu=min(GPUS, 1),
    params:
        **run_step("showcase"),
    message:
        "Sampling counterfactual sweeps and interpolations for the report"
    shell:
        STEP_WITH_THREADS


rule report:
    input:
        cohort=[MANIFEST, COHORT_CARD],
        qc=QC,
        images=COHORT_IMAGES,
        plan=PLAN,
        generated=expand(FILTERED, shard=PLAN_SHARDS),
        autoencoder=[AUTOENCODER[1], AUTOENCODER_CURVE, AUTOENCODER_RECONSTRUCTIONS],
        decoder=[*DECODER[1:], *DECODER_CURVE, RECONSTRUCTIONS] if DECODER else [],
        diffusion=[RELEASED_MODEL[1], f"{RELEASED_FOLDER}/history.parquet"],
        evaluation=[*EVALUATION, SHOWCASE],
        privacy=PRIVACY_REPORT,
        teacher=TEACHER_REPORTS,
        downstream=DOWNSTREAM_RESULTS,
    output:
        out=report(REPORT, caption="../workflow/report/report.rst", category="Report"),
        contact_sheet=report(
            f"{RESULTS}/contact-sheet.png", caption="../workflow/report/contact_sheet.rst", category="Report"
        ),
    log:
        f"{RESULTS}/logs/report.log",
    benchmark:
        f"{RESULTS}/benchmarks/report.tsv"
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000),
        runtime=minutes(30),
    params:
        **run_step("report"),
    message:
        "Writing the report"
    shell:
        STEP
