//! Demonstrates everything in one command: a host, a container and an outside neighbour, in temporary
//! namespaces.

mod as_client;
mod http;

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::action::{Action, LinkChange, NetnsRef, VethPair};
use crate::addr::{Cidr, Mac};
use crate::commands::{self, Attach, Command, NetnsChoice, Options, Publish, Transparent, Up};
use crate::error::Error;
use crate::executor::Executor;
use crate::firewall::detect::Choice;
use crate::firewall::tool;
use crate::kernel::Kernel;
use crate::model::{NETNS_DIR, Via};
use crate::name::{IfName, Name};
use crate::netns::Handle;
use crate::{relay, state};
use as_client::AsClient;

/// The host's address on the outside network.
const HOST_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 11);
/// The same over IPv6.
const HOST_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 0x11);
/// The outside neighbour's address.
const OUTSIDE_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 12);
/// The same over IPv6.
const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 0x12);
/// The address of the first container.
const WEB_V4: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 2);

/// Runs the demonstration and writes what happens to `out`.
///
/// # Errors
/// If a step fails or a response is not the expected one. Everything is cleaned up in any case.
pub fn run(firewall: Option<Choice>, rproxy: Option<PathBuf>, out: &mut dyn Write) -> Result<(), Error> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    let options = Options { state_dir: state::DEFAULT_DIR.into(), dry_run: false, firewall, rproxy };
    let (lines, received) = mpsc::channel();
    // A thread with namespaces of its own, which end with it.
    let thread = thread::Builder::new().name("demo".to_owned());
    let play = thread.spawn(move || Demo { options, kernel: Kernel::default(), lines }.play());
    let play = play.map_err(|error| Error::Demo(format!("cannot start a thread: {error}")))?;
    // The demo continues even if nobody reads the output, so that it cleans up.
    let written = received.iter().try_for_each(|line| writeln!(out, "{line}"));
    drop(received);
    match play.join() {
        Ok(result) => result.and(written.map_err(Error::Output)),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

struct Demo {
    options: Options,
    kernel: Kernel,
    lines: Sender<String>,
}

impl Demo {
    fn play(mut self) -> Result<(), Error> {
        own_namespaces().map_err(|error| Error::Demo(format!("cannot make namespaces: {error}")))?;
        let result = self.story();
        self.kernel.forget_signal();
        // Also after a failure, because otherwise a relay would keep running in unreachable namespaces.
        self.title("down: removes everything, and the namespaces with it");
        let down = self.command("down", &Command::Down);
        result.and(down)
    }

    fn say(&self, line: impl Into<String>) {
        // Write errors are ignored: there is nowhere to report them.
        drop(self.lines.send(line.into()));
    }

    /// Whether a firewall is in use.
    fn has_rules(&self) -> bool {
        self.options.firewall != Some(Choice::None)
    }

    fn title(&self, text: &str) {
        self.say(format!("\n== {text}"));
    }

    fn story(&mut self) -> Result<(), Error> {
        self.title("a host at 10.0.0.11 with a neighbour outside at 10.0.0.12");
        let outside = self.outside()?;
        self.title("up: the bridge, forwarding and the rules");
        self.command("up --subnet6 fd00:d0c::/64", &Command::Up(up()?))?;
        self.title("attach: a container, with a web server at its port 80");
        let name = name("web")?;
        let attach = Attach { name: name.clone(), netns: NetnsChoice::New, ip: None, expose: Vec::new() };
        self.command("attach web", &Command::Attach(attach))?;
        let web = handle("web")?;
        http::serve(listen(&web, 80)?, "hello from the container");
        self.title("publish: port 80 of the host, relayed to the container");
        let specs = vec![parse("80:80")?];
        let publish = Publish { name: name.clone(), specs, all_exposed: false, via: Via::Both };
        self.command("publish web -p 80:80", &Command::Publish(publish))?;
        self.show_rules()?;
        self.title("inspect, as docker inspect shows it");
        self.command("inspect web", &Command::Inspect(Some(name)))?;
        self.traffic(&web, &outside)?;
        self.as_client(&outside)
    }

    /// An `rproxy` that the container takes for the neighbour.
    fn as_client(&mut self, outside: &Handle) -> Result<(), Error> {
        if !self.has_rules() {
            self.say("with --firewall none, transparent sockets need marks by rules of your own: not shown");
            return Ok(());
        }
        self.title("transparent up: the container answers the neighbour, and rproxy gets the answers");
        let transparent = Transparent::Up(vec![parse("docker0")?]);
        self.command("transparent up --interface docker0", &Command::Transparent(transparent))?;
        let program = relay::program(self.options.rproxy.as_deref()).ok_or(Error::NoRelay)?;
        self.say(format!("  + {} {}", program.display(), AsClient::ARGS.join(" ")));
        let relay = AsClient::start(&program);
        let _relay =
            relay.map_err(|error| Error::Demo(format!("{} --source client: {error}", program.display())))?;
        self.fetch("outside, as the client", Some(outside), SocketAddr::new(HOST_V4.into(), 8080))
    }

    /// Runs one of our own commands and shows its output.
    fn command(&mut self, text: &str, command: &Command) -> Result<(), Error> {
        self.say(format!("$ netns-setup {text}"));
        let report = commands::run(command, &self.options, &mut self.kernel)?;
        report
            .steps
            .iter()
            .for_each(|step| self.say(format!("  + {}", step.lines().next().unwrap_or_default())));
        report.warnings.iter().for_each(|warning| self.say(format!("warning: {warning}")));
        report.lines.iter().for_each(|line| self.say(line));
        Ok(())
    }

    /// Creates the outside neighbour.
    fn outside(&mut self) -> Result<Handle, Error> {
        let (uplink, lo, eth0): (IfName, _, _) = (parse("uplink0")?, IfName::loopback(), IfName::container());
        let netns = Path::new(NETNS_DIR).join("outside");
        let there = NetnsRef::Container(netns.clone());
        let (host_mac, container_mac) = (Mac::for_container(HOST_V4), Mac::for_container(OUTSIDE_V4));
        let pair = VethPair { host: uplink, host_mac, container_mac, mtu: 1500, netns };
        let up = |place: &NetnsRef, name: &IfName| Action::SetLink {
            place: place.clone(),
            name: *name,
            change: LinkChange::Up(true),
        };
        let address = |place: &NetnsRef, name: &IfName, ip: IpAddr| Action::AddAddress {
            place: place.clone(),
            name: *name,
            address: Cidr { ip, prefix: if ip.is_ipv4() { 24 } else { 64 } },
        };
        let actions = [
            up(&NetnsRef::Host, &lo),
            Action::AddNetns(name("outside")?),
            Action::AddVeth(pair),
            address(&NetnsRef::Host, &uplink, HOST_V4.into()),
            address(&NetnsRef::Host, &uplink, HOST_V6.into()),
            up(&NetnsRef::Host, &uplink),
            address(&there, &eth0, OUTSIDE_V4.into()),
            address(&there, &eth0, OUTSIDE_V6.into()),
            up(&there, &eth0),
            // It has a route to the containers, as an intruder would.
            Action::AddDefaultRoute { place: there, gateway: HOST_V4.into() },
        ];
        for action in &actions {
            self.say(format!("  + {action}"));
            self.kernel.run(action).map_err(|error| Error::Demo(format!("{error} (step: {action})")))?;
        }
        handle("outside")
    }

    fn show_rules(&self) -> Result<(), Error> {
        self.title("the rules, as the tools list them");
        let tools: [(&str, &[&str]); 2] =
            [("nft", &["list", "table", "inet", "netns-setup-docker0"]), ("iptables-save", &[])];
        let listings =
            tools.into_iter().filter_map(|(tool, args)| Some((tool, args, tool::run(tool, args, "").ok()?)));
        let Some((tool, args, listing)) = listings.into_iter().find(|(_, _, listing)| !listing.is_empty())
        else {
            self.say("none: --firewall none");
            return Ok(());
        };
        self.say(format!("$ {tool} {}", args.join(" ")));
        listing.lines().filter(|line| !line.starts_with('#')).for_each(|line| self.say(line));
        Ok(())
    }

    /// Every way in, the way out, and the way that must be blocked.
    fn traffic(&mut self, web: &Handle, outside: &Handle) -> Result<(), Error> {
        self.title("traffic");
        let at = |ip: IpAddr| SocketAddr::new(ip, 80);
        self.fetch("outside, IPv4", Some(outside), at(HOST_V4.into()))?;
        self.fetch("outside, IPv6", Some(outside), at(HOST_V6.into()))?;
        self.fetch("loopback, IPv4", None, at(Ipv4Addr::LOCALHOST.into()))?;
        self.fetch("loopback, IPv6", None, at(Ipv6Addr::LOCALHOST.into()))?;
        self.fetch("hairpin", Some(web), at(HOST_V4.into()))?;
        self.fetch("host to container", None, at(WEB_V4.into()))?;
        http::serve(listen(outside, 8000)?, "hello from outside");
        self.fetch("container to outside", Some(web), SocketAddr::new(OUTSIDE_V4.into(), 8000))?;
        if self.has_rules() {
            self.closed("outside, straight to the container", outside, at(WEB_V4.into()))?;
        } else {
            self.say("with --firewall none, the neighbour could reach the container's address as well: nothing is closed");
        }
        self.go_on()
    }

    /// Ends the demonstration if a signal has arrived.
    fn go_on(&mut self) -> Result<(), Error> {
        self.kernel.interrupted().map_or(Ok(()), |signal| Err(Error::Interrupted(signal)))
    }

    fn fetch(&mut self, what: &str, from: Option<&Handle>, address: SocketAddr) -> Result<(), Error> {
        self.go_on()?;
        let fetched = match from {
            Some(handle) => handle.run(|| http::fetch(address))?,
            None => http::fetch(address),
        };
        let answer = fetched.map_err(|error| Error::Demo(format!("{what}: http://{address}/: {error}")))?;
        self.say(format!("{what:<36} http://{address}/  {answer}"));
        Ok(())
    }

    fn closed(&self, what: &str, from: &Handle, address: SocketAddr) -> Result<(), Error> {
        match from.run(|| http::fetch(address))? {
            Ok(answer) => {
                Err(Error::Demo(format!("{what} should be closed, but http://{address}/ said {answer}")))
            }
            Err(error) => {
                self.say(format!("{what:<36} http://{address}/  closed, as it should be ({error})"));
                Ok(())
            }
        }
    }
}

/// Gives the thread its own network namespace and `/run`.
fn own_namespaces() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))?;
    Ok(())
}

fn up() -> Result<Up, Error> {
    Ok(Up {
        bridge: parse("docker0")?,
        subnet: parse("172.17.0.0/16")?,
        subnet6: Some(parse("fd00:d0c::/64")?),
        disable_ipv6: false,
        mtu: 1500,
        gso_max_size: 524_280,
        persist: false,
        transparent: false,
    })
}

fn name(text: &str) -> Result<Name, Error> {
    parse(text)
}

/// Parses a value that is a literal in this file.
fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, Error> {
    text.parse().map_err(|error| Error::Demo(format!("{text}: {error}")))
}

fn handle(name: &str) -> Result<Handle, Error> {
    Ok(Handle::open_path(&Path::new(NETNS_DIR).join(name))?)
}

/// Listens on every address of a namespace.
fn listen(handle: &Handle, port: u16) -> Result<TcpListener, Error> {
    let listener = handle.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)))?;
    listener.map_err(|error| Error::Demo(format!("cannot listen on port {port}: {error}")))
}
