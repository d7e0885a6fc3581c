//! What `check` tells of a task beside what systemd, /proc and the task's own sandbox show of it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use harness::nomad::{Agent, Task};
use nix::errno::Errno;
use serde_json::Value;

use crate::exec::Talk;
use crate::nomad::{Scope, proc_file, said, status};

/// In place of an allocation's id.
pub const ALLOC_ID: &str = "00000000-0000-0000-0000-000000000000";

/// What scopes of an older systemd do not have.
const SINCE_254: [&str; 2] = ["Documentation", "OOMPolicy"];

/// Tries what it is given, kind by kind and path by path, and prints an errno for each. Nothing of it stays.
const PROBE: &str = r#"
use POSIX (); use Fcntl;
sub tried { return $_[0] ? 0 : $! + 0 }
sub executed {
    my ($path) = @_;
    my $pid = fork;
    if (!$pid) {
        open STDOUT, '>', '/dev/null'; open STDERR, '>', '/dev/null';
        exec {$path} $path, '--version';
        POSIX::_exit(100 + $!);
    }
    waitpid $pid, 0;
    return ($? >> 8) > 100 ? ($? >> 8) - 100 : 0;
}
sub made {
    my ($path, $is_executed) = @_;
    sysopen(my $to, $path, O_WRONLY | O_CREAT | O_EXCL, 0755) or return $! + 0;
    open(my $from, '<', '/usr/bin/true') or return $! + 0;
    local $/;
    print {$to} <$from>;
    close $to;
    my $errno = $is_executed ? executed($path) : 0;
    return unlink($path) ? $errno : $! + 0;
}
while (my ($kind, $path) = splice @ARGV, 0, 2) {
    my $errno = $kind eq 'list' ? tried(opendir my $dir, $path)
        : $kind eq 'read' ? tried(sysopen my $file, $path, O_RDONLY | O_NONBLOCK)
        : $kind eq 'write' ? tried(sysopen my $file, $path, O_WRONLY | O_APPEND | O_NONBLOCK)
        : $kind eq 'mkdir' ? tried(mkdir($path) && rmdir($path))
        : $kind eq 'exec' ? executed($path)
        : made($path, $kind eq 'create and exec');
    print "$errno\n";
}
"#;

/// Executables that do nothing when they are asked for their version.
const HARMLESS: [&str; 2] = ["true", "ld-linux-x86-64.so.2"];

/// Open to everybody on a host; those that no rule is about are closed to a task.
const ELSEWHERE: [(&str, &str); 5] = [
    ("read", "/etc/debian_version"),
    ("list", "/usr/share"),
    ("list", "/var/lib"),
    ("list", "/srv"),
    ("list", "/"),
];

fn list<'a>(plan: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    plan[key].as_array().with_context(|| format!("no {key}"))
}

fn text<'a>(object: &'a Value, key: &str) -> Result<&'a str> {
    object[key].as_str().with_context(|| format!("no {key}"))
}

/// Every property that systemd is asked for, as `systemctl show` has it. It knows limits without a controller, too.
pub fn properties(plan: &Value, scope: &Scope, alloc_id: &str) -> Result<()> {
    let told = plan["properties"].as_object().context("no properties")?;
    ensure!(told.len() >= 15, "{told:?}");
    let names: Vec<&str> = told.keys().map(String::as_str).collect();
    let shown = scope.show(&names)?;
    let version = said("systemctl", &["--version"])?;
    let version: u32 = version
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .context("no version")?;
    for (name, told) in told {
        let told = told.as_str().context("no text")?;
        let told = told.replace("(alloc 00000000)", &format!("(alloc {})", &alloc_id[..8]));
        let seen = shown.get(name).map_or("", String::as_str);
        // With brackets in it, it is quoted.
        let seen = seen.trim_matches('"');
        let is_same = match name.as_str() {
            "CPUQuotaPerSecUSec" | "CPUQuotaPeriodUSec" => usec(seen)? == told.parse::<u64>()?,
            "Before" => seen.split(' ').any(|unit| unit == told),
            // Which CPU is reserved is the client's choice.
            "AllowedCPUs" => seen.len() == told.len(),
            name => seen == told || (version < 254 && SINCE_254.contains(&name)),
        };
        ensure!(is_same, "{name} is {seen:?}, not {told}");
    }
    Ok(())
}

/// `1s 500ms`, `62.500ms`.
fn usec(span: &str) -> Result<u64> {
    let mut sum = 0.0;
    for word in span.split_whitespace() {
        let at = word
            .find(|c: char| c.is_ascii_alphabetic())
            .with_context(|| format!("no unit in {span:?}"))?;
        let (number, unit) = word.split_at(at);
        let unit = match unit {
            "us" => 1.0,
            "ms" => 1e3,
            "s" => 1e6,
            "min" => 6e7,
            unit => anyhow::bail!("what is a {unit}?"),
        };
        sum += number.parse::<f64>()? * unit;
    }
    Ok(sum.round() as u64)
}

