//! What a relay has taken from one side and not given to the other yet: whoever relays on begins with it.
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::ops::Deref;
use std::rc::Rc;

use super::pipe::Pipe;

/// What is on its way, both ways.
#[derive(Default)]
pub(crate) struct InFlight {
    /// From the client to the server.
    pub(super) up: Passing,
    /// From the server to the client.
    pub(super) down: Passing,
}

/// What is on its way in one direction: in one of both, or nothing.
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

impl InFlight {
    /// Of a relay that goes on from another, which left this.
    pub(crate) fn resumed(left: [Vec<u8>; 2]) -> Self {
        let [up, down] = left.map(|bytes| Passing {
            rest: RefCell::new(bytes.into()),
            pipe: RefCell::default(),
        });
        Self { up, down }
    }

    /// What a relay that was dropped has left, from the client and from the server.
    ///
    /// # Errors
    /// What reading a pipe answers.
    pub(crate) fn left(self) -> io::Result<[Vec<u8>; 2]> {
        Ok([self.up.left()?, self.down.left()?])
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

    fn left(self) -> io::Result<Vec<u8>> {
        let mut left = Vec::from(self.rest.into_inner());
        if let Some(pipe) = self.pipe.into_inner() {
            pipe.empty_into(&mut left)?;
        }
        Ok(left)
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
