//! The rules that nftables.service loads, and one before all others in each chain that would refuse the data port. It has to be
//! in that chain: what one refuses, no `accept` of another table lets in.
//!
//! The configuration is read as text, and only as far as it is the usual: tables with chains in them, and files that are
//! included. Whatever is more than that is told, not guessed at.
//!
//! The rule is in a file of ours, which the last line of the administrator's includes. An error there, and nft loads no rule at
//! all. So it is included with a wildcard: one that is gone is none. And table and chain are added first, which does nothing as
//! long as they are there: the administrator may give them other names.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::tree::MAX_LEN;
use super::{Call, Error, File, Host, Level, Wanted};
use crate::error::{IoError, chain};

const OURS: &str = "/etc/nftables/mt-agent.nft";
const INCLUDE: &str = "include \"/etc/nftables/mt-agent.nf[t]\"";
const COMMENT: &str = "\"mt-agent\"";
/// What a file that is included counts at least, of [`MAX_LEN`] for all: they may go round in a circle.
const MIN_LEN: u64 = 64 << 10;

/// A chain: family, table, name.
pub(super) type Chain = [String; 3];

pub(super) fn wanted(host: &Host, wanted: &mut Wanted) -> Result<(), Error> {
    let port = host.places.port;
    let unit = host.unit("nftables.service").map(|unit| host.root.text(unit)).transpose()?.flatten();
    let starts = |path: &&str| {
        unit.iter().flat_map(|unit| unit.lines()).any(|line| line.ends_with(&format!(" -f {path}")))
    };
    // On EL, and on Debian.
    let main = ["/etc/sysconfig/nftables.conf", "/etc/nftables.conf"].into_iter().find(starts);
    let Some(main) = main else {
        let what = "what nftables.service loads is not its distribution's configuration";
        wanted.find(Level::Warn, what, format!("let in `tcp dport {port}` in what it loads"));
        return Ok(());
    };
    let text = host.root.read(main)?.unwrap_or_default();
    let lines = || text.split_inclusive(|byte| *byte == b'\n');
    let is_ours = |line: &&[u8]| line.trim_ascii() == INCLUDE.as_bytes();
    let is_included = lines().any(|line| is_ours(&line));

    let mut rules = Rules { host, chains: BTreeMap::new(), others: Vec::new(), len: 0 };
    let loaded = rules.load(Path::new(main));
    let refusing = rules.refusing();
    let rule = |[family, table, chain]: &Chain| {
        format!("insert rule {family} {table} {chain} tcp dport {port} accept")
    };
    match loaded.and_then(|()| alone(host, &refusing)) {
        Ok(()) if refusing.is_empty() => {
            wanted.find(Level::Pass, format!("no rule in {main} refuses anything at hook input"), "");
        }
        Ok(()) if !is_included && rules.speaks_of(port) => {
            wanted.find(Level::Pass, format!("{main} speaks of port {port}"), "");
        }
        Ok(()) => {
            let mut ours = "# Written by `mt-agent setup apply`: the data port is let in before all other rules of the chain.\n\
                            # Table and chain are added for the case that they have other names by now: nothing would load then.\n"
                .to_owned();
            for of in &refusing {
                let [family, table, chain] = of;
                wanted.evidence(format!("{main} has a chain that drops or rejects: {}", of.join(" ")));
                let rule = format!("{} comment {COMMENT}", rule(of));
                ours.push_str(&format!(
                    "add table {family} {table}\nadd chain {family} {table} {chain}\n{rule}\n"
                ));
                let rule: Vec<&str> = rule.split(' ').collect();
                let now = Call::new("nft", &rule, "to have it at once").only_if(OURS);
                wanted.calls.push(Call { chain: Some(of.clone()), ..now });
            }
            wanted.files.push(File::own(OURS, ours));
            let mut with: Vec<u8> = lines().filter(|line| !is_ours(line)).flatten().copied().collect();
            if with.last().is_some_and(|last| *last != b'\n') {
                with.push(b'\n');
            }
            with.extend(format!("{INCLUDE}\n").bytes());
            wanted.files.push(File::shared(main, with));
            return Ok(());
        }
        Err(why) => {
            let fix = match refusing.is_empty() {
                true => format!("let in `tcp dport {port}` there, before what refuses it"),
                false => {
                    let rules = refusing.iter().map(rule).collect::<Vec<_>>().join("; ");
                    format!("if nothing lets it in yet, put at the end of {main}: {rules}")
                }
            };
            wanted.find(Level::Warn, format!("whether {main} lets in port {port} is not clear: {why}"), fix);
        }
    }
    if is_included {
        // As it was made: what the administrator has written since would go with it.
        wanted.files.extend(host.root.read(OURS)?.map(|ours| File::own(OURS, ours)));
        wanted.files.push(File::shared(main, text.clone()));
    }
    Ok(())
}

