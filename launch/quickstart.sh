#!/usr/bin/env bash
# From a fresh checkout to a trained model: makes an environment, installs mmjax, builds the data
# and trains. Run again, it resumes from the checkpoint; what is set up is not set up twice.
#
#   bash launch/quickstart.sh [--setup_only] [flags of mmjax train, e.g. --config.steps=100]
#
#   --setup_only   stop when the environment and the data are ready
#   PYTHON         the interpreter to use, else python3, else the newest suitable one
#   MMJAX_VENV     where the environment lies, else .venv in the checkout
#
# Paths among the flags are read from the root of the checkout.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

setup_only=
flags=()
for argument in "$@"; do
  case $argument in
    -h | --help)
      sed -n '2,/^set -/{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
      exit
      ;;
    --setup_only) setup_only=1 ;;
    *) flags+=("$argument") ;;
  esac
done

venv=$(absolute "${MMJAX_VENV:-$ROOT/.venv}")
ensure_environment "$venv" data

cd "$ROOT"
start=$SECONDS
"$venv/bin/python" -m mmjax build quickstart || fail "the data could not be built; the reason stands above."
log_line "data: ready ($(seconds_since "$start"))"

if [ -n "$setup_only" ]; then exit; fi
# bash before 4.4 calls an empty array unset.
exec "$venv/bin/python" -m mmjax train --config=configs/quickstart.py --workdir=runs/quickstart \
  ${flags[@]+"${flags[@]}"}
