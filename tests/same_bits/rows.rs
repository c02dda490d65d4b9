//! A row's result depends on the tokens before it and on its class: not on the rows next to it, nor on how a prompt was
//! cut into passes. On every instruction set of this machine by itself, with every type of weights.

use nt::backend::cpu::{CpuBackend, Isa};
use nt::backend::cuda::selftest::random_rows;
use nt::backend::{Backend, BackendError, BackendKind, Class, Dims, EXACT_ROWS};
use nt::engine::{Opened, Options, Session};
use nt::gguf::TensorType;
use nt::model::Outputs;

use crate::common::{self, File, T};

/// Width of the models: a whole block of every type.
const WIDTH: u64 = 256;

/// A model whose matrices are of type `ty`; with `experts`, four in each block, of which two are used.
pub fn model(layers: u64, ty: TensorType, experts: bool) -> File {
    let mut file = common::sized(layers, WIDTH, WIDTH);
    if experts {
        file.set("llama.expert_count", common::V::U32(4));
        file.set("llama.expert_used_count", common::V::U32(2));
        for i in 0..layers {
            for what in ["gate", "up", "down"] {
                let t = file.tensor(&format!("blk.{i}.ffn_{what}.weight"));
                t.name = format!("blk.{i}.ffn_{what}_exps.weight");
                t.shape.push(4);
            }
            let name = format!("blk.{i}.ffn_gate_inp.weight");
            file.tensors.push(T { name, shape: vec![WIDTH, 4], ty: 0, data: Vec::new() });
        }
    }
    for (i, t) in file.tensors.iter_mut().enumerate().filter(|(_, t)| t.shape.len() > 1) {
        let elements = t.shape.iter().product::<u64>() as usize;
        (t.ty, t.data) = (ty.id(), random_rows(ty, elements, 0.3, i as u64 + 1));
    }
    file.set("llama.context_length", common::V::U32(1024));
    file
}

fn options(max_batch: usize) -> Options {
    Options { threads: 2, ram: Some(1 << 30), max_batch, outputs: 8, ..Options::new(BackendKind::Cpu, 700) }
}

fn start(opened: &Opened, isa: Isa, max_batch: usize) -> Session {
    let open = |dims: &Dims| -> Result<(Box<dyn Backend>, Option<String>), BackendError> {
        Ok((Box::new(CpuBackend::with_isa(dims.clone(), 2, isa)?), None))
    };
    Session::with_backend(opened, options(max_batch), &open, &mut |_, _| ()).unwrap()
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| i * 37 % 258).collect()
}

/// Bits of the last pass's logits.
pub fn bits(session: &mut Session) -> Vec<u32> {
    session.logits().unwrap().iter().map(|v| v.to_bits()).collect()
}

fn eval(session: &mut Session, tokens: &[u32], class: Class, outputs: Outputs) -> Vec<u32> {
    session.eval(tokens, class, outputs, &|| false).unwrap();
    if outputs == Outputs::None { Vec::new() } else { bits(session) }
}

/// Logits of a prompt's last token, and of tokens that are generated behind it.
fn followed(session: &mut Session, prompt: &[u32]) -> Vec<u32> {
    session.truncate(0);
    let mut all = eval(session, prompt, Class::Bulk, Outputs::Last);
    for t in [3, 99, 200] {
        all.extend(eval(session, &[t], Class::Exact, Outputs::Last));
    }
    all
}

/// Sets of instructions that this machine has.
fn sets() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|&i| i <= Isa::detect())
}

fn opened(dir: &tempfile::TempDir, layers: u64, ty: TensorType, experts: bool) -> Opened {
    Opened::open(&model(layers, ty, experts).write(dir.path(), "m.gguf")).unwrap()
}

/// Exact rows among others, and the last of them alone, against passes of one row each.
fn exact_rows(session: &mut Session, what: &str) {
    let (prompt, drafts) = (tokens(21), [5, 250, 17, 17, 99, 0, 64, 128]);
    session.truncate(0);
    eval(session, &prompt, Class::Bulk, Outputs::None);
    let alone = drafts.map(|t| eval(session, &[t], Class::Exact, Outputs::Last));
    for n in 1..=EXACT_ROWS {
        session.truncate(prompt.len());
        assert!(eval(session, &drafts[..n], Class::Exact, Outputs::All) == alone[..n].concat(), "{what}, {n} rows");
        session.truncate(prompt.len());
        assert!(eval(session, &drafts[..n], Class::Exact, Outputs::Last) == alone[n - 1], "{what}, last of {n}");
    }
}

