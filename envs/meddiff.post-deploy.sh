# Fills the environment of meddiff.yaml: the lock, and the package of this checkout. Snakemake runs it (rules/common.smk says
# where the checkout is); by hand run it at the root of the repository.
set -euo pipefail
cd "${MEDDIFF_WORKFLOW:-.}"
pip install --no-cache-dir $(grep '^torch==' envs/requirements.lock)
pip install --no-cache-dir --no-deps -r envs/requirements.lock
pip install --no-cache-dir --no-deps --editable .
