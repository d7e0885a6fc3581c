//! Files of the host that a task sees otherwise: its resolver's configuration, its hosts, and the lists of users and groups,
//! where it may read them, with its own dynamic user among them.

use std::net::IpAddr;
use std::path::Path;

use thiserror::Error;

use super::steps::{Place, Replaced, Rule, Text};
use crate::task::types::{Dns, Hosts};
use crate::users::Account;

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The host's resolver, as its files say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolver {
    /// /etc/resolv.conf.
    pub configured: String,
    /// What systemd-resolved asks itself, behind its stub at 127.0.0.53.
    pub upstream: Option<String>,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum FileError {
    #[error("network.dns: server {0:?} is not an IP address; name resolvers by address")]
    Server(String),
    #[error(
        "network.dns: {0:?} contains a blank or a control character, which resolv.conf cannot hold"
    )]
    Word(String),
    #[error("network: host name {0:?} or its address is none; Nomad's network plugin gave it")]
    Host(String),
}

/// What decides on them.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    pub account: &'a Account,
    pub rules: &'a [Rule],
    /// The job's `network.dns`.
    pub dns: Option<&'a Dns>,
    pub hosts: Option<&'a Hosts>,
    /// The task is not in the host's network namespace.
    pub owns_network: bool,
    pub resolver: &'a Resolver,
}

pub fn replaced(wanted: &Wanted<'_>) -> Result<Vec<Replaced>, FileError> {
    let mut files = Vec::new();
    let mut add = |path: &str, text| {
        files.push(Replaced {
            path: path.into(),
            text,
        });
    };
    if let Some(text) = resolv_conf(wanted)? {
        add(RESOLV_CONF, Text::Whole(text));
    }
    if let Some(hosts) = wanted.hosts {
        add("/etc/hosts", Text::Whole(hosts_file(hosts)?));
    }
    let Account { name, uid, gid, .. } = wanted.account;
    if wanted.account.is_dynamic {
        let home = wanted.account.home.display();
        for (path, line) in [
            (
                "/etc/passwd",
                format!("{name}:x:{uid}:{gid}:Nomad workload user:{home}:/usr/sbin/nologin\n"),
            ),
            ("/etc/group", format!("{name}:x:{gid}:\n")),
        ] {
            if is_readable(path, wanted.rules) {
                add(path, Text::Appended(line));
            }
        }
    }
    Ok(files)
}

fn is_readable(path: &str, rules: &[Rule]) -> bool {
    rules.iter().any(|rule| match &rule.place {
        Place::Host(open) => rule.access.read && Path::new(path).starts_with(open),
        Place::Task(_) => false,
    })
}

/// What the job asks for, completed from the host's; or, where the host's own resolver listens on a loopback address that
/// is another one in the task's network namespace, what that resolver asks itself.
fn resolv_conf(wanted: &Wanted<'_>) -> Result<Option<String>, FileError> {
    let host = reachable(wanted.resolver, wanted.owns_network);
    let given = wanted.dns.filter(|dns| **dns != Dns::default());
    let Some(dns) = given else {
        let is_other = host != wanted.resolver.configured;
        return Ok(is_other.then(|| host.to_owned()));
    };
    for server in &dns.servers {
        let address = server.split('%').next().unwrap_or(server);
        address
            .parse::<IpAddr>()
            .map_err(|_| FileError::Server(server.clone()))?;
    }
    let words = dns.servers.iter().chain(&dns.searches).chain(&dns.options);
    for word in words {
        if word.is_empty() || word.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(FileError::Word(word.clone()));
        }
    }
    let mut text = String::new();
    match dns.searches.as_slice() {
        [] => keep(&mut text, host, &["search", "domain"]),
        searches => text.push_str(&format!("search {}\n", searches.join(" "))),
    }
    match dns.servers.as_slice() {
        [] => keep(&mut text, host, &["nameserver"]),
        servers => {
            for server in servers {
                text.push_str(&format!("nameserver {server}\n"));
            }
        }
    }
    match dns.options.as_slice() {
        [] => keep(&mut text, host, &["options"]),
        options => text.push_str(&format!("options {}\n", options.join(" "))),
    }
    Ok(Some(text))
}

/// The host's configuration that works in the task's network namespace, as far as the host has one.
fn reachable(resolver: &Resolver, owns_network: bool) -> &str {
    let servers = |text: &str| -> Vec<String> {
        let mut lines = text.lines().map(str::split_whitespace);
        lines
            .by_ref()
            .filter_map(|mut words| {
                words
                    .next()
                    .filter(|word| *word == "nameserver")
                    .and_then(|_| words.next())
            })
            .map(str::to_owned)
            .collect()
    };
    let is_local = |server: &String| server.starts_with("127.") || server == "::1";
    let upstream = resolver
        .upstream
        .as_deref()
        .filter(|text| servers(text).iter().any(|server| !is_local(server)));
    match upstream {
        Some(upstream) if owns_network && servers(&resolver.configured).iter().all(is_local) => {
            upstream
        }
        _ => &resolver.configured,
    }
}

fn keep(text: &mut String, host: &str, keywords: &[&str]) {
    let is_kept = |line: &&str| {
        let keyword = line.split_whitespace().next();
        keyword.is_some_and(|keyword| keywords.contains(&keyword))
    };
    for line in host.lines().filter(is_kept) {
        text.push_str(line);
        text.push('\n');
    }
}

