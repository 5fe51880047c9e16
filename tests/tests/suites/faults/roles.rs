//! Programs that the suite starts from its own executable, because they are killed or run as other users.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::thread;

use nix::libc;
use testkit::backend;
use testkit::netns::Namespace;
use testkit::process::{Process, Stream};
use testkit::role;

/// Starts a program in a namespace, and waits until it is ready.
#[track_caller]
pub(crate) fn start_in(namespace: &Namespace, role: &[&str]) -> Process {
    ready(namespace.spawn(role::command(role)))
}

/// Waits until a program is ready.
#[track_caller]
pub(crate) fn ready(process: Process) -> Process {
    process.wait_for_line(Stream::Stdout, |line| line == "ready");
    process
}

/// Plays a role to its end, if it is one of these.
pub(crate) fn play(role: &[&str]) -> Option<ExitCode> {
    match *role {
        ["echo", address] => echo(address.parse().unwrap()),
        ["silent", address] => silent(address.parse().unwrap()),
        ["pipes"] => pipes(),
        ["without-ipv6", program, ref arguments @ ..] => without_ipv6(program, arguments),
        _ => return None,
    }
    Some(ExitCode::SUCCESS)
}

/// Becomes a program for which the kernel has no IPv6 sockets, as one that was started with `ipv6.disable=1`.
fn without_ipv6(program: &str, arguments: &[&str]) {
    let step =
        |code: u32, k: u32, jt, jf| libc::sock_filter { code: u16::try_from(code).unwrap(), jt, jf, k };
    let load = |offset| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0);
    let unless = |k, skipped| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k, 0, skipped);
    let answer = |k| step(libc::BPF_RET | libc::BPF_K, k, 0, 0);
    // The offsets of `nr` and of the first argument in struct seccomp_data (seccomp(2)).
    let filter = [
        load(0),
        unless(u32::try_from(libc::SYS_socket).unwrap(), 3),
        load(16),
        unless(libc::AF_INET6.unsigned_abs(), 1),
        answer(libc::SECCOMP_RET_ERRNO | libc::EAFNOSUPPORT.unsigned_abs()),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    nix::sys::prctl::set_no_new_privs().unwrap();
    rproxy_sys::seccomp::install(&filter).unwrap();
    let error = Command::new(program).args(arguments).exec();
    panic!("cannot execute {program}: {error}");
}

/// Sends back what each client says.
fn echo(address: SocketAddr) {
    let listener = TcpListener::bind(address).unwrap();
    say_ready();
    for stream in listener.incoming() {
        let stream = stream.unwrap();
        thread::spawn(move || backend::echo(&stream));
    }
}

/// Accepts, and neither reads nor writes.
fn silent(address: SocketAddr) {
    raise_descriptor_limit();
    let listener = TcpListener::bind(address).unwrap();
    say_ready();
    let mut silent = Vec::new();
    for stream in listener.incoming() {
        silent.push(stream.unwrap());
    }
}

/// Takes all the pipe buffers that the user may have, and keeps them.
fn pipes() {
    raise_descriptor_limit();
    let mut all = Vec::new();
    // Over the limit of `fs.pipe-user-pages-soft` a new pipe has two pages (pipe(7)).
    loop {
        let pipe = io::pipe().unwrap();
        let size = nix::fcntl::fcntl(&pipe.0, nix::fcntl::F_GETPIPE_SZ).unwrap();
        all.push(pipe);
        if size < 16 * 4096 {
            break;
        }
    }
    say_ready();
    loop {
        thread::park();
    }
}

fn say_ready() {
    let mut stdout = io::stdout();
    stdout.write_all(b"ready\n").unwrap();
    stdout.flush().unwrap();
}

/// Descriptors up to the hard limit.
pub(crate) fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}
