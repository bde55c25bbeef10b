# Sourced by every script here: environment, key=value arguments, launch. Works with bash 3.2 and later.
set -euo pipefail
script="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
given_python=${PYTHON:-}

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# The comment at the head of the script is its help.
usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$script"
}

# ---- environment

# missing_packages [EXTRA...]: a line for each package that $PYTHON lacks: vqrae from this folder, or what it requires.
missing_packages() {
  "$PYTHON" - "$PWD" "$@" <<'PY'
import importlib.metadata as metadata, pathlib, re, sys
root, *extras = sys.argv[1:]
try:
    import vqrae.common
    here = pathlib.Path(vqrae.common.__file__).resolve().is_relative_to(pathlib.Path(root).resolve())
except ImportError:
    here = False
if not here:
    print("vqrae")
for line in (metadata.requires("vqrae") or []) if here else []:
    requirement, _, marker = line.partition(";")
    if "extra" not in marker or any(re.search(rf"extra == .{extra}\b", marker) for extra in extras):
        try:
            metadata.version(re.match(r"[\w.-]+", requirement).group())
        except metadata.PackageNotFoundError:
            print(requirement.strip())
PY
}

# The Python that the user has chosen: PYTHON=, or that of the active environment.
chosen_python() {
  local folder
  if [ -n "$given_python" ]; then
    echo "$given_python"
    return
  fi
  for folder in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
    if [ -n "$folder" ] && [ "$folder" != "$PWD/.venv" ]; then
      echo "$folder/bin/python"
      return
    fi
  done
}

# install [EXTRA...]: leave a Python with vqrae and these extras in $PYTHON. A chosen one is used as it is, and what it lacks
# is named; else .venv is made, or brought up to date when setup.py or the constraints have changed.
install() {
  local chosen missing extras="$*"
  chosen=$(chosen_python)
  if [ -n "$chosen" ]; then
    PYTHON=$(command -v "$chosen") || fail "there is no Python at $chosen"
    missing=$(missing_packages "$@" | tr '\n' ' ') || fail "$PYTHON does not run"
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
  local extra wanted
  wanted=$(requirements)
  for extra in base "$@"; do
    [ "$(cat ".venv/.installed-$extra" 2>/dev/null)" = "$wanted" ] || return 1
  done
}

