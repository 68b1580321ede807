# snakemake regenerate --config sealed=FOLDER models=FOLDER [count=NUMBER [group=NAME]]: a released cohort made again,
# shard by shard, and compared; or one group of it with more subjects.
if SEALED:
    # Beside the first two whatever is there; which of them draw, the ledger says by their digests.
    MODELS = [f"{SEALED_MODELS}/{model}/model.safetensors" for model in ("autoencoder", "diffusion")]
    for folder in "decoder diffusion few_step second_model/diffusion masks/autoencoder masks/diffusion".split():
        MODELS += [str(file) for file in Path(SEALED_MODELS, folder).glob("*.safetensors") if str(file) not in MODELS]

    rule regenerate_shard:
        input:
            root=f"{SEALED}/provenance/root.json",
            models=sorted(MODELS),
        output:
            REGENERATED_SHARD,
        log:
            f"{RESULTS}/logs/regenerate/{{shard}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/regenerate/{{shard}}.tsv"
        conda:
            "../envs/meddiff.yaml"
        threads: 8
        resources:
            mem_mb=memory(2500, 600, STUDY.generate.batch_size),
            runtime=minutes(240),
            gpu=min(GPUS, 1),
        params:
            release=SEALED,
            models=SEALED_MODELS,
            out=f"{RESULTS}/release",
            more=more_subjects(),
            code=code_digest("regenerate", STUDY.model_dump(mode="json")),
        message:
            "Making shard {wildcards.shard} of a release again"
        # Images that differ (exit code 1) are counted when all shards are there.
        shell:
            "(python -m meddiff_steps regenerate {params.release:q} --models {params.models:q} "
            "--shard {wildcards.shard} {params.more:q} --out {params.out:q} --json {output:q} --threads {threads} "
            "|| [ $? -eq 1 ]) 2>&1 | tee {log:q}"


rule regenerate:
    input:
        shards=made_again,
    output:
        touch(f"{RESULTS}/same"),
    log:
        text=f"{RESULTS}/logs/regenerated.log",
        json=f"{RESULTS}/comparison.json",  # a log stays when the job fails, as this one does when an image differs
    benchmark:
        f"{RESULTS}/benchmarks/regenerated.tsv"
    localrule: True
    conda:
        "../envs/meddiff.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500),
        runtime=minutes(10),
    params:
        shards=lambda wildcards, input: [f"--shard={path}" for path in input.shards],
        code=code_digest("regenerated"),
    message:
        f"Comparing what was made again with the release; the images are in {RESULTS}/release"
    shell:
        "python -m meddiff_steps regenerated {params.shards:q} --out {log.json:q} 2>&1 | tee {log.text:q}"
