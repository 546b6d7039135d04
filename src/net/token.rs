//! Tokens: one string that lets a machine enrol, once, within its time.
//!
//! The text is for carrying from one terminal to another: `mtt1.` and then base64url (RFC 4648, section 5, without
//! padding) of
//!
//! | bytes | what |
//! |---|---|
//! | 32 | SHA-256 of the server's certificate (DER) |
//! | 32 | the secret |
//! | 8 | expiry, seconds since 1970 in UTC, signed, little-endian |
//! | 1 + n | length of the machine's name, and the name |
//! | rest | the server's address, `HOST:PORT` |
//! | 4 | CRC-32C of all bytes before, little-endian |
//!
//! The checksum tells a token that was mistyped or cut from one that is wrong.
//!
//! The server keeps one file a token, `tokens/ID.json`, with the SHA-256 of the secret and never the secret. No slow
//! hash (Argon2, scrypt): those make guessing a *password* dear, and nobody guesses 256 random bits.
//!
//! Redeeming is one rename, from `tokens/` to `tokens/used/`, made durable before a certificate is handed out. Of
//! two that race, one finds the file gone. A crash before it leaves the token as it was, with nothing handed out; a
//! crash after it leaves it used, with nothing handed out or with a reply that was lost: the administrator makes
//! another one. A full disk can make the rename fail, and then nothing is handed out either. There is no order of
//! events in which a token is used twice.
//!
//! Revoking is such a rename too, to `tokens/revoked/`, so that who tries the token is told what happened to it.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::{Duration, OffsetDateTime};

use super::address::Address;
use super::tls::{Fingerprint, same};
use crate::checksum::crc32c;
use crate::durable;
use crate::error::IoError;
use crate::name::Name;

const PREFIX: &str = "mtt1.";
/// The longest token, in characters: the longest name and host and all else fit well within.
const MAX_TEXT: usize = 1024;

/// The shortest and the longest life of a token.
pub const LIFE: std::ops::RangeInclusive<Duration> = Duration::minutes(1)..=Duration::days(30);
/// For how long a token that is used or expired is remembered after its expiry, to say so where it is tried.
const REMEMBERED: Duration = Duration::days(7);

/// A secret that is used once, such as a token's: 256 random bits. Never shown by `Debug`.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        same(&self.0, &other.0)
    }
}

impl Eq for Secret {}

impl Secret {
    /// A new one.
    pub fn random() -> io::Result<Secret> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Secret(bytes))
    }

    fn digest(&self) -> [u8; 32] {
        Sha256::digest(self.0).into()
    }

    /// The secret as messages carry it: base64url without padding.
    pub fn to_base64(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.0)
    }

    /// The secret in a message; `None` where the text is none.
    pub fn from_base64(text: &str) -> Option<Secret> {
        // 32 bytes are 43 characters: nothing longer is even looked at.
        if text.len() != 43 {
            return None;
        }
        Some(Secret(URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()?))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What a token says. Its `Display` holds the secret: it is for the user's eyes, never for a log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Token {
    /// Where the server is.
    pub address: Address,
    /// What its certificate must be.
    pub fingerprint: Fingerprint,
    /// The machine that may enrol.
    pub machine: Name,
    /// What proves it.
    pub secret: Secret,
    /// Until when, in whole seconds.
    pub expires: OffsetDateTime,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = self.machine.as_str();
        let mut bytes = Vec::new();
        bytes.extend(self.fingerprint.0);
        bytes.extend(self.secret.0);
        bytes.extend(self.expires.unix_timestamp().to_le_bytes());
        // A name has at most 64 bytes.
        bytes.extend(u8::try_from(machine.len()).map_err(|_| fmt::Error)?.to_le_bytes());
        bytes.extend(machine.bytes());
        bytes.extend(self.address.to_string().bytes());
        bytes.extend(crc32c(&bytes).to_le_bytes());
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }
}

/// Why a text is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseTokenError {
    /// It does not begin as a token does.
    #[error("not a token: one begins with `{PREFIX}` and has no spaces; `mt-agent token create` prints it")]
    NotAToken,
    /// The checksum does not hold.
    #[error("the token is damaged: it was cut or mistyped; copy it again, whole")]
    Damaged,
    /// The checksum holds, but what it says does not: made by another program or version.
    #[error("the token is not understood: use the same version of mt-agent on both sides")]
    NotUnderstood,
}

