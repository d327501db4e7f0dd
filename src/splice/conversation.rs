//! What the frame headers of a session tell of its conversation: what the client is owed, and
//! whether the database can still be at work for it. For the relay alone.
//!
//! Two questions are answered, and each may be wrong to one side only. [`Conversation::is_busy`] is
//! for the client's good and believes it: a client that lies makes itself look idle. What bounds a
//! client is asked of [`Conversation::may_be_busy`], which believes the database alone: whatever a
//! client sends, it is true while the database may work or hold anything for it.
//!
//! A COPY that fails leaves open whether it has swallowed the Sync behind its Execute. The next
//! request shows it: CopyData, CopyDone, CopyFail, Flush and Sync make the database say nothing but
//! ReadyForQuery and ErrorResponse, so when it says more, it has come to what was sent behind them.

use pgsilo_wire::frame::{Header, Status};

/// What the frame headers tell of the conversation.
#[derive(Debug)]
pub(super) struct Conversation {
    /// ReadyForQuery messages that the client is owed.
    pub(super) owed: u32,
    /// The same, but for those that a COPY may have swallowed: a client can claim that of any.
    /// Never less than what the database has to answer.
    unanswered: u32,
    /// The client has begun what its next Sync will end.
    open: bool,
    /// The newest request that a ReadyForQuery answers: `Q`, `F` or `S`.
    newest: u8,
    /// The kind of the oldest that is unanswered, if it is known.
    oldest: Option<u8>,
    status: Option<Status>,
    /// The newest answer ended a transaction.
    behind_transaction: bool,
    pub(super) terminated: bool,
    /// The newest message of the database was an ErrorResponse.
    pub(super) last_was_error: bool,
    copy: CopyIn,
    /// A CopyDone or CopyFail that is no known COPY's may be on its way, and end the next one.
    stray: bool,
    /// What was sent since the newest COPY began, while it is not certain what that has swallowed.
    since: Since,
    /// Since it was last asked: the database was seen outside a transaction.
    crossed: bool,
}

/// A COPY from the client, as the database tells of it. What is sent behind the Execute that begins
/// one and before its CopyDone has a Sync swallowed: drivers send one before they know that it is a
/// COPY. Source: `CopyGetData` in `copyfromparse.c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CopyIn {
    /// None whose Syncs can be told from others.
    No,
    /// The database reads data, and no end of it has been sent.
    Reads { by_query: bool },
    /// The client has sent the end: when the database confirms it, so many Syncs before it have
    /// been swallowed. Not when it complains: a trigger may have, before it read any of them.
    Ends { by_query: bool, swallowed: u32 },
}

/// What a client has sent since a COPY began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Since {
    /// It is certain what is unanswered, or unknown what was sent when.
    NoCopy,
    /// Nothing but what belongs to a COPY, and Syncs.
    Copied,
    /// More: so many requests from there on, and an end of a COPY among them, or not.
    Asked { requests: u32, stray: bool },
}

/// What is done with a message whose header was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Forward,
    /// A Terminate of a client that is owed no answer: it need not be forwarded.
    Intercept,
}

impl Conversation {
    /// Of a session that has just been told its first ReadyForQuery.
    pub(super) fn begin() -> Conversation {
        Conversation {
            owed: 0,
            unanswered: 0,
            open: false,
            newest: 0,
            oldest: None,
            status: Some(Status::Idle),
            behind_transaction: false,
            terminated: false,
            last_was_error: false,
            copy: CopyIn::No,
            stray: false,
            since: Since::NoCopy,
            crossed: false,
        }
    }

    /// A message from the client. Query, FunctionCall and Sync are each answered by a
    /// ReadyForQuery, but for a Sync that a COPY swallows: drivers send one behind Execute,
    /// before they know that it begins a COPY, and another when that is done.
    pub(super) fn ask(&mut self, header: Header) -> Action {
        self.since = self.since.and(header.tag);
        match header.tag {
            b'Q' | b'F' | b'S' => {
                if self.unanswered == 0 {
                    self.oldest = Some(header.tag);
                }
                self.owed = self.owed.saturating_add(1);
                self.unanswered = self.unanswered.saturating_add(1);
                self.open = false;
                self.newest = header.tag;
            }
            b'c' | b'f' => {
                if self.newest == b'S' {
                    self.owed = self.owed.saturating_sub(1);
                }
                self.end_copy();
            }
            b'd' | b'H' => {}
            b'X' => {
                self.terminated = true;
                let answered = !self.may_be_busy() && !self.is_busy();
                if answered && self.status == Some(Status::Idle) {
                    return Action::Intercept;
                }
            }
            _ => self.open = true,
        }
        Action::Forward
    }

