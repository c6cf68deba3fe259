//! Bytes that a relay has read from one side and not yet written to the other: the next relay starts with them.
use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Deref;
use std::rc::Rc;

use super::pipe::{Pipe, Unread};

/// The bytes in flight in both directions.
#[derive(Default)]
pub(crate) struct InFlight {
    /// From the client to the server.
    pub(super) up: Passing,
    /// From the server to the client.
    pub(super) down: Passing,
}

/// The bytes in flight in one direction: in the buffer, in the pipe, or none.
#[derive(Default)]
pub(super) struct Passing {
    pub(super) rest: RefCell<VecDeque<u8>>,
    pipe: RefCell<Option<Rc<Pipe>>>,
}

/// A pipe that stays where it is for as long as there is something in it.
pub(super) struct Lent<'a> {
    pipe: Rc<Pipe>,
    passing: &'a Passing,
}

/// The bytes that a stopped direction has read and not written: first these, then those in the pipe.
#[derive(Debug, Default)]
pub(crate) struct Left {
    pub(crate) bytes: Vec<u8>,
    pub(crate) pipe: Option<Unread>,
}

impl Left {
    /// The number of bytes in all.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() + self.pipe.as_ref().map_or(0, |pipe| pipe.bytes)
    }
}

impl InFlight {
    /// The bytes in flight of a relay that continues another one.
    pub(crate) fn resumed(left: [Left; 2]) -> Self {
        let [up, down] = left.map(|Left { bytes, pipe }| Passing {
            rest: RefCell::new(bytes.into()),
            pipe: RefCell::new(pipe.map(|pipe| Rc::new(Pipe::left(pipe)))),
        });
        Self { up, down }
    }

    /// The bytes in flight of a dropped relay, from the client and from the server.
    pub(crate) fn left(self) -> [Left; 2] {
        [self.up.left(), self.down.left()]
    }
}

impl Passing {
    /// Keeps `pipe` for as long as it is in use, or not empty.
    pub(super) fn keep(&self, pipe: Pipe) -> Lent<'_> {
        let pipe = Rc::new(pipe);
        self.pipe.replace(Some(Rc::clone(&pipe)));
        Lent {
            pipe,
            passing: self,
        }
    }

    /// The pipe that another relay has filled, if any.
    pub(super) fn kept(&self) -> Option<Lent<'_>> {
        let pipe = self.pipe.borrow().clone()?;
        Some(Lent {
            pipe,
            passing: self,
        })
    }

    fn left(self) -> Left {
        Left {
            bytes: self.rest.into_inner().into(),
            pipe: self
                .pipe
                .into_inner()
                .and_then(Rc::into_inner)
                .and_then(Pipe::leave),
        }
    }
}

impl Deref for Lent<'_> {
    type Target = Pipe;

    fn deref(&self) -> &Pipe {
        &self.pipe
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if self.pipe.is_empty() {
            self.passing.pipe.take();
        }
    }
}
