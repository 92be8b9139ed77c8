//! Configuration and secrets. A change to an app that runs is a deploy; one that does not run yet takes it with its
//! next.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Path, State};
use epagent::manifest::variable::check_variable;
use epagent_store::{ConfigChanges, DeployKind, NewDeploy, SecretChanges, Target, Wanted};
use epagent_wire::api;

use super::apps::find;
use super::deploys::{begin_deploy, shown};
use super::failure::{Failure, Result};
use crate::apps::Apps;
use crate::clock;

pub async fn config(
    State(apps): State<Apps>,
    Path(app): Path<String>,
) -> Result<Json<BTreeMap<String, String>>> {
    let app = find(apps.parts(), &app).await?.app;
    let config = apps.parts().store.config(&app).await?;
    Ok(Json(config.map(|config| config.values).unwrap_or_default()))
}

pub async fn config_change(
    State(apps): State<Apps>,
    Path(app): Path<String>,
    Json(config): Json<ConfigChanges>,
) -> Result<Json<Option<api::Deploy>>> {
    let names: Vec<&String> = config.keys().collect();
    check_names(&names)?;
    let note = format!("configuration: {}", join(&names));
    change(apps, app, config, SecretChanges::new(), note).await
}

pub async fn secrets(State(apps): State<Apps>, Path(app): Path<String>) -> Result<Json<Vec<api::Secret>>> {
    let app = find(apps.parts(), &app).await?.app;
    let secrets = apps.parts().store.secrets(&app).await?.into_iter().map(|secret| api::Secret {
        name: secret.name,
        version: secret.version,
        set_at: clock::rfc3339(secret.set_at_ms),
    });
    Ok(Json(secrets.collect()))
}

pub async fn secrets_change(
    State(apps): State<Apps>,
    Path(app): Path<String>,
    Json(secrets): Json<SecretChanges>,
) -> Result<Json<Option<api::Deploy>>> {
    let names: Vec<&String> = secrets.keys().collect();
    check_names(&names)?;
    let note = format!("secrets: {}", join(&names));
    // Secrets may be set before the first deploy, which may ask for them.
    let name: epagent_core::name::AppName = app.parse()?;
    apps.parts().store.app_ensure(&name, clock::now_ms()).await?;
    change(apps, app, ConfigChanges::new(), secrets, note).await
}

async fn change(
    apps: Apps,
    app: String,
    config: ConfigChanges,
    secrets: SecretChanges,
    note: String,
) -> Result<Json<Option<api::Deploy>>> {
    let store = &apps.parts().store;
    let found = find(apps.parts(), &app).await?;
    let runs = found.wanted == Wanted::Running && store.release_serving(&found.app).await?.is_some();
    if !runs {
        store.config_change(&found.app, &config, clock::now_ms()).await?;
        store.secrets_change(&found.app, &secrets, clock::now_ms()).await?;
        return Ok(Json(None));
    }
    let new = NewDeploy {
        app: found.app,
        kind: DeployKind::Config,
        target: Target::Reconfigure { config, secrets },
        progress: serde_json::Value::Null,
        note,
    };
    let deploy = begin_deploy(&apps, new).await?;
    Ok(Json(Some(shown(apps.parts(), deploy).await?)))
}

fn join(names: &[&String]) -> String {
    names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ")
}

/// The names an environment can hold and that are not the platform's own.
fn check_names(names: &[&String]) -> Result<()> {
    for name in names {
        check_variable(name)
            .map_err(|error| Failure::bad_request(format!("{name:?} can't name a variable: {error}")))?;
    }
    Ok(())
}
