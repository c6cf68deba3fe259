//! The handover protocol. Messages are JSON; the bytes that were in flight follow
//! their connection as they are; pipes come with the connection as descriptors.
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::channel::{Channel, Heard, LONGEST};
use super::{ConnectionState, HandoverConnection, HandoverError, State, WorkerSockets};
use crate::tcp::relay::{Left, Unread};

/// Bytes that a direction can have in flight outside of a pipe, at most: more than a full buffer, so that buffers can
/// grow later.
const MOST_IN_FLIGHT: usize = 4 << 20;

/// The running daemon's answer to [`super::Hello`]. Every version understands this message.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Reply {
    pub(super) format: u32,
    /// The reason if the handover is rejected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) refused: Option<String>,
    /// The running daemon's pod, if it came after the other's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) newer: Option<String>,
    /// The redirect settings of the running daemon; empty if unknown.
    #[serde(default)]
    pub(super) settings: String,
}

/// A part of the state, or its end.
#[derive(Debug, Serialize, Deserialize)]
enum Part {
    /// With a queue of this number, and a listener if there is a proxy.
    Worker { queue: u16 },
    /// With the socket to the server, the one to the client if there is one, and the pipes. The bytes follow, one
    /// direction after the other.
    Connection {
        state: Box<ConnectionState>,
        client: bool,
        in_flight: [Load; 2],
    },
    /// That was all.
    End { connections: usize },
}

/// The bytes in flight in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Load {
    /// Bytes in the messages that follow.
    bytes: usize,
    /// Bytes in a pipe; 0 if there is none.
    piped: usize,
}

/// The new daemon has received everything, and begins.
#[derive(Debug, Serialize, Deserialize)]
struct Begun {
    connections: usize,
}

impl Channel {
    /// Sends a message without descriptors.
    pub(super) fn say(&self, message: &impl Serialize) -> Result<(), HandoverError> {
        self.send(&encoded(message)?, &[])
    }

    /// Receives a message without descriptors.
    pub(super) fn hear<T: DeserializeOwned>(&mut self) -> Result<T, HandoverError> {
        decoded(self.receive()?.message)
    }

    /// Confirms that this daemon resumes this many connections.
    pub(super) fn say_begun(&self, connections: usize) -> Result<(), HandoverError> {
        self.say(&Begun { connections })
    }

    /// Hands over the queues, and connections in their order until the time for `connections` is over. Then waits until
    /// the other end says that it has `begun`. Returns how many connections were handed over.
    ///
    /// # Errors
    /// Why the new daemon does not start; it will not start later either.
    pub(super) fn give(
        &mut self,
        state: &State,
        [connections, begun]: [Duration; 2],
    ) -> Result<usize, HandoverError> {
        let given = self.give_all(state, connections)?;
        self.wait(begun);
        let begun = self.hear::<Begun>().or_else(|error| {
            // The message may have arrived at the last moment. After this none can arrive.
            self.break_off();
            self.hear().map_err(|_| error)
        });
        begun.map(|Begun { .. }| given)
    }

    fn give_all(&self, state: &State, within: Duration) -> Result<usize, HandoverError> {
        for (queue, sockets) in &state.workers {
            let part = encoded(&Part::Worker { queue: *queue })?;
            let listener = sockets.listener.as_ref().map(AsFd::as_fd);
            let descriptors: Vec<_> = [sockets.queue.as_fd()]
                .into_iter()
                .chain(listener)
                .collect();
            self.send(&part, &descriptors)?;
        }
        let until = Instant::now() + within;
        let mut connections = 0;
        for connection in &state.connections {
            if Instant::now() >= until {
                break;
            }
            self.give_connection(connection)?;
            connections += 1;
        }
        self.say(&Part::End { connections })?;
        Ok(connections)
    }

    fn give_connection(&self, connection: &HandoverConnection) -> Result<(), HandoverError> {
        let HandoverConnection {
            state,
            server,
            client,
            in_flight,
        } = connection;
        let part = encoded(&Part::Connection {
            state: Box::new(state.clone()),
            client: client.is_some(),
            in_flight: in_flight.each_ref().map(|left| Load {
                bytes: left.bytes.len(),
                piped: left.pipe.as_ref().map_or(0, |pipe| pipe.bytes),
            }),
        })?;
        let pipes = in_flight.iter().filter_map(|left| left.pipe.as_ref());
        let sockets: Vec<_> = [server]
            .into_iter()
            .chain(client)
            .chain(pipes.map(|pipe| &pipe.read))
            .map(AsFd::as_fd)
            .collect();
        self.send(&part, &sockets)?;
        let mut chunks = in_flight.iter().flat_map(|left| left.bytes.chunks(LONGEST));
        chunks.try_for_each(|chunk| self.send(chunk, &[]))
    }

