//! Messages of a connection that no session has yet, read and written whole: bounded, however much
//! a server says.

use std::io;

use bytes::Bytes;
use pgsilo_wire::message::{self, Authentication, ErrorFields};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::Connection;
use super::error::BackendError;
use crate::stream::Stream;

/// The longest message that a database may send before its first ReadyForQuery, in bytes.
const MAX_MESSAGE: usize = 64 * 1024;
/// The most that all of its messages may come to before then, or until a question of ours is
/// answered, in bytes.
const MAX_LOGIN: usize = 256 * 1024;
/// A message's tag and length.
const HEADER: usize = 5;
/// Room that is made before a read, in bytes: for the answer to a login, or to a question.
const READ_AT_ONCE: usize = 4096;

impl Connection {
    pub(super) async fn read_authentication(&mut self) -> Result<Authentication, BackendError> {
        loop {
            let (tag, body) = self.read_message().await?;
            return match tag {
                b'R' => Authentication::parse(&body)
                    .ok_or(BackendError::Protocol("a malformed authentication request")),
                b'E' => Err(ErrorFields::parse(&body).into()),
                b'N' => continue,
                _ => Err(BackendError::Protocol("not an answer that PostgreSQL gives to a login")),
            };
        }
    }

    /// The next message. What has come behind it waits for the next call.
    pub(super) async fn read_message(&mut self) -> Result<(u8, Bytes), BackendError> {
        self.fill(HEADER).await?;
        let tag = self.unread[0];
        let length = u32::from_be_bytes([1, 2, 3, 4].map(|at| self.unread[at]));
        let length = (length as usize)
            .checked_sub(4)
            .filter(|length| *length <= MAX_MESSAGE)
            .ok_or(BackendError::Protocol("a message of an impossible length"))?;
        self.heard += HEADER + length;
        if self.heard > MAX_LOGIN {
            return Err(BackendError::Protocol(
                "more messages during its login than are believable",
            ));
        }
        self.fill(HEADER + length).await?;
        let message = self.unread.split_to(HEADER + length).freeze();
        Ok((tag, message.slice(HEADER..)))
    }

    /// Reads until that many bytes are there, and what comes with them.
    pub(super) async fn fill(&mut self, bytes: usize) -> io::Result<()> {
        while self.unread.len() < bytes {
            self.unread.reserve(READ_AT_ONCE.max(bytes - self.unread.len()));
            if self.stream.read_buf(&mut self.unread).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    pub(super) async fn send_password(&mut self, password: &[u8]) -> Result<(), BackendError> {
        let body = zeroize::Zeroizing::new([password, &[0]].concat());
        self.send_tagged(b'p', &body).await
    }

    pub(super) async fn send_tagged(&mut self, tag: u8, body: &[u8]) -> Result<(), BackendError> {
        let mut packet = zeroize::Zeroizing::new(Vec::with_capacity(body.len() + 5));
        message::raw(&mut packet, tag, body);
        self.send(&packet).await
    }

    pub(super) async fn send(&mut self, packet: &[u8]) -> Result<(), BackendError> {
        self.stream.write_all(packet).await?;
        self.stream.flush().await?;
        Ok(())
    }
}

/// Reads until the database has closed.
pub(super) async fn closed(stream: &mut Stream) -> io::Result<()> {
    let mut sink = [0; 64];
    while stream.read(&mut sink).await? > 0 {}
    Ok(())
}
