//! What a balancer says in its log, while it runs.

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::sync::{Arc, Mutex};

/// The lines so far, of a child whose standard error is a pipe.
pub struct Heard {
    lines: Arc<Mutex<Vec<String>>>,
}

impl Heard {
    pub fn of(child: &mut Child) -> Self {
        let said = BufReader::new(child.stderr.take().expect("its standard error"));
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let heard = lines.clone();
        std::thread::spawn(move || {
            for line in said.lines().map_while(Result::ok) {
                eprintln!("{line}");
                heard.lock().expect("unpoisoned").push(line);
            }
        });
        Self { lines }
    }

    /// How many lines have these words in them.
    pub fn count(&self, words: &str) -> usize {
        self.lines.lock().expect("unpoisoned").iter().filter(|line| line.contains(words)).count()
    }
}
