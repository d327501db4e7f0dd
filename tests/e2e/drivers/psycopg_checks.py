"""psycopg 3 on libpq 18, as an application uses it; see checks.py."""

import asyncio
import os
import threading

import psycopg
from psycopg import ClientCursor, pq, sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from checks import CA, HOST, OTHER_TENANT, PORT, TENANT, TLS, TOKEN, WATCH, check, over_tls, run, wait_until

BASE = {"host": HOST, "port": PORT, "user": "app", "password": TOKEN, "dbname": TENANT, "connect_timeout": 30}
if TLS:
    BASE.update(sslmode="verify-full", sslrootcert=CA)


def connect(autocommit=True, **changes):
    return psycopg.connect(**{**BASE, **changes}, autocommit=autocommit)


def watching():
    return psycopg.connect(WATCH, autocommit=True)


def one(connection, query, *parameters, **how):
    return connection.execute(query, parameters or None, **how).fetchone()[0]


def refused(text, **changes):
    try:
        connect(**changes).close()
    except psycopg.OperationalError as error:
        assert text in str(error), error
    else:
        raise AssertionError("connected with %r" % changes)


def sleeps(watcher, connection):
    """Whether that connection's server process is inside pg_sleep."""
    query = "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = %s"
    row = watcher.execute(query, (connection.info.backend_pid,)).fetchone()
    return bool(row and row[0])


@check
def the_session_is_the_tenants():
    with connect() as connection:
        assert one(connection, "SELECT current_database()") == "tenant_acme"
        assert one(connection, "SELECT current_user") == "tenant_acme_app"
        assert one(connection, "SELECT session_user").startswith("tenant-acme-rw-")
        assert one(connection, "SELECT pg_backend_pid()") == connection.info.backend_pid
        assert connection.info.server_version // 10000 == int(one(connection, "SHOW server_version_num")) // 10000
        assert connection.pgconn.ssl_in_use == TLS


@check
def settings_of_the_client_are_in_force():
    options = "-c statement_timeout=4321 -c search_path=pg_temp,public"
    with connect(options=options, application_name="a b", client_encoding="latin1") as connection:
        assert one(connection, "SHOW statement_timeout") == "4321ms"
        assert one(connection, "SHOW search_path") == "pg_temp,public"
        assert one(connection, "SHOW application_name") == "a b"
        assert connection.info.parameter_status("application_name") == "a b"
        assert connection.info.encoding == "iso8859-1"
        assert one(connection, "SELECT %s::text", "é") == "é"
        connection.execute("SET TIME ZONE 'Asia/Tokyo'")
        assert connection.info.parameter_status("TimeZone") == "Asia/Tokyo"


@check
def types_travel_as_text_and_as_binary():
    values = (1, -(2**60), 1.5, "日本語", b"\0\xff", [1, None, 3], Jsonb({"a": [1]}), None, True)
    query = "SELECT %s::int4, %s::int8, %s::float8, %s::text, %s::bytea, %s::int4[], %s::jsonb, %s::text, %s::bool"
    with connect() as connection:
        for binary in (False, True):
            row = connection.execute(query, values, binary=binary).fetchone()
            assert row == (1, -(2**60), 1.5, "日本語", b"\0\xff", [1, None, 3], {"a": [1]}, None, True)
        several = connection.execute("SELECT 1; SELECT 'two'; SELECT NULL")
        assert several.fetchone() == (1,)
        assert several.nextset() and several.fetchone() == ("two",)
        client_side = ClientCursor(connection)
        assert client_side.execute("SELECT %s || %s", ("a'", "b")).fetchone() == ("a'b",)
        named = connection.cursor(row_factory=dict_row)
        assert named.execute("SELECT 1 AS a, 2 AS b").fetchone() == {"a": 1, "b": 2}


@check
def prepared_statements():
    with connect() as connection:
        connection.prepare_threshold = 2
        for number in range(20):
            assert one(connection, "SELECT %s + 1", number) == number + 1
        assert one(connection, "SELECT count(*) FROM pg_prepared_statements") == 1
        connection.execute("CREATE TEMP TABLE numbers (n int)")
        cursor = connection.cursor()
        cursor.executemany("INSERT INTO numbers VALUES (%s) RETURNING n", [(n,) for n in range(500)], returning=True)
        returned = [cursor.fetchone()[0]]
        while cursor.nextset():
            returned.append(cursor.fetchone()[0])
        assert returned == list(range(500))
        connection.execute("DEALLOCATE ALL")


