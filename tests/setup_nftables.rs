//! `mt-agent setup` where nftables.service keeps the host closed: on the trees of hosts, and with the kernel's own rules.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use support::{Outcome, run};
use tempfile::TempDir;

const EL: &str = "etc/sysconfig/nftables.conf";
const DEBIAN: &str = "etc/nftables.conf";
const RULE: &str = "tcp dport 9443 accept comment \"mt-agent\"\n";
const BASE: &str = "type filter hook input priority 0; policy drop;";
const CLOSED: &str = "#!/usr/sbin/nft -f\nflush ruleset\n\ntable inet filter {\n\tset blocked { type ipv4_addr; flags interval; elements = { 10.7.7.7 } }\n\
                      \tchain input {\n\t\ttype filter hook input priority 0; policy drop;\n\t\tct state invalid drop\n\t\tip saddr @blocked drop\n\
                      \t\tct state established,related accept\n\t\ttcp dport 22 accept # by hand\n\t}\n\tchain forward {\n\
                      \t\ttype filter hook forward priority 0; policy drop;\n\t}\n}\n";
/// In the way of EL's sample: what is let in is in a chain of its own, and the last word is no policy.
const SAMPLE: &str = "table inet svc {\n\tset ports { type inet_service; elements = { 22, 80 }; }\n\tchain allow {\n\t\tct state established,related accept\n\
                      \t\ttcp dport @ports accept\n\t}\n\tchain INPUT {\n\t\ttype filter hook input priority filter + 20\n\t\tpolicy accept\n\
                      \t\tip saddr 10.7.7.7 counter drop\n\n\t\tjump allow\n\t\treject with icmpx type port-unreachable\n\t}\n}\n";

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// A host whose nftables.service is enabled and loads this.
fn host(main: &str, rules: &str) -> TempDir {
    let dir = support::directory();
    let root = dir.path();
    let (os, target) = match main {
        EL => ("ID=\"centos\"\nID_LIKE=\"rhel fedora\"\nVERSION_ID=\"9\"\n", "multi-user"),
        _ => ("ID=debian\nVERSION_ID=\"12\"\n", "sysinit"),
    };
    write(root, "etc/os-release", os);
    write(
        root,
        "usr/lib/systemd/system/nftables.service",
        &format!("[Service]\nExecStart=/usr/sbin/nft -f /{main}\n"),
    );
    // Installed, and not enabled.
    write(root, "usr/lib/systemd/system/firewalld.service", "[Service]\n");
    let wants = root.join(format!("etc/systemd/system/{target}.target.wants"));
    fs::create_dir_all(&wants).unwrap();
    symlink("/usr/lib/systemd/system/nftables.service", wants.join("nftables.service")).unwrap();
    write(root, main, rules);
    dir
}

fn setup(root: &Path, command: &str, more: &[&str]) -> Outcome {
    let mut args = vec!["setup", command, "--only", "network", "--root", root.to_str().unwrap()];
    args.extend(more);
    run(&args)
}

/// All files in `/etc`.
fn etc(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut all, mut dirs) = (BTreeMap::new(), vec![root.join("etc")]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let content = if path.is_dir() { Vec::new() } else { fs::read(&path).unwrap_or_default() };
            if path.is_dir() {
                dirs.push(path.clone());
            }
            all.insert(path, content);
        }
    }
    all
}

fn text(root: &Path, path: &str) -> String {
    fs::read_to_string(root.join(path)).unwrap()
}

/// Runs this test once more, in a network of its own; true there.
fn alone(test: &str) -> bool {
    if std::env::var_os("MT_AGENT_TEST_ALONE").is_some() {
        support::tool("ip", &["link", "set", "lo", "up"]);
        support::tool("ip", &["address", "add", "10.7.7.7/32", "dev", "lo"]);
        return true;
    }
    if !support::root(test) {
        return false;
    }
    let listed = Command::new("unshare").args(["--net", "nft", "list", "ruleset"]).output();
    if !listed.is_ok_and(|output| output.status.success()) {
        support::skipped(test, "nft is missing, or this kernel has no nf_tables");
        return false;
    }
    let mut again = Command::new("unshare");
    again.args(["--net", "--mount", "--propagation", "private"]).arg(std::env::current_exe().unwrap());
    let output =
        again.args(["--exact", test, "--nocapture"]).env("MT_AGENT_TEST_ALONE", "").output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
    false
}

