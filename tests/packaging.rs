//! What is shipped beside the binary, held against the tools that read it.

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

/// What is refused is refused again a moment later: exit code 3, and wrong usage, 2.
#[test]
fn nothing_that_is_refused_is_started_again_and_again() {
    for name in ["mt-agent.service", "mt-agent-send@.service"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging").join(name);
        let unit = fs::read_to_string(path).unwrap();
        let codes = unit.lines().find_map(|line| line.strip_prefix("RestartPreventExitStatus=")).unwrap();
        assert!(
            ["2", "3"].iter().all(|code| codes.split(' ').any(|given| given == *code)),
            "{name}: {codes}"
        );
    }
}

/// systemd finds nothing wrong with the units, and the program knows every option in them.
#[test]
fn units_are_what_systemd_reads() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        support::skipped("units_are_what_systemd_reads", "there is no systemd-analyze");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging");
    for name in ["mt-agent-send@.service", "mt-agent.service"] {
        let unit = fs::read_to_string(units.join(name)).unwrap();
        // The binary is not installed here.
        let here = unit.replace("/usr/bin/mt-agent", env!("CARGO_BIN_EXE_mt-agent"));
        let path = dir.path().join(name.replace('@', "@web01"));
        fs::write(&path, here).unwrap();
        let checked =
            Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output().unwrap();
        let said = String::from_utf8_lossy(&checked.stderr).into_owned();
        let ours: Vec<&str> = said.lines().filter(|line| line.contains("mt-agent")).collect();
        assert!(checked.status.success() && ours.is_empty(), "{name}: {said}");

        let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/mt-agent ")).unwrap();
        let command = start.split_whitespace().next().unwrap();
        let help = Command::new(env!("CARGO_BIN_EXE_mt-agent")).args([command, "--help"]).output().unwrap();
        assert!(help.status.success(), "{start}");
        let help = String::from_utf8_lossy(&help.stdout).into_owned();
        for option in start.split_whitespace().filter(|word| word.starts_with("--")) {
            assert!(help.contains(option), "{option}");
        }
    }
}

/// The man pages and the completions are what their readers read: no warning of either formatter, no error of any
/// shell, and each command and each key is told of.
#[test]
fn pages_and_completions_are_sound() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    support::tool(env!("CARGO_BIN_EXE_mt-agent"), &["generate", dir.path().to_str().unwrap()]);

    let mut pages: Vec<_> = ["man1", "man5"]
        .iter()
        .flat_map(|section| fs::read_dir(dir.path().join(section)).unwrap())
        .map(|page| page.unwrap().path().to_str().unwrap().to_owned())
        .collect();
    pages.sort();
    let shown = |page: &str| {
        let out = Command::new("man")
            .args(["-l", "--warnings", page])
            .env("LC_ALL", "C.UTF-8")
            .env("MANWIDTH", "200")
            .output()
            .unwrap();
        assert!(
            out.status.success() && out.stderr.is_empty(),
            "{page}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).unwrap()
    };
    if has("man") {
        let texts: Vec<String> = pages.iter().map(|page| shown(page)).collect();
        let said = texts.join("\n");
        for key in &mt_agent::agent::config::KEYS {
            assert!(said.contains(&format!("{} = ", key.name)), "{}", key.name);
        }
        // Each page that another one refers to is there.
        for name in said.split_whitespace().filter_map(|word| word.split_once("(1)").map(|(name, _)| name)) {
            if name.starts_with("mt-agent") {
                assert!(pages.contains(&path(&format!("man1/{name}.1"))), "{name}(1)");
            }
        }
        let help = Command::new(env!("CARGO_BIN_EXE_mt-agent")).arg("--help").output().unwrap();
        let help = String::from_utf8(help.stdout).unwrap();
        let commands = help.split("Commands:").nth(1).unwrap().split("\n\n").next().unwrap();
        let commands = commands.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
        for command in commands.filter(|command| !command.is_empty() && *command != "help") {
            assert!(pages.contains(&path(&format!("man1/mt-agent-{command}.1"))), "{command}");
        }
    }
    if has("mandoc") {
        for page in &pages {
            support::tool("mandoc", &["-T", "lint", "-W", "warning", page]);
        }
    }
    for (shell, script) in
        [("bash", "bash/mt-agent"), ("zsh", "zsh/_mt-agent"), ("fish", "fish/mt-agent.fish")]
    {
        if has(shell) {
            support::tool(shell, &["-n", &path(script)]);
        }
    }
}

/// Whether a program is installed; where it is not, that is said.
fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        support::skipped("pages_and_completions_are_sound", &format!("{program} is not installed"));
    }
    found
}

/// What the service may do is what it needs: systemd's own figure of how exposed it is, of 10 at most.
#[test]
fn the_service_is_no_more_exposed_than_its_unit_argues_for() {
    let test = "the_service_is_no_more_exposed_than_its_unit_argues_for";
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/mt-agent.service");
    let mut analyze = Command::new("systemd-analyze");
    let Ok(output) = analyze.args(["security", "--no-pager", "--offline=true"]).arg(&unit).output() else {
        return support::skipped(test, "there is no systemd-analyze");
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let Some((_, level)) = said.split_once("exposure level for mt-agent.service: ") else {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return support::skipped(test, &format!("systemd-analyze has no --offline: {said}"));
    };
    let level: f64 = level.split_whitespace().next().unwrap().parse().unwrap();
    assert!(level <= 1.5, "{said}");
    let text = fs::read_to_string(&unit).unwrap();
    assert!(text.contains("\nCapabilityBoundingSet=\n") && text.contains("\nUser=mt-agent\n"), "{text}");
}

/// The user is made, and root's commands find directories that are the user's.
#[test]
fn the_user_and_the_directories_are_made_as_systemd_makes_them() {
    require_root!();
    let test = "the_user_and_the_directories_are_made_as_systemd_makes_them";
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging");
    let dir = tempfile::tempdir().unwrap();
    let root = format!("--root={}", dir.path().display());
    fs::create_dir_all(dir.path().join("etc")).unwrap();
    for (tool, args, file) in [
        ("systemd-sysusers", &[][..], "mt-agent.sysusers"),
        ("systemd-tmpfiles", &["--create"], "mt-agent.tmpfiles"),
    ] {
        let Ok(output) = Command::new(tool).arg(&root).args(args).arg(packaging.join(file)).output() else {
            return support::skipped(test, &format!("there is no {tool}"));
        };
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && !said.contains(file), "{tool}: {said}");
    }
    let users = fs::read_to_string(dir.path().join("etc/passwd")).unwrap();
    let user = users.lines().find(|line| line.starts_with("mt-agent:")).expect("a user");
    let [uid, gid] = [2, 3].map(|at| user.split(':').nth(at).unwrap().parse::<u32>().unwrap());
    for (path, mode) in [("var/lib/mt-agent", 0o700), ("run/mt-agent", 0o755)] {
        let metadata = fs::metadata(dir.path().join(path)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (uid, gid, mode), "{path}");
    }
}
