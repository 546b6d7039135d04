//! The clock is kept right: recovery points are named by it.

use super::{Call, Change, Error, Host, Level, Wanted};

pub(super) const CHANGE: Change =
    Change { name: "time", about: "the clock is kept right by chrony", follows_disks: false, wanted };

/// Others that do the same; the hypervisor's own tools are none of them.
const OTHERS: [&str; 3] = ["ntpd.service", "systemd-timesyncd.service", "ntpsec.service"];

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    if let Some(other) = OTHERS.into_iter().find(|unit| host.enabled(unit)) {
        wanted.find(Level::Pass, format!("{other} keeps the clock right"), "");
        return Ok(wanted);
    }
    let unit = ["chronyd.service", "chrony.service"].into_iter().find(|unit| host.unit(unit).is_some());
    let Some(unit) = unit else {
        wanted.find(
            Level::Warn,
            "nothing keeps the clock right: recovery points may be named by a wrong time",
            "dnf install chrony, then mt-agent setup apply --only time",
        );
        return Ok(wanted);
    };
    if host.masked(unit) {
        wanted.find(
            Level::Warn,
            format!("{unit} is masked, and nothing else keeps the clock right"),
            format!("systemctl unmask {unit}, then mt-agent setup apply --only time"),
        );
        return Ok(wanted);
    }
    wanted.files.extend(host.enable(unit, "multi-user.target"));
    let systemd = "/run/systemd/system";
    wanted.calls.push(Call::new("systemctl", &["daemon-reload"], "to read the units again").only_if(systemd));
    if host.root.exists(systemd) {
        // Not after the link was taken away.
        let link = format!("/etc/systemd/system/multi-user.target.wants/{unit}");
        wanted.calls.push(
            Call::new("systemctl", &["start", unit], "to have the clock kept right at once").only_if(&link),
        );
    }
    Ok(wanted)
}
