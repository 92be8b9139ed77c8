//! The HTTP API, as `epagent_wire::api` lists it.
//!
//! `admin.sock` is operator-equivalent: who may open it may run anything in any app. `read.sock` takes GET alone
//! and nothing that runs a command. There is no TCP socket.

mod apps;
mod balancer;
mod deploys;
mod exec;
mod failure;
mod images;
mod instances;
mod routes;
mod session;
mod settings;
mod system;

use std::sync::Arc;

use axum::Router;
use axum::extract::{ConnectInfo, Request, State, connect_info::Connected};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::serve::IncomingStream;
use nix::unistd::{Gid, Group, Uid, User};
use tokio::net::{UnixListener, UnixStream};

use crate::apps::Apps;
use failure::Failure;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Admin,
    Read,
}

/// A listener that can be served again after a failure of the loop that served it.
#[derive(Clone)]
pub struct Listener(Arc<UnixListener>);

pub fn listener(inherited: std::os::unix::net::UnixListener) -> std::io::Result<Listener> {
    inherited.set_nonblocking(true)?;
    Ok(Listener(Arc::new(UnixListener::from_std(inherited)?)))
}

impl axum::serve::Listener for Listener {
    type Io = UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.0.accept().await {
                Ok(accepted) => return accepted,
                // Out of descriptors, or the peer has gone again: the next one may fare better.
                Err(error) => {
                    tracing::warn!(%error, "a connection to the API was not accepted");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

/// Who is at the other end, as the kernel says.
#[derive(Debug, Clone, Copy)]
struct Peer(Option<(u32, u32)>);

impl Peer {
    /// The user's name, or the number of one without a name.
    fn name(self) -> String {
        let Some((uid, _)) = self.0 else { return "an unknown user".to_owned() };
        let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
        user.map_or_else(|| format!("uid {uid}"), |user| user.name)
    }
}

impl Connected<IncomingStream<'_, Listener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> Self {
        Peer(stream.io().peer_cred().ok().map(|peer| (peer.uid(), peer.gid())))
    }
}

pub async fn serve(listener: Listener, apps: Apps, access: Access) -> std::io::Result<()> {
    let state = Gate { access, admin_gid: apps.parts().config.admin_gid };
    let router = router(apps)
        .layer(middleware::map_response(as_failure))
        .layer(middleware::from_fn_with_state(state, guard));
    axum::serve(listener, router.into_make_service_with_connect_info::<Peer>()).await
}

#[derive(Clone, Copy)]
struct Gate {
    access: Access,
    admin_gid: u32,
}

/// Lets nobody through whom the socket's own permissions should have stopped, and on `read.sock` nothing but reads.
async fn guard(
    State(gate): State<Gate>,
    ConnectInfo(Peer(peer)): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Result<Response, Failure> {
    let allowed = match (gate.access, peer) {
        (Access::Read, _) => request.method() == Method::GET,
        (Access::Admin, Some((uid, gid))) => may_administer(uid, gid, gate.admin_gid),
        (Access::Admin, None) => false,
    };
    if allowed {
        return Ok(next.run(request).await);
    }
    let who = peer.map_or_else(|| "an unknown user".to_owned(), |(uid, _)| format!("uid {uid}"));
    Err(Failure::new(
        StatusCode::FORBIDDEN,
        "forbidden",
        format!("{who} may not {} {} here", request.method(), request.uri().path()),
        "use admin.sock, as root or as a member of its group",
    ))
}

/// What the framework refuses by itself (a body that is not JSON, a query that does not parse) in the form of every
/// other failure. Its own words are left out: they repeat the body, which may be a secret.
async fn as_failure(response: Response) -> Response {
    let status = response.status();
    let is_json = response.headers().get("content-type").is_some_and(|kind| kind == "application/json");
    if !status.is_client_error() || is_json {
        return response;
    }
    let message = match status {
        StatusCode::PAYLOAD_TOO_LARGE => "the request's body is too large",
        StatusCode::UNSUPPORTED_MEDIA_TYPE => "the request's body must be of the type application/json",
        _ => "the request's path, query or body is not what this request takes",
    };
    Failure::new(status, "bad_request", message, "see the API's documentation").into_response()
}

fn may_administer(uid: u32, gid: u32, admin_gid: u32) -> bool {
    if uid == 0 || gid == admin_gid {
        return true;
    }
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    let group = Group::from_gid(Gid::from_raw(admin_gid)).ok().flatten();
    matches!((user, group), (Some(user), Some(group)) if group.mem.contains(&user.name))
}

fn router(apps: Apps) -> Router {
    Router::new()
        .route("/v1/version", get(system::version))
        .route("/v1/status", get(system::status))
        .route("/v1/doctor", get(system::doctor))
        .route("/v1/events", get(system::events))
        .route("/v1/errors", get(system::errors))
        .route("/v1/apps", get(apps::list))
        .route("/v1/apps/{app}", get(apps::show).delete(apps::destroy))
        .route("/v1/apps/{app}/rollback", post(apps::rollback))
        .route("/v1/apps/{app}/restart", post(apps::restart))
        .route("/v1/apps/{app}/start", post(apps::start))
        .route("/v1/apps/{app}/stop", post(apps::stop))
        .route("/v1/apps/{app}/scale", post(apps::scale))
        .route("/v1/apps/{app}/releases", get(apps::releases))
        .route("/v1/apps/{app}/config", get(settings::config).patch(settings::config_change))
        .route("/v1/apps/{app}/secrets", get(settings::secrets).patch(settings::secrets_change))
        .route("/v1/apps/{app}/logs", get(instances::logs))
        .route("/v1/apps/{app}/exec", post(exec::exec))
        .route("/v1/apps/{app}/run", post(exec::run))
        .route("/v1/apps/{app}/volumes/{volume}", delete(images::volume_remove))
        .route("/v1/instances", get(instances::list))
        .route("/v1/routes", get(routes::list))
        .route("/v1/routes/{target}", get(routes::show).put(routes::say))
        .route("/v1/routes/{target}/release", post(routes::release))
        .route("/v1/routes/{target}/drain", post(routes::drain))
        .route("/v1/routes/{target}/clear", post(routes::clear))
        .route("/v1/balancer", get(balancer::status))
        .route("/v1/balancer/connections", get(balancer::connections))
        .route("/v1/balancer/reload", post(balancer::reload))
        .route("/v1/volumes", get(images::volumes))
        .route("/v1/deploys", get(deploys::list).post(deploys::begin))
        .route("/v1/deploys/{deploy}", get(deploys::show).delete(deploys::cancel))
        .route("/v1/deploys/{deploy}/archive", put(deploys::archive))
        .route("/v1/deploys/{deploy}/watch", get(deploys::watch))
        .route("/v1/images", get(images::list))
        .route("/v1/images/{image}", delete(images::remove))
        .route("/v1/images/{image}/import", post(images::import))
        .route("/v1/images/{image}/bootstrap", post(images::bootstrap))
        .method_not_allowed_fallback(async || {
            let message = "this method is not for this request";
            Failure::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "bad_request",
                message,
                "see the API's documentation",
            )
        })
        .fallback(async || Failure::not_found("there is no such request", "see the API's documentation"))
        .with_state(apps)
}

/// A body of lines of JSON, written as they come.
fn lines<T: serde::Serialize + Send + 'static>(
    receiver: tokio::sync::mpsc::Receiver<T>,
) -> Result<Response, Failure> {
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async move {
        let value = receiver.recv().await?;
        let mut line = match serde_json::to_vec(&value) {
            Ok(line) => line,
            Err(error) => return Some((Err(std::io::Error::other(error)), receiver)),
        };
        line.push(b'\n');
        Some((Ok(bytes::Bytes::from(line)), receiver))
    });
    let body = axum::body::Body::from_stream(stream);
    let built = Response::builder().header("content-type", "application/x-ndjson").body(body);
    built.map_err(|error| Failure::bad_request(error.to_string()))
}
