//! Configuration files of peers: minimal, with what their manuals recommend for a relay.

use std::fmt::Write as _;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};

use super::{Client, Mapping, PeerError};
use crate::wiring::Protocol;

/// Where distributions install nginx's stream module.
const STREAM_MODULES: [&str; 3] = [
    "/usr/lib/nginx/modules/ngx_stream_module.so",
    "/usr/lib64/nginx/modules/ngx_stream_module.so",
    "/usr/local/lib/nginx/modules/ngx_stream_module.so",
];

/// Finds nginx's stream module.
pub(super) fn nginx_stream_module() -> Result<PathBuf, PeerError> {
    let module = STREAM_MODULES.map(PathBuf::from).into_iter().find(|path| path.exists());
    module.ok_or_else(|| PeerError::Missing("nginx's stream module (libnginx-mod-stream)".into()))
}

pub(super) fn haproxy(mappings: &[Mapping], backend: SocketAddrV4, client: Client) -> String {
    let options = match client {
        Client::Hidden => "",
        Client::Source => " source 0.0.0.0 usesrc client",
        Client::Header => " send-proxy-v2",
    };
    let mut text = String::from(
        "global\n  maxconn 9400\n  maxpipes 500\n\
         defaults\n  mode tcp\n  option splice-auto\n  \
         timeout connect 10s\n  timeout client 1h\n  timeout server 1h\n",
    );
    for Mapping { port, .. } in tcp(mappings) {
        write!(text, "listen port{port}\n  bind 0.0.0.0:{port}\n  server backend {backend}{options}\n").ok();
    }
    text
}

pub(super) fn nginx(
    module: &Path,
    mappings: &[Mapping],
    backend: impl Fn(Protocol) -> SocketAddrV4,
) -> String {
    let mut text = format!(
        "load_module {};\ndaemon off;\npid nginx.pid;\nerror_log stderr;\nworker_processes auto;\n\
         events {{ worker_connections 20000; }}\nstream {{\n  \
         proxy_half_close on;\n",
        module.display()
    );
    for Mapping { protocol, port } in mappings {
        // Without `reuseport`, the workers would receive each other's datagrams.
        let options = if *protocol == Protocol::Tcp { " backlog=16384" } else { " udp reuseport" };
        let backend = backend(*protocol);
        writeln!(text, "  server {{ listen 0.0.0.0:{port}{options}; proxy_pass {backend}; }}").ok();
    }
    text.push_str("}\n");
    text
}

fn tcp(mappings: &[Mapping]) -> impl Iterator<Item = &Mapping> {
    mappings.iter().filter(|mapping| mapping.protocol == Protocol::Tcp)
}
