//! pgsilo: a PostgreSQL proxy that gives every tenant its own database.
pub mod config;
pub mod lease;
pub mod registry;
pub mod tenant;
pub mod tls;
pub mod token;
mod toml_file;
