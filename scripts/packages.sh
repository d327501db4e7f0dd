# Sourced by test-all.sh and bench.sh from the project's folder: what they need, install, and where.

tools=${PGSILO_TOOLS:-.tools}
this=$(basename "$0" .sh)

fail() { echo "$this: $*" >&2; exit 1; }

[ "$(uname -sm)" = "Linux x86_64" ] || fail "the PostgreSQL with TLS is packaged for Linux on x86_64 only"
[ -n "${PGSILO_PYTHON:-}" ] || fail "run \`make $this\`, which prepares the rest"

# debian PACKAGE...: installs Debian packages, as root or by sudo.
debian() {
    command -v apt-get >/dev/null || fail "install these first: $*"
    echo "$this: installing $*"
    local as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    export DEBIAN_FRONTEND=noninteractive
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# unpacked PACKAGE FOLDER: what a Debian package holds, without installing it or what it starts.
unpacked() {
    local download as_root=()
    echo "$this: fetching $1"
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    apt-cache show "$1" >/dev/null 2>&1 || "${as_root[@]}" apt-get update -qq
    download=$(mktemp -d)
    (cd "$download" && apt-get download -qq "$1" 2>/dev/null)
    dpkg-deb --extract "$download/$1"_*.deb "$2"
    rm -rf "$download"
}

# npm_packages: installs those of tests/more/node, PostgreSQL with TLS among them, into a folder
# named for the lock file; sets $node to it.
npm_packages() {
    local lock version
    lock=$(sha256sum tests/more/node/package-lock.json | cut -c1-12)
    node=$(realpath -m "$tools/node-$lock")
    [ -e "$node/complete" ] && return
    echo "$this: installing the npm packages of tests/more/node"
    rm -rf "$node"
    mkdir -p "$node"
    cp tests/more/node/package.json tests/more/node/package-lock.json "$node"
    (cd "$node" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error)
    for version in 15 16 18; do
        # npm packages hold no symbolic links; this script of the package makes them.
        (cd "$node/node_modules/postgres-$version" && node scripts/hydrate-symlinks.js)
    done
    touch "$node/complete"
}

# suites: other projects' tests, as tests/more/suites names them, and what those import; into a
# folder named for that. Sets $suites to it.
suites() {
    local lock source
    lock=$(cat tests/more/suites/*.txt | sha256sum | cut -c1-12)
    suites=$(realpath -m "$tools/suites-$lock")
    [ -e "$suites/complete" ] && return
    echo "$this: installing other projects' tests"
    rm -rf "$suites"
    mkdir -p "$suites/sources"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
        --only-binary=:all: --target "$suites/packages" -r tests/more/suites/requirements.txt
    # Not `:all:`, which would also build from source what pip builds them with.
    python3 -m pip download --quiet --disable-pip-version-check --no-deps \
        --no-binary="$(sed -n 's/==.*//p' tests/more/suites/sources.txt | paste -sd,)" \
        --dest "$suites/sources" -r tests/more/suites/sources.txt
    for source in "$suites"/sources/*.tar.gz; do
        tar -xzf "$source" -C "$suites"
    done
    # These tests are of the asyncpg that is installed: beside them lies one that was not built.
    rm -rf "$suites"/asyncpg-*/asyncpg
    touch "$suites/complete"
}
