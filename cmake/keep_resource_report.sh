#!/bin/sh
# Launcher of nvcc: runs the compiler and moves what ptxas says about kernels (-Xptxas -v) from its
# messages into OBJECT.resources, for tests/gpu/check_resources.py. Warnings and errors stay.
# Usage: keep_resource_report.sh NVCC ARGUMENT... -o OBJECT
object=''
previous=''
for argument in "$@"; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
case $object in
  *.o) ;;
  *) exec "$@" ;; # not a compilation
esac
rm -f "$object.resources"
"$@" 2>"$object.messages"
status=$?
report='^ptxas info|^    [0-9]+ bytes stack frame|^    [0-9]+ bytes cumulative'
grep -E "$report" "$object.messages" >"$object.resources"
grep -Ev "$report" "$object.messages" >&2
rm -f "$object.messages"
exit "$status"