/// Real, effective, saved and of the file system: all are the told ones.
pub fn ids(plan: &Value, task: &Task, main: u32) -> Result<()> {
    let user = &plan["user"];
    let four = |field: &str| -> Result<u64> {
        let ids = status(main, field)?;
        let all: BTreeSet<&str> = ids.split_whitespace().collect();
        ensure!(all.len() == 1, "{field} is {ids}");
        Ok(all.first().context("none")?.parse()?)
    };
    let (uid, gid) = (four("Uid")?, four("Gid")?);
    if user["is_dynamic"] == true {
        // Nomad chooses the number, of which the group is the same.
        ensure!(
            user["uid"] == user["gid"] && uid == gid,
            "{uid} {gid}: {user}"
        );
        ensure!(task.user() == format!("nomad-{uid}"), "{uid}");
    } else {
        ensure!(
            user["uid"] == uid && user["gid"] == gid,
            "{uid} {gid}: {user}"
        );
        ensure!(user["name"] == task.user(), "{user}");
    }
    // "no other groups", as it says of every task.
    let groups = status(main, "Groups")?;
    ensure!(groups.is_empty(), "{groups}");
    Ok(())
}

/// Volumes, devices and files that read otherwise than the host's. How many there are.
pub fn mounts(plan: &Value, main: u32, alloc_id: &str) -> Result<usize> {
    let mountinfo = proc_file(main, "mountinfo")?;
    let mounts: Vec<Vec<&str>> = mountinfo
        .lines()
        .map(|line| line.split(' ').collect())
        .collect();
    let same = |inside: &str, outside: &str| -> Result<bool> {
        let of = |path: &str| -> Result<(u64, u64)> {
            let meta = fs::metadata(path).with_context(|| path.to_owned())?;
            Ok((meta.dev(), meta.ino()))
        };
        Ok(of(&format!("/proc/{main}/root{inside}"))? == of(outside)?)
    };
    let volumes = list(plan, "volumes")?.iter().chain(list(plan, "devices")?);
    let mut count = 0;
    for volume in volumes {
        let target = text(volume, "target")?.replace(ALLOC_ID, alloc_id);
        let at = mounts.iter().rfind(|fields| fields[4] == target);
        let at = at.with_context(|| format!("nothing is mounted at {target}"))?;
        let is_read_only = at[5].split(',').any(|option| option == "ro");
        ensure!(volume["is_read_only"] == is_read_only, "{target}: {at:?}");
        ensure!(
            same(&target, text(volume, "source")?)?,
            "{target} is another"
        );
        count += 1;
    }
    for path in list(plan, "replaced")? {
        let path = path.as_str().context("no text")?;
        ensure!(!same(path, path)?, "{path} is the host's");
        count += 1;
    }
    Ok(count)
}

/// Something that is tried, and whether the rules allow it.
#[derive(Debug)]
struct Try {
    kind: &'static str,
    path: String,
    is_open: bool,
}

struct Rules {
    /// Letters, and where they hold: links followed.
    all: Vec<(String, PathBuf)>,
    /// What the task sees, from outside of it.
    root: PathBuf,
    /// Mount points in it, from the bottom up, and whether nothing there executes.
    mounts: Vec<(PathBuf, bool)>,
    is_root: bool,
}

