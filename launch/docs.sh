#!/usr/bin/env bash
# Builds the manual of docs/ and mkdocs.yml into site/, in strict mode and without the network.
#
#   bash launch/docs.sh          makes an environment if there is none, and builds
#
#   PYTHON            the interpreter to use, else python3, else the newest suitable one
#   MMJAX_DOCS_VENV   where the environment lies, else .venv-docs in the checkout
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help_if_asked "$@"

venv=$(absolute "${MMJAX_DOCS_VENV:-$ROOT/.venv-docs}")
ensure_environment "$venv" docs
build_docs "$venv"
log_line "manual: $ROOT/site/index.html"
