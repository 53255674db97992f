//! The metadata of a request: whose it is, and what it says about time.

use std::time::Instant;

use crate::tokens::Caller;

/// Who sent an observation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Client {
    /// A client that names itself.
    Named(String),
    /// A client without a name, by the number of its connection.
    Connection(u64),
    /// One of a connection's episodes, for which those before it count for nothing.
    Episode(u64, u64),
}

impl Client {
    /// Its name, if it has one.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Named(name) => Some(name),
            Self::Connection(_) | Self::Episode(..) => None,
        }
    }
}

/// The metadata of a request.
#[derive(Debug, Clone)]
pub struct Meta {
    /// The client.
    pub client: Client,
    /// Whose token it showed.
    pub caller: Caller,
    /// The number of its connection, in the order in which they were opened.
    pub connection: u64,
    /// Which run of the client's program it is, if the client says so: higher is later.
    pub epoch: Option<u64>,
    /// The client's own count.
    pub seq: Option<u64>,
    /// The client's clock when it looked, in seconds since 1970.
    pub timestamp: Option<f64>,
    /// When the request arrived.
    pub arrived: Instant,
    /// When its answer becomes useless.
    pub deadline: Instant,
}