/// Calls nft with this tree's `/etc`.
fn nft(root: &Path, args: &[&str]) -> String {
    let script = "mount --bind \"$0/etc\" /etc; nft flush ruleset; exec nft \"$@\"";
    let first = ["--mount", "--propagation", "private", "sh", "-ec", script, root.to_str().unwrap()];
    support::tool("unshare", &[&first, args].concat())
}

/// Whether these of the addresses can be reached at the port, and the others not.
fn reached(port: u16, expected: [bool; 3]) -> bool {
    let _listens = TcpListener::bind(("::", port)).unwrap();
    ["127.0.0.1", "::1", "10.7.7.7"].iter().zip(expected).all(|(address, expected)| {
        let to = SocketAddr::new(address.parse().unwrap(), port);
        // What is dropped is never answered; what is let in is, however busy this machine is.
        let limit = if expected { Duration::from_secs(30) } else { Duration::from_millis(300) };
        TcpStream::connect_timeout(&to, limit).is_ok() == expected
    })
}

/// With packets over IPv4 and IPv6, before and after.
#[test]
fn the_port_is_let_in_before_the_last_word_of_the_chain() {
    if !alone("the_port_is_let_in_before_the_last_word_of_the_chain") {
        return;
    }
    let pair = "table filter {\n  chain INPUT { type filter hook input priority 0; policy drop; ct state established accept; ip saddr 10.7.7.7 drop; }\n}\n\
                table ip6 filter {\n  chain INPUT {\n    type filter hook input priority 0\n    ct state established accept\n    ip6 nexthdr 58 accept\n\
                \x20   counter packets 1 bytes 2 log prefix \"no; } { \" drop\n  }\n}\ntable inet other {\n  chain x { type filter hook input priority -150; meta mark set 1; }\n}";
    let (in_closed, in_sample) = ("accept # by hand\n", "jump allow\n");
    type Lines<'a> = &'a [(&'a str, &'a str)];
    let logging =
        CLOSED.replace(in_closed, &format!("{in_closed}\t\tlimit rate 5/minute log prefix \"drop: \"\n"));
    let logging_last =
        SAMPLE.replace("\t\treject", "\t\tlog prefix \"1\"\n\t\tlog prefix \"2\" counter\n\t\treject");
    let cases: [(&str, &str, Lines<'_>); 6] = [
        (DEBIAN, CLOSED, &[(in_closed, "\t\tR")]),
        (DEBIAN, &logging, &[(in_closed, "\t\tR")]),
        (EL, &logging_last, &[(in_sample, "\t\tR")]),
        (EL, "# there\\\ninclude \"/etc/nftables/more.nft\"\n", &[]),
        (EL, SAMPLE, &[(in_sample, "\t\tR")]),
        (DEBIAN, pair, &[("10.7.7.7 drop; ", "\n  \tR  "), ("58 accept\n", "    R")]),
    ];
    for (main, rules, lines) in cases {
        let dir = host(main, rules);
        let root = dir.path();
        write(root, "etc/nftables/more.nft", SAMPLE);
        let start = etc(root);
        let load = || nft(root, &["-f", &format!("/{main}")]);
        load();
        assert!(reached(9443, [false; 3]), "{rules}");
        let plan = setup(root, "plan", &[]).ok().stdout;
        assert!(plan.contains(&RULE[..20]) && etc(root) == start, "{plan}");
        setup(root, "apply", &[]).ok();
        let with = |rules: &str, lines: &[(&str, &str)]| {
            let add = |rules: String, (at, line): &(&str, &str)| {
                rules.replace(at, &format!("{at}{}", line.replace('R', RULE)))
            };
            lines.iter().fold(rules.to_owned(), add)
        };
        assert_eq!(text(root, main), with(rules, lines));
        let more = if lines.is_empty() { with(SAMPLE, &[(in_sample, "\t\tR")]) } else { SAMPLE.to_owned() };
        assert_eq!(text(root, "etc/nftables/more.nft"), more);
        load();
        assert!(reached(9443, [true, true, false]), "{rules}");
        let applied = etc(root);
        let again = setup(root, "apply", &[]).ok().stdout;
        assert!(!again.contains("wrote") && etc(root) == applied, "{again}");
        let checked = setup(root, "check", &["--json"]).ok().json()["changes"][0].take();
        assert_eq!(checked["level"], "pass", "{checked:#}");
        setup(root, "revert", &[]).ok();
        assert_eq!(etc(root), start);
    }
}

/// The administrator goes on with what is his: the rules are still loaded, and the line is where he has it.
#[test]
fn what_the_administrator_writes_later_is_followed_or_left() {
    if !alone("what_the_administrator_writes_later_is_followed_or_left") {
        return;
    }
    let dir = host(EL, "include \"/etc/nftables/site.nft\"\n");
    let root = dir.path();
    let (site, moved) = ("etc/nftables/site.nft", "etc/nftables/moved.nft");
    write(root, site, SAMPLE);
    symlink("round", root.join("etc/nftables/round")).unwrap();
    setup(root, "apply", &[]).ok();
    let with = text(root, site);
    let open = || {
        nft(root, &["-f", &format!("/{EL}")]);
        assert!(reached(9443, [true, true, false]));
    };
    // Below others, in another file, and with other names.
    let below = "table inet first {\n}\ninclude \"/etc/nftables/moved.nft\"\n";
    for (main, rules) in
        [(below, with.clone()), (below, with.replace("INPUT", "renamed").replace("svc", "other"))]
    {
        write(root, EL, main);
        write(root, site, "");
        write(root, moved, &rules);
        open();
        let before = etc(root);
        let checked = setup(root, "check", &[]).ok().stdout;
        assert!(checked.contains("let in port 9443 once") && !checked.contains("warn"), "{checked}");
        setup(root, "apply", &[]).ok();
        assert_eq!(etc(root), before);
    }
    // Another port, and back.
    let config = root.join("mt-agent.toml");
    fs::write(&config, "listen = \"[::]:9555\"\n").unwrap();
    let config = ["--config", config.to_str().unwrap()];
    let checked = setup(root, "check", &config).fails(3, &["network"]).stdout;
    assert!(
        checked.split_whitespace().collect::<Vec<_>>().join(" ").contains(&config.join(" ")),
        "{checked}"
    );
    let before = etc(root);
    assert!(!checked.contains("let in port"), "{checked}");
    setup(root, "apply", &config).ok();
    nft(root, &["-f", &format!("/{EL}")]);
    assert!(reached(9555, [true, true, false]) && reached(9443, [false; 3]));
    setup(root, "apply", &[]).ok();
    assert_eq!(etc(root), before);
    // What is not clear any more, or not found, stays as it is; and so does what needs nothing.
    let rules = text(root, moved);
    let drop_in = "etc/systemd/system/nftables.service.d/x.conf";
    let more = format!("{rules}add rule inet x y drop\n");
    for (path, rules) in [
        (moved, more.as_str()),
        (EL, "include \"/etc/nftables/*.nft\"\n"),
        (EL, "table inet x {\n}\n"),
        (drop_in, "[Service]\n"),
    ] {
        write(root, path, rules);
        let before = etc(root);
        setup(root, "apply", &[]).ok();
        assert_eq!(etc(root), before);
    }
    let refused = setup(root, "revert", &[]).fails(3, &["refused: network"]).stdout;
    assert!(refused.contains("was changed since"), "{refused}");
}

/// Wherever the file lies: the rules that are loaded go on to have the line.
#[test]
fn the_line_stays_where_the_way_to_it_is_not_known_any_more() {
    let input = "etc/nftables.d/input.nft";
    let ways: [(&str, &str); 3] = [
        (DEBIAN, "include \"/etc/nftables.d/*.nft\"\n"),
        ("etc/systemd/system/nftables.service.d/x.conf", "[Service]\n"),
        ("etc/systemd/system/x.target.wants/iptables.service", "x\n"),
    ];
    for (path, content) in ways {
        for is_edited in [false, true] {
            let dir = host(DEBIAN, "include \"/etc/nftables.d/input.nft\"\n");
            let root = dir.path();
            write(root, input, SAMPLE);
            let start = etc(root);
            setup(root, "apply", &[]).ok();
            match path.ends_with("iptables.service") {
                true => {
                    fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
                    symlink("/x", root.join(path)).unwrap();
                }
                false => write(root, path, content),
            }
            let with = text(root, input);
            assert!(with.contains(RULE), "{with}");
            if is_edited {
                write(root, input, &format!("# mine\n{with}"));
            }
            // Nor does it keep the rest from being done.
            fs::remove_file(root.join("etc/sysctl.d/60-mt-agent-network.conf")).unwrap();
            let before = etc(root);
            let plan = setup(root, "plan", &[]).ok().stdout;
            assert!(!plan.contains("+++ /etc/nftables") && plan.contains("is not clear"), "{path}: {plan}");
            for _ in 0..2 {
                setup(root, "apply", &[]).ok();
                let mut now = etc(root);
                assert!(now.remove(&root.join("etc/sysctl.d/60-mt-agent-network.conf")).is_some());
                assert_eq!(now, before, "{path}");
            }
            // It is known still what was there first.
            if is_edited {
                write(root, input, &with);
            }
            setup(root, "revert", &[]).ok();
            assert_eq!(text(root, input).into_bytes(), start[&root.join(input)], "{path}");
        }
    }
}

/// He edited a file, and what we have in it is not wanted any more: that is told, and keeps nothing else from being done.
#[test]
fn a_line_in_a_file_that_was_edited_is_taken_out_by_hand() {
    let dir = host(DEBIAN, CLOSED);
    let root = dir.path();
    setup(root, "apply", &[]).ok();
    let edited = format!("# mine\n{}", text(root, DEBIAN));
    write(root, DEBIAN, &edited);
    // To firewalld.
    let wants = root.join("etc/systemd/system/sysinit.target.wants");
    fs::rename(wants.join("nftables.service"), wants.join("firewalld.service")).unwrap();
    write(root, "usr/lib/firewalld/zones/public.xml", "<zone>\n</zone>\n");
    let zone = "etc/firewalld/zones/public.xml";
    let told = |said: &str| {
        let names = said.contains("/etc/nftables.conf was changed since `setup apply` put a line into it");
        names && said.contains(&format!("remove `{}` from it", RULE.trim()))
    };
    for _ in 0..2 {
        let applied = setup(root, "apply", &[]).ok().stdout;
        assert!(told(&applied) && text(root, zone).contains("mt-agent"), "{applied}");
        assert_eq!(text(root, DEBIAN), edited);
        let network = setup(root, "check", &["--json"]).ok().json()["changes"][0].take();
        assert!(network["level"] == "warn" && told(&network.to_string().replace('\\', "")), "{network:#}");
    }
    // firewalld's own tool writes a zone anew, and the default one is another by then.
    let with = text(root, zone);
    write(root, zone, &with.replace("<zone>", "<zone>\n  <service name=\"ssh\"/>"));
    write(root, "etc/firewalld/firewalld.conf", "DefaultZone=work\n");
    write(root, "usr/lib/firewalld/zones/work.xml", "<zone>\n</zone>\n");
    let applied = setup(root, "apply", &[]).ok().stdout;
    assert!(applied.contains("remove `<service name=\"mt-agent\"/>` from it"), "{applied}");
    assert!(text(root, "etc/firewalld/zones/work.xml").contains("mt-agent"));
    // None of it is taken back before the lines are out; then all of it is.
    let refused = setup(root, "revert", &[]).fails(3, &["refused: network"]).stdout;
    assert!(refused.contains(&format!("it still has the line `{}`", RULE.trim())), "{refused}");
    assert!(refused.contains("it still has the line `<service name=\"mt-agent\"/>`"), "{refused}");
    let edited = edited.replace(RULE, "");
    write(root, DEBIAN, &edited);
    let network = setup(root, "check", &["--json"]).ok().json()["changes"][0].take().to_string();
    assert!(!network.contains("nftables.conf") && network.contains("<service name="), "{network}");
    fs::remove_file(root.join(zone)).unwrap();
    setup(root, "revert", &[]).ok();
    assert_eq!(text(root, DEBIAN), edited);
    assert!(!root.join("etc/firewalld/zones/work.xml").exists() && !root.join(zone).exists());
    assert!(!root.join("var/lib/mt-agent-setup/network").exists());
}

/// What is told, and why nothing is written then.
#[test]
fn rules_that_are_not_clear_are_not_touched() {
    let input = |rules: &str| CLOSED.replace("tcp dport 22", &format!("{rules}\n\t\ttcp dport 22"));
    let and = |more: &str| format!("{CLOSED}{more}\n");
    let chain = |of: &str, base: &str| format!("table {of} a {{ chain c {{ type filter hook {base} }} }}");
    let sample = |old: &str, new: &str| SAMPLE.replace(old, new);
    let open = CLOSED.replace("input priority 0; policy drop", "input priority 0; policy accept");
    let open = open.replace("ct state invalid drop", "").replace("ip saddr @blocked drop", "");
    let (refuse, twice, hook) = ("may refuse it", "is there twice", "its say before or after");
    let (strange, several, last) =
        ("is not understood", "several chains at hook", "is not the last of its chain");
    let cases = [
        // Nothing is needed.
        (open.clone(), "no rule of nftables refuses"),
        (String::new(), "no rule of nftables refuses"),
        (input("tcp dport { 22, 9443 } counter accept comment \"x\""), "let in port 9443"),
        (input("ct state new tcp dport 9443 counter packets 1 bytes 2 accept"), "let in port 9443"),
        (sample("tcp dport @ports", "tcp dport 9443 accept\ntcp dport @ports"), "let in port 9443"),
        // Spoken of otherwise.
        (input("ip saddr 10.0.0.1 tcp dport 9443 accept"), "speaks of it"),
        (input("udp dport 9443 accept"), "speaks of it"),
        (input("tcp dport != { 22, 9443 } accept"), "speaks of it"),
        (input("tcp dport { 22 } tcp sport { 9443 } accept"), "speaks of it"),
        (sample("22, 80", "22, 9443"), "speaks of it"),
        (sample("ip saddr 10.7.7.7 counter drop", "iif lo jump allow").replace("\t\tjump allow\n", "").replace("@ports", "9443"), "speaks of it"),
        (sample("tcp dport @ports", "return\ntcp dport 9443 accept\ntcp dport @ports"), "speaks of it"),
        (input("ip saddr 10.0.0.0/8 tcp dport 9000-9999 accept"), "speaks of it"),
        (input("ip saddr 10.0.0.0/8 tcp dport 9000 - 9999 accept"), "speaks of it"),
        (input("ip saddr 10.0.0.0/8 tcp dport { 22, 9000- 9999 } accept"), "speaks of it"),
        (sample("22, 80", "9000-9999"), "speaks of it"),
        (sample("22, 80", "ssh, no-such-name"), "speaks of it"),
        (sample("22, 80", "22, also-ours"), "speaks of it"),
        (sample("type inet_service; elements = { 22, 80 }", "typeof tcp dport; elements={9000-9999}"), "speaks of it"),
        (sample("inet_service; elements = { 22, 80 }", "ipv4_addr . inet_service; elements = { 10.0.0.1 . ours }"), "speaks of it"),
        (input("tcp dport !=9443 accept"), "speaks of it"),
        (input("ip saddr 10.0.0.0/8 tcp dport>9000 accept"), "speaks of it"),
        (input("ip saddr 10.0.0.0/8 tcp dport >=9000 accept"), "speaks of it"),
        (input("ip saddr 10.0.0.0/8 tcp dport != 22 accept"), "speaks of it"),
        (input("ip saddr 10.0.0.0/8 tcp dport ne 22 accept"), "speaks of it"),
        (input("ip saddr 10.0.0.0/8 tcp dport & 0xff == 0xe3 accept"), "speaks of it"),
        (input("ip saddr 10.0.0.0/8 tcp dport 0x24e3 accept"), "speaks of it"),
        (input("ip saddr 10.0.0.0/8 tcp dport 022343 accept"), "speaks of it"),
        (input("ip saddr 10.0.0.0/8 tcp dport ours accept"), "speaks of it"),
        (input("ip saddr 10.0.0.0/8 @th,16,16 > 9000 accept"), "speaks of it"),
        (input("ip saddr 10.0.0.0/8 ct original proto-dst >9000 accept"), "speaks of it"),
        (input("ip saddr . tcp dport { 10.0.0.1 . ours } accept"), "speaks of it"),
        (input("tcp dport 9000-9999 accept"), "let in port 9443"),
        (input("tcp dport { 22, 0x24e3 } accept"), "let in port 9443"),
        // Refused before.
        (input("tcp dport 9443 drop"), refuse),
        (input("tcp dport 1024-65535 drop"), refuse),
        (input("ip saddr 0.0.0.0/0 drop"), refuse),
        (input("ip saddr 10.0.0.0/8 tcp dport 80 drop"), refuse),
        (input("ip saddr 10.0.0.0/8 @th,16,16 80 drop"), refuse),
        (input("ip saddr !=10.0.0.0/8 drop"), refuse),
        (input("ip saddr ne 10.0.0.0/8 drop"), refuse),
        (input("ip saddr lt 10.0.0.0 drop"), refuse),
        (input("ip saddr>=10.0.0.0 drop"), refuse),
        (input("ip saddr & 0.0.0.0 == 0.0.0.0 drop"), refuse),
        (input("ip saddr and 0.0.0.0 == 0.0.0.0 drop"), refuse),
        (input("ct state new drop"), refuse),
        (input("ct state != established reject"), refuse),
        (input("iifname eth1 drop"), refuse),
        (input("ct state vmap { established : accept, invalid : drop }"), refuse),
        (input("tcp dport vmap @m"), refuse),
        (input("tcp dport $ports accept"), refuse),
        (input("queue num 1"), refuse),
        (input("iif lo return"), refuse),
        (input("iif lo goto allow"), refuse),
        (input("ip saddr 10.0.0.0/8 jump { drop; }"), refuse),
        (input("jump no").replace("\tchain forward", "\tchain no { drop; }\n\tchain forward"), refuse),
        (sample("tcp dport @ports", "tcp dport vmap @m\ntcp dport @ports"), refuse),
        (sample("policy accept", "policy $p"), refuse),
        (sample("with icmpx type port-unreachable", "\ncounter"), last),
        (CLOSED.replace("policy drop", "policy $p"), last),
        (CLOSED.replace("type filter hook input", "type nat hook input"), last),
        // In other places.
        (and(&chain("inet", "input priority 0; policy drop;")), several),
        (and(&chain("ip", "input priority 0; tcp dport 80 drop;")), several),
        (and(&chain("arp", "input priority 0; policy drop;")), several),
        (chain("arp", "input priority 0; policy drop;"), several),
        (and(&chain("inet", "prerouting priority 0; fib saddr oif missing drop;")), hook),
        (and(&chain("netdev", "ingress device \"lo\" priority 0; drop;")), hook),
        (and(&chain("ip", "output priority 0; policy drop;")), hook),
        (and(&chain("ip", "prerouting priority 0; redirect to 22;")), hook),
        (open.clone() + &chain("ip", "output priority 0; jump x;"), hook),
        (CLOSED.replace("ct state invalid", &format!("{BASE}\n\t\tct state invalid")), "inet filter input says twice at which hook it is"),
        // Not as it is usually.
        (CLOSED.replace("\tset", "\tflags dormant\n\tset"), strange),
        (and("flush table inet filter"), strange),
        (and("delete table inet filter"), strange),
        (and("add rule inet filter input drop"), strange),
        (and("table inet filter { }"), twice),
        (CLOSED.replace("chain forward", "chain input"), twice),
        (format!("define t = x\ntable inet $t {{ chain i {{ {BASE} }} }}\n"), twice),
        (input("include \"/etc/x\""), strange),
        (input("tcp dport 80 \\\n accept"), strange),
        (CLOSED.replace('\n', "\r\n"), strange),
        (and("include \"/etc/nftables/*.nft\""), "may mean several files"),
        (and("include \"more.nft\""), "may mean several files"),
        (and("include \"/etc/none.nft\""), "none.nft is not there"),
        (and("include \"/etc/nftables.conf\""), "is included twice"),
        (and("# is managed by iptables-nft"), "tables of iptables"),
        (and("}"), "its braces do not match"),
        (CLOSED[..CLOSED.len() - 2].to_owned(), "its end is missing"),
        (format!("table inet f {{ chain i {{ {BASE}\n{} }} }}\n", "ct state invalid drop\n".repeat(300_000)), "file too large"),
        (format!("table inet f {{ {} }}\n", "chain i {\ndrop\n}\n".repeat(200_000)), twice),
        (format!("{} }}\n", (0..40_000).fold("table inet f {".to_owned(), |all, at| all + &format!("chain i{at} {{\ntype filter hook input priority 0; jump x\n}}\nchain n{at} {{\ndrop\n}}\n"))), several),
        (input(&format!("udp dport 7 drop comment \"{}\"", "x".repeat(4000))), refuse),
    ];
    for (rules, told) in cases {
        let dir = host(DEBIAN, &rules);
        let root = dir.path();
        write(root, "etc/services", "# 9443\nssh 22/tcp # x\nours\t9443/tcp also-ours\nours 9444/udp\n");
        let start = etc(root);
        let network = setup(root, "check", &["--json"]).json()["changes"][0].take();
        let found = network["findings"].as_array().unwrap().last().unwrap().clone();
        let what = found["what"].as_str().unwrap();
        assert!(
            what.contains(told) && what.len() < 300 && network.to_string().len() < 2000,
            "{told}: {rules:.2000}: {network:#}"
        );
        let is_clear = what.starts_with("no rule") || what.starts_with("the rules");
        assert_eq!(found["level"], if is_clear { "pass" } else { "warn" }, "{network:#}");
        assert_eq!(found["fix"].as_str().unwrap().contains("put `tcp dport 9443 accept` into"), !is_clear);
        setup(root, "apply", &[]).ok();
        let mut now = etc(root);
        now.retain(|path, _| !path.ends_with("sysctl.d") && !path.ends_with("60-mt-agent-network.conf"));
        assert_eq!(now, start, "{told}");
    }
}

/// What nftables.service loads is another file, or not to be known; and who else has a say.
#[test]
fn the_unit_is_read_strictly() {
    let unit = "usr/lib/systemd/system/nftables.service";
    let start = "[Service]\nExecStart=/usr/sbin/nft -f /etc/sysconfig/nftables.conf\n";
    let not_its_own = "is not its distribution's configuration";
    let wants = "etc/systemd/system/multi-user.target.wants";
    let cases = [
        (unit, format!("{start}ExecStartPost=/usr/sbin/nft -f /srv/rules\n"), not_its_own),
        (unit, format!("{start}ExecStart=/usr/sbin/nft -f /srv/rules\n"), not_its_own),
        (unit, start.replace("ExecStart", "#ExecStart"), not_its_own),
        (unit, start.replace("/etc/sys", "/srv/sys"), not_its_own),
        (unit, start.replace(" -f", " -c -f"), not_its_own),
        (unit, start.replace(" -f", " -f \\\n"), not_its_own),
        ("etc/systemd/system/nftables.service", "[Service]\n".to_owned(), not_its_own),
        ("etc/systemd/system/nftables.service.d/x.conf", String::new(), "nftables.service.d may have"),
        ("usr/lib/systemd/system/nftables.service.d/x.conf", String::new(), "nftables.service.d may have"),
        ("etc/systemd/system/service.d/x.conf", String::new(), "service.d may have"),
        (
            "etc/systemd/system.control/nftables.service.d/x.conf",
            String::new(),
            "nftables.service.d may have",
        ),
        (
            "usr/local/lib/systemd/system/nftables.service.d/x.conf",
            String::new(),
            "nftables.service.d may have",
        ),
        ("usr/local/lib/systemd/system/nftables.service", start.to_owned(), "nftables.service may have"),
        ("iptables.service", String::new(), "iptables.service is enabled too"),
        ("ufw.service", String::new(), "ufw.service is enabled too"),
    ];
    for (path, content, told) in cases {
        let dir = host(EL, CLOSED);
        let root = dir.path();
        match path.contains('/') {
            true => write(root, path, &content),
            false => symlink("/x", root.join(wants).join(path)).unwrap(),
        }
        let network = setup(root, "check", &["--json"]).json()["changes"][0].take().to_string();
        assert!(network.contains(told) && network.contains("tcp dport 9443"), "{network}");
        setup(root, "apply", &[]).ok();
        assert_eq!(text(root, EL), CLOSED, "{told}");
    }
    // Alone, it is no reason to say that there is no firewall.
    for unit in ["iptables.service", "ufw.service", "netfilter-persistent.service"] {
        let dir = host(EL, CLOSED);
        fs::rename(dir.path().join(wants).join("nftables.service"), dir.path().join(wants).join(unit))
            .unwrap();
        let network = setup(dir.path(), "check", &["--json"]).json()["changes"][0].take();
        let found = network["findings"].as_array().unwrap().last().unwrap().clone();
        assert!(found["level"] == "warn" && found["what"].as_str().unwrap().starts_with(unit), "{found}");
        assert!(found["fix"].as_str().unwrap().contains("TCP port 9443"), "{found}");
    }
}

/// As in EL's own sample.
#[test]
fn a_service_at_another_port_is_no_reason_to_leave_the_rules_alone() {
    for rules in [SAMPLE.replace("22, 80", "ssh, 9090"), CLOSED.replace("dport 22", "dport { ssh, 80 }")] {
        let dir = host(EL, &rules);
        let root = dir.path();
        write(root, "etc/services", "ssh\t22/tcp\nssh\t22/udp\nours 9443/tcp # ssh\n");
        setup(root, "apply", &[]).ok();
        assert!(text(root, EL).contains(RULE), "{rules}");
    }
}

/// On the running host no rule is touched; what is to be done is told once.
#[test]
fn the_running_rules_are_the_administrators() {
    if !alone("the_running_rules_are_the_administrators") {
        return;
    }
    let dir = host(DEBIAN, CLOSED);
    let root = dir.path();
    let config = root.join("mt-agent.toml");
    fs::write(&config, format!("state_dir = {:?}\n", root.join("state"))).unwrap();
    let agent =
        |command: &str| format!("\"$@\" setup {command} --only network --config {}", config.display());
    let script = format!(
        "mount --bind \"$0/etc\" /etc; mount --bind /bin/true \"$(command -v sysctl)\"\n\
         for d in /run/systemd /run/udev; do if [ -d $d ]; then mount -t tmpfs none $d; fi; done\n\
         nft -f /{DEBIAN}; nft list ruleset > \"$0/before\"; {}; {}; nft list ruleset > \"$0/after\"; {}",
        agent("apply"),
        agent("apply"),
        agent("revert"),
    );
    let first = ["--mount", "--propagation", "private", "sh", "-ec", &script, root.to_str().unwrap()];
    let said = support::tool("unshare", &[&first[..], &[env!("CARGO_BIN_EXE_mt-agent")]].concat());
    let [applied, back] =
        [said.find("is in effect when nftables.service has"), said.find("network: is taken back")];
    assert!(applied.is_some() && applied < back, "{said}");
    assert_eq!(said.matches("systemctl reload nftables.service").count(), 2, "{said}");
    assert!(said[back.unwrap()..].contains("may let in port 9443 until systemctl reload"), "{said}");
    assert_eq!(text(root, "before"), text(root, "after"));
    assert_eq!(text(root, DEBIAN), CLOSED);
}

/// What keeps it from being taken back is told with what helps, and what was left before anything was recorded goes.
#[test]
fn only_the_mode_or_the_owner_is_told_as_such() {
    let dir = host(DEBIAN, CLOSED);
    let root = dir.path();
    let left = root.join("var/lib/mt-agent-setup/network");
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join(".record.json.mt-agent-new"), "{").unwrap();
    assert!(setup(root, "revert", &[]).ok().stdout.contains("was not applied"));
    assert!(!left.exists());
    let start = etc(root);
    setup(root, "apply", &[]).ok();
    let main = root.join(DEBIAN);
    fs::set_permissions(&main, fs::Permissions::from_mode(0o600)).unwrap();
    let refused = setup(root, "revert", &[]).fails(3, &["refused: network"]).stdout;
    assert!(refused.contains("only its mode: 644 then, 600 now; chmod 644 /etc/nftables.conf"), "{refused}");
    if support::root("a file of another owner") {
        std::os::unix::fs::chown(&main, Some(12), Some(34)).unwrap();
        let refused = setup(root, "revert", &[]).fails(3, &["refused: network"]).stdout;
        let told = "only its owner: 0:0 then, 12:34 now; chown 0:0 /etc/nftables.conf && chmod 644 /etc/nftables.conf";
        assert!(refused.contains(told), "{refused}");
        std::os::unix::fs::chown(&main, Some(0), Some(0)).unwrap();
    }
    fs::set_permissions(&main, fs::Permissions::from_mode(0o644)).unwrap();
    setup(root, "revert", &[]).ok();
    assert_eq!(etc(root), start);
}
