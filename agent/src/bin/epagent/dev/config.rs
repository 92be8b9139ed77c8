//! The two configuration files of a node, as `epagent dev` writes them at each start.
//!
//! They have the shape an installed system's files in /etc/epagent have; here they follow from the node's number
//! and from what the host offers.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::error::DevError;
use super::host;
use super::layout::{Layout, Users, VIEW};
use super::node::{ID_RANGES, Node};

/// What the files are made of.
pub struct Inputs<'a> {
    pub layout: &'a Layout,
    pub node: Node,
    pub users: Users,
    /// Where the static helpers lie.
    pub binaries: &'a Path,
    pub pool_size: &'a str,
    pub http: SocketAddr,
    pub build_env: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
struct RunnerToml<'a> {
    node: u8,
    state_dir: PathBuf,
    run_dir: PathBuf,
    jail_binary: PathBuf,
    unpack_binary: PathBuf,
    brain_uid: u32,
    host_image: bool,
    pool: Pool<'a>,
    cgroup: Cgroup,
    ids: Ids,
    network: Network,
    build: Build<'a>,
}

#[derive(Serialize)]
struct Pool<'a> {
    mount: PathBuf,
    file: PathBuf,
    size: &'a str,
}

#[derive(Serialize)]
struct Cgroup {
    root: String,
}

#[derive(Serialize)]
struct Ids {
    base: u32,
    ranges: u32,
}

#[derive(Serialize)]
struct Network {
    v4: String,
    v6: String,
    resolvers: Vec<String>,
    allow: Vec<String>,
}

#[derive(Serialize)]
struct Build<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_bundle: Option<PathBuf>,
    memory: &'static str,
    disk: &'static str,
    deadline: &'static str,
    cpu: &'static str,
    env: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
struct AgentToml<'a> {
    node: u8,
    state_dir: PathBuf,
    run_dir: PathBuf,
    default_image: &'a str,
    admin_gid: u32,
    http_address: String,
}

/// Writes both files.
pub fn write(inputs: &Inputs<'_>) -> Result<(), DevError> {
    write_file(&inputs.layout.path("etc/runner.toml"), &runner(inputs))?;
    write_file(&inputs.layout.path("etc/epagentd.toml"), &agent(inputs))
}

fn runner<'a>(inputs: &Inputs<'a>) -> RunnerToml<'a> {
    let Inputs { layout, node, users, .. } = *inputs;
    RunnerToml {
        node: node.number(),
        state_dir: layout.path("runner"),
        run_dir: layout.path("run"),
        jail_binary: inputs.binaries.join("epagent-jail"),
        unpack_binary: inputs.binaries.join("epagent-unpack"),
        brain_uid: users.brain,
        host_image: true,
        pool: Pool { mount: layout.pool_mount(), file: layout.pool_file(), size: inputs.pool_size },
        cgroup: Cgroup { root: node.cgroup() },
        ids: Ids { base: node.id_base(), ranges: ID_RANGES },
        network: Network {
            v4: node.v4_block(),
            v6: node.v6_block(),
            resolvers: host::resolvers().iter().map(ToString::to_string).collect(),
            allow: Vec::new(),
        },
        build: Build {
            ca_bundle: host::ca_bundle(),
            memory: "2G",
            disk: "4G",
            deadline: "30m",
            cpu: "200%",
            env: inputs.build_env,
        },
    }
}

fn agent<'a>(inputs: &Inputs<'a>) -> AgentToml<'a> {
    AgentToml {
        node: inputs.node.number(),
        state_dir: Path::new(VIEW).join("brain"),
        run_dir: Path::new(VIEW).join("run"),
        default_image: "host",
        admin_gid: 0,
        http_address: inputs.http.to_string(),
    }
}

fn write_file(path: &Path, value: &impl Serialize) -> Result<(), DevError> {
    let text = toml::to_string(value).map_err(|source| DevError::Toml { source })?;
    let text = format!("# Written by `epagent dev` at each start; changes here are lost.\n{text}");
    replace(path, &text).map_err(|source| DevError::Folder { path: path.to_owned(), source })
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    let next = path.with_extension("next");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&next)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&next, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_have_the_documented_shape() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::open(dir.path()).unwrap();
        fs::create_dir(layout.path("etc")).unwrap();
        let node = Node::new(3).unwrap();
        let env = BTreeMap::from([("http_proxy".to_owned(), "http://p:1".to_owned())]);
        let inputs = Inputs {
            layout: &layout,
            node,
            users: Users::of(node),
            binaries: Path::new("/usr/lib/epagent"),
            pool_size: "6G",
            http: "127.0.0.1:8080".parse().unwrap(),
            build_env: &env,
        };
        write(&inputs).unwrap();
        let read = |name| -> toml::Table { fs::read_to_string(layout.path(name)).unwrap().parse().unwrap() };
        let runner = read("etc/runner.toml");
        assert_eq!(runner["brain_uid"].as_integer(), Some(60_612));
        assert_eq!(runner["cgroup"]["root"].as_str(), Some("epagent-3"));
        assert_eq!(runner["ids"]["base"].as_integer(), Some(2_197_815_296));
        assert_eq!(runner["network"]["v4"].as_str(), Some("100.96.48.0/20"));
        assert_eq!(runner["build"]["env"]["http_proxy"].as_str(), Some("http://p:1"));
        let agent = read("etc/epagentd.toml");
        assert_eq!(agent["state_dir"].as_str(), Some("/mnt/brain"));
        assert_eq!(agent["http_address"].as_str(), Some("127.0.0.1:8080"));
    }
}
