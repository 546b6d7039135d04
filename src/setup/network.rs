//! Buffers for a link that is fast and long, and the port for the data in the firewall.

use std::collections::BTreeSet;

use super::{Call, Change, Error, File, Host, Level, Wanted, nftables};

pub(super) const CHANGE: Change = Change {
    name: "network",
    about: "a long fast link is filled, and the data port is open",
    follows_disks: false,
    wanted,
};

const SYSCTL: &str = "/etc/sysctl.d/60-mt-agent-network.conf";
/// What is under way on a link of 2 Gbit/s with 250 ms there and back.
const BUFFER: u32 = 64 << 20;
const SERVICE: &str = "mt-agent";
const ZONES: &str = "/etc/firewalld/zones";

fn wanted(host: &Host) -> Result<Wanted, Error> {
    let mut wanted = Wanted::default();
    let text = format!(
        "# Written by `mt-agent setup apply`. What an administrator sets in a file with a later name holds.\n\
         # The most that TCP may have under way: 2 Gbit/s with 250 ms there and back. What is not needed is not taken.\n\
         net.core.rmem_max = {BUFFER}\n\
         net.core.wmem_max = {BUFFER}\n\
         net.ipv4.tcp_rmem = 4096 131072 {BUFFER}\n\
         net.ipv4.tcp_wmem = 4096 16384 {BUFFER}\n\
         # A pass that waits for a disk does not begin slowly again.\n\
         net.ipv4.tcp_slow_start_after_idle = 0\n\
         # A VPN that drops large packets without a word is found out.\n\
         net.ipv4.tcp_mtu_probing = 1\n"
    );
    wanted.files.push(File::own(SYSCTL, text));
    wanted.calls.push(Call::new("sysctl", &["-p", SYSCTL], "to have it at once").only_if(SYSCTL));
    firewall(host, &mut wanted)?;
    Ok(wanted)
}

fn firewall(host: &Host, wanted: &mut Wanted) -> Result<(), Error> {
    let firewalld = "firewalld.service";
    if !host.enabled(firewalld) {
        if host.enabled("nftables.service") {
            nftables::wanted(host, wanted);
            return Ok(());
        }
        if let Some(unit) = other_firewall(host) {
            let port = host.places.port;
            wanted.find(
                Level::Warn,
                format!("{unit} is enabled, and it is not known whether its rules let in the data port"),
                format!("let in TCP port {port} there, before what refuses it"),
            );
            return Ok(());
        }
    }
    if host.unit(firewalld).is_some() && !host.masked(firewalld) {
        return firewalld_zones(host, wanted);
    }
    wanted.find(Level::Pass, "there is no firewall here", "");
    Ok(())
}

/// What makes rules in a way of its own.
pub(super) fn other_firewall(host: &Host) -> Option<&'static str> {
    let units = ["iptables.service", "ip6tables.service", "ufw.service", "netfilter-persistent.service"];
    units.into_iter().find(|unit| host.enabled(unit))
}

fn firewalld_zones(host: &Host, wanted: &mut Wanted) -> Result<(), Error> {
    let port = host.places.port;
    let entry = format!("<port protocol=\"tcp\" port=\"{port}\"/>");
    let shipped = host.root.read(format!("/usr/lib/firewalld/services/{SERVICE}.xml"))?;
    let opened = format!("port=\"{port}\"");
    if shipped.is_some_and(|xml| find(&without_comments(&xml), opened.as_bytes()).is_some()) {
        wanted.evidence(format!("firewalld knows the service {SERVICE}"));
    } else {
        let xml = format!(
            "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n<!-- Written by `mt-agent setup apply`. -->\n<service>\n  \
             <short>mt-agent</short>\n  <description>Replicated blocks of machines that fail back.</description>\n  {entry}\n\
             </service>\n"
        );
        wanted.files.push(File::own(format!("/etc/firewalld/services/{SERVICE}.xml"), xml));
    }
    let config = host.root.text("/etc/firewalld/firewalld.conf")?.unwrap_or_default();
    let zone = config
        .lines()
        .find_map(|line| line.trim().strip_prefix("DefaultZone="))
        .unwrap_or("public")
        .trim()
        .to_owned();
    if zone.is_empty() || !zone.chars().all(is_name) {
        return Err(Error::refused(
            format!("/etc/firewalld/firewalld.conf: `{zone}` is no name of a zone"),
            "mend its DefaultZone, then apply this again",
        ));
    }
    match definition(host, &zone)?.as_deref().map(with_service) {
        Some(Some(new)) => {
            wanted.evidence(format!("the default zone of firewalld is {zone}"));
            let file = File::shared(format!("{ZONES}/{zone}.xml"), new);
            wanted.files.push(file.line(format!("<service name=\"{SERVICE}\"/>")));
        }
        _ => wanted.find(
            Level::Warn,
            format!("the default zone of firewalld, {zone}, has no definition that is understood"),
            format!("firewall-cmd --permanent --add-service={SERVICE} && firewall-cmd --reload"),
        ),
    }
    for other in other_zones(host).into_iter().filter(|other| *other != zone) {
        let xml = definition(host, &other)?;
        if xml.is_none_or(|xml| with_service(&xml).is_none_or(|with| with != xml)) {
            wanted.find(
                Level::Warn,
                format!("some interfaces or sources are in the zone {other} of firewalld, which does not let the port in"),
                format!(
                    "if machines send through it: firewall-cmd --permanent --zone={other} --add-service={SERVICE}, then \
                     firewall-cmd --reload"
                ),
            );
        }
    }
    let args = ["try-reload-or-restart", "firewalld.service"];
    wanted.calls.push(Call::new("systemctl", &args, "to open the port").only_if("/run/systemd/system"));
    Ok(())
}

