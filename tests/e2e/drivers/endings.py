"""psycopg (libpq) in loops of short queries, or in a long one, until its session ends: each reads why, with its SQLSTATE.

libpq makes a notice of an error that it reads together with an answer, and then knows only that the
connection is gone.
"""

import os
import threading

import psycopg

HOW = {"host": os.environ["PGSILO_HOST"], "port": os.environ["PGSILO_PORT"], "user": "app", "dbname": "acme"}
ends = []


def loop(slow):
    with psycopg.connect(password=os.environ["PGSILO_TOKEN"], autocommit=True, **HOW) as connection:
        try:
            if slow:
                try:
                    connection.execute("SELECT pg_sleep(600)")
                except psycopg.errors.QueryCanceled:
                    pass
            while True:
                connection.execute("SELECT 1")
        except psycopg.Error as error:
            ends.append((error.sqlstate, str(error).splitlines()[0]))


threads = [threading.Thread(target=loop, args=(number % 2 == 0,)) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
told = [end for end in ends if end == ("57P01", os.environ["PGSILO_WORDS"])]
print(ends)
print("%d of %d passed" % (len(told), len(threads)))
