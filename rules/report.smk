rule showcase:
    input:
        **AUTOENCODER_FILES,
        **DIFFUSION_FILES,
        manifest=MANIFEST,
    output:
        SHOWCASE,
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
        config=settings("showcase"),
        code=code_digest("showcase"),
        models=lambda wildcards, input: options(input, AUTOENCODER_FILES | DIFFUSION_FILES),
    message:
        "Sampling counterfactual sweeps and interpolations for the report"
    shell:
        "python -m meddiff_steps showcase --config {params.config} --manifest {input.manifest} "
        "{params.models} --out {output} --threads {threads} 2>&1 | tee {log}"


rule report:
    input:
        **TEACHER_REPORTS,
        **AUGMENT_REPORTS,
        cohort_card=COHORT_CARD,
        qc=QC,
        manifest=MANIFEST,
        images=COHORT_IMAGES,
        generated=expand(FILTERED, shard=PLAN_SHARDS),
        plan=PLAN,
        privacy=PRIVACY_REPORT,
        autoencoder_card=AUTOENCODER_CARD,
        autoencoder_history=AUTOENCODER_HISTORY,
        diffusion_card=DIFFUSION_FILES["diffusion_card"],
        diffusion_history=RELEASED_HISTORY,
        reconstructions=RECONSTRUCTIONS,
        showcase=SHOWCASE,
        metrics=METRICS,
        predictions=PREDICTIONS,
        components=COMPONENTS,
    output:
        page=report(REPORT, caption="../workflow/report/report.rst", category="Report"),
        contact_sheet=report(CONTACT_SHEET, caption="../workflow/report/contact_sheet.rst", category="Report"),
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
        config=settings("report"),
        code=code_digest("report"),
        images=lambda wildcards, input: repeat("--images", input.images),
        generated=lambda wildcards, input: repeat("--generated", input.generated),
        optional=lambda wildcards, input: options(input, TEACHER_REPORTS | AUGMENT_REPORTS),
    message:
        "Writing the report"
    shell:
        "python -m meddiff_steps report --config {params.config} --cohort-card {input.cohort_card} --qc {input.qc} --manifest {input.manifest} "
        "{params.images} {params.generated} --plan {input.plan} --autoencoder-card {input.autoencoder_card} "
        "--autoencoder-history {input.autoencoder_history} --diffusion-card {input.diffusion_card} --diffusion-history {input.diffusion_history} "
        "--reconstructions {input.reconstructions} --showcase {input.showcase} --metrics {input.metrics} --predictions {input.predictions} --components {input.components} "
        "--privacy {input.privacy} {params.optional} --out {output.page} --contact-sheet {output.contact_sheet} 2>&1 | tee {log}"
