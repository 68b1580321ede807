# Four jobs that take a GPU for some seconds and fail if somebody holds it, and one that must have none.
rule all:
    input:
        expand("gpu-{number}", number=range(4)),
        "cpu",
    localrule: True


rule gpu:
    output:
        "gpu-{number}",
    resources:
        gpu=1,
    shell:
        "mkdir held-$CUDA_VISIBLE_DEVICES; sleep 4; rmdir held-$CUDA_VISIBLE_DEVICES; echo $CUDA_VISIBLE_DEVICES > {output}"


rule cpu:
    output:
        "cpu",
    shell:
        "echo ${{CUDA_VISIBLE_DEVICES-none}} > {output}"