install_venv() {
  local extra extras="$*" installer=("$PYTHON" -m pip install --disable-pip-version-check --progress-bar off)
  if is_current "$@"; then return; fi # another process has just done it
  for extra in .venv/.installed-*; do # what is there stays
    extra=${extra##*.installed-}
    [ "$extra" = base ] || ! is_current "$extra" || extras="$extras${extras:+ }$extra"
  done
  if command -v uv >/dev/null; then
    follow_pip
    installer=(uv pip install --python "$PYTHON")
  fi
  if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then make_venv; fi
  echo "installing into .venv (the first time about 6 GB, some minutes)"
  rm -f .venv/.installed-* # an install that is cut short starts over
  "${installer[@]}" -c scripts/constraints.txt -e ".${extras:+[${extras// /,}]}" |
    { grep -v "^Requirement already satisfied" || true; }
  for extra in base $extras; do requirements >".venv/.installed-$extra"; done
}

make_venv() {
  echo "making .venv"
  if command -v uv >/dev/null; then
    uv venv --quiet --clear --seed --python ">=3.10" .venv
    return
  fi
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "python3 is missing or older than 3.10"
  python3 -c 'import ensurepip, venv' 2>/dev/null ||
    fail "python3 cannot make environments: install python3-venv, or activate an environment and run: pip install -e ."
  python3 -m venv .venv
}

# uv reads no configuration of pip: without this it would forget mirrors, wheels on disk, caps and certificates.
follow_pip() {
  local settings pair name value
  settings=$(python3 -m pip config list 2>/dev/null || true)
  for pair in UV_DEFAULT_INDEX=index-url UV_INDEX=extra-index-url UV_FIND_LINKS=find-links UV_CONSTRAINT=constraint SSL_CERT_FILE=cert; do
    name=${pair%%=*}
    value=$(printf '%s\n' "$settings" |
      awk -F"'" -v key=".${pair#*=}=" 'index($1, key) && !seen++ { gsub(/\\n/, " ", $2); sub(/^ +/, "", $2); print $2 }')
    [ "$name" != UV_FIND_LINKS ] || value=${value// /,}
    [ -z "$value" ] || [ -n "${!name:-}" ] || export "$name=$value"
  done
  [ -z "${UV_INDEX:-}" ] || export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match} # pip takes the best of all
}

# locked COMMAND…: run it while no other process, on any node that shares this folder, runs one.
locked() {
  local code=0 lock=.venv.lock.d owner told=""
  if command -v flock >/dev/null; then
    exec 9>>.venv.lock
    flock -n 9 2>/dev/null || code=$?
    if [ "$code" = 1 ]; then
      echo "waiting for another installation into .venv"
      flock 9 && code=0
    fi
    if [ "$code" = 0 ]; then
      "$@"
      exec 9>&-
      return
    fi
  fi # no flock: macOS, or a file system that knows none
  until mkdir "$lock" 2>/dev/null; do
    owner=$(cat "$lock/owner" 2>/dev/null || true)
    if [ "${owner% *}" = "$(uname -n)" ] && ! ps -p "${owner##* }" >/dev/null && mkdir "$lock/taken" 2>/dev/null; then
      # Its owner died. One process at a time passes here; whoever comes later finds an owner that lives.
      if [ "$owner" = "$(cat "$lock/owner")" ]; then
        echo "$(uname -n) $$" >"$lock/owner"
        rmdir "$lock/taken"
        break
      fi
      rmdir "$lock/taken"
    fi
    [ -n "$told" ] || echo "waiting for the installation into .venv by ${owner:-another process} (if it is gone: rm -r $PWD/$lock)"
    told=yes
    sleep 1
  done
  echo "$(uname -n) $$" >"$lock/owner"
  trap "rm -rf '$PWD/$lock'" EXIT
  "$@"
  rm -rf "$lock"
  trap - EXIT
}

# install_for_training [EXTRA...]: with DeepSpeed where an argument or the configuration asks for it.
install_for_training() {
  local key
  install "$@"
  zero_stage=$zero
  if [ -z "$zero" ]; then
    for key in $zero_keys; do
      zero_stage=$(given "$key" || setting "$key")
      [ "${zero_stage:-0}" = 0 ] || break
    done
  fi
  if [ "${zero_stage:-0}" -gt 0 ]; then install deepspeed "$@"; fi
}

# ---- arguments: those of the launcher become variables, the others go to the module

# A script sets these before: package= and section= of its configurations, zero_keys= where they hold the ZeRO stage.
config=tiny package="" section="" zero_keys="" nproc="" nnodes=1 node_rank=${SLURM_NODEID:-} zero="" zero_stage=0
arguments=()

read_arguments() {
  local argument
  for argument in "$@"; do
    case "$argument" in
      -h | --help) usage && exit 0 ;;
      config=* | nproc=* | nnodes=* | node_rank=* | zero=*) printf -v "${argument%%=*}" %s "${argument#*=}" ;;
      *=*) arguments+=("$argument") ;;
      *) fail "got '$argument', expected key=value; see --help" ;;
    esac
  done
  [[ ${nproc:-1} =~ ^[1-9][0-9]*$ && $nnodes =~ ^[1-9][0-9]*$ ]] || fail "nproc and nnodes must be positive numbers"
  [[ $zero =~ ^[0-3]?$ ]] || fail "zero must be 0, 1, 2 or 3, got '$zero'"
}

# setting KEY: what the configuration says of it.
setting() {
  [ -z "$config" ] || "$PYTHON" - "vqrae.$package" "$config" "$section$1" <<'PY'
import functools, sys
from vqrae.common.config import ConfigError, parse_yaml, shipped_config
package, name, key = sys.argv[1:]
try:
    file = shipped_config(package, name)
    values = parse_yaml(file.read_text(encoding="utf-8-sig"), source=str(file))
except (ConfigError, OSError) as error:
    print(error, file=sys.stderr)
    sys.exit(2)
value = functools.reduce(lambda node, part: node.get(part) if isinstance(node, dict) else None, key.split("."), values)
print("" if value is None else value)
PY
}