@check
def transactions_and_errors():
    with connect() as connection:
        connection.execute("CREATE TEMP TABLE one (n int PRIMARY KEY)")
        with connection.transaction():
            connection.execute("INSERT INTO one VALUES (1)")
            try:
                with connection.transaction():
                    connection.execute("INSERT INTO one VALUES (1)")
            except psycopg.errors.UniqueViolation as error:
                assert error.diag.constraint_name == "one_pkey"
                assert error.diag.message_detail == "Key (n)=(1) already exists."
            else:
                raise AssertionError("no error")
            assert connection.info.transaction_status == pq.TransactionStatus.INTRANS
        assert one(connection, "SELECT count(*) FROM one") == 1
        connection.execute("BEGIN")
        try:
            connection.execute("no sql")
        except psycopg.errors.SyntaxError as error:
            assert error.diag.statement_position == "1"
        assert connection.info.transaction_status == pq.TransactionStatus.INERROR
        connection.execute("ROLLBACK")
        notices = []
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        connection.execute("DO $$BEGIN RAISE NOTICE 'hear, hear'; END$$")
        assert notices == ["hear, hear"]


@check
def pipelines():
    with connect() as connection, connection.pipeline() as pipeline:
        cursors = [connection.execute("SELECT %s::int", (n,)) for n in range(1000)]
        pipeline.sync()
        assert [cursor.fetchone()[0] for cursor in cursors] == list(range(1000))
        before = connection.execute("SELECT 1")
        skipped = connection.cursor()
        try:
            # The error is raised wherever its answer is first seen: at the next statement, if
            # that is slow enough, or at the sync.
            connection.execute("SELECT 1 / 0")
            skipped.execute("SELECT 2")
            pipeline.sync()
        except psycopg.errors.DivisionByZero:
            pass
        else:
            raise AssertionError("no error")
        try:
            pipeline.sync()
        except psycopg.errors.PipelineAborted:
            pass
        assert before.fetchone() == (1,)
        assert skipped.pgresult is None
        assert connection.execute("SELECT 3").fetchone() == (3,)


