//! A stand-in for Consul's agent: as much of its HTTP API as a Nomad client needs to register services and checks, and to tell how
//! the checks went. It keeps what it is told, for a case to look at.

use std::collections::BTreeMap;
use std::future::IntoFuture;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::Result;
use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::routing::{get, put};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::jobs::text;

/// Nomad asks for 1.8 or later.
const VERSION: &str = "1.20.0";

/// It answers until it is dropped.
#[derive(Debug)]
pub struct Consul {
    address: SocketAddr,
    told: Shared,
    _end: oneshot::Sender<()>,
}

/// How a check went, as Nomad told it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Update {
    /// `passing`, `warning` or `critical`.
    pub status: String,
    pub output: String,
}

#[derive(Debug, Clone, Default)]
struct Shared(Arc<Mutex<Told>>);

#[derive(Debug, Default)]
struct Told {
    /// Services and checks that are registered now, by id and as they are listed.
    services: BTreeMap<String, Value>,
    checks: BTreeMap<String, Value>,
    /// By the name of the check. They stay when it goes.
    updates: BTreeMap<String, Vec<Update>>,
    unknown: Vec<String>,
}

type Answer = Result<String, (StatusCode, String)>;

impl Consul {
    /// On a thread of its own, as cases wait for programs without giving theirs away.
    pub fn start() -> Result<Consul> {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let told = Shared::default();
        let routes = routes(told.clone());
        let (end, ended) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::spawn(move || {
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener)?;
                tokio::select! {
                    served = axum::serve(listener, routes).into_future() => served,
                    _ = ended => Ok(()),
                }
            })
        });
        Ok(Consul {
            address,
            told,
            _end: end,
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Names of the services that are registered now.
    pub fn services(&self) -> Vec<String> {
        let told = self.told.lock();
        let services = told.services.values();
        services.map(|service| text(&service["Service"])).collect()
    }

    /// Names of the checks that are registered now, and the status of each.
    pub fn checks(&self) -> BTreeMap<String, String> {
        let told = self.told.lock();
        let checks = told.checks.values();
        checks
            .map(|check| (text(&check["Name"]), text(&check["Status"])))
            .collect()
    }

    /// All that was told of the check of a name, oldest first.
    pub fn updates(&self, name: &str) -> Vec<Update> {
        let told = self.told.lock();
        told.updates.get(name).cloned().unwrap_or_default()
    }

    /// Requests that were answered with 404, in order.
    pub fn unknown(&self) -> Vec<String> {
        self.told.lock().unknown.clone()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Told> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn routes(told: Shared) -> Router {
    Router::new()
        .route("/v1/agent/self", get(about))
        .route("/v1/status/leader", get(async || "\"127.0.0.1:8300\""))
        .route("/v1/agent/services", get(services))
        .route("/v1/agent/checks", get(checks))
        .route("/v1/agent/service/register", put(register_service))
        .route("/v1/agent/service/deregister/{id}", put(deregister_service))
        .route("/v1/agent/check/register", put(register_check))
        .route("/v1/agent/check/deregister/{id}", put(deregister_check))
        .route("/v1/agent/check/update/{id}", put(update_check))
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .with_state(told)
}

async fn about() -> String {
    let config = json!({
        "Datacenter": "dc1",
        "NodeName": "stand-in",
        "Server": true,
        "Revision": "",
        "Version": VERSION,
    });
    json!({"Config": config, "DebugConfig": {}, "Member": {}, "Meta": {}, "Stats": {}}).to_string()
}

async fn services(State(told): State<Shared>) -> String {
    json!(told.lock().services).to_string()
}

async fn checks(State(told): State<Shared>) -> String {
    json!(told.lock().checks).to_string()
}

async fn register_service(State(told): State<Shared>, body: String) -> Answer {
    let mut service = parsed(&body)?;
    let name = service["Name"].take();
    let id = match text(&service["ID"]) {
        id if id.is_empty() => text(&name),
        id => id,
    };
    // Listed under another key than it is registered with.
    service["Service"] = name;
    told.lock().services.insert(id, service);
    Ok(String::new())
}

async fn deregister_service(State(told): State<Shared>, Path(id): Path<String>) -> Answer {
    let mut told = told.lock();
    told.services
        .remove(&id)
        .ok_or_else(|| not_found("service", &id))?;
    told.checks
        .retain(|_, check| text(&check["ServiceID"]) != id);
    Ok(String::new())
}

async fn register_check(State(told): State<Shared>, body: String) -> Answer {
    let mut check = parsed(&body)?;
    let id = text(&check["ID"]);
    check["CheckID"] = check["ID"].take();
    if text(&check["Status"]).is_empty() {
        check["Status"] = json!("critical");
    }
    let mut told = told.lock();
    // Registered once more it is what it was.
    if let Some(known) = told.checks.get(&id) {
        check["Status"] = known["Status"].clone();
    }
    told.checks.insert(id, check);
    Ok(String::new())
}

async fn deregister_check(State(told): State<Shared>, Path(id): Path<String>) -> Answer {
    let removed = told.lock().checks.remove(&id);
    removed.ok_or_else(|| not_found("check", &id))?;
    Ok(String::new())
}

async fn update_check(State(told): State<Shared>, Path(id): Path<String>, body: String) -> Answer {
    let update: Update = serde_json::from_str(&body)
        .map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))?;
    let mut told = told.lock();
    let check = told
        .checks
        .get_mut(&id)
        .ok_or_else(|| not_found("check", &id))?;
    check["Status"] = json!(update.status);
    check["Output"] = json!(update.output);
    let name = text(&check["Name"]);
    told.updates.entry(name).or_default().push(update);
    Ok(String::new())
}

/// Namespaces, partitions and peerings among them, as with an edition that has none.
async fn unknown(State(told): State<Shared>, request: Request) -> StatusCode {
    let line = format!("{} {}", request.method(), request.uri());
    told.lock().unknown.push(line);
    StatusCode::NOT_FOUND
}

fn parsed(body: &str) -> Result<Value, (StatusCode, String)> {
    serde_json::from_str(body).map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))
}

