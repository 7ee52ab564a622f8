#!/bin/sh
# Lets the sites in: registers every public key in keys/. Again is harmless.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
for key in "$here"/keys/*.pub; do
    site=$(basename "$key" .pub)
    if said=$("$here/flwr.sh" supernode register "$key" @CONNECTION@ --name "$site" 2>&1); then
        echo "$site: registered"
    else
        case $said in
        *"already in use"*) echo "$site: registered before" ;;
        *)
            echo "$site: not registered: $said" >&2
            exit 1
            ;;
        esac
    fi
done
