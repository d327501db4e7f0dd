//! `[registry]`: where the tenants are read from.

use std::path::PathBuf;

use pgsilo_core::host::is_loopback;
use pgsilo_core::registry::document::ClusterEntry;
use pgsilo_core::registry::{Cluster, Host, PlacementTls, is_segment};
use pgsilo_registry::connection::Database;

use super::super::raw::{RawRegistryDatabase, RawRegistryLease};
use super::super::{FileError, RegistrySettings};
use super::Build;
use crate::lease;
use crate::registry_database::{LoginSource, Settings};

impl Build<'_> {
    /// Where the registry is read: a file, or a database.
    pub(super) fn registry(
        &mut self,
        path: Option<PathBuf>,
        database: Option<RawRegistryDatabase>,
        lease: &lease::Settings,
    ) -> Result<RegistrySettings, FileError> {
        let raw = match (path, database) {
            (Some(path), None) => return Ok(RegistrySettings::File(self.file.resolve(&path))),
            (None, Some(raw)) => raw,
            (None, None) => return self.wrong("registry", "neither file nor postgres; add one"),
            (Some(_), Some(_)) => {
                return self.wrong("registry.postgres", "both file and postgres; keep one");
            }
        };
        let at = |field: &str| format!("registry.postgres.{field}");
        let entry = ClusterEntry {
            name: "registry".to_owned(),
            endpoints: raw.endpoints,
            monitor: None,
            read_only: None,
            region: None,
            tls: raw.tls,
            auth: None,
            max_sessions: None,
        };
        let cluster = Cluster::read(entry, &|path| self.file.resolve(path));
        let cluster = cluster.or_else(|error| self.wrong(at(&error.field), error.what))?;
        let is_remote = |host: &Host| matches!(host, Host::Tcp { host, .. } if !is_loopback(host));
        if matches!(cluster.tls, PlacementTls::Disable) && cluster.endpoints.iter().any(is_remote) {
            let what = "in clear to another machine, where anybody on the way reads it";
            return self.wrong(at("tls"), what);
        }
        let login = match (raw.lease, raw.user, raw.password_file) {
            (Some(_), None, None)
                if matches!(lease.authority, lease::Authority::Session { .. }) =>
            {
                return self.wrong(
                    at("lease"),
                    "under session authority pgsilo has no login of its own to lease with; \
                     use user and password_file",
                );
            }
            (Some(RawRegistryLease { role, .. }), None, None) if !is_segment(&role) => {
                let what = format!("{role:?} is not a role's name; use A-Z a-z 0-9 _ . -");
                return self.wrong(at("lease.role"), what);
            }
            (Some(RawRegistryLease { mount, role }), None, None) => LoginSource::Lease {
                mount: self.mount(&at("lease.mount"), Some(mount), "pgsilo-registry")?,
                role,
            },
            (None, Some(user), Some(file)) => {
                let file = self.secret_file(&at("password_file"), &file)?;
                LoginSource::Password { user, file }
            }
            _ => {
                return self.wrong(
                    at("lease"),
                    "write lease = { mount, role }, or user and password_file, and not both",
                );
            }
        };
        let name = raw
            .name
            .unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned());
        let database = Database::of(&cluster, &raw.dbname);
        Ok(RegistrySettings::Database(Settings { database, login, name }))
    }
}
