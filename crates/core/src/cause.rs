//! What an error is about in the end.

use std::error::Error;

/// The words of the innermost cause: where a library wraps its errors, that is what helps.
pub fn root_cause(error: &dyn Error) -> String {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    innermost.to_string()
}
