//! The rows: every round as it was, then medians and ratios.

use crate::fronts::Kind;

/// One figure of one round.
#[derive(Debug, Clone)]
pub struct Row {
    pub scenario: String,
    pub front: Option<Kind>,
    /// What `cpu` is per: `µs/request`, `µs/connection`, `s/GiB`, `KiB/connection`.
    pub unit: &'static str,
    pub cpu: f64,
    /// Requests, connections or GiB per second.
    pub rate: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub failed: u64,
}

impl Row {
    pub fn print(&self) {
        println!(
            "row\t{}\t{}\t{:.3}\t{}\t{:.2}\t{:.0}\t{:.0}\t{}",
            self.scenario,
            self.name(),
            self.cpu,
            self.unit,
            self.rate,
            self.p50_us,
            self.p99_us,
            self.failed
        );
    }

    fn name(&self) -> &'static str {
        self.front.map_or("no front", Kind::name)
    }
}

/// The medians of one scenario, and how each front stands to `base`.
pub fn summary(rows: &[Row], base: Kind) {
    let Some(first) = rows.first() else { return };
    println!("\n{}", first.scenario);
    println!(
        "  {:<28} {:>10} {:<15} {:>8} {:>11} {:>9} {:>9} {:>7}",
        "front",
        "cost",
        "",
        format!("÷ {}", base.name()).chars().take(14).collect::<String>(),
        "rate/s",
        "p50 µs",
        "p99 µs",
        "failed"
    );
    let mut fronts: Vec<Option<Kind>> = Vec::new();
    for row in rows {
        if !fronts.contains(&row.front) {
            fronts.push(row.front);
        }
    }
    let of = |front: Option<Kind>, figure: fn(&Row) -> f64| {
        median(rows.iter().filter(|row| row.front == front).map(figure).collect())
    };
    let base_cpu = of(Some(base), |row| row.cpu);
    for front in fronts {
        let cpu = of(front, |row| row.cpu);
        let failed: u64 = rows.iter().filter(|row| row.front == front).map(|row| row.failed).sum();
        let ratio = if front.is_none() { "-".to_owned() } else { format!("{:.2}", cpu / base_cpu) };
        println!(
            "  {:<28} {:>10.2} {:<15} {:>8} {:>11.2} {:>9.0} {:>9.0} {:>7}",
            front.map_or("no front", Kind::name),
            cpu,
            first.unit,
            ratio,
            of(front, |row| row.rate),
            of(front, |row| row.p50_us),
            of(front, |row| row.p99_us),
            failed
        );
    }
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    match figures.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => figures[len / 2],
        len => (figures[len / 2 - 1] + figures[len / 2]) / 2.0,
    }
}
