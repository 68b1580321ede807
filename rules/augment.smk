# The augmentation study. With augment.target unset there is none of this. Only `augment_test` is given the test split.
if STUDY.augment.target:
    AUGMENT_JOBS = range(STUDY.augment.jobs)
    # What only some arms add to real scans.
    AUGMENT_SOURCES = ({"generated": expand(GENERATED, shard=PLAN_SHARDS)} if "generated" in STUDY.augment.sources else {}) | (
        AUTOENCODER_FILES if "reconstruction" in STUDY.augment.sources else {}
    )
    # Further generator seeds, and the kinds of their images that arms learn from.
    GENERATORS = range(1, STUDY.augment.generator_seeds)
    AUGMENT_SOURCES |= {
        f"more_{kind}": expand(GENERATOR_FILES[kind], generator=GENERATORS, shard=PLAN_SHARDS)
        for kind in ("filtered", "generated")
        if GENERATORS and kind in STUDY.augment.sources
    }

    rule augment_design:
        input:
            manifest=MANIFEST,
            plan=PLAN,
        output:
            DESIGN,
        log:
            f"{RESULTS}/logs/augment/design.log",
        benchmark:
            f"{RESULTS}/benchmarks/augment/design.tsv"
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
            config=settings("augment_design"),
            code=code_digest("augment_design"),
        message:
            "Freezing the design of the augmentation study"
        shell:
            "python -m meddiff_steps augment_design --config {params.config} --manifest {input.manifest} --plan {input.plan} --out {output} 2>&1 | tee {log}"

    rule augment_data:
        input:
            **AUGMENT_SOURCES,
            design=DESIGN,
            manifest=MANIFEST,
            images=COHORT_IMAGES,
            plan=PLAN,
            filtered=expand(FILTERED, shard=PLAN_SHARDS),
        output:
            samples=SAMPLES,
            images=REDUCED,
        log:
            f"{RESULTS}/logs/augment/data.log",
        benchmark:
            f"{RESULTS}/benchmarks/augment/data.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 8
        resources:
            mem_mb=memory(3000),
            runtime=minutes(240),
        params:
            config=settings("augment_data"),
            code=code_digest("augment_data"),
            shards=lambda wildcards, input: " ".join(
                repeat(f"--{name.replace('_', '-')}", input[name])
                for name in ("images", "filtered", "generated", "more_filtered", "more_generated")
                if name in input.keys()
            ),
            models=lambda wildcards, input: options(input, [name for name in AUTOENCODER_FILES if name in input.keys()]),
        message:
            "Gathering what the classifiers learn from"
        shell:
            "python -m meddiff_steps augment_data --config {params.config} --design {input.design} --manifest {input.manifest} --plan {input.plan} "
            "{params.shards} {params.models} --samples {output.samples} --out {output.images} --threads {threads} 2>&1 | tee {log}"

    rule augment_train:
        input:
            design=DESIGN,
            samples=SAMPLES,
            images=REDUCED,
        output:
            weights=CLASSIFIERS,
            validation=VALIDATION,
        log:
            f"{RESULTS}/logs/augment/train/{{job}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/augment/train/{{job}}.tsv"
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
            config=settings("augment"),
            code=code_digest("augment"),
        message:
            "Training classifiers, part {wildcards.job}"
        shell:
            "python -m meddiff_steps augment --config {params.config} --design {input.design} --samples {input.samples} --images {input.images} "
            "--job {wildcards.job} --weights {output.weights} --validation {output.validation} --threads {threads} 2>&1 | tee {log}"

    rule augment_test:
        input:
            design=DESIGN,
            samples=SAMPLES,
            reduced=REDUCED,
            weights=expand(CLASSIFIERS, job=AUGMENT_JOBS),
            validation=expand(VALIDATION, job=AUGMENT_JOBS),
            manifest=MANIFEST,
            images=COHORT_IMAGES,
        output:
            opened=AUGMENT_REPORTS["opened"],
            predictions=AUGMENT_PREDICTIONS,
            results=report(AUGMENT_REPORTS["augmentation"], caption="../workflow/report/augmentation.rst", category="Figures"),
        log:
            f"{RESULTS}/logs/augment/test.log",
        benchmark:
            f"{RESULTS}/benchmarks/augment/test.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 8
        resources:
            mem_mb=memory(3000, 100, 64),
            runtime=minutes(240),
        params:
            config=settings("augment_test"),
            code=code_digest("augment_test"),
            files=lambda wildcards, input: " ".join(repeat(f"--{name}", input[name]) for name in ("weights", "validation", "images")),
            ledger=OPENINGS,
        message:
            "Opening the test split, once"
        shell:
            "python -m meddiff_steps augment_test --config {params.config} --design {input.design} --samples {input.samples} --reduced {input.reduced} "
            "--manifest {input.manifest} {params.files} --ledger {params.ledger} --opened {output.opened} --predictions {output.predictions} "
            "--out {output.results} --threads {threads} 2>&1 | tee {log}"


