#!/usr/bin/env bash
# usage: launch/local.sh N WORDS...        runs `lvlm train WORDS...` in N processes on this machine
#
#   launch/local.sh 2 --config quickstart:tiny --workdir runs/two
#
# The processes are joined as the hosts of a pod would be. Each line of output begins with its process's number. Ctrl-C
# or SIGTERM asks all of them to save and end; a second one ends them at once. When one fails, the others cannot go on:
# they have a moment to say so, then they are ended. The status of the first that failed is the script's.
#
#   DEVICES=4   virtual CPU devices of each process (default: one, or what XLA_FLAGS says)
#   PORT=8476   where process 0 listens (default: a free port)
#   GRACE=60    seconds that the others have when one has failed
#   LVLM=lvlm   the program
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
fail() { echo "launch/local.sh: $1" >&2; exit 2; }
case ${1:-} in
  -h | --help) usage; exit ;;
  '') usage >&2; exit 2 ;;
esac
[[ $1 =~ ^[1-9][0-9]*$ ]] || fail "N=$1: how many processes? launch/local.sh 2 --config NAME --workdir DIR"
[[ ${DEVICES:-1} =~ ^[1-9][0-9]*$ ]] || fail "DEVICES=$DEVICES: how many devices each process has, as a number"
processes=$1
shift

port=${PORT:-$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}  # processes cannot share an accelerator
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes
if [[ -n ${DEVICES:-} ]]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi

pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT
pids=()
running=$processes status=0 signal=TERM deadline=
ask() { # to save and end; whom it asks a second time it ends
  ((running == 0)) || kill -"$signal" "${pids[@]}" 2>/dev/null || true
  signal=KILL
}
trap ask INT TERM HUP

set -m # a process group each, so that Ctrl-C reaches them by `ask` alone
for ((i = 0; i < processes; i++)); do
  mkfifo "$pipes/$i"
  sed -u "s/^/[$i] /" <"$pipes/$i" &
  exec 3>"$pipes/$i" # not left to the process, which may be ended before it has opened anything
  JAX_PROCESS_ID=$i "${LVLM:-lvlm}" train "$@" >&3 2>&1 </dev/null 3>&- &
  exec 3>&-
  pids+=($!)
done
set +m

exec 4>&2 # what bash says of processes that were killed is not for the reader
while ((running)); do
  for i in "${!pids[@]}"; do
    if kill -0 "${pids[i]}"; then continue; fi
    wait "${pids[i]}" && ended=0 || ended=$?
    kill -KILL -- "-${pids[i]}" || true # what it left behind
    unset "pids[i]"
    running=$((running - 1))
    if ((ended && !status)); then
      status=$ended
      echo "launch/local.sh: process $i ended with status $ended" >&4
      deadline=$((SECONDS + ${GRACE:-60})) signal=KILL
    fi
  done
  if [[ -n $deadline ]] && ((SECONDS >= deadline)); then ask; fi
  if ((running)); then sleep 0.2 || true; fi # Ctrl-C ends the sleep too
done 2>/dev/null
wait # for the last lines
exit "$status"
