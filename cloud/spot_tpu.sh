#!/usr/bin/env bash
# Trains on a spot TPU of Google Cloud. Whenever the TPU is taken away, another one is requested and the run continues there.
#
#   NAME=gpt2 ZONE=us-central1-a TYPE=v5litepod-8 REPOSITORY=https://github.com/YOUR-NAME/gpt2xla \
#     cloud/spot_tpu.sh --train-dir gs://BUCKET/fineweb_10BT --checkpoints-dir gs://BUCKET/gpt2 --save-interval 250
#
# The arguments are those of run_pretrain_xla.py. It starts on every host of the TPU, from a fresh clone of REPOSITORY. IMAGE
# may name another software version than the usual one for TYPE. Start this in tmux on a machine that stays on.
#
# Costs: the chips of TYPE times the spot price of an hour in ZONE (page "Cloud TPU pricing"; v5litepod-8 is 8 chips), from
#   READY until this script deletes the TPU. Waiting in the queue costs nothing. Beside it what the bucket holds, and the
#   traffic to it if it is in another region (page "Cloud Storage pricing").
# Resumes: from the newest whole checkpoint in --checkpoints-dir, so what was trained since is lost, unless the last seconds of
#   the TPU were enough to upload one more (docs/cloud.md).
# Exits: with 0 when the run is finished; with 2 if its input is wrong, which another machine would not change; with 1 if it
#   failed three times on one TPU, or the TPU cannot be reached. In these cases the TPU is deleted. Ctrl-C ends only this
#   script: the TPU trains on and costs money, and the same command follows it again.
#
# Queued resources belong to the Cloud TPU API, which is legacy: it gets fixes only, and TPU7x and later are not in it.
set -euo pipefail

if [ -z "${NAME:-}" ] || [ -z "${ZONE:-}" ] || [ -z "${TYPE:-}" ] || [ -z "${REPOSITORY:-}" ]; then
  echo "spot_tpu.sh: set NAME, ZONE, TYPE and REPOSITORY; the first lines of the script show how" >&2
  exit 2
fi
if ! [[ " $* " =~ \ --checkpoints-dir[=\ ][a-z0-9]+:// ]]; then
  echo "spot_tpu.sh: --checkpoints-dir must be a URL, such as gs://BUCKET/$NAME: the TPU's own disk goes with it" >&2
  exit 2
fi
case $TYPE in
  v5litepod-*) usual=v2-alpha-tpuv5-lite ;;
  v5p-*) usual=v2-alpha-tpuv5 ;;
  v6e-*) usual=v2-alpha-tpuv6e ;;
  *) usual=tpu-ubuntu2204-base ;;
esac
IMAGE=${IMAGE:-$usual}
POLL=${POLL:-30} # seconds between two looks
ARGUMENTS=("$@")
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

say() { echo "$(date +%H:%M:%S) $*"; }

tpu() { gcloud compute tpus "$@" --zone="$ZONE" --quiet; }

stopped() {
  say "$NAME is left as it is. If its TPU is there, it trains on and costs money. The same command follows it again; to end it:"
  echo "  gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force"
  exit 130
}
trap stopped INT TERM

# Prints the state of the TPU, or that of its queued resource until it has one.
state() {
  local found
  if ! found=$(tpu queued-resources describe "$NAME" --format="value(state.state)" 2> "$errors"); then
    grep -q NOT_FOUND "$errors" && echo ABSENT || echo UNKNOWN
  elif [ "$found" != ACTIVE ]; then
    echo "$found"
  elif ! tpu tpu-vm describe "$NAME" --format="value(state)" 2> "$errors"; then
    grep -q NOT_FOUND "$errors" && echo GONE || echo UNKNOWN
  fi
}

# A refusal that waiting cannot change ends the script. After a TPU was taken away its quota may be counted for a while.
request() {
  if tpu queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$IMAGE" \
    --spot > /dev/null 2> "$errors"; then
    was_there=yes
  elif [ -n "$was_there" ] || grep -qiE "no more capacity|stockout|unavailable|internal error" "$errors"; then
    say "no TPU now, asking again: $(tail -n 1 "$errors")"
    sleep "$POLL"
  else
    cat "$errors" >&2
    say "Google Cloud refuses $TYPE in $ZONE; nothing was created"
    exit 2
  fi
}

delete() { tpu queued-resources delete "$NAME" --force > /dev/null 2> "$errors" || grep -q NOT_FOUND "$errors"; }

