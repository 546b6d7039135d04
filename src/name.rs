//! The name of a machine or of one of its disks: short, and safe in a certificate, a URI and a file name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A name of 1 to 64 characters of `A-Z a-z 0-9 . _ -` that begins with neither `.` nor `-`.
///
/// Machines and disks carry one. It is used as it stands as a file name, in a certificate and in a URI, so it
/// can hold no separator, no `..` and nothing that a command line would take for an option. Case matters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The longest name, in bytes (and characters: a name is ASCII). A common name (RFC 5280, appendix A.1,
    /// `ub-common-name`) is not longer either.
    pub const MAX_LEN: usize = 64;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a text is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no name: use 1 to 64 letters, digits, dots, underscores and hyphens, \
     and begin with a letter, a digit or an underscore"
)]
pub struct ParseNameError(String);

impl FromStr for Name {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Name, ParseNameError> {
        let fits = (1..=Name::MAX_LEN).contains(&text.len())
            && !text.starts_with(['.', '-'])
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if fits {
            Ok(Name(text.to_owned()))
        } else {
            // Whatever was sent is shown escaped and cut: it may be anything, of any length.
            let shown: String = text.chars().take(Name::MAX_LEN + 1).flat_map(char::escape_debug).collect();
            Err(ParseNameError(shown))
        }
    }
}

impl TryFrom<String> for Name {
    type Error = ParseNameError;

    fn try_from(text: String) -> Result<Name, ParseNameError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_safe_as_a_file_name() {
        for good in ["a", "web-01", "db.example.org", "_x", "0", &"n".repeat(64)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", ".hidden", "-rf", "a/b", "a b", "a\0", "é", "a\n", "a%", &"n".repeat(65)]
        {
            assert!(bad.parse::<Name>().is_err(), "{bad:?} was taken for a name");
        }
    }

    #[test]
    fn json_is_validated_too() {
        assert_eq!(serde_json::from_str::<Name>("\"sda\"").unwrap().as_str(), "sda");
        assert!(serde_json::from_str::<Name>("\"../x\"").is_err());
        assert_eq!(serde_json::to_string(&"sda".parse::<Name>().unwrap()).unwrap(), "\"sda\"");
    }

    #[test]
    fn the_error_shows_a_bounded_and_printable_text() {
        let error = "\u{1b}[31m".repeat(1000).parse::<Name>().unwrap_err().to_string();
        assert!(error.len() < 1000 && !error.contains('\u{1b}'), "{error}");
    }
}
