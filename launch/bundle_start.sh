#!/bin/sh
# Starts a program of a bundle (launch/bundle.sh) with the libraries in it. From the machine come only
# those named in lib/EXTERNAL and the driver: they are looked for in LD_LIBRARY_PATH, among the
# system's libraries, in CUDA_HOME, and in the packages of python3.
self=$(readlink -f "$0")
name=$(basename "$self")
root=$(dirname "$(dirname "$self")")

has() { # directory: whether it holds $library
  [ -n "$1" ] && [ -e "$1/$library" ]
}

# Sets `place` to the folder of $library, or to nothing.
find_library() {
  place=''
  old_ifs=$IFS
  IFS=:
  for folder in $LD_LIBRARY_PATH; do
    if has "$folder"; then place=$folder && break; fi
  done
  IFS=$old_ifs
  [ -n "$place" ] && return
  system=$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null |
    sed -n "s|^[[:space:]]*$library .* => ||p" | head -n 1)
  [ -n "$system" ] && place=$(dirname "$system") && return
  for folder in "${CUDA_HOME:+$CUDA_HOME/lib64}" "${CUDA_PATH:+$CUDA_PATH/lib64}" \
    /usr/local/cuda/lib64 /usr/local/nvidia/lib64 /opt/cuda/lib64; do
    if has "$folder"; then place=$folder && return; fi
  done
  if [ -z "${python_folders+asked}" ]; then
    python_folders=$(python3 -c '
import glob, sys
for entry in sys.path:
    for folder in glob.glob(glob.escape(entry or ".") + "/nvidia/*/lib"):
        print(folder)' 2>/dev/null)
  fi
  while IFS= read -r folder; do
    if has "$folder"; then place=$folder && break; fi
  done <<END
$python_folders
END
}

path=$root/lib
missing=''
while read -r library package; do
  find_library
  if [ -z "$place" ]; then
    missing="$missing $library ($package)"
  else
    case :$path: in *":$place:"*) ;; *) path=$path:$place ;; esac
  fi
done <"$root/lib/EXTERNAL"
if [ -n "$missing" ]; then
  echo "$name: not found:$missing; install it or name its folder in LD_LIBRARY_PATH or CUDA_HOME" >&2
  exit 2
fi
path=$path${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# Where containers put the driver without telling the loader.
for folder in /usr/local/nvidia/lib64 /usr/lib/wsl/lib; do
  if [ -e "$folder/libcuda.so.1" ]; then path=$path:$folder; fi
done
for loader in "$root"/lib/ld-linux*; do break; done
exec "$loader" --library-path "$path" --argv0 "$0" "$root/libexec/$name" "$@"
