"""A pool in front of a pgsilo that ends its sessions, used for a while: what its users read of that.
Each takes a connection, holds it for so long before their first statement, does a transaction, gives it
back, and waits for so long. One line of JSON: how often that was done, and what failed how often."""

import asyncio
import collections
import json
import os
import random
import sys
import threading
import time

POOL, SIZE, HOLD, GAP, SECONDS = sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:6])
HOST, PORT, TOKEN = os.environ["PGSILO_HOST"], int(os.environ["PGSILO_PORT"]), os.environ["PGSILO_TOKEN"]
END = time.monotonic() + SECONDS

uses = 0
failures = collections.Counter()


def failed(error):
    failures["%s: %s" % (type(error).__name__, str(error).split("\n")[0][:60])] += 1


def pause():
    """Around GAP; none where it is none."""
    time.sleep(GAP * random.uniform(0.5, 1.5))


def in_threads(connect):
    lock = threading.Lock()

    def user():
        global uses
        while time.monotonic() < END:
            error = None
            try:
                with connect() as (connection, execute):
                    time.sleep(HOLD)
                    execute("SELECT 1")
                    execute("SELECT 2")
                    connection.commit()
            except Exception as raised:
                error = raised
            with lock:
                uses += 1
                if error:
                    failed(error)
            pause()

    users = [threading.Thread(target=user) for _ in range(SIZE)]
    for each in users:
        each.start()
    for each in users:
        each.join()


def sqlalchemy():
    import contextlib

    import sqlalchemy

    arguments = {"host": HOST, "port": PORT, "user": "app", "password": TOKEN, "dbname": "acme"}
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", connect_args=arguments, pool_size=SIZE, max_overflow=0, pool_pre_ping=True
    )

    @contextlib.contextmanager
    def connect():
        with engine.connect() as connection:
            yield connection, connection.exec_driver_sql

    in_threads(connect)


def psycopg_pool():
    import contextlib

    from psycopg_pool import ConnectionPool

    arguments = {"host": HOST, "port": PORT, "user": "app", "password": TOKEN, "dbname": "acme"}
    with ConnectionPool(
        kwargs=arguments, min_size=SIZE, max_size=SIZE, check=ConnectionPool.check_connection, open=True
    ) as pool:

        @contextlib.contextmanager
        def connect():
            with pool.connection() as connection:
                yield connection, connection.execute

        in_threads(connect)


async def nothing(_connection):
    pass


def asyncpg(reset=None):
    """It checks nothing, and resets what is given back, if it is not told to do something else."""
    import asyncpg

    async def run():
        arguments = {"host": HOST, "port": PORT, "user": "app", "password": TOKEN, "database": "acme"}
        pool = await asyncpg.create_pool(min_size=SIZE, max_size=SIZE, reset=reset, **arguments)

        async def user():
            global uses
            while time.monotonic() < END:
                try:
                    async with pool.acquire() as connection:
                        await asyncio.sleep(HOLD)
                        async with connection.transaction():
                            await connection.execute("SELECT 1")
                            await connection.execute("SELECT 2")
                except Exception as error:
                    failed(error)
                uses += 1
                await asyncio.sleep(GAP * random.uniform(0.5, 1.5))

        await asyncio.gather(*(user() for _ in range(SIZE)))
        await pool.close()

    asyncio.run(run())


{
    "sqlalchemy": sqlalchemy,
    "psycopg_pool": psycopg_pool,
    "asyncpg": asyncpg,
    "asyncpg, unreset": lambda: asyncpg(nothing),
}[POOL]()
print(json.dumps({"uses": uses, "failures": failures}))
