//! What stands between a sender and the service, and does to what passes whatever a network does.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// What a way does to what passes it.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    /// Both directions end at once.
    Cut,
    /// One bit arrives changed.
    Flip,
    /// This direction ends, the other one goes on.
    HalfClose,
    /// Nothing passes any more, and nobody is told.
    Swallow,
    /// The same in both directions, until one of them ends.
    SwallowBoth,
}

/// What happens to one connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fate {
    /// After so many bytes from the client.
    pub up: Option<(u64, Act)>,
    /// After so many bytes from the server.
    pub down: Option<(u64, Act)>,
    /// How long each piece is held back.
    pub delay: Duration,
    /// How many bytes pass each way in a second, where that is limited.
    pub rate: Option<u64>,
    /// The connection ends before it begins.
    pub refuse: bool,
    /// Where the connection ends before anything of this has happened, it is the next one's.
    pub lasts: bool,
}

/// Stands between a client and the service. Each connection takes the next fate.
pub struct Proxy {
    pub address: SocketAddr,
    fates: Arc<Mutex<Vec<Fate>>>,
    /// The fate of all others.
    otherwise: Arc<Mutex<Fate>>,
    /// Bytes that passed from the client of each connection, in the order in which they came.
    up: Arc<Mutex<Vec<Arc<AtomicU64>>>>,
}

impl Proxy {
    pub fn start(server: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let fates: Arc<Mutex<Vec<Fate>>> = Arc::default();
        let otherwise: Arc<Mutex<Fate>> = Arc::default();
        let up: Arc<Mutex<Vec<Arc<AtomicU64>>>> = Arc::default();
        let proxy = Proxy { address, fates: fates.clone(), otherwise: otherwise.clone(), up: up.clone() };
        // It ends with the process.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let its = Arc::new(AtomicU64::new(0));
                up.lock().unwrap().push(its.clone());
                let fate = fates.lock().unwrap().pop().unwrap_or(*otherwise.lock().unwrap());
                if fate.refuse {
                    continue;
                }
                let Ok(server) = TcpStream::connect(server) else { continue };
                let ends =
                    [(client.try_clone(), server.try_clone()), (server.try_clone(), client.try_clone())];
                let acts = [fate.up, fate.down];
                let swallows = Arc::new(AtomicBool::new(false));
                let lot = Arc::new(Lot { fate, happened: AtomicBool::new(false), fates: fates.clone() });
                for (index, (ends, act)) in ends.into_iter().zip(acts).enumerate() {
                    let (Ok(from), Ok(to)) = ends else { continue };
                    let count = (index == 0).then(|| its.clone());
                    let (swallows, lot) = (swallows.clone(), lot.clone());
                    thread::spawn(move || pump(from, to, act, &lot, &swallows, count));
                }
            }
        });
        proxy
    }

    /// How many bytes passed from clients so far.
    pub fn up(&self) -> u64 {
        self.up.lock().unwrap().iter().map(|its| its.load(Ordering::Relaxed)).sum()
    }

    /// The same for one connection, counted from 0.
    pub fn up_of(&self, connection: usize) -> u64 {
        self.up.lock().unwrap()[connection].load(Ordering::Relaxed)
    }

    /// How many connections came so far.
    pub fn connections(&self) -> usize {
        self.up.lock().unwrap().len()
    }

    pub fn will(&self, fates: impl IntoIterator<Item = Fate>) {
        let mut list: Vec<Fate> = fates.into_iter().collect();
        list.reverse();
        *self.fates.lock().unwrap() = list;
    }

    /// What happens to every connection that has no fate of its own.
    pub fn will_all(&self, fate: Fate) {
        *self.otherwise.lock().unwrap() = fate;
    }
}

/// The fate of a connection while it lasts.
struct Lot {
    fate: Fate,
    happened: AtomicBool,
    fates: Arc<Mutex<Vec<Fate>>>,
}

impl Drop for Lot {
    fn drop(&mut self) {
        if self.fate.lasts && !self.happened.load(Ordering::Relaxed) {
            self.fates.lock().unwrap().push(self.fate);
        }
    }
}

fn pump(
    mut from: TcpStream,
    mut to: TcpStream,
    act: Option<(u64, Act)>,
    lot: &Lot,
    swallows: &AtomicBool,
    count: Option<Arc<AtomicU64>>,
) {
    let fate = lot.fate;
    let mut buffer = vec![0; 16 << 10];
    let mut passed = 0;
    let mut due = Instant::now();
    loop {
        let len = match from.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(len) => len,
        };
        if swallows.load(Ordering::Relaxed) {
            continue;
        }
        thread::sleep(fate.delay);
        if let Some(rate) = fate.rate {
            due = due.max(Instant::now()) + Duration::from_secs_f64(len as f64 / rate as f64);
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        let bytes = &mut buffer[..len];
        let before = passed;
        passed += len as u64;
        let mut pass = len;
        let act = act.filter(|(at, _)| (before..passed).contains(at));
        if act.is_some() {
            lot.happened.store(true, Ordering::Relaxed);
        }
        match act {
            None => {}
            Some((at, Act::Flip)) => bytes[(at - before) as usize] ^= 0x10,
            Some((at, act)) => {
                pass = (at - before) as usize;
                to.write_all(&bytes[..pass]).ok();
                match act {
                    Act::Cut => {
                        from.shutdown(Shutdown::Both).ok();
                        to.shutdown(Shutdown::Both).ok();
                        return;
                    }
                    Act::HalfClose => break,
                    Act::Swallow => {
                        // Until one of them has had enough.
                        while from.read(&mut buffer).is_ok_and(|len| len > 0) {}
                        to.shutdown(Shutdown::Both).ok();
                        return;
                    }
                    Act::SwallowBoth => {
                        swallows.store(true, Ordering::Relaxed);
                        continue;
                    }
                    Act::Flip => unreachable!(),
                }
            }
        }
        if let Some(count) = &count {
            count.fetch_add(pass as u64, Ordering::Relaxed);
        }
        if to.write_all(bytes).is_err() {
            from.shutdown(Shutdown::Both).ok();
            return;
        }
    }
    to.shutdown(Shutdown::Write).ok();
}
