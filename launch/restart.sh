#!/usr/bin/env bash
# Runs a command again where it was stopped, preempted or lost a process.
#
#   launch/restart.sh python -m mlcd_jax.main --config=configs/vit_b16.py
#
# Exit code 75 (stopped after saving) and 3 (a process lost, no space, ...) are
# tried again after RESTART_DELAY seconds (10). After RESTART_LIMIT (3) failures
# in a row without a new file in the workdir's embeddings, clusters or
# checkpoints it gives up with the command's exit code. Every other code ends
# it at once. A signal goes to the command; then nothing is restarted.
set -uo pipefail
if [ $# -eq 0 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0"
  exit 2
fi

workdir=
config=
flag=
for argument in "$@"; do
  case "$argument" in
    --workdir=* | --config=*)
      flag=${argument%%=*}
      argument=${argument#*=}
      ;;
  esac
  case "$flag" in
    --workdir) workdir=$argument ;;
    --config) config=$argument ;;
  esac
  case "$argument" in --workdir | --config) flag=$argument ;; *) flag= ;; esac
done
if [ -z "$workdir" ]; then
  if [ -z "$config" ]; then
    echo 'error: launch/restart.sh needs --config=FILE or --workdir=DIR in the command' >&2
    exit 2
  fi
  # As `workdir` of mlcd_jax/runtime/cli.py.
  name=$(basename "${config%%:*}" .py)
  case "$config" in *:?*) name=${name}_${config#*:} ;; esac
  workdir=runs/${name//[^A-Za-z0-9._-]/_}
fi

# Names of finished files, which a run that comes further adds to.
progress() {
  find "$workdir"/embeddings/img_emb "$workdir"/clusters \
    -name '*.npy' -not -name '.*' 2>/dev/null | sort
  find "$workdir"/checkpoints -maxdepth 1 -name '[0-9]*' \
    -not -name '*tmp*' 2>/dev/null | sort
}

child=
stopping=
forward() {
  stopping=1
  if [ -n "$child" ]; then kill -s "$1" "$child" 2>/dev/null; fi
}
trap 'forward TERM' TERM
trap 'forward INT' INT

failures=0
while true; do
  before=$(progress)
  "$@" &
  child=$!
  wait "$child"
  code=$?
  # A signal ends `wait` before the command, which is still saving.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
  done
  child=
  if [ -n "$stopping" ] || { [ $code -ne 75 ] && [ $code -ne 3 ]; }; then
    exit $code
  fi
  if [ "$(progress)" = "$before" ]; then
    failures=$((failures + 1))
  else
    failures=0
  fi
  if [ $failures -ge "${RESTART_LIMIT:-3}" ]; then
    echo "error: stopped $failures times in a row without progress in $workdir" >&2
    exit $code
  fi
  echo "launch/restart.sh: exit code $code, again in ${RESTART_DELAY:-10} s" >&2
  sleep "${RESTART_DELAY:-10}"
  if [ -n "$stopping" ]; then exit $code; fi
done
