//! A limit on the bytes a second, for all disks of a `send` together, which may go by the time of day.

use std::ops::Range;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::sys::clock;
use crate::units::ByteLen;

/// The least that can be asked for: a frame of 1 MiB must not take so long that the receiver gives the connection up.
pub const LEAST: ByteLen = ByteLen(64 * ByteLen::KIB);

/// Minutes of a day.
const DAY: u16 = 24 * 60;

/// How many bytes a second, by the time of day.
///
/// As text: parts with commas between, each a rate (`20M`), of which there is one at most, or a time of day and a rate
/// (`08:00-18:00=2M`), which may go past midnight (`22:00-06:00=50M`). What no part tells of is not limited.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rates {
    /// By minutes of the day; no two overlap.
    spans: Vec<(Range<u16>, u64)>,
    /// At all other times.
    otherwise: Option<u64>,
}

/// Why a text is no limit.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct ParseRatesError(String);

impl FromStr for Rates {
    type Err = ParseRatesError;

    fn from_str(text: &str) -> Result<Rates, ParseRatesError> {
        let wrong = |text: String| Err(ParseRatesError(text));
        let mut rates = Rates { spans: Vec::new(), otherwise: None };
        for part in text.split(',') {
            let (span, rate) = match part.split_once('=') {
                Some((span, rate)) => (Some(span), rate),
                None => (None, part),
            };
            if rate.is_empty() || (span.is_none() && rate.contains(':')) {
                return wrong(format!(
                    "`{part}` has no rate: give one, as in 20M, or 08:00-18:00=2M for a time of day"
                ));
            }
            let rate: ByteLen = rate.parse().map_err(|error| ParseRatesError(format!("{error}")))?;
            if rate < LEAST {
                return wrong(format!("give at least {LEAST} a second"));
            }
            let Some(span) = span else {
                if rates.otherwise.replace(rate.0).is_some() {
                    return wrong("there are two limits without a time of day".to_owned());
                }
                continue;
            };
            let ends = span.split_once('-').and_then(|(from, to)| Some((minute(from)?, minute(to)?)));
            let Some((from, to)) = ends.filter(|(from, to)| from != to && *from < DAY) else {
                return wrong(format!("`{span}` is no time of day: give HH:MM-HH:MM, as in 08:00-18:00=2M"));
            };
            let parts = if from < to { [from..to, 0..0] } else { [from..DAY, 0..to] };
            for part in parts.into_iter().filter(|part| !part.is_empty()) {
                if rates.spans.iter().any(|(other, _)| part.start < other.end && other.start < part.end) {
                    return wrong(format!("`{span}` overlaps another time of day"));
                }
                rates.spans.push((part, rate.0));
            }
        }
        Ok(rates)
    }
}

/// `HH:MM`, up to 24:00.
fn minute(text: &str) -> Option<u16> {
    let number = |text: &str| {
        let digits = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u16>().ok()).flatten()
    };
    let (hours, minutes) = text.split_once(':')?;
    let (hours, minutes) = (number(hours)?, number(minutes)?);
    let minute = hours * 60 + minutes;
    (minutes < 60 && minute <= DAY).then_some(minute)
}

impl Rates {
    /// The rate at a minute of the day, if there is a limit then.
    fn at(&self, minute: u16) -> Option<u64> {
        let span = self.spans.iter().find(|(span, _)| span.contains(&minute));
        span.map(|(_, rate)| *rate).or(self.otherwise)
    }

    fn now(&self) -> Option<u64> {
        // Where it does not matter what time it is, nobody is asked.
        if self.spans.is_empty() { self.otherwise } else { self.at(clock::minute_of_day()) }
    }
}

/// A token bucket that may run into debt: whoever takes from it waits afterwards until the debt is paid. Those who
/// share it wait for each other, a [part](Limiter::part) each.
#[derive(Debug)]
pub struct Limiter {
    rates: Rates,
    /// When everything that was taken is paid for.
    paid: Mutex<Instant>,
}

/// How much idle time is saved up for a burst.
const BURST: Duration = Duration::from_millis(100);

impl Limiter {
    /// A limit of so much.
    pub fn new(rates: Rates) -> Limiter {
        Limiter { rates, paid: Mutex::new(Instant::now()) }
    }

