#!/usr/bin/env bash
# The job on a Cloud TPU slice: asks for the slice, runs on all its workers, asks again after a preemption.
#
#   bash launch/tpu.sh --name=NAME --zone=ZONE --accelerator=v5litepod-16 --runtime=v2-alpha-tpuv5-lite \
#     --config=configs/NAME.py --workdir=gs://BUCKET/RUN [--spot] [--project=P] [--config.KEY=VALUE ...]
#
# --dry_run prints what would run; --help names all flags. Run it again to resume the job from its checkpoint.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

exec "$(job_python)" "$ROOT/launch/jobs.py" tpu "$@"