/// Whether a packet meets one of these chains only, and nobody else's.
fn alone(host: &Host, refusing: &[Chain]) -> Result<(), String> {
    let settings = "/etc/systemd/system/nftables.service.d";
    if host.root.exists(settings) {
        return Err(format!("{settings} may have it load others too"));
    }
    if let Some(unit) = ["iptables.service", "ip6tables.service"].iter().find(|unit| host.enabled(unit)) {
        return Err(format!("{unit} is enabled too"));
    }
    let families: Vec<&str> = refusing.iter().map(|[family, ..]| family.as_str()).collect();
    match families[..] {
        [] | [_] | ["ip", "ip6"] => Ok(()),
        _ => Err("several chains drop or reject".to_owned()),
    }
}

type Statement = Vec<String>;

/// What the configuration says, as far as it was read. Errors say why it is not clear.
struct Rules<'a> {
    host: &'a Host,
    chains: BTreeMap<Chain, Vec<Statement>>,
    /// What is said outside of chains.
    others: Vec<Statement>,
    len: u64,
}

impl Rules<'_> {
    fn load(&mut self, path: &Path) -> Result<(), String> {
        let text = self.host.root.text(path).map_err(|error| chain(&error))?.unwrap_or_default();
        self.len += MIN_LEN.max(text.len() as u64);
        if self.len > MAX_LEN {
            return Err("it is too long".to_owned());
        }
        if text.contains("is managed by iptables-nft") {
            return Err("it has tables of iptables".to_owned());
        }
        // The table and the chain that are open, and how many other braces are.
        let (mut open, mut braces) = (Vec::new(), 0_u32);
        let mut words = Statement::new();
        for token in tokens(&text) {
            match token.as_str() {
                "{" => match (&open[..], words.first().map(String::as_str), braces) {
                    ([], Some("table"), 0) | ([_], Some("chain"), 0) => open.push(std::mem::take(&mut words)),
                    _ => braces += 1,
                },
                "}" if braces > 0 => braces -= 1,
                "\n" | ";" if braces > 0 => {}
                "\n" | ";" => self.statement(&open, std::mem::take(&mut words))?,
                "}" => {
                    self.statement(&open, std::mem::take(&mut words))?;
                    open.pop().ok_or("its braces do not match")?;
                }
                _ => words.push(token),
            }
        }
        let is_ended = open.is_empty() && !text.trim_end().ends_with('\\');
        if is_ended && braces == 0 && words.is_empty() {
            Ok(())
        } else {
            Err("its end is missing".to_owned())
        }
    }

    fn statement(&mut self, open: &[Statement], words: Statement) -> Result<(), String> {
        let said: Vec<&str> = words.iter().map(String::as_str).collect();
        match (open, &said[..]) {
            (_, []) => return Ok(()),
            ([table, chain], [first, ..]) if *first != "include" => {
                self.chains.entry(named(table, chain)?).or_default().push(words);
                return Ok(());
            }
            ([], ["include", _]) if said.join(" ") == INCLUDE => return Ok(()),
            ([], ["include", path]) => return self.include(path.trim_matches('"')),
            ([], ["table" | "define" | "redefine" | "undefine" | "flush", ..])
            | ([], ["add" | "create" | "delete" | "destroy", "table", ..]) => {}
            ([_], [first, ..]) if *first != "include" => {}
            _ => return Err(format!("`{}` is not understood", said.join(" "))),
        }
        if said.contains(&"hook") {
            return Err(format!("`{}` is not understood", said.join(" ")));
        }
        self.others.push(words);
        Ok(())
    }

    /// An absolute path, or one in `/etc`; a dot at its beginning would be the directory that nft was started in.
    fn include(&mut self, named: &str) -> Result<(), String> {
        let path = Path::new("/etc").join(named);
        if named.starts_with('.') || named.ends_with('/') || named.contains(['*', '?', '[', '$']) {
            return Err(format!("`include \"{named}\"` may mean several files"));
        }
        if self.host.root.exists(&path) { self.load(&path) } else { Err(format!("{named} is not there")) }
    }

    /// The chains at hook input that would drop or reject, of IPv4 and IPv6.
    fn refusing(&self) -> Vec<Chain> {
        // In a map of verdicts there may be no blank before the word.
        let has = |said: &[Statement], any: [&str; 2]| {
            said.iter().flatten().any(|word| word.rsplit(':').next().is_some_and(|word| any.contains(&word)))
        };
        let is_input =
            |words: &Statement| words.starts_with(&["type", "filter", "hook", "input"].map(String::from));
        let beside = |[family, table, _]: &Chain| {
            let same = self.chains.iter().filter(|([f, t, _], _)| (f, t) == (family, table));
            same.filter(|(_, said)| !has(said, ["hook", "hook"]))
                .any(|(_, said)| has(said, ["drop", "reject"]))
        };
        let refuses = |chain: &Chain, said: &[Statement]| {
            has(said, ["drop", "reject"]) || (has(said, ["jump", "goto"]) && beside(chain))
        };
        let input = self.chains.iter().filter(|([family, ..], said)| {
            ["inet", "ip", "ip6"].contains(&family.as_str()) && said.iter().any(is_input)
        });
        input.filter(|(chain, said)| refuses(chain, said)).map(|(chain, _)| chain.clone()).collect()
    }

    /// Whether the administrator has thought of a port. A rule of ours in rules that were saved is none of his.
    fn speaks_of(&self, port: u16) -> bool {
        let mut all = self.chains.values().flatten().chain(&self.others);
        all.any(|words| {
            words.iter().all(|word| word != COMMENT) && words.iter().any(|word| word.parse() == Ok(port))
        })
    }
}

