//! Moves connections in a handover: the old daemon exports them, the new daemon imports them.
//!
//! The new daemon evaluates each connection again; it trusts the old one only for the pods of a connection.
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use controller::Decision;
use policy::{Decided, DecidedSide, Endpoint, Identity, PodKey, Protocol};

use crate::enforcer::Enforcer;
use crate::tcp::connections::{Adopted, Connection, ConnectionKey, Legs, StageName};
use crate::tcp::relay::{InFlight, Left};
use crate::telemetry::decision::DataPath;
use crate::telemetry::moved::Moved;
use crate::telemetry::record::Outcome;
use crate::telemetry::timeline::Timeline;

use super::{ConnectionState, HandoverConnection, Outgoing, Pod};

/// The worker of a leg that the control thread watches until a worker wants it.
const CONTROL: usize = usize::MAX;

/// A connection whose relay is to be resumed.
pub(crate) struct Relayed {
    pub(crate) flow: Arc<Connection>,
    pub(crate) client: TcpStream,
    pub(crate) server: TcpStream,
    pub(crate) in_flight: [Left; 2],
}

/// Hands over a connection whose relay has been stopped, if a handover is under way; from then on it is not
/// this daemon's. False: it has been reset.
pub(crate) fn leave(
    enforcer: &Enforcer,
    outgoing: &Outgoing,
    flow: &Arc<Connection>,
    legs: Arc<Legs>,
    in_flight: InFlight,
) -> bool {
    if !enforcer.draining.has_begun() || flow.severance().is_some() {
        return false;
    }
    // Otherwise another task is about to close it.
    let Some(Legs { server, client }) = Arc::into_inner(legs) else {
        return false;
    };
    let unwatched = |leg: tokio::net::TcpStream| leg.into_std().map(OwnedFd::from);
    match (unwatched(server), unwatched(client)) {
        (Ok(server), Ok(client)) => {
            let sockets = (server, Some(client));
            enter(enforcer, outgoing, flow, sockets, in_flight.left());
            true
        }
        _ => false,
    }
}

/// Hands over the connections that wait for their client's handshake; no worker may run any more.
pub(crate) fn leave_admitted(enforcer: &Enforcer, outgoing: &Outgoing) {
    for flow in enforcer.connections.all() {
        let Some((flow, upstream)) = enforcer.connections.pair(&flow.key) else {
            continue;
        };
        // Else the listener resets its client.
        if let Ok(server) = upstream.stream.into_std() {
            let sockets = (server.into(), None);
            enter(enforcer, outgoing, &flow, sockets, Default::default());
        }
    }
}

/// Records the end of all other connections, whose sockets were reset with their worker; no worker may run any more.
/// Returns how many were live.
pub(crate) fn end_others(enforcer: &Enforcer) -> usize {
    let live = |flow: &Arc<Connection>| flow.stage_name() == StageName::Live;
    let others = enforcer.connections.all().into_iter().filter(live);
    others
        .map(|flow| enforcer.ended(&flow, Outcome::Stopped))
        .count()
}

fn enter(
    enforcer: &Enforcer,
    outgoing: &Outgoing,
    flow: &Arc<Connection>,
    (server, client): (OwnedFd, Option<OwnedFd>),
    in_flight: [Left; 2],
) {
    let decision = flow.decision();
    let pods = match &decision {
        Some(decision) => [&decision.from, &decision.to].map(|pod| pod.as_deref().map(named)),
        None => [None, None],
    };
    let subject = flow.subject();
    let state = ConnectionState {
        client: flow.key.client,
        server: flow.key.server,
        sequence: flow.sequence,
        opened: flow.opened,
        age: flow.started.elapsed(),
        moved: [subject.sent, subject.received],
        pods,
        seen: subject.seen,
    };
    outgoing.connection(HandoverConnection {
        state,
        server,
        client,
        in_flight,
    });
    enforcer.connections.remove(flow);
}

fn named(pod: &Endpoint) -> Pod {
    let Identity { key, uid, .. } = &*pod.identity;
    Pod {
        namespace: key.namespace.to_string(),
        name: key.name.to_string(),
        uid: uid.to_string(),
    }
}

/// Enters the connections of another daemon, before the first packet arrives at this one, and ends those
/// that are denied. Call within a tokio runtime. Returns the connections to resume.
pub(crate) fn adopt(enforcer: &Enforcer, left: Vec<HandoverConnection>) -> Vec<Relayed> {
    let adopted = left.into_iter().filter_map(|connection| {
        let ends = [connection.state.client, connection.state.server];
        // A live stream is not reset because shares have changed.
        let [client, server] = ends.map(|end| enforcer.party(end.ip()));
        let permit = enforcer.limits.take_over(client, server);
        let HandoverConnection {
            state,
            server,
            client,
            in_flight,
        } = connection;
        let pods = state.pods.clone();
        let flow = enforcer.connections.adopt(adopted(state), permit);
        enforcer.metrics.taken_over();
        let server = TcpStream::from(server);
        let relayed = match client {
            Some(client) => Some(Relayed {
                flow: Arc::clone(&flow),
                client: client.into(),
                server,
                in_flight,
            }),
            None => {
                wait_for_client(enforcer, &flow, server);
                None
            }
        };
        evaluate(enforcer, &flow, pods);
        relayed
    });
    adopted.collect()
}

/// Goes on waiting for the client of a connection to complete its handshake.
fn wait_for_client(enforcer: &Enforcer, flow: &Arc<Connection>, server: TcpStream) {
    let admitted = tokio::net::TcpStream::from_std(server)
        .is_ok_and(|server| enforcer.connections.admit(flow, server, CONTROL));
    if !admitted || enforcer.opens(flow).is_err() {
        enforcer.connections.remove(flow);
    }
}

fn adopted(state: ConnectionState) -> Adopted {
    let now = Instant::now();
    let started = now.checked_sub(state.age).unwrap_or(now);
    Adopted {
        key: ConnectionKey {
            client: state.client,
            server: state.server,
        },
        sequence: state.sequence,
        opened: state.opened,
        started,
        moved: Moved::resumed(state.moved),
        timeline: state.seen.map(|seen| Timeline::resumed(started, seen)),
    }
}

/// Evaluates a connection by this daemon's policy table, and severs it if it is denied or its pod has changed.
fn evaluate(enforcer: &Enforcer, flow: &Arc<Connection>, pods: [Option<Pod>; 2]) {
    let ConnectionKey { client, server } = flow.key;
    let port = Some(server.port());
    let decide = || {
        let table = &enforcer.table;
        table.decide(client.ip(), server.ip(), port, Protocol::Tcp)
    };
    let was = let_in_between(pods);
    if let Some(severance) = was.overturned(client.ip(), server.ip(), &decide()) {
        flow.decide(Arc::new(was));
        enforcer
            .metrics
            .severed(&severance.decision, DataPath::Spliced);
        enforcer.connections.sever(flow, severance);
        return;
    }
    flow.decide(Arc::new(decide().unwrap_or(was)));
}

/// The known part of the decision by which the old daemon allowed a connection.
fn let_in_between(pods: [Option<Pod>; 2]) -> Decision {
    let [from, to] = pods.map(|pod| {
        let pod = pod?;
        Some(Arc::new(Endpoint::bare(Identity {
            key: PodKey {
                namespace: pod.namespace.into(),
                name: pod.name.into(),
            },
            uid: pod.uid.into(),
            node_name: "".into(),
            node: None,
        })))
    });
    let allowed = DecidedSide {
        allowed: true,
        ..DecidedSide::default()
    };
    let verdict = Decided::of(allowed, allowed);
    Decision { verdict, from, to }
}
