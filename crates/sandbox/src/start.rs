//! The ordered start: each step needs the ones before it, and any failure stops them all.
//!
//! PostgreSQL and OpenBAO start side by side, then `pgsiloctl` makes them ready and the tenants side by
//! side, then comes the proxy, and `env` is the last thing written. Stopping goes the other way.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::Utf8Error;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::control::{Control, Settings};
use crate::env::{Env, quote, quote_if_needed, socket_dsn, tls_dsn};
use crate::issuer::{self, Issuer};
use crate::login::Login;
use crate::openbao::{self, OpenBao};
use crate::postgres::{self, Postgres};
use crate::proxy::{self, Proxy};
use crate::psql::Psql;
use crate::stop::Stop;
use crate::workspace::Workspace;
use crate::{Start, certificates, files, seed};
use pgsilo_core::names::Names;
use pgsilo_core::secret::Secret;
use pgsilo_core::tenant::TenantId;
use pgsiloctl::say;

/// Tenants that are made at once.
const AT_ONCE: usize = 4;
/// How long the tokens in `env` are valid.
const TOKEN_TTL: Duration = Duration::from_secs(12 * 3600);

/// Starts a sandbox and keeps it until it is told to stop or one of its parts dies.
pub(super) fn run(start: Start) -> Result<ExitCode> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(Box::pin(supervise(start)))
}

async fn supervise(start: Start) -> Result<ExitCode> {
    let mut stop = Stop::listen(start.until_eof)?;
    let workspace = Workspace::prepare(&start.dir)?;
    let failure = tokio::select! {
        () = stop.asked() => None,
        failure = Box::pin(serve(&workspace, &start)) => Some(failure),
    };
    if let Some(failure) = &failure {
        say::progress(&format!("pgsilo-sandbox: error: {failure:#}"));
    }
    say::progress("stopping (Ctrl-C again kills at once)");
    // `env` must not be found while the parts stop.
    workspace.forget_env()?;
    let killed = tokio::select! {
        () = workspace.processes.stop() => false,
        () = stop.asked_again() => true,
    };
    if killed {
        workspace.processes.kill().await;
    }
    workspace.clear()?;
    say::progress("stopped, nothing is left");
    Ok(match failure {
        Some(_) => ExitCode::FAILURE,
        None if killed => ExitCode::from(130),
        None => ExitCode::SUCCESS,
    })
}

/// Gives back why it ended by itself; it never ends well.
async fn serve(workspace: &Workspace, start: &Start) -> anyhow::Error {
    let began = Instant::now();
    match Box::pin(start_all(workspace, start)).await {
        Ok(running) => {
            announce(&running, start, began.elapsed());
            workspace.processes.death().await
        }
        Err(error) => error,
    }
}

// --- The steps -----------------------------------------------------------------------------

/// All that runs.
#[derive(Debug)]
struct Running {
    dir: PathBuf,
    socket_dir: PathBuf,
    postgres: Postgres,
    openbao: OpenBao,
    provisioner: Login,
    provisioner_token: Secret,
    proxy: Proxy,
    psql: Psql,
    by_registry_file: bool,
    /// Of those that have data: tenant and token.
    tokens: Vec<(Names, String)>,
}

async fn start_all(workspace: &Workspace, start: &Start) -> Result<Running> {
    let dir = &workspace.dir;
    certificates::create(dir).context("making certificates")?;
    let issuer = Issuer::create(dir).context("making the token issuer")?;
    let tenants = tenants(start.tenants)?;
    let (postgres, openbao) =
        tokio::try_join!(start_postgres(workspace, start), start_openbao(workspace, start))?;
    let (openbao, mut control) = openbao;
    let issuer_pem = std::fs::read_to_string(dir.join("issuer.pem"))?;
    let sessions = async {
        openbao.admit_sessions(&issuer_pem).await.context("admitting sessions to OpenBAO")
    };
    let settings =
        Settings { openbao: &openbao.address, share: start.share(), allow: &start.allow };
    let endpoint = postgres.endpoint();
    let cluster = step(
        "making the cluster ready",
        control.of_cluster(&postgres.superuser, &endpoint, &settings),
        |()| "the registry, the provisioner, the template of tenants".to_owned(),
    );
    tokio::try_join!(sessions, cluster)?;
    let (provisioner, provisioner_token) =
        tokio::try_join!(postgres.let_provisioner_in(), openbao.provisioner_token())?;
    let make = |(tenant, data)| make_tenant(&control, tenant, data, &openbao, &postgres);
    let with_data = seed::TENANTS.iter().map(Some).chain(std::iter::repeat(None));
    stream::iter(tenants.iter().zip(with_data))
        .map(make)
        .buffered(AT_ONCE)
        .try_collect::<Vec<()>>()
        .await?;
    let tenants_text = match start.registry_file {
        true => {
            postgres.seal_by_id(&tenants).await.context("sealing the databases by hand")?;
            proxy::tenants_text(&tenants, &postgres.admits_leased, postgres.superuser.port)
        }
        false => control.export().await.context("writing tenants.toml")?,
    };
    files::write(&dir.join("tenants.toml"), &tenants_text)?;
    let proxy = start_proxy(workspace, start, &openbao, &postgres).await?;
    let psql = Psql::find(&postgres.programs).await;
    let tokens = tenants
        .into_iter()
        .take(seed::TENANTS.len())
        .map(|tenant| Ok((tenant.clone(), issuer.mint(&options(&tenant))?)))
        .collect::<Result<_>>()?;
    let running = Running {
        dir: dir.clone(),
        socket_dir: workspace.runtime.clone(),
        postgres,
        openbao,
        provisioner,
        provisioner_token,
        proxy,
        psql,
        by_registry_file: start.registry_file,
        tokens,
    };
    files::write_private(&dir.join("env"), &running.env()?.render())?;
    Ok(running)
}

