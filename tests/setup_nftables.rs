//! `mt-agent setup` where nftables.service keeps the host closed: on the trees of hosts, and with the kernel's own rules.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::{Outcome, run};
use tempfile::TempDir;

const EL: &str = "etc/sysconfig/nftables.conf";
const DEBIAN: &str = "etc/nftables.conf";
const OURS: &str = "etc/nftables/mt-agent.nft";
const INCLUDE: &str = "include \"/etc/nftables/mt-agent.nf[t]\"\n";
const CLOSED: &str = "flush ruleset\n\ntable inet filter {\n\tchain input {\n\t\ttype filter hook input priority 0; policy drop;\n\
                      \t\tct state vmap { established : accept, related : accept }\n\t\ttcp dport 22 accept # by hand\n\t}\n}\n";

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

/// Says why, where rules cannot be loaded here.
fn no_rules() -> bool {
    let listed = Command::new("unshare").args(["--net", "nft", "list", "ruleset"]).output();
    let works = listed.is_ok_and(|output| output.status.success());
    if !works {
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        support::skipped(&test, "nft is missing, or this kernel has no nf_tables");
    }
    !works
}

/// Runs a script in a network of its own, with this tree's `/etc`. The program is `$@`, and what it says is not shown.
fn alone(root: &Path, script: &str) -> String {
    let prepare = "mount --bind \"$0/etc\" /etc; mount --bind /bin/true \"$(command -v sysctl)\"; \
                   for d in /run/systemd /run/udev; do if [ -d $d ]; then mount -t tmpfs none $d; fi; done; cd /etc";
    support::tool(
        "unshare",
        &[
            "--net",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-ec",
            &format!("{prepare}; {script}"),
            root.to_str().unwrap(),
            env!("CARGO_BIN_EXE_mt-agent"),
            "setup",
        ],
    )
}

#[test]
fn the_port_is_let_in_before_what_refuses_it() {
    let jump = "table inet svc {\n\tset ports { type inet_service; elements = { 22, 80 }; }\n\tchain allow {\n\t\ttcp dport @ports accept\n\
                \t}\n\tchain INPUT {\n\t\ttype filter hook input priority filter + 20\n\t\tpolicy accept\n\t\tjump allow\n\
                \t\treject with icmpx port-unreachable\n\t}\n}";
    let pair = "table filter {\n\tchain INPUT { type filter hook input priority 0; policy drop; }\n}\n\
                table ip6 filter {\n\tchain INPUT { type filter hook input priority 0; policy drop; }\n}\n\
                table inet mangle {\n\tchain x { type filter hook input priority -150; meta mark set 1; }\n}\n";
    let cases: [(&str, &str, &[&str]); 5] = [
        (EL, CLOSED, &["inet filter input"]),
        (DEBIAN, CLOSED, &["inet filter input"]),
        (EL, jump, &["inet svc INPUT"]),
        (DEBIAN, pair, &["ip filter INPUT", "ip6 filter INPUT"]),
        (EL, "#x\\\ninclude \"/etc/nftables/more.nft\" # there", &["inet filter input"]),
    ];
    for (main, rules, chains) in cases {
        let dir = host(main, rules);
        let root = dir.path();
        write(root, "etc/nftables/more.nft", CLOSED);
        let start = etc(root);
        let plan = setup(root, "plan", &[]).ok().stdout;
        assert!(
            plan.contains("+++ /etc/nftables/mt-agent.nft") && plan.contains(&format!("+++ /{main}")),
            "{plan}"
        );
        assert_eq!(etc(root), start);
        setup(root, "apply", &[]).ok();
        let applied = etc(root);
        let newline = if rules.ends_with('\n') { "" } else { "\n" };
        assert_eq!(text(root, main), format!("{rules}{newline}{INCLUDE}"));
        let ours = text(root, OURS);
        let lines: Vec<&str> = ours.lines().filter(|line| line.starts_with("insert")).collect();
        let rule = |chain: &&str| format!("insert rule {chain} tcp dport 9443 accept comment \"mt-agent\"");
        assert_eq!(lines, chains.iter().map(rule).collect::<Vec<_>>());
        let again = setup(root, "apply", &[]).ok().stdout;
        assert!(!again.contains("wrote") && etc(root) == applied, "{again}");
        let checked = setup(root, "check", &["--json"]).ok().json()["changes"][0].take();
        assert_eq!(checked["level"], "pass", "{checked:#}");
        if support::root("rules as nft reads them") && !no_rules() {
            // Ours or not: neither a file that is gone nor a chain with another name keeps the rules from being loaded.
            let loads =
                alone(root, &format!("nft -f /{main}; nft list ruleset | grep -c 'dport 9443 accept'"));
            assert_eq!(loads, chains.len().to_string(), "{rules}");
            let renamed = format!("sed -i 's/chain i/chain j/I' {main} nftables/more.nft", main = &main[4..]);
            alone(
                root,
                &format!(
                    "cp -a /etc /tmp/e.$$; mount --bind /tmp/e.$$ /etc; cd /etc; {renamed}; nft -f /{main}; \
                                  rm nftables/mt-agent.nft; nft flush ruleset; nft -f /{main}; nft list ruleset | grep -q 'hook input'; \
                                  cd /; umount /etc; rm -r /tmp/e.$$"
                ),
            );
        }
        setup(root, "revert", &[]).ok();
        assert_eq!(etc(root), start);
    }
}

