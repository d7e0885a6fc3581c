//! Inputs near to real ones: samples with a few random edits, and the search through them, which shrinks what fails to fewer edits.
//! proptest is the source of chance; without a guide by coverage, what makes an input deep is the samples and the target's tokens.

use std::cell::Cell;
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::unix::fs::FileExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::{Strategy, any, prop_oneof};
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use rustix::time::{ClockId, clock_gettime};

/// Of one input: past every limit of a parser's own that is not in the megabytes.
const MAX_BYTES: usize = 128 << 10;
/// CPU time that a debug build may take for one.
const MAX_CPU: Duration = Duration::from_secs(2);
/// Inputs between two looks at the clock. A seed that failed fails again within these.
const BATCH: u32 = 64;

/// What is tried.
pub struct Target {
    pub name: &'static str,
    /// Files, or directories of files, below the project; its own corpus comes on top.
    pub samples: &'static [&'static str],
    /// What the syntax is made of, between blanks.
    pub tokens: &'static [u8],
    /// Panics where a property does not hold.
    pub run: fn(&[u8]),
}

#[derive(Debug, Clone)]
enum Edit {
    Set(Index, u8),
    Flip(Index, u8),
    Insert(Index, Vec<u8>),
    Remove(Index, Index),
    /// The first piece once more, at the second place.
    Copy(Index, Index, Index),
    /// The piece of a few bytes, over and over.
    Repeat(Index, usize, usize),
    /// What another sample has from here on.
    Splice(Index, Index, Index),
    Cut(Index),
}

