//! `bao agent` in front of a server of a test's own.

use std::fs;
use std::path::PathBuf;

use super::bao::{Folder, Process, Server};
use super::eventually;

/// `bao agent` on a Unix socket: logs in with pgsilo's AppRole, writes its token to a file.
#[derive(Debug)]
pub struct Agent {
    _process: Process,
    dir: Folder,
}

impl Agent {
    /// In front of a server; `more` goes into its configuration.
    pub async fn start(server: &Server, more: &str) -> Agent {
        let dir = Folder::new();
        fs::write(dir.join("role-id"), "pgsilo").expect("written");
        fs::write(dir.join("secret-id"), server.secret_id().await).expect("written");
        let path = |name: &str| dir.join(name).display().to_string();
        let config = format!(
            "vault {{\n  address = \"{}\"\n}}\n\
             auto_auth {{\n  method \"approle\" {{\n    config = {{\n      \
             role_id_file_path = \"{}\"\n      secret_id_file_path = \"{}\"\n      \
             remove_secret_id_file_after_reading = false\n    }}\n  }}\n  \
             sink \"file\" {{\n    config = {{\n      path = \"{}\"\n    }}\n  }}\n}}\n\
             listener \"unix\" {{\n  address = \"{}\"\n  tls_disable = true\n  \
             require_request_header = true\n}}\n{more}\n",
            server.address(),
            path("role-id"),
            path("secret-id"),
            path("token"),
            path("agent.sock"),
        );
        fs::write(dir.join("agent.hcl"), config).expect("written");
        let mut process = Process::start("agent", &dir.join("agent.hcl"));
        eventually("the agent's token and socket", async || {
            assert!(!process.has_ended(), "the agent ended");
            let ready = dir.join("token").exists() && dir.join("agent.sock").exists();
            ready.then_some(())
        })
        .await;
        Agent { _process: process, dir }
    }

    /// Where pgsilo finds it.
    pub fn address(&self) -> String {
        format!("address = \"unix:{}\"\n", self.dir.join("agent.sock").display())
    }

    /// The auth line for the token that it writes.
    pub fn auth(&self) -> String {
        format!("auth = {{ token_file = \"{}\" }}\n", self.token_file().display())
    }

    pub fn token_file(&self) -> PathBuf {
        self.dir.join("token")
    }
}
