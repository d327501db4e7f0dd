//! One edit of an example each: what to replace, with what, and what is said about it.

/// The whole error. It is one line.
pub(crate) const MISTAKES: &[(&str, &str, &str)] = &[
    ("[limits]", "[limits", "pgsilo.toml:110: unclosed table, expected `]`"),
    (
        "[limits]",
        "[limit]",
        "pgsilo.toml:110: limit: unknown key (did you mean \"limits\"?); allowed here: listener, issuer, registry, openbao, lease, limits, pool, admin, log, audit, runtime",
    ),
    (
        "transaction_timeout = \"10m\"",
        "transaction_timeout = \"10 min\"",
        "tenants.toml:24: tenant[0].limits.transaction_timeout: \"10 min\" is not a duration such as \"500ms\", \"10s\", \"15m\", \"2h\" or \"1d\"",
    ),
    (
        "max_sessions = 20 ",
        "max_session = 20 ",
        "tenants.toml:23: tenant[0].limits.max_session: unknown key (did you mean \"max_sessions\"?); allowed here: max_sessions, max_session_rate, idle_timeout, idle_in_transaction_timeout, transaction_timeout, max_session_age",
    ),
    (
        "[limits]",
        "[limits]\nmax_session = 1",
        "pgsilo.toml:111: limits.max_session: unknown key (did you mean \"max_sessions\"?); allowed here: login_timeout, startup_timeout, max_handshakes, max_sessions, max_sessions_per_tenant, max_session_rate_per_tenant, max_connections_per_address, max_token_bytes, idle_timeout, idle_in_transaction_timeout, transaction_timeout, max_session_age, drain_timeout, pause_timeout, dead_peer_timeout",
    ),
    (
        "max_sessions = 10000",
        "max_sessions = \"10000\"",
        "pgsilo.toml:113: limits.max_sessions: invalid type: string \"10000\", expected a whole number, 0 or more",
    ),
    (
        "max_sessions = 10000",
        "max_sessions = -1",
        "pgsilo.toml:113: limits.max_sessions: invalid value: integer `-1`, expected a whole number, 0 or more",
    ),
    (
        "max_sessions = 10000",
        "max_sessions = 10000\nmax_sessions = 1",
        "pgsilo.toml:114: duplicate key",
    ),
    (
        "authority = \"proxy\"",
        "authority = \"session\"",
        "pgsilo.toml:79: openbao.auth: remove it: with authority = \"session\" pgsilo itself does not log in to OpenBAO",
    ),
    (
        "authority = \"proxy\"",
        "authority = \"nobody\"",
        "pgsilo.toml:95: lease.authority: \"nobody\" is not known here; use one of: proxy, session",
    ),
    (
        "address = \"https://127.0.0.1:8200\"",
        "address = \"unix:bao.sock\"",
        "pgsilo.toml:74: openbao.address: not an absolute path; write it like \"unix:/run/bao.sock\"",
    ),
    (
        "auth = { approle = { role_id = \"pgsilo\", secret_id_file = \"secret-id\" } }",
        "auth = { certificate = { role = \"pgsilo\" } }",
        "pgsilo.toml:79: openbao.auth.certificate: needs openbao.client_certificate, the certificate to show",
    ),
    (
        "auth = { approle = { role_id = \"pgsilo\", secret_id_file = \"secret-id\" } }",
        "auth = { jwt = { role = \"pgsilo\" } }",
        "pgsilo.toml:79: openbao.auth.jwt.token_file: missing; name the file of the JWT",
    ),
    (
        "auth = { approle = { role_id = \"pgsilo\", secret_id_file = \"secret-id\" } }",
        "auth = { approle = { mount = \"../sys\", role_id = \"pgsilo\", secret_id_file = \"secret-id\" } }",
        "pgsilo.toml:79: openbao.auth.approle.mount: \"../sys\" is not a mount; write it like \"approle\"",
    ),
    (
        "address = \"127.0.0.1:6432\"",
        "address = \"localhost:6432\"",
        "pgsilo.toml:12: listener[0].address: \"localhost:6432\" is not an IP address and a port such as \"127.0.0.1:6432\" or \"[::1]:6432\"",
    ),
    (
        "address = \"127.0.0.1:6432\"",
        "adress = \"127.0.0.1:6432\"",
        "pgsilo.toml:12: listener[0].adress: unknown key (did you mean \"address\"?); allowed here: address, tls, require_tls, plaintext, socket, mode, allow_uids, auth, sni_suffix, database_names, proxy_protocol",
    ),
    (
        "startup_timeout = \"5s\"",
        "startup_timeout = \"0s\"",
        "pgsilo.toml:124: limits.startup_timeout: zero; a startup packet needs some time, such as \"5s\"",
    ),
    (
        "on_loss = \"count\"",
        "on_loss = \"wait\"",
        "pgsilo.toml:156: audit.on_loss: \"wait\" is not known here; use one of: count, refuse",
    ),
    (
        "queue_bytes = 8388608",
        "queue_bytes = 1000",
        "pgsilo.toml:157: audit.queue_bytes: 1000 is out of range; use 65536 to 1073741824",
    ),
    (
        "queue_bytes = 1048576",
        "queue_bytes = 2000000000",
        "pgsilo.toml:153: log.queue_bytes: 2000000000 is out of range; use 65536 to 1073741824",
    ),
    (
        "login_timeout = \"10s\"",
        "login_timeout = \"10 s\"",
        "pgsilo.toml:111: limits.login_timeout: \"10 s\" is not a duration such as \"500ms\", \"10s\", \"15m\", \"2h\" or \"1d\"",
    ),
    (
        "login_timeout = \"10s\"",
        "login_timeout = 10",
        "pgsilo.toml:111: limits.login_timeout: invalid type: integer `10`, expected a duration such as \"500ms\", \"10s\", \"15m\", \"2h\" or \"1d\"",
    ),
    (
        "login_timeout = \"10s\"",
        "login_timeout = \"0s\"",
        "pgsilo.toml:111: limits.login_timeout: zero; a login needs some time, such as \"10s\"",
    ),
    (
        "format = \"json\"",
        "format = \"jsn\"",
        "pgsilo.toml:151: log.format: \"jsn\" is not known here (did you mean \"json\"?); use one of: json, human",
    ),
    (
        "level = \"info\"",
        "level = \"loud\"",
        "pgsilo.toml:152: log.level: \"loud\" is not known here; use one of: error, warn, info, debug, trace",
    ),
    (
        "mode = \"0660\"",
        "mode = \"0999\"",
        "pgsilo.toml:27: listener[1].mode: \"0999\" is not a file mode such as \"0660\"",
    ),
    (
        "role_id = \"pgsilo\", ",
        "",
        "pgsilo.toml:79: openbao.auth.approle: the key \"role_id\" is missing; add it",
    ),
    ("file = \"tenants.toml\"", "", "pgsilo.toml:63: registry: neither file nor postgres; add one"),
    (
        "tls = { certificate = \"server.crt\", key = \"server.key\" }",
        "tls = true",
        "pgsilo.toml:13: listener[0].tls: invalid type: boolean `true`, expected a table",
    ),
    (
        "audience = [\"pgsilo\"]",
        "audience = \"pgsilo\"",
        "pgsilo.toml:38: issuer[0].audience: invalid type: string \"pgsilo\", expected an array, [...]",
    ),
    (
        "key = \"server.key\" }",
        "key = \"absent.key\" }",
        "pgsilo.toml:13: listener[0].tls.key: cannot read \"absent.key\": No such file or directory (os error 2)",
    ),
    (
        "key = \"server.key\" }",
        "key = \"other.key\" }",
        "pgsilo.toml:13: listener[0].tls.key: the key in \"other.key\" does not belong to the first certificate in \"server.crt\"",
    ),
    (
        "key = \"server.key\" }",
        "key = \"empty\" }",
        "pgsilo.toml:13: listener[0].tls.key: \"empty\" holds no private key; it must be PEM with an unencrypted PRIVATE KEY section",
    ),
    (
        "certificate = \"server.crt\"",
        "certificate = \".\"",
        "pgsilo.toml:13: listener[0].tls.certificate: cannot read \".\": not a regular file",
    ),
    (
        "certificate = \"server.crt\"",
        "certificate = \"server.key\"",
        "pgsilo.toml:13: listener[0].tls.certificate: \"server.key\" holds no certificate; it must be PEM with a CERTIFICATE section",
    ),
    (
        "tls = { certificate",
        "plaintext = true\ntls = { certificate",
        "pgsilo.toml:13: listener[0].plaintext: both tls and plaintext = true; keep one",
    ),
    (
        "tls = { certificate",
        "# ",
        "pgsilo.toml:11: listener[0]: no tls; add tls = { certificate = FILE, key = FILE }, or plaintext = true if tokens may travel in clear",
    ),
    (
        "tls = { certificate = \"server.crt\", key = \"server.key\" }",
        "plaintext = true\nrequire_tls = true",
        "pgsilo.toml:14: listener[0].require_tls: there is no tls to require; remove it",
    ),
    (
        "mode = \"0660\"",
        "plaintext = true",
        "pgsilo.toml:27: listener[1].plaintext: only a TCP listener has it; remove it",
    ),
    (
        "socket = \"/run/pgsilo/.s.PGSQL.6432\"",
        "socket = \"/run\"\naddress = \"127.0.0.1:1\"",
        "pgsilo.toml:25: listener[1]: both address and socket; give each its own [[listener]]",
    ),
    (
        "socket = \"/run/pgsilo/.s.PGSQL.6432\"",
        "",
        "pgsilo.toml:25: listener[1]: neither address nor socket; add one",
    ),
    (
        "socket = \"/run/pgsilo/.s.PGSQL.6432\"\nmode = \"0660\"",
        "address = \"127.0.0.1:6432\"\nplaintext = true\n#",
        "pgsilo.toml:26: listener[1].address: another listener has it already",
    ),
    (
        "socket = \"/run/pgsilo/.s.PGSQL.6432\"\nmode = \"0660\"",
        "address = \"[::ffff:127.0.0.1]:6432\"\nplaintext = true\n#",
        "pgsilo.toml:26: listener[1].address: another listener has it already",
    ),
    (
        "socket = \"/run/pgsilo/.s.PGSQL.6432\"",
        "socket = \"\"",
        "pgsilo.toml:26: listener[1].socket: empty or with a NUL; name the socket's file",
    ),
    (
        "socket = \"/run/pgsilo",
        "socket = \"/xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "pgsilo.toml:26: listener[1].socket: longer than a socket's path can be (107 bytes)",
    ),
    (
        "algorithms = [\"ES256\"]",
        "algorithms = [\"ES256\", \"HS256\"]",
        "pgsilo.toml:40: issuer[0].algorithms[1]: \"HS256\" is not one of RS256 RS384 RS512 PS256 PS384 PS512 ES256 ES384 EdDSA Ed25519",
    ),
    (
        "algorithms = [\"ES256\"]",
        "algorithms = []",
        "pgsilo.toml:40: issuer[0].algorithms: empty; name at least one algorithm",
    ),
    (
        "algorithms = [\"ES256\"]",
        "algorithms = [\"RS256\"]",
        "pgsilo.toml:40: issuer[0].algorithms: no key fits `algorithms`; add the keys' algorithm there or another key",
    ),
    (
        "audience = [\"pgsilo\"]",
        "audience = []",
        "pgsilo.toml:38: issuer[0].audience: empty; name at least one audience",
    ),
    (
        "issuer = \"https://issuer.example\"  ",
        "issuer = \"\"",
        "pgsilo.toml:37: issuer[0].issuer: empty; it must equal the token's `iss`",
    ),
    (
        "jwks = \"jwks.json\"",
        "jwks = \"absent.json\"",
        "pgsilo.toml:41: issuer[0].jwks: cannot read \"absent.json\": No such file or directory (os error 2)",
    ),
    (
        "jwks = \"jwks.json\"",
        "jwks = \"issuer.pem\"",
        "pgsilo.toml:41: issuer[0].jwks: \"issuer.pem\": not a JSON Web Key Set: invalid number at line 1 column 2",
    ),
    (
        "jwks = \"jwks.json\"",
        "jwks = \"twice.json\"",
        "pgsilo.toml:41: issuer[0].jwks: \"twice.json\": two keys have the kid \"a\"; a kid must be unique",
    ),
    (
        "jwks = \"jwks.json\"",
        "jwks = \"private.json\"",
        "pgsilo.toml:41: issuer[0].jwks: \"private.json\": key 0 contains a private key; keep it secret and list only the public part",
    ),
    (
        "jwks = \"jwks.json\"",
        "jwks = \"symmetric.json\"",
        "pgsilo.toml:41: issuer[0].jwks: \"symmetric.json\": no usable key in it; key 0 is passed over: unsupported \"kty\" \"oct\"",
    ),
    (
        "jwks = \"jwks.json\"",
        "",
        "pgsilo.toml:36: issuer[0]: no keys; add jwks = FILE, keys = [...], jwks_url = URL or discovery = true",
    ),
    (
        "jwks = \"jwks.json\"",
        "jwks = \"jwks.json\"\nkeys = []",
        "pgsilo.toml:36: issuer[0]: several sources of keys; keep one of jwks, keys, jwks_url, discovery",
    ),
    (
        "# discovery = true",
        "discovery = true",
        "pgsilo.toml:36: issuer[0]: several sources of keys; keep one of jwks, keys, jwks_url, discovery",
    ),
    (
        "jwks = \"jwks.json\"",
        "jwks = \"jwks.json\"\njwks_url = \"https://issuer.example\"",
        "pgsilo.toml:36: issuer[0]: several sources of keys; keep one of jwks, keys, jwks_url, discovery",
    ),
    (
        "# refresh = \"5m\"",
        "refresh = \"5m\"",
        "pgsilo.toml:45: issuer[0].refresh: only with jwks_url or discovery; remove it",
    ),
    (
        "# max_stale = \"24h\"",
        "max_stale = \"24h\"",
        "pgsilo.toml:46: issuer[0].max_stale: only with jwks_url or discovery; remove it",
    ),
    (
        "# ca = \"issuer-ca.crt\"",
        "ca = \"issuer-ca.crt\"",
        "pgsilo.toml:47: issuer[0].ca: only with jwks_url or discovery; remove it",
    ),
    (
        "jwks = \"jwks.json\"",
        "jwks_url = \"http://issuer.example/jwks\"",
        "pgsilo.toml:41: issuer[0].jwks_url: http to \"issuer.example\" would let the network choose the keys; use https",
    ),
    (
        "jwks = \"jwks.json\"",
        "jwks_url = \"issuer.example/jwks\"",
        "pgsilo.toml:41: issuer[0].jwks_url: not a URL; write it like \"https://issuer.example/jwks.json\"",
    ),
    (
        "jwks = \"jwks.json\"",
        "jwks_url = \"https://user:hunter2@issuer.example/jwks\"",
        "pgsilo.toml:41: issuer[0].jwks_url: a URL with a user or a password; remove them",
    ),
    (
        "jwks = \"jwks.json\"",
        "jwks_url = \"https://issuer.example/jwks#a\"",
        "pgsilo.toml:41: issuer[0].jwks_url: a URL with a fragment; end it before the #",
    ),
    (
        "jwks = \"jwks.json\"",
        "jwks_url = \"file:///jwks.json\"",
        "pgsilo.toml:41: issuer[0].jwks_url: the scheme \"file\" is not supported; use https",
    ),
    (
        "issuer = \"https://issuer.example\"       # must equal the token's `iss`\naudience = [\"pgsilo\"]                   # one of them must be in the token's `aud`\n# audience_claim = \"client_id\"          # where that is instead, as in tokens of Cognito; an `aud` beside it must agree\nalgorithms = [\"ES256\"]                  # RS256 RS384 RS512 PS256 PS384 PS512 ES256 ES384 EdDSA (or Ed25519)\njwks = \"jwks.json\"",
        "issuer = \"accounts\"\naudience = [\"pgsilo\"]\nalgorithms = [\"ES256\"]\ndiscovery = true",
        "pgsilo.toml:40: issuer[0].discovery: `issuer` is no place to ask: not a URL; write it like \"https://issuer.example/jwks.json\"",
    ),
    (
        "jwks = \"jwks.json\"",
        "discovery = true\nrefresh = \"999ms\"",
        "pgsilo.toml:42: issuer[0].refresh: out of range; use \"1s\" to \"24h\"",
    ),
    (
        "jwks = \"jwks.json\"",
        "discovery = true\nmax_stale = \"599s\"",
        "pgsilo.toml:42: issuer[0].max_stale: less than twice `refresh`: one failed fetch would end every login",
    ),
    (
        "jwks = \"jwks.json\"",
        "discovery = true\nca = \"empty\"",
        "pgsilo.toml:42: issuer[0].ca: \"empty\" holds no certificate; it must be PEM with a CERTIFICATE section",
    ),
    (
        "jwks = \"jwks.json\"",
        "jwks_url = \"http://localhost/jwks\"\nca = \"issuer-ca.crt\"",
        "pgsilo.toml:42: issuer[0].ca: http has no certificates; remove it or use https",
    ),
    (
        "# access_values = { admin = \"read-write\", viewer = \"read-only\" }",
        "access_values = { admin = \"root\" }",
        "pgsilo.toml:52: issuer[0].access_values.admin: \"root\" is not one: an access level is \"read-write\", \"read-only\" or \"migrate\"",
    ),
    (
        "# access_values = { admin = \"read-write\", viewer = \"read-only\" }",
        "access_values = {}",
        "pgsilo.toml:52: issuer[0].access_values: empty; write it like { admin = \"read-write\" }",
    ),
    (
        "# access_values = { admin = \"read-write\", viewer = \"read-only\" }",
        "access_values = { \"\" = \"read-only\" }",
        "pgsilo.toml:52: issuer[0].access_values: empty; write it like { admin = \"read-write\" }",
    ),
    (
        "jwks = \"jwks.json\"",
        "keys = [{ kid = \"a\", algorithm = \"ES384\", pem = \"issuer.pem\" }]",
        "pgsilo.toml:41: issuer[0].keys[0].pem: \"issuer.pem\": the key does not fit the algorithm ES384",
    ),
    (
        "jwks = \"jwks.json\"",
        "keys = [{ kid = \"a\", algorithm = \"ES256\", pem = \"server.key\" }]",
        "pgsilo.toml:41: issuer[0].keys[0].pem: \"server.key\": not a public key in PEM; it must have a PUBLIC KEY section",
    ),
    (
        "tenant_claim = \"tenant\"",
        "tenant_claim = \"\"",
        "pgsilo.toml:48: issuer[0].tenant_claim: \"\" is not a claim's name, nor a JSON pointer such as \"/app/tenants\"",
    ),
    (
        "default_access = \"refuse\"",
        "default_access = \"admin\"",
        "pgsilo.toml:51: issuer[0].default_access: \"admin\" is not one; use \"refuse\", \"read-only\", \"read-write\" or \"migrate\"",
    ),
    (
        "default_access = \"refuse\"",
        "",
        "pgsilo.toml:50: issuer[0].access_claim: needs default_access, for a token without that claim: \"refuse\", or an access level",
    ),
    (
        "access_claim = \"access\"                 # the same; its text is \"read-write\", \"read-only\" or \"migrate\"\ndefault_access = \"refuse\"",
        "access_values = { admin = \"read-write\" }",
        "pgsilo.toml:50: issuer[0].access_values: needs default_access, for a token without that claim: \"refuse\", or an access level",
    ),
    (
        "# tenants = [\"acme\", \"eu-*\"]",
        "tenants = []",
        "pgsilo.toml:55: issuer[0].tenants: empty; list ids, or beginnings of ids such as \"eu-*\"",
    ),
    (
        "# tenants = [\"acme\", \"eu-*\"]",
        "tenants = [\"acme\", \"*-eu\"]",
        "pgsilo.toml:55: issuer[0].tenants[1]: \"*-eu\" is neither a tenant's id nor the beginning of one with a \"*\" behind it",
    ),
    (
        "# max_access = \"read-write\"",
        "max_access = \"refuse\"",
        "pgsilo.toml:56: issuer[0].max_access: \"refuse\" is not one: an access level is \"read-write\", \"read-only\" or \"migrate\"",
    ),
    (
        "default_access = \"refuse\"",
        "default_access = \"migrate\"\nmax_access = \"read-write\"",
        "pgsilo.toml:52: issuer[0].max_access: default_access is more; write a lower one (left out, it is \"read-write\")",
    ),
    (
        "# access_values = { admin = \"read-write\", viewer = \"read-only\" }",
        "max_access = \"read-only\"\naccess_values = { admin = \"read-write\", viewer = \"read-only\" }",
        "pgsilo.toml:53: issuer[0].access_values.admin: more than max_access: such a token would always be refused",
    ),
    (
        "# database_names = [\"postgres\"]",
        "database_names = []",
        "pgsilo.toml:22: listener[0].database_names: empty; list names such as \"postgres\", or remove it",
    ),
    (
        "# database_names = [\"postgres\"]",
        "database_names = \"postgres\"",
        "pgsilo.toml:22: listener[0].database_names: invalid value: string \"postgres\", expected an array of names such as [\"postgres\"], or \"any\"",
    ),
    (
        "# database_names = [\"postgres\"]",
        "database_names = [1]",
        "pgsilo.toml:22: listener[0].database_names[0]: invalid type: integer `1`, expected a string",
    ),
    (
        "id = \"globex\"\n",
        "id = \"globex\"\ndatabase_names = [\"app\", \"acme\"]\n",
        "tenants.toml:28: tenant[1].database_names: \"acme\" is another tenant's id",
    ),
    (
        "id = \"globex\"\n",
        "id = \"globex\"\ndatabase_names = [\"\"]\n",
        "tenants.toml:28: tenant[1].database_names: empty or with a NUL; list names, or leave the key out",
    ),
    (
        "# audience_claim = \"client_id\"",
        "audience_claim = \"/\"",
        "pgsilo.toml:39: issuer[0].audience_claim: \"/\" is not a claim's name, nor a JSON pointer such as \"/app/tenants\"",
    ),
    (
        "# tenant_values = { org_Ab1 = \"acme\" }",
        "tenant_values = { org_Ab1 = \"Acme\" }",
        "pgsilo.toml:49: issuer[0].tenant_values.org_Ab1: \"Acme\" is not one: a tenant id is 1 to 49 of a-z 0-9 _ - and starts with a letter or a digit",
    ),
    (
        "# tenant_values = { org_Ab1 = \"acme\" }",
        "tenant_values = {}",
        "pgsilo.toml:49: issuer[0].tenant_values: empty; write it like { \"/acme\" = \"acme\" }",
    ),
    (
        "# tenant_values = { org_Ab1 = \"acme\" }",
        "tenants = [\"eu-*\"]\ntenant_values = { org_Ab1 = \"acme\" }",
        "pgsilo.toml:50: issuer[0].tenant_values.org_Ab1: not among `tenants`: such a token would always be refused",
    ),
    (
        "# max_lifetime = \"1h\"",
        "max_lifetime = \"0s\"",
        "pgsilo.toml:58: issuer[0].max_lifetime: zero; no token would be taken",
    ),
    (
        "# aliases = [\"org_Ab1\", \"acme.com\"]",
        "aliases = [\"org_Ab1\", \"globex\"]",
        "tenants.toml:6: tenant[0].aliases[1]: \"globex\" is a tenant's id, which means that tenant",
    ),
    (
        "leeway = \"30s\"",
        "leeway = \"10m\"",
        "pgsilo.toml:59: issuer[0].leeway: too long; at most 5m",
    ),
    (
        "file = \"tenants.toml\"",
        "file = \"absent.toml\"",
        "pgsilo.toml:64: registry.file: absent.toml: cannot read the file: No such file or directory (os error 2)",
    ),
    (
        "file = \"tenants.toml\"",
        "file = \"empty\"",
        "empty:1: the key \"tenant\" is missing; add it",
    ),
    (
        "# authorization = \"grant\"",
        "authorization = \"grant\"",
        "pgsilo.toml:57: issuer[0].authorization: \"grant\", and a file has no grants: it needs [registry] postgres",
    ),
    (
        "# postgres = {",
        "postgres = {",
        "pgsilo.toml:65: registry.postgres: both file and postgres; keep one",
    ),
    (
        "file = \"tenants.toml\"",
        "postgres = { endpoints = [\"db:x\"], dbname = \"registry\", user = \"u\", password_file = \"secret-id\" }",
        "pgsilo.toml:64: registry.postgres.endpoints: \"db:x\": no port behind the colon; write it like \"db1.internal:5432\"",
    ),
    (
        "file = \"tenants.toml\"",
        "postgres = { endpoints = [\"db\"], dbname = \"registry\", user = \"u\" }",
        "pgsilo.toml:64: registry.postgres.lease: write lease = { mount, role }, or user and password_file, and not both",
    ),
    (
        "file = \"tenants.toml\"",
        "postgres = { endpoints = [\"db\"], dbname = \"registry\", lease = { mount = \"../sys\", role = \"r\" } }",
        "pgsilo.toml:64: registry.postgres.lease.mount: \"../sys\" is not a mount; write it like \"pgsilo-registry\"",
    ),
    (
        "file = \"tenants.toml\"",
        "postgres = { endpoints = [\"db\"], dbname = \"registry\", tls = { mode = \"verify-ca\", ca = \"absent.crt\" }, user = \"u\", password_file = \"secret-id\" }",
        "pgsilo.toml:64: registry.postgres.tls.ca: cannot read \"absent.crt\": No such file or directory (os error 2)",
    ),
    (
        "# stale_sessions = \"keep\"",
        "stale_sessions = \"end\"",
        "pgsilo.toml:68: registry.stale_sessions: \"end\", and nothing says when the registry is too old; add max_staleness",
    ),
    (
        "# regions = [\"eu-central\"]",
        "regions = []",
        "pgsilo.toml:69: registry.regions: empty; name each region, or leave the key out for any",
    ),
    (
        "https://127.0.0.1:8200",
        "http://bao.example:8200",
        "pgsilo.toml:74: openbao.address: http to \"bao.example\" would show credentials to the network; use https",
    ),
    (
        "https://127.0.0.1:8200",
        "http+unix:///run/bao.sock",
        "pgsilo.toml:74: openbao.address: the scheme \"http+unix\" is not supported; use https",
    ),
    (
        "https://127.0.0.1:8200",
        "127.0.0.1:8200",
        "pgsilo.toml:74: openbao.address: \"127.0.0.1:8200\" is not a URL; write it like \"https://127.0.0.1:8200\"",
    ),
    (
        "https://127.0.0.1:8200",
        "https://user:hunter2@bao.example",
        "pgsilo.toml:74: openbao.address: a URL with a user or a password; remove them and use openbao.auth",
    ),
    (
        "https://127.0.0.1:8200",
        "https://bao.example/?a=b",
        "pgsilo.toml:74: openbao.address: \"https://bao.example/?a=b\" has a query or a fragment; end it after the port",
    ),
    (
        "# ca = \"openbao-ca.crt\"",
        "ca = \"empty\"",
        "pgsilo.toml:75: openbao.ca: \"empty\" holds no certificate; it must be PEM with a CERTIFICATE section",
    ),
    (
        "# ca = \"openbao-ca.crt\"",
        "ca = \"absent.crt\"",
        "pgsilo.toml:75: openbao.ca: cannot read \"absent.crt\": No such file or directory (os error 2)",
    ),
    (
        "# namespace = \"team-a\"",
        "namespace = \"a\\nb\"",
        "pgsilo.toml:76: openbao.namespace: not a namespace; write it like \"team-a\"",
    ),
    (
        "# client_certificate = { certificate = \"pgsilo.crt\", key = \"pgsilo.key\" }",
        "client_certificate = { certificate = \"absent.crt\", key = \"server.key\" }",
        "pgsilo.toml:77: openbao.client_certificate.certificate: cannot read \"absent.crt\": No such file or directory (os error 2)",
    ),
    (
        "# client_certificate = { certificate = \"pgsilo.crt\", key = \"pgsilo.key\" }",
        "client_certificate = { certificate = \"token\", key = \"server.key\" }",
        "pgsilo.toml:77: openbao.client_certificate.certificate: \"token\" holds no certificate; it must be PEM with a CERTIFICATE section",
    ),
    (
        "# client_certificate = { certificate = \"pgsilo.crt\", key = \"pgsilo.key\" }",
        "client_certificate = { certificate = \"server.crt\", key = \"token\" }",
        "pgsilo.toml:77: openbao.client_certificate.key: \"token\" holds no private key; it must be PEM with an unencrypted PRIVATE KEY section",
    ),
    (
        "# client_certificate = { certificate = \"pgsilo.crt\", key = \"pgsilo.key\" }",
        "client_certificate = { certificate = \"server.crt\", key = \"other.key\" }",
        "pgsilo.toml:77: openbao.client_certificate.key: the key in \"other.key\" does not belong to the first certificate in \"server.crt\"",
    ),
    (
        "secret_id_file = \"secret-id\" } }",
        "secret_id_file = \"absent\" } }",
        "pgsilo.toml:79: openbao.auth.approle.secret_id_file: cannot read \"absent\": No such file or directory (os error 2)",
    ),
    (
        "secret_id_file = \"secret-id\" } }",
        "secret_id_file = \"empty\" } }",
        "pgsilo.toml:79: openbao.auth.approle.secret_id_file: \"empty\" is empty; it must hold the secret",
    ),
    (
        "secret_id_file = \"secret-id\" } }",
        "secret_id_file = \"secret-id\" }, token_file = \"bao-token\" }",
        "pgsilo.toml:79: openbao.auth: several methods; keep one of approle, kubernetes, jwt, certificate, token_file",
    ),
    (
        "auth = { approle = { role_id = \"pgsilo\", secret_id_file = \"secret-id\" } }",
        "auth = {}",
        "pgsilo.toml:79: openbao.auth: empty; add one of approle, kubernetes, jwt, certificate, token_file",
    ),
    (
        "\ntimeout = \"5s\"",
        "\ntimeout = \"0ms\"",
        "pgsilo.toml:85: openbao.timeout: zero; a request needs some time, such as \"5s\"",
    ),
    (
        "\ntimeout = \"5s\"",
        "\ntimeout = \"21s\"",
        "pgsilo.toml:85: openbao.timeout: too long; at most 20s",
    ),
    (
        "max_concurrent_requests = 64",
        "max_concurrent_requests = 0",
        "pgsilo.toml:86: openbao.max_concurrent_requests: zero; no lease could be asked for",
    ),
    (
        "# max_pending_revocations = 20000",
        "max_pending_revocations = 0",
        "pgsilo.toml:87: openbao.max_pending_revocations: zero; no lease could be asked for",
    ),
    (
        "max_handshakes = 1000",
        "max_handshakes = 0",
        "pgsilo.toml:112: limits.max_handshakes: zero; no client could log in",
    ),
    (
        "dead_peer_timeout = \"2m\"",
        "dead_peer_timeout = \"0s\"",
        "pgsilo.toml:125: limits.dead_peer_timeout: 0ns is out of range; use 5s to 30m",
    ),
    (
        "max_token_bytes = 16384",
        "max_token_bytes = 65537",
        "pgsilo.toml:117: limits.max_token_bytes: 65537 is out of range; use 1 to 65536",
    ),
    (
        "[pool]",
        "[warm]",
        "pgsilo.toml:132: warm: unknown key; allowed here: listener, issuer, registry, openbao, lease, limits, pool, admin, log, audit, runtime",
    ),
    (
        "max_idle = 100",
        "max_idle = 10000001",
        "pgsilo.toml:133: pool.max_idle: 10000001 is out of range; at most 10000000",
    ),
    (
        "max_idle_per_tenant = 4",
        "max_idle_per_tenant = 0",
        "pgsilo.toml:134: pool.max_idle_per_tenant: zero; for no pool at all, set pool.max_idle to 0",
    ),
    (
        "idle_timeout = \"10s\"",
        "idle_timeout = \"11m\"",
        "pgsilo.toml:135: pool.idle_timeout: 660s is out of range; use 1s to 10m",
    ),
    (
        "check_delay = \"250ms\"",
        "check_delay = \"11s\"",
        "pgsilo.toml:136: pool.check_delay: 11s is longer than idle_timeout",
    ),
    (
        "reuse = \"never\"",
        "reuse = \"always\"",
        "pgsilo.toml:142: pool.reuse: \"always\" is not known here; use one of: never, reset",
    ),
    (
        "cores = 0",
        "cores = 5000",
        "pgsilo.toml:160: runtime.cores: 5000 is out of range; use 0 to 1024",
    ),
    (
        "address = \"127.0.0.1:9432\"",
        "address = \"9432\"",
        "pgsilo.toml:148: admin.address: \"9432\" is not an IP address and a port such as \"127.0.0.1:6432\" or \"[::1]:6432\"",
    ),
    (
        "id = \"globex\"",
        "id = \"acme\"",
        "tenants.toml:27: tenant[1].id: \"acme\" is already the tenant on line 5; ids are unique",
    ),
    (
        "id = \"globex\"",
        "id = \"Globex\"",
        "tenants.toml:27: tenant[1].id: \"Globex\" is not one: a tenant id is 1 to 49 of a-z 0-9 _ - and starts with a letter or a digit",
    ),
    ("id = \"globex\"\n", "", "tenants.toml:26: tenant[1]: the key \"id\" is missing; add it"),
    (
        "id = \"globex\"",
        "id = \"globex\"\nplan = \"gold\"",
        "tenants.toml:28: tenant[1].plan: unknown key; allowed here: id, name, state, aliases, database_names, regions, placement, lease, limits",
    ),
    (
        "state = \"active\"",
        "state = \"deleted\"",
        "tenants.toml:7: tenant[0].state: \"deleted\" is not known here; use one of: active, suspended, paused, deleting",
    ),
    (
        "port = 5432",
        "port = 0",
        "tenants.toml:11: tenant[0].placement.port: 0 is not a port; PostgreSQL's is usually 5432",
    ),
    (
        "port = 5432",
        "port = 65536",
        "tenants.toml:11: tenant[0].placement.port: invalid value: integer `65536`, expected a port, 1 to 65535",
    ),
    (
        "host = \"db1.internal\"",
        "host = \"db1.internal:5432\"",
        "tenants.toml:10: tenant[0].placement.host: \"db1.internal:5432\" is not a host name or an IP address (without brackets or port)",
    ),
    (
        "host = \"db1.internal\"",
        "host = \"db1.internal\"\nsocket = \"/run/pg\"",
        "tenants.toml:9: tenant[0].placement: both host and socket; keep one",
    ),
    (
        "socket = \"/run/postgresql/.s.PGSQL.5432\"\ndbname",
        "socket = \"run/pg\"\ndbname",
        "tenants.toml:30: tenant[1].placement.socket: \"run/pg\" is not an absolute path; write it from the root",
    ),
    (
        "socket = \"/run/postgresql/.s.PGSQL.5432\"\ndbname",
        "tls = {}\nsocket = \"/run/pg\"\ndbname",
        "tenants.toml:30: tenant[1].placement.tls: a Unix socket has no TLS; remove it",
    ),
    (
        "socket = \"/run/postgresql/.s.PGSQL.5432\"\ndbname",
        "dbname",
        "tenants.toml:29: tenant[1].placement: neither host nor socket; add one",
    ),
    (
        "dbname = \"tenant_globex\"",
        "dbname = \"\"",
        "tenants.toml:31: tenant[1].placement.dbname: empty or with a NUL; name the tenant's own database",
    ),
    (
        "dbname = \"tenant_globex\"",
        "dbname = \"a\\u0000b\"",
        "tenants.toml:31: tenant[1].placement.dbname: empty or with a NUL; name the tenant's own database",
    ),
    (
        "socket = \"/run/postgresql/.s.PGSQL.5432\"\ndbname = \"tenant_globex\"",
        "host = \"DB1.internal.\"\ntls = { mode = \"require\" }\ndbname = \"tenant_acme\"",
        "tenants.toml:32: tenant[1].placement.dbname: \"tenant_acme\" on DB1.internal.:5432 is already the database on line 12; tenants never share one",
    ),
    (
        "ca = \"db-ca.crt\" }",
        "ca = \"absent.crt\" }",
        "tenants.toml:14: tenant[0].placement.tls.ca: cannot read \"absent.crt\": No such file or directory (os error 2)",
    ),
    (
        "mode = \"verify-full\", ca",
        "mode = \"require\", ca",
        "tenants.toml:14: tenant[0].placement.tls.ca: mode \"require\" checks no certificate; use \"verify-ca\" or \"verify-full\", or remove ca",
    ),
    (
        "mode = \"verify-full\", ca",
        "mode = \"disable\", ca",
        "tenants.toml:14: tenant[0].placement.tls: mode \"disable\" checks nothing; remove the other keys or the mode",
    ),
    (
        "mode = \"verify-full\", ca",
        "mode = \"verify\", ca",
        "tenants.toml:14: tenant[0].placement.tls.mode: \"verify\" is not known here; use one of: disable, require, verify-ca, verify-full",
    ),
    (
        "# tls = { server_name = \"db.example\" }",
        "auth = [\"md4\"]",
        "tenants.toml:15: tenant[0].placement.auth[0]: \"md4\" is not known here (did you mean \"md5\"?); use one of: scram-sha-256, md5, password",
    ),
    (
        "mode = \"verify-full\", ca",
        "channel_binding = \"always\", ca",
        "tenants.toml:14: tenant[0].placement.tls.channel_binding: \"always\" is not known here; use one of: prefer, require",
    ),
    (
        "mode = \"verify-full\", ca = \"db-ca.crt\"",
        "mode = \"disable\", channel_binding = \"prefer\"",
        "tenants.toml:14: tenant[0].placement.tls: mode \"disable\" checks nothing; remove the other keys or the mode",
    ),
    (
        "tls = { mode = \"verify-full\", ca = \"db-ca.crt\" }",
        "auth = [\"md5\"]\ntls = { mode = \"verify-ca\", ca = \"db-ca.crt\" }",
        "tenants.toml:14: tenant[0].placement.auth: \"md5\" and \"password\" cannot be bound to the TLS connection, as channel_binding = \"require\" has it (the default of the modes \"require\" and \"verify-ca\"); remove them, or write tls = { channel_binding = \"prefer\", ... }",
    ),
    (
        "ca = \"db-ca.crt\" }",
        "ca = \"server.crt\" }",
        "tenants.toml:14: tenant[0].placement.tls.ca: \"server.crt\": the certificate \"CN=rcgen self signed cert\" is no authority's (basicConstraints CA:TRUE is missing): its key could sign for anybody; name the authority that signed it",
    ),
    (
        "ca = \"db-ca.crt\" }",
        "ca = \"db-ca.crt\", server_name = \"a b\" }",
        "tenants.toml:14: tenant[0].placement.tls.server_name: \"a b\" is not a host name or an IP address",
    ),
    (
        "mount = \"pgsilo/acme\"",
        "mount = \"data/../sys\"",
        "tenants.toml:19: tenant[0].lease.mount: \"data/../sys\" is not a mount path; use A-Z a-z 0-9 _ . - between single slashes",
    ),
    (
        "mount = \"pgsilo/acme\"",
        "mount = \"/database\"",
        "tenants.toml:19: tenant[0].lease.mount: \"/database\" is not a mount path; use A-Z a-z 0-9 _ . - between single slashes",
    ),
    (
        "roles = { read-write = \"tenant-globex-rw\" }",
        "roles = {}",
        "tenants.toml:34: tenant[1].lease.roles: empty; name at least one role",
    ),
    (
        "roles = { read-write = \"tenant-globex-rw\" }",
        "roles = { readwrite = \"x\" }",
        "tenants.toml:34: tenant[1].lease.roles.readwrite: unknown key (did you mean \"read-write\"?); allowed here: read-write, read-only, migrate",
    ),
    (
        "roles = { read-write = \"tenant-globex-rw\" }",
        "roles = { read-write = \"../tenant-acme-rw\" }",
        "tenants.toml:34: tenant[1].lease.roles.read-write: \"../tenant-acme-rw\" is not a role's name; use A-Z a-z 0-9 _ . -",
    ),
    (
        "auth = \"password\" ",
        "auth = \"passwort\" ",
        "pgsilo.toml:18: listener[0].auth: \"passwort\" is not known here (did you mean \"password\"?); use one of: password, oauthbearer, certificate, token_file, exec",
    ),
    (
        "auth = \"password\" ",
        "auth = \"certificate\" ",
        "pgsilo.toml:18: listener[0].auth: certificate needs tls with client_ca, and no client in clear",
    ),
    (
        "auth = \"password\" ",
        "auth = { oauthbearer = { issuer = \"https://other.example\" } } ",
        "pgsilo.toml:18: listener[0].auth.oauthbearer.issuer: \"https://other.example\" has no [[issuer]] table",
    ),
    (
        "roles = { read-write = \"tenant-globex-rw\" }",
        "mount = \"pgsilo/acme\"\nroles = { read-write = \"tenant-globex-rw\", read-only = \"Tenant-acme-ro\" }",
        "tenants.toml:35: tenant[1].lease.roles.read-only: \"Tenant-acme-ro\" of \"pgsilo/acme\" is tenant \"acme\"'s; tenants never share a role",
    ),
    (
        "address = \"127.0.0.1:9432\"",
        "address = \"127.0.0.1:6432\"",
        "pgsilo.toml:148: admin.address: a listener has it; choose another port",
    ),
    (
        "address = \"127.0.0.1:9432\"",
        "address = \"[::]:6432\"",
        "pgsilo.toml:148: admin.address: a listener has it; choose another port",
    ),
    (
        "auth = \"password\" ",
        "auth = { token_file = \"/\" } ",
        "pgsilo.toml:18: listener[0].auth.token_file: cannot read \"/\": not a regular file",
    ),
    (
        "auth = \"password\" ",
        "auth = { exec = { command = [] } } ",
        "pgsilo.toml:18: listener[0].auth.exec.command: empty; name the program and its arguments",
    ),
    (
        "# sni_suffix = \"db.example.com\"",
        "sni_suffix = \"db..example.com\"",
        "pgsilo.toml:21: listener[0].sni_suffix: \"db..example.com\" is not a domain such as \"db.example.com\"",
    ),
    (
        "# proxy_protocol = [\"10.0.0.0/8\"]",
        "proxy_protocol = [\"10.0.0.0/33\"]",
        "pgsilo.toml:23: listener[0].proxy_protocol[0]: \"10.0.0.0/33\" is not a network such as \"10.0.0.0/8\"",
    ),
    (
        "# proxy_protocol = [\"10.0.0.0/8\"]",
        "proxy_protocol = []",
        "pgsilo.toml:23: listener[0].proxy_protocol: empty; name the balancers' networks, or remove it",
    ),
    (
        "# require_tls = true",
        "allow_uids = [1]",
        "pgsilo.toml:17: listener[0].allow_uids: only a Unix socket knows its peer's user; remove it",
    ),
    (
        "# allow_uids = [1000]",
        "allow_uids = []",
        "pgsilo.toml:28: listener[1].allow_uids: empty; no user could connect",
    ),
    (
        "# allow_uids = [1000]",
        "sni_suffix = \"x.example\"",
        "pgsilo.toml:28: listener[1].sni_suffix: only a TCP listener has it; remove it",
    ),
    (
        "mode = \"0660\"",
        "proxy_protocol = [\"::1\"]",
        "pgsilo.toml:27: listener[1].proxy_protocol: only a TCP listener has it; remove it",
    ),
    (
        "tls = { certificate = \"server.crt\", key = \"server.key\" }",
        "tls = { certificate = \"server.crt\", key = \"server.key\", client_crl = [\"clients.crl\"] }",
        "pgsilo.toml:13: listener[0].tls.client_crl: needs client_ca, the authorities of clients' certificates",
    ),
    (
        "tls = { certificate = \"server.crt\", key = \"server.key\" }",
        "tls = { certificate = \"server.crt\", key = \"server.key\", client_ca = \"absent\" }",
        "pgsilo.toml:13: listener[0].tls.client_ca: cannot read \"absent\": No such file or directory (os error 2)",
    ),
    (
        "tls = { certificate = \"server.crt\", key = \"server.key\" }",
        "tls = { certificate = \"server.crt\", key = \"server.key\", client_ca = \"server.crt\" }",
        "pgsilo.toml:13: listener[0].tls.client_ca: \"server.crt\": the certificate \"CN=rcgen self signed cert\" is no authority's (basicConstraints CA:TRUE is missing): its key could sign for anybody; name the authority that signed it",
    ),
    (
        "tls = { certificate = \"server.crt\", key = \"server.key\" }",
        "tls = { certificate = \"server.crt\", key = \"server.key\", client_ca = \"old-ca.crt\" }",
        "pgsilo.toml:13: listener[0].tls.client_ca: \"old-ca.crt\": the certificate \"CN=rcgen self signed cert\" has expired; remove it, or put its successor in its place",
    ),
    (
        "# ca = \"openbao-ca.crt\"",
        "ca = \"server.crt\"",
        "pgsilo.toml:75: openbao.ca: \"server.crt\": the certificate \"CN=rcgen self signed cert\" is no authority's (basicConstraints CA:TRUE is missing): its key could sign for anybody; name the authority that signed it",
    ),
    (
        "tls = { certificate = \"server.crt\", key = \"server.key\" }",
        "tls = { certificate = \"server.crt\", key = \"server.key\", client_ca = \"clients-ca.crt\", client_crl = [\"jwks.json\"] }",
        "pgsilo.toml:13: listener[0].tls.client_crl: \"jwks.json\" holds no revocation list; it must be PEM with an X509 CRL section",
    ),
    (
        "# denied = \"denied.toml\"",
        "denied = \"absent.toml\"",
        "pgsilo.toml:66: registry.denied: absent.toml: cannot read the file: No such file or directory (os error 2)",
    ),
    (
        "# denied = \"denied.toml\"",
        "denied = \"jwks.json\"",
        "jwks.json:1: invalid key-value pair, expected key",
    ),
    (
        "certificate = \"spiffe://example.org/ns/app/sa/billing\"",
        "certificate = \"a b\"",
        "tenants.toml:44: binding[0].certificate: \"a b\" is not a URI, nor \"dns:\" and a host in lower case",
    ),
    (
        "tenant = \"acme\"",
        "tenant = \"nobody\"",
        "tenants.toml:45: binding[0].tenant: \"nobody\" is not a tenant of this registry",
    ),
    (
        "access = \"read-write\"                   # read-write",
        "access = \"everything\" # ",
        "tenants.toml:46: binding[0].access: \"everything\" is not one: an access level is \"read-write\", \"read-only\" or \"migrate\"",
    ),
];

