//! What the API answers when it does not do what was asked.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use epagent_core::name::NameError;
use epagent_store::StoreError;
use epagent_wire::api::ApiError;
use epagent_wire::runner::RefusalCode;

use crate::runner::CallError;
use crate::supervise::chain;

/// A status and an [`ApiError`].
#[derive(Debug)]
pub struct Failure {
    pub status: StatusCode,
    pub error: ApiError,
}

pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub fn new(status: StatusCode, code: &str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        let error = ApiError { code: code.to_owned(), message: message.into(), hint: hint.into() };
        Self { status, error }
    }

    pub fn no_app(app: &str) -> Self {
        let hint = "`epagent apps` lists them";
        Self::new(StatusCode::NOT_FOUND, "no_such_app", format!("there is no app {app:?}"), hint)
    }

    pub fn not_found(what: impl Into<String>, hint: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", what, hint)
    }

    pub fn conflict(code: &str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, message, hint)
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", message, "see the table in the API's documentation")
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(self.error)).into_response()
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        match &error {
            StoreError::TooMuch { .. } | StoreError::NulByte { .. } => return Self::bad_request(message),
            StoreError::NoApp(app) => return Self::no_app(app.as_str()),
            StoreError::AppRemoved(_) => {
                return Self::conflict("app_removed", message, "wait until it is gone");
            }
            StoreError::DeployUnderWay { deploy, .. } => {
                let hint = format!(
                    "watch it with `epagent deploy --watch {0}`, or end it with `epagent deploy --cancel {0}`",
                    deploy.0
                );
                return Self::conflict("deploy_under_way", message, hint);
            }
            StoreError::NothingServes(_) | StoreError::NoRelease { .. } => {
                let hint = "`epagent releases APP` lists what can be deployed";
                return Self::conflict("no_release", message, hint);
            }
            _ => {}
        }
        let hint = "see `epagent errors` and the agent's log";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "store_failed", chain(&error), hint)
    }
}

impl From<NameError> for Failure {
    fn from(error: NameError) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_name", error.to_string(), "use a-z, 0-9 and inner hyphens")
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        let message = error.to_string();
        match error {
            CallError::Refused(refusal) => {
                let (status, hint) = match refusal.code {
                    RefusalCode::NotFound => (StatusCode::NOT_FOUND, "list what there is and name one of it"),
                    RefusalCode::Conflict => (StatusCode::CONFLICT, "stop what uses it first"),
                    RefusalCode::NoSpace => {
                        (StatusCode::INSUFFICIENT_STORAGE, "remove releases, images or volumes")
                    }
                    RefusalCode::Exhausted => (StatusCode::SERVICE_UNAVAILABLE, "stop something first"),
                    RefusalCode::BadRequest | RefusalCode::NotYours => {
                        (StatusCode::BAD_REQUEST, "correct the request")
                    }
                    RefusalCode::System => (StatusCode::INTERNAL_SERVER_ERROR, "see the runner's log"),
                };
                Self::new(status, "refused", message, hint)
            }
            CallError::TooLarge => Self::bad_request(message),
            CallError::Away | CallError::TimedOut => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "runner_away",
                message,
                "it is restarted by its supervisor; try again in a moment, then look at its log",
            ),
            CallError::Unexpected => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "runner_confused",
                message,
                "see the runner's log",
            ),
        }
    }
}
