#!/usr/bin/env bash
# Sets everything up and passes the tests. Arguments go to pytest: scripts/test.sh -k database
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
setup test
cd "$repository"
exec "$python" -m pytest "$@"
