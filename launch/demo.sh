#!/usr/bin/env bash
# Runs the quickstart twice on the same clusters, with 8 labels an image and
# with 1, each at its best settings (docs/evidence.md), and prints both beside
# the baselines. A demo of another seed that
# lies there already is moved aside.
#
#   launch/demo.sh [SEED]
set -euo pipefail
cd "$(dirname "$0")/.."
seed=${1:-0}
python=.venv/bin/python
for run in runs/quickstart runs/quickstart_1label; do
  [ -f "$run/config.json" ] || continue
  before=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["seed"])' "$run/config.json")
  if [ "$before" != "$seed" ]; then
    aside="${run}_seed$before"
    while [ -e "$aside" ]; do aside="${aside}_before"; done
    mv "$run" "$aside"
    echo "$run was made with seed $before and is now $aside"
  fi
done
common=(--config=configs/quickstart.py "--config.seed=$seed")
"$python" -m mlcd_jax.main "${common[@]}"
"$python" -m mlcd_jax.main "${common[@]}" --workdir=runs/quickstart_1label \
  --config.cluster.path=runs/quickstart --config.loss.num_positives=1 \
  --config.loss.scale=32.0 --config.optimizer.learning_rate=2e-3
echo
"$python" -m mlcd_jax.report runs/quickstart runs/quickstart_1label
