"""Runs the checks of one driver, one after the other, and says which have passed.

A check is a function, or a coroutine function, that raises where something is wrong. The last
line, "N of N passed", is what the test in Rust looks for: a script that stops short has failed.
"""

import asyncio
import inspect
import os
import sys
import time

HOST = os.environ["PGSILO_HOST"]  # an address, or the folder of the Unix socket
PORT = int(os.environ["PGSILO_PORT"])
# A superuser beside the proxy: a tenant's session does not see what the others are doing.
WATCH = os.environ["PG_SUPERUSER_DSN"]
TOKEN = os.environ["PGSILO_TOKEN"]
OTHER_TENANT = "globex"
TENANT = "acme"
CA = os.environ.get("PGSILO_CA")  # absent: this run is over the Unix socket
TLS = CA is not None

_checks = []


def check(function):
    _checks.append(function)
    return function


def over_tls(function):
    """A check of what only TLS has."""
    if TLS:
        _checks.append(function)
    return function


def wait_until(ask, what):
    """Asks until the answer is yes: for what another process does in its own time."""
    began = time.monotonic()
    while not ask():
        assert time.monotonic() - began < 30, "waited in vain for " + what
        time.sleep(0.01)


def run():
    for function in _checks:
        began = time.monotonic()
        if inspect.iscoroutinefunction(function):
            asyncio.run(function())
        else:
            function()
        print("ok %s (%d ms)" % (function.__name__, (time.monotonic() - began) * 1000), flush=True)
    print("%d of %d passed" % (len(_checks), len(_checks)))
    sys.exit(0)