/// Guards against kernels that are chosen by the number of rows.
#[test]
fn rows_and_cuts_of_all_types() {
    let dir = tempfile::tempdir().unwrap();
    for &ty in TensorType::ALL.iter().filter(|ty| CpuBackend::supports_type(**ty)) {
        for experts in [false, true] {
            let opened = opened(&dir, 1, ty, experts);
            for isa in sets() {
                let what = format!("{ty}, experts {experts}, {}", isa.name());
                let prompt = tokens(37);
                let mut session = start(&opened, isa, 64);
                let whole = followed(&mut session, &prompt);
                assert!(whole.iter().any(|b| *b != whole[0]), "{what}: logits that say nothing");
                exact_rows(&mut session, &what);
                for batch in [1, 7, 36] {
                    assert!(followed(&mut start(&opened, isa, batch), &prompt) == whole, "{what}, passes of {batch}");
                }
            }
        }
    }
}

/// Guards against attention whose blocks or tiles begin where a pass does.
#[test]
fn cuts_of_a_long_prompt() {
    let dir = tempfile::tempdir().unwrap();
    for (ty, experts) in [(TensorType::Q4_K, false), (TensorType::Q8_0, true)] {
        let opened = opened(&dir, 2, ty, experts);
        for isa in sets() {
            let prompt = tokens(540);
            let whole = followed(&mut start(&opened, isa, 540), &prompt);
            for batch in [1, 7, 64, 200, 512] {
                let cut = followed(&mut start(&opened, isa, batch), &prompt);
                assert!(cut == whole, "{ty}, {}, passes of {batch}", isa.name());
            }
        }
    }
}

/// What a session says of more rows than an exact pass may have.
#[test]
fn exact_tokens_are_evaluated_in_passes_of_few_rows() {
    let dir = tempfile::tempdir().unwrap();
    let opened = opened(&dir, 1, TensorType::F32, false);
    let mut session = start(&opened, Isa::detect(), 64);
    let many = tokens(19);
    let alone: Vec<Vec<u32>> = many.iter().map(|t| eval(&mut session, &[*t], Class::Exact, Outputs::Last)).collect();
    session.truncate(0);
    assert!(eval(&mut session, &many, Class::Exact, Outputs::Last) == alone[18]);
    session.truncate(0);
    let e = session.eval(&many, Class::Exact, Outputs::All, &|| false).unwrap_err().to_string();
    assert!(e.contains("19 tokens") && e.contains("8 rows"), "{e}");
}

/// Guards against forks that write into pages which others read, and against pages whose place changes a result.
#[test]
fn forks_go_on_as_if_they_were_alone() {
    let dir = tempfile::tempdir().unwrap();
    let opened = opened(&dir, 2, TensorType::Q4_K, false);
    let mut session = start(&opened, Isa::detect(), 64);
    let all = tokens(300);
    let go_on = |session: &mut Session, tokens: &[u32]| {
        tokens.iter().flat_map(|t| eval(session, &[*t], Class::Exact, Outputs::Last)).collect::<Vec<u32>>()
    };
    // What two conversations that begin alike give, each by itself.
    let (others, rest) = ([7, 8, 9, 10], &all[150..160]);
    eval(&mut session, &all[..150], Class::Bulk, Outputs::None);
    let first = go_on(&mut session, rest);
    session.truncate(0);
    eval(&mut session, &all[..100], Class::Bulk, Outputs::None);
    let second = go_on(&mut session, &others);

    session.truncate(0);
    eval(&mut session, &all[..150], Class::Bulk, Outputs::None);
    let (one, two) = (session.sequence(), session.fork_at(100).unwrap());
    assert!(session.fork_at(151).is_err());
    let mut got = [Vec::new(), Vec::new()];
    for i in 0..10 {
        got[0].extend(go_on(&mut session, &rest[i..=i]));
        if i < 4 {
            session.switch(two).unwrap();
            got[1].extend(go_on(&mut session, &others[i..=i]));
            session.switch(one).unwrap();
        }
    }
    assert!(got[0] == first, "the one that was forked");
    assert!(got[1] == second, "the fork");
    // The fork alone, in pages that are no longer the first ones.
    assert!(session.close(one).is_err());
    session.switch(two).unwrap();
    session.close(one).unwrap();
    session.truncate(100);
    assert!(go_on(&mut session, &others) == second, "the fork, alone");
    assert!(session.switch(one).is_err() && session.position() == 104);
}
