//! The metrics of `GET /metrics`, in the OpenMetrics text format, which Prometheus reads.
//!
//! All names begin with `mt_agent_`. Metrics of a volume carry the labels `machine` and `disk`; counters count since
//! the service started, over all passes.

use std::fmt;
use std::sync::atomic::Ordering;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::status::{Board, Report, Totals, VolumeReport};
use crate::name::Name;

/// The content type of [`text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All metrics of this moment. `report` is the board's report of the same moment.
pub fn text(board: &Board, report: Report) -> Result<String, fmt::Error> {
    let service = &board.service;
    let counts = [
        ("sessions", "Connections that were taken", service.sessions_total.load(Ordering::Relaxed)),
        (
            "sessions_refused",
            "Connections that were refused: certificate, protocol, or too many",
            service.refused_total.load(Ordering::Relaxed),
        ),
        (
            "frames_refused",
            "Connections that ended with a frame that was refused: checksum, length, offset or order",
            service.bad_frames_total.load(Ordering::Relaxed),
        ),
    ];
    let totals = board.live.totals().into_iter().collect();
    let mut registry = Registry::with_prefix("mt_agent");
    registry.register_collector(Box::new(Snapshot { report, counts, totals }));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Snapshot {
    report: Report,
    counts: [(&'static str, &'static str, u64); 3],
    totals: Vec<((Name, Name), Totals)>,
}

type Figure = fn(&Totals) -> u64;

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let service = &self.report.service;
        let metric = encoder.encode_descriptor("info", "Which mt-agent this is", None, MetricType::Gauge)?;
        let labels = [("version", service.version.as_str()), ("engine", service.engine.name.as_str())];
        gauge(metric, &labels, 1.0)?;
        let metric = encoder.encode_descriptor(
            "start_time",
            "When the service started, since the epoch",
            Some(&Unit::Seconds),
            MetricType::Gauge,
        )?;
        ConstGauge::new(service.started.unix_timestamp()).encode(metric)?;
        let metric = encoder.encode_descriptor(
            "sessions_open",
            "Connections that are open",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(i64::try_from(service.sessions).unwrap_or(i64::MAX)).encode(metric)?;
        for (name, help, value) in self.counts {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(value).encode(metric)?;
        }
        let unreadable = self.report.machines.iter().filter(|machine| machine.error.is_some()).count();
        let metric = encoder.encode_descriptor(
            "protections_unreadable",
            "Protection files that cannot be read",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(i64::try_from(unreadable).unwrap_or(i64::MAX)).encode(metric)?;
        self.counters(&mut encoder)?;
        self.gauges(&mut encoder)
    }
}

impl Snapshot {
    fn counters(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let bytes = Some(&Unit::Bytes);
        let families: [(&str, &str, Option<&Unit>, Figure); 9] = [
            ("volume_received", "Bytes of the volume that arrived", bytes, |t| t.received_bytes),
            ("volume_same", "Bytes of the volume that were compared and are the same", bytes, |t| {
                t.same_bytes
            }),
            ("volume_wire", "Bytes of payloads on the wire", bytes, |t| t.wire_bytes),
            ("volume_written", "Bytes whose writing completed", bytes, |t| t.written_bytes),
            ("volume_zeroed", "Bytes made zero without being written", bytes, |t| t.zeroed_bytes),
            ("volume_frames", "Frames of data that arrived", None, |t| t.frames),
            (
                "volume_refused_frames",
                "Frames whose payload arrived damaged and was thrown away",
                None,
                |t| t.refused_frames,
            ),
            ("volume_commits", "Passes that were committed", None, |t| t.commits),
            ("volume_faults", "Passes in which a write or a flush failed", None, |t| t.faults),
        ];
        for (name, help, unit, figure) in families {
            let mut metric = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
            for ((machine, disk), totals) in &self.totals {
                let labels = [("machine", machine.as_str()), ("disk", disk.as_str())];
                ConstCounter::new(figure(totals)).encode(metric.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn gauges(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        type Value = fn(&VolumeReport) -> Option<f64>;
        let families: [(&str, &str, Option<&Unit>, Value); 9] = [
            ("volume_size", "Size of the target disk", Some(&Unit::Bytes), |v| Some(v.size as f64)),
            ("volume_connections", "Connections that carry the pass; 0 before it begins", None, |v| {
                v.connections.map(|connections| connections as f64)
            }),
            ("volume_rate", "Bytes of the volume a second, smoothed", Some(&Unit::Bytes), |v| {
                v.rate.map(|rate| rate as f64)
            }),
            ("volume_eta", "Until everything has arrived", Some(&Unit::Seconds), |v| {
                v.eta.map(|eta| eta as f64)
            }),
            ("volume_lag", "Since the last commit", Some(&Unit::Seconds), |v| v.lag.map(|lag| lag as f64)),
            (
                "volume_lag",
                "What the running pass has neither brought nor found to be there yet",
                Some(&Unit::Bytes),
                |v| v.lag_bytes.map(|lag| lag as f64),
            ),
            (
                "volume_verified",
                "Bytes that a verify which runs has compared so far",
                Some(&Unit::Bytes),
                |v| v.verified_bytes.map(|bytes| bytes as f64),
            ),
            ("volume_synchronized", "Whether the disk stands at its last commit", None, |v| {
                Some(f64::from(u8::from(v.phase == "synchronized")))
            }),
            ("volume_faulted", "Whether a write or a flush failed", None, |v| {
                Some(f64::from(u8::from(v.phase == "faulted")))
            }),
        ];
        for (name, help, unit, value) in families {
            let mut metric = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
            for machine in &self.report.machines {
                for volume in &machine.volumes {
                    let Some(value) = value(volume) else { continue };
                    let labels = [("machine", machine.machine.as_str()), ("disk", volume.disk.as_str())];
                    ConstGauge::new(value).encode(metric.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

fn gauge(
    mut metric: prometheus_client::encoding::MetricEncoder<'_>,
    labels: &[(&str, &str); 2],
    value: f64,
) -> fmt::Result {
    ConstGauge::new(value).encode(metric.encode_family(labels)?)
}
