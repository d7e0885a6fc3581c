//! `harness`: guests for people. The tests do not come through here.

use std::io::IsTerminal;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use harness::bench::report;
use harness::bench::run::{self as bench, Request};
use harness::guest::{self, Boot, Exit, Forward, Guest, GuestName, PAYLOAD_DIR, Payload};

const USAGE: &str = "usage:
  harness build GUEST...        build guests, so that a later start takes seconds
  harness demo GUEST            run two jobs inside, and show what systemd and the kernel make of them
  harness script GUEST SCRIPT   run a script inside and show what it prints
  harness hack GUEST            a shell inside; port 4646 of the guest becomes one of this host
  harness advisories DIRECTORY  write tests/advisories.txt from a clone of RustSec's advisory-db
  harness pages                 write manual pages and shell completions into packaging/
  harness bench run SIZE DRIVER GUEST...
                                measures this executable of the driver and, if EXEC2= names one, HashiCorp's; keeps the
                                samples in benchmarks/
  harness bench report          makes BENCHMARKS.md and the charts of what benchmarks/ has
SIZE is smoke, quick or full.
GUEST is trixie-qemu, bookworm-qemu, sid-qemu, or the same with -nspawn.";

/// Nomad's HTTP API.
const API_PORT: u16 = 4646;
const DEMO_PATIENCE: Duration = Duration::from_secs(900);

/// Puts what was built where a host would have it. The payload itself is read-only.
const INSTALL: &str = r#"set -eu
install -D -m 755 "$1/nomad-driver-exec2" /opt/nomad/plugins/nomad-driver-exec2
ln -s /opt/nomad/plugins/nomad-driver-exec2 /usr/local/bin/
if [ -e "$1/nomad" ]; then ln -s "$1/nomad" /usr/local/bin/nomad; fi
"#;

/// An agent to start by hand, for `hack`.
const AGENT: &[(&str, &str)] = &[
    ("/etc/nomad.d/nomad.hcl", include_str!("hack/nomad.hcl")),
    (
        "/etc/systemd/system/nomad.service",
        include_str!("hack/nomad.service"),
    ),
    (
        "/root/env.nomad.hcl",
        include_str!("../../nomad/env.nomad.hcl"),
    ),
    (
        "/root/service.nomad.hcl",
        include_str!("../../nomad/service.nomad.hcl"),
    ),
];

/// Not from the payload: Nomad looks at every file beside the plugin.
const PLAY: &str = r#"set -eu
nomad=
if [ -e "$1/nomad" ]; then nomad=$1/nomad; fi
exec "$1/harness" play /opt/nomad/plugins/nomad-driver-exec2 $nomad
"#;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["build", guests @ ..] if !guests.is_empty() => build(guests),
        ["demo", name] => demo(name),
        ["script", name, script] => script_inside(name, Path::new(script)),
        // What `demo` runs inside the guest.
        ["play", driver] => play(Path::new(driver), None),
        ["play", driver, nomad] => play(Path::new(driver), Some(Path::new(nomad))),
        ["hack", name] => hack(name),
        ["pages"] => write_pages(),
        ["advisories", database] => write_advisories(Path::new(database)),
        ["bench", "run", size, driver, guests @ ..] if !guests.is_empty() => {
            bench(size, Path::new(driver), guests)
        }
        ["bench", "report"] => report::write(Path::new(".")),
        // What `bench run` runs inside a guest.
        ["bench", "inside", size] => bench_inside(size, None),
        ["bench", "inside", size, exec2] => bench_inside(size, Some(exec2)),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn build(guests: &[&str]) -> Result<()> {
    guests
        .iter()
        .try_for_each(|name| guest::prepare(name.parse()?))
}

fn demo(name: &str) -> Result<()> {
    run_inside(name, "the demo", PLAY.as_bytes())
}

