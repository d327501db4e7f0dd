"""SQLAlchemy's QueuePool over psycopg; see pools.py."""

import sqlalchemy

from pools import BASE, LIFETIME, SIZE, Pool, checks_of, fresh_token


class SqlAlchemyPool(Pool):
    Error = sqlalchemy.exc.DBAPIError

    def __init__(self):
        super().__init__()
        lifetime = {"pool_recycle": LIFETIME} if LIFETIME else {}
        self.engine = sqlalchemy.create_engine(
            "postgresql+psycopg://", connect_args=BASE, pool_size=SIZE, max_overflow=0, pool_pre_ping=True, **lifetime
        )

        @sqlalchemy.event.listens_for(self.engine, "do_connect")
        def with_a_fresh_token(_dialect, _record, _arguments, parameters):
            parameters["password"] = fresh_token()

        @sqlalchemy.event.listens_for(self.engine, "connect")
        def made(connection, _record):
            self.hear(connection)

    def connect(self):
        return self.engine.connect()

    def execute(self, connection, sql):
        connection.exec_driver_sql(sql)

    def psycopg_connection(self, connection):
        return connection.connection.driver_connection

    def psycopg_error(self, error):
        return error.orig

    def close(self):
        self.engine.dispose()


checks_of(SqlAlchemyPool)