@check
def copy_both_ways():
    rows = 100_000
    with connect() as connection:
        connection.execute("CREATE TEMP TABLE copied (n int8, t text)")
        for binary in (False, True):
            how = sql.SQL("(FORMAT BINARY)" if binary else "")
            connection.execute("TRUNCATE copied")
            with connection.cursor().copy(sql.SQL("COPY copied FROM STDIN {}").format(how)) as copy:
                if binary:
                    copy.set_types(("int8", "text"))
                for n in range(rows):
                    copy.write_row((n, "text\tof\n%d" % n))
            assert one(connection, "SELECT count(*) || '/' || sum(n) FROM copied") == "%d/%d" % (rows, rows * (rows - 1) // 2)
            with connection.cursor().copy(sql.SQL("COPY (TABLE copied ORDER BY n) TO STDOUT {}").format(how)) as copy:
                copy.set_types(("int8", "text"))
                for n, row in enumerate(copy.rows()):
                    assert row == (n, "text\tof\n%d" % n)
            assert n == rows - 1
        try:
            with connection.cursor().copy("COPY copied FROM STDIN") as copy:
                copy.write("not a number\tx\n")
        except psycopg.errors.InvalidTextRepresentation:
            pass
        else:
            raise AssertionError("no error")
        try:
            with connection.cursor().copy("COPY copied FROM STDIN") as copy:
                copy.write("1\tx\n")
                raise KeyError("changed my mind")
        except KeyError:
            pass
        assert one(connection, "SELECT count(*) FROM copied") == rows


@check
def server_side_cursors():
    with connect(autocommit=False) as connection:
        with connection.cursor("plain") as cursor:
            cursor.itersize = 100
            cursor.execute("SELECT generate_series(1, 1000)")
            assert sum(row[0] for row in cursor) == 500500
        with connection.cursor("scrolling", scrollable=True) as cursor:
            cursor.execute("SELECT generate_series(1, 1000)")
            cursor.scroll(900)
            assert cursor.fetchone() == (901,)
            cursor.scroll(-500)
            assert cursor.fetchone() == (402,)
        cursor = connection.cursor("held", withhold=True).execute("SELECT generate_series(1, 3)")
        connection.commit()
        assert cursor.fetchall() == [(1,), (2,), (3,)]
        cursor.close()
        streamed = connection.cursor().stream("SELECT generate_series(1, 1000)")
        assert sum(row[0] for row in streamed) == 500500


@check
def notifications_name_the_process_that_sent_them():
    with connect() as listener, connect() as sender:
        listener.execute("LISTEN news")
        sender.execute("NOTIFY news, 'extra'")
        (notify,) = listener.notifies(timeout=30, stop_after=1)
        assert (notify.channel, notify.payload, notify.pid) == ("news", "extra", sender.info.backend_pid)
        assert notify.pid == one(sender, "SELECT pg_backend_pid()")
        sender.execute("SELECT pg_notify('news', repeat('x', 7999))")
        (notify,) = listener.notifies(timeout=30, stop_after=1)
        assert len(notify.payload) == 7999


def cancelled(connection, cancel):
    """Runs a long query, cancels it from another thread, and goes on."""
    raised = []

    def work():
        try:
            connection.execute("SELECT pg_sleep(60)")
        except psycopg.errors.QueryCanceled as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    with watching() as watcher:
        thread.start()
        wait_until(lambda: sleeps(watcher, connection), "the query to run")
        cancel(connection)
        thread.join(30)
    assert not thread.is_alive() and raised, "not cancelled"
    for number in range(20):
        # A cancel that came late would hit one of these.
        assert one(connection, "SELECT %s::int", number) == number


@check
def queries_are_cancelled_from_another_thread():
    with connect() as connection:
        cancelled(connection, lambda connection: connection.cancel())
        cancelled(connection, lambda connection: connection.cancel_safe(timeout=30))
        cancelled(connection, lambda connection: connection.pgconn.get_cancel().cancel())


@check
def a_cancel_of_an_idle_session_harms_nothing():
    with connect() as connection:
        for number in range(10):
            connection.cancel_safe(timeout=30)
            assert one(connection, "SELECT %s::int", number) == number


@check
def values_of_64_mib_both_ways():
    value = os.urandom(1 << 20) * 64
    with connect() as connection:
        back = one(connection, "SELECT %b::bytea", value, binary=True)
        assert back == value
        assert one(connection, "SELECT length(%t)", "x" * (64 << 20)) == 64 << 20


@check
def protocol_3_2_with_its_long_cancel_key():
    assert psycopg.capabilities.has_full_protocol_version(check=True)
    with connect(min_protocol_version="3.2", max_protocol_version="3.2") as connection:
        assert connection.info.full_protocol_version == 30002
        cancelled(connection, lambda connection: connection.cancel())
        cancelled(connection, lambda connection: connection.cancel_safe(timeout=30))
    with connect(max_protocol_version="latest") as connection:
        assert connection.info.full_protocol_version == 30002
    with connect(max_protocol_version="3.0") as connection:
        assert connection.info.full_protocol_version == 30000


@check
def what_is_refused_reads_like_postgresql():
    refused("session token authentication failed", password="no token")
    refused(f'database "{OTHER_TENANT}" does not exist', dbname=OTHER_TENANT)
    refused("replication connections are not supported", options="", replication="database")


@check
def requirements_of_the_client_are_met():
    connect(require_auth="password").close()
    connect(channel_binding="disable").close()
    connect(channel_binding="prefer").close()
    connect(target_session_attrs="read-write").close()
    connect(gssencmode="disable").close()
    # libpq itself: a token as the password is bound to nothing.
    refused("channel binding required", channel_binding="require")


@check
def the_first_host_that_answers_is_used():
    # Nobody listens on port 1; nothing answers in the other folder.
    connect(host="%s,%s" % ("127.0.0.1" if TLS else "/nonexistent", HOST), port="1,%d" % PORT).close()
    connect(host="%s,%s" % (HOST, HOST), port="%d,%d" % (PORT, PORT), load_balance_hosts="random").close()


@over_tls
def every_way_to_tls():
    for mode in ("prefer", "require", "verify-ca", "verify-full"):
        with connect(sslmode=mode) as connection:
            assert connection.pgconn.ssl_in_use
    refused("TLS is required", sslmode="disable")
    refused("does not match host name", host="other.example", hostaddr=HOST)
    connect(host="localhost", hostaddr=HOST).close()
    with connect(sslnegotiation="direct") as connection:
        assert connection.pgconn.ssl_in_use
        cancelled(connection, lambda connection: connection.cancel_safe(timeout=30))
    connect(ssl_max_protocol_version="TLSv1.2").close()
    connect(ssl_min_protocol_version="TLSv1.3").close()


@check
async def asynchronous_connections():
    connection = await psycopg.AsyncConnection.connect(**BASE, autocommit=True)
    watcher = await psycopg.AsyncConnection.connect(WATCH, autocommit=True)
    other = await psycopg.AsyncConnection.connect(**BASE, autocommit=True)
    async with connection, watcher, other:
        cursor = await connection.execute("SELECT %s::int", (7,))
        assert await cursor.fetchone() == (7,)
        async with connection.cursor().copy("COPY (SELECT generate_series(1, 1000)) TO STDOUT") as copy:
            assert len([row async for row in copy.rows()]) == 1000
        async with connection.pipeline():
            cursors = [await connection.execute("SELECT %s::int", (n,)) for n in range(100)]
            assert [(await cursor.fetchone())[0] for cursor in cursors] == list(range(100))
        # asyncio cancels a task, psycopg cancels its query.
        task = asyncio.ensure_future(connection.execute("SELECT pg_sleep(60)"))
        running = "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = %s"
        while not (await (await watcher.execute(running, (connection.info.backend_pid,))).fetchone())[0]:
            await asyncio.sleep(0.01)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        else:
            raise AssertionError("not cancelled")
        cursor = await connection.execute("SELECT 8")
        assert await cursor.fetchone() == (8,)
        await connection.execute("LISTEN news")
        await other.execute("NOTIFY news, 'hello'")
        async for notify in connection.notifies(timeout=30, stop_after=1):
            assert (notify.payload, notify.pid) == ("hello", other.info.backend_pid)
    many = [psycopg.AsyncConnection.connect(**BASE) for _ in range(20)]
    for connection in await asyncio.gather(*many):
        await connection.close()


run()
