#!/bin/sh
# Starts the SuperNode of this site; what is its own stands in site.env.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/site.env"
umask 077
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_HOME="${FLWR_HOME:-$STATE/flower}" PATH="$PATH:/opt/pfedmoap/venv/bin"
mkdir -p "$STATE/clients"
# Flower takes an app whose unpacking was cut short for a whole one; the next run brings it again
rm -rf "$FLWR_HOME"/apps/pfedmoap.pfedmoap-flwr.*
config="partition-id=$CLIENT num-partitions=$CLIENTS state-dir=\"$STATE/clients\" min-count=$MIN_COUNT"
if [ -n "$DATA" ]; then
    config="$config data-dir=\"$DATA\""
fi
if [ -n "$BUDGET" ]; then
    config="$config privacy-budget=$BUDGET"
fi
case $HOST in
*:*) HOST="[$HOST]" ;;
esac
exec flower-supernode --superlink "$HOST:$PORT" --root-certificates "$here/ca.crt" \
    --auth-supernode-private-key "$here/node.key" \
    --host 127.0.0.1 --port "$NODE_PORT" --node-config "$config"
