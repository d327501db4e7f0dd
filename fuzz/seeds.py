#!/usr/bin/env python3
"""Writes the seed corpora and issuer.jwks.json; the same bytes at each run.

    python3 fuzz/seeds.py

Files that a fuzzer found belong into the same folders, named for what they show; this
script leaves them alone. The key that signs the seeds' tokens follows from a fixed number:
it is no secret and good for nothing else.
"""

import base64
import hashlib
import json
import random
import struct
from pathlib import Path

HERE = Path(__file__).parent
NOW = 1_800_000_000  # as in targets.rs


def write(target, seeds):
    folder = HERE / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in seeds.items():
        (folder / name).write_bytes(content)


# --- A client's first packet, behind its length -----------------------------------------


def packet(version, *parameters, end=b"\0"):
    return struct.pack(">I", version) + b"".join(p + b"\0" for p in parameters) + end


V3_0, V3_2 = 0x0003_0000, 0x0003_0002
CANCEL, SSL, GSS = 80877102, 80877103, 80877104
PSQL = (b"user", b"app", b"database", b"acme", b"application_name", b"psql", b"client_encoding", b"UTF8")

STARTUP = {
    "ssl_request": packet(SSL, end=b""),
    "ssl_request_with_more": packet(SSL, end=b"x"),
    "gss_request": packet(GSS, end=b""),
    "psql": packet(V3_0, *PSQL),
    "psql_3_2": packet(V3_2, *PSQL),
    "jdbc": packet(V3_0, b"user", b"app", b"database", b"acme", b"client_encoding", b"UTF8",
                   b"DateStyle", b"ISO", b"TimeZone", b"Europe/Vienna", b"extra_float_digits", b"2"),
    "grease_3_9999": packet(0x0003_270F, *PSQL, b"_pq_.test_protocol_negotiation", b""),
    "version_3_1": packet(0x0003_0001, *PSQL),
    "version_2": packet(0x0002_0000, b""),
    "version_3_65535": packet(0x0003_FFFF, *PSQL),
    "no_user": packet(V3_0, b"database", b"acme"),
    "empty_user": packet(V3_0, b"user", b""),
    "empty_database": packet(V3_0, b"user", b"acme", b"database", b""),
    "user_twice": packet(V3_0, b"user", b"app", b"user", b"postgres", b"database", b"a", b"database", b"globex"),
    "not_utf8": packet(V3_0, b"user", b"\xff\xfe", b"database", b"\xc3\x28"),
    "options": packet(V3_0, *PSQL, b"options", b"-c search_path=evil -c pgsilo.tenant=globex -c role=none"),
    "options_backslash": packet(V3_0, *PSQL, b"options", b"-c a=b\\ c\\"),
    "replication_true": packet(V3_0, *PSQL, b"replication", b"true"),
    "replication_database": packet(V3_0, *PSQL, b"replication", b"database"),
    "replication_off": packet(V3_0, *PSQL, b"replication", b"oFf"),
    "no_final_nul": packet(V3_0, *PSQL, end=b""),
    "name_without_value": packet(V3_0, b"user", b"app", b"database", end=b""),
    "behind_the_end": packet(V3_0, *PSQL, end=b"\0user\0postgres\0\0"),
    "only_a_version": packet(V3_0, end=b""),
    "longest": packet(V3_0, *PSQL, b"options", b"x" * (10_000 - 4 - 71 - 5)),
    "too_long": packet(V3_0, *PSQL, b"options", b"x" * 10_000),
    "many_parameters": packet(V3_0, b"user", b"u", *([b"a", b""] * 3000)),
    "cancel": struct.pack(">III", CANCEL, 4711, 0xDEADBEEF),
    "cancel_3_2": struct.pack(">II", CANCEL, 4711) + bytes(range(32)),
    "cancel_no_secret": struct.pack(">II", CANCEL, 4711),
    "cancel_longest": struct.pack(">II", CANCEL, 4711) + b"\7" * 256,
    "cancel_too_long": struct.pack(">II", CANCEL, 4711) + b"\7" * 257,
    "cancel_short": struct.pack(">I", CANCEL) + b"\0\0",
    "empty": b"",
    "three_bytes": b"\0\3\0",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls_client_hello": bytes.fromhex("16030100c8010000c40303") + bytes(32),
}


