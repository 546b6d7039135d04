//! The rules that nftables.service loads, and a line for the data port in the administrator's own chain that would refuse it,
//! before its last word. What he refuses before that, as addresses that he blocks, stays refused; and wherever he moves the
//! chain, the line goes with it.
//!
//! The configuration is read as text, and only as far as it is of the usual shape. Whatever is more than that is told and not
//! touched: a wrong guess opens a host, or closes it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::network::other_firewall;
use super::{File, Host, Level, Wanted};
use crate::error::chain;

mod statement;

use statement::{LEAVES, Statement, tokens};

/// On EL, and on Debian.
const MAIN: [&str; 2] = ["/etc/sysconfig/nftables.conf", "/etc/nftables.conf"];
/// What is beside the unit, or in its place, has a say in what is loaded.
const BESIDE: [&str; 9] = [
    "/etc/systemd/system/nftables.service.d",
    "/etc/systemd/system/service.d",
    "/etc/systemd/system.control/nftables.service.d",
    "/run/systemd/system/nftables.service.d",
    "/usr/local/lib/systemd/system/nftables.service.d",
    "/usr/lib/systemd/system/nftables.service.d",
    "/lib/systemd/system/nftables.service.d",
    "/run/systemd/system/nftables.service",
    "/usr/local/lib/systemd/system/nftables.service",
];
/// More than a configuration of the usual shape has. nft has no such limit, but for how deep one includes another.
const MAX_FILES: usize = 16;

pub(super) fn wanted(host: &Host, wanted: &mut Wanted) {
    let port = host.places.port;
    let mut rules = Rules { services: services(host, port), ..Rules::default() };
    let loaded = main(host).and_then(|main| rules.load(host, Path::new(main)));
    rules.clear(loaded);
    let refusing = rules.refusing();
    let due = rules.due(&refusing, port);
    let names: Vec<String> = refusing.iter().map(|name| name.join(" ")).collect();
    let names = short(&names.join(" and "));
    // All of them, also as they are: the line may have been in one before the administrator moved it.
    let mut is_written = false;
    for (at, Source { path, before, text }) in rules.sources.iter().enumerate() {
        let new = due.as_ref().map_or(before.clone(), |due| {
            // From the end, so that the places before stay where they are.
            let here = due.iter().rev().filter(|place| place.source == at);
            here.fold(text.clone(), |text, place| place.with(&text, &rule(port))).into_bytes()
        });
        is_written |= new != *before;
        wanted.files.push(File::shared(path, new).line(rule(port)));
    }
    match &due {
        Ok(_) if refusing.is_empty() => {
            wanted.find(Level::Pass, "no rule of nftables refuses anything at hook input", "");
        }
        Ok(_) => {
            wanted.evidence(format!("nftables refuses what it does not know in {names}"));
            if !is_written {
                let what =
                    format!("the rules of nftables let in port {port} once nftables.service has loaded them");
                wanted.find(Level::Pass, what, "");
            } else if host.is_live() {
                wanted.find(
                    Level::Warn,
                    format!("the line for port {port} is in effect when nftables.service has loaded it"),
                    "systemctl reload nftables.service, by which rules that others made at run time are lost; or reboot",
                );
            }
        }
        Err(why) => {
            let place = if names.is_empty() { "the chain at hook input" } else { &names };
            wanted.find(
                Level::Warn,
                format!("whether the rules of nftables let in port {port} is not clear: {why}"),
                format!(
                    "if nothing lets it in yet, put `tcp dport {port} accept` into {place} before what refuses it, then systemctl \
                     reload nftables.service"
                ),
            );
        }
    }
    // Also in files to which the way is not known any more: they may be loaded as before.
    wanted.lines_stay = due.is_err();
    wanted.lasts = Some(format!(
        "the rules that are loaded may let in port {port} until systemctl reload nftables.service, or a reboot"
    ));
}

fn rule(port: u16) -> String {
    format!("tcp dport {port} accept comment \"mt-agent\"")
}

fn is_ours(line: &str) -> bool {
    let port = line.trim().strip_prefix("tcp dport ").and_then(|line| line.split(' ').next()?.parse().ok());
    port.is_some_and(|port| line.trim() == rule(port))
}

/// The names by which the host knows other ports than this one.
fn services(host: &Host, port: u16) -> BTreeSet<String> {
    let text = host.root.text("/etc/services").ok().flatten().unwrap_or_default();
    let (mut ours, mut others) = (BTreeSet::new(), BTreeSet::new());
    for line in text.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let (name, number) = (words.next(), words.next().and_then(|number| number.split('/').next()));
        if let Some(number) = number.and_then(|number| number.parse::<u16>().ok()) {
            let names = if number == port { &mut ours } else { &mut others };
            names.extend(name.into_iter().chain(words).map(str::to_owned));
        }
    }
    &others - &ours
}

