#!/bin/sh
# `flwr` for this deployment, on the server: flwr.sh run APP @CONNECTION@, flwr.sh list @CONNECTION@
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/server.env"
# Flower rewrites its configuration, and this folder stays as it is
cp "$here/config.toml" "$FLWR_HOME/config.toml"
exec flwr "$@"
