//! The text exposition format, version 0.0.4, of Prometheus.

use std::fmt::{Display, Write};

use crate::core::histogram::Histogram;

/// What a client is told the text is.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Bounds of exposed buckets, as powers of two in microseconds: 256 µs to 67 s, each the double of the last.
const BUCKET_POWERS: std::ops::RangeInclusive<u32> = 8..=26;

/// A text that grows, family by family.
#[derive(Debug, Default)]
pub struct Text {
    out: String,
    family: String,
}

/// What a family counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, and begins again at 0 with the process.
    Counter,
    Gauge,
    Histogram,
}

/// Names and values of labels.
pub type Labels<'a> = [(&'a str, &'a str)];

impl Text {
    /// Begins a family; its samples follow.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) {
        self.family = format!("epagent_balancer_{name}");
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        // Writing to a string cannot fail.
        let _ = write!(self.out, "# HELP {0} {help}\n# TYPE {0} {kind}\n", self.family);
    }

    /// One sample of a counter or gauge.
    pub fn sample(&mut self, labels: &Labels<'_>, value: impl Display) {
        self.line("", labels, None, value);
    }

    /// All samples of one histogram, in seconds. Each bucket counts what is below it, so they only grow.
    pub fn histogram(&mut self, labels: &Labels<'_>, values: &Histogram) {
        for power in BUCKET_POWERS {
            self.line("_bucket", labels, Some(&seconds(1 << power)), values.count_below_power(power));
        }
        self.line("_bucket", labels, Some("+Inf"), values.count());
        self.line("_sum", labels, None, seconds(values.sum_us()));
        self.line("_count", labels, None, values.count());
    }

    pub fn finish(self) -> String {
        self.out
    }

    fn line(&mut self, suffix: &str, labels: &Labels<'_>, le: Option<&str>, value: impl Display) {
        self.out.push_str(&self.family);
        self.out.push_str(suffix);
        let mut between = '{';
        for (name, value) in labels.iter().copied().chain(le.map(|le| ("le", le))) {
            self.out.push(between);
            self.out.push_str(name);
            self.out.push_str("=\"");
            for char in value.chars() {
                match char {
                    '\\' => self.out.push_str("\\\\"),
                    '"' => self.out.push_str("\\\""),
                    '\n' => self.out.push_str("\\n"),
                    other => self.out.push(other),
                }
            }
            self.out.push('"');
            between = ',';
        }
        if between == ',' {
            self.out.push('}');
        }
        // Writing to a string cannot fail.
        let _ = writeln!(self.out, " {value}");
    }
}

/// Microseconds as seconds, exactly.
fn seconds(micros: u64) -> String {
    let text = format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_numbers_exact() {
        let mut text = Text::default();
        text.family("x_total", Kind::Counter, "A \\ and\na line.");
        text.sample(&[("route", "a\"b\\c\nd")], 7);
        text.sample(&[], 8);
        let expected = "# HELP epagent_balancer_x_total A \\\\ and\\na line.\n\
                        # TYPE epagent_balancer_x_total counter\n\
                        epagent_balancer_x_total{route=\"a\\\"b\\\\c\\nd\"} 7\n\
                        epagent_balancer_x_total 8\n";
        assert_eq!(text.finish(), expected);
        assert_eq!([0, 1, 256, 1_000_000, 1_500_000].map(seconds), ["0", "0.000001", "0.000256", "1", "1.5"]);
    }

    #[test]
    fn a_histogram_counts_up_to_its_total() {
        let mut values = Histogram::default();
        [100, 255, 256, 2_000_000, 90_000_000].into_iter().for_each(|value| values.record(value));
        let mut text = Text::default();
        text.histogram(&[("route", "a")], &values);
        let text = text.finish();
        for line in [
            "_bucket{route=\"a\",le=\"0.000256\"} 2\n",
            "_bucket{route=\"a\",le=\"0.000512\"} 3\n",
            "_bucket{route=\"a\",le=\"2.097152\"} 4\n",
            "_bucket{route=\"a\",le=\"67.108864\"} 4\n",
            "_bucket{route=\"a\",le=\"+Inf\"} 5\n",
            "_sum{route=\"a\"} 92.000611\n",
            "_count{route=\"a\"} 5\n",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
