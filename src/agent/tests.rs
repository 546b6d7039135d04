use std::collections::VecDeque;
use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::config::{Config, Error as ConfigError, KEYS, Mistake, Place, Sourced, commented};
use super::control::{Control, Error as ControlError};
use super::status::{Board, Live, Report, SCHEMA_VERSION, Service};
use super::{STRANGERS, Stranger};
use crate::name::Name;
use crate::pass::PassId;
use crate::points::retention::Policy;
use crate::protection::{Assignment, Source, State, Store};
use crate::storage::device::{Engine, EngineChoice};
use crate::units::ByteLen;
use crate::volume::counters::{Counters, Phase};

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn engine() -> Engine {
    Engine { name: "threads".to_owned(), why: "asked for".to_owned() }
}

fn assignment(disk: &str, number: u32) -> Assignment {
    Assignment {
        name: name(disk),
        id: format!("naa.6000c29{number:025x}").parse().unwrap(),
        size: ByteLen(ByteLen::GIB),
        logical_sector: 512,
        overwrite: false,
        seed: false,
        assigned_at: OffsetDateTime::from_unix_timestamp(0).unwrap(),
        state: State::Empty,
        last_commit: None,
        source: None,
        released: None,
        taken_back: false,
    }
}

// Configuration.

fn wrong(text: &str) -> (usize, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mt-agent.toml");
    fs::write(&file, text).unwrap();
    let error = Config::load(Some(&file)).unwrap_err();
    let text = error.to_string();
    match error {
        ConfigError::Mistakes { mut mistakes, .. } => {
            assert_eq!((mistakes.told.len(), mistakes.more), (1, 0), "{text}");
            let Mistake { place, what } = mistakes.told.remove(0);
            assert!(text.starts_with(&format!("{}:{}: ", file.display(), place.line)), "{text}");
            (place.line, what)
        }
        ConfigError::Io(error) => panic!("{error}"),
    }
}

#[test]
fn without_files_there_are_defaults() {
    let dir = tempfile::tempdir().unwrap();
    let nothing = dir.path().join("nothing");
    let config = Sourced::load_from(&nothing, &nothing).unwrap().config;
    assert_eq!(config, Config::default());
    assert_eq!(config.listen, "[::]:9443".parse().unwrap());
    assert_eq!(config.retention_dir, Path::new("/var/lib/mt-agent/retention"));
    assert_eq!(config.control_socket, Path::new("/run/mt-agent/control.sock"));
    assert_eq!((config.window.0, config.engine, config.allow_loop), (8 << 20, EngineChoice::Auto, false));
    // A file that was named must be there.
    assert!(matches!(Config::load(Some(&nothing)), Err(ConfigError::Io(_))));
}

#[test]
fn later_files_win_key_by_key() {
    let dir = tempfile::tempdir().unwrap();
    let (main, snippets) = (dir.path().join("mt-agent.toml"), dir.path().join("conf.d"));
    fs::create_dir(&snippets).unwrap();
    fs::write(&main, "state_dir = \"/a\"\nwindow = \"4M\"\nmax_sessions = 1\n").unwrap();
    fs::write(snippets.join("20-b.toml"), "window = 33554432\nengine = \"io-uring\"\n").unwrap();
    fs::write(snippets.join("10-a.toml"), "window = \"16 MiB\"\nallow_loop = true\nidle_timeout = \"2m\"\n")
        .unwrap();
    // In whatever order the directory has them, which is neither that of their names nor of their making.
    for n in (30..60).rev() {
        fs::write(snippets.join(format!("{n}.toml")), format!("max_sessions = {n}\n")).unwrap();
    }
    fs::write(snippets.join("30-c.toml.rpmsave"), "nonsense").unwrap();
    fs::write(snippets.join(".40-d.toml"), "nonsense").unwrap();
    let sourced = Sourced::load_from(&main, &snippets).unwrap();
    assert_eq!(sourced.set["window"], Place { file: snippets.join("20-b.toml"), line: 1 });
    assert_eq!((sourced.files.len(), sourced.set.contains_key("listen")), (33, false));
    let config = sourced.config;
    assert_eq!(config.window.0, 32 << 20);
    assert_eq!((config.engine, config.allow_loop, config.max_sessions), (EngineChoice::IoUring, true, 59));
    assert_eq!(
        (config.idle_timeout, config.retention_dir),
        (Duration::from_secs(120), PathBuf::from("/a/retention"))
    );
    // One that was named stands alone.
    assert_eq!(Config::load(Some(&main)).unwrap().window.0, 4 << 20);
}

