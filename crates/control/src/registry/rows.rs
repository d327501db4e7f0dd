//! A document as rows of the registry's tables, and back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, bail};
use pgsilo_core::registry::document::{
    BindingEntry, ClusterEntry, Document, LimitsEntry, PlacementEntry, TenantEntry, TlsEntry,
};
use pgsilo_core::registry::{Host, State};
use pgsilo_core::toml_file::TomlFile;
use serde_json::{Map, Value, json};

/// A row's columns; of those that are not in it nothing is said.
pub(super) type Row = Map<String, Value>;

/// The tables that a document is about, each after those that it refers to, with its key's column and
/// what it is called.
pub(super) const TABLES: [(&str, &str, &str); 5] = [
    ("clusters", "name", "cluster"),
    ("tenants", "id", "tenant"),
    ("placements", "tenant", "placement of"),
    ("aliases", "alias", "alias"),
    ("bindings", "certificate", "certificate"),
];

/// Rows of each of [`TABLES`], by key.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Rows(pub(super) [BTreeMap<String, Row>; TABLES.len()]);

/// What a document says, and which clusters it does not name: placements say all of them.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) rows: Rows,
    pub(super) unnamed_clusters: BTreeSet<String>,
}

fn row(value: Value) -> Row {
    match value {
        Value::Object(row) => row,
        _ => Row::new(),
    }
}

