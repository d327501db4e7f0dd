# What an operator of tenants' databases may do at OpenBAO: lease credentials of tenants, as the proxy may,
# to try a login (`pgsiloctl tenant check`). It describes nothing and sees no list. Attach it with no
# default policy.

path "pgsilo/+/creds/tenant-*" {
  capabilities = ["read"]
}

# A lease's id ends in random characters: who does not hold it cannot name it.
path "sys/leases/revoke" {
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