#[test]
fn what_is_kept_is_configured() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mt-agent.toml");
    let hours = |hours: u64| Duration::from_secs(hours * 60 * 60);
    let default = Policy { max_age: hours(24), max_bytes: None, min_free: 1 << 30, thinning: false };
    assert_eq!((Config::default().retention, Config::default().allow_root_retention), (default, false));
    let text = "retention_age = \"168h\"\nretention_size = \"2G\"\nretention_free = 0\n\
        retention_thinning = true\nallow_root_retention = true\n";
    fs::write(&file, text).unwrap();
    let config = Config::load(Some(&file)).unwrap();
    let given = Policy { max_age: hours(168), max_bytes: Some(2 << 30), min_free: 0, thinning: true };
    assert_eq!((config.retention, config.allow_root_retention), (given, true));
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_right_one() {
    for (key, right) in [
        ("windw", "window"),
        ("retention-dir", "retention_dir"),
        ("RetentionDir", "retention_dir"),
        ("allow_loops", "allow_loop"),
        ("max_session", "max_sessions"),
        ("timeout", "idle_timeout"),
        ("retention_ages", "retention_age"),
        ("thinning", "retention_thinning"),
        ("socket", "control_socket"),
        ("port", ""),
        ("completely_else", ""),
        ("server", ""),
    ] {
        let (line, what) = wrong(&format!("# one\nlisten = \"[::1]:1\"\n{key} = 1\n"));
        assert_eq!(line, 3);
        let hint = format!("did you mean `{right}`?");
        let all = "the keys are listen, state_dir";
        assert!(what.contains(if right.is_empty() { all } else { &hint }), "{key}: {what}");
    }
    assert!(wrong("[server]\nlisten = \"[::]:1\"").1.contains("no key `server`"));
    assert!(wrong(&format!("{} = 1", "x".repeat(100_000))).1.len() < 500);
}

#[test]
fn a_wrong_value_is_named_with_its_line_and_what_would_be_right() {
    for (text, what) in [
        ("window = 8", "window: 8 B is out of bounds: 2.0 MiB to 256.0 MiB, and a plain number counts bytes"),
        ("retention_age = \"59s\"", "retention_age: 59s is out of bounds: 1m to 87600h"),
        (
            "retention_size = 8",
            "retention_size: 8 B is out of bounds: 1.0 MiB to 16.0 EiB, and a plain number counts bytes",
        ),
        ("retention_free = -1", "retention_free: a size is not negative"),
        ("retention_thinning = 1", "retention_thinning: this is true or false, not a value of type integer"),
        ("window = \"8MB\"", "no size: give a whole number with an optional K, M, G or T"),
        ("window = \"1G\"", "window: 1.0 GiB is out of bounds"),
        ("window = \"8s\"", "no size"),
        ("window = 8.5", "a size, as in \"8M\", not a value of type float"),
        ("window = -1", "not negative"),
        ("window = \"2097151\"", "out of bounds"),
        ("idle_timeout = 60", "a time with its unit, as in \"60s\", not a value of type integer"),
        ("idle_timeout = \"60\"", "s, m or h"),
        ("idle_timeout = \"60M\"", "s, m or h"),
        ("idle_timeout = \"0s\"", "1s to 24h"),
        ("idle_timeout = \"25h\"", "1s to 24h"),
        ("idle_timeout = \"99999999999999999999h\"", "is no time"),
        ("idle_timeout = \"18446744073709551615h\"", "is no time"),
        ("listen = \"localhost\"", "no address with a port"),
        ("listen = 9443", "a text in quotes"),
        ("listen = \"1.2.3.4:99999\"", "no address with a port"),
        ("engine = \"uring\"", "use auto, io-uring or threads"),
        ("max_sessions = 0", "1 to 4096"),
        ("max_sessions = 4097", "1 to 4096"),
        ("max_connections = 0", "1 to 16"),
        ("max_connections = 17", "1 to 16"),
        ("max_sessions = \"4\"", "a whole number"),
        ("max_sessions = 99999999999999999999999", "a whole number"),
        ("allow_loop = \"yes\"", "true or false"),
        ("allow_loop = 1", "true or false"),
        ("state_dir = \"here\"", "no absolute path"),
        ("window = ", ""),
        ("window = \"8M\"\nwindow = \"9M\"", ""),
    ] {
        let (line, said) = wrong(&format!("\n{text}\n"));
        assert!((2..=3).contains(&line) && said.contains(what), "{text}: line {line}: {said}");
        assert!(!said.contains('\n'), "{said}");
    }
}