finish() {
  say "$2; deleting $NAME"
  for _ in {1..10}; do
    if delete; then exit "$1"; fi
    sleep "$POLL"
  done
  cat "$errors" >&2
  say "$NAME IS NOT DELETED AND COSTS MONEY: gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force"
  exit 1
}

# On a host: starts the run, unless it runs already, and follows it. gcloud itself repeats this when a connection breaks. After
# a reboot nothing runs any more, so its id is part of the name.
on_host() { # ATTEMPT REPOSITORY ARGUMENTS...
  local folder
  folder=~/run-$(cut -c 1-8 /proc/sys/kernel/random/boot_id)-$1
  shift
  if mkdir "$folder" 2> /dev/null; then
    (
      trap "" HUP
      echo "$BASHPID" > "$folder/pid" # only here, where the log is open: tail wants both
      install_and_run "$@"
      echo $? > "$folder/code"
    ) > "$folder/log" 2>&1 < /dev/null &
  fi
  for _ in {1..20}; do # a connection that broke before the start leaves no pid; then tail fails, and so does this attempt
    [ ! -s "$folder/pid" ] || break
    sleep 0.5
  done
  tail -n 100 -f --pid="$(cat "$folder/pid")" "$folder/log"
  # Codes that gcloud and ssh do not use themselves.
  case $(cat "$folder/code" 2> /dev/null) in
    0) exit 0 ;;
    2) exit 102 ;;
    143) exit 143 ;;
    *) exit 101 ;;
  esac
}

install_and_run() { # REPOSITORY ARGUMENTS...
  cd ~ && { [ -d gpt2xla ] || git clone --quiet --depth 1 "$1" gpt2xla; } && cd gpt2xla || return 1
  shift
  python3 -m venv .venv || { sudo apt-get install --yes --quiet python3-venv && python3 -m venv .venv; } || return 1
  # torch for CPUs: the one for GPUs is several GB larger.
  .venv/bin/pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu --editable ".[xla-tpu,bucket]" || return 1
  PJRT_DEVICE=TPU PATH="$PWD/.venv/bin:$PATH" python run_pretrain_xla.py "$@"
}

follow() {
  local code=0 since=$SECONDS
  tpu tpu-vm ssh "$NAME" --worker=all --ssh-flag=-oConnectTimeout=15 --ssh-flag=-oServerAliveInterval=15 \
    --command="$(declare -f on_host install_and_run); on_host$(printf " %q" "$attempt" "$REPOSITORY" "${ARGUMENTS[@]}")" ||
    code=$?
  case $code in
    0) finish 0 "the run is finished" ;;
    102) finish 2 "the input of the run is wrong, as its last lines say" ;;
    101)
      failures=$((failures + 1)) attempt=$((attempt + 1))
      [ "$failures" -lt 3 ] || finish 1 "the run failed three times"
      say "the run failed; starting it again"
      ;;
    143)
      attempt=$((attempt + 1))
      say "the run was asked to stop, and has saved"
      sleep "$POLL"
      ;;
    *)
      if [ $((SECONDS - since)) -gt 600 ]; then broken=0; fi
      broken=$((broken + 1))
      [ "$broken" -lt 10 ] || finish 1 "no connection to the hosts in $broken tries"
      say "the connection broke"
      sleep "$POLL"
      ;;
  esac
}

attempt=1 failures=0 broken=0 unknown=0 was_there="" before=""
while true; do
  now=$(state)
  if [ "$now" != "$before" ]; then say "$NAME: $now"; fi
  before=$now
  if [ "$now" = UNKNOWN ]; then
    unknown=$((unknown + 1))
    if [ -z "$was_there" ] || [ "$unknown" -ge 20 ]; then
      cat "$errors" >&2
      say "the state of $NAME cannot be read${was_there:+; if its TPU is there, it costs money}"
      exit 1
    fi
  else
    unknown=0
    if [ "$now" != ABSENT ]; then was_there=yes; fi
  fi
  case $now in
    READY) follow ;;
    ABSENT) request ;;
    UNKNOWN | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING | \
      SUSPENDING | DELETING) sleep "$POLL" ;;
    *)
      say "the TPU was taken away; requesting another"
      failures=0 # its last one may have been that no checkpoint got through in time
      delete || sleep "$POLL"
      ;;
  esac
done
