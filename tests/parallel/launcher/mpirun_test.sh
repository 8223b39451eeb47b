#!/bin/bash
# Checks launch/mpirun.sh: exit status, output, environment, signals, killed ranks.
# usage: mpirun_test.sh MPIRUN_SH PROBE
set -um # job control, so that background jobs do not ignore SIGINT

launcher=$1 probe=$2
work=$(mktemp -d)
failures=0

finish() {
  ((BASHPID == $$)) || return # a background copy of this shell that a signal ended
  rm -rf "$work"
  exit $((failures > 0))
}
trap finish EXIT

check() { # what actual expected
  if [[ $2 == "$3" ]]; then
    echo "ok: $1"
  else
    echo "FAILED: $1: got \"$2\" instead of \"$3\""
    ((++failures))
  fi
}

check_has() { # what text part
  if [[ $2 == *"$3"* ]]; then
    echo "ok: $1"
  else
    echo "FAILED: $1: \"$2\" lacks \"$3\""
    ((++failures))
  fi
}

run() { # arguments of the launcher; sets output, errors, status
  output=$(timeout 60 "$launcher" "$@" 2>"$work/errors")
  status=$?
  errors=$(<"$work/errors")
}

# Starts a job in the background and waits until its ranks are up; sets job.
start() {
  rm -f "$work/output"
  "$launcher" "$@" >"$work/output" 2>"$work/errors" &
  job=$!
  local i
  for ((i = 0; i < 300; ++i)); do
    grep -qs ready "$work/output" && return
    sleep 0.1
  done
  echo "FAILED: the job did not start: $*"
  ((++failures))
}

# Waits for the job at most this many seconds; sets status (empty: it still ran).
finished_within() {
  local start=$SECONDS
  while kill -0 "$job" 2>/dev/null && ((SECONDS - start <= $1)); do sleep 0.1; done
  status=
  if ! kill -0 "$job" 2>/dev/null; then
    wait "$job"
    status=$?
  else
    kill -KILL "$job"
  fi
}

rank_pids() { sed -n 's/^pid //p' "$work/output"; }

check_ranks_gone() { # what
  local i pid alive
  for ((i = 0; i < 50; ++i)); do
    alive=
    for pid in $(rank_pids); do kill -0 "$pid" 2>/dev/null && alive+=" $pid"; done
    [[ -z $alive ]] && break
    sleep 0.1
  done
  check "$1: no rank is left" "$alive" ""
  for pid in $alive; do kill -KILL "$pid"; done
}

exit_status_tests() {
  local code
  for code in 0 2 3; do
    run -n 2 --quiet -- "$probe" exit $code
    check "exit status $code passes through" "$status" $code
    check "--quiet leaves the program's output" "$output" "this is the output"
    check "--quiet drops mpirun's banner (status $code)" "$errors" ""
  done
  run -n 2 "$probe" exit 2
  check "exit status 2 without --quiet" "$status" 2
  check_has "without --quiet mpirun explains" "$errors" "non-zero"
  run -n 2 --quiet "$probe" abort-one
  check "an abort of one rank ends the job with 3" "$status" 3
  check_has "an abort says why" "$errors" "a test wants it"
  run -n 2 --quiet "$probe" throw-one
  check "an exception of one rank ends the job with 3" "$status" 3
  run -n 4 --quiet "$probe" exit 0 # more ranks than a small machine has cores
  check "oversubscription" "$status" 0
  output=$("$launcher" -n 2 --quiet "$probe" exit 0 <&-)
  check "closed standard input" "$? $output" "0 this is the output"
}

argument_tests() {
  local arguments
  for arguments in "" "-n" "-n 0" "-n two true" "--threads x true" "--fast true" "-n 2 --"; do
    # shellcheck disable=SC2086
    run $arguments
    check "refused: mpirun.sh $arguments" "$status" 2
    check_has "one line for: mpirun.sh $arguments" "$(wc -l <<<"$errors") $errors" "1 mpirun.sh: "
  done
  run -n 1 "$work/missing"
  check "a missing program" "$status" 127
  check_has "a missing program is named" "$errors" "$work/missing"
  mkdir "$work/bin"
  ln -s /bin/bash "$work/bin/bash"
  errors=$(PATH=$work/bin "$launcher" -n 1 true 2>&1)
  check "mpirun is not installed" "$?" 127
  check_has "mpirun is not installed: the remedy" "$errors" "apt-get install openmpi-bin"
  run --help
  check "--help" "$status" 0
}