/// What is told, and why nothing is written then.
#[test]
fn rules_that_are_not_understood_are_not_touched() {
    let base = "type filter hook input priority 0; policy drop;";
    let open = CLOSED.replace("policy drop", "policy accept");
    let many = "ct state invalid drop\n".repeat(300_000);
    let cases = [
        (open, "no rule in /etc/nftables.conf refuses"),
        (String::new(), "no rule in /etc/nftables.conf refuses"),
        (format!("table arp a {{ chain i {{ {base} }} }}\n"), "no rule in /etc/nftables.conf refuses"),
        (CLOSED.replace("dport 22", "dport { 22, 9443 }"), "speaks of port 9443"),
        (format!("{CLOSED}table inet other {{ chain i {{ {base} }} }}\n"), "several chains drop or reject"),
        (format!("{CLOSED}table ip other {{ chain i {{ {base} }} }}\n"), "several chains drop or reject"),
        (
            format!("{CLOSED}add rule inet filter input drop\n"),
            "`add rule inet filter input drop` is not understood",
        ),
        (format!("add chain inet x y {{ {base} }}\n"), "`add chain inet x y type filter"),
        (
            format!("define t = x\ntable inet $t {{ chain i {{ {base} }} }}\n"),
            "the name `$t` is not understood",
        ),
        (
            CLOSED.replace("ct state", "include \"/etc/x\"\nct state"),
            "`include \"/etc/x\"` is not understood",
        ),
        (format!("{CLOSED}include \"/etc/nftables/*.nft\"\n"), "may mean several files"),
        (format!("{CLOSED}include \"./more.nft\"\n"), "may mean several files"),
        (format!("{CLOSED}include \"none.nft\"\n"), "none.nft is not there"),
        (format!("{CLOSED}include \"nftables.conf\"\n"), "it is too long"),
        (format!("table inet f {{ chain i {{ {base}\n{many} }} }}\n"), "file too large"),
        (
            format!("table ip f {{ chain i {{ {base} }} # is managed by iptables-nft\n}}\n"),
            "it has tables of iptables",
        ),
        (format!("{CLOSED}}}\n"), "its braces do not match"),
        (CLOSED[..CLOSED.len() - 2].to_owned(), "its end is missing"),
        (format!("{CLOSED}# the end \\"), "its end is missing"),
    ];
    for (rules, told) in cases {
        let dir = host(DEBIAN, &rules);
        let root = dir.path();
        let checked = setup(root, "check", &[]).fails(3, &[]).stdout;
        let words = checked.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains(told), "{told}: {checked}");
        setup(root, "apply", &[]);
        assert_eq!(text(root, DEBIAN), rules, "{told}");
        assert!(!root.join("etc/nftables").exists(), "{told}");
    }
    // What the service loads is another file, or not to be known; and who else has a say.
    let told = |change: &dyn Fn(&Path), told: &str| {
        let dir = host(EL, CLOSED);
        change(dir.path());
        let network = setup(dir.path(), "check", &["--json"]).json()["changes"][0].take().to_string();
        assert!(network.contains(told) && network.contains("tcp dport 9443"), "{network}");
        setup(dir.path(), "apply", &[]);
        assert_eq!(text(dir.path(), EL), CLOSED);
    };
    let not_its_own = "is not its distribution's configuration";
    let unit = "etc/systemd/system/nftables.service";
    told(&|root| write(root, unit, "[Service]\nExecStart=/sbin/nft -f /srv/rules\n"), not_its_own);
    told(
        &|root| write(root, &format!("{unit}.d/x.conf"), "[Service]\n"),
        "nftables.service.d may have it load others",
    );
    let iptables = "etc/systemd/system/basic.target.wants/iptables.service";
    told(
        &|root| {
            fs::create_dir_all(root.join(iptables).parent().unwrap()).unwrap();
            symlink("/x", root.join(iptables)).unwrap();
        },
        "iptables.service is enabled too",
    );
}