/// One step: what it is called when it fails, and what it says when it is done.
async fn step<T>(
    name: &str,
    work: impl Future<Output = Result<T>>,
    done: impl FnOnce(&T) -> String,
) -> Result<T> {
    let began = Instant::now();
    let made = work.await.with_context(|| name.to_owned())?;
    say::step(&done(&made), began.elapsed());
    Ok(made)
}

async fn start_postgres(workspace: &Workspace, start: &Start) -> Result<Postgres> {
    let options = postgres::Options {
        programs: start.pg_bin.clone(),
        max_connections: start.max_connections,
        leased_over_tcp: start.leased_over_tcp,
        runtime: workspace.runtime.clone(),
        log: workspace.dir.join("postgres.log"),
    };
    step("starting PostgreSQL", Postgres::start(&workspace.processes, &options), |postgres| {
        format!("PostgreSQL {} on 127.0.0.1:{}", postgres.version, postgres.superuser.port)
    })
    .await
}

async fn start_openbao(workspace: &Workspace, start: &Start) -> Result<(OpenBao, Control)> {
    let options = openbao::Options {
        program: start.bao.clone(),
        runtime: workspace.runtime.clone(),
        log: workspace.dir.join("openbao.log"),
    };
    let work = async {
        let openbao = OpenBao::start(&workspace.processes, &options).await?;
        let OpenBao { root_token, address, .. } = &openbao;
        let control = Control::of_openbao(&workspace.dir, root_token, address).await?;
        Ok((openbao, control))
    };
    step("starting OpenBAO", work, |(openbao, _)| {
        format!("OpenBAO {} on {}, its policies and logins", openbao.version, openbao.address)
    })
    .await
}

/// Those with data, and as many others as are wanted.
fn tenants(number: u16) -> Result<Vec<Names>> {
    let with_data = seed::TENANTS.iter().map(|data| data.tenant.to_owned());
    let others = (1..).map(|number| format!("tenant-{number:03}"));
    let ids = with_data.chain(others).take(usize::from(number));
    ids.map(|id| Ok(Names::of(&TenantId::parse(&id)?))).collect()
}

async fn make_tenant(
    control: &Control,
    tenant: &Names,
    data: Option<&seed::Data>,
    openbao: &OpenBao,
    postgres: &Postgres,
) -> Result<()> {
    let name = format!("making tenant {}", tenant.id().as_str());
    let work = async {
        control.create_tenant(tenant).await?;
        let Postgres { superuser, admits_leased, .. } = postgres;
        match data {
            Some(data) => data.write(tenant, openbao, superuser, admits_leased).await,
            None => Ok(()),
        }
    };
    step(&name, work, |()| {
        format!(
            "tenant {}: database {}, roles, leases{}",
            tenant.id().as_str(),
            tenant.database(),
            if data.is_some() { ", data" } else { "" }
        )
    })
    .await
}

async fn start_proxy(
    workspace: &Workspace,
    start: &Start,
    openbao: &OpenBao,
    postgres: &Postgres,
) -> Result<Proxy> {
    let options = proxy::Options {
        dir: &workspace.dir,
        socket_dir: &workspace.runtime,
        port: start.port,
        log_level: start.log_level,
        share: start.share(),
        openbao: &openbao.address,
        registry_port: (!start.registry_file).then_some(postgres.superuser.port),
    };
    if start.without_proxy {
        return Proxy::prepare(&options);
    }
    step("starting pgsilo", Proxy::start(&workspace.processes, &options), |proxy| {
        format!("pgsilo on 127.0.0.1:{}", proxy.port)
    })
    .await
}

fn options(tenant: &Names) -> issuer::Options {
    issuer::Options {
        subject: format!("alice@{}", tenant.id().as_str()),
        tenants: vec![tenant.id().as_str().to_owned()],
        access: None,
        ttl: TOKEN_TTL,
        expired: false,
        claims: Vec::new(),
    }
}

// --- What others get to know ---------------------------------------------------------------

