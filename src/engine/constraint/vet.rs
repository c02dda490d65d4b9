//! Forms that are compiled in another process first.
//!
//! What takes too much memory or time cannot be ended inside of this process, and what it has taken is lost. Once that
//! has happened often, a form is compiled by another process of the same program (`nt --vet-form`, which reads the
//! vocabulary and the form from stdin and says on stdout whether it compiles) before it is compiled here. That one is
//! ended and leaves nothing behind.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use llguidance::ParserFactory;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::TokTrie;
use serde::{Deserialize, Serialize};

use super::{CPU, HEAP_BYTES, compiled_gbnf, compiled_lexemes, limits, tokens};
use crate::memory::bounded::{self, Exceeded};

/// The argument with which the program does this.
pub const ARGUMENT: &str = "--vet-form";
/// The longest that the other process may take, its start included.
const TIME: Duration = Duration::from_secs(60);
/// Most bytes of its answer.
const ANSWER_MAX: u64 = 64 << 10;
/// Forms that are remembered as compiled.
const KNOWN_MAX: usize = 64;
/// Bytes of a token at most, and tokens, of what is read from stdin.
const WORD_MAX: u32 = 1 << 16;
/// See [`WORD_MAX`].
const WORDS_MAX: u32 = 1 << 24;

static KNOWN: Mutex<VecDeque<u64>> = Mutex::new(VecDeque::new());

/// A form as it is compiled.
#[derive(Clone, Serialize, Deserialize)]
pub(super) enum Source {
    /// For llguidance.
    Lexemes(TopLevelGrammar),
    /// GBNF.
    Characters(String),
}

/// What comes first on stdin; the vocabulary follows.
#[derive(Serialize, Deserialize)]
struct Header {
    source: Source,
    stack_bytes: usize,
    eog: Vec<u32>,
    words: u32,
}

/// What comes on stdout.
#[derive(Serialize, Deserialize)]
enum Answer {
    /// It compiles.
    Fine,
    /// What is wrong with it.
    Wrong(String),
    /// It takes too much.
    TooMuch(String),
}

/// Why a form is not compiled here.
pub(super) enum Refused {
    /// What is wrong with it.
    Wrong(String),
    /// It takes too much.
    TooMuch(String),
    /// There was no answer.
    Nobody(String),
}

/// Has a form compiled elsewhere.
pub(super) fn vet(factory: &ParserFactory, eog: &[u32], source: &Source, stack_bytes: usize) -> Result<(), Refused> {
    let text = serde_json::to_string(source).map_err(|e| Refused::Nobody(e.to_string()))?;
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    // What compiles with one vocabulary may take too much with another.
    let trie = factory.tok_env().tok_trie();
    let words = trie.vocab_size() as u32;
    (0..words).for_each(|id| trie.token(id).hash(&mut hasher));
    let hash = hasher.finish();
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if known().contains(&hash) {
        return Ok(());
    }
    let header = Header { source: source.clone(), stack_bytes, eog: eog.to_vec(), words };
    match ask(&header, trie).map_err(|e| Refused::Nobody(e.to_string()))? {
        Answer::Fine => {
            let mut known = known();
            known.push_back(hash);
            if known.len() > KNOWN_MAX {
                known.pop_front();
            }
            Ok(())
        }
        Answer::Wrong(what) => Err(Refused::Wrong(what)),
        Answer::TooMuch(what) => Err(Refused::TooMuch(what)),
    }
}

/// A process that ends with this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ask(header: &Header, trie: &TokTrie) -> std::io::Result<Answer> {
    // The program that runs, also where its file was replaced since.
    let mut command = Command::new("/proc/self/exe");
    command.arg(ARGUMENT).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).env_clear();
    let mut child = Ended(command.spawn()?);
    let (Some(mut stdin), Some(stdout)) = (child.0.stdin.take(), child.0.stdout.take()) else {
        return Err(std::io::Error::other("a process has no pipes"));
    };
    let mut bytes = Vec::new();
    let head = serde_json::to_vec(header)?;
    bytes.extend((head.len() as u32).to_le_bytes());
    bytes.extend(head);
    for id in 0..header.words {
        let word = trie.token(id);
        bytes.extend((word.len() as u32).to_le_bytes());
        bytes.extend(word);
    }
    // It reads all of it before it answers; one that does not is ended, and the pipe with it.
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    let until = Instant::now() + TIME;
    std::thread::Builder::new().name("nt-vet".into()).spawn(move || {
        let mut answer = Vec::new();
        let talked = stdin.write_all(&bytes);
        drop(stdin);
        let read = talked.and_then(|()| stdout.take(ANSWER_MAX).read_to_end(&mut answer));
        let _ = sender.send(read.map(|_| answer));
    })?;
    let answer = receiver.recv_timeout(until.saturating_duration_since(Instant::now()));
    drop(child);
    let answer = answer.map_err(|_| std::io::Error::other("it did not answer in time"))??;
    Ok(serde_json::from_slice(&answer)?)
}

