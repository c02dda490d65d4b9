//! Changes to the source of a chat template before it is parsed; lines stay where they are.
//!
//! The engine's own tokens say where tags are, so that what looks like one in a text, a comment or a raw block stays.

use minijinja::machinery::{Span, Token, tokenize};
use minijinja::syntax::SyntaxConfig;

/// The filter that every value passes before a namespace takes it: [`super::jinja::plain`].
pub(super) const PLAIN: &str = "nt_plain";

/// The source with these changes:
///
/// - Hugging Face marks the assistant's words with `{% generation %}` for training; for a prompt the block is one that
///   is always taken.
/// - `{% set a.b = VALUE %}` becomes `{% set a.b = (VALUE)|nt_plain %}`, and `{% set a.b | FILTER %}` becomes
///   `{% set a.b | FILTER|nt_plain %}`: a namespace that holds itself cannot be printed, compared or dropped.
pub(super) fn rewritten(source: &str, syntax: SyntaxConfig) -> String {
    let mut edits = Vec::new();
    let mut tag: Vec<(Token, Span)> = Vec::new();
    // Where the source is no template, parsing it says so.
    for (token, span) in tokenize(source, false, syntax).map_while(Result::ok) {
        match token {
            Token::BlockStart => tag.clear(),
            Token::BlockEnd => edit(&tag, &mut edits),
            token => tag.push((token, span)),
        }
    }
    let (mut out, mut done) = (String::with_capacity(source.len() + edits.len() * 8), 0);
    for Edit { from, to, text } in edits {
        out.push_str(&source[done..from]);
        out.push_str(&text);
        done = to;
    }
    out.push_str(&source[done..]);
    out
}

/// Bytes of the source and what takes their place.
struct Edit {
    from: usize,
    to: usize,
    text: String,
}

/// Adds the edits of the tag of these tokens, in the order of the source.
fn edit(tag: &[(Token, Span)], edits: &mut Vec<Edit>) {
    let from = |(_, span): &(Token, Span)| span.start_offset as usize;
    let to = |(_, span): &(Token, Span)| span.end_offset as usize;
    let mut insert = |at: usize, text: String| edits.push(Edit { from: at, to: at, text });
    match tag {
        [name @ (Token::Ident("generation"), _)] => {
            edits.push(Edit { from: from(name), to: to(name), text: "if true".into() });
        }
        [name @ (Token::Ident("endgeneration"), _)] => {
            edits.push(Edit { from: from(name), to: to(name), text: "endif".into() });
        }
        [(Token::Ident("set"), _), rest @ ..] => {
            let Some(at) = rest.iter().position(|(t, _)| matches!(t, Token::Assign | Token::Pipe)) else { return };
            let (target, value) = (&rest[..at], &rest[at + 1..]);
            let dotted = target.iter().any(|(t, _)| matches!(t, Token::Dot));
            // What closes more than it opens is no value; parsing it as it is says so.
            if let ([first, ..], [.., last], true) = (value, value, dotted && closes_what_it_opens(value)) {
                let is_value = matches!(rest[at].0, Token::Assign);
                if is_value {
                    insert(from(first), "(".into());
                }
                insert(to(last), format!("{}|{PLAIN}", if is_value { ")" } else { "" }));
            }
        }
        _ => {}
    }
}

/// Whether each closing parenthesis has an opening one before it.
fn closes_what_it_opens(tokens: &[(Token, Span)]) -> bool {
    let mut open = 0;
    tokens.iter().all(|(token, _)| {
        match token {
            Token::ParenOpen => open += 1,
            Token::ParenClose => open -= 1,
            _ => {}
        }
        open >= 0
    })
}
