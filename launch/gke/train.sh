#!/usr/bin/env bash
# usage: launch/gke/train.sh WORDS...        what a container runs: `lvlm train WORDS...`, joined by JAX's detection
#
# A process that is told to end (SIGTERM: preemption, maintenance) saves and ends with status 0, and Kubernetes would
# take the job for done. Here it ends with status 75, and the JobSet starts all of them again.
#
#   LVLM=lvlm   the program
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
case ${1:-} in
  -h | --help) usage; exit ;;
  '') usage >&2; exit 2 ;;
esac
export LVLM_DISTRIBUTED=1
export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu} # else JAX takes the CPU where the TPU does not work
trap 'if [[ -n ${!:-} ]]; then kill -TERM "$!" && wait "$!" || true; fi; exit 75' TERM
"${LVLM:-lvlm}" train "$@" &
wait "$!"
