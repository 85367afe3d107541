#!/usr/bin/env bash
# The job on GPU nodes of a Slurm cluster; it is queued again when its time is over.
#
#   bash launch/slurm.sh --name=NAME --nodes=4 --gpus=8 --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...]
#
# --dry_run prints what would run; --help names all flags. Run it again to resume the job from its checkpoint.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

exec "$(job_python)" "$ROOT/launch/jobs.py" slurm "$@"
