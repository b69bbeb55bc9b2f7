#!/usr/bin/env bash
# usage: launch/gpu_node.sh WORDS...        runs `lvlm train WORDS...` on all GPUs of this machine, by one process
#
#   launch/gpu_node.sh --config llava15_align --workdir runs/align
#
# On several machines run the same line on each, with its own NODE and a workdir that all of them see:
#
#   NODES=2 NODE=0 COORDINATOR=node0:8476 launch/gpu_node.sh --config llava15_align --workdir /shared/align
#
#   NODES=1            how many machines there are
#   NODE=0             which one this is, from 0
#   COORDINATOR=H:P    host and port of machine 0; the others must reach it
#   LVLM=lvlm          the program
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
case ${1:-} in
  -h | --help) usage; exit ;;
  '') usage >&2; exit 2 ;;
esac
if [[ ${NODES:-1} != 1 ]]; then
  export JAX_NUM_PROCESSES=$NODES
  export JAX_PROCESS_ID=${NODE:?which of the $NODES machines is this? NODE=0 is the one that COORDINATOR names}
  export JAX_COORDINATOR_ADDRESS=${COORDINATOR:?host and port of machine 0, as in COORDINATOR=node0:8476}
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda} # else JAX takes the CPU where CUDA does not work
exec "${LVLM:-lvlm}" train "$@"
