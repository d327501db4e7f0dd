#!/usr/bin/env bash
# Builds a benchmark, and each program that it runs as it is shipped, and runs it:
# scripts/measure.sh NAME. `cargo bench` would put another pgsilo where the benchmark looks for it,
# built with what tests turn on in the libraries (tokio's test-util).
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1

benchmark=$(cargo bench --no-run -p pgsilo --bench "$name" --message-format=json-render-diagnostics | python3 -c '
import json, sys
for message in map(json.loads, sys.stdin):
    if message.get("executable") and message["target"]["name"] == sys.argv[1]:
        print(message["executable"])
' "$name")
cargo build --release -p pgsilo-sandbox -p pgsiloctl
# Last, and by itself: together, the features of one would be those of all.
cargo build --release -p pgsilo
exec "$benchmark" --bench
