#!/usr/bin/env bash
# A real job of several processes on this machine, over loopback: a pod in small.
#
#   bash launch/local_pod.sh --processes=4 --devices=2 --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...]
#
# --dry_run prints what would run; --help names all flags. Run it again to resume the job from its checkpoint.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

exec "$(job_python)" "$ROOT/launch/jobs.py" local_pod "$@"