impl Rules {
    fn new(plan: &Value, main: u32, alloc_id: &str) -> Result<Rules> {
        let mut all = Vec::new();
        for rule in list(plan, "unveil")? {
            if rule["is_absent"] == false {
                let path = text(rule, "path")?.replace(ALLOC_ID, alloc_id);
                all.push((text(rule, "mode")?.to_owned(), canonical(&path)));
            }
        }
        let mountinfo = proc_file(main, "mountinfo")?;
        let mounts = mountinfo.lines().map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let is_noexec = fields[5].split(',').any(|option| option == "noexec");
            (fields[4].into(), is_noexec)
        });
        Ok(Rules {
            all,
            mounts: mounts.collect(),
            root: format!("/proc/{main}/root").into(),
            is_root: plan["user"]["uid"] == 0,
        })
    }

    /// Rules add up from the top down.
    fn allow(&self, path: &str, letter: char) -> bool {
        let path = canonical(path);
        self.all
            .iter()
            .any(|(mode, at)| mode.contains(letter) && path.starts_with(at))
    }

    fn is_noexec(&self, path: &str) -> bool {
        let above = self
            .mounts
            .iter()
            .filter(|(at, _)| Path::new(path).starts_with(at));
        // Of several at the same place the last.
        let mount = above.max_by_key(|(at, _)| at.components().count());
        mount.is_some_and(|(_, is_noexec)| *is_noexec)
    }

    fn seen(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn tries(&self, path: &str) -> Result<Vec<Try>> {
        let meta = fs::metadata(self.seen(path)).with_context(|| path.to_owned())?;
        let mut tries = Vec::new();
        if !meta.is_dir() {
            self.of_file(path, &meta, &mut tries);
            return Ok(tries);
        }
        let mut add = |kind, path: String, letters: &str| {
            let is_open = letters.chars().all(|letter| self.allow(&path, letter));
            tries.push(Try {
                kind,
                path,
                is_open,
            });
        };
        add("list", path.into(), "r");
        // The names in /proc are looked up before anything else.
        if !path.starts_with("/proc") {
            add("mkdir", format!("{path}/.probe"), "c");
        }
        if "rwxc".chars().all(|letter| self.allow(path, letter)) {
            add("create", format!("{path}/.probe"), "wc");
            // Nomad mounts `secrets` so that nothing in it executes, whatever the rules say.
            tries.push(Try {
                kind: "create and exec",
                path: format!("{path}/.probe"),
                is_open: !self.is_noexec(path),
            });
        }
        // A process has another /proc than its parent sees.
        if path.starts_with("/proc") || path.starts_with("/sys") {
            return Ok(tries);
        }
        let mut names: Vec<String> = fs::read_dir(self.seen(path))?
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        let is_harmless = |name: &&String| HARMLESS.contains(&name.as_str());
        for name in names.iter().take(1).chain(names.iter().filter(is_harmless)) {
            let file = format!("{path}/{name}");
            let meta = fs::metadata(self.seen(&file))?;
            self.of_file(&file, &meta, &mut tries);
        }
        Ok(tries)
    }

    /// What a file's own mode forbids to the user says nothing of the rules.
    fn of_file(&self, path: &str, meta: &fs::Metadata, tries: &mut Vec<Try>) {
        let may = |bit: u32| self.is_root || meta.mode() & bit != 0;
        let kinds = [("read", 'r', 0o4), ("write", 'w', 0o2), ("exec", 'x', 0o1)];
        for (kind, letter, bit) in kinds {
            let is_open = self.allow(path, letter);
            let name = path.rsplit('/').next().unwrap_or_default();
            let is_own = self.all.iter().any(|(_, at)| at == Path::new(path));
            let is_fit = match kind {
                "exec" => {
                    meta.is_file()
                        && meta.mode() & 0o111 != 0
                        && (is_own || HARMLESS.contains(&name))
                }
                // Nothing reads a socket by opening it, but the rules come first.
                "read" => !meta.file_type().is_socket() || !is_open,
                _ => true,
            };
            if is_fit && may(bit) {
                tries.push(Try {
                    kind,
                    path: path.into(),
                    is_open,
                });
            }
        }
    }
}

/// As the host has it; what is in the task alone stays as it is.
fn canonical(path: &str) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.into())
}

/// A session of the task, which is in its view and under its very rules, tries each of them. What was tried, by kind.
pub async fn unveil(
    agent: &Agent,
    task: &Task,
    plan: &Value,
    main: u32,
    alloc_id: &str,
) -> Result<BTreeSet<(&'static str, bool)>> {
    let rules = Rules::new(plan, main, alloc_id)?;
    let mut tries = Vec::new();
    for rule in list(plan, "unveil")? {
        let path = text(rule, "path")?.replace(ALLOC_ID, alloc_id);
        // Links to what a process has open: its own.
        let is_processes = path.starts_with("/dev/") && canonical(&path).starts_with("/proc");
        if rule["is_absent"] == false && !is_processes && !path.starts_with("/dev/std") {
            tries.extend(rules.tries(&path)?);
        }
    }
    for (kind, path) in ELSEWHERE {
        if !rules.allow(path, 'r') {
            let (path, is_open) = (path.into(), false);
            tries.push(Try {
                kind,
                path,
                is_open,
            });
        }
    }
    ensure!(tries.len() > 30, "{tries:#?}");
    let mut command = ["perl", "-e", PROBE].map(str::to_owned).to_vec();
    for one in &tries {
        command.extend([one.kind.to_owned(), one.path.clone()]);
    }
    let printed = Talk::command(agent, task, command).await?;
    let printed = printed.ends_with(0).await?;
    let seen: Vec<i32> = printed
        .lines()
        .map(str::parse)
        .collect::<Result<_, _>>()
        .with_context(|| printed.clone())?;
    ensure!(seen.len() == tries.len(), "{printed}");
    let mut wrong = Vec::new();
    for (one, errno) in tries.iter().zip(seen) {
        let is_as_told = match (one.is_open, Errno::from_raw(errno)) {
            // A socket or a pipe without another end is looked at after the rules.
            (true, errno) => errno == Errno::UnknownErrno || errno == Errno::ENXIO,
            (false, Errno::EACCES) => true,
            // In a view that is read-only there, the rules are not asked.
            (false, errno) => {
                ["write", "mkdir"].contains(&one.kind)
                    && [Errno::EROFS, Errno::EPERM].contains(&errno)
            }
        };
        if !is_as_told {
            wrong.push(format!("{one:?}: {}", Errno::from_raw(errno)));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(tries.iter().map(|one| (one.kind, one.is_open)).collect())
}