# With augment.generator_seeds above 1: the subjects that arms need, drawn anew. The rules are those of the released cohort with other files.
if STUDY.augment.target and STUDY.augment.generator_seeds > 1:
    GENERATOR_MODEL = {name: GENERATOR_FILES[name] for name in DIFFUSION_FILES} if STUDY.augment.retrain else DIFFUSION_FILES

    rule augment_plan:
        input:
            design=DESIGN,
            manifest=MANIFEST,
            plan=PLAN,
        output:
            GENERATOR_FILES["plan"],
        log:
            f"{RESULTS}/logs/augment/plan/{{generator}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/augment/plan/{{generator}}.tsv"
        localrule: True
        conda:
            "../envs/meddiff.yaml"
        threads: 1
        resources:
            mem_mb=memory(1500),
            runtime=minutes(30),
        params:
            config=settings("augment_plan"),
            code=code_digest("augment_plan"),
        message:
            "Choosing the subjects of generator seed {wildcards.generator}"
        shell:
            "python -m meddiff_steps augment_plan --config {params.config} --design {input.design} --manifest {input.manifest} --plan {input.plan} "
            "--generator {wildcards.generator} --out {output} 2>&1 | tee {log}"

    use rule generate as augment_generate with:
        input:
            **AUTOENCODER_FILES,
            **GENERATOR_MODEL,
            plan=GENERATOR_FILES["plan"],
        output:
            GENERATOR_FILES["generated"],
        log:
            f"{RESULTS}/logs/augment/generate/{{generator}}-{{shard}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/augment/generate/{{generator}}-{{shard}}.tsv"
        params:
            config=settings("generate"),
            code=code_digest("generate"),
            models=lambda wildcards, input: options(input, AUTOENCODER_FILES | DIFFUSION_FILES),
        message:
            "Generating shard {wildcards.shard} of generator seed {wildcards.generator}"

    use rule filter as augment_filter with:
        input:
            **DETECTOR_FILES,
            **GENERATOR_MODEL,
            plan=GENERATOR_FILES["plan"],
            generated=GENERATOR_FILES["generated"],
            reference=REFERENCE,
            calibration=CALIBRATION,
        output:
            images=GENERATOR_FILES["filtered"],
            decisions=GENERATOR_FILES["decisions"],
        log:
            f"{RESULTS}/logs/augment/filter/{{generator}}-{{shard}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/augment/filter/{{generator}}-{{shard}}.tsv"
        message:
            "Filtering shard {wildcards.shard} of generator seed {wildcards.generator}"

    if STUDY.augment.retrain:
        # Of what the released model learnt from.
        GENERATOR_SETTINGS = {
            str(number): settings("diffusion", STUDY.model_copy(update={"seed": f"{STUDY.seed}/generator/{number}"})) for number in GENERATORS
        }

        use rule diffusion as augment_diffusion with:
            input:
                manifest=DISTILLED_MANIFEST if STUDY.distill.subjects else MANIFEST,
                latents=expand(DISTILLED_LATENTS, shard=TEACHER_SHARDS) if STUDY.distill.subjects else expand(LATENTS, shard=COHORT_SHARDS),
                scale=DISTILLED_SCALE if STUDY.distill.subjects else LATENT_SCALE,
            output:
                weights=GENERATOR_FILES["diffusion"],
                card=GENERATOR_FILES["diffusion_card"],
                history=GENERATOR_FILES["history"],
            log:
                f"{RESULTS}/logs/augment/diffusion/{{generator}}.log",
            benchmark:
                f"{RESULTS}/benchmarks/augment/diffusion/{{generator}}.tsv"
            params:
                config=lambda wildcards: GENERATOR_SETTINGS[wildcards.generator],
                code=code_digest("diffusion"),
                latents=lambda wildcards, input: repeat("--latents", input.latents),
                state=lambda wildcards: f"{STATE}/augmentation/generator-{wildcards.generator}",
            message:
                "Training the diffusion model of generator seed {wildcards.generator}"
