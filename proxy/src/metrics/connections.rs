//! `GET /api/connections`: live connections and flows, in the JSON of the control protocol.

use http_body_util::{BodyExt, Full};
use hyper::{Response, StatusCode};

use super::response::{Body, of_type, text};
use super::source::Source;
use crate::control::protocol::{Chosen, Refusal, RefusalKind, Request};

/// The parameters of a query.
const PARAMETERS: &str = "mapping, client, id and limit";

/// Answers with the connections and flows that a query (`mapping=web&client=192.0.2.0/24&limit=10`) describes.
pub(super) async fn answer(query: &str, source: &Source) -> Response<Body> {
    let answered = match parse(query) {
        Ok(chosen) => source.call(Request::Connections(chosen)).await,
        Err(error) => Err(Refusal::bad_request(error.to_string())),
    };
    match answered {
        Ok(response) => {
            let json = serde_json::to_vec(&response).expect("a response has no keys but strings");
            of_type("application/json", Full::from(json).boxed_unsync())
        }
        Err(Refusal { kind, message, mapping: _ }) => text(status_of(kind), message + "\n"),
    }
}

/// The status that a refusal has in HTTP.
fn status_of(kind: RefusalKind) -> StatusCode {
    match kind {
        RefusalKind::BadRequest => StatusCode::BAD_REQUEST,
        RefusalKind::UnknownName => StatusCode::NOT_FOUND,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

fn parse(query: &str) -> Result<Chosen, QueryError> {
    let mut chosen = Chosen::default();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let number = |error| QueryError::Number(name.to_string(), error);
        let is_again = match &*name {
            "mapping" => chosen.mapping.replace(value.into_owned()).is_some(),
            "client" => chosen.client.replace(value.into_owned()).is_some(),
            "id" => chosen.id.replace(value.parse().map_err(number)?).is_some(),
            "limit" => chosen.limit.replace(value.parse().map_err(number)?).is_some(),
            _ => return Err(QueryError::Unknown(name.into_owned())),
        };
        if is_again {
            return Err(QueryError::Again(name.into_owned()));
        }
    }
    Ok(chosen)
}

/// Why a query is refused.
#[derive(Debug, thiserror::Error)]
enum QueryError {
    #[error("{0:?} is unknown; there are {PARAMETERS}")]
    Unknown(String),
    #[error("{0:?} is there more than once; write it once")]
    Again(String),
    #[error("{0}: {1}; write a number")]
    Number(String, std::num::ParseIntError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read() {
        assert_eq!(parse("").unwrap(), Chosen::default());
        let chosen =
            parse("mapping=docker%2Ftcp%2F%5B%3A%3A%5D%3A80&client=10.0.0.0/8&id=7&limit=3").unwrap();
        let expected = Chosen {
            mapping: Some("docker/tcp/[::]:80".to_owned()),
            client: Some("10.0.0.0/8".to_owned()),
            id: Some(7),
            limit: Some(3),
            all: false,
        };
        assert_eq!(chosen, expected);
    }

    #[test]
    fn wrong_queries_are_refused_by_name() {
        for (query, expected) in [
            ("mappings=web", r#""mappings" is unknown; there are mapping, client, id and limit"#),
            ("limit=1&limit=1", r#""limit" is there more than once; write it once"#),
            ("limit=-1", "limit: invalid digit found in string; write a number"),
            ("id=", "id: cannot parse integer from empty string; write a number"),
        ] {
            assert_eq!(parse(query).unwrap_err().to_string(), expected);
        }
    }
}
