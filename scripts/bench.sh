#!/usr/bin/env bash
# What `make bench` needs beside the tools: PgBouncer and HAProxy, a PostgreSQL that speaks TLS, and
# a psql and a pgbench that do. Installs Debian packages (as root or by sudo) and npm packages, then
# runs benches/peers. QUICK=1 ends within three minutes, and
# ONLY=queries,copies,connects,idle,scale runs some parts, and
# ATTACK=quiet,logins some of the attacks of ONLY=neighbour, LIMITS more of the limits there, and
# ONLY=relays pgsilo's relay beside bare ones. ONLY=neighbour, a tenant under attack, and ONLY=endings, what
# the users of pools notice of endings, need none of them.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh

export PATH="$PATH:/usr/sbin"
if [ "${ONLY:-}" = neighbour ] || [ "${ONLY:-}" = endings ]; then
    ulimit -S -n "$(ulimit -H -n)"
    exec bash scripts/measure.sh peers
fi
wanted=()
command -v pgbouncer >/dev/null || wanted+=(pgbouncer)
command -v haproxy >/dev/null || wanted+=(haproxy)
command -v node >/dev/null || wanted+=(nodejs)
command -v npm >/dev/null || wanted+=(npm)
[ ${#wanted[@]} -eq 0 ] || debian "${wanted[@]}"
npm_packages

# --- psql and pgbench, unpacked but not installed: installing the package would start a server ----
clients=$(realpath -m "$tools/debian-postgresql")
installed=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1)
if [ -x "$installed/pgbench" ] && [ -x "$installed/psql" ]; then
    clients=$installed
elif [ ! -e "$clients/complete" ]; then
    version=$(apt-cache depends postgresql 2>/dev/null | sed -n 's/.*Depends: postgresql-\([0-9]*\)$/\1/p' | head -1)
    [ -n "$version" ] || fail "apt knows no package postgresql: install psql and pgbench first"
    debian libpq5
    rm -rf "$clients"
    mkdir -p "$clients"
    (
        cd "$clients"
        apt-get download -qq "postgresql-$version" "postgresql-client-$version"
        for package in *.deb; do dpkg-deb -x "$package" .; done
        rm ./*.deb
        ln -s "usr/lib/postgresql/$version/bin/"* .
        touch complete
    )
fi
"$clients/pgbench" --version >/dev/null || fail "$clients/pgbench does not run"

# --- bare relays, for whoever works on pgsilo's --------------------------------------------------
case ",${ONLY:-}," in *,relays,*)
    cargo build --quiet --release --locked --manifest-path benches/relays/Cargo.toml --target-dir target/relays
    export PGSILO_RELAYS="$PWD/target/relays/release/pgsilo-relays"
esac

export PGSILO_POSTGRES_TLS="$node/node_modules/postgres-18/native"
export PGSILO_PGBENCH_BIN="$clients"
# Ten thousand sessions have two ends each: root may raise the limit, others have what there is.
most=$(ulimit -H -n)
[ "$most" = unlimited ] || [ "$most" -ge 65536 ] || ulimit -H -n 65536 2>/dev/null || true
ulimit -S -n "$(ulimit -H -n)"
exec bash scripts/measure.sh peers
