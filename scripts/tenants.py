#!/usr/bin/env python3
"""Measures what OpenBAO's connections to many tenants' databases cost a PostgreSQL, and when it lets go.

In a sandbox of its own it makes that many databases, each with a broker, a mount and a configuration as
the setup has them, leases from each once, and counts: brokers' connections and the server's memory before,
after, and once the connections may be gone; and a credential's time with a connection and without.
Roles are leased with the setup's statements.

    cargo build --release -p pgsiloctl -p pgsilo-sandbox
    . .tools/env && scripts/tenants.py target/release/pgsilo-sandbox 100 0s     # as many tenants, connections kept
    . .tools/env && scripts/tenants.py target/release/pgsilo-sandbox 100 30s    # max_connection_lifetime
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Sandbox:
    def __init__(self, program, dir, tenants):
        self.process = subprocess.Popen(
            [program, "--until-eof", "--dir", dir, "--max-connections", str(tenants + 100), "--without-proxy"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if line.startswith("Ready in "):
                break
        script = f". {dir}/env && env -0"
        text = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
        self.env = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)

    def ends(self):
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()

    def sql(self, script, database="postgres"):
        dsn = self.env["PG_SUPERUSER_DSN"].rsplit("/", 1)[0] + "/" + database
        psql = pathlib.Path(self.env["PG_BIN"]) / "psql"
        return subprocess.run([psql, "-XqAt", "-v", "ON_ERROR_STOP=1", dsn], input=script,
                              capture_output=True, text=True, check=True).stdout.strip()

    def bao(self, method, path, body=None):
        request = urllib.request.Request(f"{self.env['BAO_ADDR']}/v1/{path}", method=method,
                                         data=None if body is None else json.dumps(body).encode(),
                                         headers={"X-Vault-Token": self.env["BAO_TOKEN"]})
        with urllib.request.urlopen(request) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def brokers(self):
        return int(self.sql("SELECT count(*) FROM pg_stat_activity WHERE usename ~ '_broker$'"))

    def memory(self):
        """Of the server with all its processes, in MiB; what they share counts once."""
        total, server = 0, self.env["PG_PID"]
        children = pathlib.Path(f"/proc/{server}/task/{server}/children").read_text().split()
        for pid in [server, *children]:
            try:
                lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024


def recipe(path, tenant):
    return (ROOT / path).read_text().replace("TENANT", tenant).replace("KIND", "app")


def make(sandbox, tenant, lifetime):
    sandbox.sql(f"""{recipe("docker/postgresql/roles.sql", tenant)}
        ALTER ROLE "tenant_{tenant}_broker" PASSWORD 'made-for-a-minute';
        CREATE DATABASE "tenant_{tenant}" TEMPLATE pgsilo_template;
        GRANT CONNECT ON DATABASE "tenant_{tenant}" TO "tenant_{tenant}_broker";""")
    mount, name = f"pgsilo/{tenant}", f"tenant-{tenant}"
    sandbox.bao("POST", f"sys/mounts/{mount}", {"type": "database"})
    sandbox.bao("POST", f"{mount}/config/{name}", {
        "plugin_name": "postgresql-database-plugin", "password_authentication": "scram-sha-256",
        "connection_url": "postgresql://{{username}}:{{password}}@127.0.0.1:%s/tenant_%s?sslmode=disable"
                          % (sandbox.env["PG_PORT"], tenant),
        "username": f"tenant_{tenant}_broker", "password": "made-for-a-minute",
        "allowed_roles": f"{name}-*", "verify_connection": False,
        "max_open_connections": 4, "max_connection_lifetime": lifetime,
    })
    sandbox.bao("POST", f"{mount}/roles/{name}-rw", {
        "db_name": name, "default_ttl": "1h", "max_ttl": "24h",
        "creation_statements": recipe("docker/openbao/create.sql", tenant),
        "revocation_statements": [recipe("docker/openbao/stop.sql", tenant), "COMMIT",
                                  recipe("docker/openbao/drop.sql", tenant), "BEGIN"],
    })


def lease(sandbox, tenant):
    """A credential's time in ms; it is given back."""
    began = time.monotonic()
    made = sandbox.bao("GET", f"pgsilo/{tenant}/creds/tenant-{tenant}-rw")
    took = (time.monotonic() - began) * 1000
    sandbox.bao("PUT", "sys/leases/revoke", {"lease_id": made["lease_id"], "sync": True})
    return took


def main():
    program, count, lifetime = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    seconds = float(lifetime.rstrip("s"))
    with tempfile.TemporaryDirectory() as dir:
        sandbox = Sandbox(program, os.path.join(dir, "sandbox"), count)
        try:
            tenants = [f"t{number}" for number in range(count)]
            for tenant in tenants:
                make(sandbox, tenant, lifetime)
            had, before = sandbox.brokers(), sandbox.memory()
            cold = statistics.median([lease(sandbox, tenant) for tenant in tenants])
            if seconds == 0:
                warm = statistics.median([lease(sandbox, tenant) for tenant in tenants])
            else:
                warm = statistics.median([lease(sandbox, tenants[-1]) for _ in range(20)])
            held, during = sandbox.brokers(), sandbox.memory()
            print(f"{count} tenants, max_connection_lifetime {lifetime}")
            print(f"a credential: {cold:.1f} ms with a new connection, {warm:.1f} ms with one that was there")
            print(f"brokers' connections: {had} before, {held} at work; memory: {before:.0f} MiB, {during:.0f} MiB")
            time.sleep(2 * seconds + 60)
            left, after = sandbox.brokers(), sandbox.memory()
            print(f"{2 * seconds + 60:.0f} s later: {left} connections, {after:.0f} MiB")
        finally:
            sandbox.ends()


main()
