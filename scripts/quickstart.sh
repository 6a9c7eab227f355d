#!/usr/bin/env bash
# Sets everything up and runs the main job, on the GPU if there is one, else on the CPU: see scripts/quickstart.py.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup test
exec "$python" "$repository/scripts/quickstart.py" "$@"
