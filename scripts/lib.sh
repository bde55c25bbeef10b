# Sourced by every script here: environment, key=value arguments, launch. Works with bash 3.2 and later.
set -euo pipefail
script="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
if ! command -v nvidia-smi >/dev/null; then
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# The comment at the head of the script is its help.
usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$script"
}

# ---- environment

# Does this Python have vqrae from this folder, and the packages of these extras?
has_packages() {
  local python=$1 extra markers=""
  shift
  for extra in "$@"; do
    case "$extra" in
      smollm2) markers="$markers gguf" ;;
      lora) markers="$markers peft" ;;
      dev) markers="$markers pytest ruff mypy webdataset" ;;
      eval) markers="$markers lmms_eval" ;;
      *) markers="$markers $extra" ;;
    esac
  done
  "$python" - "$PWD" $markers >/dev/null 2>&1 <<'PY'
import importlib.util, pathlib, sys
import vqrae.common
root, *names = sys.argv[1:]
here = pathlib.Path(vqrae.common.__file__).resolve().is_relative_to(pathlib.Path(root).resolve())
sys.exit(not (here and all(importlib.util.find_spec(name) for name in names)))
PY
}

# install [EXTRA...]: leave a Python with vqrae and these extras in $PYTHON. An active environment that has them is used;
# else .venv is made, or brought up to date when setup.py or the constraints have changed.
install() {
  if [ -n "${VIRTUAL_ENV:-}" ] && [ "$VIRTUAL_ENV" != "$PWD/.venv" ] && has_packages "$VIRTUAL_ENV/bin/python" "$@"; then
    PYTHON="$VIRTUAL_ENV/bin/python"
    return
  fi
  PYTHON="$PWD/.venv/bin/python"
  if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "python3 is missing or older than 3.10"
    python3 -c 'import ensurepip, venv' 2>/dev/null ||
      fail "python3 cannot make environments: install python3-venv, or activate an environment and run: pip install -e ."
    echo "making .venv"
    python3 -m venv .venv
  fi
  local wanted extra extras="" current=true
  wanted=$(cat setup.py pyproject.toml scripts/constraints.txt | cksum)
  for extra in base "$@"; do
    [ "$(cat ".venv/.installed-$extra" 2>/dev/null)" = "$wanted" ] || current=false
    [ "$extra" = base ] || extras="$extras${extras:+,}$extra"
  done
  $current && return
  echo "installing into .venv (the first time about 6 GB, some minutes)"
  rm -f .venv/.installed-*  # an install that is cut short starts over
  "$PYTHON" -m pip install --disable-pip-version-check --progress-bar off -c scripts/constraints.txt -e ".${extras:+[$extras]}" |
    { grep -v "^Requirement already satisfied" || true; }
  for extra in base "$@"; do echo "$wanted" >".venv/.installed-$extra"; done
}

# install_for_training [EXTRA...]: with DeepSpeed where it is asked for, or a full-size configuration may ask for it.
install_for_training() {
  if [ "${zero:-0}" -gt 0 ] || full_size; then install deepspeed "$@"; else install "$@"; fi
}

# ---- arguments: those of the launcher become variables, the others go to the module

config=tiny nnodes=1 zero=""
nproc=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | awk '/^GPU / { n++ } END { print n ? n : 1 }')
arguments=()

read_arguments() {
  local argument
  for argument in "$@"; do
    case "$argument" in
      -h | --help) usage && exit 0 ;;
      config=* | nproc=* | nnodes=* | zero=*) printf -v "${argument%%=*}" %s "${argument#*=}" ;;
      *=*) arguments+=("$argument") ;;
      *) fail "got '$argument', expected key=value; see --help" ;;
    esac
  done
  [[ $nproc =~ ^[1-9][0-9]*$ && $nnodes =~ ^[1-9][0-9]*$ ]] || fail "nproc and nnodes must be positive numbers"
  [[ $zero =~ ^[0-3]?$ ]] || fail "zero must be 0, 1, 2 or 3, got '$zero'"
}

full_size() { [[ -n $config && $config != tiny* && $config != smollm2 ]]; }

# given KEY: was KEY=… among the arguments? Prints what it was set to.
given() {
  local argument
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    [ "${argument%%=*}" = "$1" ] && echo "${argument#*=}" && return 0
  done
  return 1
}

# defaults KEY=VALUE…: of the tiny configurations, unless given; full-size ones hold their own.
defaults() {
  local pair
  if full_size; then return; fi
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

# artefact KEY NAME SCRIPT [ARGUMENT…]: for the tiny configurations, default KEY to what an earlier run left in runs/NAME
# or runs/quickstart/NAME; where there is neither, make it with SCRIPT first.
artefact() {
  local key=$1 name=$2 script=$3 folder
  shift 3
  if full_size || given "$key" >/dev/null; then return; fi
  for folder in "runs/$name" "runs/quickstart/$name"; do
    if [ -f "$folder/model/config.json" ] || [ -f "$folder/shard-00000.npy" ]; then
      echo "$key=$folder"
      arguments+=("$key=$folder")
      return
    fi
  done
  echo "no $key= given, and neither runs/$name nor runs/quickstart/$name is there: making runs/$name with scripts/$script"
  bash "scripts/$script" "$@"
  arguments+=("$key=runs/$name")
}

# ---- launch

# launch MODULE [ZERO_KEY…]: one plain process, or torchrun for more, for DeepSpeed and for the full-size configurations.
launch() {
  local module=$1 key
  shift
  for key in "$@"; do [ -z "$zero" ] || arguments+=("$key=$zero"); done
  local command=("$PYTHON")
  if [ "$nproc" -gt 1 ] || [ "$nnodes" -gt 1 ] || [ "${zero:-0}" -gt 0 ] || full_size; then
    local meeting=(--standalone)
    if [ "$nnodes" -gt 1 ]; then
      [ -n "${MASTER_ADDR:-}" ] || fail "nnodes=$nnodes needs MASTER_ADDR, the name of the first node, on every node"
      meeting=(--nnodes "$nnodes" --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}")
    fi
    [ "$nproc" = 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    command+=(-m torch.distributed.run "${meeting[@]}" --nproc_per_node "$nproc")
  fi
  command+=(-m "$module" ${config:+"$config"} ${arguments[@]+"${arguments[@]}"})
  echo "+ ${command[*]}"
  exec "${command[@]}"
}
