//! One picture of `tasks --watch`: as much as the terminal has room for, over what stands there, so that nothing flickers.

/// Of a terminal; one that does not tell has zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub rows: usize,
    pub columns: usize,
}

const TOP: &str = "\x1b[H";
const END_OF_LINE: &str = "\x1b[K\n";
const BELOW: &str = "\x1b[J";
/// For names with characters of two columns, which are counted as one here.
const DO_NOT_WRAP: &str = "\x1b[?7l";
const WRAP: &str = "\x1b[?7h";

/// A table, whose first line is its header, and what there is to say below it. It is said whole, and of tasks that have no room
/// their number.
pub fn frame(table: &str, notes: &[String], size: Size) -> String {
    let unless_untold = |number: usize| match number {
        0 => usize::MAX,
        // The cursor stands in the last row, and a character in the last column would be erased with what is behind it.
        number => number.saturating_sub(1).max(1),
    };
    let (rows, columns) = (unless_untold(size.rows), unless_untold(size.columns));
    let notes: Vec<String> = notes
        .iter()
        .flat_map(|note| folded(note, columns))
        .collect();
    let room = rows.saturating_sub(notes.len());
    let table: Vec<&str> = table.lines().collect();
    let mut lines: Vec<String> = match table.len() <= room {
        true => table.iter().map(|line| cut(line, columns)).collect(),
        false => {
            let shown = &table[..room.saturating_sub(1)];
            let tasks = (table.len() - 1) - shown.len().saturating_sub(1);
            let rest = format!("{tasks} more have no room here");
            let shown = shown.iter().map(|line| cut(line, columns));
            shown.chain([cut(&rest, columns)]).collect()
        }
    };
    lines.extend(notes);
    lines.truncate(rows);
    let lines: String = lines.into_iter().map(|line| line + END_OF_LINE).collect();
    format!("{TOP}{DO_NOT_WRAP}{lines}{WRAP}{BELOW}")
}

/// The first so many characters, and all colours: none may go on behind the line.
fn cut(line: &str, columns: usize) -> String {
    let mut room = columns;
    let mut is_colour = false;
    let mut keep = |character: char| {
        is_colour |= character == '\x1b';
        if is_colour {
            is_colour = character != 'm';
            return true;
        }
        let fits = room > 0;
        room = room.saturating_sub(1);
        fits
    };
    line.chars().filter(|character| keep(*character)).collect()
}

fn folded(note: &str, columns: usize) -> Vec<String> {
    let characters: Vec<char> = note.chars().collect();
    let lines = characters.chunks(columns);
    lines.map(|line| line.iter().collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str =
        "UNIT  STATE\na     \x1b[32mrunning  \x1b[0mx\nb     running  x\nc     ended    x\n";

    fn lines(notes: &[&str], rows: usize, columns: usize) -> Vec<String> {
        let notes: Vec<String> = notes.iter().map(|note| (*note).to_owned()).collect();
        let frame = frame(TABLE, &notes, Size { rows, columns });
        let frame = frame.strip_prefix("\x1b[H\x1b[?7l").unwrap_or_default();
        let frame = frame.strip_suffix("\x1b[?7h\x1b[J").unwrap_or_default();
        let lines = frame.split_terminator("\x1b[K\n");
        lines.map(str::to_owned).collect()
    }

    #[test]
    fn what_fits_is_shown_whole() {
        let whole: Vec<&str> = TABLE.lines().collect();
        assert_eq!(lines(&[], 5, 80), whole);
        assert_eq!(
            lines(&[], 0, 0),
            whole,
            "a terminal that does not tell its size"
        );
        assert_eq!(lines(&["note"], 6, 80)[4], "note");
    }

    #[test]
    fn of_tasks_without_room_the_number_is_told() {
        assert_eq!(
            lines(&[], 4, 80),
            [
                "UNIT  STATE",
                "a     \x1b[32mrunning  \x1b[0mx",
                "2 more have no room here"
            ]
        );
        assert_eq!(
            lines(&[], 3, 80),
            ["UNIT  STATE", "3 more have no room here"]
        );
        assert_eq!(lines(&[], 2, 80), ["3 more have no room here"]);
        assert_eq!(
            lines(&["note"], 4, 80),
            ["UNIT  STATE", "3 more have no room here", "note"]
        );
    }

    #[test]
    fn a_line_is_cut_and_its_colour_ends_with_it() {
        let cut = lines(&["a longer note"], 9, 11);
        assert_eq!(cut[0], "UNIT  STAT");
        assert_eq!(cut[1], "a     \x1b[32mrunn\x1b[0m");
        assert_eq!(cut[2], "b     runn");
        assert_eq!(lines(&["a longer note"], 9, 11)[4..], ["a longer n", "ote"]);
    }

    #[test]
    fn no_terminal_is_too_small() {
        for rows in 0..8 {
            for columns in 0..20 {
                let lines = lines(&["a longer note"], rows, columns);
                assert!(!lines.is_empty(), "{rows}x{columns}");
                assert!(rows == 0 || lines.len() <= (rows - 1).max(1), "{lines:?}");
            }
        }
    }
}
