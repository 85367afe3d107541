# shellcheck shell=bash
# What the launch scripts share: finding a Python, and making a virtual environment once.
# Sourced, never run. Kept to bash 3.2, which macOS ships.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# python_requires of setup.cfg, as minor versions of Python 3.
OLDEST_MINOR=11
NEWEST_MINOR=13

log_line() { printf '%s\n' "$*"; }

# help_if_asked [ARGUMENT...]: if the first is -h or --help, prints the comment at the head of the script that calls it, and ends.
help_if_asked() {
  case ${1:-} in
    -h | --help)
      sed -n '2,/^set -/{s/^# \{0,1\}//p;}' "${BASH_SOURCE[1]}"
      exit
      ;;
  esac
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# A relative PYTHON is read from the current folder, not from the root.
case ${PYTHON:-} in
  /*) ;;
  */*) PYTHON=$PWD/$PYTHON ;;
esac

seconds_since() { printf '%d s' $((SECONDS - $1)); }

# Prints "VERSION KIND MAKER PATH" of the interpreter that runs it, Python 2 too. MAKER is what can
# put pip into a new environment; PATH is never inside an environment, which may be about to go.
PROBE='
import sys
kind = getattr(getattr(sys, "implementation", None), "name", "python2")
if "free-threading" in sys.version:
    kind = "free-threaded"
maker, path = "none", sys.executable
try:
    import venv
    try:
        import ensurepip
        maker, path = "ensurepip", getattr(sys, "_base_executable", None) or path
    except ImportError:
        from importlib.metadata import version
        if tuple(int(part) for part in version("pip").split(".")[:2]) >= (22, 3):
            maker = "pip"
except Exception:
    pass
print("%d.%d.%d %s %s %s" % (sys.version_info[:3] + (kind, maker, path)))
'

# probe PYTHON: its probe line; nothing for what does not run (such as a pyenv shim of another version).
probe() { "$1" -c "$PROBE" 2>/dev/null </dev/null || true; }

