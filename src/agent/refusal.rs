//! What a session is refused a disk for, and what its peer is told of it: with the way out.

use std::io;

use crate::disk::device::{self, OpenDisk, Refusal};
use crate::disk::id::DiskId;
use crate::error::chain;
use crate::name::Name;
use crate::net::message::{self, Code, Open};
use crate::protection::{self, Assignment, State};

/// What the peer is told of a journal that cannot be read or written.
pub(super) fn unusable(error: &dyn std::error::Error) -> message::Error {
    tracing::error!(error = chain(error), "the journal cannot be used");
    message::Error::new(Code::Internal, chain(error))
}

/// Refuses a disk that is not what was assigned: one that was empty then must not have got anything since that
/// nobody agreed to lose, and none may have shrunk or changed its sectors.
pub(super) fn still_as_assigned(disk: &OpenDisk, assignment: &Assignment) -> Result<(), message::Error> {
    let again = "take it away on the master target with `mt-agent protect remove` and assign it again";
    let refused = |text: String| {
        tracing::warn!(id = %disk.id, text, "target refused");
        Err(message::Error::new(Code::Refused, text))
    };
    if disk.size < assignment.size || disk.logical_block != assignment.logical_sector {
        return refused(format!(
            "the target disk had {} bytes in sectors of {} when it was assigned, and has {} in sectors of {} now; if \
             that is right, {again}",
            assignment.size.0, assignment.logical_sector, disk.size.0, disk.logical_block
        ));
    }
    if disk.size > assignment.size {
        tracing::warn!(
            id = %disk.id, assigned = %assignment.size, size = %disk.size,
            "the target disk has grown since it was assigned"
        );
    }
    if assignment.state == State::Empty && !assignment.overwrite {
        let content = disk.content().map_err(|error| not_opened(&error))?;
        if !content.is_blank() {
            return refused(format!(
                "the target disk was empty when it was assigned, and is not any more ({content}); if that may be lost, \
                 {again}, with --overwrite"
            ));
        }
    }
    Ok(())
}

/// Whether the source is certainly another disk than the one before.
pub(super) fn is_another(open: &Open, assignment: &Assignment) -> bool {
    let known = assignment.source.as_ref().and_then(|known| known.id.as_ref());
    known.zip(open.source.as_ref()).is_some_and(|(known, source)| known != source)
}

/// Refuses a source that is not what was sent before under this name, unless its user says that this is right: a device name
/// that now is another disk's would take the place of all that is kept here.
pub(super) fn still_the_same_source(
    machine: &Name,
    open: &Open,
    assignment: &Assignment,
) -> Result<(), message::Error> {
    if open.another {
        return Ok(());
    }
    if let Some(known) = assignment.source.as_ref().filter(|_| is_another(open, assignment)) {
        let id = |id: &Option<DiskId>| id.as_ref().map(ToString::to_string).unwrap_or_default();
        let text = format!(
            "disk {} of {machine} was {} when it was sent last, and now it is {}: check --disk; if another disk has taken its \
             place, send it once with --another-disk",
            open.disk,
            id(&known.id),
            id(&open.source)
        );
        return Err(another_source(machine, open, text));
    }
    match open.resized {
        true => Ok(()),
        false => still_of_its_size(machine, open, assignment),
    }
}

pub(super) fn still_of_its_size(
    machine: &Name,
    open: &Open,
    assignment: &Assignment,
) -> Result<(), message::Error> {
    let Some(known) = assignment.source.as_ref().filter(|known| known.size.0 != open.size) else {
        return Ok(());
    };
    let text = format!(
        "disk {} of {machine} had {} bytes when it was sent last, and now it has {}: check --disk; if it was resized, send it \
         once with --resized",
        open.disk, known.size.0, open.size
    );
    Err(another_source(machine, open, text))
}

fn another_source(machine: &Name, open: &Open, text: String) -> message::Error {
    tracing::warn!(disk = %open.disk, %machine, text, "source refused");
    message::Error::new(Code::Refused, text)
}

/// What the peer is told of a protection that cannot be used.
pub(super) fn refuse(error: &protection::Error) -> message::Error {
    let code = match error {
        protection::Error::NoMachine { .. } => Code::UnknownMachine,
        protection::Error::NoDisk { .. } => Code::UnknownDisk,
        protection::Error::Io(io) if out_of_space(&io.source) => Code::NoSpace,
        _ if error.is_refusal() => Code::Refused,
        _ => Code::Internal,
    };
    if code == Code::Internal || code == Code::NoSpace {
        tracing::error!(error = chain(error), "the protection cannot be read or written");
    }
    // Paths of this host are for its log.
    let text = match error {
        protection::Error::Io(io) => {
            format!(
                "the master target's record of the machine cannot be read or written: {}; see its log",
                io.source
            )
        }
        _ if code == Code::Internal => {
            "the master target cannot use its record of the machine; see its log".to_owned()
        }
        _ => chain(error),
    };
    message::Error::new(code, text)
}

pub(super) fn out_of_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What can be done about a target that is too small for its source.
pub(super) fn larger(machine: &Name, disk: &Name) -> String {
    format!(
        "enlarge it, and let the master target look (`mt-agent discover-disks --rescan` there); or attach a larger disk, and \
         assign that one in its place, without its recovery points (`mt-agent protect remove {machine} --disk {disk}`, then \
         `mt-agent protect add`)"
    )
}

/// What the peer is told of a disk that cannot be opened.
pub(super) fn not_opened(error: &device::Error) -> message::Error {
    let code = match error {
        device::Error::Refused { reason: Refusal::TooSmall { .. }, .. } => Code::SizeMismatch,
        device::Error::Refused { reason: Refusal::Busy(_), .. } => Code::Busy,
        device::Error::Io(_) | device::Error::Discover(_) => Code::Io,
        _ => Code::Refused,
    };
    tracing::warn!(error = chain(error), "target refused");
    let text = match error {
        device::Error::Refused { reason: Refusal::Busy(_), .. } => {
            "the target disk is held by something else: the log of the master target says by what, and \
             once that is gone it is free"
                .to_owned()
        }
        device::Error::Refused { reason, .. } => format!("the target disk is refused: {reason}"),
        device::Error::Io(io) => {
            format!("the target disk cannot be opened: {}; see the log there", io.source)
        }
        device::Error::Discover(_) => "the master target cannot list its disks; see its log".to_owned(),
        _ => chain(error),
    };
    message::Error::new(code, text)
}
