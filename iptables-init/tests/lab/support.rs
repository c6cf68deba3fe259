//! Namespaces with the redirect, and what is in them.
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use clap::Parser;
use iptables_init::settings::Settings;
use kernel::bridge_addresses::{End, Owners};
use kernel::bridges::{Bridge, Port, ports_script};
use kernel::sets::{Groups, Sets};
use lab::traffic::UdpOutcome;
use lab::{Cluster, Host, Netns, Outcome, PodSpec};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sendto, socket,
};

pub(crate) const INIT: &str = env!("CARGO_BIN_EXE_iptables-init");

/// Longer than a round trip in the lab by far, shorter than a SYN's first retransmit.
pub(crate) const SOON: Duration = Duration::from_millis(500);

/// Where conntrack counts already, so that there is nothing to be noted in the table: a note is lost
/// with the table.
pub(crate) fn counting_namespace() -> Netns {
    let netns = namespace();
    sh(&netns, "sysctl -qw net.netfilter.nf_conntrack_acct=1");
    netns
}

#[derive(Parser)]
pub(crate) struct Line {
    #[command(flatten)]
    pub(crate) settings: Settings,
}

/// A node with two pods that nobody policed yet, and the redirect on it.
pub(crate) struct Lab {
    pub(crate) _cluster: Cluster,
    pub(crate) node: Host,
    pub(crate) a: Host,
    pub(crate) b: Host,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum NonIsolated {
    Nobody,
    Both,
}

impl Lab {
    pub(crate) fn new(install: &str, non_isolated: NonIsolated) -> Self {
        let cluster = Cluster::builder()
            .nodes(1)
            .pod(PodSpec::new("x", "a").node(0))
            .pod(PodSpec::new("x", "b").node(0))
            .build()
            .unwrap();
        let (node, a, b) = (cluster.node(0), cluster.pod("x/a"), cluster.pod("x/b"));
        b.serve(&[80]).unwrap();
        b.serve_udp(&[90]).unwrap();
        init(node.netns(), install).ok();
        let pods: Vec<IpAddr> = a.addresses().into_iter().chain(b.addresses()).collect();
        let mut sets = Sets::default();
        sets.pods
            .extend(pods.iter().map(|pod| ipnet::IpNet::from(*pod)));
        sets.selves.extend(&pods);
        if non_isolated == NonIsolated::Both {
            sets.egress_non_isolated.extend(&pods);
            sets.ingress_non_isolated.extend(&pods);
        }
        load(node.netns(), &sets.replace_script());
        Self {
            _cluster: cluster,
            node,
            a,
            b,
        }
    }

    /// What becomes of a connection and of a datagram, in both families.
    pub(crate) fn a_to_b(&self) -> Vec<(Outcome, UdpOutcome)> {
        let ask = |address| {
            let tcp = self.a.connect(SocketAddr::new(address, 80), SOON).unwrap();
            (
                tcp,
                self.a
                    .ask_udp(SocketAddr::new(address, 90), b"?", SOON)
                    .unwrap(),
            )
        };
        self.b.addresses().into_iter().map(ask).collect()
    }

    /// How many packets wait in queues 31 and 32.
    pub(crate) fn waiting(&self) -> u32 {
        let read = || fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue");
        let queues = self.node.netns().run(read).unwrap().unwrap();
        let rows = queues
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.filter(|row| ["31", "32"].contains(&row[0]))
            .map(|row| row[2].parse::<u32>().unwrap())
            .sum()
    }
}

/// Takes packets of an NFQUEUE and never answers (linux/netfilter/nfnetlink_queue.h).
pub(crate) fn queue(number: u16) -> OwnedFd {
    let protocol = SockProtocol::NetlinkNetFilter;
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )
    .unwrap();
    let bind = [&[8, 0, 1, 0], &[1, 0, 0, 0][..]].concat();
    let whole_packets = [&[9, 0, 2, 0], &[0, 0, 0xff, 0xff, 2, 0, 0, 0][..]].concat();
    for attribute in [bind, whole_packets] {
        let length = u32::try_from(20 + attribute.len()).unwrap();
        let message = [
            &length.to_ne_bytes()[..],
            &(3 << 8 | 2_u16).to_ne_bytes(),
            &1_u16.to_ne_bytes(),
            &[0; 8],
            &[0, 0],
            &number.to_be_bytes(),
            &attribute,
        ];
        sendto(
            fd.as_raw_fd(),
            &message.concat(),
            &NetlinkAddr::new(0, 0),
            MsgFlags::empty(),
        )
        .unwrap();
    }
    fd
}

