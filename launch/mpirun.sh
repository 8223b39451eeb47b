#!/bin/bash
# Starts N ranks of a program on this machine under Open MPI. See --help.
set -u

readonly kName=mpirun.sh
readonly kKillAfterSeconds=3 # how long mpirun may take to end its ranks after the second signal

usage() {
  cat <<'EOF'
usage: mpirun.sh [-n N] [--threads K] [--no-bind] [--quiet] [--] PROGRAM [ARGUMENT...]

Starts N ranks of PROGRAM on this machine (default 1; more ranks than cores is fine).

  -n N          number of ranks
  --threads K   host threads of each rank (default: OMP_NUM_THREADS, else cores / N, at least 1)
  --no-bind     leave placement to the kernel; the default binds each rank to K cores if there are
                enough
  --quiet       drop what mpirun itself prints; the output of PROGRAM is never touched

The first INT or TERM (Ctrl-C) asks the ranks to stop: they receive SIGUSR1. A second one kills the
job. SIGUSR1 is passed on. Standard input is not. The exit status is that of mpirun: the status of
the first rank that failed, or 0.
EOF
}

fail() { # status message
  echo "$kName: $2" >&2
  exit "$1"
}

positive() { # option value
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail 2 "$1 needs a positive number, not \"$2\""
}

ranks=1 threads='' bind=1 quiet=0
while (($# > 0)); do
  case $1 in
    -n | --threads)
      (($# >= 2)) || fail 2 "$1 needs a number"
      positive "$1" "$2"
      if [[ $1 == -n ]]; then ranks=$2; else threads=$2; fi
      shift 2
      ;;
    --no-bind) bind=0 && shift ;;
    --quiet) quiet=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    -*) fail 2 "unknown option $1 (see --help)" ;;
    *) break ;;
  esac
done
(($# > 0)) || fail 2 "no program given (see --help)"

remedy="on Debian or Ubuntu: apt-get install openmpi-bin libopenmpi-dev"
command -v mpirun >/dev/null || fail 127 "mpirun is not installed; $remedy"
[[ $(mpirun --version 2>&1) == *"Open MPI"* ]] ||
  fail 127 "$(command -v mpirun) is not the one of Open MPI; $remedy"
command -v "$1" >/dev/null || fail 127 "cannot run \"$1\": no such program"

cores=$(nproc) # respects the affinity mask of a container
if [[ -z $threads ]]; then
  threads=${OMP_NUM_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}
  positive OMP_NUM_THREADS "$threads"
fi
export OMP_NUM_THREADS=$threads
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

# One machine: shared memory only, so nothing probes networks (and warns about them); the launcher's
# own control channel stays on the loopback device.
arguments=(-n "$ranks" --host "localhost:$ranks"
  --mca plm isolated --mca ras ^slurm,tm,lsf,gridengine,alps --mca oob_tcp_if_include lo
  --mca pml ob1 --mca btl self,vader --mca osc ^ucx
  --mca btl_base_warn_component_unused 0)
((EUID == 0)) && arguments+=(--allow-run-as-root)
((quiet)) && arguments+=(--quiet)
if ((ranks * threads > cores)); then
  arguments+=(--oversubscribe --bind-to none --mca mpi_yield_when_idle 1)
elif ((bind)); then
  arguments+=(--map-by "slot:PE=$threads" --bind-to core)
else
  arguments+=(--bind-to none)
fi
# Copies from another process's memory fail where a container filters system calls.
if grep -qs '^Seccomp:[[:space:]]*2' /proc/self/status; then
  arguments+=(--mca btl_vader_single_copy_mechanism none)
fi

# Prints the processes of the session that mpirun leads: mpirun and the ranks.
session() {
  local stat line pid rest
  for stat in /proc/[0-9]*/stat; do
    { read -r line <"$stat"; } 2>/dev/null || continue
    # After the command name, which may hold anything: state, parent, group, session.
    pid=${line%% *}
    read -r -a rest <<<"${line##*) }"
    [[ ${rest[3]} == "$job" ]] && echo "$pid"
  done
}

# mpirun drops a SIGUSR1 that comes before it has started its ranks, and one that comes before it
# has installed its handler ends it.
ask_to_stop() {
  local tries
  for ((tries = 0; tries < 100; ++tries)); do
    (($(session | wc -l) > ranks)) && break
    kill -0 "$job" 2>/dev/null || return
    sleep 0.05
  done
  kill -USR1 "$job" 2>/dev/null
}

kill_session() {
  local pid
  for pid in $(session); do kill -KILL "$pid" 2>/dev/null; done
}

signals=0
on_stop_signal() {
  ((++signals))
  if ((signals == 1)); then
    ask_to_stop
    return
  fi
  kill -TERM "$job" 2>/dev/null
  (sleep "$kKillAfterSeconds" && kill_session) </dev/null &>/dev/null &
}

# The ranks write to a terminal that mpirun makes for them; this says whether ours is one.
if [[ -t 1 ]]; then export LONGSPAN_TERMINAL=1; else export LONGSPAN_TERMINAL=0; fi

# A session of its own: Ctrl-C in a terminal reaches only this script, never mpirun or the ranks.
# When this script is killed, mpirun ends the job.
setsid setpriv --pdeathsig TERM mpirun "${arguments[@]}" "$@" </dev/null &
job=$!
trap on_stop_signal INT TERM
trap ask_to_stop USR1
wait "$job"
status=$?
# A trapped signal interrupts wait before the job has ended.
while kill -0 "$job" 2>/dev/null; do
  wait "$job"
  status=$?
done
# The job may have ended while a signal was handled: bash still knows its status (127: it was
# collected above).
wait "$job" 2>/dev/null
late=$?
((late == 127)) || status=$late
exit "$status"
