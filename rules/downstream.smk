# The downstream study. With downstream.target unset there is none of this. Only `downstream_test` is given the test
# split.
if STUDY.downstream.target:
    DESIGN = f"{DOWNSTREAM}/design.json"
    SAMPLES = f"{DOWNSTREAM}/samples.parquet"
    REDUCED = f"{DOWNSTREAM}/images.arrow"
    CLASSIFIERS = f"{DOWNSTREAM}/classifiers/{{job}}.safetensors"
    VALIDATION = f"{DOWNSTREAM}/classifiers/{{job}}.parquet"
    DOWNSTREAM_JOBS = range(STUDY.downstream.jobs)
    # Further generator seeds: the subjects that arms need, drawn anew.
    SEEDS = range(1, STUDY.downstream.generator_seeds)
    GENERATOR = {
        name: f"{DOWNSTREAM}/generator-{{generator}}/{file}"
        for name, file in (
            ("plan", "plan.parquet"),
            ("generated", "generated/shard-{shard}.arrow"),
            ("filtered", "filtered/shard-{shard}.arrow"),
            ("decisions", "decisions/shard-{shard}.parquet"),
            ("diffusion", "diffusion"),
        )
    }
    # What only some arms add to real scans.
    DOWNSTREAM_SOURCES = (
        {"generated": expand(GENERATED, shard=PLAN_SHARDS)} if "generated" in STUDY.downstream.sources else {}
    ) | ({"autoencoder": AUTOENCODER} if "reconstruction" in STUDY.downstream.sources else {})
    DOWNSTREAM_SOURCES |= {
        f"more_{kind}": expand(GENERATOR[kind], generator=SEEDS, shard=PLAN_SHARDS)
        for kind in ("filtered", "generated")
        if SEEDS and kind in STUDY.downstream.sources
    }

    # What the classifiers are tested on beside scans.
    DOWNSTREAM_TESTED_ON = (
        {"plan": PLAN, "filtered": expand(FILTERED, shard=PLAN_SHARDS)} if STUDY.downstream.stress.groups else {}
    )

    rule downstream_design:
        input:
            manifest=MANIFEST,
            plan=PLAN,
        output:
            out=DESIGN,
        log:
            f"{RESULTS}/logs/downstream/design.log",
        benchmark:
            f"{RESULTS}/benchmarks/downstream/design.tsv"
        # Far ahead of the trainings: a plan that is too small is refused while nothing is lost.
        priority: 100
        localrule: True
        conda:
            "../envs/meddiff.yaml"
        threads: 1
        resources:
            mem_mb=memory(1500),
            runtime=minutes(30),
        params:
            **run_step("downstream_design"),
        message:
            "Freezing the design of the downstream study"
        shell:
            STEP

    rule downstream_data:
        input:
            **DOWNSTREAM_SOURCES,
            design=DESIGN,
            manifest=MANIFEST,
            images=COHORT_IMAGES,
            plan=PLAN,
            filtered=expand(FILTERED, shard=PLAN_SHARDS),
        output:
            samples=SAMPLES,
            out=REDUCED,
        log:
            f"{RESULTS}/logs/downstream/data.log",
        benchmark:
            f"{RESULTS}/benchmarks/downstream/data.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 8
        resources:
            mem_mb=memory(3000),
            runtime=minutes(240),
        params:
            **run_step("downstream_data"),
        message:
            "Gathering what the classifiers learn from"
        shell:
            STEP_WITH_THREADS

    rule downstream_train:
        input:
            design=DESIGN,
            samples=SAMPLES,
            images=REDUCED,
        output:
            weights=CLASSIFIERS,
            validation=VALIDATION,
        log:
            f"{RESULTS}/logs/downstream/train/{{job}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/downstream/train/{{job}}.tsv"
        wildcard_constraints:
            job=r"\d+",
        conda:
            "../envs/meddiff.yaml"
        threads: 8
        resources:
            mem_mb=memory(3000, 600, 8),
            runtime=minutes(720),
            gpu=min(GPUS, 1),
        params:
            **run_step("downstream_train", job=lambda wildcards: wildcards.job),
        message:
            "Training classifiers, part {wildcards.job}"
        shell:
            STEP_WITH_THREADS

    rule downstream_test:
        input:
            **DOWNSTREAM_TESTED_ON,
            design=DESIGN,
            samples=SAMPLES,
            reduced=REDUCED,
            weights=expand(CLASSIFIERS, job=DOWNSTREAM_JOBS),
            validation=expand(VALIDATION, job=DOWNSTREAM_JOBS),
            manifest=MANIFEST,
            images=COHORT_IMAGES,
        output:
            opened=DOWNSTREAM_RESULTS[1],
            predictions=f"{DOWNSTREAM}/predictions.parquet",
            out=report(DOWNSTREAM_RESULTS[0], caption="../workflow/report/downstream.rst", category="Figures"),
        log:
            f"{RESULTS}/logs/downstream/test.log",
        benchmark:
            f"{RESULTS}/benchmarks/downstream/test.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 8
        resources:
            mem_mb=memory(3000, 100, 64),
            runtime=minutes(240),
        params:
            **run_step("downstream_test", ledger=f"{STATE}/augmentation/openings.jsonl"),
        message:
            "Opening the test split, once"
        shell:
            STEP_WITH_THREADS


