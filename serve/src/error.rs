//! Errors, with a code for programs and a message for people.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// Why there is no motion. As JSON: `code`, `message`, and `hint` where there is advice.
#[derive(Debug, Clone, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The kind of error.
    pub code: Code,
    /// What was found and what was wanted.
    pub message: String,
    /// What to try.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The seconds after which to try again.
    #[serde(skip)]
    pub retry_after: Option<u64>,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $status:ident;)*) => {
        /// The kinds of error, each with its HTTP status.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
        pub enum Code {
            $($(#[$doc])* #[serde(rename = $text)] $name,)*
        }

        impl Code {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// As answers and metrics have it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The HTTP status it is answered with.
            pub fn status(self) -> StatusCode {
                match self { $(Self::$name => StatusCode::$status,)* }
            }
        }
    };
}

codes! {
    /// The body is not JSON.
    BadJson = "bad_json", BAD_REQUEST;
    /// The body or a header is not what the route takes.
    BadRequest = "bad_request", BAD_REQUEST;
    /// Data sets: the one named is not in the model.
    UnknownUnnormKey = "unknown_unnorm_key", BAD_REQUEST;
    /// Data sets: the model has several and none was named.
    UnnormKeyNeeded = "unnorm_key_needed", BAD_REQUEST;
    /// The instruction does not fit the model.
    InstructionTooLong = "instruction_too_long", BAD_REQUEST;
    /// The server limits how motions change, and cannot tell whose motion this is.
    ClientNeeded = "client_needed", BAD_REQUEST;
    /// The token is missing or wrong.
    Unauthorized = "unauthorized", UNAUTHORIZED;
    /// The token is right, and not for this.
    MissingScope = "missing_scope", FORBIDDEN;
    /// A web page of another origin asks.
    ForbiddenOrigin = "forbidden_origin", FORBIDDEN;
    /// There is no such route.
    NotFound = "not_found", NOT_FOUND;
    /// The route takes another method.
    MethodNotAllowed = "method_not_allowed", METHOD_NOT_ALLOWED;
    /// The body did not come in time.
    RequestTimeout = "request_timeout", REQUEST_TIMEOUT;
    /// The same client sent a newer observation.
    Superseded = "superseded", CONFLICT;
    /// The observation is older than this server takes.
    Stale = "stale", CONFLICT;
    /// The client sent a newer observation before.
    OutOfOrder = "out_of_order", CONFLICT;
    /// The body is too large.
    PayloadTooLarge = "payload_too_large", PAYLOAD_TOO_LARGE;
    /// The body is of a type that the route does not take.
    UnsupportedMediaType = "unsupported_media_type", UNSUPPORTED_MEDIA_TYPE;
    /// The image cannot be used.
    BadImage = "bad_image", UNPROCESSABLE_ENTITY;
    /// The route speaks websocket.
    UpgradeRequired = "upgrade_required", UPGRADE_REQUIRED;
    /// The model computed numbers that are not finite.
    NotFinite = "not_finite", INTERNAL_SERVER_ERROR;
    /// The client asks more often than it may.
    RateLimited = "rate_limited", TOO_MANY_REQUESTS;
    /// Another model is being opened already.
    ReloadRunning = "reload_running", CONFLICT;
    /// The other model cannot be served; what was served is served on.
    ReloadFailed = "reload_failed", UNPROCESSABLE_ENTITY;
    /// The model failed.
    ModelFailed = "model_failed", INTERNAL_SERVER_ERROR;
    /// The queue is full.
    QueueFull = "queue_full", SERVICE_UNAVAILABLE;
    /// The model is not ready yet, or no longer.
    NotReady = "not_ready", SERVICE_UNAVAILABLE;
    /// The emergency stop is set.
    Stopped = "stopped", SERVICE_UNAVAILABLE;
    /// The motion would have been too late.
    DeadlineExceeded = "deadline_exceeded", GATEWAY_TIMEOUT;
}

impl Error {
    /// An error without advice.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, retry_after: None }
    }

    /// Adds advice.
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// Adds the seconds after which to try again.
    pub fn retry_after(self, seconds: u64) -> Self {
        Self { retry_after: Some(seconds), ..self }
    }

    /// The body or a header is not what the route takes.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(Code::BadRequest, message)
    }

    /// The image cannot be used.
    pub fn bad_image(why: impl std::fmt::Display) -> Self {
        Self::new(Code::BadImage, format!("the image cannot be used: {why}"))
    }
}

impl From<openvla::Error> for Error {
    fn from(error: openvla::Error) -> Self {
        let code = match &error {
            openvla::Error::Image { .. } | openvla::Error::Decoder { .. } => Code::BadImage,
            openvla::Error::InstructionTooLong { .. } => Code::InstructionTooLong,
            openvla::Error::UnknownStatistics { .. } => Code::UnknownUnnormKey,
            openvla::Error::AmbiguousStatistics { .. } => Code::UnnormKeyNeeded,
            openvla::Error::Observation { .. } => Code::BadRequest,
            openvla::Error::NotFinite { .. } | openvla::Error::NotFiniteAction { .. } => {
                Code::NotFinite
            }
            _ => Code::ModelFailed,
        };
        Self { hint: error.hint(), ..Self::new(code, error.to_string()) }
    }
}

/// What went wrong, for logs and metrics; an extension of the response.
#[derive(Debug, Clone)]
pub struct Outcome(pub Code);

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let outcome = Outcome(self.code);
        let retry_after = self.retry_after;
        let mut response = (self.code.status(), Json(self)).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if outcome.0 == Code::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if outcome.0 == Code::UpgradeRequired {
            headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        }
        response.extensions_mut().insert(outcome);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_serialize_as_they_read() {
        let names: std::collections::BTreeSet<_> = Code::ALL.iter().map(|c| c.name()).collect();
        assert_eq!(names.len(), Code::ALL.len());
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.name());
            assert!(code.status().is_client_error() || code.status().is_server_error());
        }
    }

    #[test]
    fn the_engines_advice_is_passed_on() {
        let known = vec!["bridge_orig".to_owned()];
        let error: Error = openvla::Error::UnknownStatistics { key: "x".into(), known }.into();
        assert_eq!(error.code, Code::UnknownUnnormKey);
        assert_eq!(error.hint.as_deref(), Some("this model has: bridge_orig"));
    }
}
