#!/usr/bin/env bash
# What `make test` leaves out because a fresh machine cannot run it: node-postgres, JDBC, the pools
# of both and of Go's pgx, databases that speak TLS, an OpenID provider, docs/setup.md as it is pasted, units and
# alerts, and other projects' own tests. Installs Debian packages (as root or by sudo), npm packages and pip
# packages (both pinned, into the tools' folder), then runs tests/more. Arguments go to cargo test.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh

# --- Debian packages: only what is missing --------------------------------------------------
has_jdk() { command -v java >/dev/null && java --list-modules 2>/dev/null | grep -q '^jdk\.compiler@'; }
wanted=()
has_jdk || wanted+=(default-jdk-headless)
[ -e /usr/share/java/postgresql.jar ] || wanted+=(libpostgresql-jdbc-java)
[ -e /usr/share/java/HikariCP.jar ] || wanted+=(libhikaricp-java)
[ -e /usr/share/java/slf4j-api.jar ] || wanted+=(libslf4j-java)
command -v go >/dev/null || wanted+=(golang-go)
[ -e /usr/share/gocode/src/github.com/jackc/pgx/v4/pgxpool ] || wanted+=(golang-github-jackc-pgx-v4-dev)
command -v node >/dev/null || wanted+=(nodejs)
command -v npm >/dev/null || wanted+=(npm)
# What docs/setup.md asks its reader for, and what reads units.
command -v psql >/dev/null || wanted+=(postgresql-client)
command -v openssl >/dev/null || wanted+=(openssl)
command -v jq >/dev/null || wanted+=(jq)
command -v curl >/dev/null || wanted+=(curl)
command -v systemd-analyze >/dev/null || wanted+=(systemd)
# psycopg2's source wants it to say even its name.
command -v pg_config >/dev/null || wanted+=(libpq-dev)
[ ${#wanted[@]} -eq 0 ] || debian "${wanted[@]}"
has_jdk || fail "the java on the PATH has no compiler: a JDK is needed, not a JRE"

npm_packages
suites

# --- promtool, without the server that it is packaged with ------------------------------------
promtool=$(realpath -m "$tools/promtool")
[ -e "$promtool/usr/bin/promtool" ] || unpacked prometheus "$promtool"

# --- Go, from what Debian has of it, without modules and without a network --------------------
pgx_pool=$(realpath -m "$tools/pgx-pool")
GO111MODULE=off GOFLAGS="" GOPATH=/usr/share/gocode GOCACHE=$(realpath -m "$tools/go-cache") \
    go build -o "$pgx_pool" tests/more/go/pool.go

export NODE_PATH="$node/node_modules"
export PGSILO_JDBC=/usr/share/java/postgresql.jar:/usr/share/java/HikariCP.jar:/usr/share/java/slf4j-api.jar
export PGSILO_PGX_POOL="$pgx_pool"
export PGSILO_SUITES="$suites"
export PGSILO_POSTGRES_TLS="$node/node_modules/postgres-18/native"
export PGSILO_POSTGRES_15="$node/node_modules/postgres-15/native"
export PGSILO_POSTGRES_16_5="$node/node_modules/postgres-16/native"
export PGSILO_PROMTOOL="$promtool/usr/bin/promtool"
# The programs of the other packages are built with their own tests.
cargo test --no-run
exec cargo test -p pgsilo --test more "$@"
