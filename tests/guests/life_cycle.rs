//! Random lives of tasks - calls, signals, crashes - against a model of what must come of them. A run prints its seed, and
//! `cargo test --test guests -- --seed SEED life_cycle::` tries one sequence again.

mod model;
mod slot;
mod world;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use anyhow::{Error, Result, anyhow, bail};
use harness::guest::{Case, Context};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::case;
use model::{Sequence, sequences};
use world::World;

pub const CASES: &[Case] = &[case!(Speed, Ours, random_lives_follow_the_model)];

/// Tried in every run.
const SEEDS: [u64; 4] = [1, 2, 3, 4];
/// And so many new ones.
const FRESH: u64 = 16;
/// How long a shorter sequence that fails is looked for.
const SHRINKING: Duration = Duration::from_secs(45);

fn random_lives_follow_the_model(context: &Context) -> Result<()> {
    let begun = Instant::now();
    let seeds = seeds(context);
    let mut steps = 0;
    context.block_on(async {
        let mut world = World::new(context).await?;
        for seed in &seeds {
            let mut tree = tree(*seed)?;
            let sequence = tree.current();
            if let Err(error) = world.live(&sequence).await {
                world.abandon();
                let shorter = shrink(context, &mut *tree).await?;
                bail!("{}", report(*seed, &sequence, &error, &shorter));
            }
            steps += sequence.ops.len();
        }
        world.finish().await
    })?;
    context.note(format!(
        "{} sequences, {steps} steps in {:.1} s",
        seeds.len(),
        begun.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// As asked for, or the fixed ones and some that nobody has seen.
fn seeds(context: &Context) -> Vec<u64> {
    let effort = context.effort();
    if let Some(seed) = effort.seed {
        let count = effort.sequences.map_or(1, u64::from);
        return (0..count).map(|index| seed.wrapping_add(index)).collect();
    }
    let first = RandomState::new().build_hasher().finish();
    let fresh = effort.sequences.map_or(FRESH, u64::from);
    context.note(format!("{fresh} seeds from {first}"));
    let fresh = (0..fresh).map(|index| first.wrapping_add(index));
    SEEDS.into_iter().chain(fresh).collect()
}

fn tree(seed: u64) -> Result<Box<dyn ValueTree<Value = Sequence>>> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let tree = sequences().new_tree(&mut runner);
    Ok(Box::new(tree.map_err(|reason| anyhow!("{reason}"))?))
}

/// The shortest sequence found that fails, too; none if it does not fail again.
async fn shrink(
    context: &Context,
    tree: &mut dyn ValueTree<Value = Sequence>,
) -> Result<Option<(Sequence, Error)>> {
    let begun = Instant::now();
    let mut shortest = None;
    loop {
        let sequence = tree.current();
        let mut world = World::new(context).await?;
        let is_changed = match world.live(&sequence).await {
            Err(error) => {
                shortest = Some((sequence, error));
                tree.simplify()
            }
            Ok(()) => tree.complicate(),
        };
        world.abandon();
        if !is_changed || begun.elapsed() > SHRINKING {
            return Ok(shortest);
        }
    }
}

fn report(
    seed: u64,
    sequence: &Sequence,
    error: &Error,
    shorter: &Option<(Sequence, Error)>,
) -> String {
    let described = |sequence: &Sequence, error: &Error| format!("{error:#}\n{sequence}");
    let again = match shorter {
        Some((sequence, error)) => format!("shrunk: {}", described(sequence, error)),
        None => "it does not fail again".to_owned(),
    };
    format!("seed {seed}: {}\n{again}", described(sequence, error))
}