/// What a zone lets in: the administrator's, or as it comes.
fn definition(host: &Host, zone: &str) -> Result<Option<Vec<u8>>, Error> {
    match host.root.read(format!("{ZONES}/{zone}.xml"))? {
        Some(own) => Ok(Some(own)),
        None => host.root.read(format!("/usr/lib/firewalld/zones/{zone}.xml")),
    }
}

/// The zones that are named for an interface or a source, by firewalld itself or by a connection of NetworkManager's.
fn other_zones(host: &Host) -> BTreeSet<String> {
    let mut zones = BTreeSet::new();
    for name in host.root.names(ZONES) {
        let xml = host.root.value(format!("{ZONES}/{name}")).unwrap_or_default();
        let plain = without_comments(xml.as_bytes());
        let is_named = [&b"<interface "[..], b"<source "].iter().any(|tag| find(&plain, tag).is_some());
        zones.extend(name.strip_suffix(".xml").filter(|_| is_named).map(str::to_owned));
    }
    for dir in ["/etc/NetworkManager/system-connections", "/etc/sysconfig/network-scripts"] {
        for name in host.root.names(dir) {
            let text = host.root.value(format!("{dir}/{name}")).unwrap_or_default();
            let named = text.lines().filter_map(|line| {
                let zone = line.strip_prefix("zone=").or_else(|| line.strip_prefix("ZONE="))?;
                Some(zone.trim().trim_matches('"').to_owned())
            });
            zones.extend(named.filter(|zone| !zone.is_empty() && zone.chars().all(is_name)));
        }
    }
    zones
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}

/// The same length, with blanks in place of comments.
fn without_comments(xml: &[u8]) -> Vec<u8> {
    let mut plain = xml.to_vec();
    let mut at = 0;
    while let Some(begin) = find(&xml[at..], b"<!--").map(|begin| at + begin) {
        let end = find(&xml[begin + 4..], b"-->").map_or(xml.len(), |len| begin + 4 + len + 3);
        plain[begin..end].fill(b' ');
        at = end;
    }
    plain
}

/// The zone with our service in it, and all else as it was, in whatever encoding. None where it is not understood.
fn with_service(zone: &[u8]) -> Option<Vec<u8>> {
    const END: &[u8] = b"</zone>";
    let plain = without_comments(zone);
    let quoted = |quote: char| format!("name={quote}{SERVICE}{quote}");
    let ours =
        |tag: &str| tag.starts_with("service") && (tag.contains(&quoted('"')) || tag.contains(&quoted('\'')));
    if String::from_utf8_lossy(&plain).split('<').any(ours) {
        return Some(zone.to_vec());
    }
    let at = plain.windows(END.len()).rposition(|window| window == END)?;
    // At the beginning of the line of the end tag, where that stands alone.
    let blanks = zone[..at].iter().rev().take_while(|byte| b" \t".contains(byte)).count();
    let (line, between) = match zone[..at - blanks].last() {
        Some(b'\n') => (at - blanks, ""),
        _ => (at, "\n"),
    };
    let entry = format!("{between}  <service name=\"{SERVICE}\"/>\n");
    Some([&zone[..line], entry.as_bytes(), &zone[line..]].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zone_keeps_all_that_it_has() {
        let with = |zone: &[u8]| with_service(zone).map(|new| new.escape_ascii().to_string());
        let zone = b"<zone>\n  <!-- ours: </zone> <service name=\"mt-agent\"/> -->\n  <service name=\"ssh\"/>\n </zone>\n";
        let new = with_service(zone).unwrap();
        assert_eq!(
            String::from_utf8(new.clone()).unwrap(),
            "<zone>\n  <!-- ours: </zone> <service name=\"mt-agent\"/> -->\n  <service name=\"ssh\"/>\n  <service name=\"mt-agent\"/>\n </zone>\n"
        );
        assert_eq!(with_service(&new).unwrap(), new);
        // In the encoding of the administrator, whichever it is.
        assert_eq!(
            with(b"<zone><short>\xfc</short></zone>").unwrap(),
            r#"<zone><short>\xfc</short>\n  <service name=\"mt-agent\"/>\n</zone>"#
        );
        assert_eq!(
            with(b"<zone><!-- \xfc --></zone>").unwrap(),
            r#"<zone><!-- \xfc -->\n  <service name=\"mt-agent\"/>\n</zone>"#
        );
        let wide: Vec<u8> = "<zone></zone>".encode_utf16().flat_map(u16::to_le_bytes).collect();
        for unknown in [&b"<zone/>"[..], b"<zone><!-- </zone>", &wide] {
            assert_eq!(with(unknown), None);
        }
    }
}
