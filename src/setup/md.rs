//! mdadm assembles the arrays that its configuration names, the host's own, and no other: none that is found on a replicated
//! disk.
//!
//! `mdadm.conf` is read before the directory of snippets, and of several lines `AUTO` the first one counts, so that the file
//! itself is edited. It is made of lines; one that begins with white space goes on with the line before.

use super::devices::Devices;
use super::{Change, Error, File, Host, Level, Wanted};

pub(super) const CHANGE: Change =
    Change { name: "md", about: "mdadm assembles the host's own arrays only", follows_disks: false, wanted };

/// The first that is there is the one that mdadm reads.
const PLACES: [&str; 2] = ["/etc/mdadm.conf", "/etc/mdadm/mdadm.conf"];

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    if !host.program("mdadm") {
        wanted.find(Level::Pass, "mdadm is not installed: nothing assembles arrays", "");
        return Ok(wanted);
    }
    let place = PLACES.iter().find(|place| host.root.exists(place)).unwrap_or(&PLACES[0]);
    let existing = host.root.read(place)?;
    let Some(devices) = Devices::read(host)? else {
        // In the tree of a host that does not run nothing new is written, and what was written stays.
        match existing.filter(|text| edited(text, &[]) == *text) {
            Some(text) => wanted.files.push(File::shared(*place, text)),
            None => wanted.find(
                Level::Warn,
                "which arrays are the host's own is seen on the running host only: nothing is written",
                host.once_it_runs("mt-agent setup apply --only md"),
            ),
        }
        return Ok(wanted);
    };
    let text = existing.unwrap_or_default();
    let mut known = arrays(&text);
    for name in host.root.names(format!("{place}.d")).iter().filter(|name| name.ends_with(".conf")) {
        known.extend(arrays(&host.root.read(format!("{place}.d/{name}"))?.unwrap_or_default()));
    }
    let mut lines = Vec::new();
    for name in devices
        .names
        .iter()
        .filter(|name| devices.value(name, "md/array_state").is_some_and(|state| state != "clear"))
    {
        let foreign = devices.assigned_below(name);
        if let Some(id) = foreign {
            wanted.find(
                Level::Warn,
                format!("the array {name} is assembled, and lies on the assigned disk {id}"),
                format!("stop it: mdadm --stop /dev/{name}"),
            );
            continue;
        }
        let uuid = devices.property(name, "MD_UUID").or_else(|| devices.value(name, "md/uuid"));
        let Some(uuid) = uuid.as_deref().and_then(digits) else {
            return Err(Error::refused(
                format!("the UUID of the array {name}, which is this host's own, is not known"),
                format!(
                    "see that udev runs, or add the line that `mdadm --detail --brief /dev/{name}` prints to {place}; then apply \
                     this again"
                ),
            ));
        };
        if known.contains(&uuid) {
            wanted.evidence(format!("goes on: array {name}, which is listed"));
            continue;
        }
        wanted.evidence(format!("goes on: array {name} ({uuid})"));
        // The name is for people, and left out where it would not be one word.
        let plain =
            |name: &String| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:".contains(&byte));
        let node = devices.property(name, "MD_DEVNAME").filter(plain);
        let node = node.map(|name| format!(" /dev/md/{name}")).unwrap_or_default();
        lines.push(format!("ARRAY{node} UUID={uuid}"));
    }
    wanted.files.push(File::shared(*place, edited(&text, &lines)));
    Ok(wanted)
}

/// The file with nothing assembled but what is listed, and these lines. All else is copied as it is.
fn edited(text: &[u8], arrays: &[String]) -> Vec<u8> {
    let mut new = Vec::new();
    // The line that the next one may go on with: an `AUTO` that is replaced.
    let mut replacing = false;
    let mut has_auto = false;
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let goes_on = line.starts_with(b" ") || line.starts_with(b"\t");
        if goes_on && replacing {
            new.extend_from_slice(b"# before mt-agent:");
            new.extend_from_slice(line);
            continue;
        }
        replacing = false;
        let first_auto = !goes_on && !has_auto && is_keyword(line, "auto");
        has_auto |= first_auto;
        if first_auto && !is_none(text) {
            replacing = true;
            new.extend_from_slice(b"AUTO -all\n# before mt-agent: ");
        }
        new.extend_from_slice(line);
    }
    let mut added = String::new();
    if !has_auto {
        added.push_str("# mt-agent: arrays on replicated disks are not this host's.\nAUTO -all\n");
    }
    arrays.iter().for_each(|array| added.push_str(&format!("{array}\n")));
    if !added.is_empty() && !new.is_empty() && !new.ends_with(b"\n") {
        new.push(b'\n');
    }
    new.extend_from_slice(added.as_bytes());
    new
}

/// Whether the first line `AUTO`, with those that go on with it, lets nothing be assembled.
fn is_none(text: &[u8]) -> bool {
    let all = logical(text);
    let words =
        all.iter().find(|words| words.first().is_some_and(|word| is_keyword(word.as_bytes(), "auto")));
    let words = words.map(|words| words[1..].to_vec()).unwrap_or_default();
    // The first word that fits an array counts.
    let first = words.iter().find(|word| !word.starts_with('-') || word.eq_ignore_ascii_case("-all"));
    first.is_some_and(|word| word.eq_ignore_ascii_case("-all") || word.eq_ignore_ascii_case("no"))
}

