#!/usr/bin/env bash
# NVIDIA GPUs of one node, or of several. Not run on GPUs yet.
#
# One node: one process drives all of its GPUs.
#   launch/multi_gpu.sh --config=configs/vit_b16.py:imagenet1k
#
# Several nodes: on each of them, with a workdir that all of them share,
#   NUM_NODES=2 NODE_RANK=0 COORDINATOR=node0:12345 launch/multi_gpu.sh \
#     --config=configs/vit_b16.py:imagenet1k --workdir=/shared/runs/b16
#
# DRY_RUN=1 prints the command instead. Under Slurm see launch/slurm.sbatch;
# under Open MPI start python -m mlcd_jax.main itself, once a node.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -eq 0 ]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0"
  exit 2
fi
if [ "${NUM_NODES:-1}" -gt 1 ]; then
  : "${NODE_RANK:?error: set NODE_RANK to 0 .. NUM_NODES - 1}"
  : "${COORDINATOR:?error: set COORDINATOR to host:port of node 0}"
  set -- "$@" --coordinator_address="$COORDINATOR" \
    --num_processes="$NUM_NODES" --process_id="$NODE_RANK"
fi
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%q ' "$python" -m mlcd_jax.main "$@"
  echo
  exit
fi
# shellcheck source=launch/environment.sh
. launch/environment.sh gpu
exec "$python" -m mlcd_jax.main "$@"
