#!/usr/bin/env bash
# Runs a short fuzz of every op on the GPU under compute-sanitizer: memcheck for accesses outside of a tensor, racecheck
# for races in shared memory. Fails on any error. Needs an environment that autofuse is installed in, with CUDA.
#
#   scripts/sanitize.sh                     # arguments go to fuzz_ops.py: scripts/sanitize.sh --op mla_dual_rms_norm
#   PYTHON          the interpreter; python3, unless set
#   SANITIZER_TOOLS which tools; "memcheck racecheck", unless set
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

# A tensor's memory is its own only without the caching allocator, which hands out parts of large blocks.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

# Only the project's kernels are instrumented: PyTorch's are many, and slow that way.
filters=()
for op in $("$python" -c 'from autofuse.ops import OPS; print(*OPS)'); do
  filters+=(--kernel-name "kns=$op")
done

for tool in ${SANITIZER_TOOLS:-memcheck racecheck}; do
  padding=()
  if [ "$tool" = memcheck ]; then
    padding=(--padding 64) # bytes after each allocation that nobody may touch
  fi
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 --report-api-errors no \
    --target-processes application-only "${padding[@]}" "${filters[@]}" \
    "$python" scripts/fuzz_ops.py --device cuda --kernels 6 --cases 18 "$@"
done
