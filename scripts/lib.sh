# Sourced by every script here: the Python to use, what to install, and the launch. Works with bash 3.2 and later.
set -euo pipefail
script="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
given_python=${PYTHON:-} help=""

# The comment at the head of a script is its help; the module that it starts then adds its own, where it is installed.
case " $* " in *" --help "* | *" -h "*)
  help=yes
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$script"
  ;;
esac

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# launch MODULE [key=value ...]: install what the job and those before it need, and leave the rest to Python.
launch() {
  local extras
  install
  extras=$("$PYTHON" -m vqrae.scripts.launch --extras "$@") || exit $?
  [ -z "$extras" ] || install $extras
  exec "$PYTHON" -m vqrae.scripts.launch "$@"
}

# The Python that the user has chosen: PYTHON=, or that of the active environment.
chosen_python() {
  local folder
  for folder in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
    if [ -z "$given_python" ] && [ -n "$folder" ] && [ "$folder" != "$PWD/.venv" ]; then
      echo "$folder/bin/python"
      return
    fi
  done
  echo "$given_python"
}

# install [EXTRA...]: leave a Python with vqrae and these extras in $PYTHON. A chosen one is used as it is, and what it
# lacks is named; else .venv is made, or brought up to date when setup.py or the constraints have changed.
install() {
  local chosen missing extras="$*"
  chosen=$(chosen_python)
  if [ -n "$help" ]; then
    PYTHON=${chosen:-.venv/bin/python}
    [ -z "$("$PYTHON" scripts/missing.py 2>&1)" ] && return 0 || exit 0
  fi
  if [ -n "$chosen" ]; then
    PYTHON=$(command -v "$chosen") || fail "there is no Python at $chosen"
    missing=$("$PYTHON" scripts/missing.py "$@" | tr '\n' ' ') || fail "$PYTHON does not run"
    [ -n "$missing" ] || return 0
    # Conda's base is active in every shell of many people and is meant for conda alone.
    if [ -n "$given_python" ] || [ -n "${VIRTUAL_ENV:-}" ] || [ "${CONDA_DEFAULT_ENV:-}" != base ]; then
      fail "$PYTHON lacks ${missing% }. Install it there: cd $PWD && $PYTHON -m pip install -c scripts/constraints.txt" \
        "-e '.${extras:+[${extras// /,}]}'; or deactivate that environment, and .venv is made"
    fi
    echo "conda's base environment lacks ${missing% }: .venv is used instead"
  fi
  PYTHON="$PWD/.venv/bin/python"
  is_current "$@" || locked install_venv "$@"
}

requirements() { cat setup.py pyproject.toml scripts/constraints.txt | cksum; }

# is_current [EXTRA...]: has .venv been installed with these extras and by these requirements?
is_current() {
  local extra
  for extra in base "$@"; do
    [ "$(cat ".venv/.installed-$extra" 2>/dev/null)" = "$(requirements)" ] || return 1
  done
}

install_venv() {
  local extra extras="$*" venv=(python3 -m venv)
  local installer=("$PYTHON" -m pip install --disable-pip-version-check --progress-bar off)
  if is_current "$@"; then return; fi # another process has just done it
  for extra in .venv/.installed-*; do # what is there stays
    extra=${extra##*.installed-}
    [ "$extra" = base ] || ! is_current "$extra" || extras="$extras${extras:+ }$extra"
  done
  if command -v uv >/dev/null; then
    follow_pip
    installer=(uv pip install --python "$PYTHON")
    venv=(uv venv --quiet --clear --seed --python ">=3.11")
  fi
  if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    [ "${venv[0]}" = uv ] || python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      fail "$(python3 -V) is too old, 3.11 or later is needed: activate a later one, or put uv on PATH, which brings its own"
    echo "making .venv"
    "${venv[@]}" .venv || fail "no environment could be made: python3-venv is missing, or activate an environment"
  fi
  echo "installing into .venv (the first time about 6 GB, some minutes)"
  rm -f .venv/.installed-* # an install that is cut short starts over
  "${installer[@]}" -c scripts/constraints.txt -e ".${extras:+[${extras// /,}]}" |
    { grep -v "^Requirement already satisfied" || true; }
  for extra in base $extras; do requirements >".venv/.installed-$extra"; done
}

# uv reads no configuration of pip: without this it would forget mirrors, wheels on disk, caps and certificates.
follow_pip() {
  local pair name value
  for pair in UV_DEFAULT_INDEX=index-url UV_INDEX=extra-index-url UV_FIND_LINKS=find-links UV_CONSTRAINT=constraint SSL_CERT_FILE=cert; do
    name=${pair%%=*}
    value=$(python3 -m pip config list 2>/dev/null |
      awk -F"'" -v key=".${pair#*=}=" 'index($1, key) && !seen++ { gsub(/\\n/, " ", $2); sub(/^ +/, "", $2); print $2 }')
    [ "$name" != UV_FIND_LINKS ] || value=${value// /,}
    [ -z "$value" ] || [ -n "${!name:-}" ] || export "$name=$value"
  done
  [ -z "${UV_INDEX:-}" ] || export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match} # pip takes the best of all
}

# locked COMMAND...: run it while no other process, on any node that shares this folder, runs one. The lock is a symbolic
# link, which is made in one step on every file system and names its owner.
locked() {
  local lock="$PWD/.venv.lock.owner" owner told=""
  until ln -s "$(uname -n) $$" "$lock" 2>/dev/null; do
    owner=$(readlink "$lock" || true)
    if [ "${owner% *}" = "$(uname -n)" ] && ! ps -p "${owner##* }" >/dev/null; then
      if ln -s "$$" "$lock.heir" 2>/dev/null; then # it died: one process at a time frees what is still its lock
        [ "$(readlink "$lock")" != "$owner" ] || rm "$lock"
        rm "$lock.heir"
      fi
      continue
    fi
    [ -n "$told" ] || echo "waiting for the installation into .venv by $owner (if it is gone: rm $lock)"
    told=yes
    sleep 1
  done
  trap "rm -f '$lock'" EXIT
  "$@"
  rm "$lock"
  trap - EXIT
}
