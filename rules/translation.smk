# snakemake translation --configfile config/studies/lgg_translation.yaml: another contrast of real scans, drawn from
# those that there are, as a BIDS derivative (docs/applications/translation.md).


rule translation_model:
    input:
        manifest=manifest_of_scans_to_translate,
        images=COHORT_IMAGES,
    output:
        out=[f"{RESULTS}/translation_model/{name}" for name in study_files.IMAGE_TO_IMAGE],
        lesion=network(f"{RESULTS}/translation_lesion") if STUDY.translation.lesion else [],
    log:
        f"{RESULTS}/logs/translation_model.log",
    benchmark:
        f"{RESULTS}/benchmarks/translation_model.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(3000, 2400, STUDY.translation.optimiser.batch_size),
        runtime=minutes(2880),
        gpu=GPUS,
        nodes=1,  # a process per GPU, all started by one command
    params:
        **run_step("translation_model", state=f"{STATE}/translation_model"),
    message:
        "Training what draws another contrast"
    shell:
        STEP_WITH_THREADS


rule translation_unpaired:
    input:
        manifest=manifest_of_scans_to_translate,
        images=COHORT_IMAGES,
    output:
        out=[f"{RESULTS}/translation_unpaired/{name}" for name in (*NETWORK, "history.parquet")],
    log:
        f"{RESULTS}/logs/translation_unpaired.log",
    benchmark:
        f"{RESULTS}/benchmarks/translation_unpaired.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(
            3000, 4800, getattr(STUDY.translation.unpaired, "optimiser", STUDY.translation.optimiser).batch_size
        ),
        runtime=minutes(2880),
        gpu=min(GPUS, 1),
    params:
        **run_step("translation_unpaired", state=f"{STATE}/translation_unpaired"),
    message:
        "Training what draws another contrast, without pairs"
    shell:
        STEP_WITH_THREADS


rule translation:
    input:
        manifest=MANIFEST,
        qc=QC,
        images=COHORT_IMAGES,
        model=rules.translation_model.output.out[:-1],
        lesion=rules.translation_model.output.lesion,
        unpaired=rules.translation_unpaired.output.out[:-1] if STUDY.translation.unpaired else [],
    output:
        out=[
            f"{RESULTS}/translation/{name}"
            for name in ("dataset_description.json", "figures.json", "measurements.parquet", "contact-sheet.png")
        ],
    log:
        f"{RESULTS}/logs/translation.log",
    benchmark:
        f"{RESULTS}/benchmarks/translation.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(3000, 2400, STUDY.translation.samples),
        runtime=minutes(240),
        gpu=min(GPUS, 1),
    params:
        **run_step("translation"),
    message:
        "Drawing another contrast"
    shell:
        STEP_WITH_THREADS