# --- Messages of a database ------------------------------------------------------------


def message(tag, body=b"", length=None):
    return tag + struct.pack(">I", len(body) + 4 if length is None else length) + body


def auth(code, rest=b""):
    return message(b"R", struct.pack(">I", code) + rest)


def error(**fields):
    return message(b"E", b"".join(k.encode() + v + b"\0" for k, v in fields.items()) + b"\0")


def row(*values):
    body = struct.pack(">H", len(values))
    for value in values:
        body += struct.pack(">i", -1) if value is None else struct.pack(">i", len(value)) + value
    return message(b"D", body)


def parameter(name, value):
    return message(b"S", name + b"\0" + value + b"\0")


READY = message(b"Z", b"I")
KEY = message(b"K", struct.pack(">II", 4711, 0xDEADBEEF))
GREETING = (auth(0) + parameter(b"server_version", b"18.4") + parameter(b"client_encoding", b"UTF8")
            + parameter(b"session_authorization", b"tenant-acme-rw-x") + KEY + READY)
SCRAM = auth(10, b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0")
CHALLENGE = auth(11, b"r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096")
FINAL = auth(12, b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")
SEAL = message(b"T", struct.pack(">H", 1) + b"substr\0" + bytes(18)) + row(b"acme") + message(b"C", b"SELECT 1\0") + READY

BACKEND = {
    "login_scram": SCRAM + CHALLENGE + FINAL + GREETING + SEAL,
    "login_md5": auth(5, b"salt") + GREETING,
    "login_trust": GREETING,
    "cleartext": auth(3),
    "md5_short_salt": auth(5, b"sal"),
    "gssapi": auth(7),
    "sasl_no_mechanism": auth(10, b"\0"),
    "sasl_unterminated": auth(10, b"SCRAM-SHA-256"),
    "sasl_oauthbearer": auth(10, b"OAUTHBEARER\0\0"),
    "challenge_iterations": auth(11, b"r=x,s=AA==,i=99999999999"),
    "challenge_empty": auth(11),
    "empty_r": message(b"R"),
    "short_r": message(b"R", b"\0\0\0"),
    "huge_code": auth(0xFFFFFFFF),
    "error_auth": error(S=b"FATAL", V=b"FATAL", C=b"28P01", M=b'password authentication failed for user "x"',
                        F=b"auth.c", L=b"321", R=b"auth_failed"),
    "error_full": error(S=b"FATAL", C=b"53300", M=b"sorry, too many clients already"),
    "error_no_sqlstate": error(S=b"FATAL", M=b"go away"),
    "error_not_utf8": error(C=b"\xff\xfe\xfd", M=b"\xc3\x28"),
    "error_unterminated": message(b"E", b"SFATAL\0C57P03"),
    "error_protocol_2": b"EFATAL:  unsupported frontend protocol\n\0",
    "error_empty": message(b"E"),
    "notice": message(b"N", b"SNOTICE\0C00000\0Mhello\0\0"),
    "negotiate": message(b"v", struct.pack(">II", V3_0, 1) + b"_pq_.x\0"),
    "key_3_2": message(b"K", struct.pack(">I", 7) + bytes(range(256))),
    "key_too_long": message(b"K", struct.pack(">I", 7) + bytes(257)),
    "key_no_secret": message(b"K", struct.pack(">I", 7)),
    "key_short": message(b"K", b"\0\0"),
    "seal": SEAL,
    "seal_of_another": row(b"globex") + READY,
    "seal_null": row(None) + READY,
    "seal_twice": row(b"acme") + row(b"acme") + READY,
    "seal_two_columns": row(b"acme", b"globex") + READY,
    "seal_none": message(b"C", b"SELECT 0\0") + READY,
    "seal_lying_length": message(b"D", struct.pack(">Hi", 1, 0x7FFFFFFF) + b"acme"),
    "seal_negative_length": message(b"D", struct.pack(">Hi", 1, -2) + b"acme"),
    "row_empty": message(b"D"),
    "length_below_4": message(b"R", length=3),
    "length_huge": message(b"S", b"a\0b\0", length=0xFFFFFFFF),
    "truncated_header": b"R\0\0",
    "password": message(b"p", b"eyJhbGciOiJFUzI1NiJ9.e30.AA\0"),
    "password_two_nuls": message(b"p", b"a\0b\0"),
    "password_no_nul": message(b"p", b"a"),
    "password_empty": message(b"p", b"\0"),
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
}


# --- Tokens ------------------------------------------------------------------------------


def is_prime(n, dice):
    if any(n % p == 0 for p in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31)):
        return False
    d, s = n - 1, 0
    while d % 2 == 0:
        d, s = d // 2, s + 1
    for _ in range(40):
        x = pow(dice.randrange(2, n - 1), d, n)
        if x in (1, n - 1):
            continue
        for _ in range(s - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def key(seed):
    dice = random.Random(seed)

    def prime():
        while True:
            n = dice.getrandbits(1024) | 1 << 1023 | 1 << 1022 | 1
            if n % 65537 != 1 and is_prime(n, dice):
                return n

    p, q = prime(), prime()
    return p * q, pow(65537, -1, (p - 1) * (q - 1))


def b64(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def to_json(value):
    return json.dumps(value, separators=(",", ":")).encode() if not isinstance(value, bytes) else value


def sign(header, payload, private):
    """RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017, section 8.2)."""
    text = b64(to_json(header)) + b"." + b64(to_json(payload))
    modulus, exponent = private
    digest = bytes.fromhex("3031300d060960864801650304020105000420") + hashlib.sha256(text).digest()
    padded = b"\0\1" + b"\xff" * (256 - 3 - len(digest)) + b"\0" + digest
    return text + b"." + b64(pow(int.from_bytes(padded, "big"), exponent, modulus).to_bytes(256, "big"))


def tokens():
    ours, theirs = key(1), key(2)
    jwk = {"kty": "RSA", "use": "sig", "kid": "seed", "alg": "RS256",
           "n": b64(ours[0].to_bytes(256, "big")).decode(), "e": "AQAB"}
    (HERE / "issuer.jwks.json").write_text(json.dumps({"keys": [jwk]}, indent=2) + "\n")

    head = {"alg": "RS256", "typ": "JWT", "kid": "seed"}
    claims = {"iss": "https://issuer.example", "aud": "pgsilo", "sub": "alice@acme", "jti": "1",
              "iat": NOW - 60, "nbf": NOW - 60, "exp": NOW + 900, "tenant": "acme"}

    def token(header=(), private=ours, **changes):
        payload = {k: v for k, v in {**claims, **changes}.items() if v is not None}
        return sign({k: v for k, v in {**head, **dict(header)}.items() if v is not None}, payload, private)

    good = token()
    text, signature = good.rsplit(b".", 1)
    header, payload = text.split(b".")
    return {
        "good": good,
        "good_list": token(tenant=["acme", "globex", "acme"], aud=["x", "pgsilo"]),
        "good_read_only": token(app={"access": "read-only"}),
        "good_no_kid": token(header={"kid": None}),
        "good_at_jwt": token(header={"typ": "application/at+JWT"}),
        "expired": token(exp=NOW - 3600),
        "expired_within_leeway": token(exp=NOW - 10),
        "expires_far": token(exp=10**18),
        "expires_as_text": token(exp=str(NOW + 900)),
        "expires_fraction": token(exp=NOW + 900.5),
        "expires_negative": token(exp=-1),
        "expires_never": token(exp=None),
        "not_yet": token(nbf=NOW + 3600),
        "audience_other": token(aud="billing"),
        "audience_mixed": token(aud=["pgsilo", 1]),
        "issuer_other": token(iss="https://evil.example"),
        "issuer_list": token(iss=["https://issuer.example"]),
        "subject_empty": token(sub=""),
        "subject_line_break": token(sub="alice\nevent=started"),
        "subject_reordered": token(sub="alice\u202e"),
        "tenant_absent": token(tenant=None),
        "tenant_empty_list": token(tenant=[]),
        "tenant_not_an_id": token(tenant="../globex"),
        "tenant_mixed": token(tenant=["acme", 1]),
        "tenant_too_many": token(tenant=[f"t{n}" for n in range(1001)]),
        "access_unknown": token(app={"access": "superuser"}),
        "access_not_text": token(app={"access": ["read-write"]}),
        "other_key": token(private=theirs),
        "unknown_kid": token(header={"kid": "other"}),
        "kid_not_text": token(header={"kid": 1}),
        "alg_none": b64(to_json({"alg": "none"})) + b"." + payload + b".",
        "alg_none_with_kid": token(header={"alg": "none"}),
        "alg_hs256": token(header={"alg": "HS256"}),
        "alg_other_of_the_key": token(header={"alg": "PS256"}),
        "crit": token(header={"crit": ["exp"]}),
        "jwk_inside": token(header={"jwk": jwk}),
        "typ_logout": token(header={"typ": "logout+jwt"}),
        "header_twice": sign(b'{"alg":"none","alg":"RS256","kid":"seed"}', claims, ours),
        "claim_twice": sign(head, b'{"tenant":"acme",' + to_json(claims)[1:], ours),
        "payload_deep": sign(head, b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", ours),
        "payload_no_object": sign(head, b'["iss"]', ours),
        "payload_not_utf8": sign(head, b'{"iss":"\xff"}', ours),
        "payload_changed": header + b"." + b64(to_json({**claims, "tenant": "globex"})) + b"." + signature,
        "signature_cut": good[:-2],
        "signature_empty": text + b".",
        "signature_padded": good + b"==",
        "signature_spare_bits": good[:-1] + (b"B" if good[-1:] == b"A" else bytes([good[-1] + 1])),
        "two_parts": text,
        "four_parts": good + b".e30",
        "standard_alphabet": b"+/+/." + payload + b"." + signature,
        "space_behind": good + b" ",
        "nul_inside": good[:20] + b"\0" + good[20:],
        "not_ascii": b"\xff" * 40,
        "dots": b"...",
        "empty": b"",
        "a_password": b"hunter2",
        "too_long": b"A" * 65_537,
    }


# --- Streams of messages, behind a byte that says how they are cut ------------------------

QUERY = message(b"Q", b"SELECT 1\0")
ANSWER = message(b"T", struct.pack(">H", 1) + b"?column?\0" + bytes(18)) + row(b"1") + message(b"C", b"SELECT 1\0")
EXTENDED = message(b"1") + message(b"2") + message(b"n") + message(b"C", b"INSERT 0 1\0")

FRAMES = {
    "answer": b"\xff" + ANSWER + READY,
    "answer_bytewise": b"\1" + ANSWER + READY,
    "answer_by_5": b"\5" + ANSWER + READY,
    "query": b"\3" + QUERY + message(b"X"),
    "extended": b"\2" + EXTENDED + READY,
    "pipeline": b"\7" + (EXTENDED + READY) * 5,
    "transaction": b"\6" + message(b"Z", b"T") + ANSWER + message(b"Z", b"T") + READY,
    "failed": b"\4" + error(C=b"22012", M=b"division by zero") + message(b"Z", b"E"),
    "status_unknown": b"\6" + message(b"Z", b"?"),
    "status_alone": b"\5" + READY,
    "ready_empty": b"\5" + message(b"Z") + READY,
    "ready_long": b"\6" + message(b"Z", b"IIII") + READY,
    "ready_cut": b"\1" + READY[:5],
    "copy_out": b"\x10" + message(b"H", bytes(7)) + message(b"d", b"1\t2\n") * 20 + message(b"c") + READY,
    "copy_in": b"\x10" + message(b"d", b"x" * 1000) * 3 + message(b"c"),
    "notification": b"\x09" + message(b"A", struct.pack(">I", 9) + b"jobs\0\0"),
    "length_3": b"\1" + message(b"D", length=3) + READY,
    "length_0": b"\xff" + message(b"D", length=0) + READY,
    "length_largest": b"\2" + message(b"D", b"abc", length=0xFFFFFFFF),
    "header_cut": b"\2" + b"Z\0\0\0",
    "body_cut": b"\3" + row(b"acme")[:-2],
    "no_bodies": b"\1" + message(b"1") * 10,
    "cut_0": b"\0" + READY,
    "empty_stream": b"\1",
    "empty": b"",
}

# --- SASL OAUTHBEARER: the body of a `p` message, or what is in it -------------------------


def initial(response, mechanism=b"OAUTHBEARER", length=None):
    length = len(response) if length is None else length
    return mechanism + b"\0" + struct.pack(">i", length) + response


KV = b"\1"
GOOD_BEARER = b"n,," + KV + b"auth=Bearer a.b-c_d" + KV + KV
SASL = {
    "good": initial(GOOD_BEARER),
    "good_message": GOOD_BEARER,
    "with_host_and_port": initial(b"n,," + KV + b"host=h" + KV + b"port=1" + KV + b"auth=bearer x" + KV + KV),
    "y_flag": initial(b"y,," + GOOD_BEARER[3:]),
    "question": initial(b"n,," + KV + b"auth=" + KV + KV),
    "padded_token": initial(b"n,," + KV + b"auth=Bearer YQ==" + KV + KV),
    "basic": initial(b"n,," + KV + b"auth=Basic YTpi" + KV + KV),
    "channel_binding": initial(b"p=tls-server-end-point,," + GOOD_BEARER[3:]),
    "authorization_identity": initial(b"n,a=root," + GOOD_BEARER[3:]),
    "no_auth": initial(b"n,," + KV + b"host=h" + KV + KV),
    "no_pairs": initial(b"n,," + KV + KV),
    "two_auths": initial(b"n,," + KV + b"auth=Bearer a" + KV + b"auth=Bearer b" + KV + KV),
    "no_terminator": initial(GOOD_BEARER[:-1]),
    "more_behind": initial(GOOD_BEARER + b"x"),
    "empty_response": initial(b""),
    "no_response": initial(b"", length=-1),
    "length_too_long": initial(b"ab", length=3),
    "length_negative": initial(b"", length=-2),
    "other_mechanism": initial(b"n,,n=,r=x", mechanism=b"SCRAM-SHA-256"),
    "answer_to_an_error": KV,
    "not_utf8": initial(b"n,," + KV + b"auth=Bearer \xff" + KV + KV),
    "empty": b"",
}

# --- PROXY protocol ------------------------------------------------------------------------

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def proxy_2(behind, command=0x21, family=0x11, length=None):
    length = len(behind) if length is None else length
    return SIGNATURE + struct.pack(">BBH", command, family, length) + behind


V4 = bytes([192, 0, 2, 7, 127, 0, 0, 1]) + struct.pack(">HH", 56324, 6432)
V6 = bytes(15) + b"\7" + bytes(15) + b"\1" + struct.pack(">HH", 56324, 6432)
BALANCER = {
    "v1_tcp4": b"PROXY TCP4 192.0.2.7 127.0.0.1 56324 6432\r\n",
    "v1_tcp6": b"PROXY TCP6 2001:db8::7 ::1 56324 6432\r\n",
    "v1_unknown": b"PROXY UNKNOWN\r\n",
    "v1_unknown_with_addresses": b"PROXY UNKNOWN ffff:f:f:f:f:f:f:f ffff::1 65535 65535\r\n",
    "v1_no_cr": b"PROXY TCP4 192.0.2.7 127.0.0.1 56324 6432\n",
    "v1_no_port": b"PROXY TCP4 192.0.2.7 127.0.0.1 56324\r\n",
    "v1_port_too_large": b"PROXY TCP4 192.0.2.7 127.0.0.1 65536 6432\r\n",
    "v1_long": b"PROXY " + b"x" * 200,
    "v2_tcp4": proxy_2(V4),
    "v2_tcp6": proxy_2(V6, family=0x21),
    "v2_local": proxy_2(b"", command=0x20, family=0),
    "v2_local_with_addresses": proxy_2(V4, command=0x20),
    "v2_with_tlvs": proxy_2(V4 + b"\4\0\2ab" + b"\x20\0\5\1\0\0\0\0"),
    "v2_tlv_cut": proxy_2(V4 + b"\4\0\x7fab"),
    "v2_udp": proxy_2(V4, family=0x12),
    "v2_unix": proxy_2(bytes(216), family=0x31),
    "v2_length_too_short": proxy_2(V4, length=4),
    "v2_length_too_long": proxy_2(V4, length=500),
    "v2_version_1": proxy_2(V4, command=0x11),
    "startup_packet": packet(V3_0, *PSQL),
    "empty": b"",
}

write("startup", STARTUP)
write("sasl", SASL)
write("balancer", BALANCER)
write("backend_messages", BACKEND)
write("token", tokens())
write("frame_counter", FRAMES)