    /// The most that should be taken at once: a 64th of a second's worth, so that each of many disks gets its turn
    /// well inside the patience of its peer, but no less than 4 KiB and no more than 1 MiB. So a rate that changes with the
    /// time of day is kept to from the next part on.
    pub fn part(&self) -> usize {
        self.rates.now().map_or(1 << 20, |rate| (rate / 64).clamp(4 << 10, 1 << 20)) as usize
    }

    /// Takes `bytes`, and returns how long to wait before they may be sent.
    pub fn take(&self, bytes: u64) -> Duration {
        self.take_at(bytes, self.rates.now(), Instant::now())
    }

    fn take_at(&self, bytes: u64, rate: Option<u64>, now: Instant) -> Duration {
        let Some(rate) = rate else { return Duration::ZERO };
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let start = (*paid).max(now.checked_sub(BURST).unwrap_or(now));
        let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
        *paid = start + cost;
        paid.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_time_whatever_the_sizes() {
        let limiter = Limiter::new("1M".parse().unwrap());
        let start = Instant::now();
        let mut now = start;
        let mut bytes = 0;
        let rate = limiter.rates.now();
        for size in [1 << 20, 100, 4096, 3 << 20, 1, 1 << 19] {
            now += limiter.take_at(size, rate, now);
            bytes += size;
        }
        let seconds = (now - start).as_secs_f64();
        let expected = bytes as f64 / f64::from(1 << 20);
        assert!((expected - 0.2..=expected + 0.01).contains(&seconds), "{seconds} for {expected}");
        // What was not used long ago is not saved up.
        let later = now + Duration::from_secs(100);
        assert!(limiter.take_at(1 << 20, rate, later) > Duration::from_millis(800));
        // Where nothing is limited nobody waits, not even for what was taken before.
        assert_eq!(limiter.take_at(1 << 30, None, later), Duration::ZERO);
        assert!(limiter.take_at(1 << 20, Some(1 << 30), later) < Duration::from_millis(1000));
    }

    #[test]
    fn a_limit_goes_by_the_time_of_day() {
        const M: u64 = 1 << 20;
        let at =
            |text: &str, hours: u16, minutes: u16| text.parse::<Rates>().unwrap().at(hours * 60 + minutes);
        assert_eq!(at("20M", 12, 0), Some(20 * M));
        let day = "08:00-18:00=2M,20M";
        assert_eq!(
            [(7, 59), (8, 0), (17, 59), (18, 0)].map(|(hours, minutes)| at(day, hours, minutes)),
            [20 * M, 2 * M, 2 * M, 20 * M].map(Some)
        );
        // Past midnight, and at other times without a limit.
        let night = "22:30-06:00=50M,06:00-07:00=64K";
        assert_eq!(
            [(22, 29), (22, 30), (23, 59), (0, 0), (5, 59), (6, 0), (7, 0)]
                .map(|(hours, minutes)| at(night, hours, minutes)),
            [None, Some(50 * M), Some(50 * M), Some(50 * M), Some(50 * M), Some(64 << 10), None]
        );
        for whole in ["00:00-24:00=3M", "12:00-00:00=3M,00:00-12:00=3M"] {
            assert!(
                (0..DAY).all(|minute| whole.parse::<Rates>().unwrap().at(minute) == Some(3 * M)),
                "{whole}"
            );
        }
        for (text, why) in [
            ("", "`` has no rate"),
            ("20M,", "`` has no rate"),
            ("fast", "is no size"),
            (
                "08:00-18:00",
                "`08:00-18:00` has no rate: give one, as in 20M, or 08:00-18:00=2M for a time of day",
            ),
            ("08:00-18:00=", "`08:00-18:00=` has no rate"),
            ("20M,08:00-18:00", "`08:00-18:00` has no rate"),
            ("63K", "at least 64.0 KiB"),
            ("08:00-18:00=0", "at least"),
            ("1M,2M", "two limits without a time"),
            ("8:00-18:00=2M", "no time of day"),
            ("08:00=2M", "no time of day"),
            ("08:00-08:00=2M", "no time of day"),
            ("08:60-18:00=2M", "no time of day"),
            ("08:00-24:01=2M", "no time of day"),
            ("24:00-08:00=2M", "no time of day"),
            ("08:00-+9:00=2M", "no time of day"),
            ("08:00-18:00-20:00=2M", "no time of day"),
            ("08:00-18:00=2M,17:59-19:00=3M", "overlaps"),
            ("22:00-06:00=2M,00:00-01:00=3M", "overlaps"),
            ("05:00-06:00=2M,22:00-06:00=3M", "overlaps"),
        ] {
            let error = text.parse::<Rates>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
