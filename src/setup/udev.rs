//! udev leaves the assigned disks alone: what lies on them is another machine's.
//!
//! The rules run before `60-persistent-storage.rules`, which looks into every disk and makes the links in
//! `/dev/disk/by-uuid`: a replicated disk may well carry the UUIDs of this host's own file systems, and must not take their
//! links. Without what those rules find, the rules of LVM, md, btrfs, udisks and systemd's mount units have nothing to go by.
//!
//! A disk is known by the `wwid` that the kernel shows for it (and for its partitions, which are below it in sysfs), so that
//! nothing is asked of the disk.

use std::collections::BTreeMap;

use super::{Call, Change, Error, File, Host, Level, Wanted};
use crate::disk::id::{DiskId, Kind};

pub(super) const CHANGE: Change = Change {
    name: "udev",
    about: "udev, md, LVM, udisks and systemd leave assigned disks alone",
    follows_disks: true,
    wanted,
};

const PATH: &str = "/etc/udev/rules.d/59-mt-agent.rules";
/// A disk of a virtual machine that is moved, or whose storage fails over, may be silent for this long.
const TIMEOUT_SECONDS: u32 = 180;

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    let attached = attached(host);
    let mut matches = String::new();
    for (id, (machine, name)) in host.assigned()? {
        let disk = format!("disk {name} of machine {machine} ({id})");
        match key(&id, &attached) {
            Key::Is(key) => {
                matches.push_str(&format!("# {machine}: {name}\n{key}, ENV{{MT_AGENT}}=\"1\"\n"));
                wanted.evidence(format!("{disk} is known by {key}"));
            }
            Key::Unneeded => {
                matches.push_str(&format!("# {machine}: {name}, a loop device: whoever attaches it decides\n"));
                wanted.evidence(format!("{disk} is a loop device: whoever attaches it decides"));
            }
            Key::Unknown => wanted.find(
                Level::Warn,
                format!("{disk} cannot be named in a rule: udev may look into it"),
                "attach it and apply this again; better, set disk.EnableUUID of the virtual machine and assign it by its UUID",
            ),
        }
    }
    if matches.is_empty() {
        matches.push_str("# No disk is assigned.\n");
    }
    let mut access = String::new();
    if host.group("mt-agent")?.is_some() {
        access = "ENV{DEVTYPE}==\"disk\", GROUP=\"mt-agent\", MODE=\"0660\"\n".to_owned();
    } else {
        wanted.find(
            Level::Warn,
            "there is no group mt-agent: only root may write to assigned disks",
            "install the RPM of mt-agent, which makes it, then apply this again",
        );
    }
    let text = format!(
        r#"# Written by `mt-agent setup apply`, and again whenever disks are assigned. The disks below are another machine's.
SUBSYSTEM!="block", GOTO="mt_agent_end"
ACTION=="remove", GOTO="mt_agent_end"

{matches}
ENV{{MT_AGENT}}!="1", GOTO="mt_agent_end"
ENV{{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}}="1"
ENV{{SYSTEMD_READY}}="0"
ENV{{UDISKS_IGNORE}}="1", ENV{{UDISKS_AUTO}}="0"
ENV{{DM_MULTIPATH_DEVICE_PATH}}="0"
{access}ENV{{DEVTYPE}}=="disk", TEST=="queue/scheduler", ATTR{{queue/scheduler}}="none"
ENV{{DEVTYPE}}=="disk", TEST=="device/timeout", ATTR{{device/timeout}}="{TIMEOUT_SECONDS}"
LABEL="mt_agent_end"
"#
    );
    wanted.files.push(File::own(PATH, text));
    let control = "/run/udev/control";
    wanted.calls.push(Call::new("udevadm", &["control", "--reload"], "to read the rules").only_if(control));
    let trigger = ["trigger", "--action=change", "--subsystem-match=block"];
    wanted.calls.push(Call::new("udevadm", &trigger, "to look at the disks by them").only_if(control));
    wanted
        .calls
        .push(Call::new("udevadm", &["settle", "--timeout=240"], "to wait for that").only_if(control));
    Ok(wanted)
}

/// How a rule knows a disk.
enum Key {
    Is(String),
    Unneeded,
    Unknown,
}

fn key(id: &DiskId, attached: &BTreeMap<DiskId, String>) -> Key {
    if let Some(key) = attached.get(id) {
        return Key::Is(key.clone());
    }
    match id.kind() {
        // What the kernel shows of these is the canonical text itself.
        Kind::NaaExtended | Kind::Naa | Kind::Eui | Kind::Uuid => {
            Key::Is(attribute("wwid", &id.to_string()).unwrap_or_default())
        }
        Kind::Loop => Key::Unneeded,
        // Of these it shows white space and all, which the identity does not have any more.
        Kind::Name | Kind::T10 | Kind::Nvme | Kind::Serial | Kind::Virtio => Key::Unknown,
    }
}

/// The attached disks that sysfs has an identity of, and the match for each.
fn attached(host: &Host) -> BTreeMap<DiskId, String> {
    let mut attached = BTreeMap::new();
    for name in host.root.names("/sys/block") {
        let value = |attribute: &str| host.root.value(format!("/sys/block/{name}/{attribute}"));
        let wwid = value("wwid").or_else(|| value("device/wwid"));
        let serial = value("serial").filter(|_| name.starts_with("vd"));
        let found = [
            wwid.and_then(|wwid| Some((wwid.parse().ok()?, attribute("wwid", &wwid)?))),
            serial.and_then(|serial| Some((DiskId::virtio(&serial)?, attribute("serial", &serial)?))),
        ];
        attached.extend(found.into_iter().flatten());
    }
    attached
}

/// The match for an attribute of a disk and of its partitions; none where the value would be a pattern.
fn attribute(name: &str, value: &str) -> Option<String> {
    let plain = |c: char| !c.is_control() && !['"', '\\', '*', '?', '[', '|', '$', '%'].contains(&c);
    value.chars().all(plain).then(|| format!("ATTRS{{{name}}}==\"{value}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_names_one_disk_and_no_pattern() {
        let id = |text: &str| text.parse::<DiskId>().unwrap();
        let none = BTreeMap::new();
        let naa = id("naa.6000c2939d1a4b0f8e2d7c6b5a493827");
        assert!(
            matches!(key(&naa, &none), Key::Is(key) if key == r#"ATTRS{wwid}=="naa.6000c2939d1a4b0f8e2d7c6b5a493827""#)
        );
        assert!(matches!(key(&id("t10.ATA_X_1"), &none), Key::Unknown));
        assert!(matches!(key(&id("loop:/a"), &none), Key::Unneeded));
        assert_eq!(attribute("serial", "a*"), None);
        assert_eq!(attribute("serial", "a\"b"), None);
        let shown = BTreeMap::from([(id("t10.ATA_X_1"), attribute("wwid", "t10.ATA     X  1").unwrap())]);
        assert!(
            matches!(key(&id("t10.ATA_X_1"), &shown), Key::Is(key) if key == r#"ATTRS{wwid}=="t10.ATA     X  1""#)
        );
    }
}
