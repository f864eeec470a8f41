#!/usr/bin/env bash
# LEGACY: trains on a Cloud TPU slice by a queued resource. Google develops this
# API no further, and it ends with v6e: use jobset-tpu.yaml on GKE instead.
#
#   PROJECT=mine ZONE=us-east5-b TYPE=v6e-64 tools/launch/queued_resource_legacy.sh \
#     --config=pretrain_14m --workdir=/mnt/bucket/run
#
# Every host runs the same command; start it again to resume. WHEEL is where
# hosts get this package from, such as gs://bucket/blip_jax.whl.
set -euo pipefail

: "${PROJECT:?the project of Google Cloud}" "${ZONE:?the zone}"
: "${TYPE:?the slice, such as v6e-64}" "${WHEEL:?gs:// address of the wheel}"
name=${NAME:-blip-jax}
runtime=${RUNTIME:-v2-alpha-tpuv6e}
cloud=(gcloud compute tpus --project="$PROJECT")

if ! "${cloud[@]}" queued-resources describe "$name" --zone="$ZONE" \
  > /dev/null 2>&1; then
  "${cloud[@]}" queued-resources create "$name" --zone="$ZONE" \
    --node-id="$name" --accelerator-type="$TYPE" --runtime-version="$runtime" \
    --spot
fi

state=""
until [[ $state == ACTIVE ]]; do
  state=$("${cloud[@]}" queued-resources describe "$name" --zone="$ZONE" \
    --format="value(state.state)")
  if [[ $state == FAILED || $state == SUSPENDED ]]; then
    echo "the queued resource is $state; delete $name, and start again" >&2
    exit 1
  fi
  [[ $state == ACTIVE ]] || sleep 30
done

# Quoted once more, for the shells of the hosts.
arguments=$(printf '%q ' "$@")
install="gcloud storage cp $WHEEL /tmp/ \
  && pip install --quiet '/tmp/$(basename "$WHEEL")' 'jax[tpu]'"
"${cloud[@]}" tpu-vm ssh "$name" --zone="$ZONE" --worker=all --command="
  $install && exec python3 -m blip_jax.main --distributed=auto $arguments"
