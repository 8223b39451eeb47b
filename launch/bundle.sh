#!/bin/bash
# One archive that trains, evaluates, tests and measures on a machine that has a driver, cuBLAS and
# NCCL but no development packages. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly kLimitMib=50
readonly kPrograms=(longspan longspan_gpu_tests)
# From the machine that it runs on: the driver belongs to its kernel, the others are large.
readonly kExternal='^lib(cuda|cublas|cublasLt|nccl)\.so'

usage() {
  cat <<'END'
usage: launch/bundle.sh [--out FILE] [--arch LIST] [--from BUILD_DIR]

Builds longspan and its GPU tests in build/bundle and packs them with every library that they need,
except the driver, cuBLAS and NCCL, into one archive of less than 50 MiB.

  --out FILE    .tar.xz or .tar.zst (default build/longspan-cuda-90a.tar.xz)
  --arch LIST   as CMAKE_CUDA_ARCHITECTURES (default 90a-real)
  --from DIR    pack the binaries of this build of preset cuda instead of building

On the other machine: unpack, then bin/longspan, or tests/gpu/run.sh.
END
}

fail() {
  echo "bundle.sh: $1" >&2
  exit 1
}

out='' arch=90a-real from=''
while (($# > 0)); do
  case $1 in
    --out | --arch | --from)
      (($# >= 2)) || fail "$1 needs a value (see --help)"
      declare "${1#--}=$2"
      shift 2
      ;;
    -h | --help) usage && exit 0 ;;
    *) fail "unknown option $1 (see --help)" ;;
  esac
done
name=${arch//;/-}
out=${out:-build/longspan-cuda-${name//-real/}.tar.xz}
case $out in
  *.tar.xz) pack=(xz -6 -T0) ;;
  *.tar.zst) pack=(zstd -19 -T0 -q) ;;
  *) fail "--out $out: name a .tar.xz or .tar.zst file" ;;
esac

build=${from:-build/bundle}
if [[ -z $from ]]; then
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLONGSPAN_WITH_CUDA=ON \
    -DLONGSPAN_BUILD_TESTS=ON "-DCMAKE_CUDA_ARCHITECTURES=$arch" >/dev/null
  cmake --build "$build" --target "${kPrograms[@]}"
fi
for program in "${kPrograms[@]}"; do
  [[ -x $build/$program ]] || fail "$build/$program does not exist; build preset cuda first"
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stage=$work/longspan
mkdir -p "$stage"/{bin,lib,libexec}

# The tree itself: presets, tests/gpu, peers, problem lists, and the text of the quickstart corpus.
files() {
  if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files --cached --others --exclude-standard
  else
    find . -type f -not -path './build/*' -not -path './runs/*' | sed 's|^\./||'
  fi
}
files | while IFS= read -r file; do [[ ! -e $file ]] || echo "$file"; done |
  tar -cf - -T - | tar -xf - -C "$stage"

for program in "${kPrograms[@]}"; do
  install -m 755 "$build/$program" "$stage/libexec/$program"
  install -m 755 launch/bundle_start.sh "$stage/bin/$program"
done

# Every library by its soname, as the loader of this machine resolves it.
libraries() {
  LC_ALL=C ldd "$build"/liblongspan_cuda.so "${kPrograms[@]/#/$build/}" |
    sed -nE 's/^[[:space:]]*(\S+) => (\S.*) \(0x[0-9a-f]+\)$/\1 \2/p
             s/^[[:space:]]*(\S+) => not found$/\1 missing/p
             s/^[[:space:]]*(\/\S*\/(ld-linux\S*)) \(0x[0-9a-f]+\)$/\2 \1/p' | sort -u
}
package_of() {
  case $1 in
    libnccl*) echo "NCCL; with pip: nvidia-nccl-cu13" ;;
    *) echo "cuBLAS; with pip: nvidia-cublas" ;;
  esac
}
while read -r soname path; do
  if [[ $soname =~ $kExternal ]]; then
    [[ $soname == libcuda.so* ]] || echo "$soname $(package_of "$soname")" >>"$stage/lib/EXTERNAL"
  elif [[ $path == missing ]]; then
    fail "$soname, which the binaries need, is not installed here"
  elif [[ ! -e $stage/lib/$soname ]]; then
    install -m 755 "$path" "$stage/lib/$soname"
  fi
done < <(libraries)
touch "$stage/lib/EXTERNAL"
# The parts of libc that libraries of the other machine may ask for must be of the same version.
libc=$(dirname "$(libraries | sed -n 's/^libc\.so\.6 //p')")
for soname in libdl.so.2 libpthread.so.0 librt.so.1 libresolv.so.2 libutil.so.1 libm.so.6; do
  [[ -e $stage/lib/$soname || ! -e $libc/$soname ]] || install -m 755 "$libc/$soname" "$stage/lib/"
done
compgen -G "$stage/lib/ld-linux*" >/dev/null || fail "ldd names no loader"
strip --strip-unneeded "$stage"/lib/liblongspan_cuda.so "$stage"/libexec/*

{
  echo "commit $(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)"
  echo "architectures $(sed -n 's/^CMAKE_CUDA_ARCHITECTURES:[A-Z]*=//p' "$build/CMakeCache.txt")"
} >"$stage/BUNDLE"

mkdir -p "$(dirname "$out")"
tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner -cf - longspan |
  "${pack[@]}" >"$out.part"
bytes=$(stat -c %s "$out.part")
if ((bytes >= kLimitMib << 20)); then
  du -ah "$stage" | sort -rh | sed -n '2,12p' >&2
  rm -f "$out.part"
  fail "the archive would have $((bytes >> 20)) MiB; less than $kLimitMib are allowed"
fi
mv "$out.part" "$out"
echo "$out: $(awk "BEGIN { printf \"%.1f\", $bytes / 1048576 }") MiB, $(cat "$stage/BUNDLE" | tr '\n' ' ')"
echo "from the other machine: $(cut -d' ' -f1 "$stage/lib/EXTERNAL" | tr '\n' ' ')and the driver"