#[test]
fn all_mistakes_of_all_files_are_told_at_once_in_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let (main, snippets) = (dir.path().join("mt-agent.toml"), dir.path().join("conf.d"));
    fs::create_dir(&snippets).unwrap();
    // Not in the alphabet's order, and with lines in between that are no TOML at all.
    let text =
        "window = 1\nlisten = [::]:9443\nallow_loop = 1\nretention_age = \"1h\"\nidle = \"60s\"\nx y = 1\n";
    fs::write(&main, text).unwrap();
    fs::write(snippets.join("b.toml"), "max_sessions = 0").unwrap();
    fs::write(snippets.join("a.toml"), "engine = \"x\"\n\nwindow = \"4M\"\nlog_level = \"mt_agent=loud\"")
        .unwrap();
    fs::write(snippets.join("c.toml"), b"# \xff").unwrap();
    let Err(ConfigError::Mistakes { files, mistakes }) = Sourced::load_from(&main, &snippets) else {
        panic!("it is not sound")
    };
    let mistakes = mistakes.told;
    assert_eq!(files.len(), 4);
    let places: Vec<(String, usize)> = mistakes
        .iter()
        .map(|mistake| {
            (mistake.place.file.file_name().unwrap().to_str().unwrap().to_owned(), mistake.place.line)
        })
        .collect();
    let wanted = [
        ("mt-agent.toml", 1),
        ("mt-agent.toml", 2),
        ("mt-agent.toml", 3),
        ("mt-agent.toml", 5),
        ("mt-agent.toml", 6),
        ("a.toml", 1),
        ("a.toml", 4),
        ("b.toml", 1),
        ("c.toml", 1),
    ];
    let wanted: Vec<(String, usize)> = wanted.map(|(file, line)| (file.to_owned(), line)).to_vec();
    assert_eq!(places, wanted, "{mistakes:#?}");
    assert!(mistakes[3].what.contains("did you mean `idle_timeout`"), "{mistakes:#?}");
}

