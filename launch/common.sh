# shellcheck shell=bash
# What tpu_vm.sh, tpu_babysit.sh and gpu_vm.sh share. Sourced, not run. Works with the bash 3.2 of macOS.
set -euo pipefail

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$LAUNCH")
ME=$(basename "$0")
DRY_RUN=${DRY_RUN:-}
SPOT=${SPOT:-1}

say() { echo "$ME: $*" >&2; }

die() { # a mistake in how the script was called
  say "$*"
  exit 2
}

act() { # do a command, or with --dry-run print it
  if [[ -n $DRY_RUN ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

quoted() { # the words as a shell would take them
  local word line=""
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_@%+=:,./~-]*) word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    line="$line $word"
  done
  echo "${line# }"
}

on_host() { # the command line for launch/on_host.sh on the machine, from its folder
  echo "cd jaxdpo && launch/on_host.sh $(quoted "$@")"
}

help_of() { # the comment at the top of a script, without its first line
  awk 'NR == 1 { next } !/^#/ || /shellcheck/ { exit } { sub(/^# ?/, ""); print }' "$1"
  exit 0
}

pack() { # what a machine needs of this folder, into one file
  # macOS's tar adds files of its own by default.
  (cd "$ROOT" && act env COPYFILE_DISABLE=1 tar -czf "$1" --exclude=__pycache__ jaxdpo configs launch pyproject.toml README.md LICENSE)
}

# shellcheck disable=SC2034 # the scripts that source this use it
UNPACK='mkdir -p jaxdpo && tar -xzf jaxdpo.tar.gz -C jaxdpo'
