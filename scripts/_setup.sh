# Sourced by the other scripts. Makes a virtual environment, installs the project into it with the versions that
# constraints.txt pins, and leaves its interpreter in $python. Done once: a second run only compares a stamp.
#
#   AUTOFUSE_VENV   where the environment is; .venv in the repository, unless set
#   PYTHON          the interpreter to make it with; python3, unless set
#
# On a machine with an NVIDIA GPU whose Python has a CUDA build of PyTorch already, that PyTorch is used.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# setup EXTRA...: installs the project with these extras; adds "cuda" where there is an NVIDIA GPU.
setup() {
  local base=${PYTHON:-python3} venv=${AUTOFUSE_VENV:-$repository/.venv} flags=() extras constraints stamp torch found
  command -v "$base" >/dev/null || fail "there is no $base: install Python 3.10 or later, or set PYTHON"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$("$base" --version) is too old: 3.10 is needed"
  if [ -n "${CXX:-}" ]; then
    command -v "${CXX%% *}" >/dev/null || fail "CXX=$CXX cannot be run: set it to a C++ compiler, or unset it"
  elif ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
    fail "there is no C++ compiler: install g++ or clang++, or set CXX to one"
  fi

  torch=$(sed -n 's/^torch==//p' "$repository/constraints.txt")
  if nvidia-smi -L >/dev/null 2>&1; then
    set -- "$@" cuda
    if found=$("$base" -c 'import torch; assert torch.version.cuda; print(torch.__version__)' 2>/dev/null); then
      torch=$found flags=(--system-site-packages)
    fi
  fi
  extras=$(IFS=,; echo "$*")
  stamp="$("$base" --version) torch $torch extras $extras at $repository $(cat "$repository"/{constraints.txt,pyproject.toml} | cksum)"
  python=$venv/bin/python
  if [ "$(cat "$venv/autofuse-setup" 2>/dev/null)" = "$stamp" ]; then
    return
  fi

  echo "Setting up $venv: PyTorch $torch, extras $extras"
  "$base" -m venv --clear "${flags[@]}" "$venv" || fail "$base cannot make a virtual environment: install its venv module"
  constraints=$venv/constraints.txt
  sed "s/^torch==.*/torch==$torch/" "$repository/constraints.txt" >"$constraints"
  # PyTorch first, by itself: nothing that follows may choose another build of it.
  "$python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" "torch==$torch"
  PIP_CONSTRAINT=$constraints "$python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" \
    --editable "$repository[$extras]"
  echo "$stamp" >"$venv/autofuse-setup"
}
