//! What is made of the commands themselves: what a shell completes, and manual pages.

use std::path::Path;

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;

use crate::say;

/// Prints what a shell is to complete.
pub fn completions(mut command: Command, shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    let name = command.get_name().to_owned();
    clap_complete::generate(shell, &mut command, name, &mut script);
    Ok(say::data(String::from_utf8(script)?.trim_end())?)
}

/// Writes a page for each command into a folder: `pgsiloctl-tenant-create.1`.
pub fn pages(command: Command, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    clap_mangen::generate_to(command, folder)
        .with_context(|| format!("writing into {}", folder.display()))
}
