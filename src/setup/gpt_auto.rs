//! systemd makes no mounts by itself from what it finds in a partition table.
//!
//! Its generator looks at the disk that the host was booted from, which it finds by UUIDs: those that a replicated copy of
//! that disk has too. A host that lists its file systems in `/etc/fstab` has no use for it.

use super::{Call, Change, Error, File, Host, Level, Wanted};

pub(super) const CHANGE: Change = Change {
    name: "gpt-auto",
    about: "systemd mounts nothing that it finds in a partition table by itself",
    follows_disks: false,
    wanted,
};

const GENERATOR: &str = "systemd-gpt-auto-generator";

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    if !host.root.exists(format!("/usr/lib/systemd/system-generators/{GENERATOR}")) {
        wanted.find(Level::Pass, format!("there is no {GENERATOR}"), "");
        return Ok(wanted);
    }
    let command_line = host.root.value("/proc/cmdline").filter(|_| host.is_live()).unwrap_or_default();
    let is_off = |word: &str| {
        let value = word.strip_prefix("systemd.gpt_auto=");
        value.is_some_and(|value| ["0", "no", "n", "false", "f", "off"].contains(&value))
    };
    if command_line.split_whitespace().any(is_off) {
        wanted.find(Level::Pass, "systemd.gpt_auto is off on the kernel's command line", "");
        return Ok(wanted);
    }
    let fstab = host.root.text("/etc/fstab")?.unwrap_or_default();
    let lists_root = fstab.lines().any(|line| {
        let mut fields = line.split_whitespace();
        fields.next().is_some_and(|first| !first.starts_with('#')) && fields.next() == Some("/")
    });
    if !lists_root {
        return Err(Error::refused(
            format!("/etc/fstab does not list /: this host may need {GENERATOR} in order to boot"),
            "list its file systems there, then apply this again",
        ));
    }
    let made = made(host)?;
    if !made.is_empty() {
        return Err(Error::refused(
            format!("this host has units that {GENERATOR} made: {}", made.join(", ")),
            "list what it mounts in /etc/fstab, reboot, then apply this again",
        ));
    }
    wanted.evidence("/etc/fstab lists /");
    wanted.files.push(File::link(format!("/etc/systemd/system-generators/{GENERATOR}"), "/dev/null"));
    let reload = Call::new("systemctl", &["daemon-reload"], "to make the units anew without it");
    wanted.calls.push(reload.only_if("/run/systemd/system"));
    Ok(wanted)
}

/// The units that the generator made on this boot.
fn made(host: &Host) -> Result<Vec<String>, Error> {
    const DIR: &str = "/run/systemd/generator.late";
    let mut made = Vec::new();
    for name in host.root.names(DIR) {
        let is_unit = [".mount", ".automount", ".swap"].iter().any(|kind| name.ends_with(kind));
        if is_unit && host.root.text(format!("{DIR}/{name}"))?.is_some_and(|unit| unit.contains(GENERATOR)) {
            made.push(name);
        }
    }
    Ok(made)
}