/// All warnings, with ` | ` between them.
pub(crate) const WARNINGS: &[(&str, &str, &str)] = &[
    ("address = \"127.0.0.1:6432\"", "address = \"0.0.0.0:6432\"", ""),
    ("tls = { certificate = \"server.crt\", key = \"server.key\" }", "plaintext = true", ""),
    (
        "address = \"127.0.0.1:6432\"\ntls = { certificate = \"server.crt\", key = \"server.key\" }",
        "address = \"0.0.0.0:6432\"\nplaintext = true",
        "pgsilo.toml:13: listener[0].plaintext: tokens may travel in clear over a network: anybody on the way can use them",
    ),
    (
        "address = \"127.0.0.1:6432\"\n",
        "address = \"10.0.0.1:6432\"\nrequire_tls = false\n",
        "pgsilo.toml:13: listener[0].require_tls: tokens may travel in clear over a network: anybody on the way can use them",
    ),
    (
        "address = \"127.0.0.1:9432\"",
        "address = \"0.0.0.0:9432\"",
        "pgsilo.toml:148: admin.address: not a loopback address: anybody who reaches it can read the metrics",
    ),
    (
        "socket = \"/run/postgresql/.s.PGSQL.5432\"\ndbname",
        "host = \"DB1.internal.\"\ndbname",
        "pgsilo.toml:120: limits.transaction_timeout: not set for every tenant, and tenants share servers (2 share db1.internal:5432): one tenant's transaction can hold what all need, for as long as its token lasts",
    ),
    (
        "[[tenant]]\nid = \"globex\"\n\n[tenant.placement]\nsocket = \"/run/postgresql/.s.PGSQL.5432\"\n",
        "[[cluster]]\nname = \"eu-9\"\nendpoints = [\"db8\", \"db9\"]\n\n[[tenant]]\nid = \"globex\"\n\n[tenant.placement]\ncluster = \"eu-9\"\n",
        "pgsilo.toml:64: registry.file: the servers of cluster eu-9 are not watched, as it has no monitor: a primary that lives on after another was promoted keeps its sessions until a login reaches the new one",
    ),
    (
        "tls = { mode = \"verify-full\", ca = \"db-ca.crt\" }",
        "tls = { mode = \"disable\" }",
        "pgsilo.toml:64: registry.file: 1 of its tenants' databases are reached in clear over a network (tenant \"acme\" at db1.internal:5432): what passes can be read and changed on the way",
    ),
    (
        "dbname = \"tenant_globex\"",
        "dbname = \"acme\"",
        "pgsilo.toml:64: registry.file: tenant \"globex\" has a database called \"acme\", which is another tenant's id: a token for both that names it is for the other one; name this one by its id",
    ),
    (
        "# database_names = [\"postgres\"]",
        "database_names = [\"postgres\", \"globex\"]",
        "pgsilo.toml:22: listener[0].database_names: \"globex\" is a tenant's: clients of others that name it land in their own; remove it",
    ),
    (
        "tls = { certificate = \"server.crt\", key = \"server.key\" }",
        "tls = { certificate = \"expired.crt\", key = \"server.key\" }",
        "pgsilo.toml:13: listener[0].tls.certificate: \"expired.crt\": the certificate has expired: clients that look at it are not served; renew it",
    ),
    (
        "tls = { certificate = \"server.crt\", key = \"server.key\" }",
        "tls = { certificate = \"early.crt\", key = \"server.key\" }",
        "pgsilo.toml:13: listener[0].tls.certificate: \"early.crt\": the certificate is not valid yet: clients that look at it are not served; is a clock wrong?",
    ),
    (
        "tls = { certificate = \"server.crt\", key = \"server.key\" }",
        "tls = { certificate = \"server.crt\", key = \"server.key\", client_ca = \"clients-ca.crt\", client_crl = [\"clients.crl\"] }",
        "",
    ),
    (
        "tls = { certificate = \"server.crt\", key = \"server.key\" }",
        "tls = { certificate = \"server.crt\", key = \"server.key\", client_ca = \"clients-ca.crt\", client_crl = [\"old.crl\"] }",
        "pgsilo.toml:13: listener[0].tls.client_crl: \"old.crl\": the revocation list is out of date: none of its authority's certificates is accepted; renew it",
    ),
    (
        "tls = { certificate = \"server.crt\", key = \"server.key\" }",
        "tls = { certificate = \"server.crt\", key = \"server.key\", client_ca = \"clients-ca.crt\", client_crl = [\"forged.crl\"] }",
        "pgsilo.toml:13: listener[0].tls.client_crl: \"forged.crl\": its authority has not signed the revocation list: none of that authority's certificates is accepted",
    ),
    ("algorithms = [\"ES256\"]", "algorithms = [\"ES256\", \"RS256\"]", ""),
    (
        "# auth = { token_file = \"token\" }       # read at each login",
        "auth = { token_file = \"absent\" }",
        "pgsilo.toml:30: listener[1].auth.token_file: \"absent\" is not there: sessions are refused until it is",
    ),
    (
        "# auth = { token_file = \"token\" }       # read at each login",
        "auth = { token_file = \"empty\" }",
        "pgsilo.toml:30: listener[1].auth.token_file: \"empty\" is empty: sessions are refused until it is not",
    ),
    (
        "# database_names = \"any\"",
        "database_names = \"any\"",
        "pgsilo.toml:32: listener[1].database_names: a client that means another database lands in its token's tenant; list the names that clients cannot be told to change",
    ),
    (
        "access_claim = \"access\"",
        "access_claim = \"realm_access.roles\"",
        "pgsilo.toml:50: issuer[0].access_claim: \"realm_access.roles\" is one claim of that whole name; a claim inside another is written \"/realm_access/roles\"",
    ),
    (
        "tenant_claim = \"tenant\"",
        "tenant_claim = \"app.tenants\"",
        "pgsilo.toml:48: issuer[0].tenant_claim: \"app.tenants\" is one claim of that whole name; a claim inside another is written \"/app/tenants\"",
    ),
    ("access_claim = \"access\"", "access_claim = \"https://app.example/access\"", ""),
    ("access_claim = \"access\"", "access_claim = \"/resource_access/app.example/roles\"", ""),
    (
        "audience = [\"pgsilo\"]",
        "audience = [\"account\"]",
        "pgsilo.toml:38: issuer[0].audience: \"account\" is in every token of a Keycloak realm; have it issue tokens with an audience of pgsilo's own",
    ),
    (
        "[registry]\n",
        "[[issuer]]\nissuer = \"https://partner.example\"\naudience = [\"pgsilo\"]\nalgorithms = [\"ES256\"]\njwks = \"jwks.json\"\n[registry]\n",
        "pgsilo.toml:63: issuer[1]: several issuers may name any tenant; say with `tenants` whose tokens are each one's to issue",
    ),
    (
        "[registry]\n",
        "[[issuer]]\nissuer = \"https://partner.example\"\naudience = [\"pgsilo\"]\nalgorithms = [\"ES256\"]\njwks = \"jwks.json\"\ntenants = [\"eu-*\"]\nmax_access = \"read-write\"\n[registry]\n",
        "",
    ),
    (
        "# tenants = [\"acme\", \"eu-*\"]",
        "tenants = [\"acme\", \"globx\", \"eu-*\"]",
        "pgsilo.toml:55: issuer[0].tenants[1]: names no tenant of the registry as it is now",
    ),
    (
        "# tenant_values = { org_Ab1 = \"acme\" }",
        "tenant_values = { org_Ab1 = \"acme\", org_Ab2 = \"amce\" }",
        "pgsilo.toml:49: issuer[0].tenant_values.org_Ab2: names no tenant of the registry as it is now",
    ),
    (
        "# access_values = { admin = \"read-write\", viewer = \"read-only\" }",
        "access_values = { \"db admin\" = \"read-write\", viewer = \"read-only\" }",
        "pgsilo.toml:52: issuer[0].access_values.db admin: is found in a list only: a claim that is one text is split at its blanks",
    ),
    ("# aliases = [\"org_Ab1\", \"acme.com\"]", "aliases = [\"org_Ab1\", \"/Acme/\"]", ""),
    (
        "# aliases = [\"org_Ab1\", \"acme.com\"]",
        "aliases = [\"org_Ab1\", \"/Globex\"]",
        "pgsilo.toml:64: registry.file: \"/Globex\" means tenant acme, and \"globex\" means tenant globex: each is easily taken for the other",
    ),
    (
        "jwks = \"jwks.json\"",
        "keys = [{ kid = \"a\", algorithm = \"ES256\", pem = \"issuer.pem\" }, { kid = \"b\", algorithm = \"ES256\", pem = \"issuer.pem\" }]",
        "",
    ),
];
