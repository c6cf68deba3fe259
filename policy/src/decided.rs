//! A verdict without its reason, which a held packet does not need. The reason can be derived later from
//! the same endpoints.
use std::net::IpAddr;

use crate::endpoint::Endpoint;
use crate::model::{Direction, Protocol};
use crate::verdict::{Ends, Exempt, OwnNode, Party, Side, Verdict};

/// The result of [`decide`]: a [`Verdict`] without its reason, of a few bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decided {
    /// The result of the source's egress policies.
    pub egress: DecidedSide,
    /// The result of the destination's ingress policies.
    pub ingress: DecidedSide,
    /// Allowed regardless of both sides.
    pub exempt: Option<Exempt>,
    asked: Option<Asked>,
}

/// The result of one end, without its reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecidedSide {
    /// Whether any policy isolates this end in this direction.
    pub isolated: bool,
    /// Whether this end allows the connection; always true if it is not isolated.
    pub allowed: bool,
    /// Whether more than one running pod claims the end's address, so that no rule may open it.
    pub contested: bool,
}

/// The connection in question, without its endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    from: IpAddr,
    to: IpAddr,
    port: Option<u16>,
    protocol: Protocol,
}

/// Decides a connection as [`judge`](crate::judge) does, without the reason: allocates nothing, and
/// takes a few binary searches however many rules there are.
pub fn decide(
    from: Party<'_>,
    to: Party<'_>,
    port: Option<u16>,
    protocol: Protocol,
    own_node: OwnNode,
) -> Decided {
    let ends = Ends {
        from,
        to,
        port,
        protocol,
    };
    Decided {
        egress: ends.decided(Direction::Egress),
        ingress: ends.decided(Direction::Ingress),
        exempt: ends.exempt(own_node),
        asked: Some(Asked {
            from: from.address,
            to: to.address,
            port,
            protocol,
        }),
    }
}

impl Decided {
    /// A decision without a lookup of rules: it has no reason to explain.
    pub fn of(egress: DecidedSide, ingress: DecidedSide) -> Self {
        Self {
            egress,
            ingress,
            exempt: None,
            asked: None,
        }
    }

    /// Whether the connection is allowed.
    pub fn allowed(&self) -> bool {
        self.exempt.is_some() || (self.egress.allowed && self.ingress.allowed)
    }

    /// The reason, as [`judge`](crate::judge) gives it. `from` and `to` must be the endpoints that
    /// this decision was made for.
    ///
    /// The work is bounded: all policies that allow are named, but rules are searched only among
    /// the first thousands of each end.
    pub fn explain(&self, from: Option<&Endpoint>, to: Option<&Endpoint>) -> Verdict {
        let (egress, ingress) = match self.asked {
            None => (self.egress.into(), self.ingress.into()),
            Some(asked) => {
                let party = |address, endpoint| Party { address, endpoint };
                let ends = Ends {
                    from: party(asked.from, from),
                    to: party(asked.to, to),
                    port: asked.port,
                    protocol: asked.protocol,
                };
                (
                    ends.explained(Direction::Egress, self.egress),
                    ends.explained(Direction::Ingress, self.ingress),
                )
            }
        };
        Verdict {
            egress,
            ingress,
            exempt: self.exempt,
        }
    }
}

impl From<DecidedSide> for Side {
    fn from(said: DecidedSide) -> Self {
        Self {
            isolated: said.isolated,
            allowed: said.allowed,
            contested: said.contested,
            ..Self::default()
        }
    }
}
