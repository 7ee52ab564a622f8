#!/bin/sh
# Starts the SuperLink. It listens on loopback alone: nginx lets nothing but the nodes' API through.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/server.env"
# Flower takes an app whose unpacking was cut short for a whole one; the next run brings it again
rm -rf "$FLWR_HOME"/apps/pfedmoap.pfedmoap-flwr.*
exec flower-superlink --host 127.0.0.1 --port "$PORT" --database "$STATE/state.db" \
    --ssl-ca-certfile "$here/ca.crt" --ssl-certfile "$here/server.crt" \
    --ssl-keyfile "$here/server.key" --enable-supernode-auth \
    --disable-runtime-dependency-installation
