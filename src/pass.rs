//! The name of a pass: on the wire, in the protections and in the log.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The name of a pass, chosen by the sender: 128 random bits, written as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PassId(pub u128);

impl fmt::Display for PassId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for PassId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no [`PassId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a pass is named by 32 lower-case hexadecimal digits")]
pub struct ParsePassIdError;

impl FromStr for PassId {
    type Err = ParsePassIdError;

    fn from_str(text: &str) -> Result<PassId, ParsePassIdError> {
        let digits = text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !digits {
            return Err(ParsePassIdError);
        }
        u128::from_str_radix(text, 16).map(PassId).map_err(|_| ParsePassIdError)
    }
}

impl TryFrom<String> for PassId {
    type Error = ParsePassIdError;

    fn try_from(text: String) -> Result<PassId, ParsePassIdError> {
        text.parse()
    }
}

impl From<PassId> for String {
    fn from(pass: PassId) -> String {
        pass.to_string()
    }
}
