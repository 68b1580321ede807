# snakemake translation --configfile config/studies/lgg_translation.yaml: another contrast of real scans, drawn from
# those that there are, as a BIDS derivative (docs/applications/translation.md).


rule translation_model:
    input:
        manifest=manifest_of_scans_to_translate,
        images=COHORT_IMAGES,
    output:
        out=TRANSLATION_MODEL,
        lesion=TRANSLATION_LESION,
        back=TRANSLATION_BACK if STUDY.translation.cycle else [],
        volume=TRANSLATION_VOLUME,
        solid=TRANSLATION_SOLID,
    log:
        f"{RESULTS}/logs/translation_model.log",
    benchmark:
        f"{RESULTS}/benchmarks/translation_model.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(3000, 2400, STUDY.translation.optimiser.batch_size),
        runtime=2880,
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
        out=TRANSLATION_UNPAIRED,
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
        runtime=2880,
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
        model=TRANSLATION_MODEL[:-1],
        lesion=TRANSLATION_LESION,
        volume=TRANSLATION_VOLUME,
        solid=TRANSLATION_SOLID,
        unpaired=TRANSLATION_UNPAIRED[:-1] if STUDY.translation.unpaired else [],
    output:
        out=derivative("translation"),
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
