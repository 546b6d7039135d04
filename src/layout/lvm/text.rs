//! The text format of LVM2's metadata: `key = value` and `name { … }`, values being numbers, strings and lists.

use super::super::Error;

/// More than any text takes that LVM writes.
const MEMORY: u64 = 64 << 20;
/// The memory that a value takes when it was read, with its key, beside their letters.
const VALUE: u64 = 96;
/// Sections within sections, lists within lists; metadata has four.
const MAX_DEPTH: usize = 16;

/// What stands behind a key.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    /// A whole number.
    Number(i64),
    /// A string, or a number with a fraction, as it stands there.
    Text(String),
    /// `[a, b]`
    List(Vec<Value>),
    /// `name { … }`
    Section(Section),
}

impl Value {
    /// Every string in it.
    pub fn texts(&self) -> Vec<&str> {
        match self {
            Value::Number(_) => Vec::new(),
            Value::Text(text) => vec![text],
            Value::List(values) => values.iter().flat_map(Value::texts).collect(),
            Value::Section(section) => section.texts().collect(),
        }
    }
}

/// Keys and their values, by key; no key is there twice.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Section(Vec<(String, Value)>);

impl Section {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let at = self.0.binary_search_by(|(own, _)| own.as_str().cmp(key)).ok()?;
        self.0.get(at).map(|(_, value)| value)
    }

    /// A number that is not negative.
    pub fn number(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::Number(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// A string.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A list.
    pub fn list(&self, key: &str) -> Option<&[Value]> {
        match self.get(key)? {
            Value::List(values) => Some(values),
            _ => None,
        }
    }

    /// A section.
    pub fn section(&self, key: &str) -> Option<&Section> {
        match self.get(key)? {
            Value::Section(section) => Some(section),
            _ => None,
        }
    }

    /// Every string in it, at any depth.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().flat_map(|(_, value)| value.texts())
    }

    /// All sections in it, with their names.
    pub fn sections(&self) -> impl Iterator<Item = (&str, &Section)> {
        self.0.iter().filter_map(|(key, value)| match value {
            Value::Section(section) => Some((key.as_str(), section)),
            _ => None,
        })
    }
}

/// Reads a text, which ends at its end or at a zero. Errors say where in it something is wrong.
pub fn parse(text: &[u8]) -> Result<Section, Error> {
    parse_within(text, MEMORY).map(|(section, _)| section)
}

/// The same into no more than so much memory, and says how much that was.
pub fn parse_within(text: &[u8], memory: u64) -> Result<(Section, u64), Error> {
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    // Letters are never more than those of the text.
    let letters = u64::try_from(text.len()).unwrap_or(u64::MAX);
    let values = memory.saturating_sub(letters) / VALUE;
    let mut parser = Parser { text, at: 0, left: values };
    let section = parser.section(0)?;
    match parser.peek() {
        None => {
            let values = values.saturating_sub(parser.left);
            Ok((section, letters.saturating_add(values.saturating_mul(VALUE))))
        }
        Some(_) => Err(parser.corrupt("a closing brace too many")),
    }
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
    /// How many more values may come.
    left: u64,
}

impl<'a> Parser<'a> {
    fn corrupt(&self, what: &'static str) -> Error {
        Error::Corrupt { what, at: u64::try_from(self.at).unwrap_or(u64::MAX) }
    }