impl Running {
    fn tls_dsn(&self, tenant: &Names, token: &str) -> String {
        tls_dsn(token, self.proxy.port, tenant.id().as_str(), &self.dir.join("ca.crt"))
    }

    fn socket_dsn(&self, tenant: &Names, token: &str) -> String {
        socket_dsn(token, self.proxy.port, tenant.id().as_str(), &self.socket_dir)
    }

    /// The one that the machine's psql can use.
    fn dsn(&self, tenant: &Names, token: &str) -> String {
        if self.psql.tls { self.tls_dsn(tenant, token) } else { self.socket_dsn(tenant, token) }
    }

    fn env(&self) -> Result<Env> {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let direct = |login: &Login| {
            let (user, password) = (&login.user, login.password.expose_text()?);
            let address = format!("{}:{}", login.host, login.port);
            Ok::<_, Utf8Error>(format!("postgresql://{user}:{password}@{address}/postgres"))
        };
        let mut env = Env::default();
        env.set("PGSILO_HOST", "127.0.0.1");
        env.set("PGSILO_PORT", self.proxy.port.to_string());
        env.set("PGSILO_CA", path(&self.dir.join("ca.crt")));
        env.set("PGSILO_SOCKET_DIR", path(&self.socket_dir));
        for (tenant, token) in &self.tokens {
            let name = tenant.id().as_str().to_uppercase();
            env.set(format!("{name}_TOKEN"), token);
            env.set(format!("{name}_DSN"), self.dsn(tenant, token));
            env.set(format!("{name}_TLS_DSN"), self.tls_dsn(tenant, token));
            env.set(format!("{name}_SOCKET_DSN"), self.socket_dsn(tenant, token));
        }
        env.set("METRICS_URL", format!("http://{}/metrics", self.proxy.admin));
        env.set("PGSILO_CONFIG", path(&self.dir.join("pgsilo.toml")));
        if self.by_registry_file {
            env.set("PGSILO_REGISTRY", path(&self.dir.join("tenants.toml")));
        }
        env.set("PGSILOCTL_CONFIG", path(&self.dir.join("pgsiloctl.toml")));
        env.set("PGSILO_SANDBOX_DIR", path(&self.dir));
        env.set("PGSILO_SANDBOX_PID", std::process::id().to_string());
        let proxy_pid = self.proxy.process.as_ref().map(|process| process.pid().to_string());
        env.set("PGSILO_PID", proxy_pid.unwrap_or_default());
        env.set("PSQL", &self.psql.program);
        env.set("PG_BIN", path(&self.postgres.programs));
        env.set("PG_PORT", self.postgres.superuser.port.to_string());
        env.set("PG_PID", self.postgres.process.pid().to_string());
        env.set("PG_SUPERUSER_DSN", direct(&self.postgres.superuser)?);
        env.set("PROVISIONER_DSN", direct(&self.provisioner)?);
        env.set("PROVISIONER_BAO_TOKEN", self.provisioner_token.expose_text()?);
        env.set("BAO_ADDR", &self.openbao.address);
        env.set("BAO_TOKEN", self.openbao.root_token.expose_text()?);
        env.set("BAO_UNSEAL_KEY", self.openbao.unseal_key.expose_text()?);
        env.set("BAO_PID", self.openbao.process.pid().to_string());
        Ok(env)
    }
}

/// What a person pastes; each line works as it stands.
fn announce(running: &Running, start: &Start, took: Duration) {
    let took = took.as_secs_f64();
    let socket = running.socket_dir.join(format!(".s.PGSQL.{}", running.proxy.port));
    let socket = socket.display();
    let port = running.proxy.port;
    if start.without_proxy {
        let config = quote_if_needed(&running.dir.join("pgsilo.toml").to_string_lossy());
        say::result(&format!(
            "Ready in {took:.1} s, all but the proxy. Start it with\n\n  pgsilo serve --config {config}\n"
        ));
    } else {
        say::result(&format!("Ready in {took:.1} s: 127.0.0.1:{port} (TLS) and {socket}\n"));
    }
    let psql = quote_if_needed(&running.psql.program);
    for (tenant, token) in &running.tokens {
        say::result(&format!(
            "Tenant {}, with its token as the password:\n\n  {psql} {}\n",
            tenant.id().as_str(),
            quote(&running.dsn(tenant, token))
        ));
    }
    let own = std::env::args().next().unwrap_or_else(|| "pgsilo-sandbox".to_owned());
    let own = quote_if_needed(&own);
    let dir = quote_if_needed(&start.dir.to_string_lossy());
    // Without a slash in front, `.` would look for it on the PATH.
    let env = Path::new(".").join(&start.dir).join("env");
    let env = quote_if_needed(&env.to_string_lossy());
    say::result(&format!(
        "In another shell, from this folder:\n\n  \
         . {env} && \"$PSQL\" \"$ACME_DSN\" -c 'table customers'\n  \
         {own} token --dir {dir} acme --ttl 5m --access read-only\n\n\
         Ctrl-C stops everything."
    ));
}
