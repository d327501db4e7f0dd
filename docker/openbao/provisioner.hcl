# What the provisioner (pgsiloctl) may do at OpenBAO: make and remove tenants' mounts, describe their
# databases and the roles that credentials are made from, and take leases back. It never reads a
# tenant's credential, and it cannot touch policies, logins or another secrets engine.
# Attach it with no default policy. DATABASE stands for a database server, as in
# `db1.internal:5432`; with several, the URL has an entry for each. `pgsiloctl bootstrap` writes it.

# Its own logins: to the clusters, where it makes tenants, and to the registry.
path "pgsilo-provisioner/creds/+" {
  capabilities = ["read"]
}

path "pgsilo-registry/creds/control" {
  capabilities = ["read"]
}

# A mount for each tenant, of this type and at this place: `+` is one segment of the path.
path "sys/mounts/pgsilo/+" {
  capabilities = ["read", "update", "delete"]
  allowed_parameters = {
    "type" = ["database"]
  }
}

# What is described can be removed and described anew, but not updated: OpenBAO would log in with
# the password that it knows to wherever an update says. Whoever removes it removes the password.
path "pgsilo/+/config/tenant-*" {
  capabilities = ["create", "read", "delete"]
  allowed_parameters = {
    "plugin_name"             = ["postgresql-database-plugin"]
    "connection_url"          = ["postgresql://{{username}}:{{password}}@DATABASE/*"]
    "username"                = ["tenant_*"]
    "password"                = []
    "password_authentication" = ["scram-sha-256", "password"]
    "allowed_roles"           = []
    "username_template"       = []
    "max_open_connections"    = []
    "max_idle_connections"    = []
    "max_connection_lifetime" = []
    "verify_connection"       = []
    "tls_ca"                  = []
  }
  # Else the URL's query could name another host or port than the one in front, or files of OpenBAO's.
  denied_parameters = {
    "connection_url" = ["*host=*", "*port=*", "*service=*", "*servicefile=*", "*passfile=*", "*sslkey=*", "*sslcert=*", "*sslrootcert=*", "*%*"]
  }
}

path "pgsilo/+/roles/tenant-*" {
  capabilities = ["create", "read", "update", "delete"]
}

path "pgsilo/+/config" {
  capabilities = ["list"]
}

path "pgsilo/+/roles" {
  capabilities = ["list"]
}

# After this, only OpenBAO knows the broker's password.
path "pgsilo/+/rotate-root/tenant-*" {
  capabilities = ["update"]
}

# Lets go of connections to a database that failed over: to the same server, with what is described.
path "pgsilo/+/reset/tenant-*" {
  capabilities = ["update"]
}

# `pgsiloctl leases audit`: which leases there are, and the end of those that nobody uses. A lease's
# id says nothing of its credential. Listing leases is one of the paths that want sudo.
path "sys/leases/lookup/pgsilo/+/creds/tenant-*" {
  capabilities = ["list", "sudo"]
}

path "sys/leases/lookup" {
  capabilities = ["update"]
  allowed_parameters = {
    "lease_id" = ["pgsilo/*"]
  }
}

path "sys/leases/revoke/pgsilo/+/creds/tenant-*" {
  capabilities = ["update"]
}

# Its own logins are kept alive and given back.
path "sys/leases/renew/pgsilo-provisioner/creds/*" {
  capabilities = ["update"]
}

path "sys/leases/renew/pgsilo-registry/creds/control/*" {
  capabilities = ["update"]
}

path "sys/leases/revoke/pgsilo-provisioner/creds/*" {
  capabilities = ["update"]
}

path "sys/leases/revoke/pgsilo-registry/creds/control/*" {
  capabilities = ["update"]
}

# Certificates of deletion: signed with a key that never leaves OpenBAO.
path "pgsilo-transit/sign/certificates" {
  capabilities = ["update"]
}

path "pgsilo-transit/keys/certificates" {
  capabilities = ["read"]
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
