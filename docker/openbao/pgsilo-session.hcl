# What a session's own OpenBAO token may do, where leases are asked for with the session's
# authority: read credentials of the tenant that its JWT names, keep and give back that lease.
# OpenBAO itself fills in the tenant, from the claim that the JWT method mapped. ACCESSOR stands
# for that method's mount accessor, KIND for the access (rw, ro, migrate): one policy and one
# role of the method for each, bound to the access claim.
# Attach it with no default policy.

path "database/creds/tenant-{{identity.entity.aliases.ACCESSOR.metadata.tenant}}-KIND" {
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