fn text(row: &Row, column: &str) -> String {
    row.get(column).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// The rows that a document makes. A server without a cluster's name becomes a cluster; a file of
/// authorities is read, as another reader has no such file.
pub(super) fn of_document(document: &Document, file: &TomlFile) -> Result<Wanted> {
    let mut rows = Rows::default();
    let mut unnamed_clusters = BTreeSet::new();
    let [clusters, tenants, placements, aliases, bindings] = &mut rows.0;
    for entry in &document.cluster {
        clusters.insert(entry.name.clone(), cluster(entry, file)?);
    }
    for (number, entry) in document.tenant.iter().enumerate() {
        let TenantEntry {
            id, name, state, database_names, regions, placement, lease, limits, ..
        } = entry;
        let in_cluster = match &placement.cluster {
            Some(name) => name.clone(),
            None => {
                let entry = server(placement)
                    .map_err(|what| file.wrong(&format!("tenant[{number}].placement"), what))?;
                let row = cluster(&entry, file)?;
                let known = clusters.entry(entry.name.clone()).or_insert_with(|| row.clone());
                if *known != row {
                    let what = format!(
                        "something else is said of {} elsewhere in this file; write it once, as a [[cluster]]",
                        entry.name
                    );
                    return Err(file.wrong(&format!("tenant[{number}].placement"), what).into());
                }
                unnamed_clusters.insert(entry.name.clone());
                entry.name
            }
        };
        let mut row_of_tenant = row(json!({
            "id": id, "name": name, "database_names": database_names, "regions": regions,
            "limits": limits,
        }));
        match state {
            None => {}
            // What is being deleted already may be said to be.
            Some(State::Deleting) => {
                row_of_tenant.insert("state".to_owned(), json!(state));
            }
            Some(state) => {
                row_of_tenant.insert("state".to_owned(), json!(state));
                row_of_tenant.insert("delete_after".to_owned(), Value::Null);
            }
        }
        tenants.insert(id.clone(), row_of_tenant);
        let mount = lease.mount.clone().unwrap_or_else(|| format!("pgsilo/{id}"));
        placements.insert(
            id.clone(),
            row(json!({
                "tenant": id, "cluster": in_cluster, "dbname": placement.dbname,
                "seal": placement.seal.as_ref().unwrap_or(id), "mount": mount,
                "connection": lease.connection, "roles": lease.roles,
            })),
        );
        for alias in &entry.aliases {
            aliases.insert(alias.clone(), row(json!({ "alias": alias, "tenant": id })));
        }
    }
    for BindingEntry { certificate, tenant, access } in &document.binding {
        bindings.insert(
            certificate.clone(),
            row(json!({ "certificate": certificate, "tenant": tenant, "access": access })),
        );
    }
    Ok(Wanted { rows, unnamed_clusters })
}

fn cluster(entry: &ClusterEntry, file: &TomlFile) -> Result<Row> {
    let ClusterEntry { name, endpoints, region, tls, auth, max_sessions, monitor, read_only } =
        entry;
    let tls = match tls {
        None => json!({}),
        Some(tls) => {
            let mut tls = tls.clone();
            if let Some(path) = tls.ca.take() {
                let path = file.resolve(&path);
                let pem = fs::read_to_string(&path);
                let pem = pem.with_context(|| format!("reading {}", path.display()))?;
                if pem.contains("PRIVATE KEY") {
                    bail!(
                        "{} has a private key in it, which all proxies would read",
                        path.display()
                    );
                }
                tls.ca_pem = Some(pem);
            }
            serde_json::to_value(tls)?
        }
    };
    // In one spelling: two are not taken for different ones.
    let endpoints: Result<Vec<_>, _> = endpoints
        .iter()
        .map(|text| Host::read(text).map(|host| host.comparable().to_string()))
        .collect();
    let endpoints = endpoints.with_context(|| format!("cluster {name:?}"))?;
    Ok(row(json!({
        "name": name, "endpoints": endpoints, "region": region, "tls": tls,
        "auth": auth.as_deref().unwrap_or_default(), "max_sessions": max_sessions,
        "monitor": monitor, "read_only": read_only,
    })))
}

/// A placement's server as a cluster, called by its address.
fn server(placement: &PlacementEntry) -> Result<ClusterEntry, String> {
    let PlacementEntry { host, port, socket, region, tls, auth, .. } = placement;
    let endpoint = match (host, socket) {
        (Some(host), _) => {
            Host::Tcp { host: host.clone(), port: port.unwrap_or(5432) }.comparable()
        }
        (None, Some(socket)) => Host::Unix(socket.clone()),
        (None, None) => return Err("neither host nor socket nor cluster".to_owned()),
    };
    let endpoint = endpoint.to_string();
    let fits = |c: char| c.is_ascii_alphanumeric() || "._:-".contains(c);
    let name = endpoint.trim_start_matches('/').replace('/', ":");
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if name.len() > 63 || !begins || !name.chars().all(fits) {
        return Err(format!(
            "{endpoint} cannot be a cluster's name; write a [[cluster]] with a name for it"
        ));
    }
    Ok(ClusterEntry {
        name,
        endpoints: vec![endpoint],
        region: region.clone(),
        tls: tls.clone(),
        auth: auth.clone(),
        max_sessions: None,
        monitor: None,
        read_only: None,
    })
}

/// A row as a document writes it: what is written by hand may be spelled in another way.
pub(super) fn canonical(table: &str, mut row: Row) -> Result<Row> {
    let mut respell = |column: &str, spelled: fn(Value) -> Result<Value>| -> Result<()> {
        if let Some(value) = row.get_mut(column).filter(|value| **value != json!({})) {
            *value = spelled(value.take()).with_context(|| format!("{table}.{column}"))?;
        }
        Ok(())
    };
    match table {
        "clusters" => {
            respell("tls", |tls| {
                Ok(serde_json::to_value(serde_json::from_value::<TlsEntry>(tls)?)?)
            })?;
        }
        "tenants" => respell("limits", |limits| {
            Ok(serde_json::to_value(serde_json::from_value::<LimitsEntry>(limits)?)?)
        })?,
        _ => {}
    }
    Ok(row)
}

impl Rows {
    /// The document that these rows are. They are in full.
    pub(super) fn document(&self) -> Result<Document> {
        let [clusters, tenants, placements, aliases, bindings] = &self.0;
        let mut of_tenants = BTreeMap::<String, Vec<String>>::new();
        for (alias, row) in aliases {
            of_tenants.entry(text(row, "tenant")).or_default().push(alias.clone());
        }
        let cluster = |(name, row): (&String, &Row)| {
            let mut row = row.clone();
            // Not a proxy's to know.
            row.remove("server_version");
            row.remove("openbao_endpoints");
            row.remove("system_identifier");
            row.retain(|_, value| !value.is_null());
            if row.get("tls") == Some(&json!({})) {
                row.remove("tls");
            }
            if row.get("auth") == Some(&json!([])) {
                row.remove("auth");
            }
            let entry = serde_json::from_value(Value::Object(row));
            entry.with_context(|| format!("cluster {name:?}"))
        };
        let mut tenant = |(id, placed): (&String, &Row)| -> Result<TenantEntry> {
            let Some(tenant) = tenants.get(id) else { bail!("a placement of no tenant") };
            let mut placement = placed.clone();
            let [mount, connection, roles] =
                ["mount", "connection", "roles"].map(|column| placement.remove(column));
            placement.remove("tenant");
            if placement.get("seal").and_then(Value::as_str) == Some(id) {
                placement.remove("seal");
            }
            let mut entry = tenant.clone();
            entry.remove("delete_after");
            entry.remove("settings");
            entry.retain(|_, value| !value.is_null());
            entry.insert("aliases".to_owned(), json!(of_tenants.remove(id).unwrap_or_default()));
            entry.insert("placement".to_owned(), Value::Object(placement));
            let lease = json!({ "mount": mount, "connection": connection, "roles": roles });
            entry.insert("lease".to_owned(), lease);
            Ok(serde_json::from_value(Value::Object(entry))?)
        };
        Ok(Document {
            cluster: clusters.iter().map(cluster).collect::<Result<_>>()?,
            tenant: placements
                .iter()
                .map(|(id, row)| tenant((id, row)).with_context(|| format!("tenant {id:?}")))
                .collect::<Result<_>>()?,
            binding: bindings
                .iter()
                .map(|(name, row)| {
                    let entry = serde_json::from_value(Value::Object(row.clone()));
                    entry.with_context(|| format!("certificate {name:?}"))
                })
                .collect::<Result<_>>()?,
        })
    }
}