    fn rest(&self) -> &'a [u8] {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn skip(&mut self, count: usize) {
        self.at = self.at.saturating_add(count).min(self.text.len());
    }

    /// The bytes up to the first of which `is_part` says no.
    fn take(&mut self, is_part: impl Fn(u8) -> bool) -> &'a [u8] {
        let rest = self.rest();
        let len = rest.iter().position(|byte| !is_part(*byte)).unwrap_or(rest.len());
        self.skip(len);
        rest.get(..len).unwrap_or_default()
    }

    /// The next byte that is neither space nor in a comment.
    fn peek(&mut self) -> Option<u8> {
        loop {
            self.take(|byte| byte.is_ascii_whitespace());
            match self.rest().first() {
                Some(b'#') => _ = self.take(|byte| byte != b'\n'),
                next => return next.copied(),
            }
        }
    }

    fn count(&mut self) -> Result<(), Error> {
        self.left =
            self.left.checked_sub(1).ok_or_else(|| self.corrupt("more values than there is memory for"))?;
        Ok(())
    }

    /// What stands in a section up to, and without, its closing brace.
    fn section(&mut self, depth: usize) -> Result<Section, Error> {
        if depth > MAX_DEPTH {
            return Err(self.corrupt("sections that are nested too deep"));
        }
        let mut items = Vec::new();
        while self.peek().is_some_and(|next| next != b'}') {
            self.count()?;
            let key = self.take(|byte| !byte.is_ascii_whitespace() && !b"#={}[]\",".contains(&byte));
            if key.is_empty() {
                return Err(self.corrupt("no key where there must be one"));
            }
            let key = String::from_utf8_lossy(key).into_owned();
            let value = match self.peek() {
                Some(b'{') => {
                    self.skip(1);
                    let section = self.section(depth.saturating_add(1))?;
                    if self.peek() != Some(b'}') {
                        return Err(self.corrupt("a section without an end"));
                    }
                    self.skip(1);
                    Value::Section(section)
                }
                Some(b'=') => {
                    self.skip(1);
                    self.value(depth)?
                }
                _ => return Err(self.corrupt("a key without a value")),
            };
            items.push((key, value));
        }
        items.shrink_to_fit();
        items.sort_by(|one, other| one.0.cmp(&other.0));
        if items.iter().zip(items.iter().skip(1)).any(|(one, next)| one.0 == next.0) {
            return Err(self.corrupt("a key that is there twice"));
        }
        Ok(Section(items))
    }

    fn value(&mut self, depth: usize) -> Result<Value, Error> {
        if depth > MAX_DEPTH {
            return Err(self.corrupt("lists that are nested too deep"));
        }
        match self.peek() {
            Some(b'"') => {
                self.skip(1);
                self.string()
            }
            Some(b'[') => {
                self.skip(1);
                self.list(depth)
            }
            Some(b'-' | b'0'..=b'9') => {
                let text = self.take(|byte| matches!(byte, b'-' | b'+' | b'.' | b'0'..=b'9'));
                let text = String::from_utf8_lossy(text).into_owned();
                Ok(text.parse().map_or(Value::Text(text), Value::Number))
            }
            _ => Err(self.corrupt("no value where there must be one")),
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value, Error> {
        let mut values = Vec::new();
        loop {
            match self.peek() {
                Some(b']') => {
                    self.skip(1);
                    return Ok(Value::List(values));
                }
                Some(b',') => self.skip(1),
                Some(_) => {
                    self.count()?;
                    values.push(self.value(depth.saturating_add(1))?);
                }
                None => return Err(self.corrupt("a list without an end")),
            }
        }
    }

    fn string(&mut self) -> Result<Value, Error> {
        let mut bytes = Vec::new();
        loop {
            bytes.extend(self.take(|byte| byte != b'"' && byte != b'\\'));
            match (self.rest().first(), self.rest().get(1)) {
                (Some(b'\\'), Some(next)) => {
                    bytes.push(*next);
                    self.skip(2);
                }
                (Some(b'"'), _) => {
                    self.skip(1);
                    return Ok(Value::Text(String::from_utf8_lossy(&bytes).into_owned()));
                }
                _ => return Err(self.corrupt("a string without an end")),
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::arithmetic_side_effects, clippy::as_conversions)]
mod tests {
    use super::*;

    #[test]
    fn sections_lists_strings_and_numbers_are_read() {
        let text = b"vg {\n id = \"a\\\"b\\\\\" # a comment } \n seqno=3 x = -2 f = 0.5\n \
            list = [\"pv0\", 7,[]]\n empty = [] inner { } }\ncontents = \"Text\"\n\0 }}}";
        let (all, memory) = parse_within(text, 10_000).unwrap();
        // Twelve values, and all letters up to the zero.
        assert_eq!(memory, 12 * VALUE + text.iter().position(|byte| *byte == 0).unwrap() as u64);
        assert_eq!(all.text("contents"), Some("Text"));
        let vg = all.section("vg").unwrap();
        assert_eq!((vg.text("id"), vg.number("seqno"), vg.number("x")), (Some("a\"b\\"), Some(3), None));
        assert_eq!(vg.text("f"), Some("0.5"));
        let list = [Value::Text("pv0".to_owned()), Value::Number(7), Value::List(Vec::new())];
        assert_eq!(vg.list("list"), Some(&list[..]));
        assert_eq!(vg.sections().map(|(name, _)| name).collect::<Vec<_>>(), ["inner"]);
        assert_eq!(all.get("vg").unwrap().texts(), ["0.5", "a\"b\\", "pv0"]);
        assert_eq!((vg.number("id"), vg.text("seqno"), vg.list("id")), (None, None, None));
    }

    #[test]
    fn every_rule_has_its_error_and_its_place() {
        let deep = |open: &str, times| open.repeat(times);
        let cases: [(String, &str, u64); 12] = [
            ("a = 1 }".into(), "a closing brace too many", 6),
            ("a".into(), "a key without a value", 1),
            ("a =".into(), "no value where there must be one", 3),
            ("a = }".into(), "no value where there must be one", 4),
            ("= 3".into(), "no key where there must be one", 0),
            ("a { b = 1".into(), "a section without an end", 9),
            ("a = [1, 2".into(), "a list without an end", 9),
            ("a = \"b".into(), "a string without an end", 6),
            ("a = \"b\\".into(), "a string without an end", 6),
            ("a = 1 a = 2".into(), "a key that is there twice", 11),
            (deep("a{", 17), "sections that are nested too deep", 34),
            (format!("a={}", deep("[", 1 << 20)), "lists that are nested too deep", 19),
        ];
        for (text, expected, place) in cases {
            match parse(text.as_bytes()) {
                Err(Error::Corrupt { what, at }) => assert_eq!((what, at), (expected, place), "{text:.40}"),
                other => panic!("{text:.40}: {other:?}"),
            }
        }
        let many = format!("a=[{}]", "1,".repeat(999));
        let letters = many.len() as u64;
        assert_eq!(parse_within(many.as_bytes(), letters + 1000 * VALUE).unwrap().1, letters + 1000 * VALUE);
        let error = parse_within(many.as_bytes(), letters + 1000 * VALUE - 1).unwrap_err();
        assert!(error.to_string().starts_with("more values than there is memory for"));
    }
}
