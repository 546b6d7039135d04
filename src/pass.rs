//! The names of passes and of what they belong to, and how 128 bits that somebody chose are written: on the wire, in the protections, in the
//! log.

/// Defines a name of 128 bits, written as 32 lower-case hexadecimal digits, and the error of its `FromStr`.
macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $error:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub u128);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(self, f)
            }
        }

        #[doc = concat!("A text that is no [`", stringify!($name), "`].")]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
        #[error("{} is named by 32 lower-case hexadecimal digits", $what)]
        pub struct $error;

        impl std::str::FromStr for $name {
            type Err = $error;

            fn from_str(text: &str) -> Result<$name, $error> {
                let digits =
                    text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                if !digits {
                    return Err($error);
                }
                u128::from_str_radix(text, 16).map($name).map_err(|_| $error)
            }
        }

        impl TryFrom<String> for $name {
            type Error = $error;

            fn try_from(text: String) -> Result<$name, $error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }
    };
}

pub(crate) use id;

id!(
    /// The name of a pass, chosen by the sender: 128 random bits, written as 32 hexadecimal digits.
    PassId,
    ParsePassIdError,
    "a pass"
);

id!(
    /// The name of what a volume's journal and points have in common: 128 random bits, drawn when an initial pass begins
    /// and kept by all passes after it.
    Lineage,
    ParseLineageError,
    "a lineage"
);

impl Lineage {
    /// A new one.
    pub fn random() -> std::io::Result<Lineage> {
        let mut random = [0; 16];
        getrandom::fill(&mut random)?;
        Ok(Lineage(u128::from_ne_bytes(random)))
    }
}
