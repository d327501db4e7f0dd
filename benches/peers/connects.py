"""Times logins by libpq: connection strings on standard input, one a line; then, for each, a line of
the seconds that every login took. They take turns of a second: one connects RATE times, evenly, while
the others rest, so that what one prepares meanwhile is its own affair."""

import sys
import time

from psycopg import pq

count, rate = int(sys.argv[1]), int(sys.argv[2])
targets = [line.strip().encode() for line in sys.stdin if line.strip()]
took = [[] for _ in targets]


def log_in(target):
    began = time.perf_counter()
    connection = pq.PGconn.connect(target)
    ended = time.perf_counter()
    if connection.status != pq.ConnStatus.OK:
        sys.exit(connection.error_message.decode())
    connection.finish()
    return ended - began


# The first few fill caches on every side.
for target in targets:
    for _ in range(3):
        log_in(target)
for _ in range(0, count, rate):
    for target, times in zip(targets, took):
        due = time.monotonic()
        for _ in range(rate):
            time.sleep(max(0.0, due - time.monotonic()))
            due += 1.0 / rate
            times.append(log_in(target))
for times in took:
    print(*times)
