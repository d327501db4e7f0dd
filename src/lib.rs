//! pgsilo: a PostgreSQL proxy that gives every tenant its own database.
pub mod lease;
pub mod registry;
pub mod tenant;
pub mod tls;
pub mod token;
pub mod toml_file;