#[test]
fn what_cannot_hold_together_is_named_where_it_was_set() {
    for (text, line, what) in [
        ("retention_dir = \"/var/lib/mt-agent\"", 1, "must not travel with the recovery points"),
        ("retention_dir = \"/\"", 1, "must not travel"),
        ("state_dir = \"/a\"\nretention_dir = \"/a/tls\"", 2, "keeps its tls"),
        ("state_dir = \"/a/tokens\"\nretention_dir = \"/a\"", 2, "must not travel"),
        ("window = \"4M\"\ncontrol_socket = \"/var/lib/mt-agent\"", 2, "is a directory, that of `state_dir`"),
        ("state_dir = \"/run/mt-agent/control.sock/x\"", 1, "is a directory, that of `state_dir`"),
        ("retention_thinning = true\nretention_age = \"1h\"", 1, "nothing is left to be thinned"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("mt-agent.toml");
        fs::write(&file, text).unwrap();
        let Err(ConfigError::Mistakes { mistakes, .. }) = Sourced::load(Some(&file)) else {
            panic!("{text}: it is not sound")
        };
        let said = &mistakes.told[0];
        assert!(said.place.line == line && said.what.contains(what), "{text}: {mistakes:?}");
    }
    // Below one another, the other way about, is how it is by default.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mt-agent.toml");
    fs::write(&file, "state_dir = \"/a\"\nretention_dir = \"/a/tlsx\"\nretention_thinning = true").unwrap();
    Sourced::load(Some(&file)).unwrap();
}

#[test]
fn the_file_that_is_shipped_is_the_table_of_keys_and_its_values_are_the_defaults() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/mt-agent.toml");
    if std::env::var_os("MT_AGENT_WRITE_DEFAULTS").is_some() {
        fs::write(&shipped, commented()).unwrap();
    }
    let text = fs::read_to_string(&shipped).unwrap();
    assert!(
        text == commented(),
        "write it anew: MT_AGENT_WRITE_DEFAULTS=1 cargo test --lib the_file_that_is_shipped"
    );
    assert!(text.lines().all(|line| line.is_empty() || line.starts_with('#')));
    assert!(text.lines().all(|line| line.chars().count() <= 120));
    // Text after a `#` and a space explains, and what follows a `#` at once is a key.
    let key = |line: &str| line.strip_prefix('#').filter(|line| !line.starts_with(' ')).map(str::to_owned);
    let keys: Vec<String> = text.lines().filter_map(key).collect();
    assert_eq!(keys.len(), KEYS.len());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mt-agent.toml");
    fs::write(&file, keys.join("\n")).unwrap();
    let sourced = Sourced::load(Some(&file)).unwrap();
    assert_eq!((sourced.config, sourced.set.len()), (Config::default(), KEYS.len()));
    // As it is shipped, it sets nothing.
    assert_eq!(Sourced::load(Some(&shipped)).unwrap().set.len(), 0);
}

#[test]
fn what_is_shown_is_read_as_the_same_value() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mt-agent.toml");
    let text = "listen = \"192.0.2.7:1\"\nstate_dir = \"/a \\\"b\"\ncontrol_socket = \"/x\"\nengine = \"threads\"\n\
        window = 2097153\nmax_sessions = 0x10\nmax_connections = 2\nallow_loop = true\nidle_timeout = \"90s\"\nretention_age = \"36h\"\n\
        retention_size = 1073741825\nretention_free = \"3K\"\nretention_thinning = true\n\
        allow_root_retention = true\nlog_level = \"mt_agent::net=debug,info\"\nretention_dir = \"/r\"\n";
    fs::write(&file, text).unwrap();
    let config = Sourced::load(Some(&file)).unwrap().config;
    let shown: String = KEYS.iter().map(|key| format!("{} = {}\n", key.name, (key.show)(&config))).collect();
    fs::write(&file, shown).unwrap();
    assert_eq!(Sourced::load(Some(&file)).unwrap().config, config);
    for key in &KEYS {
        assert_ne!((key.show)(&config), (key.show)(&Config::default()), "{} tells nothing here", key.name);
        let mut copy = Config::default();
        (key.copy)(&mut copy, &config);
        let differ: Vec<&str> = KEYS
            .iter()
            .filter(|other| (other.show)(&copy) != (other.show)(&Config::default()))
            .map(|other| other.name)
            .collect();
        assert_eq!(differ, [key.name]);
    }
}

#[test]
fn the_port_is_bound_also_where_there_is_no_ipv6() {
    let any = Config { listen: "[::]:0".parse().unwrap(), ..Config::default() };
    let bound = any.bind().unwrap();
    let taken = Config { listen: bound.local_addr().unwrap(), ..Config::default() };
    let error = taken.bind().unwrap_err();
    assert_eq!(error.source.kind(), std::io::ErrorKind::AddrInUse);
    assert!(error.to_string().starts_with("listen at "), "{error}");
    // An address of somebody else, without the fallback that only `[::]` has.
    let foreign = Config { listen: "[2001:db8::1]:0".parse().unwrap(), ..Config::default() };
    assert!(foreign.bind().is_err());
}

// Live counters and the report.

struct Site {
    dir: tempfile::TempDir,
    store: Store,
    board: Arc<Board>,
}

