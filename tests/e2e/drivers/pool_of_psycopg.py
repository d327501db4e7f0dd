"""psycopg_pool's ConnectionPool; see pools.py."""

from psycopg_pool import ConnectionPool

from pools import BASE, LIFETIME, SIZE, Pool, checks_of, fresh_token


class PsycopgPool(Pool):
    def __init__(self):
        super().__init__()
        lifetime = {"max_lifetime": LIFETIME} if LIFETIME else {}
        self.pool = ConnectionPool(
            min_size=SIZE,
            max_size=SIZE,
            # Called for each new connection.
            kwargs=lambda: {**BASE, "password": fresh_token()},
            configure=self.hear,
            check=ConnectionPool.check_connection,
            open=False,
            **lifetime,
        )
        self.pool.open(wait=True)

    def connect(self):
        return self.pool.connection()

    def maintain(self):
        self.pool.check()

    def close(self):
        self.pool.close()


checks_of(PsycopgPool)
