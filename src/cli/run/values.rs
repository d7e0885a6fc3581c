//! Values of options, as people write them.

use std::path::PathBuf;

/// `64`, `64M` and `1G` are MiB; `65536K` is 64.
pub fn mebibytes(text: &str) -> Result<u64, String> {
    let (digits, unit) = text.split_at(
        text.find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len()),
    );
    let number: u64 = digits
        .parse()
        .map_err(|_| "a size is a number, as in 64M".to_owned())?;
    let mib = match unit {
        "" | "M" | "m" | "MiB" => Some(number),
        "K" | "k" | "KiB" => Some(number.div_ceil(1024)),
        "G" | "g" | "GiB" => number.checked_mul(1024),
        _ => {
            return Err(format!(
                "a size is a whole number with K, M or G, as in 64M; {unit:?} is no unit"
            ));
        }
    };
    mib.filter(|mib| *mib > 0)
        .ok_or_else(|| "a size is at least 1M".to_owned())
}

pub fn assignment(text: &str) -> Result<(String, String), String> {
    let wrong = "it is written NAME=VALUE";
    let (name, value) = text.split_once('=').ok_or(wrong)?;
    if name.is_empty() {
        return Err(wrong.into());
    }
    Ok((name.to_owned(), value.to_owned()))
}

/// `NAME=/path`: a volume and the directory of this host that it is.
pub fn volume(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = assignment(text)?;
    let path = PathBuf::from(path);
    if !path.is_absolute() {
        return Err("a volume is NAME=/path, the path from the root on".into());
    }
    Ok((name, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, mib) in [
            ("64", 64),
            ("64M", 64),
            ("1G", 1024),
            ("65536K", 64),
            ("1K", 1),
        ] {
            assert_eq!(mebibytes(text), Ok(mib), "{text}");
        }
        for text in ["", "M", "0", "1T", "-1", "1.5G", "99999999999999999999"] {
            assert!(mebibytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_volume_is_a_name_and_an_absolute_path() {
        assert_eq!(volume("d=/srv/a=b"), Ok(("d".into(), "/srv/a=b".into())));
        for text in ["d", "=/srv", "d=srv", "d="] {
            assert!(volume(text).is_err(), "{text}");
        }
    }
}
