//! `cargo bench --bench pieces`: what the pieces of a login and of the relay cost, each alone on
//! one core. What verifying a token costs is in `verify`.

#![expect(clippy::expect_used, reason = "a bench fails by panicking")]

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use bytes::Bytes;
use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use pgsilo::Refusal;
use pgsilo::registry::Registry;
use pgsilo_core::registry::Snapshot;
use pgsilo_core::tenant::TenantId;
use pgsilo_wire::frame::FrameCounter;
use pgsilo_wire::startup::{InitialPacket, StartupError};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};

const TENANTS: usize = 100_000;

/// As psql sends it.
#[divan::bench]
fn parse_startup(bencher: Bencher<'_, '_>) {
    let mut packet = 0x0003_0000_u32.to_be_bytes().to_vec();
    for part in [
        "user",
        "app",
        "database",
        "acme",
        "application_name",
        "psql",
        "client_encoding",
        "UTF8",
        "",
    ] {
        packet.extend_from_slice(part.as_bytes());
        packet.push(0);
    }
    let packet = Bytes::from(packet);
    bencher.bench(|| InitialPacket::parse(black_box(&packet)).expect("a startup packet"));
}

/// A registry of 100,000 tenants, read from a file as pgsilo does it.
fn registry() -> &'static Registry {
    static REGISTRY: OnceLock<Registry> = OnceLock::new();
    REGISTRY.get_or_init(|| {
        let mut text = String::new();
        for number in 0..TENANTS {
            let _ = writeln!(
                text,
                "[[tenant]]\nid = \"tenant-{number}\"\n[tenant.placement]\nhost = \"db-{}.internal\"\n\
                 port = 5432\ndbname = \"tenant_{number}\"\ntls = {{ mode = \"require\" }}\n\
                 [tenant.lease]\nroles = {{ read-write = \"tenant-{number}-rw\" }}",
                number % 50
            );
        }
        let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("pieces-tenants.toml");
        fs::write(&file, text).expect("written");
        let registry = Registry::new(Snapshot::read(&file, None).expect("a registry"));
        fs::remove_file(file).expect("removed");
        registry
    })
}

/// The way from a tenant's name in a token to its placement.
#[divan::bench]
fn find_route_among_100000(bencher: Bencher<'_, '_>) {
    let registry = registry();
    bencher.bench(|| {
        let id = TenantId::parse(black_box("tenant-73912")).expect("an id");
        registry.snapshot().tenant(&id).expect("there")
    });
}

fn messages(body: usize, bytes: usize) -> Vec<u8> {
    let mut message = vec![b'D'];
    message.extend_from_slice(&(body as u32 + 4).to_be_bytes());
    message.resize(message.len() + body, b'x');
    message.iter().copied().cycle().take(bytes / message.len() * message.len()).collect()
}

/// What the relay does with a chunk besides moving it; the argument is the bytes of a message's
/// body.
#[divan::bench(args = [20, 100, 1000, 8000])]
fn count_frames(bencher: Bencher<'_, '_>, body: usize) {
    let chunk = messages(body, 64 * 1024);
    let mut counter = FrameCounter::default();
    bencher.counter(BytesCount::new(chunk.len())).bench_local(|| {
        counter.count(black_box(&chunk), |header| {
            black_box(header);
        });
    });
}

/// The client's side of a login with 4096 iterations, PostgreSQL's default.
#[divan::bench]
fn scram_client(bencher: Bencher<'_, '_>) {
    bencher.bench(|| {
        let mut scram =
            ScramSha256::new(b"a-password-that-was-leased", ChannelBinding::unsupported());
        let first = String::from_utf8(scram.message().to_vec()).expect("text");
        let nonce = first.rsplit_once("r=").expect("a nonce").1;
        let challenge = format!("r={nonce}server,s=c2FsdHNhbHRzYWx0c2FsdA==,i=4096");
        scram.update(challenge.as_bytes()).expect("a challenge");
        scram.message().len()
    });
}

/// The message of a refusal, but for the close that follows it.
#[divan::bench]
fn refuse() -> Vec<u8> {
    Refusal::from(black_box(StartupError::Layout)).message("0123456789abcdef")
}

fn main() {
    divan::main();
}
