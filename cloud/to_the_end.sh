#!/usr/bin/env bash
# Runs a command and exits with its exit code, but with 143 if it was asked to stop meanwhile.
#
#   cloud/to_the_end.sh python run_pretrain_xla.py ...
#
# A run that is asked to stop (SIGTERM: a machine that goes, a node that is drained) saves a checkpoint and exits with 0. What
# watches over it would take it for finished, and not start it again.
set -uo pipefail

stopped="" run=""
trap 'stopped=yes; kill -TERM "$run" 2> /dev/null' TERM INT
"$@" &
run=$!
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do # a signal ended the waiting, not the run
  code=0
  wait "$run" || code=$?
done
[ -z "$stopped" ] || exit 143
exit "$code"
