//! The I/O error that says what was done to what, and where.

use std::borrow::Cow;
use std::fmt;
use std::io;

/// An operating system error with its operation, its target and, for devices, its offset.
///
/// `Display` shows this layer only (`write 4096 bytes to naa.6000… at 1048576`); the errno is the `source`.
#[derive(Debug, thiserror::Error)]
pub struct IoError {
    /// What was attempted, as a verb: `open`, `write`, `flush`.
    pub op: &'static str,
    /// The file, device or peer that it was attempted on.
    pub target: String,
    /// The byte offset on the target, where there is one.
    pub offset: Option<u64>,
    /// What the operating system said.
    pub source: io::Error,
}

impl IoError {
    /// An error of an operation without an offset.
    pub fn new(op: &'static str, target: impl Into<String>, source: impl Into<io::Error>) -> IoError {
        IoError { op, target: target.into(), offset: None, source: source.into() }
    }

    /// The same, at a byte offset.
    pub fn at(
        op: &'static str,
        target: impl Into<String>,
        offset: u64,
        source: impl Into<io::Error>,
    ) -> IoError {
        IoError { op, target: target.into(), offset: Some(offset), source: source.into() }
    }
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.op, plain(&self.target))?;
        if let Some(offset) = self.offset {
            write!(f, " at byte {offset}")?;
        }
        Ok(())
    }
}

/// Text from elsewhere, such as the name of a file, with its control characters as in `\n` and `\u{1b}`: it does nothing to a
/// terminal, and is no line of its own in a log.
pub fn plain(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let mut plain = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if c.is_control() { plain.extend(c.escape_debug()) } else { plain.push(c) }
    }
    Cow::Owned(plain)
}

/// An error and all its sources on one line, outermost first: for where it is shown for good.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_control_characters_stays_on_its_line() {
        let error = IoError::new("open", "/a\n\u{1b}[2Jb\u{9b}ä", io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(error.to_string(), "open /a\\n\\u{1b}[2Jb\\u{9b}ä");
        assert!(matches!(plain("/a b\\"), Cow::Borrowed("/a b\\")));
    }
}
