#!/usr/bin/env bash
# usage: launch/gke/xpk.sh WORDS...        submits `lvlm train WORDS...` to a cluster that xpk made
#
#   CLUSTER=tpus WORKLOAD=align TPU_TYPE=tpu7x-4x4x4 STORAGE=bucket IMAGE=REGISTRY/lvlm:1 \
#     launch/gke/xpk.sh --config llava15_align --workdir /bucket/align
#
#   CLUSTER     the cluster (xpk cluster create)
#   WORKLOAD    a name for this run; `xpk workload delete` takes it
#   TPU_TYPE    kind and size of the slice, as xpk writes it: v5p-128, v6e-64, tpu7x-4x4x4
#   STORAGE     a storage of the cluster that all hosts see (xpk storage attach); the workdir is in it
#   IMAGE       the image of launch/gke/Dockerfile, pushed
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
case ${1:-} in
  -h | --help) usage; exit ;;
  '') usage >&2; exit 2 ;;
esac
: "${CLUSTER:?which cluster}" "${WORKLOAD:?a name for this run}" "${TPU_TYPE:?as in TPU_TYPE=tpu7x-4x4x4}"
: "${STORAGE:?a storage of the cluster, see xpk storage attach}" "${IMAGE:?the pushed image}"
printf -v words ' %q' "$@"
# 75: stopped, or left by the others (launch/gke/train.sh). xpk starts only the codes that it knows again.
exec xpk workload create --cluster="$CLUSTER" --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --storage="$STORAGE" \
  --docker-image="$IMAGE" --max-restarts=50 --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
  --command="/lvlm/launch/gke/train.sh$words"
