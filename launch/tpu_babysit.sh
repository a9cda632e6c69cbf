#!/usr/bin/env bash
# Keeps a run going on a TPU VM until it is done: creates the machine, starts the run, and when the machine is taken away, another.
#
#   TPU=v5e-16 ZONE=us-west4-a SHARE=10.0.0.2:/runs launch/tpu_babysit.sh --config configs/v5e-16.yaml run_dir=/mnt/runs/mine ...
#
# Arguments and variables are those of `tpu_vm.sh run`. It must go on all the while itself: in tmux, or on a small VM.
# What the run's exit status means: 0 done; 1 and 2 a fault that a restart does not fix: stop; 75 (saved after a signal, or another
# host is gone) and anything else (killed, aborted, watchdog): run again, at most FAULTS=5 times in a row for runs of less than 10 minutes.
# At the end the machine is deleted if there is a SHARE to hold the run; else it is kept and costs on. KEEP=1 keeps it always.
# Exit status: the run's.

# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

FAULTS=${FAULTS:-5} SHARE=${SHARE:-} KEEP=${KEEP:-} POLL=${POLL:-60}
LONG_ENOUGH=600 # seconds: a run that lasted this long got somewhere, and its end is the first again

if (($# == 0)) || [[ $1 == --help ]]; then
  help_of "$0"
fi

tpu() { POLL=$POLL "$LAUNCH/tpu_vm.sh" "$@"; }

faults=0 began=$SECONDS

machine_is_up() { # make a machine where there is none; false: look again later
  case $(tpu state) in
    ACTIVE) return 0 ;;
    NONE) tpu create ;;
    FAILED | SUSPENDED)
      say "the machine was taken away: making another"
      tpu delete && tpu create
      ;;
    *) return 1 ;; # in the queue, on its way out, or no answer
  esac
}

begin() { # run or resume, and its arguments
  began=$SECONDS
  if ! tpu "$@"; then
    say "not every host started: stopping those that did"
    tpu stop || true
  fi
}

finish() { # exit status, and what it means
  say "$2 (exit $1)"
  tpu logs -n 30 >&2 || true
  if [[ -n $SHARE && -z $KEEP ]]; then
    tpu delete
  else
    say "the machine is kept and COSTS MONEY until launch/tpu_vm.sh delete"
  fi
  exit "$1"
}

go_on_after() { # exit status
  case $1 in
    0) finish 0 "done" ;;
    1 | 2) finish "$1" "stopped at a fault that a restart does not fix" ;;
    *)
      ((SECONDS - began < LONG_ENOUGH)) || faults=0
      ((++faults <= FAULTS)) || finish "$1" "ended early $faults times in a row"
      say "ended with $1: running again ($faults of $FAULTS)"
      ;;
  esac
}

while :; do
  answer=""
  if machine_is_up; then
    answer=$(tpu status | tail -n 1 | tr -d '\r') || true # a machine that is being taken away does not answer
  fi
  case $answer in
    idle) tpu push && begin run "$@" ;;
    exit\ *) go_on_after "${answer#exit }" && begin resume "$@" ;;
  esac
  sleep "$POLL"
done
