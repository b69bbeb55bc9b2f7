#!/usr/bin/env bash
# usage: launch/tpu_vm.sh COMMAND [WORDS...]        one run of `lvlm train` on a slice of Cloud TPU VMs, v4 to v6e
#
#   export TPU_NAME=align ZONE=us-east5-a ACCELERATOR=v5p-128
#   launch/tpu_vm.sh create --spot
#   launch/tpu_vm.sh install
#   launch/tpu_vm.sh mount my-bucket
#   launch/tpu_vm.sh train --config llava15_align --workdir my-bucket/align
#   launch/tpu_vm.sh logs
#   launch/tpu_vm.sh delete
#
#   create [FLAGS]    asks for the slice by a queued resource and waits until it is there; FLAGS go to gcloud
#                     (--spot, --reserved, --valid-until-duration=6h, --network=..., --service-account=...)
#   install           the commit that is checked out here, on all workers, with the same versions on each
#   mount BUCKET      gs://BUCKET as the folder ~/BUCKET of all workers
#   train WORDS...    starts `lvlm train WORDS...` on all workers, in their home folder
#   logs [WORKER]     follows a worker's output (default 0) until its process ends
#   stop              asks the run to save and end, and waits for it
#   status            what became of the queued resource
#   delete            gives the slice back, and the queued resource with it
#
#   TPU_NAME, ZONE    of the slice; the project is gcloud's own (gcloud config set project, CLOUDSDK_CORE_PROJECT)
#   ACCELERATOR       for create: v4-32, v5litepod-16, v5p-128, v6e-64
#   RUNTIME           for create: the image of the machines (default: by ACCELERATOR)
#   POLL=30           for create: seconds between two looks
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
fail() { echo "launch/tpu_vm.sh: $1" >&2; exit "${2:-2}"; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
queued=(gcloud compute tpus queued-resources)

state() { # of the queued resource; nothing where there is none
  "${queued[@]}" list --zone="$ZONE" --filter="name~/$TPU_NAME\$" --format="value(state.state)"
}

on() { # WORKERS COMMAND: by ssh, in the home folder
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

ready() { # or a message that says what to do
  local now
  now=$(state)
  case $now in
    ACTIVE) ;;
    '') fail "there is no queued resource $TPU_NAME in $ZONE: create it first" 1 ;;
    SUSPENDING | SUSPENDED | FAILED) gone "$now" ;;
    *) fail "$TPU_NAME is $now, not ACTIVE yet: create waits for it" 1 ;;
  esac
}

gone() { # STATE
  fail "$TPU_NAME is $1 (a spot slice that was taken back, or a request that ran out; launch/tpu_vm.sh status says more). \
It stays until you say delete; then create, install, mount, and train with the same words, which resumes" 1
}

create() {
  : "${ACCELERATOR:?kind and size of the slice, as in ACCELERATOR=v5p-128}"
  local now seen=unknown
  case $ACCELERATOR in # cloud.google.com/tpu/docs/runtimes
    v6e-*) : "${RUNTIME:=v2-alpha-tpuv6e}" ;;
    v5p-*) : "${RUNTIME:=v2-alpha-tpuv5}" ;;
    v5litepod-*) : "${RUNTIME:=v2-alpha-tpuv5-lite}" ;;
    v4-*) : "${RUNTIME:=tpu-ubuntu2204-base}" ;;
    tpu7x-*) fail "ACCELERATOR=$ACCELERATOR: TPU7x is to be had by GKE only, see launch/gke" ;;
    *) fail "ACCELERATOR=$ACCELERATOR: v4-*, v5litepod-*, v5p-* or v6e-*" ;;
  esac
  now=$(state)
  if [[ -z $now ]]; then
    "${queued[@]}" create "$TPU_NAME" --node-id="$TPU_NAME" --zone="$ZONE" --accelerator-type="$ACCELERATOR" \
      --runtime-version="$RUNTIME" "$@"
    now=$(state)
  fi
  while [[ $now != ACTIVE ]]; do
    case $now in SUSPENDING | SUSPENDED | FAILED) gone "$now" ;; esac
    [[ $now == "$seen" ]] || echo "$TPU_NAME: ${now:-not listed yet}"
    seen=$now
    sleep "${POLL:-30}"
    now=$(state)
  done
  echo "$TPU_NAME: ACTIVE; it costs until launch/tpu_vm.sh delete"
}

install() {
  local archive when
  ready
  git -C "$root" diff --quiet HEAD || echo "launch/tpu_vm.sh: what is not committed is not installed" >&2
  archive=$(mktemp -d)/lvlm.tar.gz
  git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:.lvlm.tar.gz" --zone="$ZONE" --worker=all
  rm -r "$(dirname "$archive")"
  # The images' own Python is older than 3.11. --exclude-newer: a release between two workers' installs is in neither.
  when=$(date -u +%Y-%m-%dT%H:%M:%SZ)
  on all "set -e; rm -rf .lvlm/source; mkdir -p .lvlm/source; tar -xzf .lvlm.tar.gz -C .lvlm/source; \
python3 -m pip install --quiet --user uv; export PATH=~/.local/bin:\$PATH; \
uv venv --quiet --allow-existing --python 3.12 .lvlm/env; cd .lvlm/source; \
uv pip install --quiet --python ../env/bin/python --exclude-newer $when '.[tpu]'"
}

mount() {
  local bucket=${1:?the bucket, without gs://}
  [[ $bucket =~ ^[a-z0-9][a-z0-9._-]+$ ]] || fail "mount $bucket: the name of a bucket, without gs:// and folders"
  ready
  # No cache of what the other hosts may have written since; the reasons are in launch/README.md.
  on all "set -e; command -v gcsfuse >/dev/null || { echo 'gcsfuse is not installed on this machine' >&2; exit 1; }; \
mkdir -p $bucket; mountpoint -q $bucket || \
gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $bucket \$HOME/$bucket"
}

train() {
  (($#)) || fail "train WORDS...: what lvlm train takes, as in train --config llava15_align --workdir my-bucket/align"
  local words
  printf -v words ' %q' "$@"
  ready
  on all "cd .lvlm; if [ -e pid ] && kill -0 \$(cat pid) 2>/dev/null; then echo 'a run is under way here' >&2; exit 1; fi; \
cd; LVLM_DISTRIBUTED=1 JAX_PLATFORMS=tpu nohup .lvlm/env/bin/lvlm train$words >>.lvlm/log 2>&1 </dev/null & \
echo \$! >~/.lvlm/pid"
}

logs() {
  ready
  on "${1:-0}" "tail --pid=\$(cat .lvlm/pid) -n 200 -F .lvlm/log"
}

stop() {
  ready
  on all "kill -TERM \$(cat .lvlm/pid) && tail --pid=\$(cat .lvlm/pid) -f /dev/null"
}

delete() {
  "${queued[@]}" delete "$TPU_NAME" --zone="$ZONE" --force
  echo "$TPU_NAME is deleted; disks that were attached and buckets stay, and cost"
}

case ${1:-} in
  create | install | mount | train | logs | stop | status | delete) ;;
  -h | --help) usage; exit ;;
  '') usage >&2; exit 2 ;;
  *) fail "no command $1; they are create, install, mount, train, logs, stop, status, delete" ;;
esac
: "${TPU_NAME:?a name for the slice}" "${ZONE:?where it is, as in ZONE=us-east5-a}"
if [[ $1 == status ]]; then
  "${queued[@]}" describe "$TPU_NAME" --zone="$ZONE"
else
  "$@"
fi
