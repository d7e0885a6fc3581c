use harness::guest::Case;
pub const CASES: &[Case] = &[];
