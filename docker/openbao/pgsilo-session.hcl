# What a session's own OpenBAO token may do, where leases are asked for with the session's
# authority: read credentials of the tenant that its JWT names, keep and give back that lease.
# OpenBAO itself fills in the tenant: the alias's name, which pgsilo-session-role.json takes from the
# very JWT that logs in, and from nothing that an earlier login left. ACCESSOR stands for the JWT
# method's mount accessor, KIND for the access (rw, ro, migrate): one policy and one role for each.
# Attach it with no default policy, and use that method for nothing else.

path "pgsilo/{{identity.entity.aliases.ACCESSOR.name}}/creds/tenant-{{identity.entity.aliases.ACCESSOR.name}}-KIND" {
  capabilities = ["read"]
}

path "sys/leases/renew" {
  capabilities = ["update"]
}

path "auth/token/lookup-self" {
  capabilities = ["read"]
}

path "auth/token/renew-self" {
  capabilities = ["update"]
}

path "auth/token/revoke-self" {
  capabilities = ["update"]
}
