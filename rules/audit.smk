rule audit:
    input:
        root=LEDGER,
        private=PRIVATE_LEDGER,
        models=[*AUTOENCODER, *DECODER, *RELEASED_MODEL, REFERENCE, REFERENCE_SCANS],
    output:
        touch(f"{RESULTS}/audit/passed"),
    log:
        text=f"{RESULTS}/logs/audit.log",
        # Logs stay when a job fails, as this one does when something is found.
        json=f"{RESULTS}/audit/audit.json",
        html=f"{RESULTS}/audit/audit.html",
    benchmark:
        f"{RESULTS}/benchmarks/audit.tsv"
    conda:
        "../envs/meddiff.yaml"
    threads: 8
    resources:
        mem_mb=memory(4000, DRAWING_AND_DETECTING),
        runtime=minutes(240),
        gpu=min(GPUS, 1),
    params:
        release=lambda wildcards, input: str(Path(input.root).parents[1]),
        results=lambda wildcards, input: str(Path(input.private).parents[1]),
        code=code_digest("audit"),
    message:
        f"Auditing the release; the report is {RESULTS}/audit/audit.html"
    shell:
        "python -m meddiff_steps audit {params.release:q} --private {input.private:q} --models {params.results:q} "
        "--results {params.results:q} --json {log.json:q} --html {log.html:q} --threads {threads} 2>&1 "
        "| tee {log.text:q}"
