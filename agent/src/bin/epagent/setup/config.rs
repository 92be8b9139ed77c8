//! The two configuration files of a node, `runner.toml` and `epagentd.toml`: what follows from the node's number and
//! from what the host offers.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::host;
use crate::dev::node::{ID_RANGES, Node};

/// What the files are made of.
pub struct Inputs<'a> {
    pub node: Node,
    pub brain_uid: u32,
    pub balancer_gid: u32,
    /// Besides root, members of this group may use `admin.sock`.
    pub admin_gid: u32,
    /// Where the static helpers lie.
    pub binaries: &'a Path,
    pub runner: Folders,
    /// As the agent sees them, which may be in a mount namespace of its own.
    pub agent: Folders,
    pub pool: Pool,
    pub cgroup: String,
    /// Where the balancer listens, to tell users.
    pub http: String,
    pub build_env: &'a BTreeMap<String, String>,
}

/// Where one process keeps its state, and where all sockets are.
pub struct Folders {
    pub state: PathBuf,
    pub run: PathBuf,
}

/// Where the trees of the apps live.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Pool {
    /// A file of this size, made when it is missing.
    Loop { mount: PathBuf, file: PathBuf, size: String },
    /// A folder on a btrfs that exists.
    Path { path: PathBuf },
}

/// The text of both files.
pub struct Files {
    pub runner: String,
    pub agent: String,
}

#[derive(Serialize)]
struct RunnerToml<'a> {
    node: u8,
    state_dir: &'a Path,
    run_dir: &'a Path,
    jail_binary: PathBuf,
    unpack_binary: PathBuf,
    brain_uid: u32,
    balancer_gid: u32,
    host_image: bool,
    pool: &'a Pool,
    cgroup: Cgroup<'a>,
    ids: Ids,
    network: Network,
    build: Build<'a>,
}

#[derive(Serialize)]
struct Cgroup<'a> {
    root: &'a str,
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
    state_dir: &'a Path,
    run_dir: &'a Path,
    default_image: &'a str,
    admin_gid: u32,
    http_address: &'a str,
}

/// Both files.
pub fn files(inputs: &Inputs<'_>) -> Result<Files, toml::ser::Error> {
    Ok(Files { runner: toml::to_string(&runner(inputs))?, agent: toml::to_string(&agent(inputs))? })
}

fn runner<'a>(inputs: &'a Inputs<'a>) -> RunnerToml<'a> {
    let node = inputs.node;
    RunnerToml {
        node: node.number(),
        state_dir: &inputs.runner.state,
        run_dir: &inputs.runner.run,
        jail_binary: inputs.binaries.join("epagent-jail"),
        unpack_binary: inputs.binaries.join("epagent-unpack"),
        brain_uid: inputs.brain_uid,
        balancer_gid: inputs.balancer_gid,
        host_image: true,
        pool: &inputs.pool,
        cgroup: Cgroup { root: &inputs.cgroup },
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

fn agent<'a>(inputs: &'a Inputs<'a>) -> AgentToml<'a> {
    AgentToml {
        node: inputs.node.number(),
        state_dir: &inputs.agent.state,
        run_dir: &inputs.agent.run,
        default_image: "host",
        admin_gid: inputs.admin_gid,
        http_address: &inputs.http,
    }
}

/// Puts a file in its place, whole or not at all.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let next = path.with_extension("next");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&next)?;
    // Whatever the umask took of it.
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&next, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_have_the_documented_shape() {
        let env = BTreeMap::from([("http_proxy".to_owned(), "http://p:1".to_owned())]);
        let node = Node::new(3).unwrap();
        let inputs = Inputs {
            node,
            brain_uid: 60_612,
            balancer_gid: 60_613,
            admin_gid: 0,
            binaries: Path::new("/usr/lib/epagent"),
            runner: Folders { state: "/s/runner".into(), run: "/s/run".into() },
            agent: Folders { state: "/mnt/brain".into(), run: "/mnt/run".into() },
            pool: Pool::Loop { mount: "/s/pool".into(), file: "/s/pool.img".into(), size: "6G".to_owned() },
            cgroup: node.cgroup(),
            http: "127.0.0.1:8080".to_owned(),
            build_env: &env,
        };
        let files = files(&inputs).unwrap();
        let runner: toml::Table = files.runner.parse().unwrap();
        assert_eq!(runner["brain_uid"].as_integer(), Some(60_612));
        assert_eq!(runner["cgroup"]["root"].as_str(), Some("epagent-3"));
        assert_eq!(runner["ids"]["base"].as_integer(), Some(2_197_815_296));
        assert_eq!(runner["network"]["v4"].as_str(), Some("100.96.48.0/20"));
        assert_eq!(runner["build"]["env"]["http_proxy"].as_str(), Some("http://p:1"));
        assert_eq!(runner["pool"]["size"].as_str(), Some("6G"));
        let agent: toml::Table = files.agent.parse().unwrap();
        assert_eq!(agent["state_dir"].as_str(), Some("/mnt/brain"));
        assert_eq!(agent["http_address"].as_str(), Some("127.0.0.1:8080"));
        let path = Inputs { pool: Pool::Path { path: "/srv/pool".into() }, ..inputs };
        let runner: toml::Table = super::files(&path).unwrap().runner.parse().unwrap();
        assert_eq!(runner["pool"]["path"].as_str(), Some("/srv/pool"));
    }
}
