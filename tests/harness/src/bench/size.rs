//! How much is measured.

use std::str::FromStr;

use anyhow::bail;
use serde::{Deserialize, Serialize};

use super::Controllers;

/// The smallest that is of use, the default, and a whole slow CPU.
const LIMITS_MHZ: [u64; 3] = [20, 100, 1_000];

/// Numbers of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Starts of each candidate, in turns.
    pub rounds: usize,
    /// `resources { cpu }` of the limited starts.
    pub limits_mhz: Vec<u64>,
    /// Starts at each of them.
    pub limited_rounds: usize,
    /// How many tasks run while the plugin is looked at, from none on.
    pub crowds: Vec<u64>,
    /// Starts at each of these.
    pub crowd_rounds: usize,
    /// How long the plugin's idle CPU is watched.
    pub idle_sec: u64,
    /// Tasks that are started at once.
    pub bursts: Vec<u64>,
    /// Tasks that are started and end, one after the other; 2 or more.
    pub cycles: u64,
    /// Between the end of the last task and the look at what the plugin has given back.
    pub give_back_sec: u64,
}

/// What people ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Whether everything can be measured at all.
    Smoke,
    /// A few minutes.
    Quick,
    /// What is committed.
    Full,
}

impl FromStr for Asked {
    type Err = anyhow::Error;

    fn from_str(word: &str) -> anyhow::Result<Asked> {
        Ok(match word {
            "smoke" => Asked::Smoke,
            "quick" => Asked::Quick,
            "full" => Asked::Full,
            _ => bail!("SIZE={word}: there are smoke, quick and full"),
        })
    }
}

impl Size {
    /// A machine with all controllers is an emulated one: ten times slower, and with less memory.
    pub fn of(asked: Asked, controllers: Controllers) -> Size {
        let smoke = Size {
            rounds: 4,
            limits_mhz: Vec::new(),
            limited_rounds: 0,
            crowds: vec![0, 1, 8],
            crowd_rounds: 2,
            idle_sec: 1,
            bursts: vec![8],
            cycles: 4,
            give_back_sec: 1,
        };
        match (asked, controllers) {
            (Asked::Smoke, Controllers::None) => smoke,
            (Asked::Smoke, Controllers::All) => Size {
                rounds: 2,
                // An unoptimised helper would take minutes of less.
                limits_mhz: vec![1_000],
                limited_rounds: 1,
                crowds: vec![0, 1],
                crowd_rounds: 1,
                bursts: vec![2],
                cycles: 2,
                ..smoke
            },
            (Asked::Quick, Controllers::None) => Size {
                rounds: 50,
                limits_mhz: Vec::new(),
                limited_rounds: 0,
                crowds: vec![0, 1, 100],
                crowd_rounds: 20,
                idle_sec: 10,
                bursts: vec![100],
                cycles: 500,
                give_back_sec: 10,
            },
            (Asked::Quick, Controllers::All) => Size {
                rounds: 10,
                limits_mhz: LIMITS_MHZ.to_vec(),
                limited_rounds: 2,
                crowds: vec![0, 1, 20],
                crowd_rounds: 4,
                idle_sec: 10,
                bursts: vec![20],
                cycles: 20,
                give_back_sec: 10,
            },
            (Asked::Full, Controllers::None) => Size {
                rounds: 300,
                limits_mhz: Vec::new(),
                limited_rounds: 0,
                crowds: vec![0, 1, 100, 1_000],
                crowd_rounds: 100,
                idle_sec: 30,
                bursts: vec![100, 1_000],
                cycles: 10_000,
                give_back_sec: 10,
            },
            (Asked::Full, Controllers::All) => Size {
                rounds: 40,
                limits_mhz: LIMITS_MHZ.to_vec(),
                limited_rounds: 3,
                crowds: vec![0, 1, 50],
                crowd_rounds: 10,
                idle_sec: 30,
                bursts: vec![50],
                cycles: 100,
                give_back_sec: 10,
            },
        }
    }

    /// Lives that have been when the plugin is looked at.
    pub fn looks_at_cycles(&self) -> [u64; 3] {
        [0, self.cycles / 2, self.cycles]
    }

    pub fn largest_crowd(&self) -> u64 {
        self.crowds.last().copied().unwrap_or(0)
    }
}
