# What the provisioner (pgsiloctl) may do at OpenBAO: describe tenants' databases and the roles
# that credentials are made from, and take leases back. It never reads a credential, and it cannot
# touch policies, logins or another secrets engine.
# Attach it with no default policy.

path "database/config/tenant-*" {
  capabilities = ["create", "read", "update", "delete"]
}

path "database/roles/tenant-*" {
  capabilities = ["create", "read", "update", "delete"]
}

path "database/config" {
  capabilities = ["list"]
}

path "database/roles" {
  capabilities = ["list"]
}

# After this, only OpenBAO knows the broker's password.
path "database/rotate-root/tenant-*" {
  capabilities = ["update"]
}

# `pgsiloctl leases audit`: which leases there are, and the end of those that nobody uses. A lease's
# id says nothing of its credential. Listing leases is one of the paths that want sudo.
path "sys/leases/lookup/database/creds/tenant-*" {
  capabilities = ["list", "sudo"]
}

path "sys/leases/lookup" {
  capabilities = ["update"]
  allowed_parameters = {
    "lease_id" = ["database/creds/tenant-*"]
  }
}

path "sys/leases/revoke/database/creds/tenant-*" {
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