# With downstream.neighbours.
if STUDY.downstream.target and STUDY.downstream.neighbours.count:

    rule downstream_neighbours:
        input:
            weights=expand(CLASSIFIERS, job=DOWNSTREAM_JOBS),
            reduced=REDUCED,
            predictions=f"{DOWNSTREAM}/predictions.parquet",
            opened=DOWNSTREAM_RESULTS[1],
            manifest=MANIFEST,
            images=COHORT_IMAGES,
            autoencoder=AUTOENCODER,
            diffusion=DIFFUSION,
        output:
            out=DOWNSTREAM_RESULTS[2],
        log:
            f"{RESULTS}/logs/downstream/neighbours.log",
        benchmark:
            f"{RESULTS}/benchmarks/downstream/neighbours.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 8
        resources:
            mem_mb=memory(3000, 600, 4 * STUDY.downstream.neighbours.count),
            runtime=minutes(480),
            gpu=min(GPUS, 1),
        params:
            **run_step("downstream_neighbours"),
        message:
            "Drawing neighbours of test scans"
        shell:
            STEP_WITH_THREADS


# With downstream.generator_seeds above 1. The rules are those of the released cohort with other files.
if STUDY.downstream.target and STUDY.downstream.generator_seeds > 1:
    GENERATOR_MODEL = generator(GENERATOR["diffusion"]) if STUDY.downstream.retrain else RELEASED_MODEL

    rule downstream_plan:
        input:
            design=DESIGN,
            manifest=MANIFEST,
            plan=PLAN,
        output:
            out=GENERATOR["plan"],
        log:
            f"{RESULTS}/logs/downstream/plan/{{generator}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/downstream/plan/{{generator}}.tsv"
        localrule: True
        conda:
            "../envs/meddiff.yaml"
        threads: 1
        resources:
            mem_mb=memory(1500),
            runtime=minutes(30),
        params:
            **run_step("downstream_plan", generator=lambda wildcards: wildcards.generator),
        message:
            "Choosing the subjects of generator seed {wildcards.generator}"
        shell:
            STEP

    use rule generate as downstream_generate with:
        input:
            plan=GENERATOR["plan"],
            autoencoder=AUTOENCODER,
            decoder=DECODER,
            diffusion=GENERATOR_MODEL,
        output:
            out=GENERATOR["generated"],
        log:
            f"{RESULTS}/logs/downstream/generate/{{generator}}-{{shard}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/downstream/generate/{{generator}}-{{shard}}.tsv"
        message:
            "Generating shard {wildcards.shard} of generator seed {wildcards.generator}"

    use rule filter as downstream_filter with:
        input:
            plan=GENERATOR["plan"],
            generated=GENERATOR["generated"],
            autoencoder=AUTOENCODER,
            scale=LATENT_SCALE,
            embedder=EMBEDDER,
            decoder=DECODER,
            diffusion=GENERATOR_MODEL,
            reference=REFERENCE,
            reference_scans=REFERENCE_SCANS,
            calibration=CALIBRATION,
        output:
            out=GENERATOR["filtered"],
            decisions=GENERATOR["decisions"],
        log:
            f"{RESULTS}/logs/downstream/filter/{{generator}}-{{shard}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/downstream/filter/{{generator}}-{{shard}}.tsv"
        message:
            "Filtering shard {wildcards.shard} of generator seed {wildcards.generator}"

    if STUDY.downstream.retrain:
        # Of what the released model learnt from.
        SEED_STUDIES = {
            str(number): STUDY.model_copy(update={"seed": f"{STUDY.seed}/generator/{number}"}) for number in SEEDS
        }
        SEED_SETTINGS = {number: settings("diffusion", study) for number, study in SEED_STUDIES.items()}
        LEARNT_FROM = rules.second_diffusion.input if STUDY.second_model.subjects else rules.diffusion.input

        use rule diffusion as downstream_diffusion with:
            input:
                manifest=LEARNT_FROM.manifest,
                latents=LEARNT_FROM.latents,
                scale=LEARNT_FROM.scale,
            output:
                out=[*network(GENERATOR["diffusion"]), f"{GENERATOR['diffusion']}/history.parquet"],
            log:
                f"{RESULTS}/logs/downstream/diffusion/{{generator}}.log",
            benchmark:
                f"{RESULTS}/benchmarks/downstream/diffusion/{{generator}}.tsv"
            params:
                **run_step(
                    "diffusion", state=lambda wildcards: f"{STATE}/augmentation/generator-{wildcards.generator}"
                )
                | {"config": lambda wildcards: SEED_SETTINGS[wildcards.generator]},
            message:
                "Training the diffusion model of generator seed {wildcards.generator}"

        TONED_BY = rules.second_tone.input if STUDY.second_model.subjects else rules.tone.input

        use rule tone as downstream_tone with:
            input:
                manifest=TONED_BY.manifest,
                images=TONED_BY.images,
                autoencoder=AUTOENCODER,
                decoder=DECODER,
                diffusion=GENERATOR_MODEL[:2],
            output:
                out=GENERATOR_MODEL[2:],
            log:
                f"{RESULTS}/logs/downstream/tone/{{generator}}.log",
            benchmark:
                f"{RESULTS}/benchmarks/downstream/tone/{{generator}}.tsv"
