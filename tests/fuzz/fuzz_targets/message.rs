//! Any payload as any message: parsing never panics, and what it takes comes back from its own encoding.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mt_agent::net::message::{
    self, Begin, BeginReply, Commit, Committed, Enroll, EnrollReply, Error, Hello, HelloReply, Join,
    JoinReply, Message, Open, OpenReply,
};

fn check<T: Message + PartialEq>(payload: &[u8]) {
    let Ok(parsed) = message::parse::<T>(payload) else { return };
    // A message may grow over the limit where its text needs escapes; then it is refused, which is fine.
    let Ok(encoded) = message::encode(&parsed) else { return };
    assert!(message::parse::<T>(&encoded).is_ok_and(|again| again == parsed));
}

fuzz_target!(|payload: &[u8]| {
    check::<Hello>(payload);
    check::<HelloReply>(payload);
    check::<Enroll>(payload);
    check::<EnrollReply>(payload);
    check::<Open>(payload);
    check::<OpenReply>(payload);
    check::<Join>(payload);
    check::<JoinReply>(payload);
    check::<Begin>(payload);
    check::<BeginReply>(payload);
    check::<Commit>(payload);
    check::<Committed>(payload);
    check::<Error>(payload);
    if let Ok(hello) = message::parse::<Hello>(payload) {
        // Answered or refused by name, and either fits a frame.
        match message::HelloReply::to(&hello) {
            Ok(reply) => assert!(message::encode(&reply).is_ok()),
            Err(refusal) => assert!(message::encode(&refusal).is_ok()),
        }
    }
});
