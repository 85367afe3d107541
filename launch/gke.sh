#!/usr/bin/env bash
# The job on TPU slices of a GKE cluster, as a JobSet.
#
#   bash launch/gke.sh --name=NAME --image=IMAGE --topology=v5e:4x4 [--slices=N] \
#     --config=configs/NAME.py --workdir=gs://BUCKET/RUN [--config.KEY=VALUE ...]
#
# --dry_run prints what would run; --help names all flags. Run it again to resume the job from its checkpoint.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

exec "$(job_python)" "$ROOT/launch/jobs.py" gke "$@"