fn write_advisories(database: &Path) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../advisories.txt");
    let text = harness::advisories::snapshot(database)?;
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn write_pages() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for (path, text) in harness::pages::pages(&root)? {
        let path = root.join(path);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn play(driver: &Path, nomad: Option<&Path>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(harness::demo::play(driver, nomad))
}

fn bench(size: &str, driver: &Path, guests: &[&str]) -> Result<()> {
    let exec2 = std::env::var_os("EXEC2").filter(|path| !path.is_empty());
    let guests = guests.iter().map(|name| name.parse());
    bench::run(&Request {
        guests: guests.collect::<Result<_>>()?,
        asked: size.parse()?,
        driver: driver.to_owned(),
        exec2: exec2.map(PathBuf::from),
        into: PathBuf::from("benchmarks"),
    })
}

fn bench_inside(size: &str, exec2: Option<&str>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(bench::inside(size.parse()?, exec2.is_some()))
}

fn script_inside(name: &str, script: &Path) -> Result<()> {
    let text =
        std::fs::read(script).with_context(|| format!("cannot read {}", script.display()))?;
    run_inside(name, &script.display().to_string(), &text)
}

fn run_inside(name: &str, what: &str, text: &[u8]) -> Result<()> {
    let payload = payload()?;
    println!("starting {name} ...");
    let mut guest = guest::boot(
        name.parse()?,
        &Boot {
            payload: &payload,
            forwards: &[],
        },
    )?;
    install(&mut *guest)?;
    let inside = Path::new("/run/script");
    guest.put(inside, text)?;
    match guest.run(
        &["sh", "/run/script", PAYLOAD_DIR],
        DEMO_PATIENCE,
        &mut |line| println!("{line}"),
    )? {
        Exit::Code(0) => Ok(()),
        exit => bail!("{what} ended with {exit:?}"),
    }
}

fn hack(name: &str) -> Result<()> {
    let name: GuestName = name.parse()?;
    let payload = payload()?;
    let forward = Forward {
        host_port: free_port()?,
        guest_port: API_PORT,
    };
    println!("starting {name} ...");
    let mut guest = guest::boot_machine(
        name,
        &Boot {
            payload: &payload,
            forwards: &[forward],
        },
    )?;
    install(&mut guest)?;
    guest.run(&["mkdir", "-p", "/etc/nomad.d"], DEMO_PATIENCE, &mut |_| {})?;
    for (path, text) in AGENT {
        guest.put(Path::new(path), text.as_bytes())?;
    }
    println!("{name} runs, with the driver in /opt/nomad/plugins. It ends with this shell.");
    println!("Without an agent:  nomad-driver-exec2 run -- env");
    match guest::agents()?.first() {
        Some(_) => println!(
            "With one:          systemctl start nomad; nomad node status; nomad job run env.nomad.hcl\n\
             Its API is then http://127.0.0.1:{} on this machine.",
            forward.host_port
        ),
        None => println!("No nomad on PATH or in NOMAD= here, so there is none inside."),
    }
    if !std::io::stdin().is_terminal() {
        println!("Standard input is no terminal: reading commands from it.");
    }
    guest.shell()
}

fn install(guest: &mut dyn Guest) -> Result<()> {
    let mut said = String::new();
    let argv = ["sh", "-c", INSTALL, "install", PAYLOAD_DIR];
    let exit = guest.run(&argv, DEMO_PATIENCE, &mut |line| said.push_str(line))?;
    anyhow::ensure!(
        exit == Exit::Code(0),
        "cannot install the driver inside: {said}"
    );
    Ok(())
}

fn payload() -> Result<Payload> {
    let driver = driver()?;
    let agents = guest::agents()?;
    let agent: Option<&Path> = agents.first().map(|agent| agent.path.as_path());
    let harness = std::env::current_exe()?;
    let mut files = vec![
        ("nomad-driver-exec2", driver.as_path()),
        ("harness", harness.as_path()),
    ];
    files.extend(agent.map(|path| ("nomad", path)));
    Payload::new(&files)
}

/// cargo puts both executables into the same directory.
fn driver() -> Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name("nomad-driver-exec2"))
}

/// The usual one if nobody has it.
fn free_port() -> Result<u16> {
    let listener =
        TcpListener::bind(("127.0.0.1", API_PORT)).or_else(|_| TcpListener::bind("127.0.0.1:0"))?;
    Ok(listener.local_addr()?.port())
}