fn edit(tokens: &'static [u8]) -> impl Strategy<Value = Edit> {
    let at = || any::<Index>();
    let mut words: Vec<Vec<u8>> = tokens
        .split(|byte| *byte == b' ')
        .map(<[u8]>::to_vec)
        .collect();
    words.extend([
        b"\0".to_vec(),
        b"\n".to_vec(),
        "\u{202e}é".into(),
        vec![0xff; 4],
    ]);
    let edge = select(vec![0, 1, 0x0a, 0x20, 0x7f, 0x80, 0xc1, 0xfe, 0xff]);
    prop_oneof![
        4 => (at(), edge).prop_map(|(at, byte)| Edit::Set(at, byte)),
        4 => (at(), 0_u8..8).prop_map(|(at, bit)| Edit::Flip(at, bit)),
        6 => (at(), select(words)).prop_map(|(at, token)| Edit::Insert(at, token)),
        2 => (at(), vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        3 => (at(), at()).prop_map(|(from, to)| Edit::Remove(from, to)),
        3 => (at(), at(), at()).prop_map(|(from, to, at)| Edit::Copy(from, to, at)),
        1 => (at(), 1_usize..12, 1_usize..6_000).prop_map(|(at, length, times)| Edit::Repeat(at, length, times)),
        3 => (at(), at(), at()).prop_map(|(at, other, from)| Edit::Splice(at, other, from)),
        1 => at().prop_map(Edit::Cut),
    ]
}

fn apply(bytes: &mut Vec<u8>, edit: &Edit, samples: &[Vec<u8>]) {
    let length = bytes.len();
    let between = |place: &Index| place.index(length + 1);
    match edit {
        Edit::Set(at, byte) if length > 0 => bytes[at.index(length)] = *byte,
        Edit::Flip(at, bit) if length > 0 => bytes[at.index(length)] ^= 1 << bit,
        Edit::Set(..) | Edit::Flip(..) => {}
        Edit::Insert(at, piece) => {
            let at = between(at);
            bytes.splice(at..at, piece.iter().copied());
        }
        Edit::Remove(from, to) => {
            let (from, to) = (between(from), between(to));
            bytes.drain(from.min(to)..from.max(to));
        }
        Edit::Copy(from, to, at) => {
            let (from, to, at) = (between(from), between(to), between(at));
            let piece = bytes[from.min(to)..from.max(to)].to_vec();
            bytes.splice(at..at, piece);
        }
        Edit::Repeat(at, piece, times) => {
            let at = between(at);
            let piece = bytes[at..length.min(at + piece)].repeat(*times);
            bytes.splice(at..at, piece);
        }
        Edit::Splice(at, other, from) => {
            let other = other.get(samples);
            bytes.truncate(between(at));
            bytes.extend_from_slice(&other[from.index(other.len() + 1)..]);
        }
        Edit::Cut(at) => bytes.truncate(between(at)),
    }
    bytes.truncate(MAX_BYTES);
}

fn inputs(samples: Vec<Vec<u8>>, tokens: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
    (0..samples.len(), vec(edit(tokens), 1..10)).prop_map(move |(sample, edits)| {
        let mut bytes = samples[sample].clone();
        for edit in &edits {
            apply(&mut bytes, edit, &samples);
        }
        bytes
    })
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries = fs::read_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}

impl Target {
    pub fn samples(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let own = format!("tests/fuzz/corpus/{}", self.name);
        let dirs = self.samples.iter().copied().chain([own.as_str()]);
        let files = dirs.flat_map(|dir| files(&root().join(dir)));
        files
            .map(|file| (file.clone(), fs::read(file).unwrap()))
            .collect()
    }

    /// Tries every sample as it is, then inputs made from them until the time is up. `FUZZ_INPUT=` tries one file, `FUZZ_SEED=`
    /// begins where a run failed, `FUZZ_SECONDS=` sets the time.
    pub fn fuzz(&self) {
        if let Some(file) = setting("FUZZ_INPUT") {
            return self.try_one(&fs::read(file).unwrap());
        }
        let samples = self.samples();
        assert!(!samples.is_empty(), "{} has no samples", self.name);
        for (file, bytes) in &samples {
            println!("{}", file.display());
            self.try_one(bytes);
        }
        let samples = samples.into_iter().map(|(_, bytes)| bytes).collect();
        self.search(&inputs(samples, self.tokens));
    }

    fn search(&self, inputs: &impl Strategy<Value = Vec<u8>>) {
        let seconds = setting("FUZZ_SECONDS").map_or(1, |seconds| seconds.parse().unwrap());
        let end = Instant::now() + Duration::from_secs(seconds);
        let first = setting("FUZZ_SEED").map(|seed| seed.parse().unwrap());
        let first: u64 = first.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
        fs::create_dir_all(&dir).unwrap();
        // A stack that overflows ends the process: what it was about is in this file then.
        let running = dir.join(format!("{}.running", self.name));
        let file = fs::File::create(&running).unwrap();
        let mut tried = 0;
        for seed in (0..).map(|index| first.wrapping_add(index)) {
            let found = quietly(|| {
                runner(seed).run(inputs, |bytes| {
                    file.set_len(bytes.len() as u64)
                        .and_then(|()| file.write_all_at(&bytes, 0))
                        .unwrap();
                    self.try_one(&bytes);
                    Ok(())
                })
            });
            if let Err(TestError::Fail(reason, bytes)) = found {
                let kept = dir.join(format!("{}.{seed}", self.name));
                fs::write(&kept, &bytes).unwrap();
                panic!(
                    "{reason}\n{} bytes: \"{}\"\nkept as {kept}\nFUZZ_SEED={seed}, or FUZZ_INPUT={kept}",
                    bytes.len(),
                    bytes.escape_ascii(),
                    kept = kept.display(),
                );
            }
            found.unwrap();
            tried += BATCH;
            if Instant::now() > end {
                break;
            }
        }
        println!("{}: {tried} inputs from seed {first}", self.name);
        fs::remove_file(running).unwrap();
    }

    fn try_one(&self, bytes: &[u8]) {
        let before = cpu_time();
        (self.run)(bytes);
        let used = cpu_time() - before;
        assert!(used < MAX_CPU, "it takes {used:?}");
    }
}

fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn runner(seed: u64) -> TestRunner {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let config = Config {
        cases: BATCH,
        failure_persistence: None,
        max_shrink_time: 20_000,
        ..Config::default()
    };
    TestRunner::new_with_rng(config, rng)
}

/// This thread's: the machine may be busy.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap(),
    )
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Without a word of each panic on the way to the shortest input.
fn quietly<T>(run: impl FnOnce() -> T) -> T {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                loud(info);
            }
        }));
    });
    QUIET.set(true);
    let done = panic::catch_unwind(AssertUnwindSafe(run));
    QUIET.set(false);
    done.unwrap_or_else(|panic| panic::resume_unwind(panic))
}
