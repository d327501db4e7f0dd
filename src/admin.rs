//! Seen from outside: `/metrics` for Prometheus, `/livez` and `/readyz` for whatever restarts or
//! routes. On an address of its own, without authentication: it says nothing of tenants, and
//! belongs on loopback or behind a network policy. `/livez` gives each event loop something to do
//! and waits 750 ms for it.

pub(crate) mod metrics;

use std::convert::Infallible;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::PrometheusHandle;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout, timeout_at};

use crate::lease::Trouble;
use crate::limits::Slots;
use crate::log::Failures;
use crate::proxy::Proxy;

/// Connections that are open at once; a scraper needs one. More than the accepting task takes
/// before it gives way, so that each is looked at before it can be the oldest.
const AT_ONCE: usize = 256;
/// From accept to a whole request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
/// From accept to the last byte of the answer.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an event loop may take to turn; a Kubernetes probe waits a second for all of it.
const LOOP_PATIENCE: Duration = Duration::from_millis(750);
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Answers requests until the process ends: one for each connection, which has little time for it,
/// and of too many connections the oldest goes. So slow clients cannot block others.
pub(crate) async fn serve(
    listener: TcpListener,
    metrics: PrometheusHandle,
    proxy: &'static Proxy,
    loops: Vec<Handle>,
) {
    let loops: Arc<[Handle]> = loops.into();
    let mut failures = Failures::default();
    let slots: &'static Slots = Box::leak(Box::new(Slots::new(AT_ONCE, Duration::ZERO)));
    loop {
        let tcp = match listener.accept().await {
            Ok((tcp, _address)) => tcp,
            Err(error) => {
                failures.another(|failures| {
                    tracing::warn!(%error, failures, "cannot accept an HTTP connection");
                });
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Some((slot, mut eviction)) = slots.enter().await else { continue };
        let (metrics, loops) = (metrics.clone(), Arc::clone(&loops));
        tokio::spawn(async move {
            let answer = service_fn(async |request| {
                Ok::<_, Infallible>(answer(&request, &metrics, proxy, &loops).await)
            });
            let serving = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(tcp), answer);
            tokio::select! {
                served = timeout(CONNECTION_TIMEOUT, serving) => {
                    if let Ok(Err(error)) = served {
                        tracing::debug!(%error, "an HTTP connection ended badly");
                    }
                }
                () = eviction.told() => {}
            }
            drop(slot);
        });
    }
}

async fn answer(
    request: &Request<Incoming>,
    metrics: &PrometheusHandle,
    proxy: &Proxy,
    loops: &[Handle],
) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match request.uri().path() {
        "/metrics" => {
            metrics::observe(proxy);
            let mut response = text(StatusCode::OK, metrics.render());
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(EXPOSITION));
            response
        }
        "/livez" => match stuck(loops, proxy.is_draining()).await {
            stuck if stuck.is_empty() => text(StatusCode::OK, "ok\n"),
            stuck => text(StatusCode::SERVICE_UNAVAILABLE, stuck),
        },
        "/readyz" => match unready(proxy, &Asked::of(request.uri().query())) {
            None => text(StatusCode::OK, "ok\n"),
            Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, why),
        },
        _ => text(StatusCode::NOT_FOUND, "there are /metrics, /livez and /readyz\n"),
    }
}

/// A line for each event loop that does not turn: each is given something to do, and should be done
/// with it soon. One that has ended gives it back at once, which is as it should be only while
/// pgsilo stops. That the answer comes at all shows that the control runtime turns.
async fn stuck(loops: &[Handle], is_stopping: bool) -> String {
    let asked: Vec<_> = loops.iter().map(|turns| turns.spawn(async {})).collect();
    let by = Instant::now() + LOOP_PATIENCE;
    let mut lines = String::new();
    for (number, asked) in asked.into_iter().enumerate() {
        let withdraw = asked.abort_handle();
        match timeout_at(by, asked).await {
            Ok(Ok(())) => {}
            Ok(Err(ended)) if is_stopping && ended.is_cancelled() => {}
            Ok(Err(_)) | Err(_) => {
                withdraw.abort();
                lines += &format!("event loop {number} does not answer\n");
            }
        }
    }
    lines
}

/// What `/readyz` is asked for.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    /// Not with `exclude=openbao`, as Kubernetes' own servers have it.
    openbao: bool,
}

impl Asked {
    fn of(query: Option<&str>) -> Asked {
        let mut words = query.unwrap_or_default().split('&');
        Asked { openbao: !words.any(|word| word == "exclude=openbao") }
    }
}

/// Why no session could be served now, if so.
fn unready(proxy: &Proxy, asked: &Asked) -> Option<&'static str> {
    let trouble = proxy.lessor.trouble();
    if proxy.is_draining() {
        Some("stopping\n")
    } else if asked.openbao && trouble == Some(Trouble::Sealed) {
        Some("OpenBAO is sealed\n")
    } else if asked.openbao && trouble == Some(Trouble::Away) {
        Some("OpenBAO does not answer\n")
    } else if asked.openbao && !proxy.lessor.is_ready() {
        Some("not logged in to OpenBAO\n")
    } else if !proxy.verifier().has_usable_keys() {
        Some("no issuer's keys are usable\n")
    } else if proxy.too_stale().is_some() {
        Some("the registry is stale\n")
    } else if !proxy.is_audited() {
        Some("sessions cannot be audited\n")
    } else {
        None
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn openbao_may_be_left_out() {
        for (query, openbao) in [
            (None, true),
            (Some(""), true),
            (Some("exclude=registry"), true),
            (Some("exclude=openbao"), false),
            (Some("verbose&exclude=openbao"), false),
        ] {
            assert_eq!(Asked::of(query), Asked { openbao }, "{query:?}");
        }
    }

    #[tokio::test]
    async fn an_event_loop_that_does_not_turn_is_named() {
        let mut loops = Vec::new();
        let mut threads = Vec::new();
        for _ in 0..2 {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("built");
            loops.push(runtime.handle().clone());
            let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
            threads.push((thread::spawn(move || runtime.block_on(stopped)), stop));
        }
        assert_eq!(stuck(&loops, false).await, "");
        let ((held, holds), (release, released)) = (channel(), channel::<()>());
        loops[1].spawn(async move {
            held.send(()).expect("awaited");
            // As a write to a pipe without a reader does.
            let _released = released.recv();
        });
        holds.recv().expect("it is stuck");
        assert_eq!(stuck(&loops, false).await, "event loop 1 does not answer\n");
        drop(release);
        while !stuck(&loops, false).await.is_empty() {}
        for (thread, stop) in threads {
            stop.send(()).expect("it turns");
            thread.join().expect("no panic").expect("told");
        }
        // They have ended: while pgsilo stops that is no reason to cut it short, at other times it
        // is.
        assert_eq!(stuck(&loops, true).await, "");
        assert_eq!(stuck(&loops, false).await.lines().count(), 2);
    }
}
