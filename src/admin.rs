//! Seen from outside: `/metrics` for Prometheus, `/livez` and `/readyz` for whoever restarts
//! or routes. On an address of its own, without authentication: it says nothing of tenants,
//! and belongs on loopback or behind a network policy.

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
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::proxy::Proxy;

/// Connections served at once; a scraper needs one.
const AT_ONCE: usize = 32;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Answers requests until the process ends.
pub(crate) async fn serve(listener: TcpListener, metrics: PrometheusHandle, proxy: &'static Proxy) {
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let tcp = match listener.accept().await {
            Ok((tcp, _address)) => tcp,
            Err(error) => {
                tracing::warn!(%error, "cannot accept an HTTP connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let metrics = metrics.clone();
        tokio::spawn(async move {
            let answer = service_fn(move |request| {
                let response = answer(&request, &metrics, proxy);
                async move { Ok::<_, Infallible>(response) }
            });
            let serving = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(tcp), answer);
            // A reader that does not read must not hold a place for ever.
            if let Ok(Err(error)) = timeout(CONNECTION_TIMEOUT, serving).await {
                tracing::debug!(%error, "an HTTP connection ended badly");
            }
            drop(slot);
        });
    }
}

fn answer(
    request: &Request<Incoming>,
    metrics: &PrometheusHandle,
    proxy: &Proxy,
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
        "/livez" => text(StatusCode::OK, "ok\n"),
        "/readyz" => match unready(proxy) {
            None => text(StatusCode::OK, "ok\n"),
            Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, why),
        },
        _ => text(StatusCode::NOT_FOUND, "there are /metrics, /livez and /readyz\n"),
    }
}

/// Why no session could be served now, if so.
fn unready(proxy: &Proxy) -> Option<&'static str> {
    let stale = proxy.registry().stale_for();
    if proxy.is_draining() {
        Some("stopping\n")
    } else if !proxy.lessor.is_ready() {
        Some("not logged in to OpenBAO\n")
    } else if !proxy.verifier().has_usable_keys() {
        Some("no issuer's keys are usable\n")
    } else if stale.zip(proxy.config.max_staleness).is_some_and(|(age, max)| age > max) {
        Some("the registry is stale\n")
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
