#!/usr/bin/env bash
# Builds the wheel of a release into dist/, after checking that version, changelog and tag agree.
#
#   bash launch/release.sh [TAG]    TAG is vVERSION; the tag of a workflow (GITHUB_REF_NAME) if none is given
#
#   PYTHON       the interpreter to use, else python3, else the newest suitable one
#   MMJAX_VENV   where the environment lies, else .venv in the checkout
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help_if_asked "$@"

tag=${1:-${GITHUB_REF_NAME:-}}
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$ROOT/mmjax/__init__.py")
[ "$tag" = "v$version" ] || fail "the tag is '$tag', and mmjax/__init__.py has version $version. Tag v$version."
grep -q "^## \[$version\] - [0-9]" "$ROOT/CHANGELOG.md" ||
  fail "CHANGELOG.md has no dated section for $version. Add '## [$version] - YYYY-MM-DD'."

venv=$(absolute "${MMJAX_VENV:-$ROOT/.venv}")
ensure_environment "$venv" data
"$venv/bin/python" -m pip wheel -q --disable-pip-version-check --no-deps --wheel-dir "$ROOT/dist" "$ROOT" ||
  fail "the wheel could not be built; the reason stands above."
log_line "release: $(ls "$ROOT"/dist/mmjax-"$version"-*.whl)"
