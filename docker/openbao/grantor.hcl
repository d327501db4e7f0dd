# What who writes grants may do at OpenBAO (`pgsiloctl grant --at-openbao`, under session authority): make
# and remove the policies that sessions' own tokens have by their grants. OpenBAO cannot bound what such a
# policy says: who holds this can let a session's token do anything, so guard it as a root token, and give
# pgsilo a namespace of its own. Attach it with no default policy.

path "sys/policies/acl/pgsilo-grant-*" {
  capabilities = ["create", "read", "update", "delete"]
}

path "sys/policies/acl" {
  capabilities = ["list"]
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
