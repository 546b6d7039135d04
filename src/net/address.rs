//! Where a master target listens: `HOST[:PORT]`.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

/// The port of the service where none is given.
pub const DEFAULT_PORT: u16 = 9443;

/// A host and a port. The host is a DNS name, an IPv4 address or an IPv6 address (without its brackets).
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub struct Address {
    host: String,
    port: u16,
}

impl Address {
    /// The longest host, in bytes: that of a DNS name in text (RFC 1035, section 2.3.4, less the root).
    pub const MAX_HOST: usize = 253;

    /// The host, for a resolver.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The TCP port; never 0.
    pub fn port(&self) -> u16 {
        self.port
    }
}

/// Why a text is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no address: give HOST or HOST:PORT, as in mt.example.org:9443, 192.0.2.7 or [2001:db8::7]:9443")]
pub struct ParseAddressError;

impl Address {
    /// `HOST[:PORT]`, at `default` where it has no port.
    ///
    /// # Errors
    /// Also where `default` is needed and is 0.
    pub fn parse(text: &str, default: u16) -> Result<Address, ParseAddressError> {
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, port) = rest.split_once(']').ok_or(ParseAddressError)?;
            host.parse::<Ipv6Addr>().map_err(|_| ParseAddressError)?;
            match port {
                "" => (host, None),
                _ => (host, Some(port.strip_prefix(':').ok_or(ParseAddressError)?)),
            }
        } else if text.parse::<Ipv6Addr>().is_ok() {
            (text, None)
        } else {
            match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        let named = host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':'));
        let fits = (1..=Address::MAX_HOST).contains(&host.len()) && !host.starts_with(['-', '.']);
        let port = match port {
            None => default,
            // `parse` alone would take `+9443`.
            Some(port) if port.bytes().all(|b| b.is_ascii_digit()) => {
                port.parse().map_err(|_| ParseAddressError)?
            }
            Some(_) => return Err(ParseAddressError),
        };
        if named && fits && port != 0 {
            Ok(Address { host: host.to_owned(), port })
        } else {
            Err(ParseAddressError)
        }
    }
}

impl FromStr for Address {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Address, ParseAddressError> {
        Address::parse(text, DEFAULT_PORT)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed_and_shown() {
        for (text, shown) in [
            ("mt.example.org", "mt.example.org:9443"),
            ("mt:1", "mt:1"),
            ("192.0.2.7:65535", "192.0.2.7:65535"),
            ("2001:db8::7", "[2001:db8::7]:9443"),
            ("[2001:db8::7]", "[2001:db8::7]:9443"),
            ("[::1]:9", "[::1]:9"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), shown);
            assert_eq!(shown.parse::<Address>().unwrap(), address);
        }
        let long = "a".repeat(254);
        for bad in
            ["", ":1", "a:", "a:0", "a:65536", "a:+1", "a:1:2", "[a]:1", "[::1", "[::1]1", "-a", "a b", &long]
        {
            assert_eq!(bad.parse::<Address>(), Err(ParseAddressError), "{bad}");
        }
    }
}
