//! Tells an IPv4 client that its server cannot be reached, as the last router would (RFC 792).
//!
//! The kernel cannot do this: its own ICMP answer to a diverted packet would come from the
//! server's address, which is not this host's, and is never sent. For a client behind a Service the
//! message names the pod, not the Service, and is ignored: it runs into its timeout.
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::sync::OnceLock;

use kernel::marks::Reply;
use socket2::{Domain, Protocol, Socket, Type};

use kernel::checksum;

const DESTINATION_UNREACHABLE: u8 = 3;

/// Sends the ICMP message of `reply` for the SYN with `sequence`. True if there is one and it was sent.
pub(super) fn send(client: SocketAddr, server: SocketAddr, sequence: u32, reply: Reply) -> bool {
    let (SocketAddr::V4(client), SocketAddr::V4(server)) = (client, server) else {
        return false;
    };
    let code = match reply {
        Reply::NetUnreachable => 0,
        Reply::HostUnreachable => 1,
        Reply::Prohibited => 13,
        Reply::Accept | Reply::Reset | Reply::AcceptFlow => return false,
    };
    let to = SocketAddr::new(IpAddr::V4(*client.ip()), 0);
    match socket() {
        Some(socket) => socket
            .send_to(&message(client, server, sequence, code), &to.into())
            .is_ok(),
        None => false,
    }
}

/// One raw socket for the process; none without `CAP_NET_RAW`.
fn socket() -> Option<&'static Socket> {
    static SOCKET: OnceLock<io::Result<Socket>> = OnceLock::new();
    let open = || {
        Socket::new(
            Domain::IPV4,
            Type::RAW.nonblocking(),
            Some(Protocol::ICMPV4),
        )
    };
    SOCKET.get_or_init(open).as_ref().ok()
}

/// The message: type, code and checksum, then the IPv4 header of the SYN and its first 8 bytes.
fn message(client: SocketAddrV4, server: SocketAddrV4, sequence: u32, code: u8) -> [u8; 36] {
    let mut out = [0; 36];
    out[0] = DESTINATION_UNREACHABLE;
    out[1] = code;
    let header = &mut out[8..28];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&40u16.to_be_bytes());
    header[8] = 64;
    header[9] = 6;
    header[12..16].copy_from_slice(&client.ip().octets());
    header[16..20].copy_from_slice(&server.ip().octets());
    let sum = checksum::of(&[header]);
    header[10..12].copy_from_slice(&sum);
    out[28..30].copy_from_slice(&client.port().to_be_bytes());
    out[30..32].copy_from_slice(&server.port().to_be_bytes());
    out[32..36].copy_from_slice(&sequence.to_be_bytes());
    let sum = checksum::of(&[&out]);
    out[2..4].copy_from_slice(&sum);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn icmp_error_quotes_syn_with_valid_checksums() {
        let message = message(
            "10.0.0.1:40000".parse().unwrap(),
            "10.0.0.2:80".parse().unwrap(),
            0x0102_0304,
            1,
        );
        assert_eq!(checksum::of(&[&message]), [0, 0], "all of it");
        assert_eq!(
            checksum::of(&[&message[8..28]]),
            [0, 0],
            "the quoted header"
        );
        assert_eq!(message[..2], [3, 1]);
        assert_eq!(message[20..28], [10, 0, 0, 1, 10, 0, 0, 2]);
        assert_eq!(message[28..], [0x9c, 0x40, 0, 80, 1, 2, 3, 4]);
    }
}