fn not_found(what: &str, id: &str) -> (StatusCode, String) {
    let sentence = format!("Unknown {what} ID {id:?}");
    (StatusCode::NOT_FOUND, sentence)
}

#[cfg(test)]
mod tests {
    use super::super::http::Api;
    use super::*;

    #[tokio::test]
    async fn what_it_is_told_is_listed_and_kept() -> Result<()> {
        let consul = Consul::start()?;
        let api = Api {
            port: consul.address().port(),
        };
        let tell = async |path: &str, body: Value| api.text("PUT", path, Some(&body)).await;
        let version = &api.get("/v1/agent/self").await?["Config"]["Version"];
        assert_eq!(version, VERSION);

        tell(
            "/v1/agent/service/register",
            json!({"ID": "a-1", "Name": "a"}),
        )
        .await?;
        let check = json!({"ID": "c-1", "Name": "c", "ServiceID": "a-1", "TTL": "10s"});
        tell("/v1/agent/check/register", check.clone()).await?;
        assert_eq!(
            api.get("/v1/agent/services").await?["a-1"]["Service"],
            json!("a")
        );
        let status = |text: &str| BTreeMap::from([("c".to_owned(), text.to_owned())]);
        assert_eq!(consul.checks(), status("critical"));

        let update = json!({"Status": "passing", "Output": "fine"});
        tell("/v1/agent/check/update/c-1", update.clone()).await?;
        tell("/v1/agent/check/register", check).await?;
        assert_eq!(consul.checks(), status("passing"));
        assert!(tell("/v1/agent/check/update/c-2", update).await.is_err());

        tell("/v1/agent/service/deregister/a-1", Value::Null).await?;
        assert!(consul.checks().is_empty() && consul.services().is_empty());
        let told = consul.updates("c");
        assert_eq!(told.len(), 1);
        assert_eq!(
            (told[0].status.as_str(), told[0].output.as_str()),
            ("passing", "fine")
        );

        assert!(api.get("/v1/namespaces").await.is_err());
        assert_eq!(consul.unknown(), ["GET /v1/namespaces"]);
        Ok(())
    }
}
