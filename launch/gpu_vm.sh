#!/usr/bin/env bash
# GPU machines: any that ssh reaches, or one Google Cloud VM, which costs money from `create` until `delete` (stopped, its disk still does).
#
#   launch/gpu_vm.sh create              Google Cloud only: make the VM
#   launch/gpu_vm.sh push                bring this folder to every host and install it there
#   launch/gpu_vm.sh preflight ARGS...   look at devices, disks and files
#   launch/gpu_vm.sh run ARGS...         python -m jaxdpo.train ARGS on every host, in the background
#   launch/gpu_vm.sh resume ARGS...      the same after stopping what still runs, and after starting a VM that was taken away
#   launch/gpu_vm.sh stop                SIGTERM: the run saves and ends with 75
#   launch/gpu_vm.sh status              idle, running, or exit CODE, of the first host
#   launch/gpu_vm.sh logs [tail's options]   the first host's output
#   launch/gpu_vm.sh delete              Google Cloud only: delete the VM with its disk, and show what is left
#
# --dry-run before the command prints what would be done. Variables:
#   HOSTS="user@a user@b"   machines of your own or of any provider; one process each, `a` the coordinator
#   COORDINATOR=a:8476      where the others reach the first host, if not by its name in HOSTS
#   EXTRA=cuda13            which build of jax: cuda13, or cuda12 for older drivers
#   SHARE=                  HOST:/PATH of an NFS share that every host mounts at /mnt/runs: needed by runs on more than one host
# and without HOSTS, on Google Cloud:
#   NAME=jaxdpo  ZONE  PROJECT  MACHINE=a3-highgpu-1g (one H100; a3-highgpu-8g: eight)  DISK=500GB
#   SPOT=1                  cheap, may be stopped at any time; 0: not

# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

[[ ${1:-} == --dry-run ]] && DRY_RUN=1 && shift
command=${1:-help}
shift || true
case $command in
  create | push | preflight | run | resume | stop | status | logs | delete) ;;
  *) help_of "$0" ;;
esac

NAME=${NAME:-jaxdpo} MACHINE=${MACHINE:-a3-highgpu-1g} DISK=${DISK:-500GB} EXTRA=${EXTRA:-cuda13} SHARE=${SHARE:-}
IMAGE_FAMILY=${IMAGE_FAMILY:-ubuntu-accelerator-2404-amd64-with-nvidia-580} IMAGE_PROJECT=${IMAGE_PROJECT:-ubuntu-os-accelerator-images}
read -ra MACHINES <<<"${HOSTS:-}"
WHERE=()

if ((${#MACHINES[@]} == 0)); then
  [[ -n ${PROJECT:-} ]] && WHERE+=("--project=$PROJECT")
  ZONE=${ZONE:-$(gcloud config get-value compute/zone 2>/dev/null || true)}
  [[ -n $ZONE ]] || die "neither HOSTS (machines that ssh reaches) nor ZONE (a VM on Google Cloud, e.g. ZONE=us-central1-a) is set"
  WHERE+=("--zone=$ZONE")
fi

needs_cloud() {
  ((${#WHERE[@]})) || die "$1 is for a VM on Google Cloud; the machines in HOSTS are made and deleted at their provider"
}

first_host() {
  if ((${#WHERE[@]})); then
    act gcloud compute ssh "$NAME" "${WHERE[@]}" "--command=$1"
  else
    act ssh "${MACHINES[0]}" "$1"
  fi
}

everywhere() { # the command on every host; with several, each gets its process id
  if ((${#MACHINES[@]} <= 1)); then
    first_host "$1"
    return
  fi
  local number=0 address=${MACHINES[0]#*@} environment waiting=() failed=0
  for host in "${MACHINES[@]}"; do
    environment="export JAX_COORDINATOR_ADDRESS=${COORDINATOR:-$address:8476} JAX_PROCESS_COUNT=${#MACHINES[@]} JAX_PROCESS_ID=$number"
    if [[ -n $DRY_RUN ]]; then
      act ssh "$host" "$environment; $1"
    else
      # shellcheck disable=SC2029 # meant: the words are put together here
      ssh "$host" "$environment; $1" &
      waiting+=($!)
    fi
    number=$((number + 1))
  done
  for job in ${waiting[@]+"${waiting[@]}"}; do wait "$job" || failed=1; done
  return "$failed"
}

create() {
  needs_cloud create
  local options=("--machine-type=$MACHINE" "--boot-disk-size=$DISK" --boot-disk-type=pd-ssd --maintenance-policy=TERMINATE)
  options+=("--image-family=$IMAGE_FAMILY" "--image-project=$IMAGE_PROJECT")
  [[ $SPOT == 1 ]] && options+=(--provisioning-model=SPOT --instance-termination-action=STOP) # stopped, not deleted: the disk has the run
  act gcloud compute instances create "$NAME" "${WHERE[@]}" "${options[@]}"
  until_reached
}

until_reached() { # a VM that has just been started does not answer yet
  for ((try = 0; try < 30; try++)); do
    first_host true && return 0
    sleep 10
  done
  say "$NAME does not answer"
  return 1
}

push() {
  local file
  file=$(mktemp -d)/jaxdpo.tar.gz
  pack "$file"
  if ((${#WHERE[@]})); then
    act gcloud compute scp "$file" "$NAME:jaxdpo.tar.gz" "${WHERE[@]}"
  fi
  for host in ${MACHINES[@]+"${MACHINES[@]}"}; do
    act scp "$file" "$host:jaxdpo.tar.gz"
  done
  everywhere "$UNPACK && $(on_host install "$EXTRA")"
  [[ -z $SHARE ]] || everywhere "$(on_host mount "$SHARE")"
  rm -rf "$(dirname "$file")"
}

resume() {
  if ((${#WHERE[@]})); then
    act gcloud compute instances start "$NAME" "${WHERE[@]}"
    until_reached
  fi
  everywhere "$(on_host restart "$@")"
}

delete() {
  needs_cloud delete
  act gcloud compute instances delete "$NAME" "${WHERE[@]}" --delete-disks=all --quiet || say "could not delete $NAME; see below"
  say "what is left (nothing more to pay if both lists are empty; shares are apart):"
  act gcloud compute instances list "--filter=name=$NAME"
  act gcloud compute disks list "--filter=name~$NAME"
}

case $command in
  create | push | delete) "$command" ;;
  preflight) everywhere "$(on_host preflight "$@")" ;;
  run) everywhere "$(on_host start "$@")" ;;
  resume) resume "$@" ;;
  stop) everywhere "$(on_host stop)" ;;
  status) first_host "$(on_host status) || echo idle" ;;
  logs) first_host "$(on_host logs "$@")" ;;
esac