environment_tests() {
  local cores each
  cores=$(nproc)
  unset OMP_NUM_THREADS OMP_WAIT_POLICY
  run -n 1 --quiet "$probe" environment <<<"some data"
  check "one rank uses the machine" "$output" \
    "threads=$cores cores=$cores omp=$cores wait=passive terminal=0 stdin=empty"
  each=$((cores / 2 > 0 ? cores / 2 : 1))
  run -n 2 --quiet "$probe" environment
  ((cores >= 2)) && check "two ranks share it, bound" "$(sort -u <<<"$output")" \
    "threads=$each cores=$each omp=$each wait=passive terminal=0 stdin=empty"
  run -n 2 --no-bind --quiet "$probe" environment
  check "--no-bind" "$(sort -u <<<"$output")" \
    "threads=$each cores=$cores omp=$each wait=passive terminal=0 stdin=empty"
  run -n $((cores + 1)) --quiet "$probe" environment
  check "more ranks than cores are not bound" "$(sort -u <<<"$output")" \
    "threads=1 cores=$cores omp=1 wait=passive terminal=0 stdin=empty"
  run -n 1 --threads $((cores + 3)) --quiet "$probe" environment
  check "--threads" "$output" \
    "threads=$((cores + 3)) cores=$cores omp=$((cores + 3)) wait=passive terminal=0 stdin=empty"
  export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=active
  run -n 1 --no-bind --quiet "$probe" environment
  check "the user's OMP_NUM_THREADS and OMP_WAIT_POLICY win" "$output" \
    "threads=1 cores=$cores omp=1 wait=active terminal=0 stdin=empty"
  unset OMP_NUM_THREADS OMP_WAIT_POLICY
}

signal_tests() {
  local signal
  for signal in INT TERM USR1; do
    start -n 2 --quiet "$probe" stop
    kill -$signal "$job"
    finished_within 15
    check "$signal lets the ranks finish" "$status" 0
    check "$signal reaches every rank once" "$(grep -c 'stopped after 1 signal' "$work/output")" 2
  done
  for signal in INT TERM; do
    start -n 2 --quiet "$probe" deaf
    kill -$signal "$job"
    sleep 1
    check "deaf ranks outlive the first $signal" "$(kill -0 "$job" && echo alive)" alive
    kill -$signal "$job"
    finished_within 10
    check "a second $signal kills within 10 s" "${status:+ended}" ended
    check "a second $signal gives a failure status" "$((status > 0))" 1
    check_ranks_gone "second $signal"
  done
  # Too early for anybody to listen: whatever happens, it happens soon and leaves nothing.
  "$launcher" -n 2 --quiet "$probe" stop >"$work/output" 2>"$work/errors" &
  job=$!
  sleep 0.03
  kill -TERM "$job"
  finished_within 15
  check "a signal during the start ends the job" "${status:+ended}" ended
  check_ranks_gone "signal during the start"
}

kill_tests() {
  start -n 2 --quiet "$probe" deaf
  kill -KILL "$(rank_pids | tail -1)"
  finished_within 10
  check "kill -9 of a rank ends the job within 10 s" "${status:+ended}" ended
  check "kill -9 of a rank gives a failure status" "$((status > 0))" 1
  check_ranks_gone "kill -9 of a rank"

  start -n 2 --quiet "$probe" deaf
  kill -KILL "$(ps -o ppid= -p "$(rank_pids | head -1)" | tr -d ' ')"
  finished_within 10
  check "kill -9 of mpirun ends the job within 10 s" "${status:+ended}" ended
  check "kill -9 of mpirun gives a failure status" "$((status > 0))" 1
  check_ranks_gone "kill -9 of mpirun"

  start -n 2 --quiet "$probe" deaf
  kill -KILL "$job"
  wait "$job" 2>/dev/null
  check_ranks_gone "kill -9 of the script"
}

exit_status_tests
argument_tests
environment_tests
signal_tests
kill_tests
echo "$failures failures"
