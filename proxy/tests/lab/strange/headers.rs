//! IP options and extension headers.
use std::net::IpAddr;

use lab::traffic::craft;

use super::{Case, ICMP, Neighbourhood, add};

const HOP_BY_HOP: u8 = 0;

const ROUTING: u8 = 43;

const FRAGMENT: u8 = 44;

const AUTHENTICATION: u8 = 51;

const DESTINATION: u8 = 60;

pub(crate) fn options(at: &Neighbourhood, all: &mut Vec<Case>) {
    let IpAddr::V4(to) = at.to else { return };
    let [a, b, c, d] = to.octets();
    // Type, length, pointer, one address (RFC 791, 3.1).
    let route = |kind: u8| [kind, 7, 4, a, b, c, d, 0];
    let kinds: [(&str, Vec<u8>); 9] = [
        ("no operation", vec![1; 4]),
        ("end of list", vec![0; 4]),
        ("router alert", vec![148, 4, 0, 0]),
        ("record route", route(7).to_vec()),
        ("loose source route", route(131).to_vec()),
        ("strict source route", route(137).to_vec()),
        ("timestamp", vec![68, 8, 5, 0, 0, 0, 0, 0]),
        ("security", vec![130, 4, 0, 0]),
        (
            "40 bytes of an unknown",
            [&[222, 40][..], &[0; 38]].concat(),
        ),
    ];
    for (option, bytes) in &kinds {
        for (what, protocol, payload) in at.payloads() {
            let to_target = craft::ip_with_options(at.from, at.to, bytes, protocol, &payload);
            add(all, format!("{what} with {option}"), to_target);
            let by_node = craft::ip_with_options(at.from, at.own_node, bytes, protocol, &payload);
            add(
                all,
                format!("{what} to the own node with {option}"),
                by_node,
            );
        }
    }
    for length in [0, 1, 2, 41, 255] {
        let bytes = [131, length, 4, a, b, c, d, 0];
        let packet = craft::ip_with_options(at.from, at.to, &bytes, ICMP, &[8, 0, 0xf7, 0xff]);
        add(all, format!("an option of length {length}"), packet);
    }
}

pub(crate) fn extensions(at: &Neighbourhood, all: &mut Vec<Case>) {
    let IpAddr::V6(to) = at.to else { return };
    for (what, protocol, payload) in at.payloads() {
        let mut wrap = |how: &str, first: u8, headers: &[u8]| {
            let all_of_it = [headers, &payload].concat();
            add(
                all,
                format!("{what} behind {how}"),
                craft::ip(at.from, at.to, first, &all_of_it),
            );
        };
        let padding = [1, 4, 0, 0, 0, 0];
        let options = [&[protocol, 0][..], &padding].concat();
        wrap("hop-by-hop options", HOP_BY_HOP, &options);
        wrap("destination options", DESTINATION, &options);
        wrap(
            "a router alert",
            HOP_BY_HOP,
            &[protocol, 0, 5, 2, 0, 0, 1, 0],
        );
        wrap(
            "a jumbo payload",
            HOP_BY_HOP,
            &[protocol, 0, 0xc2, 4, 0, 1, 0, 0],
        );
        wrap(
            "an unknown option",
            HOP_BY_HOP,
            &[protocol, 0, 0x3e, 4, 0, 0, 0, 0],
        );
        wrap(
            "an atomic fragment header",
            FRAGMENT,
            &[protocol, 0, 0, 0, 0, 0, 0, 7],
        );
        // Length in words of 4 octets less 2, then SPI, sequence number, check value.
        let authentication = [&[protocol, 4, 0, 0][..], &[0; 20]].concat();
        wrap("an authentication header", AUTHENTICATION, &authentication);
        wrap("ESP", 50, &[0, 0, 1, 0, 0, 0, 0, 1]);
        for unknown in [135, 139, 140, 253] {
            wrap(&format!("header {unknown}"), unknown, &options);
        }
        let chain = [&[DESTINATION, 0][..], &padding].concat().repeat(30);
        wrap("31 headers", DESTINATION, &[&chain[..], &options].concat());
        let late = [&[HOP_BY_HOP, 0][..], &padding, &options].concat();
        wrap("hop-by-hop options in second place", DESTINATION, &late);
        for kind in [0, 2, 3, 4, 253] {
            for left in [0, 1] {
                let header = [&[protocol, 2, kind, left, 0, 0, 0, 0][..], &to.octets()].concat();
                wrap(
                    &format!("routing header {kind}, {left} left"),
                    ROUTING,
                    &header,
                );
            }
        }
    }
    for (what, protocol, payload) in at.payloads() {
        for kind in [0, 2, 3, 4, 253] {
            let header = [&[protocol, 2, kind, 1, 0, 0, 0, 0][..], &to.octets()].concat();
            let routed = [&header[..], &payload].concat();
            let packet = craft::ip(at.from, at.own_node, ROUTING, &routed);
            add(
                all,
                format!("{what} by the own node with routing header {kind}"),
                packet,
            );
        }
    }
}