/// What a chain is called. A name that is not plain may be a variable.
fn named(table: &[String], chain: &[String]) -> Result<Chain, String> {
    let ip = "ip".to_owned();
    let (names, [_, chain]) = (table, chain) else { return Err("a chain without a name".to_owned()) };
    let names = match names {
        [_, table] => [&ip, table, chain],
        [_, family, table] => [family, table, chain],
        _ => return Err(format!("`{}` is not understood", table.join(" "))),
    };
    let is_plain = |name: &String| {
        name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
    };
    match names.iter().find(|name| !is_plain(name)) {
        Some(name) => Err(format!("the name `{name}` is not understood")),
        None => Ok(names.map(String::clone)),
    }
}

/// Words, strings with their quotes, and what stands between statements; the last one is always ended.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut word = String::new();
    let mut chars = text.chars().chain(['\n']).peekable();
    while let Some(c) = chars.next() {
        let token = match c {
            '\\' if chars.next_if_eq(&'\n').is_some() => None,
            '#' => chars.find(|c| *c == '\n').map(String::from),
            '"' => Some(format!("\"{}\"", chars.by_ref().take_while(|c| *c != '"').collect::<String>())),
            '{' | '}' | ';' | '\n' => Some(c.to_string()),
            c if c.is_whitespace() || c == ',' => None,
            c => {
                word.push(c);
                continue;
            }
        };
        tokens.extend([std::mem::take(&mut word)].into_iter().filter(|word| !word.is_empty()).chain(token));
    }
    tokens
}

/// What takes our rules out of a chain as the kernel has it; none where it has no such chain.
pub(super) fn ours(of: &Chain) -> Result<Option<Vec<Call>>, Error> {
    let [family, table, name] = of;
    let list = Call::new(
        "nft",
        &["--json", "list", "chain", family, table, name],
        "to find the rules that are there",
    );
    let failed = |why: String| Error::Call { call: Box::new(list.clone()), why };
    let output =
        list.command().output().map_err(|error| failed(chain(&IoError::new("run", "nft", error))))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && said.contains("No such file or directory") {
        return Ok(None);
    }
    let listed: Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| failed(format!("{}: {error}: {}", output.status, said.trim())))?;
    let rules = listed["nftables"].as_array().into_iter().flatten().map(|object| &object["rule"]);
    let rules = rules.filter(|rule| rule["comment"] == COMMENT.trim_matches('"'));
    let remove = rules.filter_map(|rule| rule["handle"].as_u64()).map(|handle| {
        let args = ["delete", "rule", family, table, name, "handle", &handle.to_string()];
        Call::new("nft", &args, "to take away the rule that was there")
    });
    Ok(Some(remove.collect()))
}