fn site() -> Site {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path());
    store.assign(&name("web01"), &[assignment("root", 1), assignment("data", 2)]).unwrap();
    let service = Arc::new(Service::new("[::]:9443".parse::<SocketAddr>().unwrap(), engine()));
    let board = Arc::new(Board::new(service, Live::default(), store.clone()));
    Site { dir, store, board }
}

#[test]
fn a_report_shows_what_is_on_disk_and_what_is_live() {
    let Site { dir: _dir, store, board } = site();
    let (web, root) = (name("web01"), name("root"));
    let volume = || board.report().unwrap().machines[0].volumes[0].clone();
    assert_eq!((volume().phase.as_str(), volume().lag, volume().received_bytes), ("empty", None, None));
    let pass = PassId(7);
    store.begin_pass(&web, &root, pass, &Source { size: ByteLen(1), id: None }).unwrap();
    assert_eq!((volume().phase.as_str(), volume().pass), ("interrupted", Some(pass.to_string())));

    let counters = Arc::new(Counters::new(1000, engine()));
    let shown = board.live.show(web.clone(), root.clone(), counters.clone());
    assert_eq!(volume().phase, "open");
    counters.begin(pass.to_string());
    counters.received_bytes.store(500, Relaxed);
    counters.wire_bytes.store(100, Relaxed);
    counters.written_bytes.store(400, Relaxed);
    counters.zeroed_bytes.store(50, Relaxed);
    // Five seconds in, half is there: as much again is left.
    board.sample(counters.started() + Duration::from_secs(5));
    let seen = volume();
    assert_eq!((seen.phase.as_str(), seen.pass), ("receiving", Some(pass.to_string())));
    assert_eq!((seen.total_bytes, seen.received_bytes, seen.wire_bytes), (Some(1000), Some(500), Some(100)));
    assert_eq!((seen.written_bytes, seen.zeroed_bytes), (Some(400), Some(50)));
    assert_eq!((seen.rate, seen.eta, seen.engine), (Some(100), Some(5), Some(engine())));

    store.commit_pass(&web, &root, pass, 1000, true).unwrap();
    counters.enter(Phase::Synchronized);
    let seen = volume();
    assert_eq!((seen.phase.as_str(), seen.rate), ("synchronized", None));
    assert!(seen.lag.unwrap() < 60 && seen.last_commit.unwrap().point_in_time);
    drop(shown);
    assert_eq!((volume().phase.as_str(), volume().received_bytes), ("synchronized", None));

    store.begin_pass(&web, &root, PassId(8), &Source { size: ByteLen(1), id: None }).unwrap();
    store.fault(&web, &root, PassId(8), "write failed").unwrap();
    assert_eq!((volume().phase.as_str(), volume().error.as_deref()), ("faulted", Some("write failed")));
}

#[test]
fn the_rate_follows_slowly_and_falls_to_nothing_in_a_stall() {
    let Site { dir: _dir, board, .. } = site();
    let counters = Arc::new(Counters::new(u64::MAX, engine()));
    let _shown = board.live.show(name("web01"), name("root"), counters.clone());
    counters.begin("p");
    let rate = || board.report().unwrap().machines[0].volumes[0].rate.unwrap();
    let mut now = counters.started();
    for _ in 0..10 {
        now += Duration::from_secs(1);
        counters.received_bytes.fetch_add(1_000_000, Relaxed);
        board.sample(now);
        // Twice in one moment must not make an infinite rate.
        board.sample(now);
    }
    assert_eq!(rate(), 1_000_000);
    now += Duration::from_secs(1);
    board.sample(now);
    assert!((700_000..900_000).contains(&rate()), "{}", rate());
    for _ in 0..120 {
        now += Duration::from_secs(1);
        board.sample(now);
    }
    assert_eq!((rate(), board.report().unwrap().machines[0].volumes[0].eta), (0, None));
}

