"""What a pool has to show when pgsilo ends its sessions; see checks.py for the rest.

The rule is that of the pools' own documents. A session that was ended while it was idle is never
seen by the application: the pool notices when it hands it out, or before. One that is ended in
use gives its user one error, 57P01 with pgsilo's words (57014 and then that, if a query was
running at the very end), and the next checkout succeeds. libpq tells those words as a notice if
they come right behind an answer, and then that the server has closed the connection.
"""

import concurrent.futures
import contextlib
import os
import threading
import time
import urllib.request

import psycopg

from checks import CA, HOST, PORT, TENANT, TLS, WATCH, check, run, wait_until

SIZE = int(os.environ["PGSILO_POOL_SIZE"])
LOOPS = 2
# Seconds: far more than a few logins take, far less than any pool's own timeout.
PROMPT = 10
ADMIN_SHUTDOWN, QUERY_CANCELED = "57P01", "57014"
# What pgsilo says when it ends these sessions; absent where it must have no reason to.
WORDS = os.environ.get("PGSILO_WORDS")
# How long a pool may keep a connection: far below a session's life, where that is set.
LIFETIME = float(os.environ["PGSILO_LIFETIME"]) if "PGSILO_LIFETIME" in os.environ else None

BASE = {"host": HOST, "port": PORT, "user": "app", "dbname": TENANT, "connect_timeout": 30}
if TLS:
    BASE.update(sslmode="verify-full", sslrootcert=CA)


def fresh_token():
    """A token as the issuer makes it now: one for each new connection."""
    with urllib.request.urlopen(os.environ["PGSILO_ISSUER"], timeout=30) as answer:
        return answer.read().decode()


def fields(told):
    return (told.severity_nonlocalized, told.sqlstate, told.message_primary)


class Pool:
    """A pool under test, and what has happened in it. What differs is said by each script."""

    Error = psycopg.Error

    def __init__(self):
        self.lock = threading.Lock()
        self.ended = []
        self.notices = {}

    def connect(self):
        """A context manager that checks out a connection and gives it back."""
        raise NotImplementedError

    def psycopg_connection(self, connection):
        return connection

    def execute(self, connection, sql):
        connection.execute(sql)

    def psycopg_error(self, error):
        return error

    def maintain(self):
        """What an application has to do now and then."""

    def pid(self, connection):
        return self.psycopg_connection(connection).info.backend_pid

    def use(self, work):
        """Checks out a connection, which always succeeds, and works with it. Whether its session
        ended in use: with an error that an application knows, once for each session."""
        pid = None
        try:
            with self.connect() as connection:
                pid = self.pid(connection)
                self.work(connection, work)
        except self.Error as error:
            if pid is None:
                raise AssertionError("a checkout failed") from error
            self.must_be_an_end(self.psycopg_error(error), pid)
            with self.lock:
                assert pid not in self.ended, "a session ended twice"
                self.ended.append(pid)
            return True
        return False

    def work(self, connection, work):
        try:
            work(connection)
        except self.Error as error:
            if self.psycopg_error(error).sqlstate != QUERY_CANCELED:
                raise
            # It ran at the very end, which the next statement hears of.
            self.execute(connection, "SELECT 1")
            raise AssertionError("cancelled, and its session lives on")

    def hear(self, connection):
        """Keeps the notices of a new connection, whose fields are gone once they were told."""
        notices = self.notices[connection.info.backend_pid] = []
        connection.add_notice_handler(lambda notice: notices.append(fields(notice)))

    def must_be_an_end(self, error, pid):
        assert WORDS, error
        told = fields(error.diag)
        if error.sqlstate is None:
            assert "server closed the connection" in str(error) or "connection is lost" in str(error), error
            (told,) = self.notices[pid]
        assert told == ("FATAL", ADMIN_SHUTDOWN, WORDS), (told, error)

    def fill(self, work=lambda connection: None):
        """Checks out all connections of the pool at once, and works with each; their processes. No
        error is expected."""
        barrier = threading.Barrier(SIZE)

        def one():
            try:
                with self.connect() as connection:
                    work(connection)
                    barrier.wait(60)
                    return self.pid(connection)
            except self.Error:
                barrier.abort()
                raise

        with concurrent.futures.ThreadPoolExecutor(SIZE) as threads:
            jobs = [threads.submit(one) for _ in range(SIZE)]
        errors = [job.exception() for job in jobs]
        assert not any(errors), errors
        pids = {job.result() for job in jobs}
        assert len(pids) == SIZE, pids
        return pids


