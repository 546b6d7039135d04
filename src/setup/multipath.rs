//! multipathd makes no map of an assigned disk, nor of the disk that the host boots from: a blacklist by WWID, in a file of
//! its own beside the administrator's `multipath.conf`.
//!
//! A disk that is a map now stays one. If the root lies on it, the host would not boot; and an assigned disk of several paths
//! would be two disks with one identity.

use std::collections::BTreeMap;

use super::devices::Devices;
use super::{Call, Change, Error, File, Host, Level, Wanted};
use crate::disk::discover::Disk;
use crate::disk::id::{DiskId, Kind};

pub(super) const CHANGE: Change = Change {
    name: "multipath",
    about: "multipathd claims neither assigned disks nor the root disk",
    follows_disks: true,
    wanted,
};

const CONFIGURATION: &str = "/etc/multipath.conf";
const SNIPPETS: &str = "/etc/multipath/conf.d";
const NAME: &str = "mt-agent.conf";

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    if !host.program("multipath") && !host.program("multipathd") {
        wanted.find(Level::Pass, "multipath is not installed", "");
        return Ok(wanted);
    }
    let devices = Devices::read(host)?;
    let assigned = match &devices {
        Some(devices) => devices.assigned().clone(),
        None => host.assigned()?,
    };
    let mut named: BTreeMap<DiskId, String> = BTreeMap::new();
    for (id, (machine, disk)) in assigned {
        let title = format!("disk {disk} of machine {machine}");
        let attached = devices.as_ref().and_then(|devices| devices.disk_of(&id));
        if let Some(disk) = attached.filter(|disk| disk.paths.len() > 1) {
            wanted.find(
                Level::Warn,
                format!(
                    "{title} ({id}) has the paths {}, and stays one multipath map",
                    disk.paths.join(", ")
                ),
                "give it one path only, then apply this again",
            );
        } else {
            named.insert(id, title);
        }
    }
    match &devices {
        Some(devices) => root_disks(devices, &mut named, &mut wanted),
        None => wanted.find(
            Level::Warn,
            "which disk the host boots from is seen on the running host only: it is not listed",
            host.once_it_runs("mt-agent setup apply --only multipath"),
        ),
    }
    let mut text = "# Written by `mt-agent setup apply`, and again whenever disks are assigned.\n".to_owned();
    let mut listed = Vec::new();
    text.push_str("blacklist {\n");
    for (id, title) in &named {
        let patterns = patterns(id);
        if patterns.is_empty() {
            wanted.evidence(format!("{title} ({id}) is never a path"));
            continue;
        }
        wanted.evidence(format!("blacklisted: {title} ({id})"));
        text.push_str(&format!("\t# {title}\n"));
        for pattern in patterns {
            text.push_str(&format!("\twwid \"^{pattern}$\"\n"));
            listed.push(pattern);
        }
    }
    text.push_str("}\n");
    let configuration = Configuration::parse(&host.root.text(CONFIGURATION)?.unwrap_or_default());
    for exception in &configuration.exceptions {
        // Whatever is more than a plain WWID may mean anything.
        let plain = exception.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-^$".contains(&byte));
        if !plain || listed.iter().any(|pattern| pattern.contains(exception.trim_matches(['^', '$']))) {
            wanted.find(
                Level::Warn,
                format!("{CONFIGURATION} makes an exception of wwid \"{exception}\", which comes before any blacklist"),
                "see that it means no assigned disk",
            );
        }
    }
    let dir = match configuration.config_dir {
        // Newer ones have one place only, and say that the setting is not looked at any more.
        Some(dir) if host.os.el().is_some_and(|release| release < 10) => dir,
        _ => SNIPPETS.to_owned(),
    };
    wanted.files.push(File::own(format!("{}/{NAME}", dir.trim_end_matches('/')), text));
    let reload = ["try-reload-or-restart", "multipathd.service"];
    wanted
        .calls
        .push(Call::new("systemctl", &reload, "to have multipathd read it").only_if("/run/systemd/system"));
    Ok(wanted)
}

fn root_disks(devices: &Devices<'_>, named: &mut BTreeMap<DiskId, String>, wanted: &mut Wanted) {
    for point in ["/", "/boot", "/boot/efi"] {
        let below = devices.mounted(point).map(|name| devices.below(name)).unwrap_or_default();
        let mut disks: Vec<&Disk> = below.iter().filter_map(|name| devices.disk(name)).collect();
        disks.dedup();
        for disk in disks {
            match &disk.id {
                Some(id) if !devices.dm_uuid(&disk.name).is_some_and(|uuid| uuid.contains("mpath-")) => {
                    named.entry(id.clone()).or_insert_with(|| format!("the host's own, with {point}"));
                }
                Some(id) => wanted.evidence(format!("{id}, with {point}, is a multipath map, and stays one")),
                None => wanted.evidence(format!("{}, with {point}, has no identity", disk.name)),
            }
        }
    }
}

