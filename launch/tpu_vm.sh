#!/usr/bin/env bash
# A TPU slice on Google Cloud: created, installed, run, made again after a
# preemption. Not run; DRY_RUN=1 prints each command instead.
#
#   NAME=mlcd ZONE=us-west4-a TYPE=v5litepod-256 REPO=https://... \
#     launch/tpu_vm.sh --config=configs/vit_b16.py:laion400m \
#     --workdir=/mnt/runs/b16
#
# The workdir lies on a file system that all workers mount (NFS, Filestore,
# Lustre); gs:// serves for the images, not for a workdir. SPOT=1 takes a spot
# slice. VERSION is the TPU's software version.
set -uo pipefail
if [ $# -eq 0 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0"
  exit 2
fi
: "${NAME:?error: set NAME of the slice}"
: "${ZONE:?error: set ZONE, such as us-west4-a}"
: "${TYPE:?error: set TYPE, such as v5litepod-16}"
: "${REPO:?error: set REPO, the address to clone}"
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
spot=()
if [ "${SPOT:-0}" = 1 ]; then spot=(--spot); fi

do_() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu=(gcloud compute tpus)
create() {
  do_ "${tpu[@]}" queued-resources create "$NAME" --node-id="$NAME" \
    --zone="$ZONE" --accelerator-type="$TYPE" --runtime-version="$VERSION" \
    "${spot[@]}" || return
  until [ "$(state)" = ACTIVE ]; do sleep 30; done
  on_all "git clone '$REPO' mlcd_jax && cd mlcd_jax && python3 -m venv .venv \
    && .venv/bin/pip install -q -r requirements-tpu.txt"
}
state() {
  if [ "${DRY_RUN:-0}" = 1 ]; then echo ACTIVE; return; fi
  "${tpu[@]}" queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null
}
delete() {
  do_ "${tpu[@]}" queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}
on_all() {
  do_ "${tpu[@]}" tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

create || exit
failures=0
while true; do
  on_all "cd mlcd_jax && . launch/environment.sh tpu && .venv/bin/python -m mlcd_jax.main $(printf '%q ' "$@")"
  code=$?
  case $code in 0 | 1 | 2) exit $code ;; esac
  failures=$((failures + 1))
  if [ $failures -gt "${RESTART_LIMIT:-20}" ]; then
    echo "error: started $failures times and not finished" >&2
    exit $code
  fi
  if [ "$(state)" != ACTIVE ]; then
    delete
    create || exit
  fi
done
