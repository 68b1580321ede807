"""Submit, look at and cancel Kubernetes jobs for Snakemake's executor `cluster-generic`; needs `kubectl` and Python
alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

#: Runs a script as the first process of a container. Kubernetes sends SIGTERM to that one alone, and a shell does not
#: hand it on: here all others get it, and are waited for, so that a training saves its state.
FIRST = """trap 'stopped=1; kill -TERM -1' TERM
/bin/sh "$0" & script=$!
wait $script; code=$?
if [ "$stopped" ]; then wait $script; code=$?; while kill -0 -1; do sleep 1; done 2>/dev/null; fi
exit $code"""


def kubectl(namespace: str, *arguments: str, text: str | None = None) -> str:
    """Output of a kubectl command; the program ends with kubectl's own message if that fails."""
    done = subprocess.run(
        ["kubectl", "--namespace", namespace, *arguments], input=text, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def manifest(script: Path, image: str, claim: str, mount: str) -> dict[str, Any]:
    """The Kubernetes job that runs one of Snakemake's job scripts in this folder, on the shared volume.

    Memory is request and limit: a job that needs more is killed, and Snakemake's next attempt asks for more.
    """
    found = re.search(r"^# properties = (.*)$", script.read_text(encoding="utf-8"), re.M)
    if found is None:
        sys.exit(f"{script}: no line `# properties = ...`; expected a job script of Snakemake.")
    job = json.loads(found[1])
    asked = job.get("resources", {})
    limits = {"memory": f"{asked.get('mem_mb', 2000)}Mi"}
    if asked.get("gpu", 0):
        limits["nvidia.com/gpu"] = str(asked["gpu"])
    container = {
        "name": "step",
        "image": image,
        "command": ["/bin/sh", "-c", FIRST, str(script.resolve())],
        "workingDir": str(Path.cwd()),
        "env": [{"name": name, "value": os.environ[name]} for name in ("MEDDIFF_STUDY",) if name in os.environ],
        "resources": {"requests": limits | {"cpu": str(job.get("threads", 1))}, "limits": limits},
        "volumeMounts": [{"name": "shared", "mountPath": mount}, {"name": "memory", "mountPath": "/dev/shm"}],
    }
    volumes = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
    ]
    pod = {
        "restartPolicy": "Never",
        # Of the pod, whose time begins on a node; that of the job would count the time in the queue, too.
        "activeDeadlineSeconds": 60 * int(asked.get("runtime", 30)),
        "terminationGracePeriodSeconds": 300,
        "containers": [container],
        "volumes": volumes,
    }
    name = re.sub(r"[^a-z0-9]+", "-", str(job.get("rule", "group")).lower())
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"meddiff-{name}-{uuid.uuid4().hex[:10]}", "labels": {"app": "meddiff", "rule": name}},
        # Snakemake tries again, with more memory and time; Kubernetes must not.
        "spec": {"backoffLimit": 0, "template": {"spec": pod}},
    }


def status(namespace: str, name: str) -> str:
    """`success`, `failed` or `running`, the three words that Snakemake understands; a job that is gone has failed.

    Where the cluster does not answer, the job is taken to be running still: Snakemake asks again.
    """
    try:
        found = kubectl(namespace, "get", "job", name, "--ignore-not-found", "--output=json")
    except SystemExit as silence:
        print(silence, file=sys.stderr)
        return "running"
    conditions = (
        json.loads(found).get("status", {}).get("conditions", [])
        if found.strip()
        else [{"type": "Failed", "status": "True"}]
    )
    true = {condition["type"] for condition in conditions if condition["status"] == "True"}
    return "success" if "Complete" in true else "failed" if "Failed" in true else "running"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    for action in ("submit", "status", "cancel"):
        options = actions.add_parser(action)
        options.add_argument("--namespace", required=True)
        if action == "submit":
            for name in ("--image", "--claim", "--mount"):
                options.add_argument(name, required=True)
        options.add_argument("what", nargs="+", help="job script, or names of jobs")
    given = parser.parse_args()
    if given.action == "submit":
        job = manifest(Path(given.what[-1]), given.image, given.claim, given.mount)
        kubectl(given.namespace, "create", "--filename=-", text=json.dumps(job))
        print(job["metadata"]["name"])
    elif given.action == "status":
        print(status(given.namespace, given.what[-1]))
    else:
        kubectl(given.namespace, "delete", "job", "--ignore-not-found", "--wait=false", *given.what)


if __name__ == "__main__":
    main()