impl FromStr for Token {
    type Err = ParseTokenError;

    fn from_str(text: &str) -> Result<Token, ParseTokenError> {
        use ParseTokenError::{Damaged, NotAToken, NotUnderstood};
        let body = text.trim().strip_prefix(PREFIX).ok_or(NotAToken)?;
        if body.len() > MAX_TEXT {
            return Err(Damaged);
        }
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| Damaged)?;
        let (said, crc) = bytes.split_last_chunk::<4>().ok_or(Damaged)?;
        if crc32c(said) != u32::from_le_bytes(*crc) {
            return Err(Damaged);
        }
        let (fingerprint, rest) = said.split_first_chunk::<32>().ok_or(NotUnderstood)?;
        let (secret, rest) = rest.split_first_chunk::<32>().ok_or(NotUnderstood)?;
        let (expires, rest) = rest.split_first_chunk::<8>().ok_or(NotUnderstood)?;
        let (&name_len, rest) = rest.split_first().ok_or(NotUnderstood)?;
        let (machine, address) = rest.split_at_checked(usize::from(name_len)).ok_or(NotUnderstood)?;
        let text = |bytes| std::str::from_utf8(bytes).map_err(|_| NotUnderstood);
        Ok(Token {
            address: text(address)?.parse().map_err(|_| NotUnderstood)?,
            fingerprint: Fingerprint(*fingerprint),
            machine: text(machine)?.parse().map_err(|_| NotUnderstood)?,
            secret: Secret(*secret),
            expires: OffsetDateTime::from_unix_timestamp(i64::from_le_bytes(*expires))
                .map_err(|_| NotUnderstood)?,
        })
    }
}

/// Why a token was not made, listed, revoked or looked up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its file could not be read or written.
    #[error("the tokens are not accessible")]
    Io(#[from] IoError),
    /// Its file does not hold one.
    #[error("{path} holds no token: remove it")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A life that is too short or too long.
    #[error("a token can live from a minute to 30 days")]
    Lifetime,
    /// No such token waits to be used.
    #[error("no token {id} is waiting: `mt-agent token list` shows those that are")]
    NoSuchToken {
        /// What was asked for.
        id: String,
    },
}

/// Why a token is not redeemed.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// No token has this secret: it is wrong, or is long forgotten.
    #[error("the token is unknown here")]
    Unknown,
    /// It was revoked.
    #[error("the token was revoked")]
    Revoked,
    /// Its time is over.
    #[error("the token has expired")]
    Expired,
    /// It was redeemed before.
    #[error("the token was used before")]
    Used,
    /// It could not be looked up or marked as used.
    #[error("the token could not be redeemed")]
    Failed(#[from] Error),
}

impl From<IoError> for Refusal {
    fn from(error: IoError) -> Refusal {
        Refusal::Failed(error.into())
    }
}

/// What is kept of a token.
#[derive(Serialize, Deserialize)]
struct Record {
    machine: Name,
    #[serde(with = "hex")]
    secret_sha256: [u8; 32],
    #[serde(with = "time::serde::rfc3339")]
    created: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    expires: OffsetDateTime,
}

/// 32 bytes as hexadecimal digits.
mod hex {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8; 32], to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&super::Fingerprint(*bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(from)?;
        let bad = || D::Error::custom("expected 64 hexadecimal digits");
        if text.len() != 64 || !text.is_ascii() {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
            *byte = text.get(at..at + 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()).ok_or_else(bad)?;
        }
        Ok(bytes)
    }
}

/// How it stands with a token.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It can be used.
    Waiting,
    /// It was used.
    Used,
    /// It was not used in its time.
    Expired,
    /// It was made unusable.
    Revoked,
}

/// One token of a list.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Entry {
    /// What names it: 16 hexadecimal digits. They come from the digest of the secret and give nothing away.
    pub id: String,
    /// The machine that may enrol with it.
    pub machine: Name,
    /// How it stands.
    pub state: State,
    /// When it was made.
    #[serde(with = "time::serde::rfc3339")]
    pub created: OffsetDateTime,
    /// Until when it can be used.
    #[serde(with = "time::serde::rfc3339")]
    pub expires: OffsetDateTime,
}