/// The file that nftables.service loads, where it is its distribution's and nobody else has a say.
fn main(host: &Host) -> Result<&'static str, String> {
    if let Some(unit) = other_firewall(host) {
        return Err(format!("{unit} is enabled too"));
    }
    if let Some(path) = BESIDE.iter().find(|path| host.root.exists(path)) {
        return Err(format!("{path} may have it load others too"));
    }
    let unit = host.unit("nftables.service").map(|unit| host.root.text(unit)).transpose();
    let unit = unit.map_err(|error| chain(&error))?.flatten().unwrap_or_default();
    let settings = unit.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';']));
    let starts: Vec<&str> = settings.filter(|line| line.starts_with("ExecStart")).collect();
    let start = match starts[..] {
        [start] if !unit.contains('\\') => start.strip_prefix("ExecStart=").unwrap_or_default(),
        _ => "",
    };
    let path = match start.split_whitespace().collect::<Vec<_>>()[..] {
        [nft, "-f", path] if nft.ends_with("nft") => path,
        _ => "",
    };
    let why = "what nftables.service loads is not its distribution's configuration";
    MAIN.into_iter().find(|main| *main == path).ok_or_else(|| why.to_owned())
}

/// A file that is loaded: as it is, and with the port of today in our line.
struct Source {
    path: PathBuf,
    before: Vec<u8>,
    text: String,
}

/// A chain, and where it stands.
struct Chain {
    source: usize,
    end: usize,
    statements: Vec<Statement>,
}

/// Where a line is due: before this, at the indentation of that.
struct Place {
    source: usize,
    at: usize,
    neighbour: usize,
}

impl Place {
    fn with(&self, text: &str, rule: &str) -> String {
        let line = |at: usize| text[..at].rfind('\n').map_or(0, |end| end + 1);
        let blanks = |at: usize| {
            let line = &text[line(at)..];
            &line[..line.len() - line.trim_start_matches([' ', '\t']).len()]
        };
        let indent = blanks(self.neighbour);
        let (before, after) = text.split_at(self.at);
        match before[line(self.at)..].trim().is_empty() {
            true => format!("{}{indent}{rule}\n{}", &text[..line(self.at)], &text[line(self.at)..]),
            false => format!("{before}\n{indent}\t{rule}\n{indent}{after}"),
        }
    }
}

/// What the configuration says.
#[derive(Default)]
struct Rules {
    sources: Vec<Source>,
    /// By family and table; the chains by their names too.
    tables: BTreeSet<Vec<String>>,
    chains: BTreeMap<Vec<String>, Chain>,
    /// What is said outside of chains.
    others: Vec<Statement>,
    /// The names of services that are at other ports.
    services: BTreeSet<String>,
    /// What was met first that is not of the usual shape.
    unclear: Option<String>,
}

impl Rules {
    /// Reading goes on after what is not clear: a file that has our line already must be found.
    fn clear(&mut self, is: Result<(), String>) {
        if let Err(why) = is {
            self.unclear.get_or_insert(why);
        }
    }