    fn end_copy(&mut self) {
        match self.copy {
            CopyIn::Reads { by_query } => {
                let swallowed = self.unanswered.saturating_sub(u32::from(by_query));
                self.copy = CopyIn::Ends { by_query, swallowed };
                // What Execute began lasts until a Sync that is answered.
                self.open |= !by_query;
            }
            CopyIn::No | CopyIn::Ends { .. } => self.stray |= self.may_be_busy(),
        }
    }

    /// A message from the database.
    pub(super) fn answer(&mut self, header: Header) -> Action {
        self.last_was_error = header.tag == b'E';
        if self.copy == CopyIn::No && tells_of_progress(header.tag) {
            self.settle();
        }
        match header.tag {
            b'Z' => {
                self.owed = self.owed.saturating_sub(1);
                self.unanswered = self.unanswered.saturating_sub(1);
                let was_inside = !self.is_outside();
                self.status = header.first.and_then(Status::parse);
                self.behind_transaction = was_inside && self.is_outside();
                self.crossed |= self.status == Some(Status::Idle);
                self.copy = CopyIn::No;
                self.oldest = (self.unanswered == 1).then_some(self.newest);
                self.stray &= self.may_be_busy();
                if self.unanswered == 0 {
                    self.since = Since::NoCopy;
                }
            }
            b'G' => {
                self.copy = self.begun();
                self.since = match self.copy {
                    CopyIn::No => Since::NoCopy,
                    // Behind the request that began it, another was begun.
                    _ if self.open && self.unanswered > 0 => {
                        Since::Asked { requests: 0, stray: false }
                    }
                    _ => Since::Copied,
                };
            }
            b'C' => {
                if let CopyIn::Ends { by_query, swallowed } = self.copy {
                    self.unanswered = self.unanswered.saturating_sub(swallowed);
                    self.copy = CopyIn::No;
                    self.since = Since::NoCopy;
                    // What is left behind an Execute was sent behind its data.
                    if !by_query {
                        self.oldest = (self.unanswered == 1).then_some(self.newest);
                    }
                }
            }
            b'E' => {
                // The end that was sent for this one may end another, behind it.
                self.stray |= matches!(self.copy, CopyIn::Ends { .. });
                self.copy = CopyIn::No;
            }
            _ => {}
        }
        Action::Forward
    }

    /// The database answers what was sent behind a COPY: all that was sent before that has been
    /// answered, or swallowed.
    fn settle(&mut self) {
        if let Since::Asked { requests, stray } = self.since {
            self.unanswered = self.unanswered.min(requests);
            self.oldest = (self.unanswered == 1).then_some(self.newest);
            self.stray = stray;
            self.since = Since::NoCopy;
        }
    }

    /// The database begins to read data. Syncs that are unanswered then, and those that are sent
    /// before the data's end, are swallowed: whatever is before the Execute has been answered. That
    /// is counted only where it is certain who began it, and that its end is not on its way
    /// already.
    fn begun(&self) -> CopyIn {
        match (self.unanswered, self.oldest) {
            _ if self.stray => CopyIn::No,
            (0, _) | (1, Some(b'S')) => CopyIn::Reads { by_query: false },
            (1, Some(b'Q')) => CopyIn::Reads { by_query: true },
            _ => CopyIn::No,
        }
    }

    /// Whether the database has something to do for a client that keeps to the protocol.
    pub(super) fn is_busy(&self) -> bool {
        self.owed > 0 || self.open
    }

    /// Whether the database may have something to do for the client, whatever that has sent.
    pub(super) fn may_be_busy(&self) -> bool {
        self.unanswered > 0 || self.open
    }

    /// Whether the newest answer was given outside a transaction.
    pub(super) fn is_outside(&self) -> bool {
        self.status == Some(Status::Idle)
    }

    /// Whether the newest answer ended a transaction that an earlier answer had told of.
    pub(super) fn is_behind_transaction(&self) -> bool {
        self.behind_transaction
    }

    /// Whether the database was seen outside a transaction since this was last asked.
    pub(super) fn take_crossed(&mut self) -> bool {
        std::mem::take(&mut self.crossed)
    }
}

impl Since {
    /// One message more.
    fn and(self, tag: u8) -> Since {
        let (requests, stray) = match self {
            Since::NoCopy => return Since::NoCopy,
            Since::Copied if matches!(tag, b'S' | b'd' | b'c' | b'f' | b'H') => return self,
            Since::Copied => (0, false),
            Since::Asked { requests, stray } => (requests, stray),
        };
        let is_request = matches!(tag, b'Q' | b'F' | b'S');
        Since::Asked {
            requests: requests.saturating_add(u32::from(is_request)),
            stray: stray || matches!(tag, b'c' | b'f'),
        }
    }
}

/// Whether the database says that only when it has come to a message that asks for something.
/// Notices, notifications and settings come at any time, ReadyForQuery for a mere Sync.
fn tells_of_progress(tag: u8) -> bool {
    !matches!(tag, b'Z' | b'N' | b'A' | b'S')
}

#[cfg(test)]
mod tests;
