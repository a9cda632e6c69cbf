#!/usr/bin/env bash
# A run of several processes on this machine, as several hosts would do it, over loopback:
#   launch/local_processes.sh 2 --config configs/hh-rlhf.yaml run_dir=runs/two mesh.fsdp=2
#   MODULE=jaxdpo.preflight launch/local_processes.sh 2 ...     another command than train
#
# Each process has DEVICES=1 devices of the CPU (or, with JAX_PLATFORMS=cuda, one GPU: that with its number).
# SIGTERM and Ctrl-C are passed on to all of them, once each time; they save and end with 75.
# Exit status: the worst of theirs, a fault (1 or 2) before being killed or aborted, that before 75, and 75 before 0.
set -uo pipefail
set -m # each process in a group of its own, so that Ctrl-C reaches it through this script only, and not twice

count=${1:-}
if [[ ! $count =~ ^[1-9][0-9]*$ ]]; then
  awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0" >&2
  exit 2
fi
shift

PYTHON=${PYTHON:-python}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_CPU_DEVICES=${DEVICES:-1} JAX_PROCESS_COUNT=$count
# XLA's CPU threads: with no more than a small machine has cores, simulated devices deadlock in collectives.
export NPROC=${NPROC:-32}
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-$("$PYTHON" -c "$free_port")} || exit 1
export JAX_COORDINATOR_ADDRESS

processes=() signals=0
# shellcheck disable=SC2329 # the trap calls it
pass_on() {
  signals=$((signals + 1))
  kill -TERM "${processes[@]}" 2>/dev/null
}
trap pass_on TERM INT

for ((number = 0; number < count; number++)); do
  if [[ $JAX_PLATFORMS == cuda* ]]; then
    export CUDA_VISIBLE_DEVICES=$number
  fi
  JAX_PROCESS_ID=$number "$PYTHON" -m "${MODULE:-jaxdpo.train}" "$@" </dev/null &
  processes+=($!)
done

worst=0
for process in "${processes[@]}"; do
  before=-1
  while ((before != signals)); do # a signal ends the wait, not the process
    before=$signals code=0
    wait "$process" || code=$?
  done
  echo "local_processes.sh: process $process ended with $code" >&2
  case $worst,$code in
    [12],* | *,0) ;;
    *,[12] | 0,* | 75,*) worst=$code ;;
    *,75) ;;
    *) ((code > worst)) && worst=$code ;;
  esac
done
exit "$worst"
