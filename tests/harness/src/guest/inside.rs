//! The half of the runner that lives in the guest: runs each case in a process of its own, so that one which panics,
//! hangs or leaves something behind harms no other, and tells the host half in lines of JSON.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::case::{AT_AGENT, Case, Context, Effort, NOTE, Part};
use super::{GuestName, child};
use crate::leaks::{Ground, Leak};

const REMIND: Duration = Duration::from_secs(15);
const OUTPUT_LINES: usize = 200;

/// One line from the guest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    Running { case: String, seconds: f64 },
    Ended(Ended),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ended {
    pub case: String,
    pub seconds: f64,
    pub notes: Vec<String>,
    /// What is wrong, in a few words; nothing if the case passed.
    pub failure: Option<String>,
    pub output: String,
}

/// Runs the named cases, or one half of each, one after the other. Of a first half that went well nothing is told: its case
/// has not ended.
pub fn run_all(
    cases: &[Case],
    part: Part,
    guest: GuestName,
    effort: Effort,
    names: &[String],
) -> Result<()> {
    let outputs = tempfile::tempdir()?;
    for (number, name) in names.iter().enumerate() {
        tell(&Report::Running {
            case: name.clone(),
            seconds: 0.0,
        })?;
        let ended = run_one(
            (part, guest, effort),
            name,
            Case::find(cases, name)?.patience(guest, effort),
            &outputs.path().join(number.to_string()),
        )?;
        if part != Part::BeforeReboot || ended.failure.is_some() {
            tell(&Report::Ended(ended))?;
        }
    }
    Ok(())
}

fn tell(report: &Report) -> Result<()> {
    println!("{}", serde_json::to_string(report)?);
    Ok(())
}

fn run_one(
    (part, guest, effort): (Part, GuestName, Effort),
    name: &str,
    patience: Duration,
    output_path: &Path,
) -> Result<Ended> {
    // A file, not a pipe: a process that a case forgot cannot hold it against us.
    let output = File::create(output_path)?;
    let ground = Ground::survey()?;
    let begun = Instant::now();
    let mut case = Command::new("/proc/self/exe")
        .args(["--case", part.name(), &guest.to_string()])
        .args([&serde_json::to_string(&effort)?, name])
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0)
        .spawn()?;
    let mut failure = watch(&mut case, name, begun, patience)?;
    let seconds = begun.elapsed().as_secs_f64();
    // What the first half leaves is there on purpose.
    let left = match (part, &failure) {
        (Part::BeforeReboot, None) => Vec::new(),
        _ => ground.left()?,
    };
    left.iter().for_each(Leak::clear);
    if failure.is_none() && !left.is_empty() {
        let left: Vec<String> = left.iter().map(Leak::to_string).collect();
        failure = Some(format!("left behind: {}", left.join(", ")));
    }
    let output = String::from_utf8_lossy(&fs::read(output_path)?).into_owned();
    let (notes, output): (Vec<&str>, Vec<&str>) =
        output.lines().partition(|line| line.starts_with(NOTE));
    Ok(Ended {
        case: name.to_owned(),
        seconds,
        notes: notes
            .iter()
            .filter_map(|line| line.strip_prefix(NOTE))
            .map(str::to_owned)
            .collect(),
        failure,
        output: child::tail(&output.join("\n"), OUTPUT_LINES),
    })
}

/// What went wrong, if anything.
fn watch(
    case: &mut Child,
    name: &str,
    begun: Instant,
    patience: Duration,
) -> Result<Option<String>> {
    let mut reminded = 0;
    loop {
        if let Some(status) = case.try_wait()? {
            return Ok((!status.success()).then(|| status.to_string()));
        }
        let lasted = begun.elapsed();
        if lasted > patience {
            // The group: what the case itself waits for goes too.
            let _ = killpg(Pid::from_raw(case.id().cast_signed()), Signal::SIGKILL);
            let _ = case.wait();
            return Ok(Some(format!("no end after {} s", patience.as_secs())));
        }
        if lasted.as_secs() / REMIND.as_secs() > reminded {
            reminded = lasted.as_secs() / REMIND.as_secs();
            tell(&Report::Running {
                case: name.to_owned(),
                seconds: lasted.as_secs_f64(),
            })?;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs one case in this very process.
pub fn run_here(
    cases: &[Case],
    part: Part,
    guest: GuestName,
    effort: Effort,
    name: &str,
) -> Result<()> {
    let case = Case::find(cases, name)?;
    let agent = name.split_once(AT_AGENT).map(|(_, agent)| agent);
    let context = Context::new(guest, agent, effort);
    match (part, case.after_reboot) {
        (Part::AfterReboot, Some(after_reboot)) => after_reboot(&context),
        (Part::AfterReboot, None) => bail!("{name} does not reboot its guest"),
        (Part::Whole | Part::BeforeReboot, _) => (case.run)(&context),
    }
}