class Watch:
    """A superuser who sees which server processes there are."""

    def __init__(self):
        self.lock = threading.Lock()
        self.connection = psycopg.connect(WATCH, autocommit=True)

    def gone(self, pids):
        query = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)"
        with self.lock:
            return self.connection.execute(query, (list(pids),)).fetchone()[0] == 0

    def wait_until_gone(self, pids, what):
        wait_until(lambda: self.gone(pids), what)


def short_transaction(pool):
    def work(connection):
        pool.execute(connection, "SELECT pg_sleep(0.002)")
        pool.execute(connection, "SELECT 1")
        connection.commit()

    return work


def work_until_gone(pool, watch, pids, jobs, work=short_transaction):
    """Threads that each do one job, then short transactions or other work until those processes are gone."""
    over = threading.Event()

    def run_on(job):
        job()
        while not over.is_set():
            pool.use(work(pool))

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as threads:
        running = [threads.submit(run_on, job) for job in jobs]
        try:
            watch.wait_until_gone(pids, "sessions to end while others work")
        finally:
            over.set()
        for job in running:
            job.result()


def nothing():
    pass


def lives_on_when_its_sessions_end(pool):
    """Three endings of every session: one while some work and others are idle, two in idleness,
    behind which all connections are wanted at once, and a single one."""
    watch = Watch()
    first = pool.fill()

    def idle_in_a_transaction():
        def work(connection):
            pool.execute(connection, "SELECT 1")
            watch.wait_until_gone({pool.pid(connection)}, "a transaction's session to end")
            pool.execute(connection, "SELECT 2")

        assert pool.use(work), "a transaction outlived its session"

    def in_a_query():
        def work(connection):
            pool.execute(connection, "SELECT pg_sleep(600)")

        assert pool.use(work), "a query outlived its session"

    work_until_gone(pool, watch, first, [idle_in_a_transaction, in_a_query] + [nothing] * LOOPS)
    assert len(pool.ended) >= 2, pool.ended

    second = pool.fill()
    watch.wait_until_gone(second, "the second sessions to end, all of them idle")
    third = pool.fill(short_transaction(pool))
    watch.wait_until_gone(third, "the third sessions to end, all of them idle")
    pool.maintain()
    began = time.monotonic()
    with pool.connect() as connection:
        fourth = {pool.pid(connection)}
        short_transaction(pool)(connection)
    assert time.monotonic() - began < PROMPT, "a lonely checkout waits for long"
    assert len(first | second | third | fourth) == 3 * SIZE + 1
    print("sessions that ended in use: %d" % len(pool.ended))


def retires_its_connections_in_time(pool):
    """With a lifetime below that of the sessions no transaction is ever interrupted."""
    watch = Watch()
    first = pool.fill()
    work_until_gone(pool, watch, first, [nothing] * SIZE)
    assert not pool.ended


def after_a_while(pool):
    def work(connection):
        # What the application does before its first statement.
        time.sleep(0.05)
        short_transaction(pool)(connection)

    return work


def nobody_notices(pool):
    """Whoever was handed a connection a moment ago keeps it, and the next one is handed another."""
    watch = Watch()
    first = pool.fill()
    work_until_gone(pool, watch, first, [nothing] * SIZE, after_a_while)
    assert not pool.ended


def checks_of(make):
    """Runs what this run is about with a pool that `make` makes, a context manager."""

    @check
    def pool():
        with contextlib.closing(make()) as pool:
            if LIFETIME:
                retires_its_connections_in_time(pool)
            elif WORDS:
                lives_on_when_its_sessions_end(pool)
            else:
                nobody_notices(pool)

    run()
