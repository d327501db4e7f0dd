# What a session's own OpenBAO token may do whose issuer's word is not enough (authorization = "grant"),
# beside what its grant lets it read: keep and give back that lease. The grant is a policy of its own, which
# `pgsiloctl grant --at-openbao` writes, and which ends with it. Attach it with no default policy.

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
