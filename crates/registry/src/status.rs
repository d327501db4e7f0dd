//! How a registry is, as its operators ask: its revision, and who has read how much of it.
//!
//! A proxy may write nothing there. It says how far it has read in its connection's
//! `application_name`, which PostgreSQL shows to everybody who may connect to that server and
//! forgets when the connection ends.

use tokio_postgres::Client;

use crate::schema::{SchemaError, installed};

/// How proxies' connections are called.
const PREFIX: &str = "pgsilo ";
/// What PostgreSQL keeps of an application's name.
const LONGEST: usize = 63;

/// A registry.
#[derive(Debug)]
pub struct Status {
    /// Of its schema.
    pub version: i32,
    /// Of its newest change.
    pub revision: i64,
    /// How many, those without a placement included.
    pub tenants: i64,
    /// How many, those that were only asked for included.
    pub grants: i64,
    /// How many.
    pub locks: i64,
    /// The number of the audit's last row and its hash, which holds all rows before it. Kept elsewhere,
    /// it shows whether they have been changed since.
    pub audit: Option<(i64, String)>,
    /// Which are connected.
    pub proxies: Vec<Connected>,
}

/// A proxy that is connected.
#[derive(Debug, PartialEq, Eq)]
pub struct Connected {
    /// What it calls itself.
    pub name: String,
    /// Up to which revision it has read.
    pub revision: Option<i64>,
}

/// Asks.
///
/// # Errors
/// When there is no registry, or PostgreSQL refuses.
pub async fn status(client: &Client) -> Result<Status, SchemaError> {
    let version = installed(client).await?.ok_or(SchemaError::Missing)?.version;
    let failed = |error| SchemaError::Postgres { doing: "reading the registry".to_owned(), error };
    let counts = "SELECT revision, (SELECT count(*) FROM pgsilo.tenants),
        (SELECT count(*) FROM pgsilo.grants), (SELECT count(*) FROM pgsilo.locks)
        FROM pgsilo.revision";
    let counts = client.query_one(counts, &[]).await.map_err(failed)?;
    let audit = "SELECT number, encode(hash, 'hex') FROM pgsilo.audit ORDER BY number DESC LIMIT 1";
    let audit = client.query_opt(audit, &[]).await.map_err(failed)?;
    let connected = "SELECT application_name FROM pg_stat_activity
        WHERE datname = current_database() AND starts_with(application_name, $1)
            AND pg_has_role(usesysid, 'pgsilo_registry_proxy', 'MEMBER')
        ORDER BY application_name";
    let connected = client.query(connected, &[&PREFIX]).await.map_err(failed)?;
    Ok(Status {
        version,
        revision: counts.get(0),
        tenants: counts.get(1),
        grants: counts.get(2),
        locks: counts.get(3),
        audit: audit.map(|row| (row.get(0), row.get(1))),
        proxies: connected
            .iter()
            .filter_map(|row| {
                let (name, revision) = parse(row.get(0))?;
                Some(Connected { name, revision })
            })
            .collect(),
    })
}

/// What the connection of a proxy that has read up to a revision is called. Of a long name the end
/// is left out.
pub fn application_name(name: &str, revision: Option<i64>) -> String {
    let revision = revision.map_or_else(|| "-".to_owned(), |revision| revision.to_string());
    let most = LONGEST - PREFIX.len() - " @".len() - revision.len();
    let plain = |c: char| if c.is_ascii_graphic() { c } else { '?' };
    let name: String = name.chars().map(plain).take(most).collect();
    format!("{PREFIX}{name} @{revision}")
}

fn parse(application_name: &str) -> Option<(String, Option<i64>)> {
    let (name, revision) = application_name.strip_prefix(PREFIX)?.rsplit_once(" @")?;
    Some((name.to_owned(), revision.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_says_how_far_it_has_read() {
        for (name, revision) in
            [("gateway-1", Some(17)), ("gateway-1", None), ("a", Some(i64::MAX))]
        {
            let said = application_name(name, revision);
            assert_eq!(parse(&said), Some((name.to_owned(), revision)));
        }
        let long = application_name(&"x".repeat(200), Some(i64::MAX));
        assert_eq!(long.len(), LONGEST);
        assert_eq!(parse(&long).expect("parsed").1, Some(i64::MAX));
        assert_eq!(application_name("käse @3 x", Some(5)), "pgsilo k?se?@3?x @5");
        assert_eq!(parse("psql"), None);
    }
}
