//! Plain tables: columns as wide as their widest cell, two spaces apart.

use std::borrow::Cow;

use mt_agent::error::plain;

/// The longest cell that is shown whole. An identity or a path may be copied from a table, and is never longer; and a column
/// must stay far below the width from which on `format!` panics, 65,536.
const LONGEST: usize = 8192;

/// A cell of any text: control characters are escaped, and what is too long is cut.
fn cell(text: &str) -> Cow<'_, str> {
    let text = plain(text);
    match text.char_indices().nth(LONGEST - 1) {
        Some((end, last)) if end + last.len_utf8() < text.len() => Cow::Owned(format!("{}…", &text[..end])),
        _ => text,
    }
}

/// Lines of `rows` under `head`. What cells hold that does not print is escaped.
pub fn lines(head: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let rows: Vec<Vec<Cow<'_, str>>> =
        rows.iter().map(|row| row.iter().map(|text| cell(text)).collect()).collect();
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells: Vec<String> = cells.zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(&mut head.iter().copied())];
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(AsRef::as_ref))));
    lines
}

/// The narrowest terminal that is reckoned with.
const WIDTH: usize = 80;

/// `head` and `text` in lines of at most 80 characters, the text below itself. It is broken between words: where one of them
/// is too long for what `head` leaves, all of it begins further left, on the next line.
pub fn wrapped(head: &str, text: &str) -> Vec<String> {
    const LEFT: &str = "        ";
    let indent = head.chars().count();
    if indent > LEFT.len() && text.split(' ').any(|word| indent + word.chars().count() > WIDTH) {
        return [vec![head.trim_end().to_owned()], wrapped(LEFT, text)].concat();
    }
    let mut lines = Vec::new();
    let mut line = head.to_owned();
    let mut used = indent;
    for word in text.split(' ') {
        let len = word.chars().count();
        if used > indent && used + 1 + len > WIDTH {
            lines.push(std::mem::replace(&mut line, " ".repeat(indent)));
            used = indent;
        }
        if used > indent {
            line.push(' ');
            used += 1;
        }
        line.push_str(word);
        used += len;
    }
    lines.push(line);
    lines
}

/// Text of foreign origin as one line of printable characters.
pub fn printable(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(plain).collect::<String>().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_end_without_spaces() {
        let rows = vec![vec!["a".to_owned(), String::new()], vec!["äöü".to_owned(), "x".to_owned()]];
        assert_eq!(lines(&["ID", "B"], &rows), ["ID   B", "a", "äöü  x"]);
        let text = format!("{} {}", "words ".repeat(20).trim_end(), "x".repeat(90));
        let lines = wrapped("head: ", &text);
        assert_eq!(lines[0], format!("head: {}", "words ".repeat(12).trim_end()));
        assert_eq!(lines[1], format!("      {}", "words ".repeat(8).trim_end()));
        assert_eq!(lines[2..], [format!("      {}", "x".repeat(90))]);
        let path = "x".repeat(60);
        let lines = wrapped("fail    something      ", &format!("{path} is away"));
        assert_eq!(lines, ["fail    something".to_owned(), format!("        {path} is away")]);
        assert_eq!(wrapped("fix: ", "é"), ["fix: é"]);
        assert_eq!(printable("a\u{1b}[31m\n b"), "a [31m b");
    }

    #[test]
    fn a_cell_neither_does_anything_to_a_terminal_nor_makes_a_column_that_cannot_be() {
        let rows = [["a\u{1b}[2J", "x"], ["a\n", "y"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(lines(&["ID", "B"], &rows), ["ID          B", r"a\u{1b}[2J  x", r"a\n         y"]);
        let long = |len: usize| vec!["é".repeat(len), "x".to_owned()];
        let table = lines(&["ID", "B"], &[long(LONGEST), long(LONGEST + 1), long(1 << 17)]);
        assert_eq!(table[1], format!("{}  x", "é".repeat(LONGEST)));
        let cut = format!("{}…  x", "é".repeat(LONGEST - 1));
        assert_eq!(table[2..], [cut.clone(), cut]);
    }
}