/// The tokens of a server, on disk. Several processes may work on them at once. Everything here blocks.
#[derive(Clone, Debug)]
pub struct TokenStore {
    dir: PathBuf,
}

impl TokenStore {
    /// The tokens under `state_dir`; nothing is touched yet.
    pub fn new(state_dir: &Path) -> TokenStore {
        TokenStore { dir: state_dir.join("tokens") }
    }

    fn used_dir(&self) -> PathBuf {
        self.dir.join("used")
    }

    fn revoked_dir(&self) -> PathBuf {
        self.dir.join("revoked")
    }

    /// Makes a token for `machine` that lives for `life`, and forgets those that are long over.
    ///
    /// # Errors
    /// [`Error::Lifetime`] and [`Error::Io`].
    pub fn create(
        &self,
        machine: Name,
        life: Duration,
        address: Address,
        fingerprint: Fingerprint,
        now: OffsetDateTime,
    ) -> Result<Token, Error> {
        if !LIFE.contains(&life) {
            return Err(Error::Lifetime);
        }
        self.prune(now)?;
        durable::private_dir(&self.used_dir())?;
        let secret = Secret::random()
            .map_err(|error| IoError::new("take random bytes for", self.dir.display().to_string(), error))?;
        // Whole seconds, as the token's text has them.
        let created = now.replace_nanosecond(0).unwrap_or(now);
        let expires = created + life;
        let record = Record { machine: machine.clone(), secret_sha256: secret.digest(), created, expires };
        let path = self.dir.join(file_name(&record.secret_sha256));
        let text = serde_json::to_vec_pretty(&record)
            .map_err(|source| Error::Corrupt { path: path.clone(), source })?;
        durable::write(&path, &text, 0o600)?;
        Ok(Token { address, fingerprint, machine, secret, expires })
    }

    /// Looks a secret up without using it up.
    ///
    /// # Errors
    /// Why it cannot be redeemed.
    pub fn find(&self, secret: &Secret, now: OffsetDateTime) -> Result<Redeemable, Refusal> {
        let digest = secret.digest();
        let name = file_name(&digest);
        let from = self.dir.join(&name);
        let to = self.used_dir().join(&name);
        let Some(record) = read(&from)? else {
            for (path, refusal) in [(&to, Refusal::Used), (&self.revoked_dir().join(&name), Refusal::Revoked)]
            {
                if read(path)?.is_some_and(|record| same(&record.secret_sha256, &digest)) {
                    return Err(refusal);
                }
            }
            return Err(Refusal::Unknown);
        };
        // The name holds a part of the digest only.
        if !same(&record.secret_sha256, &digest) {
            return Err(Refusal::Unknown);
        }
        if now >= record.expires {
            return Err(Refusal::Expired);
        }
        Ok(Redeemable { from, to, machine: record.machine })
    }

    /// Uses a secret up: [`TokenStore::find`] and [`Redeemable::redeem`].
    ///
    /// # Errors
    /// Why it is not redeemed.
    pub fn redeem(&self, secret: &Secret, now: OffsetDateTime) -> Result<Name, Refusal> {
        self.find(secret, now)?.redeem()
    }

    /// All tokens that are remembered, the oldest first. A file that holds no token is logged and passed over.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn list(&self, now: OffsetDateTime) -> Result<Vec<Entry>, Error> {
        let mut entries = Vec::new();
        let dirs = [
            (self.dir.clone(), State::Waiting),
            (self.used_dir(), State::Used),
            (self.revoked_dir(), State::Revoked),
        ];
        for (dir, state) in dirs {
            for (path, record) in records(&dir)? {
                let state = match state {
                    State::Waiting if now >= record.expires => State::Expired,
                    state => state,
                };
                let id = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                let Record { machine, created, expires, .. } = record;
                entries.push(Entry { id, machine, state, created, expires });
            }
        }
        entries.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        Ok(entries)
    }

    /// Makes a token that waits unusable, and says whose it was.
    ///
    /// # Errors
    /// [`Error::NoSuchToken`] where none waits under this `id`.
    pub fn revoke(&self, id: &str) -> Result<Name, Error> {
        let no_such = || Error::NoSuchToken { id: id.escape_debug().to_string() };
        if id.len() != 16 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(no_such());
        }
        let name = format!("{}.json", id.to_ascii_lowercase());
        let from = self.dir.join(&name);
        let machine = read(&from)?.ok_or_else(no_such)?.machine;
        let kept = durable::private_dir(&self.revoked_dir())
            .and_then(|()| durable::rename(&from, &self.revoked_dir().join(&name)));
        // On a full disk it cannot be remembered, and can be ended all the same.
        match kept.or_else(|_| durable::remove(&from)) {
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => Err(no_such()),
            result => Ok(result.map(|()| machine)?),
        }
    }

    /// Forgets what expired long ago.
    fn prune(&self, now: OffsetDateTime) -> Result<(), Error> {
        for dir in [self.dir.clone(), self.used_dir(), self.revoked_dir()] {
            for (path, record) in records(&dir)? {
                if now - record.expires < REMEMBERED {
                    continue;
                }
                match durable::remove(&path) {
                    // Another process was at it too.
                    Err(error) if error.source.kind() == io::ErrorKind::NotFound => {}
                    result => result?,
                }
            }
        }
        Ok(())
    }
}

