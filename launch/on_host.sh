#!/usr/bin/env bash
# Runs on the machine itself, in the folder that was pushed; tpu_vm.sh and gpu_vm.sh call it, and so can you.
#
#   launch/on_host.sh install cpu|cuda12|cuda13|tpu   an environment with jaxdpo in it
#   launch/on_host.sh mount HOST:/PATH                an NFS share at /mnt/runs, for a run that several hosts share or that outlives this machine
#   launch/on_host.sh preflight ARGS...               python -m jaxdpo.preflight
#   launch/on_host.sh start ARGS...                   python -m jaxdpo.train, in the background; refused while one runs
#   launch/on_host.sh restart ARGS...                 the same, after stopping what still runs
#   launch/on_host.sh status                          "idle", "running" or "exit CODE"
#   launch/on_host.sh logs [tail's options]           the run's output; default: follow it
#   launch/on_host.sh stop                            SIGTERM: the run saves and ends with 75
#
# ~/.jaxdpo holds the run's log, pid and exit status. Variables that a run needs (HF_TOKEN, NCCL_*) go into ~/.jaxdpo/env.
set -euo pipefail

STATE=${JAXDPO_STATE:-$HOME/.jaxdpo}
VENV=${VENV:-$STATE/venv}
PYTHON=${PYTHON:-$VENV/bin/python}
STOP_SECONDS=${STOP_SECONDS:-180}
mkdir -p "$STATE"

install() {
  local extra=${1:?say for what: cpu, cuda12, cuda13 or tpu} name
  for name in python3.13 python3.12 python3.11 python3; do
    [[ -x $VENV/bin/pip ]] && break
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && "$name" -m venv "$VENV" >/dev/null 2>&1
  done || true
  if [[ ! -x $VENV/bin/pip ]]; then # TPU images bring Python 3.10, and Ubuntu's Python comes without venv: let uv fetch one
    rm -rf "$VENV"
    python3 -m pip install --quiet --user uv || python3 -m pip install --quiet --user --break-system-packages uv
    python3 -m uv venv --quiet --seed --python 3.12 "$VENV"
  fi
  [[ $extra == cpu ]] && extra=. || extra=".[$extra]"
  "$VENV/bin/python" -m pip install --quiet --upgrade "$extra"
}

mount_share() {
  local share=${1:?say which share: HOST:/PATH}
  if ! mountpoint -q /mnt/runs; then
    command -v mount.nfs >/dev/null || sudo apt-get install -y -qq nfs-common
    sudo mkdir -p /mnt/runs
    sudo mount -t nfs -o hard "$share" /mnt/runs # hard: wait for a server that is away for a moment
    sudo chmod 1777 /mnt/runs
  fi
}

is_running() { # by its arguments too: after a reboot the pid may belong to another process
  [[ -f $STATE/pid && $(ps -ww -o args= -p "$(cat "$STATE/pid")" 2>/dev/null) == *jaxdpo.train* ]]
}

status() {
  if is_running; then
    echo running
  elif [[ -f $STATE/exit ]]; then
    echo "exit $(cat "$STATE/exit")"
  elif [[ -f $STATE/pid ]]; then
    echo "exit 137" # no process was left to write it: the machine was rebooted, or everything was killed
  else
    echo idle
  fi
}

stop() {
  is_running || return 0
  local pid
  pid=$(cat "$STATE/pid")
  kill -TERM "$pid"
  for ((second = 0; second < STOP_SECONDS; second++)); do
    is_running || return 0
    sleep 1
  done
  echo "on_host.sh: still running after $STOP_SECONDS s: ending it" >&2
  kill -KILL "$pid"
  for ((second = 0; second < 30; second++)); do # giving back its memory takes a moment, and until then it owns the run folder
    is_running || return 0
    sleep 1
  done
}

start() {
  if is_running; then
    echo "on_host.sh: a run is going on: $0 logs, $0 stop, or $0 restart" >&2
    exit 1
  fi
  rm -f "$STATE/exit" "$STATE/pid"
  # A session of its own, so that it goes on when the connection ends.
  setsid nohup "$0" _run "$@" >>"$STATE/log" 2>&1 </dev/null &
  for ((tenth = 0; tenth < 100; tenth++)); do
    [[ -f $STATE/pid ]] && return 0
    sleep 0.1
  done
  echo "on_host.sh: it did not start; see $STATE/log" >&2
  exit 1
}

_run() { # in the background: the run, then its exit status
  if [[ -f $STATE/env ]]; then
    set -a
    # shellcheck disable=SC1091
    source "$STATE/env"
    set +a
  fi
  "$PYTHON" -m jaxdpo.train "$@" &
  echo $! >"$STATE/pid.new"
  mv "$STATE/pid.new" "$STATE/pid"
  local code=0
  wait $! || code=$?
  echo "$code" >"$STATE/exit.new"
  mv "$STATE/exit.new" "$STATE/exit"
}

command=${1:-help}
shift || true
case $command in
  install) install "$@" ;;
  mount) mount_share "$@" ;;
  preflight) exec "$PYTHON" -m jaxdpo.preflight "$@" ;;
  start) start "$@" ;;
  restart)
    stop
    start "$@"
    ;;
  status) status ;;
  logs) if (($#)); then tail "$@" "$STATE/log"; else tail -n 50 -F "$STATE/log"; fi ;;
  stop) stop ;;
  _run) _run "$@" ;;
  *) awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0" ;;
esac
