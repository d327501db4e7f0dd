#!/usr/bin/env python3
"""Measures what a mount for each tenant costs OpenBAO: a real server on raft storage, no databases.

For each number of mounts it makes them as the provisioner does (a mount, a configuration, three
roles), takes the server down, and measures: from its start to its first answer, from the unseal key
to active, its memory, its processor time while nobody asks anything, and a login (AppRole) in the
median. The databases are not asked: a credential's time is PostgreSQL's and not the mounts'.

    . .tools/env && scripts/mounts.py 1 100 1000
"""

import http.client
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

KINDS = ("rw", "ro", "migrate")


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


class Server:
    def __init__(self, dir):
        self.dir, self.port, self.token, self.key = dir, free_port(), None, None
        data = dir / "data"
        data.mkdir()
        (dir / "bao.hcl").write_text(
            f'storage "raft" {{\n  path = "{data}"\n  node_id = "one"\n}}\n'
            f'listener "tcp" {{\n  address = "127.0.0.1:{self.port}"\n'
            f'  cluster_address = "127.0.0.1:{free_port()}"\n  tls_disable = true\n}}\n'
            f'api_addr = "http://127.0.0.1:{self.port}"\ncluster_addr = "https://127.0.0.1:{free_port()}"\n'
        )

    def ask(self, method, path, body=None, may_fail=False):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        headers = {"X-Vault-Token": self.token} if self.token else {}
        connection.request(method, f"/v1/{path}", json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        text = answer.read()
        if answer.status >= 300 and not may_fail:
            sys.exit(f"{method} {path}: {answer.status} {text[:300]}")
        return answer.status, json.loads(text) if text else None

    def starts(self):
        """To its first answer, whatever that is."""
        began = time.monotonic()
        log = open(self.dir / "bao.log", "a")
        program = os.environ.get("PGSILO_BAO", "bao")
        self.process = subprocess.Popen([program, "server", "-config", self.dir / "bao.hcl"], stdout=log, stderr=log)
        while True:
            try:
                self.ask("GET", "sys/health", may_fail=True)
                return time.monotonic() - began
            except OSError:
                if self.process.poll() is not None:
                    sys.exit(f"OpenBAO ended: {(self.dir / 'bao.log').read_text()[-2000:]}")
                time.sleep(0.005)

    def unseals(self):
        """From the key to active."""
        began = time.monotonic()
        self.ask("PUT", "sys/unseal", {"key": self.key})
        while self.ask("GET", "sys/health", may_fail=True)[0] != 200:
            time.sleep(0.005)
        return time.monotonic() - began

    def ends(self):
        self.process.terminate()
        self.process.wait()

    def proportional(self):
        """Its own memory, in MiB."""
        for line in open(f"/proc/{self.process.pid}/smaps_rollup"):
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1]) / 1024

    def processor(self):
        """Seconds so far."""
        fields = open(f"/proc/{self.process.pid}/stat").read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def tenant(server, number):
    mount, name = f"pgsilo/t{number}", f"tenant-t{number}"
    server.ask("POST", f"sys/mounts/{mount}", {"type": "database"})
    server.ask("POST", f"{mount}/config/{name}", {
        "plugin_name": "postgresql-database-plugin", "verify_connection": False,
        "connection_url": "postgresql://{{username}}:{{password}}@127.0.0.1:1/tenant",
        "username": f"tenant_t{number}_broker", "password": "any",
        "allowed_roles": [f"{name}-{kind}" for kind in KINDS],
    })
    for kind in KINDS:
        server.ask("POST", f"{mount}/roles/{name}-{kind}", {
            "db_name": name, "default_ttl": "1h", "max_ttl": "24h",
            "creation_statements": ["SELECT 1"], "revocation_statements": ["SELECT 1"],
        })


def login(server):
    began = time.monotonic()
    _, answer = server.ask("POST", "auth/approle/login", server.proof)
    took = time.monotonic() - began
    held, server.token = server.token, answer["auth"]["client_token"]
    server.ask("POST", "auth/token/revoke-self", {})
    server.token = held
    return took


def measure(count, idle):
    with tempfile.TemporaryDirectory() as dir:
        server = Server(pathlib.Path(dir))
        server.starts()
        try:
            _, born = server.ask("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
            server.key, server.token = born["keys_base64"][0], born["root_token"]
            server.unseals()
            server.ask("POST", "sys/auth/approle", {"type": "approle"})
            server.ask("POST", "auth/approle/role/pgsilo", {"role_id": "pgsilo", "token_period": "60s"})
            _, made = server.ask("POST", "auth/approle/role/pgsilo/secret-id", {})
            server.proof = {"role_id": "pgsilo", "secret_id": made["data"]["secret_id"]}
            began = time.monotonic()
            for number in range(count):
                tenant(server, number)
            making = (time.monotonic() - began) / count
            server.ends()
            start, unseal = server.starts(), server.unseals()
            logins = statistics.median(login(server) for _ in range(200))
            time.sleep(5)
            before, began = server.processor(), time.monotonic()
            time.sleep(idle)
            share = (server.processor() - before) / (time.monotonic() - began)
            memory = server.proportional()
            print(f"| {count} | {making * 1000:.0f} ms | {start:.2f} s | {unseal:.2f} s | {memory:.0f} MiB "
                  f"| {share * 100:.1f} % | {logins * 1000:.1f} ms |", flush=True)
        finally:
            server.ends()


def main():
    counts = [int(count) for count in sys.argv[1:]] or [1, 100, 1000]
    print("| mounts | to make one | start | unseal | memory | processor, idle | login |\n|---|---|---|---|---|---|---|")
    for count in counts:
        # Once a minute OpenBAO looks after each mount.
        measure(count, idle=65)


main()