/// Whether a line begins with a keyword, which may be cut to three letters.
fn is_keyword(line: &[u8], keyword: &str) -> bool {
    let word = line.split(u8::is_ascii_whitespace).next().unwrap_or_default().to_ascii_lowercase();
    word.len() >= 3 && keyword.as_bytes().starts_with(&word)
}

/// The lines with those that go on with them, as words.
fn logical(text: &[u8]) -> Vec<Vec<String>> {
    let mut lines: Vec<Vec<String>> = Vec::new();
    for line in String::from_utf8_lossy(text).lines() {
        let words =
            line.split_ascii_whitespace().take_while(|word| !word.starts_with('#')).map(str::to_owned);
        match lines.last_mut() {
            Some(last) if line.starts_with([' ', '\t']) => last.extend(words),
            _ => lines.push(words.collect()),
        }
    }
    lines
}

/// The UUIDs of the arrays that are listed.
fn arrays(text: &[u8]) -> Vec<String> {
    let lines = logical(text);
    let listed =
        lines.iter().filter(|words| words.first().is_some_and(|word| is_keyword(word.as_bytes(), "array")));
    // One that is to be ignored is not assembled.
    let listed = listed.filter(|words| !words.iter().any(|word| word.eq_ignore_ascii_case("<ignore>")));
    let uuid = |word: &String| {
        let (key, value) = word.split_once('=')?;
        if key.eq_ignore_ascii_case("uuid") { digits(value.trim_matches(['"', '\''])) } else { None }
    };
    listed.filter_map(|words| words.iter().find_map(uuid)).collect()
}

/// A UUID as mdadm prints it, however it is grouped.
fn digits(uuid: &str) -> Option<String> {
    let digits: String =
        uuid.chars().filter(char::is_ascii_hexdigit).collect::<String>().to_ascii_lowercase();
    let rest = uuid.chars().all(|c| c.is_ascii_hexdigit() || ":-. ".contains(c));
    (rest && digits.len() == 32)
        .then(|| [&digits[..8], &digits[8..16], &digits[16..24], &digits[24..]].join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_line_auto_is_replaced() {
        let anaconda = "# mdadm.conf written out by anaconda\nMAILADDR root\nAUTO +imsm +1.x -all\nARRAY /dev/md/boot level=raid1 \
                        num-devices=2 UUID=3AAA0122:29827cfa:5331ad66:ca767371\n";
        let edited = |text: &str| String::from_utf8(edited(text.as_bytes(), &[])).unwrap();
        let once = edited(anaconda);
        assert_eq!(
            once,
            anaconda
                .replace("AUTO +imsm +1.x -all\n", "AUTO -all\n# before mt-agent: AUTO +imsm +1.x -all\n")
        );
        assert_eq!(edited(&once), once);
        assert_eq!(arrays(once.as_bytes()), ["3aaa0122:29827cfa:5331ad66:ca767371"]);

        let long = "aut\n  +1.x\n\t-all\nDEVICE x\n AUTO yes";
        let once = edited(long);
        assert_eq!(
            once,
            "AUTO -all\n# before mt-agent: aut\n# before mt-agent:  +1.x\n# before mt-agent:\t-all\nDEVICE x\n AUTO yes"
        );
        assert_eq!(edited(&once), once);
    }

    #[test]
    fn what_assembles_nothing_stays() {
        for none in [&b"AUTO -all\n"[..], b"auto -ddf -1.x -all\n", b"AUTO no\n", b"# \xfc\nAUTO -all"] {
            assert_eq!(edited(none, &[]), none);
        }
        for some in [&b"AUTO +all\n"[..], b"AUTO homehost -all\n", b"AUTO\n", b"AUTO -1.x yes\n"] {
            assert!(edited(some, &[]).starts_with(b"AUTO -all\n# before mt-agent: AUTO"), "{some:?}");
        }
    }

    #[test]
    fn an_array_is_listed_by_its_uuid_unless_it_is_ignored() {
        let uuid = "3aaa0122:29827cfa:5331ad66:ca767371";
        assert_eq!(arrays(b"ARRAY /dev/md0\n  uuid=3aaa012229827cfa5331ad66ca767371 # x\n"), [uuid]);
        let ignored = format!("ARRAY <ignore> UUID={uuid}\n#ARRAY UUID={uuid}\n");
        assert_eq!(arrays(ignored.as_bytes()), [""; 0]);
        assert_eq!(digits("3aaa0122-2982-7cfa-5331-ad66ca767371").as_deref(), Some(uuid));
        assert_eq!(digits("3aaa0122"), None);
        let new = edited(b"MAILADDR root", &[format!("ARRAY UUID={uuid}")]);
        assert_eq!(
            String::from_utf8(new).unwrap(),
            format!(
                "MAILADDR root\n# mt-agent: arrays on replicated disks are not this host's.\nAUTO -all\nARRAY UUID={uuid}\n"
            )
        );
    }
}