/// A token that was found, and is good at this moment.
#[derive(Debug)]
pub struct Redeemable {
    from: PathBuf,
    to: PathBuf,
    machine: Name,
}

impl Redeemable {
    /// The machine that may enrol with it.
    pub fn machine(&self) -> &Name {
        &self.machine
    }

    /// Uses the token up. After `Ok`, durably, nobody else gets it.
    ///
    /// # Errors
    /// [`Refusal::Used`] where another was faster, [`Refusal::Failed`] where it could not be made durable: then nothing
    /// may be issued.
    pub fn redeem(self) -> Result<Name, Refusal> {
        match durable::rename(&self.from, &self.to) {
            Ok(()) => Ok(self.machine),
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => Err(Refusal::Used),
            Err(error) => Err(error.into()),
        }
    }
}

fn file_name(digest: &[u8; 32]) -> String {
    let id: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("{id}.json")
}

fn read(path: &Path) -> Result<Option<Record>, Error> {
    match durable::read(path, 4096) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(record) => Ok(Some(record)),
            Err(source) => Err(Error::Corrupt { path: path.to_owned(), source }),
        },
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn records(dir: &Path) -> Result<Vec<(PathBuf, Record)>, Error> {
    let failed = |error| Error::Io(IoError::new("list", dir.display().to_string(), error));
    let listing = match fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut records = Vec::new();
    for entry in listing {
        let path = entry.map_err(failed)?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if hidden || path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match read(&path) {
            Ok(record) => records.extend(record.map(|record| (path, record))),
            Err(Error::Corrupt { path, source }) => {
                tracing::warn!(path = %path.display(), error = %source, "a file holds no token and is passed over");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2024-02-29 12:00 UTC);

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn store() -> (tempfile::TempDir, TokenStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = TokenStore::new(dir.path());
        (dir, store)
    }

    fn created(store: &TokenStore, now: OffsetDateTime) -> Token {
        let address = "mt.example.org".parse().unwrap();
        store.create(name("web-01"), Duration::hours(1), address, Fingerprint([7; 32]), now).unwrap()
    }

    #[test]
    fn the_text_is_one_word_and_comes_back() {
        let (_dir, store) = store();
        let token = created(&store, NOW + Duration::nanoseconds(5));
        let text = token.to_string();
        assert!(text.starts_with("mtt1.") && !text.contains(char::is_whitespace), "{text}");
        assert_eq!(text.parse::<Token>().unwrap(), token);
        assert_eq!(format!(" {text}\n").parse::<Token>().unwrap(), token);
        assert_eq!(token.expires, NOW + Duration::hours(1));
        assert_eq!(Secret::from_base64(&token.secret.to_base64()), Some(token.secret));
    }

    #[test]
    fn a_typo_is_told_from_another_thing_and_from_another_version() {
        let (_dir, store) = store();
        let text = created(&store, NOW).to_string();
        assert_eq!("".parse::<Token>(), Err(ParseTokenError::NotAToken));
        assert_eq!("mtt2.AAAA".parse::<Token>(), Err(ParseTokenError::NotAToken));
        for cut in PREFIX.len()..text.len() {
            assert_eq!(text[..cut].parse::<Token>(), Err(ParseTokenError::Damaged), "cut at {cut}");
        }
        let long = format!("{PREFIX}{}", "A".repeat(1 << 20));
        assert_eq!(long.parse::<Token>(), Err(ParseTokenError::Damaged));
        let sealed = |mut bytes: Vec<u8>| {
            bytes.extend(crc32c(&bytes).to_le_bytes());
            format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes)).parse::<Token>()
        };
        let mut bytes = vec![0; 72];
        for rest in [
            &b""[..],
            b"\x05web",
            b"\x03web",
            b"\x03web:1",
            b"\x03w/bhost",
            b"\x00host",
            b"\x03\xff\xff\xffh",
        ] {
            bytes.truncate(72);
            bytes.extend_from_slice(rest);
            assert_eq!(sealed(bytes.clone()), Err(ParseTokenError::NotUnderstood), "{rest:?}");
        }
        bytes.truncate(72);
        bytes.extend_from_slice(b"\x03webhost");
        assert!(sealed(bytes.clone()).is_ok());
        bytes[64..72].copy_from_slice(&i64::MAX.to_le_bytes());
        assert_eq!(sealed(bytes), Err(ParseTokenError::NotUnderstood));
    }

    #[test]
    fn a_token_is_redeemed_once() {
        let (_dir, store) = store();
        let token = created(&store, NOW);
        let other = created(&store, NOW);
        assert_eq!(store.redeem(&token.secret, NOW).unwrap(), name("web-01"));
        assert!(matches!(store.redeem(&token.secret, NOW), Err(Refusal::Used)));
        // After its time it is still known as used.
        assert!(matches!(store.redeem(&token.secret, NOW + Duration::days(1)), Err(Refusal::Used)));
        assert!(store.redeem(&other.secret, NOW).is_ok());
    }

    #[test]
    fn the_end_of_its_life_is_exact() {
        let (_dir, store) = store();
        let token = created(&store, NOW);
        assert!(matches!(store.find(&token.secret, token.expires), Err(Refusal::Expired)));
        assert!(store.find(&token.secret, token.expires - Duration::nanoseconds(1)).is_ok());
        let make = |life| {
            let address = "mt.example.org".parse().unwrap();
            store.create(name("a"), life, address, Fingerprint([0; 32]), NOW)
        };
        for life in
            [Duration::ZERO, -Duration::HOUR, Duration::seconds(59), Duration::days(30) + Duration::SECOND]
        {
            assert!(matches!(make(life), Err(Error::Lifetime)));
        }
    }

    #[test]
    fn a_secret_that_only_begins_alike_is_unknown() {
        let (dir, store) = store();
        let token = created(&store, NOW);
        let path = dir.path().join("tokens").join(file_name(&token.secret.digest()));
        // The file's name stays, the digest within differs in its last byte.
        let mut record = read(&path).unwrap().unwrap();
        record.secret_sha256[31] ^= 1;
        fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
        assert!(matches!(store.redeem(&token.secret, NOW), Err(Refusal::Unknown)));
        assert!(matches!(store.redeem(&Secret([0; 32]), NOW), Err(Refusal::Unknown)));
    }

    #[test]
    fn of_many_that_race_one_wins() {
        for _ in 0..20 {
            let (_dir, store) = store();
            let token = created(&store, NOW);
            let start = std::sync::Barrier::new(8);
            let results: Vec<_> = std::thread::scope(|scope| {
                let race = || {
                    let found = store.find(&token.secret, NOW).unwrap();
                    // All of them have found it before the first redeems it.
                    start.wait();
                    found.redeem()
                };
                let racers: Vec<_> = (0..8).map(|_| scope.spawn(race)).collect();
                racers.into_iter().map(|racer| racer.join().unwrap()).collect()
            });
            assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
            assert_eq!(results.iter().filter(|result| matches!(result, Err(Refusal::Used))).count(), 7);
        }
    }

    #[test]
    fn what_cannot_be_marked_as_used_is_not_redeemed() {
        let (dir, store) = store();
        let token = created(&store, NOW);
        let used = dir.path().join("tokens/used");
        fs::remove_dir(&used).unwrap();
        fs::write(&used, "in the way").unwrap();
        assert!(matches!(store.redeem(&token.secret, NOW), Err(Refusal::Failed(_))));
        fs::remove_file(&used).unwrap();
        fs::create_dir(&used).unwrap();
        assert!(store.redeem(&token.secret, NOW).is_ok());
    }

    #[test]
    fn the_list_says_how_it_stands_and_revoking_ends_it() {
        let (dir, store) = store();
        assert_eq!(store.list(NOW).unwrap(), []);
        let [used, expired] =
            [created(&store, NOW - Duration::hours(2)), created(&store, NOW - Duration::hours(1))];
        store.redeem(&used.secret, NOW - Duration::hours(2)).unwrap();
        let waiting = created(&store, NOW);
        fs::write(dir.path().join("tokens/broken.json"), "{").unwrap();
        fs::write(dir.path().join("tokens/.crashed.json"), "{}").unwrap();
        let list = store.list(NOW).unwrap();
        let states: Vec<State> = list.iter().map(|entry| entry.state).collect();
        assert_eq!(states, [State::Used, State::Expired, State::Waiting]);
        for bad in ["", "../tls/ca", "0000000000000000", &list[0].id] {
            assert!(matches!(store.revoke(bad), Err(Error::NoSuchToken { .. })), "{bad}");
        }
        assert_eq!(store.revoke(&list[2].id.to_uppercase()).unwrap(), name("web-01"));
        assert!(matches!(store.redeem(&waiting.secret, NOW), Err(Refusal::Revoked)));
        assert_eq!(store.list(NOW).unwrap()[2].state, State::Revoked);
        assert!(matches!(store.revoke(&list[2].id), Err(Error::NoSuchToken { .. })));
        // Where it cannot be remembered it is ended all the same.
        let other = created(&store, NOW);
        let id =
            store.list(NOW).unwrap().iter().find(|entry| entry.state == State::Waiting).unwrap().id.clone();
        let revoked = dir.path().join("tokens/revoked");
        fs::remove_dir_all(&revoked).unwrap();
        fs::write(&revoked, "in the way").unwrap();
        store.revoke(&id).unwrap();
        fs::remove_file(&revoked).unwrap();
        assert!(matches!(store.redeem(&other.secret, NOW), Err(Refusal::Unknown)));
        assert!(matches!(store.redeem(&expired.secret, NOW), Err(Refusal::Expired)));
    }

    #[test]
    fn what_is_long_over_is_forgotten() {
        let (_dir, store) = store();
        let [used, expired] = [created(&store, NOW), created(&store, NOW)];
        store.redeem(&used.secret, NOW).unwrap();
        created(&store, NOW + Duration::hours(1) + REMEMBERED - Duration::SECOND);
        assert_eq!(store.list(NOW).unwrap().len(), 3);
        let waiting =
            store.list(NOW).unwrap().into_iter().find(|entry| entry.state == State::Waiting).unwrap();
        store.revoke(&waiting.id).unwrap();
        let later = NOW + Duration::hours(1) + REMEMBERED;
        created(&store, later);
        assert_eq!(store.list(NOW).unwrap().len(), 2);
        assert!(matches!(store.redeem(&used.secret, NOW), Err(Refusal::Unknown)));
        assert!(matches!(store.redeem(&expired.secret, NOW), Err(Refusal::Unknown)));
    }

    #[test]
    fn the_secret_is_neither_stored_nor_shown() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, store) = store();
        let token = created(&store, NOW);
        let hex: String = token.secret.0.iter().map(|byte| format!("{byte:02x}")).collect();
        let secrets = [hex, token.secret.to_base64()];
        let path = dir.path().join("tokens").join(file_name(&token.secret.digest()));
        let stored = fs::read_to_string(&path).unwrap();
        let shown = format!("{token:?}");
        assert!(secrets.iter().all(|secret| !stored.contains(secret) && !shown.contains(secret)));
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    proptest! {
        #[test]
        fn any_changed_character_is_found(at in 0usize..1000, to in "[A-Za-z0-9_-]") {
            let token = Token {
                address: "192.0.2.7:9443".parse().unwrap(),
                fingerprint: Fingerprint([1; 32]),
                machine: name("db"),
                secret: Secret([2; 32]),
                expires: NOW,
            };
            let mut text = token.to_string();
            let at = at % text.len();
            prop_assume!(text[at..=at] != to);
            text.replace_range(at..=at, &to);
            prop_assert!(text.parse::<Token>().is_err());
        }
    }
}
