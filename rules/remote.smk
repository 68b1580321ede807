# Between this folder and S3 (docs/cluster.md): the cohort comes from there, the sealed release goes there.
if STUDY.storage.cohort:

    rule fetch:
        input:
            storage.s3(STUDY.storage.cohort),
        output:
            touch(FETCHED),
        log:
            f"{RESULTS}/logs/fetch.log",
        benchmark:
            f"{RESULTS}/benchmarks/fetch.tsv"
        localrule: True
        conda:
            "../envs/meddiff.yaml"
        threads: 1
        resources:
            mem_mb=memory(1000),
            runtime=minutes(720),
        params:
            root=STUDY.cohort.root,
        message:
            f"Fetching the cohort from {STUDY.storage.cohort}"
        shell:
            "(mkdir -p {params.root:q} && cp -r {input:q}/. {params.root:q}) 2>&1 | tee {log:q}"


if STUDY.storage.publish:

    rule publish:
        input:
            LEDGER,
        output:
            storage.s3(directory(STUDY.storage.publish)),
        log:
            f"{RESULTS}/logs/publish.log",
        benchmark:
            f"{RESULTS}/benchmarks/publish.tsv"
        localrule: True
        conda:
            "../envs/meddiff.yaml"
        threads: 1
        resources:
            mem_mb=memory(1000),
            runtime=minutes(720),
        params:
            release=RELEASE_ROOT,
        message:
            f"Publishing the release to {STUDY.storage.publish}"
        shell:
            "(mkdir -p {output:q} && cp -r {params.release:q}/. {output:q}) 2>&1 | tee {log:q}"

else:

    rule publish:
        input:
            nowhere_to_publish,
        localrule: True
