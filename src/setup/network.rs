//! Buffers for a link that is fast and long, and the port for the data in the firewall.

use super::{Call, Change, Error, File, Host, Level, Wanted};

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
    let port = host.places.port;
    if host.unit("firewalld.service").is_some() && !host.masked("firewalld.service") {
        return firewalld(host, wanted);
    }
    if host.enabled("nftables.service") {
        let rules = host.root.text("/etc/sysconfig/nftables.conf")?.unwrap_or_default();
        let open = rules.split(|c: char| !c.is_ascii_digit()).any(|number| number.parse() == Ok(port));
        if open {
            wanted.find(Level::Pass, format!("/etc/sysconfig/nftables.conf speaks of port {port}"), "");
        } else {
            // Another table's `accept` would not outweigh this one's `drop`, so that a file of ours cannot open it.
            wanted.find(
                Level::Warn,
                format!("the rules of nftables are the administrator's, and do not speak of port {port}"),
                format!("let in `tcp dport {port}` in /etc/sysconfig/nftables.conf"),
            );
        }
        return Ok(());
    }
    wanted.find(Level::Pass, "there is no firewall here", "");
    Ok(())
}

fn firewalld(host: &Host, wanted: &mut Wanted) -> Result<(), Error> {
    let port = host.places.port;
    let entry = format!("<port protocol=\"tcp\" port=\"{port}\"/>");
    let shipped = host.root.text(format!("/usr/lib/firewalld/services/{SERVICE}.xml"))?;
    if shipped.is_some_and(|xml| without_comments(&xml).contains(&format!("port=\"{port}\""))) {
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
    let name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if zone.is_empty() || !zone.chars().all(name) {
        return Err(Error::Refused(format!("/etc/firewalld/firewalld.conf: `{zone}` is no name of a zone")));
    }
    let path = format!("/etc/firewalld/zones/{zone}.xml");
    let now = match host.root.text(&path)? {
        Some(now) => Some(now),
        None => host.root.text(format!("/usr/lib/firewalld/zones/{zone}.xml"))?,
    };
    match now.as_deref().map(with_service) {
        Some(Some(new)) => {
            wanted.evidence(format!("the default zone of firewalld is {zone}"));
            wanted.files.push(File::shared(path, new));
        }
        _ => wanted.find(
            Level::Warn,
            format!("the default zone of firewalld, {zone}, has no definition that is understood"),
            format!("firewall-cmd --permanent --add-service={SERVICE} && firewall-cmd --reload"),
        ),
    }
    let args = ["try-reload-or-restart", "firewalld.service"];
    wanted.calls.push(Call::new("systemctl", &args, "to open the port").only_if("/run/systemd/system"));
    Ok(())
}

/// The same length, with blanks in place of comments.
fn without_comments(xml: &str) -> String {
    let mut plain = String::with_capacity(xml.len());
    let mut rest = xml;
    while let Some((before, comment)) = rest.split_once("<!--") {
        let len = comment.find("-->").map_or(comment.len(), |end| end + 3);
        plain.push_str(before);
        plain.extend(std::iter::repeat_n(' ', 4 + len));
        rest = comment.get(len..).unwrap_or_default();
    }
    plain.push_str(rest);
    plain
}

/// The zone with our service in it, and all else as it was. None where it is not understood.
fn with_service(zone: &str) -> Option<String> {
    let plain = without_comments(zone);
    let quoted = |quote: char| format!("name={quote}{SERVICE}{quote}");
    let ours =
        |tag: &str| tag.starts_with("service") && (tag.contains(&quoted('"')) || tag.contains(&quoted('\'')));
    if plain.split('<').any(ours) {
        return Some(zone.to_owned());
    }
    let at = plain.rfind("</zone>")?;
    let (head, tail) = (zone.get(..at)?, zone.get(at..)?);
    // At the beginning of the line of the end tag, where that stands alone.
    let line = head.trim_end_matches([' ', '\t']);
    let (head, between) = if line.ends_with('\n') { (line, "") } else { (head, "\n") };
    let indent = zone.get(head.len()..at).unwrap_or_default();
    Some(format!("{head}{between}  <service name=\"{SERVICE}\"/>\n{indent}{tail}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zone_keeps_all_that_it_has() {
        let zone = "<zone>\n  <!-- ours: </zone> <service name=\"mt-agent\"/> -->\n  <service name=\"ssh\"/>\n</zone>\n";
        let with = with_service(zone).unwrap();
        assert_eq!(
            with,
            "<zone>\n  <!-- ours: </zone> <service name=\"mt-agent\"/> -->\n  <service name=\"ssh\"/>\n  <service name=\"mt-agent\"/>\n</zone>\n"
        );
        assert_eq!(with_service(&with).unwrap(), with);
        assert_eq!(
            with_service("<zone><short>ü</short></zone>").unwrap(),
            "<zone><short>ü</short>\n  <service name=\"mt-agent\"/>\n</zone>"
        );
        assert_eq!(with_service("<zone/>"), None);
        assert_eq!(with_service("<zone><!-- </zone>"), None);
        assert_eq!(
            with_service("<zone><!-- ü --></zone>").unwrap(),
            "<zone><!-- ü -->\n  <service name=\"mt-agent\"/>\n</zone>"
        );
    }
}