    fn load(&mut self, host: &Host, path: &Path) -> Result<(), String> {
        let real = host.root.real(path).map_err(|error| chain(&error))?;
        let before = host.root.read(&real).map_err(|error| chain(&error))?;
        let before = before.ok_or_else(|| format!("{} is not there", path.display()))?;
        if self.sources.len() == MAX_FILES || self.sources.iter().any(|source| source.path == real) {
            return Err(format!(
                "{} is included twice, or is one of more than {MAX_FILES} files",
                path.display()
            ));
        }
        let text = String::from_utf8_lossy(&before);
        if text.len() != before.len() || text.contains("is managed by iptables-nft") {
            self.clear(Err(format!("{} has tables of iptables, or is no text", path.display())));
        }
        let now = rule(host.places.port);
        let lines = text.split_inclusive('\n');
        let lines =
            lines.map(|line| if is_ours(line) { line.replace(line.trim(), &now) } else { line.to_owned() });
        let text: String = lines.collect();
        let tokens = tokens(&text);
        let source = self.sources.len();
        self.sources.push(Source { path: real, before, text });

        // The family and table and the chain that are open, and how many other braces are.
        let (mut open, mut braces) = (Vec::new(), 0_u32);
        let mut said = Statement::default();
        for (at, token) in tokens {
            if said.words.is_empty() {
                said.at = at;
            }
            let kind = said.words.first().map(String::as_str).filter(|_| braces == 0);
            match (token.as_str(), open.len(), kind) {
                ("{", 0, Some("table")) => {
                    open = said.words.split_off(1);
                    if open.len() == 1 {
                        open.insert(0, "ip".to_owned());
                    }
                    let is_new = open.len() == 2 && self.tables.insert(open.clone());
                    self.clear(usual(&open, is_new));
                    open.resize(2, String::new());
                    said.words.clear();
                }
                ("{", 2, Some("chain")) => {
                    open.push(said.words.split_off(1).join(" "));
                    let new = Chain { source, end: 0, statements: Vec::new() };
                    let is_new = self.chains.insert(open.clone(), new).is_none();
                    self.clear(usual(&open, is_new));
                    said.words.clear();
                }
                ("\n" | ";", ..) if braces > 0 => {}
                ("\n" | ";", ..) => self.statement(host, &open, std::mem::take(&mut said)),
                ("}", len, _) if braces == 0 => {
                    self.statement(host, &open, std::mem::take(&mut said));
                    if let Some(chain) = self.chains.get_mut(&open) {
                        chain.end = at;
                    }
                    self.clear(if len > 0 { Ok(()) } else { Err("its braces do not match".to_owned()) });
                    open.truncate(if len > 2 { 2 } else { 0 });
                }
                (mark, len, _) => {
                    braces = braces + u32::from(mark == "{") - u32::from(mark == "}");
                    // A set is ended by its brace, whatever follows in the line.
                    let is_ended = mark == "}" && braces == 0 && len < 3;
                    said.words.push(token);
                    if is_ended {
                        self.statement(host, &open, std::mem::take(&mut said));
                    }
                }
            }
        }
        let is_whole = open.is_empty() && braces == 0 && said.words.is_empty();
        if is_whole { Ok(()) } else { Err("its end is missing".to_owned()) }
    }

    fn statement(&mut self, host: &Host, open: &[String], said: Statement) {
        let words: Vec<&str> = said.words.iter().map(String::as_str).collect();
        let is_understood = !words.contains(&"\\");
        let none_yet = self.tables.is_empty();
        match (open.len(), &words[..]) {
            (_, []) => {}
            (3, [first, ..]) if is_understood && !["include", "define"].contains(first) => {
                self.chains.entry(open.to_vec()).and_modify(|chain| chain.statements.push(said));
            }
            (0, ["include", path]) if is_understood => {
                let path = path.trim_matches('"');
                let is = match path.starts_with('/') && !path.contains(['*', '?', '[', '$']) {
                    true => self.load(host, Path::new(path)),
                    false => Err(format!("`include \"{}\"` may mean several files", short(path))),
                };
                self.clear(is);
            }
            (0, ["flush" | "table", ..] | ["add" | "delete" | "destroy", "table", ..])
                if is_understood && none_yet => {}
            (0, ["define", ..])
            | (2, ["set" | "map" | "counter" | "quota" | "limit" | "ct" | "flowtable" | "comment", ..])
                if is_understood =>
            {
                self.others.push(said);
            }
            _ => self.clear(Err(format!("`{}` is not understood", short(&words.join(" "))))),
        }
    }

    /// The tables that have a chain, at no hook, out of which not every packet comes back.
    fn diverting(&self) -> BTreeSet<&[String]> {
        let own = self.chains.iter().filter(|(_, chain)| chain.bases().next().is_none());
        own.filter(|(_, chain)| chain.statements.iter().any(Statement::diverts))
            .filter_map(|(name, _)| name.get(..2))
            .collect()
    }

    /// The chains at hook input that keep anything away.
    fn refusing(&self) -> Vec<&Vec<String>> {
        let diverting = self.diverting();
        let input = self.chains.iter().filter(|(_, chain)| chain.is_at(&["input"]));
        input
            .filter(|(name, chain)| {
                let may_jump = !diverting.contains(&name[..2]);
                chain.statements.iter().any(|said| said.diverts() || said.leaves(may_jump))
            })
            .map(|(name, _)| name)
            .collect()
    }

