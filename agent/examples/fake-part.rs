//! A stand-in for each part of a node, told apart by the name it is started as. The tests of `epagent dev` put
//! copies of it where the real programs would lie, so that they show what the supervisor does and nothing else.
//!
//! Each writes what it finds about itself, one `name=value` per line, to `facts` in its state folder. `epagentd`
//! answers the one question the supervisor asks; a file `crash` in its state folder makes a part die at once.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::exit;

use epagent::activation::Inherited;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let name = args[0].as_str();
    let state = match name {
        "epagentd" => PathBuf::from("/mnt/brain"),
        "epagent-balancer" => PathBuf::from("/mnt/balancer"),
        "epagent-lease" => PathBuf::from("/mnt/lease"),
        // `run|teardown --config DIR/etc/runner.toml`
        _ => Path::new(&args[3]).ancestors().nth(2).unwrap().join("runner"),
    };
    if args.get(1).is_some_and(|verb| verb == "teardown") {
        std::fs::write(state.join("torn-down"), "").unwrap();
        return;
    }
    if state.join("crash").exists() {
        eprintln!("told to crash");
        exit(3);
    }
    let mut inherited = Inherited::from_env().unwrap();
    let names: Vec<&str> = inherited.names().collect();
    let mut facts = format!("sockets={}\n", names.join(","));
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    for key in ["Uid", "Gid", "Groups", "CapEff", "CapPrm", "CapAmb", "NoNewPrivs", "SigBlk"] {
        let line = status.lines().find(|line| line.starts_with(&format!("{key}:"))).unwrap();
        facts.push_str(&format!("{key}={}\n", line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")));
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    facts.push_str(&format!("btrfs_mounts={}\n", mounts.matches(" - btrfs ").count()));
    facts.push_str(&format!("config_is_readable={}\n", Path::new("/mnt/etc/epagentd.toml").exists()));
    for other in ["brain", "balancer", "lease", "runner", "log"] {
        let open = std::fs::read_dir(Path::new("/mnt").join(other)).is_ok();
        facts.push_str(&format!("reads_{other}={open}\n"));
    }
    std::fs::write(state.join("facts.next"), facts).unwrap();
    std::fs::rename(state.join("facts.next"), state.join("facts")).unwrap();
    if name == "epagentd" {
        let listener = inherited.take_unix("admin").unwrap();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let body = r#"{"version":"0.0.1","node":1,"runner":"0.0.1","http_address":"x:1"}"#;
            let length = body.len();
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            );
        }
    }
    loop {
        std::thread::park();
    }
}
