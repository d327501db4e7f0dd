"""Times logins by libpq: connection strings on standard input, one a line; then, for each, a line of
the seconds that every login took. They take turns, RATE a second altogether each."""

import sys
import time

from psycopg import pq

count, rate = int(sys.argv[1]), float(sys.argv[2])
targets = [line.strip().encode() for line in sys.stdin if line.strip()]
took = [[] for _ in targets]
due = time.monotonic()
for number in range(count + 3):
    for target, times in zip(targets, took):
        time.sleep(max(0.0, due - time.monotonic()))
        due += 1.0 / rate / len(targets)
        began = time.perf_counter()
        connection = pq.PGconn.connect(target)
        ended = time.perf_counter()
        if connection.status != pq.ConnStatus.OK:
            sys.exit(connection.error_message.decode())
        connection.finish()
        # The first few fill caches on every side.
        if number >= 3:
            times.append(ended - began)
for times in took:
    print(*times)
