//! The limits of the service: memory that the kernel may not page out, and open files.

use std::path::Path;

use super::{Call, Change, Error, File, Host, Level, Wanted};

pub(super) const CHANGE: Change = Change {
    name: "limits",
    about: "the service may lock its buffers and open as many files as its disks need",
    follows_disks: false,
    wanted,
};

const UNIT: &str = "mt-agent.service";
const PATH: &str = "/etc/systemd/system/mt-agent.service.d/50-limits.conf";
/// 64 sessions with some files each, and room.
const FILES: u64 = 4096;
/// The rings and the buffers of 64 volumes; kernels since 5.12 count them otherwise.
const LOCKED: u64 = 1 << 30;

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    let Some(unit) = host.unit(UNIT) else {
        wanted.find(Level::Warn, format!("there is no {UNIT}"), "install the RPM of mt-agent");
        return Ok(wanted);
    };
    // All but our own: what is wanted is the same before and after.
    let mut texts = vec![host.root.text(&unit)?.unwrap_or_default()];
    for dir in ["/usr/lib/systemd/system", "/etc/systemd/system"] {
        let dir = format!("{dir}/{UNIT}.d");
        for name in host.root.names(&dir).iter().filter(|name| name.ends_with(".conf")) {
            let path = format!("{dir}/{name}");
            if path != PATH {
                texts.push(host.root.text(&path)?.unwrap_or_default());
            }
        }
    }
    let mut lines = String::new();
    for (key, least, wish) in [("LimitNOFILE", FILES, "65536"), ("LimitMEMLOCK", LOCKED, "infinity")] {
        let mut set = texts.iter().flat_map(|text| text.lines()).filter_map(|line| {
            let (name, value) = line.split_once('=')?;
            (name.trim() == key).then(|| value.trim().to_owned())
        });
        match set.next_back() {
            Some(value) if limit(&value).is_some_and(|limit| limit >= least) => {
                wanted.evidence(format!("{key} is {value}"));
            }
            value => {
                wanted.evidence(format!("{key} is {}", value.as_deref().unwrap_or("not set")));
                lines.push_str(&format!("{key}={wish}\n"));
            }
        }
    }
    if lines.is_empty() {
        wanted.find(Level::Pass, format!("{} sets enough", Path::new(&unit).display()), "");
        return Ok(wanted);
    }
    wanted.files.push(File::own(PATH, format!("# Written by `mt-agent setup apply`.\n[Service]\n{lines}")));
    let systemd = "/run/systemd/system";
    wanted.calls.push(Call::new("systemctl", &["daemon-reload"], "to read the units again").only_if(systemd));
    wanted.find(Level::Pass, "the service has its limits from its next start on", "");
    Ok(wanted)
}

/// The soft limit of systemd's `soft:hard`, with its suffixes.
fn limit(value: &str) -> Option<u64> {
    let soft = value.split(':').next()?.trim();
    if soft == "infinity" {
        return Some(u64::MAX);
    }
    let digits = soft.trim_end_matches(['K', 'M', 'G', 'T']);
    let unit = match soft.strip_prefix(digits)? {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_systemd_reads_them() {
        assert_eq!(limit("65536"), Some(65536));
        assert_eq!(limit("1024:524288"), Some(1024));
        assert_eq!(limit("8M"), Some(8 << 20));
        assert_eq!(limit("infinity"), Some(u64::MAX));
        assert_eq!(limit("99999999999T"), None);
        assert_eq!(limit("many"), None);
        assert_eq!(limit("1MM"), None);
    }
}