/// A namespace that forwards, as a node's does.
pub(crate) fn namespace() -> Netns {
    let netns = Netns::new().unwrap();
    sh(
        &netns,
        "ip link set lo up; sysctl -qw net.ipv4.ip_forward=1",
    );
    netns
}

pub(crate) fn some_sets() -> Sets {
    let addresses = |list: &[&str]| list.iter().map(|text| address(text)).collect();
    Sets {
        pods: [
            "10.1.0.0/16",
            "10.1.2.0/24",
            "10.3.0.0/24",
            "10.3.1.0/24",
            "10.3.2.0/24",
            "fd00:1::/64",
        ]
        .map(|net| net.parse().unwrap())
        .into(),
        cluster: ["10.0.0.0/8", "fd00::/16"]
            .map(|net| net.parse().unwrap())
            .into(),
        egress_non_isolated: addresses(&["10.1.2.3", "10.1.2.4", "fd00:1::3"]),
        ingress_non_isolated: addresses(&["10.1.2.3", "fd00:1::4"]),
        selves: addresses(&["10.1.2.3", "fd00:1::3"]),
        own_node_judged: true,
        bridged: Some(Groups::Pass),
    }
}

/// The script that fills every set that is kept when the layout changes.
pub(crate) fn all_sets() -> String {
    let bridge = Bridge {
        name: "cni0".into(),
        address: "0a:58:0a:f4:00:01".into(),
        addresses: ["10.3.0.1", "fd00:1::1"].map(address).into(),
        ports: ["pod0", "ip", "3"]
            .map(|name| Port {
                name: name.into(),
                index: 1,
                address: "0a:58:0a:f4:00:01".into(),
                peer: None,
            })
            .into(),
        looks_into_ip: false,
        learns_unseen: false,
    };
    let ends = ["pod0", "ip", "3"]
        .into_iter()
        .zip(5..)
        .map(|(port, n)| End {
            port: port.into(),
            link: [2, 0, 0, 0, 0, n],
            addresses: vec![
                address(&format!("10.3.0.{n}")),
                address(&format!("fd00:1::{n}")),
            ],
        });
    let bridges = [bridge];
    let owners = Owners::default().now(&bridges, &ends.collect::<Vec<_>>());
    some_sets().replace_script() + &ports_script(&bridges) + &owners.script()
}

pub(crate) fn load(netns: &Netns, script: &str) {
    netns.run(|| kernel::sets::load(script)).unwrap().unwrap();
}

pub(crate) fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The lines in order: chains that were made at another time are listed elsewhere.
pub(crate) fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<_> = text.lines().map(str::trim).collect();
    lines.sort_unstable();
    lines
}

pub(crate) fn init(netns: &Netns, arguments: &str) -> Ran {
    let mut command = netns.command(INIT);
    command.args(arguments.split_whitespace());
    Ran::from(command)
}

pub(crate) fn sh(netns: &Netns, script: &str) -> String {
    let programs = Path::new(INIT).parent().unwrap().display();
    let mut command = netns.command("sh");
    command.args(["-ec", &format!("PATH=$PATH:{programs}; {script}")]);
    Ran::from(command).ok()
}

/// How a program ended and what it said.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) success: bool,
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<lab::Command> for Ran {
    fn from(command: lab::Command) -> Self {
        let output = command.output().unwrap();
        Self {
            success: output.status.success(),
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    /// Its standard output.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert!(self.success, "{}{}", self.stdout, self.stderr);
        self.stdout
    }
}
