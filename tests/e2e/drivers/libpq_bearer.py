"""Logs in with libpq 18 and a token from its hook, as applications do that have tokens of their own.

libpq asks the hook for a token when the server offers OAUTHBEARER: PQAUTHDATA_OAUTH_BEARER_TOKEN with
a PGoauthBearerRequest, of which this sets `token`. psycopg has no call for it, so libpq is called
directly: the one that psycopg's binary package carries.
"""

import ctypes
import glob
import os
import sys

import psycopg
import psycopg_binary

BEARER_TOKEN = 1  # PQAUTHDATA_OAUTH_BEARER_TOKEN, libpq-fe.h


class Request(ctypes.Structure):
    _fields_ = [
        ("openid_configuration", ctypes.c_char_p),
        ("scope", ctypes.c_char_p),
        ("asynchronous", ctypes.c_void_p),
        ("cleanup", ctypes.c_void_p),
        ("token", ctypes.c_char_p),
        ("user", ctypes.c_void_p),
    ]


HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
TOKEN = os.environ["PGSILO_TOKEN"].encode()
asked = []


@HOOK
def hook(kind, _connection, data):
    if kind != BEARER_TOKEN:
        return 0
    request = ctypes.cast(data, ctypes.POINTER(Request)).contents
    asked.append((request.openid_configuration, request.scope))
    request.token = TOKEN
    return 1


package = os.path.dirname(psycopg_binary.__file__)
[path] = glob.glob(os.path.join(package, "..", "psycopg_binary.libs", "libpq-*"))
libpq = ctypes.CDLL(path)
libpq.PQconnectdb.restype = ctypes.c_void_p
libpq.PQconnectdb.argtypes = [ctypes.c_char_p]
libpq.PQerrorMessage.restype = ctypes.c_char_p
libpq.PQerrorMessage.argtypes = [ctypes.c_void_p]
libpq.PQexec.restype = ctypes.c_void_p
libpq.PQexec.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
libpq.PQgetvalue.restype = ctypes.c_char_p
libpq.PQgetvalue.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
libpq.PQstatus.argtypes = [ctypes.c_void_p]
libpq.PQsetAuthDataHook(hook)

if libpq.PQlibVersion() < 180000:
    sys.exit("this libpq is older than 18")
connection = libpq.PQconnectdb(os.environ["PGSILO_CONNINFO"].encode())
if libpq.PQstatus(connection) != 0:
    sys.exit("not connected: " + libpq.PQerrorMessage(connection).decode())
if not asked:
    sys.exit("the hook was never asked")
result = libpq.PQexec(connection, b"SELECT current_database()")
print(libpq.PQgetvalue(result, 0, 0).decode())