#[test]
fn totals_go_on_over_passes() {
    let live = Live::default();
    let key = (name("web01"), name("root"));
    for pass in 1..=3u64 {
        let counters = Arc::new(Counters::new(10, engine()));
        let shown = live.show(key.0.clone(), key.1.clone(), counters.clone());
        counters.received_bytes.store(10, Relaxed);
        assert_eq!(live.totals()[&key].received_bytes, 10 * pass);
        if pass == 2 {
            counters.fault("x");
        } else {
            counters.enter(Phase::Synchronized);
        }
        drop(shown);
        assert_eq!(live.totals()[&key].received_bytes, 10 * pass);
        assert!(live.open().is_empty());
    }
    assert_eq!((live.totals()[&key].commits, live.totals()[&key].faults), (2, 1));
    // One that was replaced takes nothing away when it goes.
    let counters = || Arc::new(Counters::new(10, engine()));
    let first = live.show(key.0.clone(), key.1.clone(), counters());
    let _second = live.show(key.0.clone(), key.1.clone(), counters());
    drop(first);
    assert_eq!(live.open().len(), 1);
}

// The control socket.

fn get(socket: &Path, request: &str) -> (String, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    write!(stream, "{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// A control socket that answers on threads of its own until it is dropped.
struct Served {
    stop: Option<oneshot::Sender<()>>,
    runtime: tokio::runtime::Runtime,
    task: Option<tokio::task::JoinHandle<Result<(), ControlError>>>,
}

impl Served {
    fn new(socket: &Path, board: Arc<Board>) -> Result<Served, ControlError> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let control = runtime.block_on(async { Control::bind(socket) })?;
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async {
            if stopped.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let task = runtime.spawn(control.serve(board, tokio::sync::watch::Sender::default(), stopped));
        Ok(Served { stop: Some(stop), runtime, task: Some(task) })
    }

    fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        let task = self.task.take().unwrap();
        let ended = async { tokio::time::timeout(Duration::from_secs(10), task).await };
        self.runtime.block_on(ended).unwrap().unwrap().unwrap();
    }
}

#[test]
fn the_socket_answers_in_json_and_openmetrics() {
    let Site { dir, store, board } = site();
    let socket = dir.path().join("run/control.sock");
    let mut served = Served::new(&socket, board.clone()).unwrap();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);

    let (head, body) = get(&socket, "GET /v1/status");
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("application/json"), "{head}");
    let report: Report = serde_json::from_str(&body).unwrap();
    assert_eq!(report, board.report().unwrap());
    assert_eq!((report.schema_version, report.service.pid), (SCHEMA_VERSION, std::process::id()));
    assert_eq!(report.machines[0].volumes.len(), 2);

    let counters = Arc::new(Counters::new(10, engine()));
    let _shown = board.live.show(name("web01"), name("root"), counters.clone());
    counters.received_bytes.store(4096, Relaxed);
    board.service.refused_total.store(3, Relaxed);
    fs::write(store.file(&name("broken")), "x").unwrap();
    let (head, text) = get(&socket, "GET /metrics");
    assert!(head.contains("application/openmetrics-text"), "{head}");
    for line in [
        "mt_agent_volume_received_bytes_total{machine=\"web01\",disk=\"root\"} 4096",
        "mt_agent_volume_size_bytes{machine=\"web01\",disk=\"data\"} 1073741824",
        "mt_agent_volume_faulted{machine=\"web01\",disk=\"root\"} 0",
        "mt_agent_sessions_refused_total 3",
        "mt_agent_protections_unreadable 1",
        "# TYPE mt_agent_volume_written_bytes counter",
        "# EOF",
    ] {
        assert!(text.lines().any(|known| known.starts_with(line)), "{line} is not in\n{text}");
    }

    let (head, body) = get(&socket, "GET /v2/status");
    assert!(head.starts_with("HTTP/1.1 404") && head.contains("application/json"), "{head}");
    assert!(serde_json::from_str::<serde_json::Value>(&body).unwrap()["error"].is_string());
    let (head, body) = get(&socket, "DELETE /v1/status");
    assert!(head.starts_with("HTTP/1.1 405") && body.contains("error"), "{head}");

    // What is broken is reported beside what is not.
    let (_, body) = get(&socket, "GET /v1/status");
    let report: Report = serde_json::from_str(&body).unwrap();
    assert!(report.machines[0].error.as_ref().unwrap().contains("broken.toml:1: "), "{report:?}");
    assert_eq!(report.machines[1].volumes.len(), 2);

    // Nobody is waited for who says nothing.
    let _silent = UnixStream::connect(&socket).unwrap();
    served.stop();
    assert!(!socket.exists());
}

