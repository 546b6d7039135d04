//! Plain tables: columns as wide as their widest cell, two spaces apart.

/// Lines of `rows` under `head`. Cells are printed as they are, so they must hold no control characters.
pub fn lines(head: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells: Vec<String> = cells.zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(&mut head.iter().copied())];
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
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
        assert_eq!(printable("a\u{1b}[31m\n b"), "a [31m b");
    }
}