    /// Where a line is missing, in the order of the files.
    fn due(&self, refusing: &[&Vec<String>], port: u16) -> Result<Vec<Place>, String> {
        if let Some(why) = &self.unclear {
            return Err(why.clone());
        }
        for (name, chain) in &self.chains {
            if chain.bases().count() > 1 {
                return Err(format!("{} says twice at which hook it is", name.join(" ")));
            }
            let is_known = chain.bases().all(|_| chain.is_at(&["input", "forward"]));
            let passes = |said: &Statement| !said.diverts() && !said.has(&["jump", "goto"]);
            if !(is_known || chain.statements.iter().all(passes)) {
                return Err(format!("{} has its say before or after hook input", name.join(" ")));
            }
        }
        let families: Vec<&str> = refusing.iter().map(|name| name[0].as_str()).collect();
        if !matches!(families[..], [] | ["inet" | "ip" | "ip6"] | ["ip", "ip6"]) {
            return Err("several chains at hook input refuse something".to_owned());
        }
        let diverting = self.diverting();
        let mut places = Vec::new();
        let mut reached = BTreeSet::new();
        for name in refusing {
            let chain = &self.chains[*name];
            let last = chain.last(!diverting.contains(&name[..2]))?;
            // A chain that every packet goes through, to its end.
            let jumps = chain.statements.iter().filter_map(|said| match &said.words[..] {
                [jump, to] if jump == "jump" => Some([&name[..2], std::slice::from_ref(to)].concat()),
                _ => None,
            });
            let whole = jumps.filter(|to| {
                let chain = self.chains.get(to);
                chain.is_some_and(|chain| !chain.statements.iter().any(|said| said.has(&LEAVES)))
            });
            let all: BTreeSet<Vec<String>> = whole.chain([(*name).clone()]).collect();
            let mut said = all.iter().flat_map(|name| &self.chains[name].statements);
            if !said.any(|said| said.lets_in(port)) {
                // What is let in is not written down as refused.
                let rules = &chain.statements[..chain.statements.len() - usize::from(last.is_some())];
                let before = rules.iter().rposition(|said| !said.only_logs()).map_or(0, |at| at + 1);
                let next = chain.statements.get(before);
                let at = next.map_or(chain.end, |next| next.at);
                let neighbour = next.or(chain.statements.last()).map_or(at, |said| said.at);
                places.push(Place { source: chain.source, at, neighbour });
            }
            reached.extend(all);
        }
        let said = self.chains.iter().flat_map(|(name, chain)| {
            chain.statements.iter().filter(|said| !(reached.contains(name) && said.lets_in(port)))
        });
        if let Some(said) = said
            .chain(&self.others)
            .find(|said| said.speaks_of(port, &self.services))
            .filter(|_| !refusing.is_empty())
        {
            return Err(format!("`{}` speaks of it", short(&said.words.join(" "))));
        }
        places.sort_by_key(|place| (place.source, place.at));
        Ok(places)
    }
}

impl Chain {
    /// What puts it at a hook.
    fn bases(&self) -> impl Iterator<Item = &Statement> {
        self.statements.iter().filter(|said| said.words[0] == "type")
    }

    fn is_at(&self, hooks: &[&str]) -> bool {
        self.bases().any(|base| base.words.get(3).is_some_and(|hook| hooks.contains(&hook.as_str())))
    }

    /// Its last word, if it has one: what refuses all that is left. Before that it may refuse what cannot be meant for the port.
    fn last(&self, may_jump: bool) -> Result<Option<&Statement>, String> {
        let of = |kind: &'static str| self.statements.iter().filter(move |said| said.words[0] == kind);
        let last = self.statements.last().filter(|said| said.refuses_all());
        let is_closed = of("policy").any(|said| said.words[1..] == ["drop"]) || last.is_some();
        let is_filter = self.bases().all(|base| base.words.get(1).is_some_and(|word| word == "filter"));
        if !is_closed || !is_filter {
            return Err("what refuses something is not the last of its chain".to_owned());
        }
        let rules = &self.statements[..self.statements.len() - usize::from(last.is_some())];
        let unclear = rules.iter().find(|said| match said.words[0].as_str() {
            "policy" => !["drop", "accept"].contains(&said.words[1..].join(" ").as_str()),
            _ => (said.diverts() || said.leaves(may_jump)) && !said.blocks(),
        });
        match unclear {
            Some(said) => Err(format!("`{}` may refuse it", short(&said.words.join(" ")))),
            None => Ok(last),
        }
    }
}

/// Whether a table or a chain is as it is usually: a name that is not plain may be a variable.
fn usual(names: &[String], is_new: bool) -> Result<(), String> {
    let is_plain = |name: &String| {
        name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
    };
    match is_new && names.iter().all(is_plain) {
        true => Ok(()),
        false => Err(format!("`{}` is there twice, or no plain name", short(&names.join(" ")))),
    }
}

/// As much of it as is shown.
fn short(text: &str) -> String {
    text.chars().take(80).collect()
}
