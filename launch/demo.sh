#!/usr/bin/env bash
# Trains on the scenes with three kinds of labels: the nearest centers of a
# scene's crops, its 8 nearest centers, and the nearest one. Each has its best
# settings (docs/evidence.md). Prints the three beside the baselines. A demo of
# another seed that lies there already is moved aside.
#
#   launch/demo.sh [SEED]
set -euo pipefail
cd "$(dirname "$0")/.."
seed=${1:-0}
python=.venv/bin/python
for run in runs/scenes runs/scenes_nearest runs/scenes_one; do
  [ -f "$run/config.json" ] || continue
  before=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["seed"])' "$run/config.json")
  if [ "$before" != "$seed" ]; then
    aside="${run}_seed$before"
    while [ -e "$aside" ]; do aside="${aside}_before"; done
    mv "$run" "$aside"
    echo "$run was made with seed $before and is now $aside"
  fi
done
common=("--config.seed=$seed")
"$python" -m mlcd_jax.main --config=configs/scenes.py "${common[@]}" \
  --config.evaluate.baselines=embedder,random
common+=('--config.evaluate.baselines=()')
"$python" -m mlcd_jax.main --config=configs/scenes.py:nearest "${common[@]}"
# The embeddings of whole scenes are those of the run before.
"$python" -m mlcd_jax.main --config=configs/scenes.py:one "${common[@]}" \
  --config.embed.embedder=precomputed \
  --config.embed.path=runs/scenes_nearest/embeddings
echo
"$python" -m mlcd_jax.report runs/scenes runs/scenes_nearest runs/scenes_one
