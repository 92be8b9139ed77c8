//! What the host offers to apps and builds: resolvers, certificate authorities, proxies and package indexes.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// As many as the C library reads (resolv.conf(5), MAXNS).
const RESOLVERS_MAX: usize = 3;

/// The variables a build behind a company proxy needs. Values, not rights: anything that looks like a credential
/// is left out, since every tenant's build would see it.
const BUILD_VARIABLES: [&str; 11] = [
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_DEFAULT_TIMEOUT",
    "npm_config_registry",
    "NPM_CONFIG_REGISTRY",
];

/// Where distributions keep the bundle that OpenSSL and curl read.
const CA_BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// The resolvers that instances are redirected to. A stub on loopback (systemd-resolved, dnsmasq) can't be
/// reached from another network namespace, so what it asks itself is taken in its place.
pub fn resolvers() -> Vec<IpAddr> {
    let files = [Path::new("/etc/resolv.conf"), Path::new("/run/systemd/resolve/resolv.conf")];
    let found = files.iter().find_map(|file| {
        let list = nameservers(&fs::read_to_string(file).ok()?);
        (!list.is_empty()).then_some(list)
    });
    found.unwrap_or_default()
}

/// The addresses of a resolv.conf, without those on loopback.
fn nameservers(text: &str) -> Vec<IpAddr> {
    text.lines()
        .filter_map(|line| line.trim_start().strip_prefix("nameserver"))
        .filter(|rest| rest.starts_with([' ', '\t']))
        .filter_map(|rest| rest.split_whitespace().next())
        // A link-local address carries its interface (`fe80::1%eth0`); from a jail it can't be reached anyway.
        .filter_map(|address| address.parse::<IpAddr>().ok())
        .filter(|address| !address.is_loopback() && !address.is_unspecified())
        .take(RESOLVERS_MAX)
        .collect()
}

pub fn ca_bundle() -> Option<PathBuf> {
    CA_BUNDLES.iter().map(PathBuf::from).find(|path| path.is_file())
}

/// What to pass on to builds, and the names that were left out because their value carries a credential.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BuildEnv {
    pub passed: BTreeMap<String, String>,
    pub left_out: Vec<&'static str>,
}

pub fn build_env(lookup: impl Fn(&str) -> Option<String>) -> BuildEnv {
    let mut env = BuildEnv::default();
    for name in BUILD_VARIABLES {
        match lookup(name) {
            None => {}
            Some(value) if value.is_empty() || value.contains(['\n', '\0']) => {}
            Some(value) if has_user_info(&value) => env.left_out.push(name),
            Some(value) => {
                env.passed.insert(name.to_owned(), value);
            }
        }
    }
    env
}

/// Whether some URL in a list of them has a user part: `https://me:word@host/`.
fn has_user_info(value: &str) -> bool {
    value.split_whitespace().any(|url| {
        let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
        rest.split('/').next().is_some_and(|authority| authority.contains('@'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_resolvers_are_passed_over() {
        let text = "# nameserver 9.9.9.9\nsearch x\nnameserver 127.0.0.53\nnameserver\t10.0.0.53 # x\n\
                    nameserver ::1\nnameserver fd00::53\nnameservers 1.1.1.1\nnameserver fe80::1%eth0\n";
        let expected: Vec<IpAddr> = vec!["10.0.0.53".parse().unwrap(), "fd00::53".parse().unwrap()];
        assert_eq!(nameservers(text), expected);
        assert!(nameservers("nameserver 127.0.0.53\n").is_empty());
    }

    #[test]
    fn credentials_are_not_passed_to_builds() {
        let env = build_env(|name| match name {
            "http_proxy" => Some("http://proxy:3128".to_owned()),
            "PIP_INDEX_URL" => Some("https://me:word@pypi.example/simple".to_owned()),
            "PIP_EXTRA_INDEX_URL" => Some("https://a/x https://b@c/y".to_owned()),
            "no_proxy" => Some(String::new()),
            _ => None,
        });
        assert_eq!(env.passed.keys().collect::<Vec<_>>(), ["http_proxy"]);
        assert_eq!(env.left_out, ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"]);
    }
}
