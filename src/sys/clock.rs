//! What time it is where this machine is.

use std::time::{SystemTime, UNIX_EPOCH};

/// The minute of the local day, from 0 to 1439, by the system's time zone (`TZ`, `/etc/localtime`). Where that cannot be told,
/// of the day in UTC.
pub fn minute_of_day() -> u16 {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let now = libc::time_t::try_from(seconds).unwrap_or(0);
    let mut local = std::mem::MaybeUninit::<libc::tm>::zeroed();
    // SAFETY: both point to locals of the types that the function takes; it writes to the second one alone. It reads the
    // environment, which nobody in this program changes.
    let told = unsafe { libc::localtime_r(&raw const now, local.as_mut_ptr()) };
    if told.is_null() {
        return u16::try_from(seconds / 60 % (24 * 60)).unwrap_or(0);
    }
    // SAFETY: a `tm` is numbers and a pointer, and all zeros is one already.
    let local = unsafe { local.assume_init() };
    let minute = local.tm_hour * 60 + local.tm_min;
    u16::try_from(minute.clamp(0, 24 * 60 - 1)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn it_is_what_date_says() {
        let date = || {
            let output = Command::new("date").arg("+%H %M").output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let numbers: Vec<u16> = text.split_whitespace().map(|number| number.parse().unwrap()).collect();
            numbers[0] * 60 + numbers[1]
        };
        // The minute may end in between.
        let (before, ours, after) = (date(), minute_of_day(), date());
        assert!(ours == before || ours == after, "{before}, {ours}, {after}");
    }
}
