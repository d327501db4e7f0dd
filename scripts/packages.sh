# Sourced by test-all.sh and bench.sh: what they install and where. Needs $tools and `fail`.

# debian PACKAGE...: installs Debian packages, as root or by sudo.
debian() {
    command -v apt-get >/dev/null || fail "install these first: $*"
    echo "$(basename "$0"): installing $*"
    local as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    export DEBIAN_FRONTEND=noninteractive
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# npm_packages: installs those of tests/more/node, PostgreSQL with TLS among them, into a folder
# named for the lock file; sets $node to it.
npm_packages() {
    local lock version
    lock=$(sha256sum tests/more/node/package-lock.json | cut -c1-12)
    node=$(realpath -m "$tools/node-$lock")
    [ -e "$node/complete" ] && return
    echo "$(basename "$0"): installing the npm packages of tests/more/node"
    rm -rf "$node"
    mkdir -p "$node"
    cp tests/more/node/package.json tests/more/node/package-lock.json "$node"
    (cd "$node" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error)
    for version in 15 18; do
        # npm packages hold no symbolic links; this script of the package makes them.
        (cd "$node/node_modules/postgres-$version" && node scripts/hydrate-symlinks.js)
    done
    touch "$node/complete"
}
