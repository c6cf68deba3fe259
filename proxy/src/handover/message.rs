//! What two daemons say to each other, and in which order. JSON, a message each; the bytes that were in
//! flight follow their connection as they are.
use std::os::fd::{AsFd, OwnedFd};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::line::{LONGEST, Line};
use super::{Connection, Estate, HandoverError, Seat, Told};

/// Bytes that a direction can have in flight: a full pipe and a full buffer, and room for larger ones.
const MOST_IN_FLIGHT: usize = 4 << 20;

/// The running daemon's answer to [`super::Terms`]. Whatever the format, this much is understood.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Reply {
    pub(super) format: u32,
    /// Why not, if not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) refused: Option<String>,
    /// The running daemon's pod, if it came after the other's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) newer: Option<String>,
    /// What the running daemon's redirect is set to; empty if it does not say.
    #[serde(default)]
    pub(super) settings: String,
}

/// A part of the estate, or its end.
#[derive(Debug, Serialize, Deserialize)]
enum Part {
    /// With a queue of this number, and a listener.
    Seat { queue: u16 },
    /// With the socket towards the server and, if it has one, that towards the client.
    Connection {
        told: Box<Told>,
        in_flight: [usize; 2],
    },
    /// That was all.
    End { connections: usize },
}

/// The new daemon has everything, and answers for it from now on.
#[derive(Debug, Serialize, Deserialize)]
struct Taken {
    connections: usize,
}

impl Line {
    /// Says something without descriptors.
    pub(super) fn say(&self, message: &impl Serialize) -> Result<(), HandoverError> {
        self.send(&encoded(message)?, &[])
    }

    /// Hears something without descriptors.
    pub(super) fn hear<T: DeserializeOwned>(&mut self) -> Result<T, HandoverError> {
        decoded(self.receive()?.0)
    }

    /// Hands all over, and waits until the other end says that it has it.
    pub(super) fn give(&mut self, estate: &Estate) -> Result<(), HandoverError> {
        for (queue, seat) in &estate.seats {
            let part = encoded(&Part::Seat { queue: *queue })?;
            self.send(&part, &[seat.queue.as_fd(), seat.listener.as_fd()])?;
        }
        for connection in &estate.connections {
            self.give_connection(connection)?;
        }
        let connections = estate.connections.len();
        self.say(&Part::End { connections })?;
        let taken: Taken = self.hear()?;
        if taken.connections == connections {
            Ok(())
        } else {
            Err(malformed("it has another number of connections"))
        }
    }

    fn give_connection(&self, connection: &Connection) -> Result<(), HandoverError> {
        let Connection {
            told,
            server,
            client,
            in_flight,
        } = connection;
        let part = encoded(&Part::Connection {
            told: Box::new(told.clone()),
            in_flight: in_flight.each_ref().map(Vec::len),
        })?;
        let sockets: Vec<_> = [server]
            .into_iter()
            .chain(client)
            .map(AsFd::as_fd)
            .collect();
        self.send(&part, &sockets)?;
        let mut chunks = in_flight.iter().flat_map(|bytes| bytes.chunks(LONGEST));
        chunks.try_for_each(|chunk| self.send(chunk, &[]))
    }

    /// Takes all over, puts it into `estate` piece by piece, and says so.
    pub(super) fn take(&mut self, estate: &mut Estate) -> Result<(), HandoverError> {
        loop {
            let (message, descriptors) = self.receive()?;
            match decoded(message)? {
                Part::Seat { queue } => {
                    let [queue_socket, listener] = exactly(descriptors)?;
                    let seat = Seat {
                        queue: queue_socket,
                        listener,
                    };
                    estate.seats.insert(queue, seat);
                }
                Part::Connection { told, in_flight } => {
                    let mut sockets = descriptors.into_iter();
                    let server = sockets
                        .next()
                        .ok_or_else(|| malformed("a connection without a socket"))?;
                    estate.connections.push(Connection {
                        told: *told,
                        server,
                        client: sockets.next(),
                        in_flight: Default::default(),
                    });
                    for (direction, length) in in_flight.into_iter().enumerate() {
                        let bytes = self.bytes(length)?;
                        if let Some(connection) = estate.connections.last_mut() {
                            connection.in_flight[direction] = bytes;
                        }
                    }
                }
                Part::End { connections } if connections == estate.connections.len() => {
                    return self.say(&Taken { connections });
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
            bytes.extend_from_slice(self.receive()?.0);
        }
        if bytes.len() == length {
            Ok(bytes)
        } else {
            Err(malformed("more bytes in flight than announced"))
        }
    }
}

fn encoded(message: &impl Serialize) -> Result<Vec<u8>, HandoverError> {
    serde_json::to_vec(message).map_err(|error| malformed(&error.to_string()))
}

fn decoded<T: DeserializeOwned>(message: &[u8]) -> Result<T, HandoverError> {
    serde_json::from_slice(message).map_err(|error| malformed(&error.to_string()))
}

fn exactly<const N: usize>(descriptors: Vec<OwnedFd>) -> Result<[OwnedFd; N], HandoverError> {
    let wrong = |_| malformed("a message with too few or too many descriptors");
    descriptors.try_into().map_err(wrong)
}

fn malformed(what: &str) -> HandoverError {
    HandoverError::Malformed(what.to_owned())
}
