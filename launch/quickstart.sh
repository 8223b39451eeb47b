#!/bin/bash
# From a fresh clone to a trained language model: installs what is missing, builds, prepares this
# repository's own text as a corpus, and trains with two MPI ranks that share every sequence.
# Usage: launch/quickstart.sh [RUN_DIRECTORY]      (default runs/quickstart)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/dependencies.sh

readonly kRunDirectory=${1:-runs/quickstart}
readonly kCorpus=$kRunDirectory/corpus
readonly kBinary=build/release/longspan

phase_names=() phase_seconds=()
phase() { # name command...
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  "$@"
  phase_names+=("$name")
  phase_seconds+=($((SECONDS - start)))
}

install() {
  if [[ ${LONGSPAN_SKIP_INSTALL:-0} == 1 ]]; then
    echo "packages: left alone (LONGSPAN_SKIP_INSTALL=1)"
  else
    install_packages "${kBuildPackages[@]}"
  fi
}

build() {
  cmake --preset release -DLONGSPAN_BUILD_TESTS=OFF >/dev/null
  cmake --build --preset release --target longspan
}

prepare() {
  # A run goes on with the text it began with, whatever has become of the sources.
  if [[ -e $kRunDirectory/metrics.jsonl ]]; then
    echo "$kCorpus is kept"
    return
  fi
  "$kBinary" prepare ops parallel data configs trainer launch tests docs README.md CONTRIBUTING.md \
    CMakeLists.txt --tokenizer byte --out "$kCorpus" --validation-fraction 0.05 --overwrite
}

train() {
  launch/mpirun.sh -n 2 --quiet "$kBinary" train configs/quickstart.textproto \
    --set "data.train[0].path=$kCorpus/train" --set "data.validation[0].path=$kCorpus/validation" \
    --run-dir "$kRunDirectory" --max-minutes 4
}

# The last value of an evaluation in the run's metrics.
last_validation_loss() {
  grep '"eval":"validation_loss"' "$kRunDirectory/metrics.jsonl" | tail -n 1 |
    sed 's/.*"value":\([0-9.eE+-]*\).*/\1/'
}

if [[ -e $kRunDirectory/metrics.jsonl ]]; then
  echo "$kRunDirectory exists: the run in it is continued; name another directory for a new one"
fi
phase "install packages" install
phase "build longspan" build
phase "prepare the corpus" prepare
phase "train on 2 ranks" train

bigram=$("$kBinary" bigram "$kCorpus/train" "$kCorpus/validation" --json |
  sed 's/.*"loss":\([0-9.]*\).*/\1/')
loss=$(last_validation_loss)
echo
echo "== summary"
for i in "${!phase_names[@]}"; do
  printf '  %-22s %4d s\n' "${phase_names[$i]}" "${phase_seconds[$i]}"
done
printf '  final validation loss  %.4f nats/byte\n' "$loss"
printf '  byte-bigram model      %.4f nats/byte (same training text)\n' "$bigram"
echo "  run directory          $kRunDirectory"
echo
echo "Next:"
echo "  $kBinary inspect $kRunDirectory"
echo "  $kBinary inspect configs/quickstart.textproto"
echo "  launch/mpirun.sh -n 2 $kBinary eval $kRunDirectory --tasks loss --lengths 1024,2048,4096"