/// The WWIDs by which multipath may know a disk, as regular expressions: udev's `ID_SERIAL` of a SCSI disk, `ID_WWN` of an
/// NVMe namespace.
fn patterns(id: &DiskId) -> Vec<String> {
    let text = id.to_string();
    let value = text.split_once('.').map_or("", |(_, value)| value);
    match id.kind() {
        Kind::NaaExtended | Kind::Naa => vec![format!("3{value}")],
        Kind::Eui => vec![format!("2{value}"), format!("eui\\.{value}")],
        Kind::Uuid => vec![format!("uuid\\.{value}")],
        Kind::Name => vec![format!("8{}", expression(value))],
        Kind::T10 => vec![format!("1{}", expression(value))],
        Kind::Nvme => vec![format!("nvme\\.{value}")],
        Kind::Serial => vec![format!("[0S]{}", expression(value))],
        // Not among the devices of which multipath makes maps.
        Kind::Virtio | Kind::Loop => Vec::new(),
    }
}

/// A text as a regular expression. A `_` in it may have been white space, or something else that is in no file name.
fn expression(text: &str) -> String {
    let mut expression = String::new();
    for c in text.chars() {
        match c {
            '_' if expression.ends_with("]+") => {}
            '_' => expression.push_str("[^[:alnum:]]+"),
            c if c.is_ascii_alphanumeric() || ":/=@-".contains(c) => expression.push(c),
            _ => expression.push('.'),
        }
    }
    expression
}

/// What matters here of `multipath.conf`.
#[derive(Default)]
struct Configuration {
    config_dir: Option<String>,
    exceptions: Vec<String>,
}

impl Configuration {
    fn parse(text: &str) -> Configuration {
        let mut found = Configuration::default();
        let mut sections: Vec<String> = Vec::new();
        for line in text.lines() {
            let words = words(line);
            match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
                [name, "{"] => sections.push((*name).to_owned()),
                ["}"] => _ = sections.pop(),
                ["config_dir", value] if sections == ["defaults"] => {
                    found.config_dir = Some((*value).to_owned())
                }
                ["wwid", value] if sections == ["blacklist_exceptions"] => {
                    found.exceptions.push((*value).to_owned())
                }
                _ => {}
            }
        }
        found
    }
}

/// The words of a line: plain, or in double quotes; a comment ends it. A brace is a word.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = line.trim_start();
    while let Some(first) = rest.chars().next() {
        let (word, behind) = match first {
            '#' | '!' => break,
            '{' | '}' => rest.split_at(1),
            '"' => rest[1..].split_once('"').unwrap_or((&rest[1..], "")),
            _ => {
                let end =
                    rest.find(|c: char| c.is_whitespace() || "\"#!{}".contains(c)).unwrap_or(rest.len());
                rest.split_at(end)
            }
        };
        words.push(word.to_owned());
        rest = behind.trim_start();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(id: &str) -> Vec<String> {
        patterns(&id.parse().unwrap())
    }

    #[test]
    fn a_disk_is_spelled_as_multipath_spells_it() {
        assert_eq!(of("naa.6000c2939d1a4b0f8e2d7c6b5a493827"), ["36000c2939d1a4b0f8e2d7c6b5a493827"]);
        assert_eq!(of("eui.0025385b71b0a1c2"), ["20025385b71b0a1c2", "eui\\.0025385b71b0a1c2"]);
        assert_eq!(of("t10.ATA_X__Y.1"), ["1ATA[^[:alnum:]]+X[^[:alnum:]]+Y.1"]);
        assert_eq!(of("serial.QEMU_D_1"), ["[0S]QEMU[^[:alnum:]]+D[^[:alnum:]]+1"]);
        assert_eq!(of("virtio.abc"), [""; 0]);
    }

    #[test]
    fn what_an_administrator_set_is_read() {
        let text = "# defaults {\ndefaults {\n\tconfig_dir \"/etc/mp.d\" # here\n\tuser_friendly_names yes\n}\n\
                    blacklist_exceptions {\n\twwid \"^3600\"\n\tdevice {\n\t\tvendor X\n\t}\n\twwid 36001 ! no\n}\n\
                    blacklist{\nwwid 9\n}\n";
        let found = Configuration::parse(text);
        assert_eq!(found.config_dir.as_deref(), Some("/etc/mp.d"));
        assert_eq!(found.exceptions, ["^3600", "36001"]);
        assert_eq!(words("wwid \"a # b"), ["wwid", "a # b"]);
    }
}
