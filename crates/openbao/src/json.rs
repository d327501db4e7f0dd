//! JSON of a secret, written once: in room that it fills and does not outgrow, as growing would
//! leave a copy of it behind.

use std::io::{self, Write};

use serde::Serialize;
use zeroize::Zeroizing;

/// How long what is written is.
struct Length(usize);

impl Write for Length {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A value as JSON, with no room to spare.
///
/// # Errors
/// When JSON cannot hold it.
pub(crate) fn written(value: &impl Serialize) -> serde_json::Result<Zeroizing<Vec<u8>>> {
    let mut length = Length(0);
    serde_json::to_writer(&mut length, value)?;
    let mut json = Zeroizing::new(Vec::with_capacity(length.0));
    serde_json::to_writer(&mut *json, value)?;
    Ok(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_fills_its_room() {
        for secret in ["", "x", "needs \"quotes\" and \\ and \u{7f}\n", &"é".repeat(5000)] {
            let json = written(&[secret]).expect("JSON");
            assert_eq!(*json, serde_json::to_vec(&[secret]).expect("JSON"));
            assert_eq!(json.capacity(), json.len(), "{secret}");
        }
    }
}