/// The other process: reads, compiles, answers.
pub fn main() -> ExitCode {
    let answer = match read(&mut std::io::stdin().lock()) {
        Ok((header, words)) => compile(header, words),
        Err(e) => Answer::Wrong(format!("the form cannot be read: {e}")),
    };
    let text = serde_json::to_vec(&answer).unwrap_or_default();
    let _ = std::io::stdout().write_all(&text).and_then(|()| std::io::stdout().flush());
    // A thread that was given up on ends with the process.
    ExitCode::SUCCESS
}

fn read(from: &mut impl Read) -> std::io::Result<(Header, Vec<Vec<u8>>)> {
    let wrong = || std::io::Error::from(std::io::ErrorKind::InvalidData);
    let number = |from: &mut dyn Read| {
        let mut bytes = [0; 4];
        from.read_exact(&mut bytes).map(|()| u32::from_le_bytes(bytes))
    };
    let text = |from: &mut dyn Read, n: u32| {
        let mut bytes = vec![0; n as usize];
        from.read_exact(&mut bytes).map(|()| bytes)
    };
    let n = number(from)?;
    if n > 64 << 20 {
        return Err(wrong());
    }
    let header: Header = serde_json::from_slice(&text(from, n)?)?;
    if header.words > WORDS_MAX {
        return Err(wrong());
    }
    let mut words = Vec::new();
    for _ in 0..header.words {
        let n = number(from)?;
        if n > WORD_MAX {
            return Err(wrong());
        }
        words.push(text(from, n)?);
    }
    Ok((header, words))
}

fn compile(header: Header, words: Vec<Vec<u8>>) -> Answer {
    let mut factory = match tokens::factory_of(words, header.eog) {
        Ok(factory) => factory,
        Err(why) => return Answer::Wrong(why),
    };
    *factory.limits_mut() = limits();
    factory.quiet();
    // A little less than is allowed where the result is wanted: there it will fit.
    let bounds = bounded::Limits { stack_bytes: header.stack_bytes, heap_bytes: HEAP_BYTES / 8 * 7, cpu: CPU / 2 };
    let compiled = bounded::run(&bounds, &|| false, move || {
        let matcher = match header.source {
            Source::Lexemes(grammar) => compiled_lexemes(&factory, grammar)?,
            Source::Characters(text) => compiled_gbnf(&factory, &text, None)?,
        };
        // What it takes to be told what may come first belongs to it.
        matcher.clone().allowed().map(drop)
    });
    match compiled {
        Ok(Ok(())) => Answer::Fine,
        Ok(Err(said)) => Answer::Wrong(said),
        Err(Exceeded::Heap) => {
            Answer::TooMuch(format!("it takes more than {} MiB to compile", bounds.heap_bytes >> 20))
        }
        Err(Exceeded::Cpu | Exceeded::Stopped) => {
            Answer::TooMuch(format!("it takes more than {:.0?} to compile", bounds.cpu))
        }
        Err(Exceeded::Thread(e)) => Answer::TooMuch(format!("no thread can be had to compile it ({e})")),
        Err(Exceeded::Panicked(said)) => Answer::TooMuch(said),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llguidance::api::GrammarWithLexer;

    fn words() -> Vec<Vec<u8>> {
        (0..=255u8).map(|b| vec![b]).chain([Vec::new()]).collect()
    }

    fn sent(source: Source) -> (Header, Vec<Vec<u8>>) {
        let words = words();
        let header = Header { source, stack_bytes: 16 << 20, eog: vec![256], words: words.len() as u32 };
        let head = serde_json::to_vec(&header).unwrap();
        let mut bytes = (head.len() as u32).to_le_bytes().to_vec();
        bytes.extend(head);
        for word in &words {
            bytes.extend((word.len() as u32).to_le_bytes());
            bytes.extend(word);
        }
        for cut in [0, 3, 40, bytes.len() - 1] {
            assert!(read(&mut &bytes[..cut]).is_err(), "{cut}");
        }
        let (header, read) = read(&mut &bytes[..]).unwrap();
        assert_eq!(read, words);
        (header, read)
    }

    #[test]
    fn a_form_compiles_there_as_it_would_here() {
        let schema = |schema| {
            let grammar = GrammarWithLexer { name: Some("x".into()), ..GrammarWithLexer::from_json_schema(schema) };
            Source::Lexemes(TopLevelGrammar { grammars: vec![grammar], max_tokens: None })
        };
        let answer = |source| {
            let (header, words) = sent(source);
            compile(header, words)
        };
        assert!(matches!(answer(schema(serde_json::json!({ "type": "integer" }))), Answer::Fine));
        assert!(matches!(answer(schema(serde_json::json!({ "type": "colour" }))), Answer::Wrong(_)));
        assert!(matches!(answer(Source::Characters("root ::= \"a\"+".into())), Answer::Fine));
        assert!(matches!(answer(Source::Characters("root ::= (".into())), Answer::Wrong(_)));
    }

    #[test]
    fn sizes_that_are_lies_take_no_memory() {
        assert!(read(&mut &u32::MAX.to_le_bytes()[..]).is_err());
    }
}
