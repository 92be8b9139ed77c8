//! Requests from many threads while something happens to the app.
//!
//! A request is failed for anything but the answer that was expected: refused, reset, closed early, timed out,
//! another status, another body. Nothing is retried. Half of the threads keep their connection (and open a new
//! one only when the server announced the end of the old), half open one per request.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::http::{self, Connection, Response};

/// Most failures kept with their reason per thread; all are counted.
const FAILURES_KEPT_MAX: usize = 40;
/// Most different answers that are told apart.
const ANSWERS_MAX: usize = 32;

/// How the load is made.
#[derive(Debug, Clone)]
pub struct Shape {
    pub keep_alive_threads: usize,
    pub fresh_threads: usize,
    /// Pause of a thread between two requests, so that two cores are left with time for the agent.
    pub pause: Duration,
    /// Longest wait for an answer; longer than requests may be held.
    pub patience: Duration,
    pub path: String,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            keep_alive_threads: 4,
            fresh_threads: 4,
            pause: Duration::from_millis(8),
            patience: Duration::from_secs(40),
            path: "/".to_owned(),
        }
    }
}

/// A load that runs until it is finished or dropped.
pub struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Report>>,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Report {
    pub ok: u64,
    pub failed: u64,
    /// When (since the load began), on which kind of connection, why.
    pub failures: Vec<String>,
    /// First lines of the expected answers and how often each came: which release answered.
    pub answers: BTreeMap<String, u64>,
    pub slowest: Duration,
}

struct Client {
    address: SocketAddr,
    host: String,
    shape: Shape,
    keep_alive: bool,
    expected: Arc<dyn Fn(&Response) -> bool + Send + Sync>,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
}

impl Load {
    /// Starts asking `address` for `host`; every answer must be a 200 whose body contains `word`.
    pub fn start(address: SocketAddr, host: &str, word: &str, shape: Shape) -> Self {
        let word = word.as_bytes().to_vec();
        Self::expecting(address, host, shape, move |response| {
            response.status == 200 && response.body.windows(word.len()).any(|bytes| bytes == word)
        })
    }

    pub fn expecting(
        address: SocketAddr,
        host: &str,
        shape: Shape,
        expected: impl Fn(&Response) -> bool + Send + Sync + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let expected: Arc<dyn Fn(&Response) -> bool + Send + Sync> = Arc::new(expected);
        let threads = (0..shape.keep_alive_threads + shape.fresh_threads)
            .map(|number| {
                let client = Client {
                    address,
                    host: host.to_owned(),
                    shape: shape.clone(),
                    keep_alive: number < shape.keep_alive_threads,
                    expected: expected.clone(),
                    stop: stop.clone(),
                    answered: answered.clone(),
                };
                std::thread::spawn(move || client.run())
            })
            .collect();
        let load = Self { stop, answered, threads };
        load.wait_for(1, Duration::from_secs(30));
        load
    }

    /// How many requests were answered (well or not) so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Lets the load go on for another `count` answers.
    #[track_caller]
    pub fn wait_for(&self, count: u64, deadline: Duration) {
        let target = self.answered() + count;
        crate::eventually(&format!("{count} more answers under load"), deadline, || {
            (self.answered() >= target).then_some(())
        });
    }

