//! What both ends of the QUIC workloads agree on. TLS uses raw public keys (RFC 7250), which spare the harness certificates.

use std::io::{self, ErrorKind};
use std::net::UdpSocket;
use std::ops::AddAssign;
use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Connection, Endpoint, EndpointConfig, IdleTimeout, ServerConfig, TokioRuntime};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::{default_provider, sign::any_eddsa_type};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{DigitallySignedStruct, PeerIncompatible, SignatureScheme};

use crate::sock::enlarge_udp_buffers;

/// The name that clients ask for, which nobody checks.
pub(crate) const NAME: &str = "backend";

/// The length of a [`Sent`] as the backend reports it.
pub(crate) const REPORT: usize = 24;

/// The shortest datagram that may open a connection (RFC 9000, section 14.1).
const FIRST: usize = 1200;

/// A version that no server has (RFC 9000, section 15).
const UNKNOWN_VERSION: [u8; 4] = [0x1a, 0x2a, 0x3a, 0x4a];

/// What one end of a connection has sent, and what of that it takes for lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Packets.
    pub(crate) packets: u64,
    /// Those that were lost; what they carried was sent again.
    pub(crate) lost: u64,
    /// How often the congestion window was reduced.
    pub(crate) congestion: u64,
}

impl Sent {
    /// By this end of `connection`.
    pub(crate) fn on(connection: &Connection) -> Self {
        let path = connection.stats().path;
        Self { packets: path.sent_packets, lost: path.lost_packets, congestion: path.congestion_events }
    }

    /// As the backend reports it.
    pub(crate) fn to_report(self) -> Vec<u8> {
        [self.packets, self.lost, self.congestion].map(u64::to_le_bytes).concat()
    }

    /// Reads a report of the backend.
    pub(crate) fn from_report(report: &[u8]) -> Option<Self> {
        let report: &[u8; REPORT] = report.try_into().ok()?;
        let (words, []) = report.as_chunks::<8>() else { return None };
        let [packets, lost, congestion] = <&[[u8; 8]; 3]>::try_from(words).ok()?.map(u64::from_le_bytes);
        Some(Self { packets, lost, congestion })
    }
}

impl AddAssign for Sent {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.lost += other.lost;
        self.congestion += other.congestion;
    }
}

/// An endpoint on `socket`, driven by the runtime that the calling thread has entered.
///
/// # Errors
/// Those of setsockopt(2).
pub(crate) fn endpoint(socket: UdpSocket, server: Option<ServerConfig>) -> io::Result<Endpoint> {
    enlarge_udp_buffers(&socket);
    Endpoint::new(EndpointConfig::default(), server, socket, Arc::new(TokioRuntime))
}

/// The backend's configuration, with a new key.
///
/// # Errors
/// There is no randomness, or the libraries do not fit each other.
pub(crate) fn server() -> io::Result<ServerConfig> {
    let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new());
    let key = key.map_err(|error| io::Error::other(format!("no key: {error}")))?;
    let key = any_eddsa_type(&PrivatePkcs8KeyDer::from(key.as_ref())).map_err(io::Error::other)?;
    let public = key.public_key().ok_or_else(|| io::Error::other("a key without its public half"))?;
    let key = CertifiedKey::new(vec![CertificateDer::from(public.to_vec())], key);
    let tls = rustls::ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::new(key))));
    let tls = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
    Ok(ServerConfig::with_crypto(Arc::new(tls)))
}

/// The configuration of clients, whose connections end after `silence`.
///
/// # Errors
/// The libraries do not fit each other.
pub(crate) fn client(silence: IdleTimeout) -> io::Result<ClientConfig> {
    let provider = default_provider();
    let verifier = AnyServer(provider.signature_verification_algorithms);
    let tls = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    let tls = QuicClientConfig::try_from(tls).map_err(io::Error::other)?;
    let mut config = ClientConfig::new(Arc::new(tls));
    let mut transport = quinn::TransportConfig::default();
    transport.max_idle_timeout(Some(silence));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

/// Accepts the key of any server, which still has to sign with it.
#[derive(Debug)]
struct AnyServer(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _key: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _key: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls13RequiredForQuic.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// Waits until a server behind `socket`, which is connected, answers with the versions that it has (RFC 9000, section 6.1).
///
/// # Errors
/// Those of the socket, which may have a timeout, or something else answers.
pub(crate) fn probe(socket: &UdpSocket) -> io::Result<()> {
    let mut packet = [0; FIRST];
    // A long header, the version, and connection ids of eight bytes and none.
    packet[0] = 0xc0;
    packet[1..5].copy_from_slice(&UNKNOWN_VERSION);
    packet[5] = 8;
    socket.send(&packet)?;
    let count = socket.recv(&mut packet)?;
    let versions = count > 7 && packet[0] & 0x80 != 0 && packet[1..5] == [0; 4];
    versions.then_some(()).ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "no QUIC server"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let sent = Sent { packets: 3, lost: u64::MAX, congestion: 7 };
        assert_eq!(Sent::from_report(&sent.to_report()), Some(sent));
        for wrong in [&[][..], &[0; REPORT - 1], &[0; REPORT + 8]] {
            assert_eq!(Sent::from_report(wrong), None);
        }
    }

    #[test]
    fn an_echo_is_no_quic_server() {
        let [echo, client] = [0; 2].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        client.connect(echo.local_addr().unwrap()).unwrap();
        echo.connect(client.local_addr().unwrap()).unwrap();
        echo.send(&[0xc0; FIRST]).unwrap();
        assert_eq!(probe(&client).unwrap_err().kind(), ErrorKind::InvalidData);
    }
}