# processes: of one node, where nproc= is not given: the GPUs that torch sees, else one.
processes() {
  local count
  count=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)') ||
    fail "torch cannot be imported by $PYTHON"
  if [ "${count:-0}" = 0 ] && [ -z "${CUDA_VISIBLE_DEVICES+set}" ] && nvidia-smi -L 2>/dev/null | grep -q "^GPU "; then
    echo "note: there are GPUs, but torch in $PYTHON can use none: an old driver, or a build for CPU; this runs on CPU" >&2
  fi
  if [ "${count:-0}" -gt 0 ]; then echo "$count"; else echo 1; fi
}

# given KEY: was KEY=… among the arguments? Prints what it was set to.
given() {
  local argument
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    [ "${argument%%=*}" = "$1" ] && echo "${argument#*=}" && return 0
  done
  return 1
}

# defaults KEY=VALUE…: unless given.
defaults() {
  local pair
  for pair in "$@"; do given "${pair%%=*}" >/dev/null || arguments+=("$pair"); done
}

# rename SHORT=PATH…: the short keys of a script, as the module's configuration calls them.
rename() {
  local pair i
  for pair in "$@"; do
    for i in ${arguments[@]+"${!arguments[@]}"}; do
      [ "${arguments[i]%%=*}" = "${pair%%=*}" ] && arguments[i]="${pair#*=}=${arguments[i]#*=}"
    done
  done
  return 0
}

# artefact KEY NAME SCRIPT [ARGUMENT…]: where the configuration has KEY at runs/NAME, as the embedded default does, take what
# an earlier run left there or in runs/quickstart/NAME; where there is neither, make it with SCRIPT first.
artefact() {
  local key=$1 name=$2 script=$3 folder
  shift 3
  if given "$key" >/dev/null; then return; fi
  if [ -n "$config" ]; then
    folder=$(setting "$key")
    [ "$folder" = "runs/$name" ] || return 0
  fi
  for folder in "runs/$name" "runs/quickstart/$name"; do
    if [ -f "$folder/model/config.json" ] || [ -f "$folder/shard-00000.npy" ]; then
      echo "$key=$folder"
      arguments+=("$key=$folder")
      return
    fi
  done
  [ "$nnodes" = 1 ] || fail "neither runs/$name nor runs/quickstart/$name is there: first, on one node, run scripts/$script"
  echo "no $key= given, and neither runs/$name nor runs/quickstart/$name is there: making runs/$name with scripts/$script"
  bash "scripts/$script" "$@"
  arguments+=("$key=runs/$name")
}

# ---- launch

# launch MODULE: one plain process, or torchrun for more and for DeepSpeed.
launch() {
  local module=$1 key
  [ -n "$nproc" ] || nproc=$(processes)
  for key in $zero_keys; do [ -z "$zero" ] || arguments+=("$key=$zero"); done
  local command=("$PYTHON")
  if [ "$nproc" -gt 1 ] || [ "$nnodes" -gt 1 ] || [ "${zero_stage:-0}" -gt 0 ]; then
    local meeting=(--standalone)
    if [ "$nnodes" -gt 1 ]; then
      [ -n "${MASTER_ADDR:-}" ] || fail "nnodes=$nnodes needs MASTER_ADDR, the name of the first node, on every node"
      meeting=(--nnodes "$nnodes" --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}")
      [ -z "$node_rank" ] || meeting=(--nnodes "$nnodes" --node_rank "$node_rank" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
    fi
    [ "$nproc" = 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120} # for the checkpoint after SIGTERM
    command+=(-m torch.distributed.run "${meeting[@]}" --nproc_per_node "$nproc")
  fi
  command+=(-m "$module" ${config:+"$config"} ${arguments[@]+"${arguments[@]}"})
  echo "+ ${command[*]}"
  exec "${command[@]}"
}
