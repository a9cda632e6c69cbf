#!/usr/bin/env bash
# A Cloud TPU VM or slice. It costs money from `create` until `delete`, running or not.
#
#   launch/tpu_vm.sh create              request it, and wait until it is up
#   launch/tpu_vm.sh push                bring this folder to every host and install it there
#   launch/tpu_vm.sh preflight ARGS...   look at devices, disks and files before paying for steps
#   launch/tpu_vm.sh run ARGS...         python -m jaxdpo.train ARGS on every host, in the background
#   launch/tpu_vm.sh resume ARGS...      the same after stopping what still runs; ARGS as before
#   launch/tpu_vm.sh stop                SIGTERM: the run saves and ends with 75
#   launch/tpu_vm.sh status              what the run of host 0 does: idle, running, exit CODE
#   launch/tpu_vm.sh logs [tail's options]   host 0's output (WORKER=2: host 2's)
#   launch/tpu_vm.sh state               what the machine does: NONE, WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, ...
#   launch/tpu_vm.sh delete              give the machine back, and show what is left
#
# --dry-run before the command prints what would be done. tpu_babysit.sh does all of this until the run is done.
# Variables:
#   TPU=v5e-8      which: v4-*, v5e-*, v5p-*, v6e-*
#   NAME=jaxdpo    its name            ZONE  PROJECT     default: gcloud's own setting
#   SPOT=1         cheap, may be taken away at any time; 0: not
#   SHARE=         HOST:/PATH of an NFS share (Filestore) that every host mounts at /mnt/runs: needed by runs on more than one host
#   WAIT=          give up waiting in the queue after this long, e.g. 2h

# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

[[ ${1:-} == --dry-run ]] && DRY_RUN=1 && shift
command=${1:-help}
shift || true
case $command in
  create | push | preflight | run | resume | stop | status | logs | state | delete) ;;
  *) help_of "$0" ;;
esac

TPU=${TPU:-v5e-8} NAME=${NAME:-jaxdpo} SHARE=${SHARE:-} WAIT=${WAIT:-} POLL=${POLL:-20}

case $TPU in
  v4-*) TYPE=$TPU VERSION=${VERSION:-tpu-ubuntu2204-base} ;;
  v5e-*) TYPE=v5litepod-${TPU#v5e-} VERSION=${VERSION:-v2-alpha-tpuv5-lite} ;;
  v5p-*) TYPE=$TPU VERSION=${VERSION:-v2-alpha-tpuv5} ;;
  v6e-*) TYPE=$TPU VERSION=${VERSION:-v2-alpha-tpuv6e} ;;
  *) die "TPU=$TPU: must begin with v4-, v5e-, v5p- or v6e-" ;;
esac

WHERE=()
[[ -n ${PROJECT:-} ]] && WHERE+=("--project=$PROJECT")
ZONE=${ZONE:-$(gcloud config get-value compute/zone 2>/dev/null || true)}
[[ -n $ZONE ]] || die "ZONE is not set: say where, e.g. ZONE=us-west4-a"
WHERE+=("--zone=$ZONE")

queue() { act gcloud compute tpus queued-resources "$@" "${WHERE[@]}"; }

everywhere() { act gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all "--command=$1"; }

on_one() { act gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=${WORKER:-0}" "--command=$1"; }

state() {
  local found
  if found=$(queue describe "$NAME" "--format=value(state.state)" 2>&1); then
    echo "$found"
  elif [[ $found == *NOT_FOUND* || $found == *"not found"* ]]; then
    echo NONE
  else # no connection, no rights: not the same as no machine
    say "$found"
    return 1
  fi
}

create() {
  local options=("--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$VERSION")
  [[ $SPOT == 1 ]] && options+=(--spot)
  [[ -n $WAIT ]] && options+=("--valid-until-duration=$WAIT")
  queue create "$NAME" "${options[@]}"
  if [[ -n $DRY_RUN ]]; then
    state
    return 0
  fi
  local now
  while now=$(state); [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDING | SUSPENDED | DELETING | NONE) say "$NAME is $now; look with: gcloud compute tpus queued-resources describe $NAME ${WHERE[*]}" && return 1 ;;
    esac
    say "$NAME: ${now:-no answer}"
    sleep "$POLL"
  done
}

push() {
  local file
  file=$(mktemp -d)/jaxdpo.tar.gz
  pack "$file"
  act gcloud compute tpus tpu-vm scp "$file" "$NAME:jaxdpo.tar.gz" "${WHERE[@]}" --worker=all
  everywhere "$UNPACK && $(on_host install tpu)"
  [[ -z $SHARE ]] || everywhere "$(on_host mount "$SHARE")"
  rm -rf "$(dirname "$file")"
}

delete() {
  queue delete "$NAME" --force --quiet || say "could not delete $NAME; see below whether it is still there"
  say "what is left in $ZONE (nothing more to pay if both lists are empty; shares and disks are apart):"
  queue list
  act gcloud compute tpus tpu-vm list "${WHERE[@]}"
}

case $command in
  create | push | delete | state) "$command" ;;
  preflight) everywhere "$(on_host preflight "$@")" ;;
  run) everywhere "$(on_host start "$@")" ;;
  resume) everywhere "$(on_host restart "$@")" ;;
  stop) everywhere "$(on_host stop)" ;;
  status) on_one "$(on_host status) || echo idle" ;; # idle too where nothing was pushed
  logs) on_one "$(on_host logs "$@")" ;;
esac