#[test]
fn garbage_on_the_socket_hurts_nobody() {
    let Site { dir, board, .. } = site();
    let socket = dir.path().join("control.sock");
    let _served = Served::new(&socket, board).unwrap();
    for garbage in [&b"\x16\x03\x01\x02\x00"[..], b"\0\0\0\0\r\n\r\n", &[b'A'; 1 << 20]] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        // It may be hung up on while it is still writing.
        stream.write_all(garbage).unwrap_or_default();
        stream.shutdown(std::net::Shutdown::Write).unwrap_or_default();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap_or_default();
    }
    assert!(get(&socket, "GET /v1/status").0.starts_with("HTTP/1.1 200"));
}

#[test]
fn a_stale_socket_is_replaced_and_one_that_answers_is_not() {
    let Site { dir, board, .. } = site();
    let socket = dir.path().join("control.sock");
    // What a service that was killed leaves: a file, and nobody behind it.
    drop(UnixListener::bind(&socket).unwrap());
    assert!(socket.exists());
    let mut first = Served::new(&socket, board.clone()).unwrap();
    match Served::new(&socket, board.clone()) {
        Err(error @ ControlError::Refused(_)) => {
            assert!(error.to_string().contains("another mt-agent answers"))
        }
        other => panic!("{:?}", other.err()),
    }
    assert!(
        get(&socket, "GET /v1/status").0.starts_with("HTTP/1.1 200"),
        "the refused one took the socket away"
    );
    // Somebody put another in its place: that one stays.
    fs::remove_file(&socket).unwrap();
    let other = UnixListener::bind(&socket).unwrap();
    first.stop();
    assert!(socket.exists());
    drop(other);

    fs::remove_file(&socket).unwrap();
    fs::write(&socket, "no socket").unwrap();
    assert!(matches!(Served::new(&socket, board.clone()), Err(ControlError::Config { .. })));
    assert_eq!(fs::read(&socket).unwrap(), b"no socket");
    let long = dir.path().join("x".repeat(120));
    assert!(matches!(Served::new(&long, board), Err(ControlError::Config { .. })));
}

#[test]
fn the_sampler_runs_while_the_socket_is_served() {
    let Site { dir, board, .. } = site();
    let _served = Served::new(&dir.path().join("control.sock"), board.clone()).unwrap();
    let counters = Arc::new(Counters::new(u64::MAX, engine()));
    let _shown = board.live.show(name("web01"), name("root"), counters.clone());
    counters.begin("p");
    // All at once, and then nothing: the mean over all the time falls faster than the smoothed rate, which is
    // only there if somebody samples.
    counters.received_bytes.store(1_000_000_000, Relaxed);
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let mean = || 1e9 / counters.elapsed().as_secs_f64();
        let before = mean();
        let seen = board.report().unwrap().machines[0].volumes[0].rate;
        // Where the first sample came late, the smoothed rate falls faster in the end.
        if seen.is_some_and(|seen| seen as f64 > 1.3 * before || (seen as f64) < mean() / 1.3) {
            break;
        }
        assert!(Instant::now() < deadline, "{seen:?}, mean {before}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A connection whose seat is taken away ends; but not one that became known in that very moment, and carries a pass by now.
#[tokio::test]
async fn only_who_is_still_unknown_is_crowded_out() {
    let strangers = Arc::default();
    let mut waiting: VecDeque<_> = (0..STRANGERS).map(|_| Stranger::admit(&strangers)).collect();
    let (unknown, known) = (waiting[0].seat.clone(), waiting[1].seat.clone());
    let further = [Stranger::admit(&strangers), Stranger::admit(&strangers)];
    drop(waiting.remove(1));
    let moment = Duration::from_millis(20);
    assert!(timeout(moment, unknown.lost()).await.is_ok());
    assert!(timeout(moment, known.lost()).await.is_err());
    assert!(timeout(moment, further[0].seat.lost()).await.is_err());
}
