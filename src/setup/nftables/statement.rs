//! A statement of nftables' language, and what it may do to a packet for the port.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

/// What may keep a packet away, or have it go elsewhere.
const DIVERTS: [&str; 9] =
    ["drop", "reject", "queue", "vmap", "redirect", "dnat", "tproxy", "synproxy", "fwd"];
/// What has the rest of a chain passed over. In one at a hook the policy follows.
pub(super) const LEAVES: [&str; 2] = ["goto", "return"];
/// Bytes of a packet, which may be any of its fields.
const RAW: [&str; 4] = ["@th", "@nh", "@ll", "@ih"];
/// What operators are made of. One needs no blank around it.
const OPERATORS: &str = "!=<>&|^";
/// Those that are words, but for `eq`.
const NAMED: [&str; 11] = ["not", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "lshift", "rshift"];

#[derive(Default)]
pub(super) struct Statement {
    pub(super) at: usize,
    pub(super) words: Vec<String>,
}

impl Statement {
    pub(super) fn has(&self, any: &[&str]) -> bool {
        self.words.iter().any(|word| any.contains(&word.as_str()))
    }

    /// Whether a packet may not come back from it, or what is said may be anything.
    pub(super) fn diverts(&self) -> bool {
        self.has(&DIVERTS) || self.words.iter().any(|word| word.contains('$'))
    }

    /// Whether the rest of its chain may be passed over.
    pub(super) fn leaves(&self, may_jump: bool) -> bool {
        self.has(&LEAVES) || (!may_jump && self.has(&["jump"]))
    }

    /// Whether it only writes down what comes by.
    pub(super) fn only_logs(&self) -> bool {
        self.has(&["log"]) && !self.has(&["accept"]) && !self.diverts() && !self.leaves(false)
    }

    /// Whether it refuses addresses that were blocked, or what belongs to no connection, and nothing else.
    pub(super) fn blocks(&self) -> bool {
        const MORE: [&str; 7] = ["dport", "sport", "th", "proto-dst", "jump", "new", "established"];
        let others: [&[&str]; 5] = [&DIVERTS[2..], &LEAVES, &RAW, &MORE, &NAMED];
        let is_other = others.iter().any(|any| self.has(any));
        let is_any = self.words.iter().any(|word| {
            let is_operator = word.starts_with(|c| OPERATORS.contains(c)) && word != "==";
            is_operator || word.contains('$') || word.ends_with("/0")
        });
        !is_other
            && !is_any
            && (self.has(&["saddr"])
                || self.words.windows(2).any(|two| two == ["ct", "state"]) && self.has(&["invalid"]))
    }

    /// Whether it refuses whatever gets to it.
    pub(super) fn refuses_all(&self) -> bool {
        let mut words = self.words.iter().map(String::as_str);
        while let Some(word) = words.next() {
            match word {
                "drop" | "reject" => return true,
                "counter" | "log" => {}
                "packets" | "bytes" | "prefix" | "level" | "group" | "flags" => _ = words.next(),
                _ => return false,
            }
        }
        false
    }

    /// Whether it lets in the port, from everywhere. That is what our line is too.
    pub(super) fn lets_in(&self, port: u16) -> bool {
        let mut left = Vec::new();
        let mut words = self.words.iter().map(String::as_str);
        while let Some(word) = words.next() {
            match word {
                "counter" => {}
                "packets" | "bytes" | "comment" => _ = words.next(),
                word => left.push(word),
            }
        }
        let left = left.strip_prefix(&["ct", "state", "new"]).unwrap_or(&left);
        let has_it = |word: &&str| ports(word).is_some_and(|ports| ports.contains(&port.into()));
        match left {
            ["tcp", "dport", "{", ports @ .., "}", "accept"] => {
                ports.iter().any(has_it) && !ports.contains(&"}")
            }
            ["tcp", "dport", only, "accept"] => has_it(only),
            _ => false,
        }
    }

    /// Whether it may mean the port: it names it, alone or among others, or is about ports in a way that is not read.
    pub(super) fn speaks_of(&self, port: u16, services: &BTreeSet<String>) -> bool {
        // What comes before ports.
        let before: &[&str] = match self.words.first().map(String::as_str) {
            Some("set" | "map") => match self.has(&["inet_service", "dport", "sport", "proto-dst"]) {
                true => &["="],
                false => &[],
            },
            _ => &["dport", "proto-dst"],
        };
        let words = self.words.iter().filter(|word| !word.starts_with('"')).map(String::as_str);
        let text = words.collect::<Vec<_>>().join(" ").replace(':', " ");
        let (mut is_port, mut are_several) = (false, false);
        for word in text.replace("- ", "-").replace(" -", "-").split_whitespace() {
            let ports = ports(word);
            if ports.as_ref().is_some_and(|ports| ports.contains(&port.into())) {
                return true;
            }
            match word {
                _ if before.contains(&word) => is_port = true,
                "{" if is_port => are_several = true,
                "}" => (is_port, are_several) = (false, false),
                _ if is_port => {
                    // A set by its name is looked at where it is made.
                    let is_known = ports.is_some() || services.contains(word) || word.starts_with('@');
                    if !is_known {
                        return true;
                    }
                    is_port = are_several;
                }
                _ => {}
            }
        }
        is_port || self.has(&RAW)
    }
}

/// The ports that a word means, `9443` or `9000-9999`, where it is of numbers.
fn ports(word: &str) -> Option<RangeInclusive<u32>> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        // Octal, for nft.
        None if text.len() > 1 && text.starts_with('0') => None,
        None => text.parse().ok(),
    };
    let (first, last) = word.split_once('-').unwrap_or((word, word));
    Some(number(first)?..=number(last)?)
}

/// Words, operators, strings with their quotes, and what stands between statements; each with its place. The last one is always
/// ended.
pub(super) fn tokens(text: &str) -> Vec<(usize, String)> {
    let mut tokens = Vec::new();
    let (mut start, mut word) = (0, String::new());
    let mut chars = text.char_indices().chain([(text.len(), '\n')]).peekable();
    while let Some((at, c)) = chars.next() {
        let token = match c {
            '#' => chars.find(|(_, c)| *c == '\n').map(|(at, c)| (at, c.to_string())),
            '"' => {
                let inside = chars.by_ref().map(|(_, c)| c).take_while(|c| *c != '"');
                Some((at, format!("\"{}\"", inside.collect::<String>())))
            }
            '{' | '}' | ';' | '\n' => Some((at, c.to_string())),
            // No blank for nft, or one that joins lines.
            '\\' | '\r' => Some((at, "\\".to_owned())),
            ' ' | '\t' | ',' => None,
            c if OPERATORS.contains(c) => {
                let mut operator = c.to_string();
                while let Some((_, c)) = chars.next_if(|(_, c)| OPERATORS.contains(*c)) {
                    operator.push(c);
                }
                Some((at, operator))
            }
            c => {
                if word.is_empty() {
                    start = at;
                }
                word.push(c);
                continue;
            }
        };
        if !word.is_empty() {
            tokens.push((start, std::mem::take(&mut word)));
        }
        tokens.extend(token);
    }
    tokens
}
