//! Pieces of llguidance's Lark, and what it says of them.

/// A text as Lark writes it.
pub fn quoted(text: &str) -> String {
    // Its strings are those of JSON.
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// Refuses what llguidance reads in Lark and nt does not do.
pub(super) fn checked(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err("it is empty; a rule named start was expected".into());
    }
    for line in text.lines() {
        let head = line.split(':').next().unwrap_or("");
        let attributes = head.split_once('[').map_or("", |a| a.1).replace(' ', "");
        for attribute in ["temperature=", "stop=", "stop_capture=", "lazy"] {
            if attributes.split(',').any(|a| a.starts_with(attribute)) {
                let name = attribute.trim_end_matches('=');
                return Err(format!(
                    "the attribute {name} of the rule {:?} is not built",
                    head.split('[').next().unwrap_or("").trim()
                ));
            }
        }
    }
    // Its last line is to have an end.
    Ok(format!("{text}\n"))
}

/// Refuses expressions that would not be read as they are written.
pub(super) fn check_regex(text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("the regular expression is empty".into());
    }
    let backslashes = text.len() - text.trim_end_matches('\\').len();
    if backslashes % 2 == 1 {
        return Err("the regular expression ends in a backslash".into());
    }
    Ok(())
}

/// What llguidance said, on one line, without what is meant for its developers.
pub(super) fn sentence(said: &str) -> String {
    let said = said.split("\n<").next().unwrap_or(said);
    let said = match said.strip_prefix("panic: ") {
        // It cuts the value that it is about to show within a character.
        Some(what) if what.contains("char boundary") => "a keyword has a value of the wrong type".to_owned(),
        Some(what) => format!("it is beyond what llguidance can do ({what})"),
        None => said.to_owned(),
    };
    let said = said
        .strip_prefix("Unsatisfiable schema: ")
        .map_or(said.clone(), |why| format!("nothing conforms to it ({why})"));
    let said = match said.contains("missing special token prefix") {
        true => "it names a token, but the vocabulary has no control tokens".to_owned(),
        false => said,
    };
    let said = match said.strip_prefix("Unimplemented keys: [").and_then(|rest| rest.strip_suffix(']')) {
        Some(keys) => format!("keywords that are not followed: {}", keys.replace('"', "")),
        None => said,
    };
    let said = if said == "NoExtensionBias" { "nothing conforms to it".to_owned() } else { said };
    let said = said.strip_prefix("Parser Error: ").map_or(said.clone(), str::to_owned);
    let said = match said.strip_prefix("Unknown format: ") {
        Some(name) => format!("format: {name} is not known"),
        None => said,
    };
    let said = match said.starts_with("oneOf constraints are not supported") {
        true => "oneOf: two of its schemas may hold at once, or it cannot be told that they do not; anyOf may be meant"
            .into(),
        false => said,
    };
    // Lines with numbers show the grammar around the place.
    let lines = said.lines().map(str::trim).filter(|l| !l.is_empty());
    let mut lines = lines.take_while(|l| !l.trim_start_matches(|c: char| c.is_ascii_digit()).starts_with(" |"));
    let mut out = lines.next().unwrap_or("it gave no reason").to_owned();
    for line in lines {
        out.push_str("; ");
        out.push_str(line);
    }
    const SHOWN: usize = 300;
    match out.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}…", &out[..at]),
        None => out,
    }
}