    pub fn finish(mut self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).fold(Report::default(), |sum, thread| {
            sum.and(thread.join().unwrap_or_else(|_| panic!("a thread of the load panicked")))
        })
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Client {
    fn run(self) -> Report {
        let begin = Instant::now();
        let mut report = Report::default();
        let mut kept: Option<Connection<TcpStream>> = None;
        while !self.stop.load(Ordering::Relaxed) {
            let asked = Instant::now();
            match self.ask(&mut kept) {
                Ok(response) if (self.expected)(&response) => report.count(&response, asked.elapsed()),
                Ok(response) => {
                    let text: String = response.text().chars().take(200).collect();
                    self.fail(&mut report, begin, asked, format!("{} {text:?}", response.status));
                }
                Err(error) => {
                    kept = None;
                    self.fail(&mut report, begin, asked, format!("{error} ({:?})", error.kind()));
                }
            }
            self.answered.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(self.shape.pause);
        }
        report
    }

    fn ask(&self, kept: &mut Option<Connection<TcpStream>>) -> io::Result<Response> {
        if !self.keep_alive {
            return http::get(self.address, &self.host, &self.shape.path, self.shape.patience);
        }
        let mut connection = match kept.take() {
            Some(connection) => connection,
            None => Connection::open(self.address, self.shape.patience)?,
        };
        let response = connection.get(&self.host, &self.shape.path, &[])?;
        if !response.closes() {
            *kept = Some(connection);
        }
        Ok(response)
    }

    fn fail(&self, report: &mut Report, begin: Instant, asked: Instant, why: String) {
        report.failed += 1;
        if report.failures.len() < FAILURES_KEPT_MAX {
            let kind = if self.keep_alive { "keep-alive" } else { "fresh" };
            let at = asked.duration_since(begin).as_secs_f64();
            let took = asked.elapsed().as_millis();
            report.failures.push(format!("{at:7.3} s {kind:10} after {took} ms: {why}"));
        }
    }
}

impl Report {
    fn count(&mut self, response: &Response, took: Duration) {
        self.ok += 1;
        self.slowest = self.slowest.max(took);
        let text = response.text();
        let first: String = text.lines().next().unwrap_or("").chars().take(60).collect();
        if self.answers.len() < ANSWERS_MAX || self.answers.contains_key(&first) {
            *self.answers.entry(first).or_default() += 1;
        }
    }

    fn and(mut self, other: Report) -> Report {
        self.ok += other.ok;
        self.failed += other.failed;
        self.failures.extend(other.failures);
        for (answer, count) in other.answers {
            *self.answers.entry(answer).or_default() += count;
        }
        self.slowest = self.slowest.max(other.slowest);
        self
    }

    /// The promise of most suites. A load that asked next to nothing proves nothing.
    #[track_caller]
    pub fn assert_none_failed(&self) {
        println!("{self}");
        assert_eq!(self.failed, 0, "requests failed\n{self}");
        assert!(self.ok >= 50, "only {} requests were made", self.ok);
    }

    /// How many answers began with `text`.
    pub fn answered_with(&self, text: &str) -> u64 {
        self.answers.iter().filter(|(answer, _)| answer.starts_with(text)).map(|(_, count)| count).sum()
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} requests ok, {} failed, slowest {} ms",
            self.ok,
            self.failed,
            self.slowest.as_millis()
        )?;
        for (answer, count) in &self.answers {
            write!(f, "\n  {count:7} × {answer}")?;
        }
        for failure in &self.failures {
            write!(f, "\n  failed {failure}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    fn shape() -> Shape {
        Shape { keep_alive_threads: 1, fresh_threads: 1, pause: Duration::from_millis(1), ..Shape::default() }
    }

    /// A server that answers every read of every connection with `answer`, and closes if that is empty.
    fn server(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    while matches!(stream.read(&mut [0; 4096]), Ok(1..)) && !answer.is_empty() {
                        stream.write_all(answer.as_bytes()).unwrap();
                    }
                });
            }
        });
        address
    }

    fn report(address: SocketAddr) -> Report {
        let load = Load::start(address, "any", "hello", shape());
        load.wait_for(60, Duration::from_secs(10));
        load.finish()
    }

    #[test]
    fn expected_answers_are_counted() {
        let report = report(server("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n"));
        report.assert_none_failed();
        assert_eq!(report.answered_with("hello"), report.ok);
    }

    #[test]
    fn anything_else_is_a_failure_with_its_reason() {
        for (answer, reason) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbye\n", "200 \"bye"),
            ("HTTP/1.1 503 Busy\r\nContent-Length: 6\r\n\r\nhello\n", "503"),
            ("", "closed"),
        ] {
            let report = report(server(answer));
            assert_eq!(report.ok, 0, "{report}");
            assert!(
                report.failed >= 60 && report.failures.iter().all(|why| why.contains(reason)),
                "{report}"
            );
        }
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let report = report(closed);
        assert!(report.ok == 0 && report.failures.iter().all(|why| why.contains("refused")), "{report}");
    }

    #[test]
    #[should_panic(expected = "requests failed")]
    fn a_single_failure_breaks_the_promise() {
        Report { ok: 1_000_000, failed: 1, ..Report::default() }.assert_none_failed();
    }
}
