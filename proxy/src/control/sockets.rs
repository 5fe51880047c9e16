//! Sockets that come with a request: bound by the client, for the mappings that the request adds.

use std::os::fd::OwnedFd;

use super::protocol::{Refusal, RefusalKind, Request};
use crate::bind::activation::InheritedSockets;
use crate::bind::listen::Listener;

/// The listeners that came with `request`. If one of them cannot be used, all are closed.
pub(super) fn adopt(sockets: Vec<OwnedFd>, request: &Request) -> Result<InheritedSockets, Refusal> {
    let is_taken = matches!(request, Request::Add { .. } | Request::Apply { .. });
    if !sockets.is_empty() && !is_taken {
        return Err(socket_refused("only add and apply take sockets".to_owned()));
    }
    let adopt = |(index, socket): (usize, OwnedFd)| {
        Listener::adopt_any(socket)
            .map_err(|error| socket_refused(format!("socket {} of the request: {error}", index + 1)))
    };
    let listeners = sockets.into_iter().enumerate().map(adopt).collect::<Result<_, _>>()?;
    Ok(InheritedSockets::of_request(listeners))
}

fn socket_refused(message: String) -> Refusal {
    Refusal::new(RefusalKind::Socket, message)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn apply() -> Request {
        Request::Apply { mappings: Vec::new(), cut: false }
    }

    #[test]
    fn listeners_are_taken_by_what_adds_mappings() {
        let sockets = || -> Vec<OwnedFd> {
            vec![
                TcpListener::bind("127.0.0.1:0").unwrap().into(),
                UdpSocket::bind("127.0.0.1:0").unwrap().into(),
            ]
        };
        assert!(adopt(sockets(), &apply()).unwrap().first_left().is_some());
        let refusal = adopt(sockets(), &Request::List).unwrap_err();
        assert_eq!(
            (refusal.kind, refusal.message.contains("only add and apply")),
            (RefusalKind::Socket, true)
        );
        assert!(adopt(Vec::new(), &Request::List).unwrap().first_left().is_none());
    }

    #[test]
    fn what_is_no_listener_is_named_by_its_number() {
        let listener = || TcpListener::bind("127.0.0.1:0").unwrap();
        let file: OwnedFd = File::open("/dev/null").unwrap().into();
        let refusal = adopt(vec![listener().into(), file], &apply()).unwrap_err();
        assert!(refusal.message.starts_with("socket 2 of the request: "), "{}", refusal.message);
    }
}
