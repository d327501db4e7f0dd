"""Every way in which psycopg (libpq) and asyncpg can prove who they are, beside a password."""

import asyncio
import os
import ssl

import asyncpg
import psycopg

ENV = os.environ
CA, CERTIFICATE, KEY = ENV["PGSILO_CA"], ENV["CLIENT_CERTIFICATE"], ENV["CLIENT_KEY"]
SHOWN = {"sslmode": "verify-full", "sslrootcert": CA, "sslcert": CERTIFICATE, "sslkey": KEY}
WAYS = []


def way(function):
    WAYS.append(function)
    return function


def psycopg_lands(**how):
    with psycopg.connect(user="app", dbname="acme", connect_timeout=30, **how) as connection:
        assert connection.execute("SELECT current_database()").fetchone() == ("tenant_acme",)


def asyncpg_lands(**how):
    async def run():
        connection = await asyncpg.connect(user="app", database="acme", timeout=30, **how)
        assert await connection.fetchval("SELECT current_database()") == "tenant_acme"
        await connection.close()

    asyncio.run(run())


def shown():
    context = ssl.create_default_context(cafile=CA)
    context.load_cert_chain(CERTIFICATE, KEY)
    return context


@way
def psycopg_by_its_certificate():
    psycopg_lands(host="127.0.0.1", port=ENV["CERTIFICATE_PORT"], **SHOWN)


@way
def psycopg_by_its_certificate_with_direct_tls_and_protocol_3_2():
    how = {"sslnegotiation": "direct", "max_protocol_version": "3.2", "min_protocol_version": "3.2"}
    psycopg_lands(host="127.0.0.1", port=ENV["CERTIFICATE_PORT"], **SHOWN, **how)


@way
def psycopg_with_a_token_bound_to_its_certificate():
    psycopg_lands(host="127.0.0.1", port=ENV["BOUND_PORT"], password=ENV["BOUND_TOKEN"], **SHOWN)


@way
def psycopg_with_a_bound_token_and_no_certificate_is_refused():
    how = {"sslmode": "verify-full", "sslrootcert": CA, "password": ENV["BOUND_TOKEN"]}
    try:
        psycopg_lands(host="127.0.0.1", port=ENV["BOUND_PORT"], **how)
    except psycopg.OperationalError as error:
        assert "bound to another client certificate" in str(error), error
    else:
        raise AssertionError("let in")


@way
def psycopg_through_a_sidecar():
    psycopg_lands(host="127.0.0.1", port=ENV["SIDECAR_PORT"])
    psycopg_lands(host=ENV["SIDECAR_DIR"], port=6432)


@way
def asyncpg_by_its_certificate():
    asyncpg_lands(host="127.0.0.1", port=ENV["CERTIFICATE_PORT"], ssl=shown())


@way
def asyncpg_with_a_token_bound_to_its_certificate():
    asyncpg_lands(host="127.0.0.1", port=ENV["BOUND_PORT"], ssl=shown(), password=ENV["BOUND_TOKEN"])


@way
def asyncpg_through_a_sidecar():
    asyncpg_lands(host="127.0.0.1", port=ENV["SIDECAR_PORT"], ssl=False)
    asyncpg_lands(host=ENV["SIDECAR_DIR"], port=6432)


for number, check in enumerate(WAYS):
    check()
    print(check.__name__)
print("%d of %d passed" % (len(WAYS), len(WAYS)))
