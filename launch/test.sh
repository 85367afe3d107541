#!/usr/bin/env bash
# Sets up what the tests need and runs everything: style, types, shell scripts, the manual, a smoke of
# the main job on the newest supported Python of this machine, and the full suite. All stages run even
# when one fails; the exit status is 1 if any did.
#
#   bash launch/test.sh                         everything
#   bash launch/test.sh tests/test_x.py -k y    only pytest, with these arguments
#
#   PYTHON               the interpreter of the full suite, else python3, else the newest suitable
#   MMJAX_TEST_WORKERS   processes of pytest: 2 for the full suite, 0 (none beside it) with arguments
#   MMJAX_TEST_VENV      where the environment lies, else .venv-test in the checkout; the one of the
#                        newest Python lies beside it, its name ending in -newest
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help_if_asked "$@"

venv=$(absolute "${MMJAX_TEST_VENV:-$ROOT/.venv-test}")
cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}
# Compiled programs outlive the run: most of the suite's time is XLA's.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$cache/mmjax/xla-tests}

summary=
failed=
log=$(mktemp "${TMPDIR:-/tmp}/mmjax-test.XXXXXX")
trap 'rm -f "$log"' EXIT

# stage NAME COMMAND...: runs it (in a subshell, so that `fail` ends only the stage) and notes how it went.
stage() {
  local name=$1 start=$SECONDS verdict=ok
  shift
  printf -- '\n--- %s\n' "$name"
  ("$@") || verdict=FAILED
  if [ "$verdict" = FAILED ]; then failed=1; fi
  summary+=$(printf '%-7s %s (%s)' "$verdict" "$name" "$(seconds_since "$start")")$'\n'
  [ "$verdict" = ok ]
}

# note WORD TEXT: a stage that did not run, and why.
note() {
  printf -- '\n--- %s\n' "$2"
  summary+=$(printf '%-7s %s' "$1" "$2")$'\n'
}

finish() {
  printf -- '\n--- summary\n%s' "$summary"
  # A reader of the last line, man or machine, looks for pytest's own.
  tail -n 1 "$log"
  exit "${failed:-0}"
}

in_venv() { "$venv/bin/python" -m "$@"; }

# shellcheck disable=SC2329  # called through `stage`
suite() {
  local colour=no
  if [ -t 1 ]; then colour=yes; fi
  in_venv pytest -n "${MMJAX_TEST_WORKERS:-2}" --dist loadscope --durations=20 --color="$colour" | tee "$log"
}

# The smoke on the newest Python, when that is not the one of the full suite.
smoke_on_newest() {
  local newest used
  newest=$(survey | newest_of)
  used=$(minor_of "$(probe "$venv/bin/python")")
  if [ -z "$newest" ] || [ "$(minor_of "$newest")" -le "$used" ]; then
    note - "smoke on the newest Python: it is the suite's own, 3.$used; the suite holds the smoke"
    return
  fi
  if ! stage "environment of Python ${newest%% *}" ensure_environment "$venv-newest" tests "$newest"; then
    note 'not run' "smoke on Python ${newest%% *}"
    return
  fi
  stage "smoke on Python ${newest%% *}" "$venv-newest/bin/python" -m pytest tests/smoke || true
}

# The report is looked at in a real browser.
# shellcheck disable=SC2329  # called through `stage`
browser() {
  local name
  for name in ${MMJAX_BROWSER:+"$MMJAX_BROWSER"} chromium-headless-shell chromium chromium-browser google-chrome chrome; do
    if command -v "$name" > /dev/null; then
      log_line "browser: $name"
      return
    fi
  done
  if ! command -v apt-get > /dev/null || [ "$(id -u)" != 0 ]; then
    fail "no Chromium, in which a test looks at the report. Install it (Debian: apt-get install chromium-headless-shell)."
  fi
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends chromium-headless-shell > /dev/null
}

cd "$ROOT"
if [ $# -gt 0 ]; then
  ensure_environment "$venv" tests,aot
  in_venv pytest -n "${MMJAX_TEST_WORKERS:-0}" "$@"
  exit
fi

stage environment ensure_environment "$venv" tests,aot || finish
stage "ruff check" in_venv ruff check --output-format concise . || true
stage "ruff format" in_venv ruff format --check --output-format concise . || true
stage mypy in_venv mypy mmjax || true
stage shellcheck "$venv/bin/shellcheck" launch/*.sh .ci/run || true
stage docs build_docs "$venv" || true
stage browser browser || true
smoke_on_newest
stage "pytest, all tests" suite || true
finish
