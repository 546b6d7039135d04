//! No desktop mounts a disk that is attached.
//!
//! udisks2 itself mounts nothing; it tells a desktop of disks, which mounts them. The rules of the change `udev` hide the
//! assigned disks from it. A disk that is attached and not assigned yet is hidden by nothing, so that the desktop must not.

use super::{Call, Change, Error, File, Host, Level, Wanted};

pub(super) const CHANGE: Change = Change {
    name: "automount",
    about: "udisks2 and the desktop mount no attached disk",
    follows_disks: false,
    wanted,
};

const PROFILE: &str = "/etc/dconf/profile/user";
const RULES: &str = "/etc/udev/rules.d/59-mt-agent.rules";

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    if host.root.exists("/usr/lib/udev/rules.d/80-udisks2.rules") {
        let rules = host.root.text(RULES)?.unwrap_or_default();
        if ["UDISKS_IGNORE}=\"1\"", "UDISKS_AUTO}=\"0\""].iter().all(|hides| rules.contains(hides)) {
            wanted.find(Level::Pass, format!("udisks2 leaves assigned disks alone, by {RULES}"), "");
        } else {
            wanted.find(
                Level::Fail,
                format!("udisks2 is installed, and no rule in {RULES} hides the assigned disks from it"),
                host.command("apply --only udev"),
            );
        }
    } else {
        wanted.evidence("udisks2 is not installed");
    }
    // Its settings are installed with other things too; this is what mounts.
    if !host.program("gnome-shell") {
        wanted.evidence("GNOME is not installed");
        return Ok(wanted);
    }
    wanted.evidence("GNOME is installed, which mounts what is attached");
    let profile = host.root.text(PROFILE)?;
    if profile.is_some_and(|profile| profile.lines().any(|line| line.trim() == "system-db:local")) {
        let settings = "# Written by `mt-agent setup apply`.\n[org/gnome/desktop/media-handling]\nautomount=false\nautomount-open=false\n";
        let locks = "# Written by `mt-agent setup apply`.\n/org/gnome/desktop/media-handling/automount\n\
                     /org/gnome/desktop/media-handling/automount-open\n";
        wanted.files.push(File::own("/etc/dconf/db/local.d/60-mt-agent", settings));
        wanted.files.push(File::own("/etc/dconf/db/local.d/locks/60-mt-agent", locks));
        wanted.calls.push(Call::new("dconf", &["update"], "to have it in effect").only_if("/usr/bin/dconf"));
    } else {
        wanted.find(
            Level::Fail,
            format!("GNOME is installed, and {PROFILE} does not name system-db:local: no setting for all users is read"),
            format!("add the line `system-db:local` behind `user-db:user` in {PROFILE}, then apply this again"),
        );
    }
    Ok(wanted)
}
