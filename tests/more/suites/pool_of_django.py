"""Django's persistent connections, as docs/pools.md has them; see tests/e2e/drivers/pools.py.

Django keeps one connection for each thread. Here a request takes a thread's connection, is a
transaction, and ends as Django's signals have it.
"""

import contextlib
import os
import pathlib
import queue
import re
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests/e2e/drivers"), os.path.join(os.environ["PGSILO_SUITES"], "packages")]

from pools import BASE, LIFETIME, SIZE, Pool, checks_of, fresh_token  # noqa: E402

# Seconds: so long that nothing is retired in this test.
FOR_EVER = 100_000
PAGE = (ROOT / "docs/pools.md").read_text(encoding="utf-8")


def example(name, **names):
    """What an example of the page defines, given the names that it takes for granted."""
    (code,) = re.findall(f"```python\n# {name}\n(.*?)```", PAGE, re.DOTALL)
    exec(code, names)
    return names


server = {"HOST": BASE["host"], "PORT": BASE["port"], "USER": BASE["user"], "NAME": BASE["dbname"]}
server["OPTIONS"] = {name: BASE[name] for name in ("sslmode", "sslrootcert") if name in BASE}
settings = example("Django's settings", server=server, LIFETIME=LIFETIME or FOR_EVER)

import django  # noqa: E402
from django.conf import settings as conf  # noqa: E402

conf.configure(DATABASES=settings["DATABASES"], USE_TZ=True)
django.setup()
engine = settings["DATABASES"]["default"]["ENGINE"]
sys.modules[engine] = types.ModuleType(engine)
sys.modules[f"{engine}.base"] = sys.modules[engine].base = types.ModuleType("base")
vars(sys.modules[engine].base).update(example("Django's backend", token=fresh_token))

from django.core.signals import request_finished, request_started  # noqa: E402
from django.db import Error, connections, transaction  # noqa: E402
from django.db.backends.signals import connection_created  # noqa: E402


class Transaction:
    """What is open in a request."""

    def __init__(self, connection):
        self.connection = connection

    def commit(self):
        """Is done as the request ends."""


class Django(Pool):
    Error = Error

    def __init__(self):
        super().__init__()
        self.idle = queue.LifoQueue()
        for _ in range(SIZE):
            connection = connections.create_connection("default")
            connection.inc_thread_sharing()
            self.idle.put(connection)
        self.made = lambda connection, **_: self.hear(connection.connection)
        connection_created.connect(self.made)

    @contextlib.contextmanager
    def connect(self):
        connection = self.idle.get()
        connections["default"] = connection
        try:
            request_started.send(Django)
            with transaction.atomic():
                connection.ensure_connection()
                yield Transaction(connection)
        finally:
            request_finished.send(Django)
            self.idle.put(connection)

    def execute(self, opened, sql):
        with opened.connection.cursor() as cursor:
            cursor.execute(sql)

    def psycopg_connection(self, opened):
        return opened.connection.connection

    def psycopg_error(self, error):
        return error.__cause__

    def close(self):
        while not self.idle.empty():
            self.idle.get().close()


checks_of(Django)