# minor_of PROBE_LINE: 11 for "3.11.7 ..."; 0 for anything that is not Python 3.
minor_of() {
  local version=${1%% *} rest
  rest=${version#3.}
  if [ "$rest" = "$version" ]; then echo 0; else echo "${rest%%.*}"; fi
}

# why_not PROBE_LINE: why this interpreter will not do; nothing when it will.
why_not() {
  local version kind maker path minor
  read -r version kind maker path <<<"$1"
  minor=$(minor_of "$1")
  if [ -z "$path" ]; then
    echo "does not run"
  elif [ "$minor" -lt "$OLDEST_MINOR" ]; then
    echo "too old"
  elif [ "$minor" -gt "$NEWEST_MINOR" ]; then
    echo "too new"
  elif [ "$kind" != cpython ]; then
    echo "$kind, not plain CPython"
  elif [ "$maker" = none ]; then
    echo "has neither venv with ensurepip nor pip 22.3 or newer;" \
      "on Debian or Ubuntu: apt-get install python3.$minor-venv"
  fi
}

# Every place where an interpreter may be, python3 first, then from new to old.
candidates() {
  local minor path
  echo python3
  for ((minor = NEWEST_MINOR; minor >= OLDEST_MINOR; minor--)); do echo "python3.$minor"; done
  echo python
  for path in "${PYENV_ROOT:-${HOME:-/nowhere}/.pyenv}"/versions/*/bin/python; do
    if [ -x "$path" ]; then printf '%s\n' "$path"; fi
  done
}

# The probe lines of all candidates that run.
survey() {
  local candidate
  candidates | while IFS= read -r candidate; do probe "$candidate"; done
}

# Of the probe lines on standard input, the suitable one with the highest version.
newest_of() {
  local line
  while IFS= read -r line; do
    if [ -z "$(why_not "$line")" ]; then printf '%s\n' "$line"; fi
  done | sort -s -t. -k1,1nr -k2,2nr -k3,3nr | sed -n 1p
}

# What was found and why none of it will do, for the user who must now install something.
explain_none() {
  local line version path
  echo "no suitable Python was found: mmjax needs CPython 3.$OLDEST_MINOR to 3.$NEWEST_MINOR."
  [ -n "$1" ] || echo "  found: none (python3, python3.$OLDEST_MINOR to 3.$NEWEST_MINOR, python, pyenv)"
  printf '%s\n' "$1" | sort -u | while IFS= read -r line; do
    read -r version _ _ path <<<"$line"
    if [ -n "$line" ]; then echo "  found: Python $version, $path: $(why_not "$line")"; fi
  done
  echo "  Install one (Debian or Ubuntu: apt-get install python3 python3-venv; macOS: brew install" \
    "python@3.$NEWEST_MINOR), or name one: PYTHON=/path/to/python3.$NEWEST_MINOR bash launch/..."
}

# The probe line of the Python to use: $PYTHON and no other when it is set; else python3 when it will
# do; else the newest that will.
pick_python() {
  local line reason found
  if [ -n "${PYTHON:-}" ]; then
    line=$(probe "$PYTHON")
    reason=$(why_not "$line")
    [ -z "$reason" ] || fail "PYTHON=$PYTHON will not do: ${line:+Python ${line%% *}: }$reason." \
      "mmjax needs CPython 3.$OLDEST_MINOR to 3.$NEWEST_MINOR."
    printf '%s\n' "$line"
    return
  fi
  line=$(probe python3)
  if [ -n "$line" ] && [ -z "$(why_not "$line")" ]; then
    printf '%s\n' "$line"
    return
  fi
  found=$(survey)
  line=$(printf '%s\n' "$found" | newest_of)
  [ -n "$line" ] || fail "$(explain_none "$found")"
  printf '%s\n' "$line"
}

# absolute PATH: PATH, from the current folder.
absolute() {
  case $1 in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$PWD/$1" ;;
  esac
}

# An environment that these scripts made carries MADE_HERE, and only such a one is ever deleted. It
# holds the environment's place: an environment that was moved is made again.
# STAMP is written last and holds what the environment was made from; an environment of ours without
# it was cut short while it was new. One that an update left half done has a stamp that never matches:
# pip continues in it.
MADE_HERE=.made-by-mmjax
STAMP=.mmjax-stamp

# fingerprint PROBE_LINE EXTRAS: changes whenever pip has to run again.
fingerprint() {
  {
    cat "$ROOT/setup.cfg" "$ROOT/setup.py" "$ROOT/pyproject.toml"
    printf '%s\n' "$ROOT" "${1%% *}" "$2"
  } | cksum
}

# usable DIR [MINOR]: whether the environment's Python runs and is supported, and 3.MINOR if given.
usable() {
  local line minor
  line=$(probe "$1/bin/python")
  minor=$(minor_of "$line")
  [ "$minor" -ge "$OLDEST_MINOR" ] && [ "$minor" -le "$NEWEST_MINOR" ] &&
    { [ -z "${2:-}" ] || [ "$minor" = "$2" ]; }
}

# whole DIR: whether an environment of ours was finished, in this place; yes for one not of ours.
whole() {
  [ ! -e "$1/$MADE_HERE" ] || { [ -e "$1/$STAMP" ] && [ "$(cat "$1/$MADE_HERE")" = "$1" ]; }
}

# kept DIR [MINOR]: whether to use the environment that is there.
kept() { whole "$1" && usable "$@"; }

# create DIR PROBE_LINE: a fresh environment with pip in it.
create() {
  local version maker python
  read -r version _ maker python <<<"$2"
  command -v git >/dev/null || log_line "note: git was not found; set-up continues without it, updating this checkout needs it"
  if [ -e "$1/$MADE_HERE" ]; then
    # The mark goes last: what an interruption leaves is still known as ours.
    find "$1/." -mindepth 1 ! -name "$MADE_HERE" -delete ||
      fail "could not clear the unfinished or outdated environment $1."
  elif [ -d "$1" ] && [ -n "$(ls -A "$1")" ]; then
    fail "$1 is not empty and holds no working environment of Python 3.$OLDEST_MINOR to" \
      "3.$NEWEST_MINOR${PYTHON:+ that is like PYTHON=$PYTHON}. It was not made by these scripts," \
      "so it stays; move it away or choose another place."
  fi
  { mkdir -p "$1" && printf '%s\n' "$1" >"$1/$MADE_HERE"; } || fail "could not make the folder $1."
  if [ "$maker" = ensurepip ]; then
    "$python" -m venv "$1"
  else
    "$python" -m venv --without-pip "$1" &&
      "$python" -m pip --python "$1/bin/python" install -qq --disable-pip-version-check pip
  fi || fail "Python $version ($python) could not make a virtual environment in $1."
}

# pip_install DIR EXTRAS: mmjax itself, editable, into the environment.
pip_install() {
  "$1/bin/python" -m pip --version >/dev/null 2>&1 ||
    fail "the environment $1 has no pip. Remove that folder and run again."
  (cd "$ROOT" && "$1/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
    --editable ".[$2]") ||
    fail "pip could not install mmjax[$2] into $1; its message stands above." \
      "The first set-up needs the package index and 1.5 GB of disk (for the tests 2.5). Then run the same command again."
}

# ensure_environment DIR EXTRAS [PROBE_LINE]: the environment with mmjax[EXTRAS] in DIR, made or
# brought up to date only when needed. Without PROBE_LINE an environment that works is kept whatever
# its Python, so that another python3 on PATH today does not rebuild it.
ensure_environment() {
  local dir=$1 extras=$2 wanted=${3:-} start=$SECONDS line version
  if [ -z "$wanted" ] && [ -n "${PYTHON:-}" ]; then wanted=$(pick_python) || exit; fi
  if ! kept "$dir" "${wanted:+$(minor_of "$wanted")}"; then
    if [ -z "$wanted" ]; then wanted=$(pick_python) || exit; fi
    log_line "environment: making $dir with Python ${wanted%% *}"
    create "$dir" "$wanted"
  fi
  line=$(probe "$dir/bin/python")
  version=${line%% *}
  if [ "$(cat "$dir/$STAMP" 2>/dev/null)" != "$(fingerprint "$line" "$extras")" ]; then
    if [ -e "$dir/$STAMP" ]; then echo incomplete >"$dir/$STAMP"; fi
    log_line "environment: installing mmjax[$extras]; the first time takes a minute or two"
    pip_install "$dir" "$extras"
    fingerprint "$line" "$extras" >"$dir/$STAMP"
  fi
  log_line "environment: ready, Python $version in $dir ($(seconds_since "$start"))"
}

# build_docs DIR: the manual in site/, by the environment in DIR, which holds the extra `docs`. The generated pages import
# mmjax, on the CPU. Warnings are errors.
build_docs() {
  (cd "$ROOT" && JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 "$1/bin/python" -m mkdocs build --strict --quiet) ||
    fail "the manual could not be built; the reason stands above."
}

# job_python: the interpreter that starts a job: of PYTHON, of the environment in the checkout (MMJAX_VENV), or any that will do.
job_python() {
  local venv=${MMJAX_VENV:-$ROOT/.venv} line
  if [ -z "${PYTHON:-}" ] && [ -x "$venv/bin/python" ]; then
    printf '%s\n' "$venv/bin/python"
    return
  fi
  if [ -n "${PYTHON:-}" ]; then
    printf '%s\n' "$PYTHON"
    return
  fi
  line=$(pick_python) || exit
  printf '%s\n' "${line##* }"
}
