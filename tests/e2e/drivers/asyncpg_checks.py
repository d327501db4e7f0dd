"""asyncpg, which speaks the protocol itself; see checks.py."""

import asyncio
import io
import os
import ssl

import asyncpg

from checks import CA, HOST, OTHER_TENANT, PORT, TENANT, TLS, TOKEN, WATCH, check, over_tls, run

BASE = {"host": HOST, "port": PORT, "user": "app", "password": TOKEN, "database": TENANT, "timeout": 30}
if TLS:
    BASE["ssl"] = ssl.create_default_context(cafile=CA)


def connect(**changes):
    return asyncpg.connect(**{**BASE, **changes})


async def raises(kind, awaitable, text=""):
    try:
        await awaitable
    except kind as error:
        assert text in str(error), error
        return error
    raise AssertionError("no %s" % kind.__name__)


@check
async def queries_and_types():
    connection = await connect(server_settings={"application_name": "apg", "search_path": "pg_temp"})
    assert connection.get_server_pid() == await connection.fetchval("SELECT pg_backend_pid()")
    assert await connection.fetchval("SELECT current_database()") == "tenant_acme"
    assert await connection.fetchval("SHOW application_name") == "apg"
    # Types that it has to look up by itself.
    await connection.execute("CREATE TYPE pg_temp.mood AS ENUM ('sad', 'ok')")
    await connection.execute("CREATE TYPE pg_temp.pair AS (a int, b text)")
    row = await connection.fetchrow(
        "SELECT $1::int8 AS i, $2::text AS t, $3::bytea AS b, $4::int[] AS a, 'ok'::pg_temp.mood AS m, "
        "ROW(1, 'x')::pg_temp.pair AS p", 2**60, "日本語", b"\0\xff", [1, None]
    )
    assert (row["i"], row["t"], row["b"], row["a"], row["m"]) == (2**60, "日本語", b"\0\xff", [1, None], "ok")
    assert tuple(row["p"]) == (1, "x")
    assert await connection.execute("SELECT 1; SELECT 2") == "SELECT 1"
    await connection.close()


@check
async def prepared_statements_and_transactions():
    connection = await connect()
    statement = await connection.prepare("SELECT $1::int + 1")
    for number in range(100):
        assert await statement.fetchval(number) == number + 1
    await connection.execute("CREATE TEMP TABLE one (n int PRIMARY KEY)")
    await connection.executemany("INSERT INTO one VALUES ($1)", [(n,) for n in range(1000)])
    async with connection.transaction():
        error = await raises(asyncpg.UniqueViolationError, _insert_in_savepoint(connection))
        assert error.constraint_name == "one_pkey"
        assert await connection.fetchval("SELECT count(*) FROM one") == 1000
    await raises(asyncpg.DivisionByZeroError, connection.fetch("SELECT 1 / 0"))
    assert await connection.fetchval("SELECT 2") == 2
    await connection.close()


async def _insert_in_savepoint(connection):
    async with connection.transaction():
        await connection.execute("INSERT INTO one VALUES (1)")


@check
async def cursors():
    connection = await connect()
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        total = 0
        async for row in connection.cursor("SELECT generate_series(1, 1000)", prefetch=50):
            total += row[0]
        assert total == 500500
        cursor = await connection.cursor("SELECT generate_series(1, 1000)")
        await cursor.forward(900)
        assert (await cursor.fetchrow())[0] == 901
    await connection.close()


@check
async def copy_both_ways():
    connection = await connect()
    await connection.execute("CREATE TEMP TABLE copied (n int8, t text)")
    rows = 50_000
    await connection.copy_records_to_table("copied", records=[(n, "t%d" % n) for n in range(rows)])
    assert await connection.fetchval("SELECT sum(n) FROM copied") == rows * (rows - 1) // 2
    out = io.BytesIO()
    assert await connection.copy_from_query("SELECT * FROM copied ORDER BY n", output=out, format="csv") == "COPY %d" % rows
    out.seek(0)
    await connection.execute("TRUNCATE copied")
    assert await connection.copy_to_table("copied", source=out, format="csv") == "COPY %d" % rows
    await raises(
        asyncpg.InvalidTextRepresentationError, connection.copy_to_table("copied", source=io.BytesIO(b"x,y\n"), format="csv")
    )
    assert await connection.fetchval("SELECT count(*) FROM copied") == rows
    await connection.close()


@check
async def notifications():
    listener, sender = await connect(), await connect()
    heard = asyncio.get_running_loop().create_future()
    await listener.add_listener("news", lambda _connection, *notify: heard.set_result(notify))
    await sender.execute("NOTIFY news, 'extra'")
    assert await asyncio.wait_for(heard, 30) == (sender.get_server_pid(), "news", "extra")
    await listener.close()
    await sender.close()


@check
async def a_timeout_cancels_its_query():
    connection = await connect()
    for number in range(3):
        await raises(asyncio.TimeoutError, connection.fetch("SELECT pg_sleep(60)", timeout=0.2))
        assert await connection.fetchval("SELECT $1::int", number) == number
    task = asyncio.ensure_future(connection.fetch("SELECT pg_sleep(60)"))
    watcher = await asyncpg.connect(WATCH)
    running = "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = $1"
    while not await watcher.fetchval(running, connection.get_server_pid()):
        await asyncio.sleep(0.01)
    task.cancel()
    await raises(asyncio.CancelledError, task)
    assert await connection.fetchval("SELECT 9") == 9
    await watcher.close()
    await connection.close()


@check
async def a_pool_resets_and_reuses_its_sessions():
    async with asyncpg.create_pool(**BASE, min_size=2, max_size=8) as pool:

        async def work(number):
            async with pool.acquire() as connection:
                await connection.execute("SET work_mem = '5MB'")
                await connection.execute("LISTEN something")
                return await connection.fetchval("SELECT $1::int", number)

        assert await asyncio.gather(*(work(n) for n in range(100))) == list(range(100))
        async with pool.acquire() as connection:
            # What its reset sends comes back to the tenant's role, not to the leased one.
            assert await connection.fetchval("SELECT current_user") == "tenant_acme_app"
            assert await connection.fetchval("SHOW work_mem") == "4MB"


@check
async def values_of_64_mib_both_ways():
    connection = await connect()
    value = os.urandom(1 << 20) * 64
    assert await connection.fetchval("SELECT $1::bytea", value) == value
    await connection.close()


@check
async def what_is_refused_has_postgresqls_classes():
    await raises(asyncpg.InvalidPasswordError, connect(password="no token"), "session token authentication failed")
    await raises(asyncpg.InvalidCatalogNameError, connect(database=OTHER_TENANT))


@over_tls
async def every_way_to_tls():
    for mode in ("prefer", "require"):
        connection = await connect(ssl=mode)
        await connection.close()
    error = await raises(asyncpg.InvalidAuthorizationSpecificationError, connect(ssl=False))
    assert "TLS is required" in str(error)
    direct = ssl.create_default_context(cafile=CA)
    direct.set_alpn_protocols(["postgresql"])
    connection = await connect(ssl=direct, direct_tls=True)
    await raises(asyncio.TimeoutError, connection.fetch("SELECT pg_sleep(60)", timeout=0.2))
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


run()