    /// Receives everything into `state`, piece by piece. Leaves out a connection if this process has no room for its
    /// descriptors.
    pub(super) fn take(&mut self, state: &mut State) -> Result<(), HandoverError> {
        let mut connections_read = 0;
        loop {
            let Heard {
                message,
                descriptors,
                whole,
            } = self.receive()?;
            match decoded(message)? {
                Part::Worker { queue } => {
                    let mut descriptors = descriptors.into_iter();
                    let (Some(socket), listener, None) =
                        (descriptors.next(), descriptors.next(), descriptors.next())
                    else {
                        return Err(wrong_descriptors());
                    };
                    let sockets = WorkerSockets {
                        queue: socket,
                        listener,
                    };
                    state.workers.insert(queue, sockets);
                }
                Part::Connection {
                    state: own,
                    client,
                    in_flight,
                } => {
                    connections_read += 1;
                    let bytes = [
                        self.bytes(in_flight[0].bytes)?,
                        self.bytes(in_flight[1].bytes)?,
                    ];
                    if whole {
                        let piped = in_flight.map(|load| load.piped);
                        let connection = connection(*own, client, descriptors, bytes, piped)?;
                        state.connections.push(connection);
                    }
                }
                Part::End { connections } if connections == connections_read => {
                    let lost = connections - state.connections.len();
                    if lost > 0 {
                        warn!(
                            lost,
                            "not enough descriptors for all connections of the old daemon: those without are reset; raise the limit (RLIMIT_NOFILE)"
                        );
                    }
                    return Ok(());
                }
                Part::End { .. } => return Err(malformed("connections are missing")),
            }
        }
    }

    fn bytes(&mut self, length: usize) -> Result<Vec<u8>, HandoverError> {
        if length > MOST_IN_FLIGHT {
            return Err(malformed("more bytes in flight than there can be"));
        }
        let mut bytes = Vec::new();
        while bytes.len() < length {
            bytes.extend_from_slice(self.receive()?.message);
        }
        if bytes.len() == length {
            Ok(bytes)
        } else {
            Err(malformed("more bytes in flight than announced"))
        }
    }
}

/// Rebuilds a connection from its parts.
fn connection(
    state: ConnectionState,
    client: bool,
    descriptors: Vec<OwnedFd>,
    bytes: [Vec<u8>; 2],
    piped: [usize; 2],
) -> Result<HandoverConnection, HandoverError> {
    let mut descriptors = descriptors.into_iter();
    let mut next = || {
        let descriptor = descriptors.next();
        descriptor.ok_or_else(|| malformed("a connection with too few descriptors"))
    };
    let server = next()?;
    let client = client.then(&mut next).transpose()?;
    let mut pipe = |bytes| {
        let read = (bytes > 0).then(&mut next).transpose()?;
        Ok::<_, HandoverError>(read.map(|read| Unread { read, bytes }))
    };
    let [up, down] = bytes;
    let in_flight = [
        Left {
            bytes: up,
            pipe: pipe(piped[0])?,
        },
        Left {
            bytes: down,
            pipe: pipe(piped[1])?,
        },
    ];
    match descriptors.next() {
        None => Ok(HandoverConnection {
            state,
            server,
            client,
            in_flight,
        }),
        Some(_) => Err(malformed("a connection with too many descriptors")),
    }
}

fn encoded(message: &impl Serialize) -> Result<Vec<u8>, HandoverError> {
    serde_json::to_vec(message).map_err(|error| malformed(&error.to_string()))
}

fn decoded<T: DeserializeOwned>(message: &[u8]) -> Result<T, HandoverError> {
    serde_json::from_slice(message).map_err(|error| malformed(&error.to_string()))
}

fn wrong_descriptors() -> HandoverError {
    malformed("a message with too few or too many descriptors")
}

fn malformed(what: &str) -> HandoverError {
    HandoverError::Malformed(what.to_owned())
}
