#!/bin/bash
# Tests and measures Longspan on a GPU; see --help. From a build of preset cuda or an unpacked bundle.
command -v python3 >/dev/null || {
  echo "tests/gpu/run.sh: python3 is not installed" >&2
  exit 2
}
exec python3 "$(dirname "${BASH_SOURCE[0]}")/run.py" "$@"
