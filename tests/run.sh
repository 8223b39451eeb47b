#!/bin/bash
# Installs what is missing, builds, and runs the tests.
#   tests/run.sh            release build, label ci; the cuda preset's build when nvcc is there
#   tests/run.sh --all      also the labels exhaustive and slow
#   tests/run.sh --cuda     only the cuda preset: build, resources of its kernels, bundle
#   tests/run.sh --asan     AddressSanitizer and UBSan over the unit tests
#   tests/run.sh --tsan     ThreadSanitizer over communicators, strategies, loader, checkpoints
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/dependencies.sh

preset=release label='^ci$' cuda=1 host=1
case ${1:-} in
  '') ;;
  --all) label='^(ci|exhaustive|slow)$' ;;
  --cuda) host=0 ;;
  --asan) preset=asan label='^unit$' cuda=0 ;;
  --tsan) preset=tsan label='^tsan$' cuda=0 ;;
  -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit 0 ;;
  *) echo "tests/run.sh: unknown option $1 (see --help)" >&2 && exit 2 ;;
esac

if [[ ${LONGSPAN_SKIP_INSTALL:-0} != 1 ]]; then
  install_packages "${kBuildPackages[@]}" "${kTestPackages[@]}"
fi
run_host() {
  local start=$SECONDS
  cmake --preset "$preset" -DLONGSPAN_BUILD_TESTS=ON >/dev/null
  cmake --build --preset "$preset"
  echo "build ($preset): $((SECONDS - start)) s"

  export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1
  export LSAN_OPTIONS=suppressions=$PWD/tests/support/lsan.supp
  export TSAN_OPTIONS=suppressions=$PWD/tests/support/tsan.supp:halt_on_error=1
  start=$SECONDS
  ctest --test-dir "build/$preset" -L "$label" --output-on-failure -j 2
  echo "tests ($label): $((SECONDS - start)) s"
}

# No GPU is needed: the code for it is compiled and linked, its resources are compared with a table,
# and the bundle starts, trains on the CPU, and says that it finds no device.
run_cuda() {
  local start=$SECONDS bundle=build/cuda/longspan-cuda.tar.xz
  cmake --preset cuda -DLONGSPAN_BUILD_TESTS=ON >/dev/null
  cmake --build --preset cuda --target longspan longspan_gpu_tests
  echo "build (cuda): $((SECONDS - start)) s"
  tests/gpu/check_resources.py build/cuda
  launch/bundle.sh --from build/cuda --out "$bundle"
  tests/gpu/bundle_test.py "$bundle"
  echo "cuda preset and bundle: $((SECONDS - start)) s"
}

if ((host)); then run_host; fi
if ((cuda)) && command -v nvcc >/dev/null; then
  run_cuda
elif ((cuda)); then
  echo "build (cuda): not run, nvcc is not installed"
  ((host))
fi