fn hosts_file(hosts: &Hosts) -> Result<String, FileError> {
    let is_name = !hosts.hostname.is_empty()
        && hosts
            .hostname
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'));
    if !is_name || hosts.address.parse::<IpAddr>().is_err() {
        return Err(FileError::Host(hosts.hostname.clone()));
    }
    Ok(format!(
        "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{} {}\n",
        hosts.address, hosts.hostname
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::steps::{Access, Source};
    use crate::users;

    fn resolver() -> Resolver {
        Resolver {
            configured: "nameserver 127.0.0.53\noptions edns0\nsearch lan\n".into(),
            upstream: Some("nameserver 192.0.2.1\nsearch lan\n".into()),
        }
    }

    /// A task in the host's network.
    struct Task {
        account: Account,
        rules: Vec<Rule>,
        dns: Option<Dns>,
        hosts: Option<Hosts>,
        owns_network: bool,
        resolver: Resolver,
    }

    fn made(change: impl FnOnce(&mut Task)) -> Result<Vec<(String, Text)>, FileError> {
        let mut task = Task {
            account: users::dynamic(80_001),
            rules: vec![],
            dns: None,
            hosts: None,
            owns_network: false,
            resolver: resolver(),
        };
        change(&mut task);
        let files = replaced(&Wanted {
            account: &task.account,
            rules: &task.rules,
            dns: task.dns.as_ref(),
            hosts: task.hosts.as_ref(),
            owns_network: task.owns_network,
            resolver: &task.resolver,
        })?;
        let pair = |file: Replaced| (file.path.display().to_string(), file.text);
        Ok(files.into_iter().map(pair).collect())
    }

    fn rule(path: &str) -> Rule {
        Rule {
            place: Place::Host(path.into()),
            written: path.into(),
            access: Access {
                read: true,
                ..Access::default()
            },
            source: Source::Task,
        }
    }

    #[test]
    fn a_task_in_the_hosts_network_has_the_hosts_files() {
        assert_eq!(made(|_| {}), Ok(vec![]));
    }

    #[test]
    fn behind_a_stub_that_is_out_of_reach_the_resolver_is_the_one_behind_it() {
        let text = Text::Whole("nameserver 192.0.2.1\nsearch lan\n".into());
        let files = made(|task| task.owns_network = true);
        assert_eq!(files, Ok(vec![(RESOLV_CONF.into(), text)]));
        let none = Resolver {
            upstream: None,
            ..resolver()
        };
        let reachable = Resolver {
            configured: "nameserver 192.0.2.9\n".into(),
            ..resolver()
        };
        for resolver in [none, reachable] {
            let files = made(|task| {
                task.owns_network = true;
                task.resolver = resolver;
            });
            assert_eq!(files, Ok(vec![]));
        }
    }

    #[test]
    fn what_the_job_says_of_dns_replaces_the_hosts_part_of_it() {
        let dns = Dns {
            servers: vec!["192.0.2.7".into(), "2001:db8::7".into()],
            ..Dns::default()
        };
        let files = made(|task| task.dns = Some(dns)).unwrap();
        let text = "search lan\nnameserver 192.0.2.7\nnameserver 2001:db8::7\noptions edns0\n";
        assert_eq!(files, [(RESOLV_CONF.into(), Text::Whole(text.into()))]);
        let search = Dns {
            searches: vec!["a.example".into(), "b.example".into()],
            options: vec!["ndots:2".into()],
            ..Dns::default()
        };
        let files = made(|task| {
            task.dns = Some(search);
            task.owns_network = true;
        });
        let text = "search a.example b.example\nnameserver 192.0.2.1\noptions ndots:2\n";
        assert_eq!(files.unwrap()[0].1, Text::Whole(text.into()));
    }

    #[test]
    fn what_cannot_be_in_resolv_conf_is_a_sentence() {
        for (servers, searches, sentence) in [
            (
                "dns.example",
                "",
                "network.dns: server \"dns.example\" is not an IP address",
            ),
            (
                "192.0.2.1",
                "a\nnameserver 6.6.6.6",
                "network.dns: \"a\\nnameserver 6.6.6.6\"",
            ),
            ("192.0.2.1", " ", "network.dns: \" \" contains a blank"),
        ] {
            let dns = Dns {
                servers: vec![servers.into()],
                searches: Some(searches.to_owned())
                    .filter(|s| !s.is_empty())
                    .into_iter()
                    .collect(),
                options: vec![],
            };
            let error = made(|task| task.dns = Some(dns)).unwrap_err().to_string();
            assert!(error.starts_with(sentence), "{error}");
        }
    }

    #[test]
    fn a_host_name_that_nomad_gives_is_in_hosts() {
        let hosts = |hostname: &str| Hosts {
            hostname: hostname.into(),
            address: "172.26.64.2".into(),
        };
        let good = hosts("web-1");
        let files = made(|task| task.hosts = Some(good)).unwrap();
        let Text::Whole(text) = &files[0].1 else {
            panic!()
        };
        assert!(
            files[0].0 == "/etc/hosts" && text.ends_with("\n172.26.64.2 web-1\n"),
            "{text}"
        );
        let evil = hosts("a\n6.6.6.6 bank");
        assert!(made(|task| task.hosts = Some(evil)).is_err());
    }

    #[test]
    fn a_dynamic_user_finds_itself_in_the_lists_that_it_may_read() {
        let rules = [rule("/etc/passwd")];
        let files = made(|task| task.rules = rules.into()).unwrap();
        let line = "nomad-80001:x:80001:80001:Nomad workload user:/nonexistent:/usr/sbin/nologin\n";
        assert_eq!(files, [("/etc/passwd".into(), Text::Appended(line.into()))]);
        let all = [rule("/etc")];
        assert_eq!(made(|task| task.rules = all.into()).unwrap().len(), 2);
        let files = made(|task| {
            task.rules = vec![rule("/etc")];
            task.account = users::look_up("root").unwrap();
        });
        assert_eq!(files, Ok(vec![]));
    }
}
