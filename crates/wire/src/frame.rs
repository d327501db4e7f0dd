//! Counts message frames in a stream of bytes that pass by, without keeping any of them.
//!
//! It knows where messages begin and end, what the newest ReadyForQuery said, and nothing
//! else: bodies are opaque. A stream that stops looking like frames (a length below 4) makes
//! the counter *lost*; from then on it claims no boundary ever again.

/// The transaction status of a ReadyForQuery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// `I`: outside a transaction.
    Idle,
    /// `T`: in a transaction block.
    InTransaction,
    /// `E`: in a failed transaction block.
    Failed,
}

/// Where a stream of tagged messages stands. 24 bytes.
#[derive(Debug, Default)]
pub struct FrameCounter {
    /// Bytes of the current message still to come, behind its header.
    body_left: u32,
    /// The header as far as it has come: tag, then the length.
    header: [u8; 5],
    header_len: u8,
    lost: bool,
    passed: u64,
}

/// A message whose header has just passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The message's type byte.
    pub tag: u8,
    /// The body's first byte, where it passed in the same chunk.
    pub first: Option<u8>,
    /// Bytes of its body.
    pub length: u32,
}

impl FrameCounter {
    /// Takes the next bytes of the stream and tells `seen` of each message that begins in them.
    ///
    /// A ReadyForQuery is told of when its status byte passes, so that its `first` is there
    /// however the stream is cut.
    pub fn count(&mut self, mut chunk: &[u8], mut seen: impl FnMut(Header)) {
        self.passed = self.passed.wrapping_add(chunk.len() as u64);
        while !chunk.is_empty() && !self.lost {
            if self.body_left > 0 {
                if self.awaits_status() {
                    seen(Header { tag: b'Z', first: Some(chunk[0]), length: self.body_left });
                    self.header_len = 0;
                }
                let step = (self.body_left as usize).min(chunk.len());
                self.body_left -= step as u32;
                chunk = &chunk[step..];
                continue;
            }
            let have = usize::from(self.header_len);
            let step = (5 - have).min(chunk.len());
            self.header[have..have + step].copy_from_slice(&chunk[..step]);
            self.header_len += step as u8;
            chunk = &chunk[step..];
            if self.header_len == 5 {
                self.begin(chunk.first().copied(), &mut seen);
            }
        }
    }

    fn begin(&mut self, first: Option<u8>, seen: &mut impl FnMut(Header)) {
        let [tag, length @ ..] = self.header;
        let Some(length) = u32::from_be_bytes(length).checked_sub(4) else {
            self.lost = true;
            return;
        };
        self.body_left = length;
        if tag == b'Z' && length > 0 {
            return; // told of when the status byte passes; header_len stays 5 until then
        }
        self.header_len = 0;
        seen(Header { tag, first: first.filter(|_| length > 0), length });
    }

    /// Bytes that have passed.
    pub fn passed(&self) -> u64 {
        self.passed
    }

    fn awaits_status(&self) -> bool {
        self.header_len == 5
    }

    /// Whether the newest message has just ended and was this one, which has no body.
    pub fn just_ended(&self, message: [u8; 5]) -> bool {
        self.at_boundary() && self.header == message
    }

    /// Whether the stream stands between two messages.
    pub fn at_boundary(&self) -> bool {
        self.body_left == 0 && self.header_len == 0 && !self.lost
    }
}

impl Status {
    /// Reads a ReadyForQuery's status byte.
    pub fn parse(byte: u8) -> Option<Status> {
        match byte {
            b'I' => Some(Status::Idle),
            b'T' => Some(Status::InTransaction),
            b'E' => Some(Status::Failed),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        [&[tag][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
    }

    fn count_in_pieces(stream: &[u8], cuts: &[usize]) -> (Vec<(u8, u32)>, Vec<u8>, bool) {
        let mut counter = FrameCounter::default();
        let (mut seen, mut statuses) = (Vec::new(), Vec::new());
        let mut at = 0;
        for cut in cuts.iter().map(|cut| cut % (stream.len() + 1)).chain([stream.len()]) {
            if cut < at {
                continue;
            }
            counter.count(&stream[at..cut], |header| {
                seen.push((header.tag, header.length));
                statuses.extend(header.first.filter(|_| header.tag == b'Z'));
            });
            at = cut;
        }
        (seen, statuses, counter.at_boundary())
    }

    #[test]
    fn a_status_byte_alone_in_the_next_chunk_is_seen() {
        let stream = message(b'Z', b"T");
        for cut in 0..=stream.len() {
            assert_eq!(count_in_pieces(&stream, &[cut]), (vec![(b'Z', 1)], vec![b'T'], true));
        }
    }

    #[test]
    fn an_impossible_length_claims_no_boundary_ever_again() {
        let mut counter = FrameCounter::default();
        counter.count(&[b'D', 0, 0, 0, 3], |_| panic!("no message"));
        assert!(!counter.at_boundary());
        counter.count(&message(b'Z', b"I"), |_| panic!("no message"));
        assert!(!counter.at_boundary());
    }

    #[test]
    fn the_newest_message_is_known_by_its_header() {
        const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];
        let mut counter = FrameCounter::default();
        assert!(!counter.just_ended(TERMINATE));
        counter.count(&[message(b'Q', b"x"), message(b'X', b"")].concat(), |_| {});
        assert!(counter.just_ended(TERMINATE));
        counter.count(b"Q", |_| {});
        assert!(!counter.just_ended(TERMINATE));
        // A body that looks like it is none.
        counter.count(&message(b'd', &TERMINATE)[1..], |_| {});
        assert!(counter.at_boundary() && !counter.just_ended(TERMINATE));
    }

    #[test]
    fn a_counter_is_small() {
        assert!(size_of::<FrameCounter>() <= 24);
    }

    proptest! {
        #[test]
        fn however_the_stream_is_cut_the_same_messages_are_seen(
            messages in prop::collection::vec((prop::sample::select(&b"DCZTNdcQ"[..]),
                prop::collection::vec(any::<u8>(), 0..40)), 0..12),
            mut cuts in prop::collection::vec(any::<usize>(), 0..30),
        ) {
            let stream: Vec<u8> = messages.iter().flat_map(|(tag, body)| message(*tag, body)).collect();
            cuts.iter_mut().for_each(|cut| *cut %= stream.len() + 1);
            cuts.sort_unstable();
            let tags: Vec<_> = messages.iter().map(|(tag, body)| (*tag, body.len() as u32)).collect();
            let statuses: Vec<_> = messages.iter().filter(|(tag, _)| *tag == b'Z')
                .filter_map(|(_, body)| body.first().copied()).collect();
            prop_assert_eq!(count_in_pieces(&stream, &cuts), (tags, statuses, true));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, cuts: Vec<usize>) {
            let _ = count_in_pieces(&bytes, &cuts);
        }
    }
}