/// The administrator goes on with what is his.
#[test]
fn what_the_administrator_writes_later_is_followed_or_left() {
    let dir = host(EL, CLOSED);
    let root = dir.path();
    setup(root, "apply", &[]).ok();
    let closed = text(root, OURS);
    // Another name, and a line below ours; then, saved from the kernel with our rule in it.
    let renamed = CLOSED.replace("chain input", "chain in");
    write(root, EL, &format!("{INCLUDE}{renamed}"));
    setup(root, "check", &[]).fails(3, &["network"]);
    setup(root, "apply", &[]).ok();
    assert_eq!(text(root, EL), format!("{renamed}{INCLUDE}"));
    assert_eq!(text(root, OURS), closed.replace("filter input", "filter in"));
    let saved = CLOSED.replace("tcp dport 22", "tcp dport 9443 accept comment \"mt-agent\"\n tcp dport 22");
    write(root, EL, &saved);
    setup(root, "apply", &[]).ok();
    assert_eq!(text(root, EL), format!("{saved}{INCLUDE}"));
    // What is not clear any more, or needs nothing, stays as it is.
    for rules in [
        format!("{INCLUDE}{CLOSED}add rule inet filter input drop\n"),
        format!("table inet x {{\n}}\n{INCLUDE}"),
    ] {
        write(root, EL, &rules);
        let before = etc(root);
        setup(root, "apply", &[]).ok();
        assert_eq!(etc(root), before);
    }
    write(root, EL, &format!("{saved}{INCLUDE}"));
    write(root, "etc/systemd/system/nftables.service.d/x.conf", "[Service]\n");
    let before = etc(root);
    setup(root, "apply", &[]).ok();
    assert_eq!(etc(root), before);
    let refused = setup(root, "revert", &[]).fails(3, &["refused: network"]).stdout;
    assert!(refused.contains("was changed since"), "{refused}");
}

/// On the running host there is one rule of ours at once, also where more were; and none after it was taken back.
#[test]
fn the_running_rules_have_it_once() {
    require_root!();
    if no_rules() {
        return;
    }
    let dir = host(DEBIAN, CLOSED);
    let root = dir.path();
    let config = root.join("mt-agent.toml");
    fs::write(&config, format!("state_dir = {:?}\n", root.join("state"))).unwrap();
    let agent = |command: &str| format!("\"$@\" {command} --only network --config {} >&2", config.display());
    let rules = "nft -a list ruleset | grep -e mt-agent -e 'hook input' -e 22 | sed 's/# handle.*//'";
    // Not loaded yet: nothing is made in the kernel.
    let said = alone(root, &format!("{}; nft list ruleset", agent("apply")));
    assert_eq!(said, "");
    assert_eq!(text(root, DEBIAN), format!("{CLOSED}{INCLUDE}"));
    alone(root, &agent("revert"));
    assert_eq!(text(root, DEBIAN), CLOSED);
    let stray = "nft insert rule inet filter input tcp dport 1 accept comment mt-agent; nft add rule inet filter input tcp dport 2 \
                 accept comment mt-agent; nft add rule inet filter input tcp dport 22 comment other";
    let said = alone(
        root,
        &format!(
            "nft -f {DEBIAN}; {stray}; {}; {rules}; {}; {rules}; echo; nft -f {DEBIAN}; {rules}; echo; {}; {rules}",
            agent("apply"),
            agent("apply"),
            agent("revert"),
            DEBIAN = "/etc/nftables.conf",
        ),
    );
    let said: Vec<&str> = said.lines().map(str::trim).collect();
    let (hook, ssh) = ("type filter hook input priority filter; policy drop;", "tcp dport 22 accept");
    let (ours, other) = ("tcp dport 9443 accept comment \"mt-agent\"", "tcp dport 22 comment \"other\"");
    let once = [hook, ours, ssh, other];
    assert_eq!(said, [&once[..], &once, &["", hook, ours, ssh, "", hook, ssh]].concat());
    assert_eq!(text(root, DEBIAN), CLOSED);
    assert!(!root.join("etc/nftables").exists());
}
