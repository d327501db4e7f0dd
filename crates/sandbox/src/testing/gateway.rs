//! A gateway in front of a real OpenBAO, which says 429 where it is told to and passes everything
//! else on.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_LENGTH, HOST, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;

/// What it was asked, and what it is to refuse.
#[derive(Debug, Default)]
struct State {
    asked: Vec<(String, u16)>,
    /// By what they are.
    secrets: Vec<(&'static str, String)>,
    busy: Option<Busy>,
}

/// So many requests for a path are told to come again.
#[derive(Debug, Clone)]
pub struct Busy {
    pub path: &'static str,
    pub times: u32,
    /// In seconds.
    pub retry_after: u32,
}

/// A gateway that runs as long as its test.
#[derive(Debug)]
pub struct Gateway {
    address: String,
    state: Arc<Mutex<State>>,
}

impl Gateway {
    /// In front of a server at a base URL.
    pub async fn before(server: &str) -> Gateway {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let state: Arc<Mutex<State>> = Arc::default();
        let (server, shared) = (Arc::<str>::from(server), Arc::clone(&state));
        let http = reqwest::Client::builder().no_proxy().build().expect("a client");
        tokio::spawn(async move {
            while let Ok((tcp, _from)) = listener.accept().await {
                let (server, state, http) =
                    (Arc::clone(&server), Arc::clone(&shared), http.clone());
                let answer = service_fn(move |request| {
                    let (server, state, http) =
                        (Arc::clone(&server), Arc::clone(&state), http.clone());
                    async move { Ok::<_, Infallible>(answer(request, &server, &state, &http).await) }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(tcp), answer));
            }
        });
        Gateway { address, state }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn refuse(&self, busy: Busy) {
        self.state().busy = Some(busy);
    }

    /// The requests for any of these paths so far, and the status of each answer, in their order.
    pub fn answered(&self, paths: &[&str]) -> Vec<(String, u16)> {
        let asked = self.state().asked.clone();
        let of_them = |(path, _): &(String, u16)| paths.iter().any(|part| path.contains(part));
        asked.into_iter().filter(of_them).collect()
    }

    /// Every token, password and secret id so far, each with what it is: those that were shown, and
    /// those that were given.
    pub fn secrets(&self) -> Vec<(&'static str, String)> {
        self.state().secrets.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }
}

async fn answer(
    request: Request<Incoming>,
    server: &str,
    state: &Mutex<State>,
    http: &reqwest::Client,
) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let path = head.uri.to_string();
    let busy = {
        let mut state = state.lock().expect("no panic");
        match &mut state.busy {
            Some(busy) if busy.times > 0 && path.contains(busy.path) => {
                busy.times -= 1;
                Some(busy.retry_after)
            }
            _ => None,
        }
    };
    let response = match busy {
        Some(after) => Response::builder()
            .status(StatusCode::TOO_MANY_REQUESTS)
            .header(RETRY_AFTER, after)
            .body(Full::new(Bytes::from_static(b"{\"errors\":[\"rate limit quota exceeded\"]}"))),
        None => {
            let mut headers = head.headers;
            for own in [HOST, CONNECTION, CONTENT_LENGTH] {
                headers.remove(own);
            }
            let body = body.collect().await.expect("a body").to_bytes();
            let shown = headers.get("x-vault-token").map(|token| token.to_str().expect("text"));
            let shown = shown.map(|token| ("token", token.to_owned()));
            let told = serde_json::from_slice::<Value>(&body).unwrap_or_default();
            let sent = secrets_in(&told);
            let asked = http.request(head.method, format!("{server}{path}")).headers(headers);
            let said = asked.body(body).send().await.expect("OpenBAO answers");
            let status = said.status();
            let body = said.bytes().await.expect("a body");
            let told = serde_json::from_slice::<Value>(&body).unwrap_or_default();
            let mut state = state.lock().expect("no panic");
            state.secrets.extend(shown.into_iter().chain(sent).chain(secrets_in(&told)));
            Response::builder().status(status).body(Full::new(body))
        }
    };
    let response = response.expect("a response");
    state.lock().expect("no panic").asked.push((path, response.status().as_u16()));
    response
}

/// What is secret in a request's body, or in an answer's.
fn secrets_in(body: &Value) -> impl Iterator<Item = (&'static str, String)> {
    let places = [
        ("secret id", "/secret_id"),
        ("secret id", "/data/secret_id"),
        ("session token", "/jwt"),
        ("token", "/auth/client_token"),
        ("password", "/data/password"),
    ];
    let found = places.map(|(what, place)| Some((what, body.pointer(place)?.as_str()?.to_owned())));
    found.into_iter().flatten()
}
